"""Mistakes that no test would see: changes the code in one place at a time and runs the tests of that file.

    python -m tests.mutate --number 100 --seed 0 [--files train.py grpo.py]
    python -m tests.mutate --named [PART]

The first draws mutations: a comparison turned round or loosened, an arithmetic operator swapped, a number or
a truth value changed, an argument of a call dropped. The second applies those of mutations.json, all or those
with PART in their names. Each runs in a copy of the tree, in a fork of this process, which has imported what
all tests do. What no test finds is printed: a test is missing, or the mutant is equivalent. The last line is
JSON.
"""

import argparse
import ast
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as conftest.py

import pytest  # noqa: E402

ROOT = Path(__file__).parent.parent
TESTS = {  # of each file, fastest first
    "train.py": "update options variants sharding run survival",
    "rollout.py": "update rewards options remote variants parallel_sampling run",
    "grpo.py": "grpo update",
    "rewards.py": "rewards options writing remote served_writing",
    "checkpoints.py": "checkpoints survival",
    "run.py": "update checkpoints errors run survival",
    "sampler.py": "sampler",
    "scheduler.py": "scheduler sampler parallel_sampling",
    "lib/files.py": "checkpoints",
    "lib/scoring.py": "rewards remote options",
    "data/prompts.py": "prompts options",
    "lib/endpoint.py": "endpoint served_writing",
    "evaluation/ask.py": "annotate evaluate",
    "evaluation/benchmarks.py": "benchmarks evaluate",
    "evaluation/elo.py": "elo evaluate",
    "evaluation/judge.py": "evaluate",
    "evaluation/scores.py": "benchmarks evaluate",
    "evaluation/source.py": "evaluate",
}
COMPARED = {ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE),
            ast.GtE: (ast.Gt, ast.Lt), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.In: (ast.NotIn,),
            ast.NotIn: (ast.In,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,)}
SWAPPED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
           ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}


def import_all():
    """What the tests import or load on first use, but nothing of this repository."""
    import torch

    for name in ("torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "tokenizers",
                 "safetensors.torch", "numpy"):
        importlib.import_module(name)
    torch.set_num_threads(1)
    with torch.device("meta"):
        torch.nn.Linear(2, 2)


def variants(node: ast.AST):
    """(list or node, index or field, other value) of each mutation of a node."""
    if isinstance(node, ast.Compare):
        yield from ((node.ops, i, other()) for i, op in enumerate(node.ops) for other in COMPARED[type(op)])
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in SWAPPED:
        yield vars(node), "op", SWAPPED[type(node.op)]()
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        value = node.value
        yield vars(node), "value", (not value if isinstance(value, bool) else
                                    value + 1 if isinstance(value, int) else value * 1.25)
    elif isinstance(node, ast.Call):
        for field in ("args", "keywords"):
            given = getattr(node, field)
            yield from ((vars(node), field, given[:i] + given[i + 1:]) for i in range(len(given)))


def nodes(tree: ast.AST):
    """All but annotations and messages."""
    if not isinstance(tree, (ast.Raise, ast.JoinedStr)):
        yield tree
        for name, value in ast.iter_fields(tree):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and name not in ("annotation", "returns"):
                    yield from nodes(child)


def all_mutants(file: str) -> list[dict]:
    text = (ROOT / file).read_bytes()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    out = []
    for node in nodes(ast.parse(text)):
        for owner, key, value in variants(node):
            begin = starts[node.lineno - 1] + node.col_offset
            old = text[begin:starts[node.end_lineno - 1] + node.end_col_offset].decode()
            owner[key], before = value, owner[key]
            new, owner[key] = ast.unparse(node), before
            new = f"({new})" if isinstance(node, (ast.Compare, ast.BinOp)) else new
            out.append({"file": file, "line": node.lineno, "begin": begin, "old": old, "new": new})
    return out


def named_mutants(part: str) -> list[dict]:
    mutants = json.loads((ROOT / "tests" / "mutations.json").read_text())
    for m in mutants:
        text, old = (ROOT / m["file"]).read_bytes(), m["old"].encode()
        if text.count(old) != 1:
            raise SystemExit(f"mutations.json: the old text of {m['name']!r} must occur once in {m['file']}, "
                             f"not {text.count(old)} times: correct it")
        m["begin"] = text.index(old)
        m["line"] = text[:m["begin"]].count(b"\n") + 1
    return [m for m in mutants if part in m["name"]]


# ---------------------------------------------------------------------- running tests


def try_mutant(work: tuple[dict | None, list[str], float]) -> tuple[dict | None, list[str]]:
    """The mutant and what found it: the first test that fails. Of None, the tree as it is, all that fail.
    work: the mutant, what pytest is given, and after how many seconds it counts as found."""
    mutant, arguments, limit = work
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        tree = Path(folder)
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.check_output(listed, cwd=ROOT, text=True).split("\0"):
            if (ROOT / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, tree / name)
        if mutant:
            file, begin, old = tree / mutant["file"], mutant["begin"], mutant["old"].encode()
            text = file.read_bytes()
            file.write_bytes(text[:begin] + mutant["new"].encode() + text[begin + len(old):])
        if not (pid := os.fork()):
            os.setsid()
            signal.alarm(int(limit))
            out = os.open(tree / "log", os.O_CREAT | os.O_WRONLY)
            os.dup2(out, 1), os.dup2(out, 2)
            os.chdir(tree)
            sys.modules.pop("tests", None)
            sys.path[:] = [folder, *(p for p in sys.path if p not in ("", str(ROOT)))]
            os._exit(pytest.main(["-q", "-p", "no:cacheprovider", "--basetemp", f"{folder}/tmp", *arguments,
                                  *["-x"] * bool(mutant)]))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        try:
            os.killpg(pid, signal.SIGKILL)  # what the tests may have started
        except ProcessLookupError:
            pass
        log = (tree / "log").read_text(errors="replace")
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", log, re.M)
    return mutant, failed or [f"exit code {status}"] * (status != 0)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", nargs="+", default=list(TESTS), choices=TESTS)
    parser.add_argument("--named", nargs="?", const="")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    every = [m for file in given.files for m in all_mutants(file)]
    mutants = (random.Random(given.seed).sample(every, given.number) if given.named is None
               else named_mutants(given.named))
    import_all()
    start, limits, arguments, survived = time.time(), {}, {}, 0
    for file in sorted({m["file"] for m in mutants}):
        began, arguments[file] = time.time(), [f"tests/test_{name}.py" for name in TESTS[file].split()]
        for test in try_mutant((None, arguments[file], 3600))[1]:
            print(f"left out: {test} fails on the tree as it is", flush=True)
            arguments[file].append(f"--deselect={test}")
        limits[file] = 60 + 3 * (time.time() - began)
    with multiprocessing.get_context("fork").Pool(given.jobs) as pool:
        work = [(m, arguments[m["file"]], limits[m["file"]]) for m in mutants]
        for m, found in pool.imap(try_mutant, work):
            survived += not found
            how = f"found by {found[0]}" if found else f"SURVIVED\n- {m['old']}\n+ {m['new']}"
            print(f"{m['file']}:{m['line']} {m.get('name', '')} {how}", flush=True)
    print(json.dumps({"mutants": len(mutants), "found": len(mutants) - survived, "survived": survived,
                      "seed": given.seed, "seconds": round(time.time() - start)}))


if __name__ == "__main__":
    main()
