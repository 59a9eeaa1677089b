"""Training tokens a second against transformers' Trainer: same model, packed rows, batch and optimiser.

    python -m bench.bench_pretrain --trainer PYTHON [--shape 43m] [--rounds 2] [--steps 5]

The model is the embedded default with its own documents, or one of 43M parameters, of which 39M are the
embedding of Qwen2.5's vocabulary, with the modules of Python's standard library. Both sides train in
fp32 on the CPU, with as many threads, each in a process of its own, in turn, on the same rows: the peer gets
them as its own collator packs them, by positions that start again at each document. The losses of both must
agree. PYTHON has transformers and accelerate. Ends with one JSON line.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from bench import ROOT, finish, hardware, parser
from bench.bench_step import answer, make
from data.corpus import take
from data.tiny.make import document
from lib.files import locate, read_jsonl, write_jsonl
from scripts import pretrain


def prepare(folder: Path, shape: str, steps: int) -> pretrain.Config:
    """Model, documents, and the peer's rows; returns our options."""
    if shape == "43m":
        make(folder, shape)
        (folder / "model/generation_config.json").write_text('{"eos_token_id": 0}')  # it had none
        files = sorted(Path(os.__file__).parent.glob("*.py"))
        texts = [t for file in files if (t := file.read_text(encoding="utf-8", errors="replace")).strip()]
    else:
        rng = random.Random(0)
        texts = [document(rng) for _ in range(40 * steps)]
    write_jsonl(folder / "documents.jsonl", [{"text": text} for text in texts])
    model = str(folder / "model") if shape == "43m" else locate("data/tiny/base")
    config = pretrain.Config(model=model, documents=str(folder / "documents.jsonl"),
                             device="cpu", steps=steps, lr=1e-3, warmup=0, decay=0.0)
    source = pretrain.read_inputs(config, 1).sources[0]
    taken, _ = take([source], [1], {source.name: 0}, steps * config.rows_per_step)
    rows = [source.row(k) for _, k in taken]
    positions = [np.concatenate([np.arange(n) for n in row.lengths]) for row in rows]
    np.savez(folder / "rows.npz", tokens=[row.tokens_T for row in rows],
             targets=[row.targets_T for row in rows], positions=positions)
    return config


def ours(config: pretrain.Config, run_dir: Path) -> dict:
    """A run of scripts.pretrain; returns what the peer answers."""
    given = [f"--{name}={value}" for name, value in vars(config).items() if value != ""]
    subprocess.run([sys.executable, "-m", "scripts.pretrain", *given, f"--run_dir={run_dir}"], check=True,
                   cwd=ROOT, stdout=sys.stderr,
                   env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    lines = read_jsonl(run_dir / "metrics.jsonl")
    return {"seconds": [line["time/total"] for line in lines], "losses": [line["loss"] for line in lines],
            "peak_gb": lines[-1]["memory/peak_gb"]}


def main():
    known = parser(__doc__)
    known.add_argument("--trainer", metavar="PYTHON", required=True)
    known.add_argument("--shape", default="tiny", choices=("tiny", "43m"))
    known.add_argument("--rounds", type=int, default=2)
    known.add_argument("--steps", type=int, default=5, help="of a round, of which the first does not count")
    args = known.parse_args()
    machine, found = hardware(), {"ours": [], "trainer": []}
    with tempfile.TemporaryDirectory() as folder:
        config = prepare(Path(folder), args.shape, args.steps)
        settings = {"model": config.model, "rows": f"{folder}/rows.npz", "batch": config.rows_per_step,
                    "lr": config.lr, "weight_decay": config.weight_decay, "threads": machine["threads"]}
        for i in range(args.rounds):
            found["ours"].append(ours(config, Path(folder, f"run{i}")))
            trainer = answer(args.trainer, "bench/trainer_peer.py", input=json.dumps(settings))
            found["trainer"].append(trainer)
            for name, (*_, last) in found.items():
                print(f"{name:8}{statistics.median(last['seconds'][1:]):8.2f} s a step of "
                      f"{config.rows_per_step} x {config.row_tokens} tokens  {last['peak_gb']:6.2f} GB",
                      flush=True)
    losses = [[run["losses"] for run in runs] for runs in found.values()]
    seconds = {name: statistics.median(s for run in runs for s in run["seconds"][1:])
               for name, runs in found.items()}
    apart, ratio = float(np.abs(np.subtract(*losses)).max()), seconds["trainer"] / seconds["ours"]
    print(f"trainer / ours: {ratio:.2f} (bar 1.5); losses at most {apart:.1e} apart")
    finish({"bench": f"pretrain_{args.shape}", **machine, "steps": args.steps - 1, "rounds": args.rounds,
            "tokens_per_second": {name: round(config.rows_per_step * config.row_tokens / s)
                                  for name, s in seconds.items()},
            "peak_gb": {name: max(run["peak_gb"] for run in runs) for name, runs in found.items()},
            "ratio": round(ratio, 3), "losses_apart": apart, "versions": trainer["versions"]}, save=True)


if __name__ == "__main__":
    main()
