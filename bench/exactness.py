"""How often another way of computing draws another token: the engine against a packed forward.

    python -m bench.exactness [--model FOLDER] [--prompts 32]

Under teacher forcing: each position of each sample is given the sample's own tokens, and the token that the
packed forward's hidden state draws there, with the same uniform number, is compared with the one that the
engine drew (`flips`). `gap` is |logprob of the forward - logprob of the engine|.

    fp32        the engine and the forward in fp32
    fp32 tp 2   the engine split over two processes
    bf16        the engine in bf16, the forward in bf16
    bf16/fp32   the engine in bf16, the forward in fp32: what a trainer sees
"""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

import model as qwen
from bench import ROOT, finish, hardware, parser
from data import prompts as prompt_data
from data.tokenizer import Tokenizer
from kernels.sample import head_draw, streams, uniforms
from replica import tp_slice
from sampler import Completion, Sampler
from scheduler import Request


@torch.inference_mode()
def compare(model, n_valid: int, requests: list[Request], completions: list[Completion]) -> dict:
    """Draws, the share that flips, and the logprob gap, of completions against packed forwards by `model`."""
    draws = flips = 0
    gaps = []
    for c in completions:
        r, n = requests[c.prompt_index], len(c.token_ids)
        ids = torch.tensor(r.prompt_ids + c.token_ids)
        hidden = model(ids, qwen.packed([len(ids)]))[len(r.prompt_ids) - 1:-1]
        uniform = uniforms(streams(torch.tensor(r.seed), torch.tensor(c.sample_index)), torch.arange(n))
        token, logp = head_draw(hidden, model.head_weight, n_valid, uniform, torch.full((n,), r.temperature))
        same = token == torch.tensor(c.token_ids)
        draws, flips = draws + n, flips + int((~same).sum())
        gaps.append((logp - torch.tensor(c.logprobs))[same].abs())
    gap = torch.cat(gaps)
    return {"draws": draws, "flips": flips, "flip_share": flips / draws, "gap_mean": gap.mean().item(),
            "gap_max": gap.max().item()}


def part(rank: int, tp: int, path: str, requests: list[Request], folder: str):
    """A process of a tensor-parallel engine; rank 0 leaves the completions in folder/completions.json."""
    store = dist.FileStore(f"{folder}/store", tp)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=tp)
    whole = qwen.load(path)
    model = qwen.Qwen2(whole.config, dist.group.WORLD).requires_grad_(False)
    for (name, p), full in zip(model.named_parameters(), whole.parameters()):
        p.copy_(tp_slice(name, full, rank, tp))
    completions = list(Sampler(model, Tokenizer(path)).generate(requests))
    if rank == 0:
        Path(folder, "completions.json").write_text(json.dumps([asdict(c) for c in completions]))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process at the end of the interpreter


def split(path: str, requests: list[Request], tp: int) -> list[Completion]:
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(part, (tp, path, requests, folder), nprocs=tp)
        return [Completion(**c) for c in json.loads(Path(folder, "completions.json").read_text())]


def main():
    options = parser(__doc__)
    options.add_argument("--model", default=str(ROOT / "data/tiny/base"), help="checkpoint folder")
    options.add_argument("--prompts", type=int, default=32, help="of data/tiny's evaluation, 4 samples each")
    args = options.parse_args()
    tokenizer = Tokenizer(args.model)
    prompts, _ = prompt_data.read(str(ROOT / "data/tiny/eval_prompts.jsonl"), "think", 256, True)
    requests = [Request(tokenizer.encode(p.text), 4, 256, 0.8, seed=i)
                for i, p in enumerate(prompts[:args.prompts])]
    models = {dtype: qwen.load(args.model, dtype).requires_grad_(False)
              for dtype in (torch.float32, torch.bfloat16)}
    written = {dtype: list(Sampler(model, tokenizer).generate(requests)) for dtype, model in models.items()}
    fp32, bf16 = models
    cases = {"fp32": (fp32, written[fp32]), "fp32 tp 2": (fp32, split(args.model, requests, 2)),
             "bf16": (bf16, written[bf16]), "bf16/fp32": (fp32, written[bf16])}
    figures = {}
    for name, (dtype, completions) in cases.items():
        figures[name] = compare(models[dtype], tokenizer.n_valid, requests, completions)
        print(f"{name:11}", "  ".join(f"{k} {v:.3g}" for k, v in figures[name].items()), flush=True)
    finish({"bench": "exactness", **hardware(), "model": Path(args.model).name, **figures})


if __name__ == "__main__":
    main()
