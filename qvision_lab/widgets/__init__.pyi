from .explorer import Explorer as Explorer
from .explorer import explore as explore
from .notebook import open_lab as open_lab
