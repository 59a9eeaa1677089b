import importlib
import os
import sys
from pathlib import Path

# As torchrun's workers: the number of threads changes the rounding of CPU matrix products. Before torch and
# NumPy are imported, whose threads would only get in each other's way in matrices of this size.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)
importlib.import_module("bench.interpreter")  # before a test imports a kernel
