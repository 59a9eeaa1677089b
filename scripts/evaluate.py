"""Evaluates a checkpoint on a benchmark: samples answers, has them judged, computes the scores.

    python -m scripts.evaluate --benchmark longbench_write --data FILE --model MODEL --out eval/NAME

Under torchrun every rank writes its share of the answers. MODEL is a Qwen checkpoint, a run (runs/NAME:
its newest checkpoint) or a checkpoint of one (runs/NAME/checkpoints/step_NNNNNN). --judge is an
OpenAI-compatible server, http://HOST:PORT/v1#NAME (several: comma-separated; the key: OPENAI_API_KEY), or a
checkpoint folder, which our own sampler reads; for arena a reward model too. --out gets answers.jsonl,
verdicts.jsonl and result.json. The same command goes on where it was stopped: no answer is written twice, and
no question to a judge is paid for twice.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import torch

import checkpoints
import model as qwen
import replica
import rollout
import run
from data.prompts import TOKENS_PER_WORD, render
from evaluation import benchmarks, scores
from evaluation.judge import Judge, ask, find_judge, greet
from evaluation.source import TEMPLATES, Source, find, fingerprint, open_sampler
from lib import distributed, options
from lib.console import Progress
from lib.files import locate, merge_parts, read_jsonl, read_parts, write_jsonl
from lib.files import replace as rewrite
from lib.options import Field, UserError, read_json
from scheduler import Request, assign


@dataclass
class Config:
    benchmark: str = ""  # longbench_write, ruler, writingbench or arena
    data: str = ""  # its records, the JSONL file that its authors publish
    model: str = ""  # checkpoint folder, run, or checkpoint of one; empty: whose answers --out holds already
    out: str = ""  # folder of this evaluation; one that the same command began is continued
    template: str = "auto"  # chat, chat_nothink, think, direct; auto: a run's own, or by the tokenizer
    max_new_tokens: int = 0  # thinking included, and at most what the context leaves; 0: as SAMPLING says
    temperature: float = -1.0  # below 0: as SAMPLING says
    top_p: float = 0.0  # 0: as SAMPLING says
    top_k: int = -1  # 0: of all tokens; below 0: as SAMPLING says
    seed: int = 0  # of the answers, and of a checkpoint's judgements
    judge: str = ""  # URLs of servers, or checkpoint folder; empty: only what needs no judge
    judge_settings: str = '{"temperature": 0.6, "max_tokens": 4096}'  # what joins each request to a judge
    tries: int = 5  # answers of a judge to a question, until one is valid
    baselines: str = ""  # arena: folders of evaluations of the same data, whose answers are opponents too
    threads: int = 16  # calls of servers at a time
    rate: float = 0.0  # calls of servers a minute, at most; 0: any number
    timeout: float = 600.0  # seconds for a whole call of a server
    price: str = ""  # dollars for a million tokens that a server reads, and writes: 2,8
    commit: str = ""  # of the benchmark's repository; empty: that of the folder of --data, if it has one
    tp: int = 1  # GPUs of a node that share a sampler by tensor parallelism, for models too large for one
    max_sequences: int = 64  # sequences that each sampler decodes at a time
    page_size: int = 16  # tokens of a KV page
    sampler_dtype: str = "auto"  # auto: bfloat16 on CUDA, float32 on CPU; or either by name
    device: str = "auto"  # auto, cpu or cuda

    @property
    def prices(self) -> list[float]:
        return [float(x) for x in self.price.split(",")] if self.price else []


SAMPLING = {  # that of LongWriter's authors for longbench_write and ruler; of arena the paper says nothing
    "longbench_write": {"max_new_tokens": 32768, "temperature": 0.5, "top_p": 1.0, "top_k": 0},
    "ruler": {"max_new_tokens": 32768, "temperature": 0.5, "top_p": 1.0, "top_k": 0},
    "writingbench": {"max_new_tokens": 16000, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
    "arena": {"max_new_tokens": 16000, "temperature": 0.6, "top_p": 0.95, "top_k": 0},
}
WAIT = 7 * 86400  # seconds that a rank waits for the others, whose texts may be longer


@dataclass(frozen=True)
class Job:
    """What all ranks know before they begin."""

    records: list[benchmarks.Record]
    data: dict  # as in result.json
    settings: dict  # settings.json
    model: Source | None  # None: its answers are there
    judge: Judge | None
    answers: dict[str, dict]  # those that are there: id -> line
    verdicts: list[dict]  # lines that are there


# ---------------------------------------------------------------------- what is asked for


def add_baselines(config: Config, records: list, data: dict) -> list:
    """The records with the answers of other evaluations beside their own baselines. Raises UserError."""
    for folder in map(Path, filter(None, config.baselines.split(","))):
        remedy = "evaluate this baseline first"
        recorded = read_json(folder / "settings.json", remedy, answers=Field(dict))["answers"].get("data")
        answers = {a["id"]: a["answer"] for a in read_jsonl(folder / "answers.jsonl", remedy, id=Field(str),
                                                            answer=Field(str))}
        if recorded != data["sha256"]:
            raise UserError(f"baseline {folder} has answers to other data than {config.data}")
        if folder.name == Path(config.out).name or any(folder.name in r.baselines for r in records):
            raise UserError(f"baseline {folder}: another player has its name; rename the folder")
        records = [replace(r, baselines=r.baselines | {folder.name: answers[r.id]}) for r in records]
    return records


def commit_of(folder: Path) -> str:
    try:
        return subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def prepare(config: Config, device: torch.device) -> Job:
    """All that can be known before weights load; opens the folder. Raises an error of one sentence."""
    path, out = Path(locate(config.data)), Path(config.out)
    records = benchmarks.read(config.benchmark, path)
    data = {"file": str(path), "sha256": checkpoints.digest(path), "records": len(records),
            "commit": config.commit or commit_of(path.parent)}
    records, (recorded, answers, verdicts) = add_baselines(config, records, data), read_folder(out)
    if config.judge and config.benchmark == "arena" and not all(r.baselines for r in records):
        raise UserError(f"{path} has records without baseline_response: give --baselines, whose answers are "
                        "opponents")
    whole = all(r.id in answers for r in records)
    model, judge = find(config.model, config.template) if config.model else None, find_judge(config)
    if model and model.scalar:
        raise UserError(f"model {config.model} is a reward model, which writes nothing: it can be a judge")
    if not model and not (recorded and whole):
        raise UserError(f"--model is missing, and {out} does not hold all answers to {path}")
    if model:
        replica.check_tp(qwen.read_config(model.folder), config.tp)
    settings = {"path": model.path if model else recorded["path"],
                "answers": {**(sampling(config, model, device) if model else recorded["answers"]),
                            "benchmark": config.benchmark, "data": data["sha256"]},
                "verdicts": {"judge": judge and judge.name, "judge_settings": judge and judge.settings,
                             "baselines": fingerprint([r.baselines for r in records]), "tries": config.tries}}
    settings = json.loads(json.dumps(settings))
    refuse_others(out, recorded, settings)
    if judge and not judge.source and not whole:
        greet(config, judge)
    try:
        out.mkdir(parents=True, exist_ok=True)
        rewrite(out / "settings.json", json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    except OSError as e:
        raise UserError(f"--out {out} cannot be written ({e}): choose another") from None
    return Job(records, data, settings, model, judge, answers, verdicts)


def sampling(config: Config, model: Source, device: torch.device) -> dict:
    """All that an answer depends on beside its record."""
    own = {name: getattr(config, name) for name in SAMPLING[config.benchmark]}
    own = {name: value for name, value in own.items() if value != getattr(Config, name)}
    return {"fingerprint": model.fingerprint, "template": model.template, **SAMPLING[config.benchmark], **own,
            "stop": model.stop, "seed": config.seed, "dtype": str(rollout.sampler_dtype(config, device))}


def read_folder(out: Path) -> tuple[dict, dict[str, dict], list[dict]]:
    """(settings.json, answers by id, lines of verdicts.jsonl) of what was begun there. Raises UserError."""
    if not (out / "settings.json").exists() and not any(out.glob("answers*.jsonl")):
        return {}, {}, []
    recorded = read_json(out / "settings.json", "choose another --out", path=Field(str), answers=Field(dict),
                         verdicts=Field(dict))
    return (recorded, {a["id"]: a for a in read_parts(out, "answers", id=Field(str))},
            read_parts(out, "verdicts", hash=Field(str), raw=Field(list), tokens=Field(list)))


def refuse_others(out: Path, recorded: dict, settings: dict):
    """Raises UserError where the folder holds answers or verdicts by other settings than these."""
    for kind, instead in (("answers", "choose another --out"),
                          ("verdicts", "choose another --out, or remove its verdicts*.jsonl to have the "
                                       "same answers judged anew")):
        theirs = recorded.get(kind, {}) if any(out.glob(f"{kind}*.jsonl")) else {}
        if changed := [f"{name} ({value!r} there, {settings[kind].get(name)!r} now)"
                       for name, value in theirs.items() if value != settings[kind].get(name)]:
            raise UserError(f"{out} holds {kind} by other settings: {'; '.join(changed)}; {instead}")


# ---------------------------------------------------------------------- answers


def generate(config: Config, job: Job, world) -> list[dict]:
    """The answers to all records. Each rank appends those that it writes to a file of its own, at once."""
    out, s, answers = Path(config.out), job.settings["answers"], dict(job.answers)
    todo = [r for r in job.records if r.id not in answers]
    if todo:
        sampler = open_sampler(job.model, config, world)
        tokenizer, context = sampler.tokenizer, sampler.model.config.max_position_embeddings
        expected = [min(s["max_new_tokens"], round(2 * TOKENS_PER_WORD[r.language] * (r.required or 1e9)))
                    for r in todo]
        local, requests = [], []  # records that fit into the context

        def keep(record, text: str, reason: str, tokens: int):
            answers[record.id] = benchmarks.answer_line(record, text, s["template"], reason, tokens)
            write_jsonl(out / f"answers.part-{world.rank}.jsonl", [answers[record.id]], "a")

        with distributed.raise_on_all_ranks(world):
            for r in (todo[i] for i in assign(expected, world.size)[world.rank]):
                chat = s["template"].startswith("chat")
                ids = tokenizer.encode(tokenizer.chat(r.query, s["template"] == "chat") if chat else
                                       render(r.query, s["template"]))
                if len(ids) >= context:
                    keep(r, "", "length", 0)
                    continue
                local.append(r)
                requests.append(Request(ids, 1, min(s["max_new_tokens"], context - len(ids)),
                                        s["temperature"], s["top_p"], s["top_k"], tuple(s["stop"]),
                                        rollout.request_seed(s["seed"], config.benchmark, r.id)))
            progress = Progress(f"{out}: answers", len(local), world.main, "answers")
            for c in rollout.generate(sampler, requests, world):
                keep(local[c.prompt_index], c.text, c.finish_reason, len(c.token_ids))
                progress.update(sampler.stats)
            progress.close()
    with distributed.raise_on_all_ranks(world):
        for theirs in distributed.gather(answers, world):
            answers |= theirs
        lines = [answers[r.id] for r in job.records]
        if world.main:
            merge_parts(out, "answers", lines)
            print(f"{out}: {len(lines)} answers", flush=True)
    return lines


# ---------------------------------------------------------------------- all of it


def evaluate(config: Config, world):
    with distributed.raise_on_all_ranks(world):
        job = prepare(config, world.device) if world.main else None
    job = distributed.broadcast(job, world)
    answers, out, verdicts, judged = generate(config, job, world), Path(config.out), None, None
    if not (job.judge and job.judge.source):  # what is left, one process does, however long it takes
        distributed.close()
        if not world.main:
            return
    # Where neither side wrote anything there is no game
    records = [replace(r, baselines={name: text for name, text in r.baselines.items() if text or a["answer"]})
               for r, a in zip(job.records, answers)]
    if job.judge:
        verdicts, judged = ask(config, job.judge, records, answers, job.verdicts, world)
    if world.main:
        score(out, job, records, answers, verdicts, judged)


def score(out: Path, job: Job, records: list, answers: list[dict], verdicts: list[dict] | None,
          judged: dict | None):
    """Writes result.json and prints a table."""
    given = dict(job.settings["answers"])
    benchmark, fingerprint, _ = (given.pop(name) for name in ("benchmark", "fingerprint", "data"))
    found, rows, games = scores.aggregate(benchmark, records, answers, verdicts, out.name, given["template"])
    texts = scores.text_means(rows, answers)
    result = {"benchmark": benchmark, "data": job.data, "name": out.name,
              "model": {"path": job.settings["path"], "fingerprint": fingerprint}, "sampling": given,
              "judge": judged, "made": datetime.now().astimezone().isoformat(timespec="seconds"),
              "code": run.code_hash(), "scores": found, "texts": texts, "records": rows, "games": games}
    rewrite(out / "result.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    for name, value in (found | texts).items():
        if value is not None and not name.startswith("domain2/"):
            print(f"  {name:32}{value:10.4g}")


def check(config: Config):
    """Raises UserError."""
    options.check_choices(config, benchmark=benchmarks.BENCHMARKS, device=options.DEVICES,
                          template=TEMPLATES, sampler_dtype=options.DTYPES)
    for name in ("data", "out"):
        if not getattr(config, name):
            raise UserError(f"--{name} is missing")
    options.check_numbers(config, "tries threads timeout tp", "max_new_tokens rate", top_p=(0, 1),
                          temperature=(-100, 100), max_sequences=(1, 2**16), page_size=(1, 2**12))
    if config.price and not re.fullmatch(r"\d+(\.\d+)?,\d+(\.\d+)?", config.price):
        raise UserError(f"price {config.price!r} must be two numbers, dollars for a million tokens read, "
                        "and written: 2,8")
    if config.baselines and config.benchmark != "arena":
        raise UserError(f"baselines are opponents in arena, not in {config.benchmark}: leave them out")
    if (here := options.environment()["LOCAL_WORLD_SIZE"] or 1) % config.tp:
        raise UserError(f"tp {config.tp} does not divide the {here} processes of a node")


@options.command
def main():
    config = options.parse(Config, sys.argv[1:], __doc__)
    check(config)
    evaluate(config, distributed.setup(config.device, WAIT))


if __name__ == "__main__":
    main()
