"""Triton, where there is one, and the table of block sizes.

A kernel runs on tensors that live on a GPU; everything else takes the PyTorch reference beside it. No option
chooses. With TRITON_INTERPRET=1 the same kernels run on CPU tensors, which is how they are tested.
"""

import json
from functools import cache
from pathlib import Path

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the references do all the work

    class triton:
        @staticmethod
        def jit(function=None, **options):
            return function or triton.jit

    class tl:
        constexpr = None  # kernels name it in their signatures

    AVAILABLE = False
else:
    AVAILABLE = True

TABLE = Path(__file__).with_name("blocks.json")


def fused(x: torch.Tensor) -> bool:
    """Whether Triton takes this tensor."""
    return AVAILABLE and x.is_cuda


@cache
def table() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(TABLE.read_text())


@cache
def device_name() -> str:
    """The GPU as the table knows it, without what the memory's size or the socket adds: NVIDIA H100."""
    if not torch.cuda.is_available():
        return "none"
    return " ".join(torch.cuda.get_device_name().split()[:2]).split("-")[0]


@cache
def processors() -> int:
    """Streaming multiprocessors of the GPU."""
    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 1


def blocks(kernel: str, dtype: torch.dtype, size: int) -> dict[str, int]:
    """Block sizes, warps and stages of `kernel`, for a dtype of 2 or 4 bytes and a size (see the callers).

    Entries are measured on the device named, or hold for all devices ("default"); `python -m bench.tune`
    measures and rewrites this device's. The nearest size not below the one asked for, else the largest, is
    taken. A table instead of an autotuner: the first training step does not stall, and two runs on one kind
    of device compute alike.
    """
    prefix = f"{kernel}/{dtype.itemsize}/"
    entries = table()["default"] | table().get(device_name(), {})
    sizes = {int(key[len(prefix):]): entry for key, entry in entries.items() if key.startswith(prefix)}
    if not sizes:
        raise KeyError(f"{TABLE} has no entry {prefix}*")
    return dict(sizes[min((s for s in sizes if s >= size), default=max(sizes))])
