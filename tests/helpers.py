"""What several test files share: short runs and what they wrote, tiny models, texts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

import model as qwen
import train
from data.tokenizer import copy_files
from lib.files import ROOT

SMALL = [
    "--prompts_per_step", "2", "--group_size", "4", "--max_new_tokens", "48", "--unreachable", "keep",
    "--eval_every", "2", "--save_every", "2", "--eval_prompts",
    str(ROOT / "tests" / "eval_small.jsonl")
]


# ---------------------------------------------------------------------- runs


def in_process(folder: Path, *options: str, small=SMALL):
    train.train(train.parse([*small, "--run_dir", str(folder), *options]))


def launch(ranks: int, *command, timeout: int = 300, **environment: str) -> subprocess.CompletedProcess:
    """A script and its arguments as a user starts them, with torchrun for several ranks."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] * (ranks > 1)
    return subprocess.run([sys.executable, *torchrun, *map(str, command)], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=timeout)


def flat(m: dict) -> dict[str, float]:
    """Metrics, the numbers of lists as metrics of their own, NAME/0 and on; null and NaN are 0 in them."""
    return {k: v for k, v in m.items() if not isinstance(v, list)} | {
        f"{k}/{i}": x if x and x == x else 0.0
        for k, v in m.items() if isinstance(v, list) for i, x in enumerate(v)}


def metrics(folder: Path) -> list[dict]:
    """A dict a step, its evaluation joined to it, without what depends on the machine or the number of
    ranks; `flat`."""
    depends = ("time/", "tokens_per_second/", "memory/", "balance/")
    by_step = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        m = json.loads(line)
        assert not m.keys() & by_step.get(m["step"], {}).keys() - {"step"}, "no line twice"
        by_step.setdefault(m["step"], {}).update(
            (k, v) for k, v in flat(m).items() if not k.startswith(depends))
    return list(by_step.values())


def rollouts(folder: Path) -> dict[str, str]:
    return {f.name: f.read_text() for f in sorted((folder / "rollouts").iterdir())}


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    files = sorted((folder / "checkpoints" / f"step_{step:06d}").rglob("*.safetensors"))
    return {f"{f.parent.name}/{f.name}/{name}": t for f in files for name, t in load_file(f).items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return len(a) > 0 and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def obeys_umask(folder: Path) -> bool:
    """Whether all files have the mode of one that was just created."""
    (plain := folder.with_name("plain")).touch()
    return {f.stat().st_mode for f in folder.rglob("*") if f.is_file()} == {plain.stat().st_mode}


# ---------------------------------------------------------------------- models

TINY = {"vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False, "initializer_range": 0.02}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}  # and "type" or "rope_type"
KINDS = {"untied": {}, "tied": {"tie_word_embeddings": True},
         "Qwen3 untied": {"qk_norm": True, "head_dim": 32},
         "Qwen3 tied": {"qk_norm": True, "head_dim": 8, "tie_word_embeddings": True},
         "yarn": {"rope_scaling": {"rope_type": "yarn", **YARN}}}


def random_model(seed=0, dtype=torch.float32, scale=0.02, **fields):
    """A tiny model, matrices N(0, scale), N(0, 0.2) added to biases and norm weights as made (0 and 1)."""
    model = qwen.Qwen2(qwen.ModelConfig(**{**TINY, **fields}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(scale * noise if p.dim() > 1 else 0.2 * noise + (1.0 if "norm" in name else 0.0))
    return model.to(dtype)


def random_tokens(n, vocabulary=131, seed=1):
    return torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(seed))


def write_qwen3(path):
    """A random Qwen3 of data/tiny's vocabulary, with its tokenizer."""
    fields = {"vocab_size": 1024, "max_position_embeddings": 2048, "tie_word_embeddings": True}
    qwen.save(random_model(scale=0.1, head_dim=32, qk_norm=True, **fields), path)
    copy_files(ROOT / "data/tiny/base", path)
    return path


def assert_same_bits(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


# ---------------------------------------------------------------------- texts


def said(text):
    return SimpleNamespace(text=text)


def asked(lo=None, hi=None, style="think"):
    return SimpleNamespace(length_range=None if lo is None else (lo, hi), style=style)
