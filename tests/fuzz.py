"""Mutations of valid inputs, given to the functions that train.py calls before weights load.

    python -m tests.fuzz [--seed 0] [--prompts 200] [--models 200] [--options 150] [--servers 100]

An input is accepted, or refused with one sentence. The rest is listed: tracebacks, hangs (over 20 s), and
what is accepted and cannot train: an accepted model folder is loaded and has finite hidden states, accepted
options draw tokens with finite logprobs. A case depends on the seed and its number alone. Ends with one JSON
line; exit code 1 if a list is not empty.
"""

import contextlib
import importlib.util
import io
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import model as qwen
import parallel
import rewards as reward_file
import rollout
import run
import train
from data import prompts as prompt_data
from data.tokenizer import Tokenizer
from lib import distributed, options
from lib.scoring import choose_rewards
from sampler import Request, Sampler

ROOT = Path(__file__).parent.parent
TINY = ROOT / "data" / "tiny"
LIMIT = 20  # seconds of a case
DEEP = b"[" * 100_000
ODD = [None, True, False, 0, 1, 2, -1, 7, 10**12, -10**12, 10**400, 2**31, 2**63, 0.0, 0.5, 1.5, -0.5, 1e-40,
       1e300, math.nan, math.inf, -math.inf, "", "text", "3", "-1", "nan", "true", "\0", "a\0b", "\ud800",
       "a\nb", "..", "../x", "/etc/passwd", "x" * 300, "说" * 100, [], [1], [[1]], [1, 2], {}, {"a": 1},
       [None], [-1], [True]]


@dataclass
class Config:
    seed: int = 0  # of all mutations
    prompts: int = 200  # files of prompts
    models: int = 200  # checkpoint folders
    options: int = 150  # sets of options
    servers: int = 100  # answers of servers


class CannotTrain(Exception):
    """An input was accepted and is of no use."""


class Hang(BaseException):
    """A case took longer than LIMIT."""


def hang(*_):
    raise Hang(f"more than {LIMIT} s")


# ------------------------------------------------------------------------------------------ mutations


def places(value, path=()):
    """The path of each value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def mutate_value(rng: random.Random, value) -> str:
    """Changes one place of a JSON object; says where and to what."""
    path = rng.choice(list(places(value)))
    for key in path[:-1]:
        value = value[key]
    if rng.random() < 0.1:
        del value[path[-1]]
        return f"{path} removed"
    value[path[-1]] = odd = rng.choice(ODD)
    return f"{path} = {odd!r:.60}"


def mutate_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Other bytes in the place of a file's; and what was done."""
    at = rng.randrange(len(data) + 1)
    kinds = {
        "empty": lambda: b"", "cut": lambda: data[:at], "BOM": lambda: b"\xef\xbb\xbf" + data,
        "binary": lambda: rng.randbytes(100),
        "UTF-16": lambda: data.decode(errors="replace").encode("utf-16"),
        "twice": lambda: data + data, "NUL": lambda: data[:at] + b"\0" + data[at:],
        "invalid UTF-8": lambda: data[:at] + b"\xff\xfe" + data[at:], "nested": lambda: DEEP + data,
        "inside nested": lambda: data[:at] + DEEP + data[at:], "list": lambda: b"[" + data + b"]",
        "text": lambda: b'"text"', "number": lambda: b"3", "null": lambda: b"null", "object": lambda: b"{}",
        "digits": lambda: data.replace(b": ", b": " + b"9" * 5000, 1),
        "exponent": lambda: data.replace(b": ", b': 1e999, "a": ', 1),
        "CRLF": lambda: data.replace(b"\n", b"\r\n"), "flipped": lambda: bytes(
            byte ^ (1 << rng.randrange(8)) if rng.random() < 0.002 else byte for byte in data)}
    kind = rng.choice(list(kinds))
    return kinds[kind](), kind


def mutate_file(rng: random.Random, file: Path) -> str:
    """Damages a file of a folder; says how."""
    choice = rng.random()
    if choice < 0.05:
        file.unlink()
        return f"{file.name} missing"
    if choice < 0.1:
        file.unlink()
        file.mkdir()
        return f"{file.name} a folder"
    if choice < 0.7 and file.suffix == ".json":
        value = json.loads(file.read_text())
        what = [mutate_value(rng, value) for _ in range(rng.choice((1, 1, 1, 2)))]
        file.write_text(json.dumps(value))
        return f"{file.name}: {'; '.join(what)}"
    data, what = mutate_bytes(rng, file.read_bytes())
    file.write_bytes(data)
    return f"{file.name}: {what}"


# ------------------------------------------------------------------------------------------ prompts


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY / "base")


@cache
def base() -> qwen.Qwen2:
    return qwen.load(TINY / "base").requires_grad_(False)


def config_of(folder: Path, **changes) -> train.Config:
    return replace(train.parse([]), prompts_per_step=1, eval_prompts="", reward="length,format",
                   run_dir=str(folder / "run"), **changes)


def prompts(rng: random.Random, folder: Path) -> tuple[str, object]:
    """A file of prompts, as data/tiny's; what was changed and what reads it."""
    records = [json.loads(line) for line in rng.sample((TINY / "prompts.jsonl").read_text().splitlines(), 8)]
    what, file = [], folder / "prompts.jsonl"
    for _ in range(rng.choice((0, 1, 1, 2))):
        record = rng.choice(records)
        if rng.random() < 0.5:
            odd = [[10, 20], [0, 0], [10**400, 10**401], [1, 10**400], [2.0, 3], [3, 2]]
            record["length_range"] = rng.choice(odd)
        if rng.random() < 0.3:
            record[rng.choice(["id", "index", "query", "prompt", "keep", "length"])] = rng.choice(ODD)
        what.append(mutate_value(rng, record))
    lines = [json.dumps(record).encode() for record in records]
    if (choice := rng.random()) < 0.5:
        i = rng.randrange(len(lines))
        lines[i], how = mutate_bytes(rng, lines[i])
        what.append(f"line {i + 1} {how}")
    elif choice < 0.53:
        lines.append(json.dumps({"prompt": rng.choice(["a", "a ", "说"]) * 10**7, "length": 50}).encode())
        what.append("10 MB")
    data = b"\n".join(lines) + b"\n"
    if choice > 0.9:
        data, how = mutate_bytes(rng, data)
        what.append(how)
    file.write_bytes(data)

    def read():
        config = config_of(folder, prompts=str(file))
        found, _ = prompt_data.load(config, "prompts", 1, "a step", tokenizer(), 2048)
        rollout.check_rewards(choose_rewards(config.reward, reward_file), config, found, tokenizer())
        for prompt in found:
            json.dumps([prompt.id, prompt.query], ensure_ascii=False).encode()
            if rollout.expected_tokens(prompt, config) < 1 or not tokenizer().encode(prompt.text):
                raise CannotTrain(f"prompt {prompt.id[:80]!r}")

    return "; ".join(what), read


# ------------------------------------------------------------------------------------------ models


def shape(rng: random.Random) -> qwen.ModelConfig:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 32.0,
            "beta_slow": 1.0, "truncate": True, "attention_factor": 1.0}
    return qwen.ModelConfig(1024, 16, 24, 2, 4, 2, 2048, rope_scaling=rng.choice([None, yarn]),
                            tie_word_embeddings=rng.random() < 0.5)


DTYPES = (torch.int8, torch.bool, torch.complex64, torch.float64, torch.float16, torch.bfloat16, torch.int64,
          torch.uint8, torch.float8_e4m3fn)


def mutate_weights(rng: random.Random, folder: Path) -> str:
    file = rng.choice(sorted(folder.glob("*.safetensors")))
    tensors = load_file(file)
    name, dtype = rng.choice(sorted(tensors)), rng.choice(DTYPES)
    x = tensors[name]
    flat = x.flatten().clone()
    flat[rng.randrange(len(flat))] = rng.choice([math.nan, math.inf, -math.inf])
    changed = {"not finite": flat.view(x.shape), "scalar": x.flatten()[0].clone(), "flat": x.flatten(),
               "empty": x.new_zeros(0), "longer": torch.cat((x, x)), "too large": x.double() + 1e300}
    how = rng.choice([*changed, "not finite", "missing", "renamed", "written twice", *[str(dtype)] * 3])
    if how in changed:
        tensors[name] = changed[how]
    elif how == str(dtype):
        tensors[name] = x.to(dtype)
    elif how == "missing":
        del tensors[name]
    elif how == "renamed":
        tensors[f"{name}.more"] = tensors.pop(name)
    else:
        tensors["lm_head.weight"] = rng.choice([x.clone(), x.new_zeros(()), x.new_zeros(1024, 16)])
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{name} {how}"


def mutate_config(rng: random.Random, folder: Path) -> str:
    """A field of the model is hit more often than by chance."""
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    name, odd = rng.choice([*qwen.FIELDS, "rope_scaling", "rope_parameters", "architectures", "model_type",
                            "hidden_act"]), rng.choice(ODD)
    if name in ("rope_scaling", "rope_parameters") and rng.random() < 0.8:
        odd = {"rope_type": "yarn", "factor": 2.0} | {rng.choice([*qwen.YARN, "rope_type", "type"]): odd}
    file.write_text(json.dumps(raw | {name: odd}))
    return f"config.json: {name} = {odd!r:.80}"


def mutate_index(rng: random.Random, folder: Path) -> str:
    file = folder / "model.safetensors.index.json"
    content = json.loads(file.read_text())
    name = rng.choice(sorted(content["weight_map"]))
    content["weight_map"][name] = odd = rng.choice([*ODD, ".", "config.json", "tokenizer.json", folder.name])
    file.write_text(json.dumps(content))
    return f"index: {name} in {odd!r:.80}"


def mutate_eos(rng: random.Random, folder: Path) -> str:
    odd = rng.choice([*ODD, 1024, [0, 1024], "<|endoftext|>", {"content": []}, [0.0], ["0"]])
    key = rng.choice(["eos_token_id", "eos_token"])
    if key == "eos_token":
        (folder / "generation_config.json").unlink()
    name = "generation_config.json" if key == "eos_token_id" else "tokenizer_config.json"
    (folder / name).write_text(json.dumps({key: odd}))
    return f"{key} = {odd!r:.80}"


def mutate_tokenizer(rng: random.Random, folder: Path) -> str:
    file = folder / "tokenizer.json"
    raw, odd = json.loads(file.read_text()), rng.choice([*ODD, 5000, 2**24, 2**32 - 1])
    kind = rng.choice(["added", "vocabulary", "any", "any"])
    if kind == "added":
        raw["added_tokens"].append(raw["added_tokens"][0] | {"content": "<|more|>", "id": odd})
    elif kind == "vocabulary":
        raw["model"]["vocab"][rng.choice(["a", "<|endoftext|>", "new"])] = odd
    else:
        kind = mutate_value(rng, raw)
    file.write_text(json.dumps(raw))
    return f"tokenizer.json: {kind} {odd!r:.80}"


def mutate_any(rng: random.Random, folder: Path) -> str:
    return mutate_file(rng, rng.choice(sorted(f for f in folder.iterdir() if f.is_file())))


MUTATIONS = [mutate_config] * 4 + [mutate_weights] * 3 + [mutate_tokenizer, mutate_tokenizer, mutate_eos,
                                                         mutate_index, mutate_any, mutate_any, mutate_any]


def models(rng: random.Random, folder: Path) -> tuple[str, object]:
    """A checkpoint folder with data/tiny's tokenizer."""
    path, what = folder / "model", []
    model = qwen.Qwen2(shape(rng)).init_weights_(rng.randrange(99))
    qwen.save(model, path, rng.choice([30_000, 2**30]))
    for file in (TINY / "base").glob("tokenizer*"):
        shutil.copyfile(file, path / file.name)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0], "temperature": 0.7}))
    (folder / "prompts.jsonl").write_text('{"prompt": "Write 40 words.", "length": 40}\n')
    for mutate in rng.choices(MUTATIONS, k=rng.choice((1, 1, 1, 2))):
        # not where the one before has left nothing to change
        with contextlib.suppress(ValueError, IndexError, TypeError, OSError, SafetensorError):
            what.append(mutate(rng, path))

    def read():
        config = config_of(folder, model=str(path), prompts=str(folder / "prompts.jsonl"))
        inputs = run.read_inputs(config, world())
        inputs.tokenizer.system, inputs.tokenizer.chats  # noqa: B018
        loaded = parallel.load_sharded(inputs.model, world())
        with torch.no_grad():
            hidden = loaded(torch.tensor([1, 2, 3, 4, 5] * 40), qwen.packed([195, 5]))
        if not hidden.isfinite().all():
            raise CannotTrain("hidden states are not finite")

    return "; ".join(what), read


# ------------------------------------------------------------------------------------------ options


def option_sets(rng: random.Random, folder: Path) -> tuple[str, object]:
    """A command line of train.py, perhaps with a config file and torchrun's environment."""
    kinds = train.Config.__annotations__
    texts = [*(x if isinstance(x, str) else json.dumps(x) for x in ODD), "1" * 400, "9" * 5000, "1e14",
             "1e999", "-0", "0x10", "1_000", " 3", "1e-300", "None", "data/tiny/base",
             "data/tiny/prompts.jsonl"]
    words, environment = ["--run_dir", str(folder / "run")], {}

    def text_for(name):
        choice = rng.random()
        if kinds[name] is bool and choice < 0.6:
            return rng.choice(["true", "false", "True"])
        if kinds[name] in (int, float) and choice < 0.6:
            return str(rng.choice([0, 1, 2, 4, 64, 1000, 10**6, 10**9, 10**12, 10**17, -1]))
        return rng.choice(texts)

    for _ in range(rng.choice((1, 1, 2, 3))):
        name, choice = rng.choice(list(kinds)), rng.random()
        if choice < 0.75:
            words += rng.choice([[f"--{name}", text_for(name)], [f"--{name}={text_for(name)}"]])
        elif choice < 0.85:
            words += rng.choice([["--"], ["--steps"], ["steps", "3"], ["--run dir", "x"], ["--", "x"],
                                 ["-s", "1"], ["--steps 3"], ["--stëps", "3"], ["--" + "x" * 300, "3"],
                                 ["--config", str(folder)], ["--config", "nowhere"], ["--\ud800", "1"],
                                 ["--steps\0", "1"], ["", ""]])
        else:
            file = folder / "options.json"
            file.write_text(json.dumps({name: rng.choice(ODD), "//": "note", "seed": 3}))
            if rng.random() < 0.4:
                file.write_bytes(mutate_bytes(rng, file.read_bytes())[0])
            words += ["--config", str(file)]
    if rng.random() < 0.15:
        odd = ["abc", "", "-1", "99999999999", "1.5", " 1", "1"]
        environment = {rng.choice(list(options.TORCHRUN)): rng.choice(odd)}

    def read():
        before = {name: os.environ.get(name) for name in environment}
        here = Path.cwd()
        os.environ |= environment
        os.chdir(folder)
        try:
            options.environment()
            config = train.parse(words)
            timedelta(seconds=config.timeout)
            train.check(config, world())
            inputs = run.read_inputs(config, world())
            rewards = choose_rewards(config.reward, reward_file)
            rollout.check_rewards(rewards, config, inputs.prompts, inputs.tokenizer)
            run.choose_folder(config, restarted=False)
            sampler = Sampler(base(), tokenizer(), config.max_sequences, config.page_size)
            request = Request(tokenizer().encode("Write."), 2, min(4, config.max_new_tokens),
                              config.temperature, config.top_p, stop=config.stop_strings,
                              seed=rollout.request_seed(config.seed, "fuzz"))
            for c in sampler.generate([request]):
                if not all(map(math.isfinite, c.logprobs)):
                    raise CannotTrain(f"logprobs {c.logprobs}")
        finally:
            os.chdir(here)
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    return f"{words[2:]!r:.300} {environment or ''}", read


# ------------------------------------------------------------------------------------------ running


def world() -> distributed.World:
    return distributed.setup("cpu")


PARTS = {"prompts": prompts, "models": models, "options": option_sets}


def attempt(read, what: str, found: dict):
    """Calls `read` and counts, or lists, what becomes of it."""
    start = time.perf_counter()
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(LIMIT)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            options.command(read)()
        found["accepted"] += 1
    except SystemExit as e:
        found["refused"] += 1
        *_, last = said.getvalue().splitlines() or [""]
        if e.code != 2 or not re.fullmatch(r"error: .{10,4000}", last):
            found["tracebacks"].append(f"{what}: exit code {e.code}, after {last!r:.300}")
    except CannotTrain as e:
        found["accepted that cannot train"].append(f"{what}: {e}")
    except Hang:
        pass
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # what the Rust of `tokenizers` raises when it panics is no Exception
        place = traceback.extract_tb(e.__traceback__)[-1]
        found["tracebacks"].append(f"{what}: {type(e).__name__}: {str(e)[:200]} "
                                   f"({place.filename}:{place.lineno})")
    finally:
        signal.alarm(0)
    if (seconds := time.perf_counter() - start) > LIMIT:
        found["hangs"].append(f"{what}: {seconds:.0f} s")


def fuzz(part: str, number: int, seed: int) -> dict:
    """What became of so many inputs of a part."""
    found = {"accepted": 0, "refused": 0, "tracebacks": [], "hangs": [], "accepted that cannot train": []}
    for i in range(number):
        with tempfile.TemporaryDirectory() as folder:
            what, read = PARTS[part](random.Random(f"{seed}/{part}/{i}"), Path(folder))
            attempt(read, f"{part} {i}: {what}", found)
    return found


@options.command
def main():
    config = options.parse(Config, sys.argv[1:], __doc__)
    found = {part: fuzz(part, getattr(config, part), config.seed) for part in PARTS}
    if importlib.util.find_spec("tests.fuzz_servers"):
        servers = importlib.import_module("tests.fuzz_servers")
        found["servers"] = servers.fuzz(config.servers, config.seed)
    lists = [(part, name, items) for part, result in found.items() for name, items in result.items()
             if isinstance(items, list)]
    for part, name, items in lists:
        for item in items:
            print(f"{part}, {name}: {ascii(item)}")
    print(json.dumps(found))
    if any(items for _, _, items in lists):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
