"""Imported before `kernels`: without a GPU their Triton kernels then run on CPU tensors, in the interpreter.

Its dot takes the bits of a bf16 for an integer's; given fp32 it computes what the hardware does, exact
products summed in fp32.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import numpy as np
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    except ImportError:  # no Triton, nothing to interpret
        pass
    else:
        dot = InterpreterBuilder.create_dot

        def widened(x):
            if x.dtype.scalar != tl.bfloat16:
                return x
            return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

        InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
