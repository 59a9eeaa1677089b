"""Qwen2.5's shapes, for random weights."""

from model import ModelConfig

SHAPES = {
    "0.5b": ModelConfig(151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True),
    "1.5b": ModelConfig(151936, 1536, 8960, 28, 12, 2, tie_word_embeddings=True),
    "7b": ModelConfig(152064, 3584, 18944, 28, 28, 4),
}
