"""The paper's questions in miniature: six arms on the embedded default, five paired seeds.

    python -m bench.study --prepare            # corpora, the bases, the second writing model
    python -m bench.study [--seeds 0,1,2,3,4]  # two runs at a time, a thread each; goes on where it stopped

Every run is commands that a user would type. Arms differ in the options and the edit of rewards.py that are
printed, and none is tuned. They are compared on held-out prompts by what no arm was trained on, and by the
rewards; each arm's effect is its difference from the first arm at the same seed, and its interval is
Student's. The second writing model was trained on other pairs, but of the same grammar. Writes
bench/results/study.json, docs/study.svg and the table of docs/study.md.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import model as qwen
import reward_model
from bench import RESULTS, ROOT, finish, hardware, parser
from bench.tiny import EVAL, measure
from data.tiny import make, pairs
from lib import distributed
from lib.files import read_jsonl, write_jsonl
from text import structure
from viewer.plots import label, line

OUT = ROOT / "runs/study"
BASE, CONTINUAL, STEPS = "data/tiny/base", str(OUT / "continual"), 40
ARMS = {  # name: options of train.py beside the seed; {} is filled in by the first arm's
    "full": ["--model", CONTINUAL],
    "direct": ["--model", CONTINUAL, "--prompt_style", "direct"],
    "no continual pretraining": ["--model", BASE],
    "raw sum, writing x 100": ["--model", CONTINUAL, "--advantage", "sum", "--reward_model", str(OUT / "writing_x100")],
    "no repetition term": ["--model", CONTINUAL],
    "SFT": ["--model", CONTINUAL, "--sft", str(OUT / "chats.jsonl")],
}
EDIT = "return 1.0 - repetition(answer) if ok else 0.0", "return 1.0 if ok else 0.0"  # of the fifth arm
UNSEEN = {"second": "second writing model", "names_used": "names kept", "distinct_5grams": "distinct 5-grams",
          "cut": "cut off"}
REWARDS = {"length": "length", "format": "format", "writing": "writing"}
CLAIMS = {  # of the paper: arm that must be worse than the first, on which measure
    "thinking helps": ("direct", "second"), "continual pretraining helps": ("no continual pretraining", "second"),
    "RL is better than SFT": ("SFT", "second"),
    "each reward has to be normalised on its own": ("raw sum, writing x 100", "second"),
    "the repetition term keeps texts varied": ("no repetition term", "distinct_5grams")}
T_95, T_80 = 2.776, 0.941  # Student's quantiles .975 and .8 for five seeds


def call(*command, cwd: Path = ROOT):
    print("$", *(str(x) for x in command), flush=True)
    log = OUT / "log.txt"
    with open(log, "a") as f:
        subprocess.run([sys.executable, *map(str, command)], check=True, cwd=cwd, stdout=f, stderr=f,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})


def prepare():
    """Each part is one command or file; what is there stays."""
    OUT.mkdir(parents=True, exist_ok=True)
    rng = random.Random("study")

    def once(name: str, *commands):
        if not (OUT / name).exists():
            for command in commands:
                call(*command) if isinstance(command, list) else command()

    def chat() -> dict:
        """A request, and a response of the requested length whose plan states it."""
        slots = make.request(rng)
        text = make.write(rng, slots, round(slots["n"] * rng.uniform(0.9, 1.1)))
        plan = make.fill(rng, rng.choice(make.PLANS["with the length"]), slots)
        return {"prompt": slots["query"], "response": f" <think>{plan}</think>\n<answer>{text}</answer>"}

    books = [make.write(rng, make.request(rng), rng.randint(15, 110)) for _ in range(12_000)]
    once("books.jsonl", lambda: write_jsonl(OUT / "books.jsonl", [{"text": text} for text in books]))
    once("chats.jsonl", lambda: write_jsonl(OUT / "chats.jsonl", [chat() for _ in range(64 * STEPS)]))
    once("pairs.jsonl", lambda: write_jsonl(OUT / "pairs.jsonl", pairs.pairs("study/train", 6400)))
    once("eval_pairs.jsonl", lambda: write_jsonl(OUT / "eval_pairs.jsonl", pairs.pairs("study/eval", 500, True)))
    once("second", ["-m", "scripts.train_rm", "--pairs", OUT / "pairs.jsonl", "--eval_pairs", OUT / "eval_pairs.jsonl",
                    "--seed", 1, "--out", OUT / "second"])
    once("rl/checkpoints/step_000040", ["train.py", "--steps", STEPS, "--seed", 100, "--run_dir", OUT / "rl"])
    once("thinking.jsonl", ["-m", "scripts.tokenise", OUT / "books.jsonl", "--out", OUT / "books"],
         ["-m", "scripts.distil", OUT / "rl", "--min_reward", 1.2, "--corpus", OUT / "books", "--share", 0.01,
          "--out", OUT / "thinking.jsonl"])
    once("continual", ["-m", "scripts.tokenise", OUT / "thinking.jsonl", "--out", OUT / "thinking"],
         ["-m", "scripts.pretrain", "--model", BASE, "--data", f"books={OUT}/books:0.99,thinking={OUT}/thinking:0.01",
          "--steps", 200, "--lr", 1e-3, "--run_dir", OUT / "cpt"], ["-m", "scripts.export", OUT / "cpt", CONTINUAL])
    once("writing_x100", scale)


def scale():
    """The default's writing model with scores of a hundred times the size."""
    model = qwen.load(ROOT / "data/tiny/writing")
    model.score.weight.data *= 100
    qwen.save(model, OUT / "writing_x100")
    for file in (ROOT / "data/tiny/writing").glob("tokenizer*"):
        shutil.copy(file, OUT / "writing_x100")


def edited() -> Path:
    """A copy of the code with the edit of the fifth arm."""
    tree = OUT / "edited"
    for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0"):
        if (ROOT / name).is_file() and not (tree / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    text = (ROOT / "rewards.py").read_text()
    assert text.count(EDIT[0]) == 1, f"rewards.py must have {EDIT[0]!r} once"
    (tree / "rewards.py").write_text(text.replace(*EDIT))
    return tree


def train(arm: str, seed: int) -> Path:
    """Trains an arm; returns the file of its samples for the held-out prompts."""
    run, given = OUT / f"{arm.replace(' ', '_')}_{seed}", ARMS[arm]
    if arm != "SFT":
        call("train.py", "--config", "configs/tiny.json", *given, "--seed", seed, "--steps", STEPS, "--eval_every",
             STEPS, "--run_dir", run, cwd=edited() if arm == "no repetition term" else ROOT)
        return run / f"rollouts/eval_{STEPS:06}.jsonl"
    if not (run / "exported").exists():
        call("-m", "scripts.pretrain", *given, "--steps", STEPS, "--lr", 1e-3, "--rows_per_step", 8, "--seed", seed,
             "--run_dir", run / "sft")
        call("-m", "scripts.export", run / "sft", run / "exported")
    call("train.py", "--config", "configs/tiny.json", "--model", run / "exported", "--steps", 1, "--run_dir", run / "eval")
    return run / "eval/rollouts/eval_000000.jsonl"


def figures(file: Path, asked: dict, scorer) -> dict[str, float]:
    """All measures of a file of samples, a text without an answer by the second model as the worst of all."""
    samples = list(read_jsonl(file))
    bodies = [(asked[s["prompt_id"]]["prompt"], structure(s["text"])[2]) for s in samples]
    scores = iter(scorer([(query, body) for query, body in bodies if body]))
    return measure(file, asked) | {"cut": float(np.mean([s["finish_reason"] == "length" for s in samples])),
                                   "scores": [next(scores) if body else None for _, body in bodies]}


def effect(values: np.ndarray) -> dict[str, float]:
    """Mean of the seeds' differences, half of its 95 % interval, and the effect that would be seen in four
    studies of five."""
    error = float(values.std(ddof=1)) / len(values)**0.5
    return {"mean": float(values.mean()), "half": T_95 * error, "visible": (T_95 + T_80) * error}


def verdict(e: dict[str, float]) -> str:
    if abs(e["mean"]) <= e["half"] or not e["half"]:
        return "cannot be seen at this scale"
    return "holds here" if e["mean"] < 0 else "does not hold here"


def draw(effects: dict) -> str:
    """A panel for each measure: a dot for each arm's effect, its interval, and a line at 0."""
    names = {**UNSEEN, **REWARDS}
    arms, parts = list(ARMS)[1:], []
    for i, (key, title) in enumerate(names.items()):
        left, top = 180 + i % 4 * 190, 30 + i // 4 * 150
        most = max(abs(e["mean"]) + e["half"] for e in (effects[arm][key] for arm in arms)) or 1
        parts += [label(left, top - 8, title, font_size=12, font_weight="bold"),
                  line([(left + 80, top), (left + 80, top + 105)], stroke="#999")]
        for j, arm in enumerate(arms):
            y, e = top + 12 + 20 * j, effects[arm][key]
            x, half = left + 80 + 75 * e["mean"] / most, 75 * e["half"] / most
            parts += [line([(x - half, y), (x + half, y)], stroke="#1f5fa8", stroke_width=1.6),
                      f'<circle cx="{x:.1f}" cy="{y}" r="3" fill="#1f5fa8"/>']
            parts += [label(left - 12, y + 4, arm, text_anchor="end")] * (i % 4 == 0)
        parts += [label(left + x, top + 120, f"{sign * most:+.2g}", text_anchor="middle") for x, sign in ((5, -1), (155, 1))]
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="950" height="320" font-family="sans-serif" font-size="11">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def main():
    known = parser(__doc__)
    known.add_argument("--prepare", action="store_true")
    known.add_argument("--seeds", default="0,1,2,3,4")
    args = known.parse_args()
    if args.prepare:
        return prepare()
    seeds, asked = list(map(int, args.seeds.split(","))), {prompt["id"]: prompt for prompt in read_jsonl(EVAL)}
    work = [(arm, seed) for seed in seeds for arm in ARMS]
    with ThreadPoolExecutor(2) as pool:
        files = dict(zip(work, pool.map(lambda x: train(*x), work)))
    path, world = str(OUT / "second"), distributed.setup("cpu")
    scorer = reward_model.Scorer(path, reward_model.check(path), 16384, world)
    found = {key: figures(file, asked, scorer) for key, file in files.items()}
    worst = min(score for f in found.values() for score in f["scores"] if score is not None)
    for f in found.values():
        f["second"] = float(np.mean([worst if score is None else score for score in f.pop("scores")]))
    effects = {arm: {key: effect(np.array([found[arm, s][key] - found["full", s][key] for s in seeds]))
                     for key in {**UNSEEN, **REWARDS}} for arm in list(ARMS)[1:]}
    verdicts = {claim: verdict(effects[arm][key]) for claim, (arm, key) in CLAIMS.items()}
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    means = {arm: {key: float(np.mean([found[arm, s][key] for s in seeds])) for key in {**UNSEEN, **REWARDS}} for arm in ARMS}
    titles = list({**UNSEEN, **REWARDS}.values())
    rows = [["arm", *titles], ["---"] * (1 + len(titles)), ["full, mean", *(f"{x:.3f}" for x in means["full"].values())]]
    rows += [[arm, *(f"{e['mean']:+.3f} ± {e['half']:.3f}" for e in effects[arm].values())] for arm in effects]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    print(table, *(f"{claim}: {text}" for claim, text in verdicts.items()), sep="\n")
    (ROOT / "docs/study.svg").write_text(draw(effects))
    finish({"bench": "study", **hardware(), "commit": commit, "seeds": seeds, "steps": STEPS, "means": means,
            "effects": effects, "verdicts": verdicts, "table": table}, save=True)


if __name__ == "__main__":
    main()
