import importlib
import os
import sys
from pathlib import Path

# As torchrun's workers: the number of threads changes the rounding of CPU matrix products. Before torch and
# NumPy are imported, whose threads would only get in each other's way in matrices of this size.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)
importlib.import_module("bench.interpreter")  # before a test imports a kernel

from tests.forks import Forks  # noqa: E402
from tests.helpers import in_process  # noqa: E402


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    forks = Forks(tmp_path_factory.mktemp("ranks"))
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> Path:
    """The folder of a run of six steps on one rank, with an evaluation and a checkpoint every second."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    in_process(folder, "--steps", "6")
    return folder
