"""Optimiser state and frozen weights that wait in pinned host memory."""

import torch
from torch import nn

from lib.distributed import own


def offload_(optimizer: torch.optim.Optimizer):
    """Keeps AdamW's moments in pinned host memory between steps. Weights and gradients, which
    CPUOffloadPolicy moves too, would cross the bus for every micro-batch; moments do so once a step, when no
    activations are in memory."""
    moments, host = ("exp_avg", "exp_avg_sq"), {}

    def fetch(*_):
        for p, state in optimizer.state.items():
            state |= {key: state[key].to(p.device, non_blocking=True) for key in moments}

    def stow(*_):
        for p, state in optimizer.state.items():
            for key in moments:
                if (p, key) not in host:
                    host[p, key] = torch.empty_like(state[key], device="cpu", pin_memory=p.is_cuda)
                state[key] = host[p, key].copy_(state[key], non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a checkpoint reads them next

    optimizer.register_step_pre_hook(fetch)
    optimizer.register_step_post_hook(stow)
    stow()


class Offloaded:
    """Context manager that holds the weights of a frozen model on its device; outside they stay in pinned
    host memory."""

    def __init__(self, model: nn.Module):
        self.shards = [own(p.detach()) for p in model.parameters()]
        self.host = [torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x) for x in self.shards]
        self.sizes = [x.untyped_storage().nbytes() for x in self.shards]
        self.__exit__()

    def __enter__(self):
        for x, host, size in zip(self.shards, self.host, self.sizes):
            x.untyped_storage().resize_(size)
            x.copy_(host, non_blocking=True)

    def __exit__(self, *error):
        for x in self.shards:
            x.untyped_storage().resize_(0)
