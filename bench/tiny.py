"""The embedded default as an experiment: what three seeds learn, in numbers and as a picture.

    python -m bench.tiny [--seeds 0,1,2] [--ranks 2] [--out FOLDER]

Runs train.py with its defaults once a seed, then reads the evaluation rollouts of each run: the mean of each
reward, length among samples that have an answer, correlation of asked and written words, share of distinct
word 5-grams, share of the prompt's names that the text uses. The best constant length is the mean length
reward that the best single number of words would earn. Writes bench/results/tiny.json and tiny.svg and ends
with one JSON line.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from bench import RESULTS, ROOT, finish, hardware, parser
from data.prompts import parse_range
from lib.files import read_jsonl
from rewards import length_reward
from text import count_words, structure
from viewer.plots import coloured, picture

EVAL = ROOT / "data/tiny/eval_prompts.jsonl"
PANELS = {
    "format": "format reward", "length": "length reward", "writing": "writing reward",
    "length_given_answer": "length, given an answer",
    "correlation": "correlation asked, written", "distinct_5grams": "distinct 5-grams",
    "names_used": "names used"}


def measure(rollouts: Path, asked: dict[str, dict]) -> dict[str, float]:
    """All figures of one evaluation file."""
    rows, given, words, wanted, grams, names = [], [], [], [], [], []
    for record in read_jsonl(rollouts):
        prompt = asked[record["prompt_id"]]
        answer = structure(record["text"])[2]
        body = answer or record["text"]  # a bare text still shows length, variety and names
        rows.append(record["rewards"])
        given += [record["rewards"]["length"]] if answer else []
        words.append(count_words(body))
        wanted.append(prompt["length"])
        tokens = body.split()
        grams += zip(*(tokens[i:] for i in range(5)))
        names.append(np.mean([name in body for name in prompt["names"]]))
    figures = {name: np.mean([r[name] for r in rows if r[name] is not None]) for name in rows[0]} | {
        "length_given_answer": np.mean(given), "correlation": np.corrcoef(wanted, words)[0, 1],
        "distinct_5grams": len(set(grams)) / len(grams), "names_used": np.mean(names)}
    return {name: round(float(value), 4) for name, value in figures.items()}


def best_constant(asked: dict[str, dict]) -> tuple[float, int]:
    """(mean length reward, words) of the single length that suits all prompts best."""
    ranges = [parse_range(prompt) for prompt in asked.values()]
    return max((float(np.mean([length_reward(n, *r) for r in ranges])), n) for n in range(1, 200))


def draw(runs: list[dict], constant: float) -> str:
    """A picture with a panel for each figure and a curve for each seed."""
    names, last = [f"seed {run['seed']}" for run in runs], max(max(run["curve"]) for run in runs)
    panels = {title: {name: [(step, values[key]) for step, values in run["curve"].items()]
                      for name, run in zip(names, runs)}
              for key, title in PANELS.items() if key in runs[0]["curve"][0]}
    panels[PANELS["length"]]["best constant length"] = [(0, constant), (last, constant)]
    return picture(panels, coloured(names), "held-out prompts, against GRPO steps")


def main():
    known = parser(__doc__)
    known.add_argument("--seeds", default="0,1,2")
    known.add_argument("--ranks", type=int, default=2)
    known.add_argument("--out", type=Path, default=Path("runs/bench_tiny"), help="folder for the runs")
    args, options = known.parse_known_args()
    asked = {prompt["id"]: prompt for prompt in read_jsonl(EVAL)}
    constant, constant_words = best_constant(asked)
    runs = []
    for seed in map(int, args.seeds.split(",")):
        folder, start = (args.out / f"seed_{seed}").resolve(), time.perf_counter()
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                        f"--nproc_per_node={args.ranks}", "train.py", "--run_dir", str(folder),
                        "--seed", str(seed), *options],
                       check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        runs.append({"seed": seed, "seconds": round(time.perf_counter() - start),
                     "curve": {int(f.stem[5:]): measure(f, asked)
                               for f in sorted((folder / "rollouts").glob("eval_*.jsonl"))}})
    print(f"{args.ranks} ranks; best constant length {constant_words} words earns {constant:.3f}")
    for run in runs:
        first, last = (run["curve"][step] for step in (min(run["curve"]), max(run["curve"])))
        moves = "  ".join(f"{key} {first[key]:.3f} -> {last[key]:.3f}" for key in PANELS if key in first)
        print(f"seed {run['seed']} ({run['seconds']} s, {max(run['curve'])} steps): {moves}")
    (RESULTS / "tiny.svg").write_text(draw(runs, constant))
    finish({"bench": "tiny", **hardware(), "ranks": args.ranks, "options": options,
            "best_constant_length": round(constant, 4), "runs": runs}, save=True)


if __name__ == "__main__":
    main()
