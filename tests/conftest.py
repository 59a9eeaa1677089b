import importlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
# As torchrun's workers: the number of threads changes the rounding of CPU matrix products.
torch.set_num_threads(1)
importlib.import_module("bench.interpreter")  # before a test imports a kernel
