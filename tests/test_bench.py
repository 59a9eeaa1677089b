"""The programs that wait for a GPU, as far as a machine without one can run them."""

import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import rewards
from model import ModelConfig

pytest.importorskip("triton")
from bench import bench_engine, bench_kernels, bench_sampler, bench_step, gpu_check, study, tune  # noqa: E402 - they need triton
from kernels import backend  # noqa: E402

ROOT = Path(__file__).parent.parent


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
@pytest.mark.parametrize("module", [gpu_check, bench_engine, bench_kernels, tune])
def test_without_a_gpu_a_bench_says_so_and_writes_nothing(module, monkeypatch):
    table = backend.TABLE.read_text()
    monkeypatch.setattr(sys, "argv", [module.__name__])
    with pytest.raises(SystemExit, match="torch sees no"):
        module.main()
    assert backend.TABLE.read_text() == table and not (ROOT / "bench/results/gpu.json").exists()


def test_a_stage_records_exit_code_result_and_last_lines(tmp_path):
    ok = gpu_check.run(script("print('measured'); print('{\"bench\": \"x\", \"ms\": 3}')"), 60)
    assert ok["exit"] == 0 and ok["result"] == {"bench": "x", "ms": 3} and ok["tail"] == ["measured"]
    failed = gpu_check.run(script("import sys; print('half way', flush=True); sys.exit('because')"), 60)
    assert failed["exit"] == 1 and failed["result"] is None and failed["tail"] == ["half way", "because"]
    late = gpu_check.run(script("import time; print('began', flush=True); time.sleep(60)"), 2)
    assert late["exit"] == "stopped after 2 s" and late["tail"] == ["began"]
    assert "No such file" in gpu_check.run([str(tmp_path / "nothing")], 5)["exit"]


def test_gpu_check_keeps_what_was_measured_before_and_names_missed_bars(tmp_path, monkeypatch, capsys):
    bars = {"fast": {"figure": 0.8, "bound": 0.85, "met": False},
            "right": {"figure": 1, "bound": 1, "met": True}}
    result = json.dumps({"bench": "kernels", "cases": [{"case": "decode", "bars": bars}]})
    made = {"tests": [(1, script("raise SystemExit(2)"))], "kernels": [(1, script(f"print({result!r})"))]}
    monkeypatch.setattr(gpu_check, "stages", lambda: made)
    monkeypatch.setattr(gpu_check, "CUDA", True)
    monkeypatch.setattr(gpu_check, "hardware", lambda: {"gpu": "one"})

    def check(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as stop:
            gpu_check.main()
        return str(stop.value), json.loads((tmp_path / "gpu.json").read_text())

    said, record = check("--stages", "tests")
    assert "exit 2" in said and list(record["stages"]) == ["tests"]
    said, record = check("--stages", "kernels")
    assert said == "decode: fast missed, 0.8 instead of 0.85"
    assert list(record["stages"]) == ["tests", "kernels"]
    monkeypatch.setattr(gpu_check, "hardware", lambda: {"gpu": "another"})
    assert list(check("--stages", "kernels")[1]["stages"]) == ["kernels"], "two machines were mixed"


def test_a_line_is_printed_while_its_command_still_runs(tmp_path, monkeypatch):
    seen = tmp_path / "seen"
    monkeypatch.setattr(gpu_check, "print", lambda line, flush: seen.touch(), raising=False)
    text = f"""
import pathlib, time
print("measured")
for _ in range(200):
    time.sleep(0.05)
    if pathlib.Path({str(seen)!r}).exists():
        raise SystemExit(0)
raise SystemExit(1)
"""
    assert gpu_check.run(script(text), 30)["exit"] == 0


def test_a_budget_skips_what_does_not_fit_and_stops_what_takes_longer(tmp_path, monkeypatch, capsys):
    made = {"tests": [(0.1, script("print('a')")), (100, script("print('b')"))],
            "step": [(0.1, script("print('c')")), (0, script("import time; time.sleep(60)")),
                     (0.1, script("print('d')"))]}
    monkeypatch.setattr(gpu_check, "smoke_stages", lambda: made)
    monkeypatch.setattr(gpu_check, "hardware", lambda: {"gpu": None})
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--smoke", "--budget", "2", "--out", str(tmp_path)])
    start = time.perf_counter()
    with pytest.raises(SystemExit, match="exit stopped after [12] s"):
        gpu_check.main()
    assert time.perf_counter() - start < 6
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert [r["tail"] for name in ("tests", "step") for r in record["stages"][name]] == [["a"], ["c"], []]
    skipped = record["skipped"]
    assert len(skipped) == 2 and "print('b') (estimated 100 s" in skipped[0] and "print('d')" in skipped[1]
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == [f"skipped: {line}" for line in skipped]


def test_the_schedule_of_a_budget_is_printed_without_a_gpu_and_nothing_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "run", None)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--budget", "500", "--dry-run", "--out", str(tmp_path)])
    gpu_check.main()
    _, *lines = capsys.readouterr().out.splitlines()
    table = [(seconds, gpu_check.spoken(c)) for group in gpu_check.stages().values() for seconds, c in group]
    runs = [seconds for line, (seconds, command) in zip(lines, table, strict=True)
            if command in line and "SKIPPED" not in line]
    assert 400 < sum(runs) <= 500 and len(runs) < len(table) and "pytest" in lines[0]
    assert not list(tmp_path.iterdir())


def test_the_test_that_gpu_check_deselects_exists():
    assert f"def {gpu_check.AOT_TEST}(" in (ROOT / "tests/test_kernels.py").read_text()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_in_the_middle_gpu_check_leaves_a_valid_record(tmp_path, monkeypatch):
    last = script("import os, time\nparent, end = os.getppid(), time.time() + 30\n"
                  "while os.getppid() == parent and time.time() < end: time.sleep(0.05)")
    made = {"tests": [(1, script("print('first')"))], "step": [(1, last)]}
    monkeypatch.setattr(gpu_check, "smoke_stages", lambda: made)
    monkeypatch.setattr(gpu_check, "hardware", lambda: {"gpu": None})
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--smoke", "--out", str(tmp_path)])
    child = os.fork()
    if not child:
        try:
            gpu_check.main()
        finally:
            os._exit(0)
    file, until = tmp_path / "gpu.json", time.perf_counter() + 30
    while not file.exists() and time.perf_counter() < until:
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert json.loads(file.read_text())["stages"]["tests"][0]["tail"] == ["first"]


def test_bench_step_trains_random_weights_on_whole_samples_and_writes_no_checkpoint(tmp_path, monkeypatch,
                                                                                    capsys):
    monkeypatch.setattr(bench_step.Tokenizer, "find_eos", bench_step.Tokenizer.find_eos)  # it replaces both
    monkeypatch.setitem(rewards.REWARDS, "varied", None)
    shape = ModelConfig(151936, 16, 32, 1, 2, 1, tie_word_embeddings=True)
    monkeypatch.setitem(bench_step.SHAPES, "43m", shape)
    bench_step.measure(tmp_path, ["--device", "cpu", "--steps", "2", "--max_new_tokens", "9"], "43m")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["seconds"] > 0 and result["length/tokens"] == 9
    assert not any((tmp_path / "run/checkpoints").iterdir())


def test_tuning_keeps_the_fastest_entry_that_is_right(monkeypatch):
    """By times of a script: 3 ms with the entry in use; to replace it takes 2 %, and a right result."""
    table = {}
    monkeypatch.setattr(backend, "blocks", lambda kernel, dtype, size: {"N": 1})
    monkeypatch.setattr(bench_kernels, "timed", lambda function: function())
    times, wrong, no_room = {1: 3.0, 2: 2.99, 4: 1.0, 8: 2.5, 16: 0.1, 32: 2.4}, 4, 16

    def make():
        chosen = table.get("decode/2/64", {"N": 1})["N"]
        if chosen == no_room:
            raise RuntimeError("out of resources")
        return bench_kernels.Case(lambda: times[chosen], {}, lambda out: float(chosen == wrong), 0.5)

    candidates = [{"N": n} for n in (2, 4, 8, 16, 32)]
    assert tune.search("decode/2/64", make, candidates, table) == {"N": 32}
    assert tune.search("decode/2/64", make, candidates[:2], {}) == {"N": 1}
    assert tune.render(backend.table()) == backend.TABLE.read_text(), "the table is as the program writes it"


def test_every_case_of_the_mission_is_one_that_the_kernels_have_blocks_for():
    names = bench_kernels.cases().keys()
    assert {"7B decode 64 x 8k", "32B decode 1 x 16k", "7B prefill 8k"} <= names
    without_model = {name.split(" ", 1)[1] for name in [*names, *bench_kernels.smoke_cases()]}
    assert set(bench_kernels.BARS) <= without_model, "a bar without a case"
    for key in tune.searches():
        assert key in backend.table()["default"], key


FAKE_VLLM = """
class SamplingParams:
    def __init__(self, **settings):
        assert settings["temperature"] == 0.8 and settings["ignore_eos"] and settings["logprobs"] == 0
        self.n = settings["max_tokens"]

class Output:
    def __init__(self, n):
        self.outputs, self.token_ids, self.logprobs = [self], [0] * n, [{}] * n

class LLM:
    def __init__(self, skip_tokenizer_init, **engine):
        print("vLLM says much")
        assert engine["dtype"] == "float32" and engine["model"].endswith("base")
    def reset_prefix_cache(self): pass
    def generate(self, prompts, params, use_tqdm):
        assert len(prompts[0]["prompt_token_ids"]) == 64
        return [Output(p.n) for p in params]
"""


def test_the_sampler_bench_runs_vllm_in_a_process_of_its_own(tmp_path, monkeypatch, capsys):
    """Against a fake one, and says why a process has ended. Does not exercise vLLM, nor transformers."""
    requests = bench_sampler.workload(1000)[:4]
    monkeypatch.setattr(bench_sampler, "workload", lambda vocabulary: requests)
    monkeypatch.setattr(sys, "argv", ["bench_sampler", "--model", str(ROOT / "data/tiny/base"),
                                      "--device", "cpu", "--no_transformers", "--vllm", sys.executable])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "vllm.py").write_text("raise ImportError('no vLLM here')")
    with pytest.raises(SystemExit, match="vLLM ended with 1:\n(.*\n)*ImportError: no vLLM here"):
        bench_sampler.main()
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    bench_sampler.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["tokens"] == sum(r.max_new_tokens for r in requests)
    assert result["vllm_tokens_per_second"] > result["ours_tokens_per_second"] > 0
    assert result["ratio_vllm"] == 0


def test_the_engines_bench_runs_and_counts_what_has_to_be_read(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_engine", "--smoke", "--no_peer"])
    bench_engine.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [case["case"] for case in result["cases"]] == ["smoke rows 1 output 64", "smoke rows 3 output 64"]
    config = bench_engine.SHAPES["smoke"]
    weights = 2 * (config.num_parameters - config.vocab_size * config.hidden_size)
    for rows, case in zip((1, 3), result["cases"]):
        cache = rows * 36 * 2 * 2 * 2 * 16 * 2  # tokens, K and V, layers, heads, head dim, bytes
        assert case["ms_per_step"]["limit"] == pytest.approx(
            1e3 * (weights + cache) / result["copy_bytes_per_s"])
        assert case["tokens_per_second"]["graphs"] > 0 and not case["bars"]
    peer = bench_engine.their_model(config)
    assert sum(p.numel() for p in peer.parameters()) == config.num_parameters


# ---------------------------------------------------------------------- the study


def test_an_effect_of_the_study_has_students_interval():
    found = study.effect(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    error = math.sqrt(2.5 / 5)
    assert found == pytest.approx({"mean": 3.0, "half": 2.776 * error, "visible": 3.717 * error})
    assert study.effect(np.array([-1.0, 1.0]))["half"] == pytest.approx(12.706)


def test_the_edits_of_the_study_still_fit_rewards_py():
    source = (ROOT / "rewards.py").read_text()
    for arm, (old, new) in study.EDITS.items():
        assert arm in study.ARMS and source.count(old) == 1 and new not in source
    assert {arm for arm, _ in study.CLAIMS.values()} <= study.ARMS.keys()
    assert {measure for _, measure in study.CLAIMS.values()} <= study.UNSEEN.keys(), "no arm is trained on it"


def test_the_table_of_the_study_is_that_of_its_result():
    result = json.loads((ROOT / "bench/results/study.json").read_text())
    text = (ROOT / "docs/study.md").read_text()
    assert result["table"] in text
    for claim, verdict in result["verdicts"].items():
        assert re.search(rf"\| {claim} \|.*\| {verdict} \|", text), claim
