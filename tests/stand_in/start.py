"""Makes this process, which has the stand-in's library loaded, run on it."""

import gc

from .aten import Operators
from .device import StandIn, load_extension

GPU = StandIn()
OPERATORS = Operators(GPU)
load_extension()
gc.freeze()  # a kernel makes many objects: looking at PyTorch's each time would take as long as running it
