"""What rewards cost, and what the measures of repetition are worth.

    python -m bench.bench_rewards

Processor time of every reward that is a rule on a text of 12,000 words, English and Chinese; what that adds
to a step of 1,024 such samples, by the planner's step times; the attack set of tests/attacks.py with the
measures of repetition beside plain shares of n-grams. Writes bench/results/rewards.json and ends with the
same as one JSON line.
"""

import random
import time
from types import SimpleNamespace

import numpy as np

import rewards
from bench import finish, hardware
from lib import scoring
from rewards import REWARDS
from scripts import plan
from tests import attacks
from text import count_words

SAMPLES, WORDS = 1024, 12_000
PLANS = {"7B, 8 GPUs": ["--config", "configs/qwen2.5-7b.json", "--gpus", "8"],
         "32B, 64 GPUs": ["--config", "configs/qwen2.5-32b.json", "--gpus", "8", "--nodes", "8"]}


def milliseconds(reward: scoring.Reward, text: str, query: str, repeats: int = 9) -> float:
    """Of one reward of one sample, processor time, the best of several."""
    completion = SimpleNamespace(text=f"<think>A plan.</think><answer>{text}</answer>", finish_reason="stop",
                                 token_ids=[0], max_new_tokens=14_000)
    prompt = SimpleNamespace(id="p", query=query, length_range=(10_000, 12_000), style="think")
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        scoring.score(reward, [completion], [prompt])
        times.append(time.thread_time() - start)
    return 1e3 * min(times)


def cost(ms: float) -> dict[str, dict[str, float]]:
    """Seconds that each rank scores in a step of SAMPLES, and their share of sampling and update as planned
    for full lengths; as if nothing were decoded meanwhile, though on a GPU a step is under way."""
    out = {}
    for name, options in PLANS.items():
        planned, _ = plan.read(options + ["--prompts_per_step", "32", "--group_size", "32"])
        sampled = planned.rehearse(full=True)
        step = sampled["seconds"] + sum(planned.seconds(sampled["mean"]))
        scoring = ms / 1e3 * SAMPLES / planned.ranks
        out[name] = {"step_s": round(step, 1), "scoring_s": round(scoring, 2),
                     "share": round(scoring / step, 5)}
    return out


def main():
    result = {"bench": "rewards", **hardware(), "words": WORDS, "samples": SAMPLES, "ms": {}}
    rules = [r for r in scoring.choose_rewards(",".join(REWARDS), rewards) if not r.needs_model]
    for language, query in (("en", "Write a chronicle of a harbour town."), ("zh", "写一部海港小镇的编年史")):
        text = attacks.honest(random.Random(0), language, "long essay", attacks.LONG[language]).text
        result["ms"][language] = {r.name: round(milliseconds(r, text, query), 2) for r in rules}
        shown = ", ".join(f"{name} {ms:.1f}" for name, ms in result["ms"][language].items())
        print(f"{language}, {count_words(text):,} words, ms: {shown}", flush=True)
    result["length_and_format_ms"] = round(
        max(ms["length"] + ms["format"] for ms in result["ms"].values()), 2)
    all_ms = max(sum(ms.values()) for ms in result["ms"].values())
    result["step"] = {"length and format": cost(result["length_and_format_ms"]), "all rules": cost(all_ms)}
    for name, costs in result["step"].items():
        shown = "; ".join(f"{plan}: {c['scoring_s']} s of {c['step_s']} ({c['share']:.2%})"
                          for plan, c in costs.items())
        print(f"{SAMPLES} samples, {name}, a rank: {shown}", flush=True)

    cases = attacks.cases()
    rows, _ = attacks.table(cases)
    attack = np.array([case.share > 0 for case in cases])
    scores = {n: np.array([attacks.ngram_share(case.text, n) for case in cases]) for n in range(2, 16)}
    result["attacks"] = {"cases": len(cases), **rows, "n-gram AUC": {
        n: round(attacks.auc(got[attack], got[~attack]), 4) for n, got in scores.items()}}
    print(f"\n{len(cases)} texts{'':21}" + "".join(f"{name:>18}" for name in rows))
    for row in next(iter(rows.values())):
        print(f"{row:30}" + "".join(f"{cells[row]:18.3f}" for cells in rows.values()))
    n, best = max(result["attacks"]["n-gram AUC"].items(), key=lambda item: item[1])
    share = max(c["share"] for c in result["step"]["all rules"].values())
    print(f"AUC of either {rows['either']['auc']} (bar: 0.98, and {best} of shares of {n}-grams); "
          f"length + format {result['length_and_format_ms']} ms (bar: 30); all rules {share:.2%} of a step "
          "(bar: 2 %)")
    finish(result, save=True)


if __name__ == "__main__":
    main()
