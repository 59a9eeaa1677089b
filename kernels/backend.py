"""Optional import of Triton, and the table of block sizes.

Tensors on a GPU use the Triton kernels, all others the PyTorch reference beside each kernel. With
TRITON_INTERPRET=1 the kernels run on CPU tensors, which is how they are tested.
"""

import json
from functools import cache
from pathlib import Path

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: only the references run

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
    """Whether the Triton kernels handle this tensor."""
    return AVAILABLE and x.is_cuda


@cache
def table() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(TABLE.read_text())


@cache
def device_name() -> str:
    """The GPU's name as used in the table, without memory size and form factor, such as "NVIDIA H100"."""
    if not torch.cuda.is_available():
        return "none"
    return " ".join(torch.cuda.get_device_name().split()[:2]).split("-")[0]


@cache
def processors() -> int:
    """Streaming multiprocessors of the GPU."""
    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 1


def blocks(kernel: str, dtype: torch.dtype, size: int) -> dict[str, int]:
    """Block sizes, warps and stages of `kernel`, for a dtype of 2 or 4 bytes and a size (see the callers).

    Entries belong to a device, or to all devices ("default"); `python -m bench.tune` measures this device's.
    The smallest size that is not below the one asked for is used, else the largest. A table is used instead
    of an autotuner so that the first step does not stall and runs on the same kind of device compute the same
    bits.
    """
    prefix = f"{kernel}/{dtype.itemsize}/"
    entries = table()["default"] | table().get(device_name(), {})
    sizes = {int(key[len(prefix):]): entry for key, entry in entries.items() if key.startswith(prefix)}
    if not sizes:
        raise KeyError(f"{TABLE} has no entry {prefix}*")
    return dict(sizes[min((s for s in sizes if s >= size), default=max(sizes))])
