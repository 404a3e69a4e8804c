from .analysis import averages as averages
from .analysis import crossover as crossover
from .analysis import differences as differences
from .analysis import differences_of_scenes as differences_of_scenes
from .analysis import part as part
from .analysis import parts as parts
from .analysis import summarise as summarise
from .study import Study as Study
