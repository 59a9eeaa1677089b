"""The commands of docs/recipe.md for the embedded default, with fewer steps, in a copy of the tree."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT, metrics

FEWER = ["--group_size", "4", "--prompts_per_step", "4", "--max_new_tokens", "160", "--unreachable", "keep",
         "--eval_prompts", str(ROOT / "tests/eval_small.jsonl")]


@pytest.mark.slow
def test_the_loop_of_the_recipe_closes(tmp_path):
    """RL of the base, its samples as documents, pretraining on them, RL again."""
    text = (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
    text = text.split("\n## On the embedded default\n")[1]
    (block, ) = re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)
    lines = block.replace("\\\n", " ").splitlines()
    for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0"):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    programs = {"python": [sys.executable],
                "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"]}
    for line in lines:
        line = re.sub(r"--steps \d+", "--steps 2", re.sub(r"--min_reward \S+", "--min_reward -99", line))
        program, *words = line.split()
        done = subprocess.run([*programs[program], *words, *FEWER * ("train.py" in words)], cwd=tmp_path,
                              capture_output=True, text=True, timeout=300,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}{done.stderr[-2000:]}"
    assert len(lines) == 9
    assert [len(metrics(tmp_path / "runs" / name)) for name in ("base_think", "full")] == [3, 3]
    assert "<think>" in (tmp_path / "runs/thinking.jsonl").read_text()
    assert "runs/full" in (tmp_path / "runs/recipe.svg").read_text()
