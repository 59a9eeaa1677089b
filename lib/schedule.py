"""The learning rate of pretraining, SFT and reward models."""

import math


def learning_rate(step: int, steps: int, warmup: int, peak: float, decay: float = 1.0,
                  linear: bool = False) -> float:
    """Learning rate of a step, counted from 0: linear warm-up, the peak, then cosine (or linear) decay to 5 %
    of it over the last `decay` of the steps, by default all after warm-up."""
    if step < warmup:
        return peak * (step + 1) / warmup
    start = max(warmup, steps - round(decay * steps))
    x = max(0, step - start) / max(1, steps - start)
    return peak * (0.05 + 0.95 * (1 - x if linear else 0.5 * (1 + math.cos(math.pi * x))))
