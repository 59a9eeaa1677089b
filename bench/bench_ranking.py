"""Do ratings by a judge follow what training was paid for? Checkpoints of a run against each other.

    python -m bench.bench_ranking RUN [--steps 10,40,70] [--out FOLDER]

The base that the run started from and its checkpoints (of a run with --save_every 10 --keep_checkpoints 8)
answer the held-out prompts of the small world, with the same seeds (scripts.evaluate); the writing model
says of each two of them whose answer to a prompt is better; ratings are fitted to all games
(scripts.report, which also writes the page). Beside them stand the rewards of the same texts. Writes
bench/results/ranking.json and ends with one JSON line.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import reward_model
import rewards
from bench import finish, hardware, parser
from data import prompts as prompt_data
from lib import distributed
from lib.files import ROOT, locate, read_jsonl

DATA, JUDGE = "data/tiny/eval_prompts.jsonl", "data/tiny/writing"
SAMPLING = ("--temperature", "0.8", "--top_p", "1", "--max_new_tokens", "256")  # as in the run
RULES = {"length": rewards.length, "format": rewards.format_reward}


def evaluate(model: Path | str, out: Path, opponents: list[Path]):
    games = ["--baselines", ",".join(map(str, opponents)), "--judge", JUDGE] if opponents else []
    subprocess.run([sys.executable, "-m", "scripts.evaluate", "--benchmark", "arena", "--data", locate(DATA),
                    "--model", str(model), "--template", "think", "--out", str(out), *SAMPLING, *games],
                   check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def scored(folders: list[Path]) -> dict[str, dict[str, float]]:
    """Mean rewards of each folder's answers."""
    prompts, found = {p.id: p for p in prompt_data.read(locate(DATA), "think", 256)[0]}, {}
    world = distributed.setup("cpu")
    score = reward_model.Scorer(locate(JUDGE), reward_model.check(locate(JUDGE)), 8192, world)
    for folder in folders:
        answers = read_jsonl(folder / "answers.jsonl")
        given = {name: [rule(SimpleNamespace(text=a["response"]), prompts[a["id"]]) for a in answers]
                 for name, rule in RULES.items()}
        given["writing"] = score([(a["query"], a["answer"]) for a in answers if a["answer"]])
        found[folder.name] = {name: sum(values) / len(values) for name, values in given.items()}
    distributed.close()
    return found


def main():
    options = parser(__doc__)
    options.add_argument("run", type=Path, metavar="RUN")
    options.add_argument("--steps", default="10,40,70")
    options.add_argument("--out", type=Path, default=Path("eval/ranking"), help="folder of the evaluations")
    args = options.parse_args()
    run, out, folders = args.run.resolve(), args.out.resolve(), []
    base = json.loads((run / "config.json").read_text())["model"]
    models = {"base": base} | {f"step-{step}": run / "checkpoints" / f"step_{int(step):06d}"
                               for step in args.steps.split(",")}
    for name, model in models.items():
        evaluate(model, out / name, folders)
        folders.append(out / name)
    subprocess.run([sys.executable, "-m", "scripts.report", *map(str, folders), "--out",
                    str(out / "report.html")], check=True, cwd=ROOT)
    (section,) = json.loads((out / "report.json").read_text())
    means, players = scored(folders), {}
    for name, rating in section["elo"][0]["players"].items():  # best first
        players[name] = {key: rating[key] for key in ("rating", "lo", "hi", "games")} | means[name]
        print(f"{name:10}" + "".join(f"  {key} {value:.4g}" for key, value in players[name].items()))
    finish({"bench": "ranking", **hardware(), "judge": JUDGE, "data": DATA, "players": players}, save=True)


if __name__ == "__main__":
    main()
