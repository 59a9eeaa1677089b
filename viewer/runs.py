"""What the page shows of a run: its metrics, and its texts in one file of data for each rollouts file.

The files are scripts, which call `receive(key, groups)`: a page that lies on a disk can load scripts and
nothing else. index.json beside them says what they were made from, so that a later call makes new ones alone.
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from difflib import unified_diff
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from lib.files import read_jsonl, replace
from lib.options import Field, read_json
from text import CJK, copies, count_words, split

STRIP = 240  # values along a text, each the mean over its share of the tokens


def read(folder: Path) -> dict:
    """The metrics of a run: {steps, metrics}, metrics[name] with a value, list or None for each step. Raises
    UserError."""
    lines = {}
    for line in read_jsonl(folder / "metrics.jsonl", "give the folder of a run", step=Field(int, 0)):
        lines.setdefault(line["step"], {}).update(line)  # an evaluation has a line of its own
    names = dict.fromkeys(name for line in lines.values() for name in line if name != "step")

    def short(x):
        if isinstance(x, list):
            return [short(v) for v in x]
        return float(f"{x:.4g}") if isinstance(x, float) else x

    return {"steps": [*lines], "metrics": {name: [short(line.get(name)) for line in lines.values()]
                                           for name in names}}


def strips(file: Path) -> list[dict]:
    """Entropy, surprise (minus the sampler's logprob) and |gap| along each sample of a token record."""
    if not (file := file.with_suffix(".safetensors")).exists():
        return []
    x = load_file(file)
    values = {"entropy": x["entropy"], "surprise": -x["sampler_logp"],
              "gap": abs(x["trainer_logp"] - x["sampler_logp"])}

    def binned(values: np.ndarray) -> list[float | None]:
        parts = np.array_split(values, min(STRIP, len(values)))
        return [None if np.isnan(m := part.mean()) else round(float(m), 5) for part in parts]

    rows = zip(*(np.split(v, x["offsets"][1:-1]) for v in values.values()))
    return [dict(zip(values, map(binned, row))) for row in rows]


def copied(text: str) -> list[list[int]]:
    """text.copies in UTF-16 code units, in which a browser counts."""
    spans = copies(text)
    if not text.isascii() and max(text) > "\uffff":
        at = np.cumsum([0, *(1 + (c > "\uffff") for c in text)])
        spans = at[np.array(spans, dtype=np.int64).reshape(-1, 3)].tolist()
    return spans


def sample(line: dict, style: str, strip: dict | None) -> dict:
    """A line of a rollouts file as the reader shows it."""
    think, answer = split(line["text"], style)
    words, advantages = count_words(answer), line.get("advantages", {})
    rewards = {name: [x, advantages.get(name)] for name, x in line["rewards"].items()}
    facts = f"{words:,} words · {line['tokens']:,} tokens" + ", cut off" * (line["finish_reason"] == "length")
    return {"name": f"sample {line['sample'] + 1}", "facts": facts,
            "advantage": line.get("advantage"), "rewards": rewards, "think": think, "answer": answer,
            "response": "" if answer else line["text"], "words": words, "copies": copied(answer),
            "verdicts": [], "strip": strip}


def chunk(job: tuple[str, Path], out: Path, style: str) -> dict:
    """Writes the data file of a rollouts file. Returns its entry of index.json: what it was made from, its
    prompts, and the 10th and 90th percentile of what the samples give."""
    key, file = job
    made_from, lines, along = stamp(file), read_jsonl(file, "wait until it is written"), strips(file)
    groups, spread, start = {}, {}, len(os.path.commonprefix([line["prompt"] for line in lines]))
    for i, line in enumerate(lines):
        group = groups.setdefault(line["prompt_id"], {
            "id": line["prompt_id"], "query": line["prompt"], "facts": "", "samples": [],
            "heading": line["prompt"][start:],
            "language": "zh" if len(CJK.findall(line["prompt"])) > 20 else "en"})
        if asked := line.get("length_range"):
            group |= {"facts": f"asked for {asked[0]:,} to {asked[1]:,} words", "required": sum(asked) / 2}
        group["samples"].append(sample(line, style, along[i] if along else None))
        for name, x in line["rewards"].items():
            spread.setdefault(f"reward/{name}", []).append(np.nan if x is None else x)
        spread.setdefault("length/tokens", []).append(line["tokens"])
        spread.setdefault("length/answer_words", []).append(group["samples"][-1]["words"])
    for group in groups.values():
        group["samples"].sort(key=lambda s: -(s["advantage"] or 0))
    text = f"receive({json.dumps(key)},{json.dumps([*groups.values()], ensure_ascii=False)})\n"
    (out / f"{key}.js").write_bytes(text.encode("utf-8", "replace"))
    bands = {name: np.nanpercentile(x, (10, 90)).tolist() for name, x in spread.items()
             if not np.isnan(x).all()}
    return {"from": made_from, "prompts": [*groups], "bands": bands}


def stamp(file: Path) -> list[int]:
    return [x for f in (file, file.with_suffix(".safetensors")) if f.exists()
            for x in (f.stat().st_size, f.stat().st_mtime_ns)]


def gather(folders: list[Path], out: Path) -> dict:
    """{runs, views, diff} of the page; writes the data files into `out`, those of changed rollouts alone.
    Raises UserError."""
    runs, views, names = [], [], [folder.resolve().name for folder in folders]
    options = [read_json(folder / "config.json", "give the folder of a run") for folder in folders]
    for folder, name, given in zip(folders, names, options):
        label = name if names.count(name) == 1 else str(folder)
        run = read(folder) | {"label": label, "bands": {}}
        files = sorted((folder / "rollouts").glob("*.jsonl"), key=lambda f: (int(f.stem[5:]), f.stem))
        place = out / label.replace("/", "_")
        place.mkdir(parents=True, exist_ok=True)
        index = read_json(place / "index.json", "") if (place / "index.json").exists() else {}
        todo = [(f"{place.name}/{f.stem}", f) for f in files if index.get(f.stem, {}).get("from") != stamp(f)]
        style = given.get("prompt_style", "think")
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            index |= zip((f.stem for _, f in todo), pool.map(partial(chunk, out=out, style=style), todo))
        replace(place / "index.json", json.dumps(index) + "\n")
        for file in files:
            entry, (kind, step) = index[file.stem], file.stem.split("_")
            name = f"step {int(step)}" if kind == "step" else f"evaluation after step {int(step)}"
            views.append({"title": label, "name": name, "key": f"{place.name}/{file.stem}",
                          "prompts": entry["prompts"]})
            for metric, band in entry["bands"].items():
                run["bands"].setdefault(("eval/" * (kind == "eval")) + metric, {})[int(step)] = band
        runs.append(run)
    return {"runs": runs, "views": views, "diff": difference(folders, options)}


def difference(folders: list[Path], options: list[dict]) -> str:
    """Of the first two runs: options that differ, and a diff of their rewards.py."""
    if len(folders) < 2:
        return ""
    a, b = options[:2]
    changed = [f"{name}: {a.get(name)} → {b.get(name)}" for name in a | b if a.get(name) != b.get(name)]
    sources = [f / "source/rewards.py" for f in folders[:2]]
    texts = [f.read_text(encoding="utf-8").split("\n") if f.exists() else [] for f in sources]
    return "\n".join([*changed, *unified_diff(*texts, *map(str, sources), lineterm="")])
