from .recipe import load_recipe as load_recipe
from .train import train_captioner as train_captioner
