"""The embedded default as an experiment: what three seeds learn, in numbers and as a picture.

    python -m bench.tiny [--seeds 0,1,2] [--ranks 2] [--out FOLDER] [--reuse]

Runs train.py with its defaults once a seed, then reads the evaluation rollouts of each run: format and length
reward, length among samples that have an answer, correlation of asked and written words, share of distinct
word 5-grams, share of the prompt's names that the text uses. The best constant length is the mean length
reward that the best single number of words would earn. Writes bench/results/tiny.json and tiny.svg and ends
with one JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from bench import hardware
from data.prompts import parse_range
from rewards import count_words, length_reward, structure

ROOT = Path(__file__).parent.parent
EVAL = ROOT / "data" / "tiny" / "eval_prompts.jsonl"
PANELS = {
    "format": "format reward", "length": "length reward", "length_given_answer": "length, given an answer",
    "correlation": "correlation asked, written", "distinct_5grams": "distinct 5-grams",
    "names_used": "names used"
}
COLOURS = ("#1f5fa8", "#c2571a", "#3b8a3b")


def measure(rollouts: Path, asked: dict[str, dict]) -> dict[str, float]:
    """All figures of one evaluation file."""
    rows, given, words, wanted, grams, names = [], [], [], [], [], []
    for line in rollouts.read_text().strip().split("\n"):
        record = json.loads(line)
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
    return {
        "format": float(np.mean([r["format"]
                                 for r in rows])), "length": float(np.mean([r["length"] for r in rows])),
        "length_given_answer": float(np.mean(given)), "correlation": float(np.corrcoef(wanted, words)[0, 1]),
        "distinct_5grams": len(set(grams)) / len(grams), "names_used": float(np.mean(names))
    }


def best_constant(asked: dict[str, dict]) -> tuple[float, int]:
    """(mean length reward, words) of the single length that suits all prompts best."""
    ranges = [parse_range(prompt) for prompt in asked.values()]
    return max((float(np.mean([length_reward(n, *r) for r in ranges])), n) for n in range(1, 200))


def label(x: float, y: float, text: str, **style) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes(style)}>{text}</text>'


def line(points: list[tuple[float, float]], **style) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" {attributes(style)}/>'


def attributes(style: dict) -> str:
    return " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in style.items())


def picture(runs: list[dict], constant: float) -> str:
    """A panel for each figure against steps, a line a seed, as SVG."""
    width, height, across, down = 220, 130, 268, 192
    last = max(max(run["curve"]) for run in runs)
    parts = []
    for i, (key, title) in enumerate(PANELS.items()):
        left, top = 40 + i % 3 * across, 28 + i // 3 * down

        def at(step: float, value: float, left=left, top=top) -> tuple[float, float]:
            return left + width * step / last, top + height * (1 - value)

        parts.append(label(left, top - 9, title, font_size=12, font_weight="bold"))
        for tick in (0, 0.25, 0.5, 0.75, 1):
            x, y = at(0, tick)
            parts += [
                line([(x, y), at(last, tick)], stroke="#ddd"),
                label(x - 6, y + 4, f"{tick:g}", text_anchor="end")
            ]
        for step in range(0, last + 1, 20):
            parts.append(label(at(step, 0)[0], top + height + 15, str(step), text_anchor="middle"))
        if key == "length":
            x, y = at(last, constant)
            parts.append(line([at(0, constant), (x, y)], stroke="#888", stroke_dasharray="4 3"))
            parts.append(label(x, y + 13, "best constant length", text_anchor="end", fill="#666"))
        for run, colour in zip(runs, COLOURS):
            points = [at(step, values[key]) for step, values in run["curve"].items()]
            parts.append(line(points, stroke=colour, stroke_width=1.8))
    for i, (run, colour) in enumerate(zip(runs, COLOURS)):
        parts.append(label(40 + 60 * i, 2 * down + 2, f"seed {run['seed']}", fill=colour))
    parts.append(label(240, 2 * down + 2, "held-out prompts, against GRPO steps"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{3 * across + 20}" height="{2 * down + 12}" '
    style = 'font-family="sans-serif" font-size="11" fill="#333">'
    return "\n".join([head + style, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_tiny"), help="folder for the runs")
    parser.add_argument("--reuse", action="store_true", help="measure runs that are there already")
    args, options = parser.parse_known_args()
    asked = {(p := json.loads(line))["id"]: p for line in EVAL.read_text().splitlines()}
    constant, constant_words = best_constant(asked)
    runs = []
    for seed in map(int, args.seeds.split(",")):
        folder, start = args.out / f"seed_{seed}", time.perf_counter()
        if not args.reuse:
            subprocess.run([
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                f"--nproc_per_node={args.ranks}",
                str(ROOT / "train.py"), "--run_dir",
                str(folder), "--seed",
                str(seed), *options
            ],
                           check=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
        seconds = time.perf_counter() - start
        files = sorted((folder / "rollouts").glob("eval_*.jsonl"))
        runs.append({
            "seed": seed, "seconds": round(seconds),
            "curve": {int(f.stem[5:]): measure(f, asked)
                      for f in files}
        })
    machine = hardware()
    print(f"{args.ranks} ranks; best constant length {constant_words} words earns {constant:.3f}")
    for run in runs:
        first, last = (list(run["curve"].values())[i] for i in (0, -1))
        moves = "  ".join(f"{key} {first[key]:.3f} -> {last[key]:.3f}" for key in PANELS)
        print(f"seed {run['seed']} ({run['seconds']} s, {max(run['curve'])} steps): {moves}")
    result = {
        "bench": "tiny", **machine, "ranks": args.ranks, "options": options,
        "best_constant_length": round(constant, 4), "runs": [
            {**run, "curve": {s: {k: round(v, 4)
                                  for k, v in c.items()}
                              for s, c in run["curve"].items()}} for run in runs
        ]
    }
    results = ROOT / "bench" / "results"
    results.mkdir(exist_ok=True)
    (results / "tiny.json").write_text(json.dumps(result, indent=1) + "\n")
    (results / "tiny.svg").write_text(picture(runs, constant))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
