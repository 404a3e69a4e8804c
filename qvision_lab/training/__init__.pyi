from .confidence import calibrate_checkpoint as calibrate_checkpoint
from .recipe import load_recipe as load_recipe
from .train import train_captioner as train_captioner
