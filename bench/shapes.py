"""Qwen2.5's shapes, for random weights."""

from scripts import plan

SHAPES = {size.lower(): plan.SHAPES[f"Qwen2.5-{size}"] for size in ("0.5B", "1.5B", "7B")}
