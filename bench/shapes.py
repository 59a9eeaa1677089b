"""Shapes of random weights: Qwen2.5's, and small ones for a CPU."""

from model import ModelConfig
from scripts import plan

SHAPES = {size.lower(): plan.SHAPES[f"Qwen2.5-{size}"] for size in ("0.5B", "1.5B", "7B")} | {
    "43m": ModelConfig(151936, 256, 704, 6, 8, 2, tie_word_embeddings=True),  # Qwen2.5's vocabulary
    "small": ModelConfig(32768, 512, 1408, 8, 8, 2), "smoke": ModelConfig(512, 64, 96, 2, 4, 2)}
