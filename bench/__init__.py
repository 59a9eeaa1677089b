"""Measurements: each file is a command that prints hardware, settings and figures, then one JSON line."""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch

from lib.files import ROOT  # which imports lib.options, for its --help

RESULTS = ROOT / "bench/results"
CUDA = torch.cuda.is_available()


def parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def hardware() -> dict:
    """What a figure is measured on, printed and returned."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpus = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = (cpus or [platform.processor() or platform.machine()])[0]
    machine = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
               "gpu": torch.cuda.get_device_name() if CUDA else None, "torch": torch.__version__}
    print("; ".join(f"{k} {v}" for k, v in machine.items()), flush=True)
    return machine


def now() -> float:
    """Seconds on a clock, once the GPU has finished what it was given."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).split(chr(10))[0]}"[:160]


def finish(result: dict, save: bool = False):
    """Prints the JSON line that a bench ends with; `save` writes it to bench/results too."""
    if save:
        (RESULTS / f"{result['bench']}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)
