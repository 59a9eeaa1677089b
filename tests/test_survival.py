"""What ends a run, and what is left of it: kills, signals, full disks, damaged files, gradients that are NaN.

Several ranks are forked from one process that has imported everything, because that takes longer than a run;
like torchrun's they share one store over all restarts. The long form is tests/chaos.py.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import checkpoints
import grpo
import model as qwen
import parallel
import rewards
import train
from lib import distributed
from lib.options import UserError
from tests.chaos import children, differences
from tests.helpers import ROOT, SMALL, equal, in_process, metrics, rollouts, tensors

BASE = ROOT / "data" / "tiny" / "base"
QUICK = [*SMALL, "--max_new_tokens", "32", "--group_size", "2", "--prompts_per_step", "4", "--eval_prompts",
         "", "--seed", "1", "--steps", "4", "--micro_batch_tokens", "400", "--prompts",
         str(ROOT / "data" / "tiny" / "eval_prompts.jsonl")]

PRELUDE = """
import json, os, signal, sys, time
import torch, torch.distributed as dist
import train, run as run_folder, checkpoints, parallel, rewards, rollout
from lib import distributed
from tests.chaos import strike
from sampler import Sampler
"""


@pytest.fixture(scope="module")
def train_ranks(forks):
    """train_ranks(folder, *options, ranks, code): exit codes and what each rank said. `code` runs first, with
    the number of its `rank`; only: without train.py after it."""
    def run(folder: Path, *options: str, ranks: int = 2, code: str = "", only: bool = False, **given):
        return forks.train(folder, *options, small=QUICK, ranks=ranks, code=PRELUDE + code,
                           main="" if only else "train", **given)

    return run


@pytest.fixture(scope="module")
def calm(train_ranks, tmp_path_factory) -> Path:
    """Four steps on two ranks, with a checkpoint every second."""
    folder = tmp_path_factory.mktemp("runs") / "calm"
    codes, said = train_ranks(folder)
    assert codes == [0, 0], said
    return folder


def cut(run: Path, to: Path, step: int) -> Path:
    """A copy of a run as it was after a checkpoint."""
    shutil.copytree(run, to)
    for later in (to / "checkpoints").iterdir():
        if int(later.name.removeprefix("step_")) > step:
            shutil.rmtree(later)
    return to


# ---------------------------------------------------------------------- other numbers of ranks

RESAVE = """
world = distributed.setup("cpu")
model = parallel.shard(train.run.qwen.load("{base}"), world)
optimizer = torch.optim.AdamW(model.parameters())
state = checkpoints.load(parallel.Path("{source}"), model, optimizer)
checkpoints.save(parallel.Path("{target}"), model, optimizer, state, world, 9)
distributed.close()
"""


def whole(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Its tensors, put together by one process."""
    shapes = {name: p.detach() for name, p in qwen.load(BASE).named_parameters()}
    out = {f"{name}.{key}": torch.zeros_like(p)
           for name, p in shapes.items() for key in ("exp_avg", "exp_avg_sq")}
    for part, names in (("weights", shapes), ("optimizer", out)):
        dcp.load(names, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint / part)), no_dist=True)
    return out | shapes


@pytest.mark.parametrize("ranks", [1, 4])
def test_what_two_ranks_saved_is_what_another_number_reads(train_ranks, calm, tmp_path, ranks):
    """And written: in as many files, each hashed by its rank."""
    source = calm / "checkpoints" / "step_000004"
    code = RESAVE.format(base=BASE, source=source, target=tmp_path)
    codes, said = train_ranks(tmp_path, ranks=ranks, code=code, only=True)
    assert codes == [0] * ranks, said
    (there,) = checkpoints.complete(tmp_path)
    a, b = whole(source), whole(there)
    assert equal(a, b) and all(v.any() for k, v in a.items() if "exp_avg" in k)
    names = json.loads((there / "manifest.json").read_text())
    assert len(names) == 2 * ranks + 1 and checkpoints.verify(there)["updates"] == 4


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_run_of_two_ranks_goes_on_with_another_number(train_ranks, calm, tmp_path, ranks):
    """The same prompts in every step, the same texts in the first; gradients differ by their rounding."""
    folder = cut(calm, tmp_path / "run", 2)
    codes, said = train_ranks(folder, ranks=ranks)
    assert codes == [0] * ranks and "resumed after step 2" in said[0], said
    ours, theirs = rollouts(folder), rollouts(calm)
    assert ours.keys() == theirs.keys()
    for name in ours:
        a, b = ([json.loads(line) for line in x[name].splitlines()] for x in (ours, theirs))
        assert [r["prompt_id"] for r in a] == [r["prompt_id"] for r in b]
        if name <= "step_000003.jsonl":
            assert [r["text"] for r in a] == [r["text"] for r in b]
    for a, b in zip(metrics(folder)[2:3], metrics(calm)[2:3], strict=True):
        assert a["step"] == 3 and a["grad_norm"] > 0
        assert all(a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-6) for k in a)


# ---------------------------------------------------------------------- kills and signals


@pytest.mark.slow
def test_kills_at_any_moment_change_nothing(train_ranks, calm, tmp_path):
    """A rank is killed, the other told to stop, as torchrun does, and both are started again."""
    for victim, moment, nth in ((0, "rename", 2), (1, "sampling", 10), (0, "backward", 3)):
        start = time.monotonic()
        codes, said = train_ranks(tmp_path / "run", code=f"rank == {victim} and strike('{moment}', {nth})")
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1, (moment, codes, said)
        assert time.monotonic() - start < 60, "the other rank does not wait for one that is gone"
        assert f"error: rank {1 - victim} in phase " in said[1 - victim], said
    codes, said = train_ranks(tmp_path / "run")
    assert codes == [0, 0] and "resumed after step 2" in said[0], said
    assert differences(tmp_path / "run", calm) == []


@pytest.mark.parametrize("sign, moment, nth", [("SIGTERM", "sampling", 45), ("SIGINT", "backward", 3)])
def test_a_signal_keeps_the_last_step_and_both_ranks_end_with_0(train_ranks, calm, tmp_path, sign, moment,
                                                                nth):
    """Sent to one rank alone in the second step, between its micro-batches; no checkpoint is due."""
    code = f"rank == 1 and strike('{moment}', {nth}, signal.{sign})"
    codes, said = train_ranks(tmp_path / "run", "--save_every", "100", code=code)
    assert codes == [0, 0] and f"\nstopped by {sign}: step 1 is kept" in said[0] and not said[1], said
    codes, said = train_ranks(tmp_path / "run")
    assert codes == [0, 0] and "resumed after step 1" in said[0], said
    assert differences(tmp_path / "run", calm) == []


@pytest.mark.slow
def test_ranks_that_share_a_sampler_stop_together(train_ranks, tmp_path):
    """One is told in the middle of sampling: it cannot leave before the other."""
    shared = ["--tp", "2", "--steps", "3"]
    assert train_ranks(tmp_path / "calm", *shared)[0] == [0, 0]
    told = "rank == 1 and strike('sampling', 45, signal.SIGTERM)"
    codes, said = train_ranks(tmp_path / "run", *shared, code=told)
    assert codes == [0, 0] and "stopped by SIGTERM: step" in said[0], said
    stopped = len(metrics(tmp_path / "run"))
    assert stopped < 3
    codes, said = train_ranks(tmp_path / "run", *shared)
    assert codes == [0, 0] and f"resumed after step {stopped}" in said[0], said
    assert differences(tmp_path / "run", tmp_path / "calm") == []


@pytest.mark.slow
def test_a_stop_during_an_evaluation_loses_neither_it_nor_the_step(train_ranks, tmp_path):
    """The last step's line is written and its checkpoint saved; the evaluation is made on the next start."""
    evaluated = ["--eval_prompts", str(ROOT / "tests" / "eval_small.jsonl"), "--steps", "4"]
    assert train_ranks(tmp_path / "calm", *evaluated, ranks=1)[0] == [0]
    codes, said = train_ranks(tmp_path / "run", *evaluated, ranks=1, code="""
real, calls = rollout.evaluate, []
rollout.evaluate = lambda *a: (calls.append(1), len(calls) == 3 and os.kill(os.getpid(), 1), real(*a))[-1]""")
    assert codes == [0] and "stopped by SIGHUP: step 4 is kept" in said[0], said
    assert ["eval/truncated" in m for m in metrics(tmp_path / "run")] == [True, False, True, False, False]
    codes, said = train_ranks(tmp_path / "run", *evaluated, ranks=1)
    assert codes == [0] and "resumed after step 4" in said[0] and "eval after step 4" in said[0], said
    codes, said = train_ranks(tmp_path / "run", *evaluated, ranks=1)
    assert codes == [0] and "has finished its 4 steps" in said[0], said
    assert differences(tmp_path / "run", tmp_path / "calm") == []


def test_a_second_ctrl_c_ends_at_once_and_a_signal_that_is_ignored_stays_so(train_ranks, tmp_path):
    codes, said = train_ranks(tmp_path, ranks=1, only=True, code="""
signal.signal(signal.SIGHUP, signal.SIG_IGN)
watch = distributed.Watch()
watch.start(None, 0, 1)
for sign in (signal.SIGHUP, signal.SIGINT, signal.SIGINT):
    os.kill(os.getpid(), sign)
    time.sleep(0.7)
    print(watch.stopping, flush=True)
time.sleep(20)""")
    assert codes == [130] and said == ["[]\n[2]\n"]


def test_ctrl_c_while_train_py_is_imported_leaves_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), 2)\ntime.sleep(5)\n")
    done = subprocess.run([sys.executable, str(ROOT / "train.py")], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)},
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_rank_whose_torchrun_dies_before_they_have_met_ends_too():
    """It would wait for a store that is gone, or meet the ranks of the next. What sees that is imported
    before what takes seconds, even too late."""
    watched = f"{sys.executable} -c 'from lib import stop; import time; time.sleep(60)' & echo $!; sleep 2"
    for parent in (watched, f"(sleep 1; {watched}) & echo $!"):
        done = subprocess.run(["sh", "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "TORCHELASTIC_RUN_ID": "1"})
        assert len(done.stdout.split()) == 1 + (parent != watched)
        wait_for(lambda: not any(map(alive, done.stdout.split())), 10)  # noqa: B023
    source = (ROOT / "train.py").read_text()
    assert source.index("\nfrom lib.stop import") < source.index("\nimport torch")


def alive(pid: str) -> bool:
    return Path(f"/proc/{pid}/cmdline").exists() and b"lib" in Path(f"/proc/{pid}/cmdline").read_bytes()


KILL_AFTER = """
def after(owner, name, wanted):
    real = getattr(owner, name)
    def kills(*a, **k):
        real(*a, **k)
        if wanted in str(a):
            os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, name, kills)
after({owner}, "{name}", "{wanted}")
"""


@pytest.mark.slow
def test_a_kill_between_any_two_writes_of_a_step_loses_nothing_and_repeats_nothing(train_ranks, tmp_path):
    """Rollouts, the step's line, the checkpoint, the evaluation's texts and its line, in this order."""
    evaluated = ["--eval_prompts", str(ROOT / "tests" / "eval_small.jsonl"), "--eval_every", "2", "--steps",
                 "2", "--save_every", "1"]
    assert train_ranks(tmp_path / "calm", *evaluated, ranks=1)[0] == [0]
    for owner, name, wanted, resumed in (
            ("run_folder", "write_jsonl", "step_000002", 1), ("run_folder", "write_jsonl", "'step': 2", 1),
            ("os", "rename", "writing_000002", 1), ("run_folder", "write_jsonl", "eval_000002", 2),
            ("run_folder", "write_jsonl", "'step': 2, 'eval/", 2), ("", "", "", 2)):
        code = KILL_AFTER.format(owner=owner, name=name, wanted=wanted) if owner else ""
        codes, said = train_ranks(tmp_path / "run", *evaluated, ranks=1, code=code)
        assert codes == [-signal.SIGKILL if owner else 0], (wanted, said)
        assert (tmp_path / "run" / "checkpoints").exists()
        assert f"resumed after step {resumed}" in said[0] or wanted in ("", "step_000002"), (wanted, said)
    assert differences(tmp_path / "run", tmp_path / "calm") == []
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [(m["step"], "eval/truncated" in m) for m in lines] == [
        (0, True), (1, False), (2, False), (2, True)]


SLOW = """
if rank == 1:
    real_launch = Sampler.launch
    def launch(*a):
        time.sleep(0.4)
        return real_launch(*a)
    Sampler.launch = launch
"""


@pytest.mark.slow
def test_ranks_that_sample_longer_than_timeout_end_no_run_and_hear_of_a_reward_that_raises(train_ranks,
                                                                                          tmp_path):
    """Rank 1 samples for some 13 s, rank 0 waits for it, and a collective may take 4."""
    options = ["--timeout", "4", "--steps", "1", "--reward", "length"]
    codes, said = train_ranks(tmp_path / "slow", *options, code=SLOW)
    assert codes == [0, 0] and "done: " in said[0], said
    raises = """
def bad(completion, prompt):
    if any(completion.logprobs):  # those of the dry run are 0
        raise KeyError("mine")
    return 1.0
if rank == 0:
    rewards.REWARDS["length"] = bad, 1.0
"""
    start = time.monotonic()
    codes, said = train_ranks(tmp_path / "bad", *options, code=SLOW + raises)
    assert codes == [2, 2] and "reward 'length' raised KeyError ('mine')" in said[0], said
    assert time.monotonic() - start < 40


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank_and_no_rank_outlives_torchrun(tmp_path):
    """Without a run_dir: the run that broke off is found by its config."""
    driver = tmp_path / "driver_of_restarts.py"
    driver.write_text("""
import os
from tests.chaos import strike
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    strike("rename", 2)
import train
train.main()
""")
    arguments = ["--standalone", "--max-restarts=1", str(driver), *QUICK, "--steps", "100000"]
    with (tmp_path / "log").open("w") as log:
        agent = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *arguments], cwd=tmp_path,
                                 env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                                 stdout=log, stderr=subprocess.STDOUT)
    def said() -> str:
        return (tmp_path / "log").read_text()

    wait_for(lambda: "resumed after step 2" in said() or agent.poll() is not None, 90)
    (rank,) = children(agent.pid)
    agent.kill()
    agent.wait()
    wait_for(lambda: not Path(f"/proc/{rank}").exists(), 10)
    assert len([*(tmp_path / "runs").iterdir()]) == 1


def test_restarts_on_several_nodes_need_a_store_of_their_own(monkeypatch):
    """What torchrun sets; without it new processes would find the addresses of the old."""
    for name, value in (("TORCHELASTIC_USE_AGENT_STORE", "True"), ("TORCHELASTIC_MAX_RESTARTS", "3"),
                        ("TORCHELASTIC_RESTART_COUNT", "2")):
        monkeypatch.setenv(name, value)
    assert distributed.restart_prefix() == "2"
    prefixes = []
    for torchrun, rank in (("one", 0), ("one", 1), ("next", 0)):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"/tmp/{torchrun}/attempt_2/{rank}/error.json")
        prefixes.append(distributed.restart_prefix())
    assert prefixes[0] == prefixes[1] != prefixes[2], "an orphan must not meet the ranks of the next torchrun"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        distributed.restart_prefix()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert distributed.restart_prefix() == "", "how often each node has restarted may differ"


def wait_for(condition, seconds: float):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_rank_that_is_waited_for_in_vain_ends_the_run_with_a_sentence(train_ranks, tmp_path):
    code = """
def hangs(*a, real=train.backward):
    time.sleep(8 * rank)
    return real(*a)
train.backward = hangs"""
    codes, said = train_ranks(tmp_path / "run", "--timeout", "3", code=code)
    assert codes == [1, 1]
    where = r"error: rank 0 in phase '(logprob|backward|update)' of step 1"
    assert re.search(rf"{where} has lost the others \(Timed out waiting 3000ms", said[0])
    assert said[1].startswith("error: rank 0 has ended (it has lost the others (Timed out waiting 3000ms")
    assert said[1].count("\n") == 1


NCCL = """
from tests.chaos import as_nccl
from lib import stop
as_nccl()
stop.LIMIT = 2.0
signal.alarm(60)
"""
ENDS_TOO = "rank {} ends too, and the same command goes on from the last checkpoint\n"


@pytest.mark.slow
def test_a_death_ends_the_rank_that_waits_for_the_dead_in_c_and_the_cause_is_said(train_ranks, calm,
                                                                                  tmp_path):
    """As NCCL does. The run goes on, though nothing of it was in the hands of Python."""
    for victim, death, moment, nth, cause, other in (
            (1, "KeyError('ours')", "backward", 3, r"^Traceback (?s:.*)\nKeyError: 'ours'\n$",
             r"error: rank 1 has ended \(KeyError: 'ours'\): "),
            (0, "UserError('mine')", "backward", 1, "\nerror: mine\n$",
             r"error: rank 0 has ended \(UserError: mine\): "),
            (1, "torch.OutOfMemoryError()", "sampling", 10, "^error: rank 1 in phase 'sample' of step . is "
             "out of memory: lower max_sequences; the same command goes on from the last checkpoint\n$",
             r"error: rank 1 has ended \(it is out of memory: lower max_sequences\): "),
            (1, "signal.SIGKILL", "backward", 1, "^$", "error: a rank was killed: ")):
        code = f"{NCCL}from lib.options import UserError\n" \
               f"rank == {victim} and strike('{moment}', {nth}, {death})"
        codes, said = train_ranks(tmp_path / "run", "--save_every", "1", code=code)
        assert codes[victim] == {"U": 2, "s": -9}.get(death[0], 1) and codes[1 - victim] == 1, (codes, said)
        assert re.search(cause, said[victim]), said
        assert re.search(rf"(^|\n){other}{ENDS_TOO.format(1 - victim)}$", said[1 - victim]), said
    codes, said = train_ranks(tmp_path / "run")
    assert codes == [0, 0] and "resumed after step" in said[0], said
    assert differences(tmp_path / "run", calm) == []


def test_a_rank_that_is_out_of_memory_says_what_helps_in_its_phase():
    with pytest.raises(RuntimeError) as cpu:
        torch.empty(2**60, dtype=torch.uint8)
    for error, phase, remedy in ((torch.OutOfMemoryError(), "sample", "lower max_sequences"),
                                 (torch.OutOfMemoryError("CUDA out of memory."), "start", "take more GPUs"),
                                 (cpu.value, "backward", "lower micro_batch_tokens in a new run")):
        said = distributed.failure(error, phase)
        assert said.startswith("is out of memory: ") and remedy in said
    assert train.run.Clock().phase == "start"
    assert distributed.failure(ValueError("out of memory"), "start") == ""


@pytest.mark.slow
def test_a_rank_that_saves_or_computes_while_all_have_answered_a_signal_is_left_alone(train_ranks, tmp_path):
    """However long it takes to come to a check, and then to write."""
    slow = NCCL.replace("2.0", "1.0") + """
stop.GRACE = 0.5
def slowly(*a, real=train.backward):
    time.sleep(3)
    return real(*a)
def save(self, step, real=checkpoints.Checkpoints.save):
    time.sleep(3)
    real(self, step)
checkpoints.Checkpoints.save = save
strike("backward", 3 if rank else 99, signal.SIGTERM)
if rank == 0:
    train.backward = slowly
"""
    codes, said = train_ranks(tmp_path / "run", "--save_every", "100", code=slow)
    assert codes == [0, 0] and "stopped by SIGTERM: step 1 is kept" in said[0] and not said[1], said


def test_scripts_of_several_ranks_say_what_is_wrong_before_they_wait_for_each_other(train_ranks, tmp_path):
    """Where a rank is gone, NCCL's goodbye never returns."""
    code = f"""
import scripts.train_rm
signal.alarm(40)
scripts.train_rm.%s = lambda *a: 1 / rank and time.sleep(30)
parallel.dist.destroy_process_group = signal.pause
sys.argv = ["train_rm", "--device", "cpu", "--out", "{tmp_path}/out", "--pairs", "nowhere.jsonl"]
scripts.train_rm.main()"""
    codes, said = train_ranks(tmp_path, only=True, code=code % "nothing")
    assert codes == [2, -signal.SIGTERM] and said[0].startswith("error: ") and not said[1], (codes, said)
    codes, said = train_ranks(tmp_path, only=True, code=code % "split")
    assert codes == [1, -signal.SIGTERM] and "\nZeroDivisionError: " in said[0] and not said[1], (codes, said)


# ---------------------------------------------------------------------- disks and files


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Four steps on one rank."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    in_process(folder, small=QUICK)
    return folder


def fails(monkeypatch, capfd, folder: Path, *options: str) -> str:
    """The one sentence before exit code 2."""
    monkeypatch.setattr(sys, "argv", ["train.py", *QUICK, "--run_dir", str(folder), *options])
    monkeypatch.setattr(distributed.Watch, "start", lambda *a: None)  # this process keeps its own signals
    with pytest.raises(SystemExit) as stopped:
        train.main()
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error: ")]
    assert stopped.value.code == 2
    return line


def tmpfs(folder: Path, size: str, *more: str) -> bool:
    folder.mkdir(exist_ok=True)
    options = ",".join([*more, f"size={size}"])
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
                          capture_output=True).returncode == 0


def test_a_full_disk_ends_the_run_and_nothing_saved_is_lost(alone, tmp_path, monkeypatch, capfd):
    """Room for one checkpoint of 11 MB, not for two. Where nothing may be mounted, a limit on the size of a
    file stands in, of which the first checkpoint knows nothing."""
    disk, mounted = tmp_path / "disk", tmpfs(tmp_path / "disk", "17m")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if not mounted:
            in_process(disk / "run", "--steps", "2", small=QUICK)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
        line = fails(monkeypatch, capfd, disk / "run")
        assert all(part in line for part in ("step_000004 cannot be written (", "needs 11,036,160 bytes"))
        assert ("No space left on device" in line) == mounted
        assert [p.name for p in (disk / "run" / "checkpoints").iterdir()] == ["step_000002"]
        if mounted:
            assert tmpfs(disk, "80m", "remount")
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        in_process(disk / "run", small=QUICK)
        assert "resumed after step 2" in capfd.readouterr().out
        assert differences(disk / "run", alone) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        subprocess.run(["umount", "-l", str(disk)], capture_output=True)


def test_where_the_log_cannot_be_written_the_run_goes_on_from_the_last_checkpoint(alone, tmp_path,
                                                                                 monkeypatch, capfd):
    real = rewards.REWARDS["format"]
    log, calls = tmp_path / "run" / "metrics.jsonl", []

    def fills_the_disk(completion, prompt):
        calls.append(1)
        if len(calls) == 2 + 3 * 8:  # the third step, after two calls of the dry run
            log.rename(tmp_path / "aside")
            log.symlink_to("/dev/full")
        return real[0](completion, prompt)

    monkeypatch.setitem(rewards.REWARDS, "format", (fills_the_disk, real[1]))
    line = fails(monkeypatch, capfd, tmp_path / "run")
    assert f"{log} cannot be written (No space left on device)" in line
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002"]
    (tmp_path / "aside").replace(log)
    in_process(tmp_path / "run", small=QUICK)
    assert differences(tmp_path / "run", alone) == []


DAMAGE = {
    "a file that was cut": lambda c: os.truncate(next(c.rglob("*.safetensors")), 1000),
    "a file that is missing": lambda c: next((c / "optimizer").iterdir()).unlink(),
    "a flipped bit of the state": lambda c: flip(c / "state.json"),
    "a flipped bit of the manifest": lambda c: flip(c / "manifest.json"),
    "an empty manifest": lambda c: (c / "manifest.json").write_text(""),
    "another manifest": lambda c: (c / "manifest.json").write_text("[1]"),
}


def flip(file: Path):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_damaged_is_named_and_the_checkpoint_before_it_is_taken(alone, tmp_path, capfd, what):
    run = cut(alone, tmp_path / "run", 4)
    DAMAGE[what](run / "checkpoints" / "step_000004")
    path, state = checkpoints.newest(run / "checkpoints")
    assert path.name == "step_000002" == f"step_{state['step']:06d}"
    assert f"warning: {run}/checkpoints/step_000004" in capfd.readouterr().err


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(alone, tmp_path, monkeypatch, capfd):
    run = cut(alone, tmp_path / "run", 4)
    for checkpoint in (run / "checkpoints").iterdir():
        flip(next(checkpoint.rglob("*.safetensors")))
    before = rollouts(run), metrics(run)
    assert "none of the 2 checkpoints in" in fails(monkeypatch, capfd, run)
    assert (rollouts(run), metrics(run)) == before


def test_the_last_and_every_nth_checkpoint_stay(tmp_path):
    in_process(tmp_path / "run", "--save_every", "1", "--keep_every", "3", "--keep_checkpoints", "1",
               "--steps", "7", "--max_new_tokens", "4", small=QUICK)
    assert [p.name for p in checkpoints.complete(tmp_path / "run" / "checkpoints")] == [
        "step_000007", "step_000006", "step_000003"]


def test_a_checkpoint_names_its_code_and_config_and_other_code_is_told(alone, tmp_path, monkeypatch, capfd):
    run = cut(alone, tmp_path / "run", 2)
    state = json.loads((run / "checkpoints" / "step_000002" / "state.json").read_text())
    assert state["config"] == json.loads((run / "config.json").read_text())
    assert state["code"] == train.run.code_hash()
    in_process(run, "--steps", "3", small=QUICK)
    assert "other code" not in capfd.readouterr().err
    real, run = train.run.source, cut(alone, tmp_path / "changed", 2)
    monkeypatch.setattr(train.run, "source", lambda: real() | {"rewards.py": "# nothing"})
    in_process(run, "--steps", "3", small=QUICK)
    said = capfd.readouterr().err
    assert "step_000002 was made by other code than this: source_from_step_000003 holds" in said
    assert (run / "source_from_step_000003" / "rewards.py").read_text() == "# nothing"


# ---------------------------------------------------------------------- gradients


def poison(monkeypatch, steps: set[int]):
    """The gradient of these calls of clip_grad_ is NaN."""
    real, calls = parallel.clip_grad_, []

    def clip_grad_(model, most):
        calls.append(1)
        if len(calls) in steps:
            parallel.own(next(model.parameters()).grad).fill_(torch.nan)
        return real(model, most)

    monkeypatch.setattr(parallel, "clip_grad_", clip_grad_)


def test_an_update_whose_gradient_is_nan_is_skipped_counted_and_kept(tmp_path, monkeypatch):
    poison(monkeypatch, {2})
    in_process(tmp_path / "run", "--steps", "3", "--save_every", "1", "--keep_checkpoints", "9", small=QUICK)
    assert [m["skipped_updates"] for m in metrics(tmp_path / "run")] == [0, 1, 0]
    assert metrics(tmp_path / "run")[1]["grad_norm"] is None
    assert [p.name for p in checkpoints.complete(tmp_path / "run" / "checkpoints")] == [
        "step_000003", "step_000001"], "a checkpoint is of a step that was taken"
    assert all(torch.isfinite(t).all() for t in tensors(tmp_path / "run", 3).values())
    (file,) = (tmp_path / "run" / "bad_batches").iterdir()
    samples = [grpo.Sample(**json.loads(line)) for line in file.open()]
    texts = [json.loads(line) for line in (tmp_path / "run/rollouts/step_000002.jsonl").open()]
    assert file.name == "step_000002.jsonl" and len(samples) == 8
    assert sorted((len(s.token_ids), s.advantage) for s in samples) == sorted(
        (t["tokens"], t["advantage"]) for t in texts)


def test_too_many_in_a_row_end_the_run_and_it_goes_on_from_before_them(tmp_path, monkeypatch, capfd):
    poison(monkeypatch, {2, 4, 5, 6})
    often = ["--steps", "6", "--save_every", "1", "--keep_checkpoints", "9"]
    line = fails(monkeypatch, capfd, tmp_path / "run", *often)
    assert line.startswith("error: 3 updates in a row were skipped: look at ")
    assert "bad_batches" in line and "the same command goes on after step 3" in line
    assert [p.name for p in checkpoints.complete(tmp_path / "run" / "checkpoints")] == [
        "step_000003", "step_000001"]
    assert [m["skipped_updates"] for m in metrics(tmp_path / "run")] == [0, 1, 0, 1, 1, 1]
    monkeypatch.undo()
    in_process(tmp_path / "run", small=QUICK)
    assert "resumed after step 3" in capfd.readouterr().out
    assert [m["skipped_updates"] for m in metrics(tmp_path / "run")] == [0, 1, 0, 0]


def test_a_gradient_above_skip_grad_is_not_taken(tmp_path, monkeypatch, capfd):
    line = fails(monkeypatch, capfd, tmp_path / "run", "--skip_grad", "1e-6", "--max_skipped", "1")
    assert "1 updates in a row were skipped" in line and "goes on after step 0" in line
    *before, m = metrics(tmp_path / "run")
    assert m["skipped_updates"] == 1 and m["grad_norm"] > 1e-6
    assert all(b["grad_norm"] == 0 for b in before), "all samples of each group earned the same"
