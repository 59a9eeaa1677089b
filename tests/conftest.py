import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
# As torchrun's workers: the number of threads changes the rounding of CPU matrix products.
torch.set_num_threads(1)


def interpret_kernels():
    """Without a GPU Triton's kernels run in its interpreter, whose dot takes the bits of a bf16 for an
    integer's; given fp32 it computes what the hardware does, exact products summed in fp32."""
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported
    try:
        import numpy as np
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    except ImportError:
        return
    dot = InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)


if not torch.cuda.is_available():
    interpret_kernels()
