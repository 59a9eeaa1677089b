"""Imports follow the layout: every row imports only from rows below it, and none in a circle."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = ("bench", "scripts", "viewer", "evaluation", "train", "rollout", "rewards", "run", "checkpoints",
        "reward_model", "sampler grpo", "scheduler", "parallel", "replica", "model", "data", "kernels",
        "text", "lib")
ROW = {name: i for i, names in enumerate(ROWS) for name in names.split()}
PACKAGES = {"evaluation", "viewer", "data", "kernels", "lib"}  # whose files may import each other


def imports(file: Path, root: Path = ROOT) -> set[str]:
    """The files of the repository that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" for a in node.names]
        for name in names:
            parts = name.split(".")
            paths = [Path(*parts[:n]).with_suffix(".py") for n in range(len(parts), 0, -1)]
            paths.append(Path(parts[0], "__init__.py"))
            found |= {str(next(p for p in paths if (root / p).exists()))} if any(
                (root / p).exists() for p in paths) else set()
    return found - {str(file.relative_to(root))}


def violations(root: Path) -> list[str]:
    files = [f for f in root.rglob("*.py") if f.relative_to(root).parts[0].removesuffix(".py") in ROW]
    graph = {str(f.relative_to(root)): imports(f, root) for f in files}
    out = []
    for file, used in sorted(graph.items()):
        mine = Path(file).parts[0].removesuffix(".py")
        for other in sorted(used):
            theirs = Path(other).parts[0].removesuffix(".py")
            inside = mine == theirs and (mine in PACKAGES or other.endswith("__init__.py"))
            if mine != "bench" and not inside and ROW.get(theirs, -1) <= ROW[mine]:
                out.append(f"{file} imports {other}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as e:
        out.append(f"a circle: {' -> '.join(e.args[1])}")
    return out


def test_every_row_imports_only_from_rows_below_it():
    assert violations(ROOT) == []
    product = {f.name.removesuffix(".py") for f in ROOT.iterdir() if f.suffix == ".py"}
    assert product <= set(ROW), "a new file needs its row"


@pytest.mark.parametrize("files, found", [
    ({"train.py": "", "lib/a.py": "import train"}, ["lib/a.py imports train.py"]),
    ({"scripts/a.py": "from scripts import b", "scripts/b.py": ""}, ["scripts/a.py imports scripts/b.py"]),
    ({"grpo.py": "", "sampler.py": "def f():\n    import grpo"}, ["sampler.py imports grpo.py"]),
    ({"data/a.py": "import data.b", "data/b.py": "from data.a import x"},
     ["a circle: data/a.py -> data/b.py -> data/a.py"]),
    ({"data/tiny/a.py": "from data.prompts import x", "data/prompts.py": "import text", "text.py": ""}, []),
])
def test_a_violation_is_found(tmp_path, files, found):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert violations(tmp_path) == found


def test_pictures_of_runs_start_without_torch():
    """scripts.curves and scripts.report need none of it."""
    pending, seen = ["scripts/curves.py", "scripts/report.py"], set()
    while pending:
        file = pending.pop()
        seen.add(file)
        source = (ROOT / file).read_text(encoding="utf-8")
        names = {a.name.split(".")[0] for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import)
                 for a in n.names}
        names |= {n.module.split(".")[0] for n in ast.walk(ast.parse(source))
                  if isinstance(n, ast.ImportFrom)}
        assert "torch" not in names, file
        pending += imports(ROOT / file) - seen
