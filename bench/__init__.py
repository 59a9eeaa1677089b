"""Measurements: each file is a command that prints hardware, settings and figures, then one JSON line."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from lib import options  # noqa: F401  # for its --help

ROOT = Path(__file__).parent.parent


def torchrun(ranks: int, *arguments: str, **environment: str):
    """Runs a program of this repository on so many ranks of a thread each. Raises CalledProcessError."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    subprocess.run([*launch, *arguments], check=True, cwd=ROOT,
                   env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def hardware() -> dict:
    """What a figure is measured on, printed and returned."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = (line for line in info.read_text().splitlines() if line.startswith("model name"))
        cpu = next((line.split(":", 1)[1].strip() for line in lines), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu,
               "torch": torch.__version__}
    print("; ".join(f"{k} {v}" for k, v in machine.items()), flush=True)
    return machine
