"""The paper's questions in miniature: six arms on the embedded default, five paired seeds.

    python -m bench.study --prepare    # data, the continually pretrained base, a second writing model
    python -m bench.study              # two runs at a time, a thread each

Both continue where they stopped. A run is commands that a user would type; arms differ in the options and
the edit of rewards.py that are printed, and none is tuned. An arm's effect is its difference from the first
arm at the same seed, with Student's 95 % interval. It is measured on held-out prompts, by what no arm was
trained on and by the rewards. Writes bench/results/study.json and docs/study.svg, prints docs/study.md's
table and ends with one JSON line.
"""

import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import reward_model
from bench import ROOT, finish, hardware, parser
from bench.tiny import EVAL, measure
from data.tiny import make, pairs
from lib import distributed
from lib.files import read_jsonl, write_jsonl
from rewards import format_reward
from text import structure
from viewer.plots import label, line

OUT, BASE = ROOT / "runs/study", "data/tiny/base"
CONTINUAL, CHATS = OUT / "continual", OUT / "chats.jsonl"
COMMON = {"config": "configs/tiny.json", "prompts_per_step": 4}  # half of the default's: 30 runs are many
ARMS = {  # name: options
    "full": {"model": CONTINUAL},
    "direct answer": {"model": CONTINUAL, "prompt_style": "direct"},
    "no continual pretraining": {"model": BASE},
    "raw sum, writing x 100": {"model": CONTINUAL, "advantage": "sum"},
    "no repetition term": {"model": CONTINUAL},
    "SFT": {"model": CONTINUAL, "sft": CHATS, "lr": 1e-3, "warmup": 5},  # of scripts.pretrain
}
EDITS = {  # name: text of rewards.py, what takes its place
    "raw sum, writing x 100": ('"writing": (Writing(), 1.0)', '"writing": (Writing(), 100.0)'),
    "no repetition term": ("return 1.0 - repetition(answer) if ok else 0.0", "return 1.0 if ok else 0.0"),
}
UNSEEN = {"second": "second writing model", "names_used": "names kept", "distinct_5grams": "distinct 5-grams",
          "cut": "cut off"}
MEASURES = UNSEEN | {"length": "length reward", "format": "format reward", "writing": "writing reward"}
CLAIMS = {  # of the paper: the arm that must be worse than the first, and by which measure
    "thinking helps": ("direct answer", "second"),
    "continual pretraining helps": ("no continual pretraining", "second"),
    "RL is better than SFT": ("SFT", "second"),
    "each reward needs a normalisation of its own": ("raw sum, writing x 100", "second"),
    "the repetition term keeps texts varied": ("no repetition term", "distinct_5grams")}
STUDENT = {5: (2.776, 0.941), 2: (12.706, 1.376)}  # seeds: quantiles .975 and .8 of the differences' mean


def call(log: Path, *command, tree: Path = ROOT, ranks: int = 1, **options):
    """Runs a command of the repository, `--NAME VALUE` of each option behind it, and logs what it prints."""
    given = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] * (ranks > 1)
    print("$", *command, *given, flush=True)
    with open(log, "a") as f:
        subprocess.run([sys.executable, *start, *map(str, command), *given], check=True, cwd=tree, stdout=f,
                       stderr=f, env={**os.environ, "OMP_NUM_THREADS": "1"})


def chat(rng: random.Random) -> dict:
    """A request, a plan that states the length, and a text of that length by the grammar."""
    slots = make.request(rng)
    text = make.write(rng, slots, round(slots["n"] * rng.uniform(0.9, 1.1)))
    plan = make.fill(rng, rng.choice(make.PLANS["with the length"]), slots)
    return {"prompt": slots["query"], "response": f" <think>{plan}</think>\n<answer>{text}</answer>"}


def prepare():
    OUT.mkdir(parents=True, exist_ok=True)
    rng, log = random.Random("study"), OUT / "prepare.log"
    books = [make.write(rng, make.request(rng), rng.randint(15, 110)) for _ in range(12_000)]
    write_jsonl(OUT / "books.jsonl", [{"text": text} for text in books])
    write_jsonl(CHATS, [chat(rng) for _ in range(1600)])
    write_jsonl(OUT / "pairs.jsonl", pairs.pairs("study/train", 6400))
    write_jsonl(OUT / "eval_pairs.jsonl", pairs.pairs("study/eval", 500, held_out=True))
    if not (OUT / "second/evaluation.json").exists():
        call(log, "-m", "scripts.train_rm", ranks=2, seed=1, out=OUT / "second", pairs=OUT / "pairs.jsonl",
             eval_pairs=OUT / "eval_pairs.jsonl")
    call(log, "train.py", ranks=2, steps=40, seed=100, run_dir=OUT / "base_think")
    call(log, "-m", "scripts.tokenise", OUT / "books.jsonl", tokenizer=BASE, out=OUT / "books")
    call(log, "-m", "scripts.distil", OUT / "base_think", min_reward=1.2, corpus=OUT / "books", share=0.01,
         out=OUT / "thinking.jsonl")
    call(log, "-m", "scripts.tokenise", OUT / "thinking.jsonl", tokenizer=BASE, out=OUT / "thinking")
    call(log, "-m", "scripts.pretrain", ranks=2, model=BASE, steps=200, lr=1e-3, warmup=20,
         run_dir=OUT / "cpt", data=f"books={OUT}/books:0.99,thinking={OUT}/thinking:0.01")
    if not CONTINUAL.exists():
        call(log, "-m", "scripts.export", OUT / "cpt", CONTINUAL)


def edited(arm: str) -> Path:
    """The repository or, where the arm edits rewards.py, a copy of it with that edit."""
    if arm not in EDITS:
        return ROOT
    tree, (old, new), source = OUT / "trees" / arm, EDITS[arm], (ROOT / "rewards.py").read_text()
    assert source.count(old) == 1, f"rewards.py must have {old!r} once"
    for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    (tree / "rewards.py").write_text(source.replace(old, new))
    return tree


def train(arm: str, seed: int, steps: int) -> Path:
    """Trains an arm; returns the file of its samples for the held-out prompts."""
    run, options = OUT / "runs" / arm / str(seed), ARMS[arm] | {"seed": seed, "steps": steps}
    run.mkdir(parents=True, exist_ok=True)
    found = run / f"rollouts/eval_{steps:06}.jsonl"
    if "sft" in options:
        found = run / "evaluated/rollouts/eval_000000.jsonl"
        if not (run / "trained").exists():
            call(run / "log.txt", "-m", "scripts.pretrain", **options, run_dir=run / "sft")
            call(run / "log.txt", "-m", "scripts.export", run / "sft", run / "trained")
        options = {"model": run / "trained", "seed": seed, "steps": 1}
    if not found.exists():
        call(run / "log.txt", "train.py", tree=edited(arm), **COMMON, **options, eval_every=steps,
             run_dir=found.parent.parent)
    return found


def figures(file: Path, arm: str, asked: dict, scorer) -> dict:
    """All measures of a file of samples, the format by this rewards.py. "scores" are the second model's, None
    without an answer."""
    samples = read_jsonl(file)
    asked_for = SimpleNamespace(style=ARMS.get(arm, {}).get("prompt_style", "think"))
    answers = [structure(s["text"])[2] for s in samples]
    scores = iter(scorer([(asked[s["prompt_id"]]["prompt"], a) for s, a in zip(samples, answers) if a]))
    return measure(file, asked) | {
        "cut": float(np.mean([s["finish_reason"] == "length" for s in samples])),
        "format": float(np.mean([format_reward(SimpleNamespace(**s), asked_for) for s in samples])),
        "scores": [next(scores) if answer else None for answer in answers]}


def effect(differences: np.ndarray) -> dict[str, float]:
    """Mean difference, half of its interval, and the effect that four of five such studies would see."""
    error, (t_95, t_80) = float(differences.std(ddof=1)) / len(differences)**0.5, STUDENT[len(differences)]
    return {"mean": float(differences.mean()), "half": t_95 * error, "visible": (t_95 + t_80) * error}


def draw(effects: dict[str, dict]) -> str:
    """A panel for each measure, with a dot, an interval and a line at 0 for each arm."""
    parts = []
    for i, (key, title) in enumerate(MEASURES.items()):
        left, top = 170 + i % 4 * 185, 30 + i // 4 * 165
        most = max(abs(e[key]["mean"]) + e[key]["half"] for e in effects.values()) or 1
        at = lambda x, left=left, most=most: left + 75 + 70 * x / most  # noqa: E731
        colour = "#1f5fa8" if key in UNSEEN else "#777"
        parts += [label(left, top - 8, title, font_size=12, font_weight="bold"),
                  line([(at(0), top), (at(0), top + 112)], stroke="#999")]
        for j, (arm, e) in enumerate(effects.items()):
            y, x, half = top + 14 + 21 * j, e[key]["mean"], e[key]["half"]
            parts += [line([(at(x - half), y), (at(x + half), y)], stroke=colour, stroke_width=1.8),
                      f'<circle cx="{at(x):.1f}" cy="{y}" r="3.2" fill="{colour}"/>']
            parts += [label(left - 10, y + 4, arm, text_anchor="end")] * (i % 4 == 0)
        parts += [label(at(x), top + 127, f"{x:+.2g}", text_anchor="middle") for x in (-most, most)]
    note = "difference from the full method at the same seed, mean and 95 % interval; grey: what is trained"
    size = 'width="920" height="350" font-family="sans-serif" font-size="11" fill="#333"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, *parts, label(170, 340, note), "</svg>\n"])


def main():
    known = parser(__doc__)
    known.add_argument("--prepare", action="store_true")
    known.add_argument("--steps", type=int, default=40)
    known.add_argument("--seeds", type=int, default=5, choices=STUDENT)
    args = known.parse_args()
    if args.prepare:
        return prepare()
    seeds, machine, start = range(args.seeds), hardware(), time.perf_counter()
    asked = {prompt["id"]: prompt for prompt in read_jsonl(EVAL)}
    for arm, options in ARMS.items():
        print(f"{arm}: {options}", *EDITS.get(arm, ()), sep="\n    ")
    with ThreadPoolExecutor(2) as pool:
        work = [(arm, seed) for seed in seeds for arm in ARMS]
        files = dict(zip(work, pool.map(lambda x: train(*x, args.steps), work)))
    minutes = (time.perf_counter() - start) / 60
    files["before", 0] = OUT / "runs/full/0/rollouts/eval_000000.jsonl"
    path, world = str(OUT / "second"), distributed.setup("cpu")
    scorer = reward_model.Scorer(path, reward_model.check(path), 16384, world)
    found = {key: figures(file, key[0], asked, scorer) for key, file in files.items()}
    worst = min(score for f in found.values() for score in f["scores"] if score is not None)
    for f in found.values():  # no answer is as bad as the worst of all
        f["second"] = float(np.mean([worst if score is None else score for score in f.pop("scores")]))
    values = {arm: {key: np.array([found[arm, s][key] for s in seeds]) for key in MEASURES} for arm in ARMS}
    effects = {arm: {key: effect(v[key] - values["full"][key]) for key in MEASURES}
               for arm, v in values.items() if arm != "full"}
    rows = [["", *MEASURES.values()], ["---"] * (1 + len(MEASURES)),
            ["the base before RL", *(f"{found['before', 0][key]:.3f}" for key in MEASURES)],
            ["full", *(f"{v.mean():.3f}" for v in values["full"].values())]]
    rows += [[arm, *(f"{x['mean']:+.3f} ± {x['half']:.3f} ({x['visible']:.3f})" for x in e.values())]
             for arm, e in effects.items()]
    verdicts = {}
    for claim, (arm, key) in CLAIMS.items():
        e = effects[arm][key]
        verdicts[claim] = ("cannot be seen at this scale" if abs(e["mean"]) <= e["half"] else
                           "holds here" if e["mean"] < 0 else "does not hold here")
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    print(table, *(f"{claim}: {text}" for claim, text in verdicts.items()), sep="\n")
    (ROOT / "docs/study.svg").write_text(draw(effects))
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    finish({"bench": "study", **machine, "commit": commit, "seeds": [*seeds], "steps": args.steps,
            "minutes": round(minutes, 1), "effects": effects, "verdicts": verdicts, "table": table},
           save=True)


if __name__ == "__main__":
    main()
