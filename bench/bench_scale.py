"""What a reward's scale does: the embedded default with one reward multiplied, per reward and as a raw sum.

    python -m bench.bench_scale [--scaled length] [--by 100] [--seeds 0,1,2] [--out FOLDER] [--reuse]

Two runs of train.py a seed, in both of which one reward is multiplied (rewards.TRANSFORMS; logged raw):
`per_reward` normalises each reward in its group before they are averaged, `sum` adds them up raw. The figures
are each reward on held-out prompts at the end, its mean over the run's evaluations, which sees how fast it
was learned, and how much worse `sum` is off. Options that it does not know go to train.py. Writes
bench/results/scale.json and scale.svg and ends with one JSON line.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

from bench import ROOT, hardware, torchrun
from lib.files import read_jsonl
from viewer.plots import Curve, picture

MODES = ("per_reward", "sum")


def worker():
    """train.py with one reward multiplied."""
    import rewards
    import train

    name, by = os.environ["SCALED"], float(os.environ["SCALE_BY"])
    rewards.TRANSFORMS[name] = lambda value: by * value
    train.main()


def curves(folder: Path) -> dict[str, Curve]:
    """Each reward on held-out prompts, by its name."""
    evaluated = [m for m in read_jsonl(folder / "metrics.jsonl") if "eval/truncated" in m]
    names = [name.removeprefix("eval/reward/") for name in evaluated[0] if name.startswith("eval/reward/")]
    return {name: [(m["step"], m[f"eval/reward/{name}"]) for m in evaluated] for name in names}


def main():
    if sys.argv[1:2] == ["worker"]:
        del sys.argv[1]
        return worker()
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scaled", default="length", help="the one that is multiplied")
    parser.add_argument("--by", type=float, default=100)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_scale"), help="folder for the runs")
    parser.add_argument("--reuse", action="store_true", help="measure runs that are there already")
    args, options = parser.parse_known_args()
    machine, runs = hardware(), {}
    for seed in map(int, args.seeds.split(",")):
        for mode in MODES:
            folder = (args.out / f"{mode}_{seed}").resolve()
            if not args.reuse:
                torchrun(args.ranks, "-m", "bench.bench_scale", "worker", "--run_dir", str(folder),
                         "--seed", str(seed), "--advantage", mode, *options,
                         SCALED=args.scaled, SCALE_BY=str(args.by))
            runs[mode, seed] = curves(folder)
    rewards = list(next(iter(runs.values())))
    of = {(mode, name): [[v for _, v in c[name]] for (m, _), c in runs.items() if m == mode]
          for mode in MODES for name in rewards}
    figures = {name: {mode: {"last": [round(v[-1], 4) for v in of[mode, name]],
                             "mean": [round(float(np.mean(v)), 4) for v in of[mode, name]]} for mode in MODES}
               for name in rewards}
    print(f"{args.scaled} x {args.by:g}; held-out rewards at the end (mean over the run), seeds {args.seeds}")
    for name, by_mode in figures.items():
        per_reward, summed = by_mode["per_reward"], by_mode["sum"]
        for mode, f in by_mode.items():
            shown = ", ".join(f"{a:.3f} ({b:.3f})" for a, b in zip(f["last"], f["mean"]))
            print(f"{name:10}{mode:12}{shown}")
        worse = {k: round(float(np.mean(per_reward[k]) - np.mean(summed[k])), 4) for k in ("last", "mean")}
        by_mode["sum_worse_by"] = worse
        print(f"{name:10}sum is worse by {worse['last']:.3f} ({worse['mean']:.3f})")
    panels = {f"{name} reward" + f" (x {args.by:g})" * (name == args.scaled):
              {f"{mode}, seed {seed}": c[name] for (mode, seed), c in runs.items()} for name in rewards}
    colours = {name: ("#1f5fa8", "#c2571a")[name.startswith("sum")] for name in panels[next(iter(panels))]}
    results = ROOT / "bench" / "results"
    (results / "scale.svg").write_text(picture(panels, colours, "held-out prompts, against GRPO steps"))
    result = {"bench": "scale", **machine, "scaled": args.scaled, "by": args.by, "ranks": args.ranks,
              "seeds": args.seeds, "options": options, "held_out": figures}
    (results / "scale.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
