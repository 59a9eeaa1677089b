"""Kernels, each beside its PyTorch reference, which is also the CPU path."""

from kernels.logprob import linear_logprob

__all__ = ["linear_logprob"]
