"""README and docs name only files, functions, options, links and metrics that exist."""

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest

from tests.helpers import ROOT

FILES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "bench/README.md")),
         *sorted(ROOT.glob("docs/*.md"))]
FOLDERS = ("bench", "configs", "data", "docs", "evaluation", "kernels", "lib", "scripts", "tests", "viewer")
OTHERS = set("max-restarts shutdown-timeout signals-to-handle rdzv_backend rdzv_conf rdzv_endpoint "
             "signal dependency".split())  # options of torchrun and Slurm
METRICS = ("train.py", "rollout.py", "grpo.py", "run.py", "text.py")  # what writes them


# ---------------------------------------------------------------------- a text


def prose(text: str) -> str:
    """Without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def spans(text: str) -> list[str]:
    """What stands in backticks outside of code blocks."""
    return [" ".join(s.split()) for s in re.findall(r"`([^`]+)`", prose(text))]


def section(text: str, title: str) -> str:
    return re.split(r"^## ", text.split(f"\n## {title}\n")[1], flags=re.M)[0]


def first_column(text: str) -> list[str]:
    """What stands in backticks in the first column of tables."""
    return [name for row in re.findall(r"^\| (.*?) \|", text, re.M) for name in re.findall(r"`([^`]+)`", row)]


def commands(text: str) -> list[list[str]]:
    """Words of each command that starts a program of this repository, from the program's name on."""
    blocks = re.findall(r"^```(?:sh|text)\n(.*?)^```$", text, re.M | re.S)
    lines = "\n".join(blocks + spans(text)).replace("\\\n", " ").split("\n")
    program = re.compile(r"(?:python|torchrun) (?:.* )?(train\.py|-m ((?:scripts|bench|data|tests)\.\S+))")
    found = []
    for part in (part for line in lines for part in re.sub(r"\s#\s.*", "", line).split("&&")):
        if start := program.search(part):
            file = start[2].replace(".", "/") + ".py" if start[2] else start[1]
            found.append([file, *part[start.end():].split()])
    return found


# ---------------------------------------------------------------------- the repository


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def defined(nodes: list[ast.stmt], name: str) -> bool:
    """Whether a function, class or constant has this name, or Class.member."""
    name, _, member = name.partition(".")
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return not member or defined(node.body, member)
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(
            node, ast.AnnAssign) else []
        names = {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        if name in names and not member:
            return True
    return False


@cache
def options(file: str) -> set[str]:
    """Those of a program, without dashes."""
    fields = {n.target.id for c in tree(file).body if isinstance(c, ast.ClassDef)
              and c.name in ("Config", "Machine", "Options") for n in c.body if isinstance(n, ast.AnnAssign)}
    source = (ROOT / file).read_text(encoding="utf-8")
    named = {"help", *re.findall(r'add_argument\(\s*"--([\w-]+)"', source), *["config"] * bool(fields)}
    passed_on = "parse_known_args" in source or file == "scripts/plan.py"
    return fields | named | (options("train.py") if passed_on else set())


@cache
def every_option() -> set[str]:
    programs = [f for folder in ("scripts", "bench") for f in (ROOT / folder).glob("*.py")]
    return set().union(OTHERS, options("train.py"), *(options(str(f.relative_to(ROOT))) for f in programs))


def text_of(node: ast.expr | None) -> str:
    """A string, with {} for what an f-string fills in; empty for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


@cache
def keys() -> set[str]:
    """Of all dicts that METRICS make."""
    found = set()
    for node in (node for file in METRICS for node in ast.walk(tree(file))):
        if isinstance(node, ast.Assign):
            found |= {text_of(t.slice) for t in node.targets if isinstance(t, ast.Subscript)}
        found |= set(map(text_of, node.keys if isinstance(node, ast.Dict) else
                         [node.key] if isinstance(node, ast.DictComp) else []))
    return found - {"", "{}"}


@cache
def strings() -> set[str]:
    return {text_of(node) for file in METRICS for node in ast.walk(tree(file))}


def pattern(key: str) -> str:
    return re.escape(key).replace(r"\{\}", "(.+)")


# ---------------------------------------------------------------------- checks


def missing_files(file: Path, text: str) -> list[str]:
    """Paths, and names such as `grpo.pack` or `scripts.plan`."""
    found = []
    for span in [*spans(text), *(word for command in commands(text) for word in command)]:
        path, _, name = span.partition(": ")
        parts = path.split(".")
        if re.fullmatch(r"[\w./-]+", path) and (path.endswith((".py", ".md", ".cff", ".toml")) or
                                                path.split("/")[0] in FOLDERS and "/" in path):
            ok = (ROOT / path).exists()
            ok = ok and (not name or defined(tree(path).body, name))
        elif not re.fullmatch(r"[a-z_]+(\.\w+)+", span) or parts[-1] in ("json", "jsonl", "html", "svg"):
            ok = True
        elif (ROOT / f"{parts[0]}.py").exists():
            ok = defined(tree(f"{parts[0]}.py").body, ".".join(parts[1:]))
        elif parts[0] in FOLDERS:
            split = next((i for i in (3, 2) if (ROOT / ("/".join(parts[:i]) + ".py")).exists()), 0)
            ok = split and (len(parts) <= split or
                            defined(tree("/".join(parts[:split]) + ".py").body, ".".join(parts[split:])))
        else:
            ok = True
        found += [] if ok else [span]
    return found


def unknown_options(file: Path, text: str) -> list[str]:
    found = [f"{program} {word}" for program, *words in commands(text) for word in words
             if word.startswith("--") and (ROOT / program).exists()
             and word[2:].split("=")[0] not in options(program)]
    return found + [span for span in spans(text) if (named := re.match(r"--([a-z][\w-]*)", span))
                    and named[1] not in every_option()]


def broken_links(file: Path, text: str) -> list[str]:
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        path, _, anchor = target.partition("#")
        other = (file.parent / path) if path else file
        if "://" in target or other.exists() and not anchor:
            continue
        own = text if other == file else other.read_text(encoding="utf-8") if other.exists() else ""
        headings = re.findall(r"^#+ (.+)$", prose(own), re.M)
        if anchor not in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]:
            found.append(target)
    return found


def unwritten_metrics(text: str) -> list[str]:
    """Names that the table of metrics has and no dict of METRICS. What fills an f-string is a placeholder in
    capitals, a number, or a string of the code."""
    def is_written(name: str) -> bool:
        matches = (re.fullmatch(pattern(key), name.removeprefix("eval/")) for key in keys() - {"eval/{}"})
        return any(all(x.isupper() or x.isdigit() or x in strings() for x in m.groups())
                   for m in matches if m)

    return [name for name in first_column(section(text, "Metrics")) if not is_written(name)]


def undocumented_metrics(text: str, names: set[str]) -> list[str]:
    """Of names of metrics, or f-strings of them, those that the table does not have."""
    rows = first_column(section(text, "Metrics"))
    wanted = [re.escape(row).replace("NAME", "[^/]+").replace("A,B", "[^/]+,[^/]+") for row in rows]
    return sorted(name for name in names if not any(
        re.fullmatch(row, name) or "{}" in name and re.fullmatch(pattern(name), text)
        for row, text in zip(wanted, rows)))


def unknown_rows(text: str) -> list[str]:
    """Names in the tables of options that are no option of train.py."""
    return sorted(set(first_column(section(text, "Options"))) - options("train.py"))


CHECKS = {check.__name__: check for check in (missing_files, unknown_options, broken_links)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
@pytest.mark.parametrize("check", CHECKS)
def test_what_a_page_names_exists(check, file):
    assert CHECKS[check](file, file.read_text(encoding="utf-8")) == []


def test_the_table_of_metrics_is_what_the_code_writes():
    text = (ROOT / "docs/running.md").read_text(encoding="utf-8")
    assert unwritten_metrics(text) == []
    assert undocumented_metrics(text, {key for key in keys() if "/" in key}) == []
    assert len(first_column(section(text, "Metrics"))) > 50, "the table is found"


def test_the_table_of_metrics_has_those_of_a_run(undisturbed):
    text = (ROOT / "docs/running.md").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert undocumented_metrics(text, {name for line in lines for name in line}) == []


def test_the_tables_of_options_name_options():
    text = (ROOT / "docs/running.md").read_text(encoding="utf-8")
    assert unknown_rows(text) == []
    assert {"tp", "tis_cap"} <= set(first_column(section(text, "Options"))), "the tables are found"


def test_the_readme_is_two_screens():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 190


@pytest.mark.parametrize("check, text, found", [
    ("missing_files", "`nowhere.py`, `lib/none.py`, `data/tiny/none`, `train.py`, `data/tiny`, `lib/`",
     ["nowhere.py", "lib/none.py", "data/tiny/none"]),
    ("missing_files", "`grpo.py: pack`, `grpo.py: unpack`, `sampler.py: Sampler.run`, `grpo.py: FORMS`, "
     "`sampler.py: Sampler.walk`", ["grpo.py: unpack", "sampler.py: Sampler.walk"]),
    ("missing_files", "`grpo.pack`, `grpo.unpack`, `scripts.plan`, `scripts.none`, `lib.endpoint.Endpoint`, "
     "`lib.endpoint.None`", ["grpo.unpack", "scripts.none", "lib.endpoint.None"]),
    ("missing_files", "```sh\npython train.py --config configs/none.json\n```", ["configs/none.json"]),
    ("missing_files", "`python -m scripts.none --out x`", ["scripts/none.py"]),
    ("unknown_options", "```sh\ntorchrun --nproc_per_node=2 train.py --steps 3 \\\n --stpes=4  # --why\n```",
     ["train.py --stpes=4"]),
    ("unknown_options", "```text\n$ python -m scripts.plan --gpus 8 --lr 1 --gpsu 8\n```",
     ["scripts/plan.py --gpsu"]),
    ("unknown_options", "`python -m scripts.report a b --out c --lr 1`", ["scripts/report.py --lr"]),
    ("unknown_options", "`--recompute true`, `--recompile true`", ["--recompile true"]),
    ("broken_links", "# A b: c\n[x](#a-b-c) [y](#a-b) [z](LICENSE) [u](none.md) [v](README.md#none) "
     "[w](https://none.example/#x)", ["#a-b", "none.md", "README.md#none"]),
])
def test_each_check_finds_what_does_not_exist(check, text, found):
    assert CHECKS[check](ROOT / "page.md", text) == found


def test_wrong_metrics_and_options_are_found():
    def page(title, *rows):
        return f"\n## {title}\n" + "".join(f"| {row} | |\n" for row in rows)

    right = "`lr`", "`reward/NAME`, `time/idle`", "`correlation/A,B`", "`eval/S_l`", "`eval/distinct_2`"
    assert unwritten_metrics(page("Metrics", *right)) == []
    wrong = "`rl`", "`rewards/NAME`", "`time/idleness`", "`eval/S_m`", "`eval/time/idleness`"
    assert unwritten_metrics(page("Metrics", *wrong)) == [row.strip("`") for row in wrong]
    names = {"lr", "reward/length", "correlation/a,b", "eval/S_l", "time/{}", "rl", "other/{}", "reward/a/b"}
    assert undocumented_metrics(page("Metrics", *right), names) == ["other/{}", "reward/a/b", "rl"]
    assert unknown_rows(page("Options", "`tp`", "`pt`, `lr`")) == ["pt"]
