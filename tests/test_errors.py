"""What bad input gets: one sentence that names the value, where it stands and what to do, and exit code 2."""

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rewards
import run
import train
from tests.helpers import ROOT, SMALL, equal, in_process, launch, metrics, rollouts, tensors

BASE = ROOT / "data" / "tiny" / "base"


def fails(capsys, monkeypatch, *options: str) -> str:
    """The one sentence that train.py says before it exits with 2."""
    monkeypatch.setattr(sys, "argv", ["train.py", *options])
    start = time.process_time()
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert stopped.value.code == 2 and time.process_time() - start < 10
    out, err = capsys.readouterr()
    (line,) = err.strip().splitlines()
    assert line.startswith("error: ") and "Traceback" not in out
    return line


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def checkpoint(folder: Path, **changes) -> Path:
    """A copy of the base; `changes` go into its config.json."""
    shutil.copytree(BASE, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


# ------------------------------------------------------------------------------------------ options

OPTIONS = {  # options: what the sentence must name
    "--learning_rate 1": ["'learning_rate'"],
    "--temprature 0.5": ["'temprature'", "did you mean 'temperature'"],
    "--steps many": ["steps", "whole number", "'many'"],
    "--lr fast": ["lr", "a number", "'fast'"],
    "--wandb maybe": ["wandb", "true or false", "'maybe'"],
    "--steps": ["--steps", "lacks its value"],
    "steps 5": ["'steps'", "--NAME VALUE"],
    "--config nowhere.json": ["nowhere.json does not exist"],
    "--steps 0": ["steps must be positive", "0"],
    "--temperature 0": ["temperature must be at least 0.01, not 0.0"],
    "--micro_batch_tokens -4": ["micro_batch_tokens must be positive", "-4"],
    "--lr -1": ["lr must be at least 0, not -1"],
    "--lr nan": ["lr must be a number up to 1e18", "nan"],
    "--beta -0.1": ["beta must be at least 0, not -0.1"],
    "--top_p 0.9": ["top_p must be 1", "0.9", "policy that samples"],
    "--group_size 1": ["group_size", "at least 2", "1"],
    "--updates_per_batch 0": ["updates_per_batch must be positive"],
    "--updates_per_batch 3": ["prompts_per_step 8", "updates_per_batch 3"],
    "--replicate 2": ["replicate 2", "1 ranks"],
    "--offload_activations true": ["offload_activations needs recompute"],
    "--reference data/tiny/base": ["reference data/tiny/base", "beta is 0"],
    "--prompt_style thinking": ["prompt_style", "think, direct", "'thinking'"],
    "--advantage mean": ["advantage", "per_reward, sum, gdpo", "'mean'"],
    "--loss sentence": ["loss", "token, sequence, constant", "'sentence'"],
    "--is_ratio gspo": ["is_ratio", "token, sequence, cispo", "'gspo'"],
    "--overlong drop": ["overlong", "keep, mask", "'drop'"],
    "--unreachable mask": ["unreachable", "drop, keep", "'mask'"],
    "--sampler_dtype float16": ["sampler_dtype", "float32, bfloat16", "'float16'"],
    "--resume yes": ["resume", "auto, true, false", "'yes'"],
    "--device gpu": ["device", "auto, cpu, cuda", "'gpu'"],
    "--reward lenght": ["'lenght'", "length, format"],
    "--reward length,length": ["names one twice", "length,length"],
    "--reward overlong": ["overlong", "weight 0"],
    "--reward_model nowhere": ["reward_model: nowhere/config.json does not", "leave the reward out"],
    "--reward_model data/tiny/base": ["data/tiny/base is no reward model", "Qwen2ForSequenceClassification"],
    "--model data/tiny/base": ["prompts file prompts.jsonl cannot be read"],
    "--model data/tiny/base --prompts data/tiny/prompts.jsonl --max_new_tokens 256": [
        "reward_model is empty", "--reward length,format"],
    "--model data/tiny/writing": ["data/tiny/writing is a reward model"],
    "--model nowhere": ["nowhere/config.json does not exist", "`model`"],
    "--beta 0.1 --reference nowhere": ["nowhere/config.json does not exist"],
    "--prompts nowhere.jsonl": ["nowhere.jsonl", "cannot be read"],
    "--eval_prompts nowhere.jsonl": ["nowhere.jsonl", "cannot be read"],
    "--prompts_per_step 5000": ["2000 usable prompts", "a step needs 5000"],
    "--max_new_tokens 10": ["0 usable prompts", "'unreachable': 2000"],
    "--max_new_tokens 2000": ["max_new_tokens 2000", "context of 2048", "train-"],
}


@pytest.mark.parametrize("options", OPTIONS)
def test_an_option_that_cannot_be(options, tmp_path, capsys, monkeypatch):
    run_dir = ["--run_dir", str(tmp_path / "run")] if options.startswith("--") else []
    line = fails(capsys, monkeypatch, *run_dir, *options.split())
    assert all(part in line for part in OPTIONS[options]), line
    assert not any(tmp_path.iterdir()), "nothing is written before the options are sound"


@pytest.mark.parametrize("text, parts", [
    ('{"steps": }', ["cannot be read"]), ("[1, 2]", ["must be a JSON object"]),
    ('{"step": 3}', ["'step'", "did you mean 'steps'"]), ('{"steps": 2.5}', ["steps", "whole number", "2.5"]),
    ('{"wandb": 1}', ["wandb", "true or false"])])
def test_a_config_file_that_cannot_be(text, parts, tmp_path, capsys, monkeypatch):
    line = fails(capsys, monkeypatch, "--config", write(tmp_path / "c.json", text))
    assert "c.json" in line and all(part in line for part in parts), line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys, monkeypatch):
    assert "torch sees no GPU: pass --device cpu" in fails(capsys, monkeypatch, "--device", "cuda")


def test_more_processes_than_gpus(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    line = fails(capsys, monkeypatch, "--device", "cuda")
    assert "2 GPUs" in line and "GPU 2" in line and "--nproc_per_node" in line


# ------------------------------------------------------------------------------------------ files

PROMPTS = {  # lines of a prompts file: what the sentence must name
    "": ["0 usable prompts", "none"],
    '{"prompt": "a", "length": 50}\n{"prompt": }\n': ["line 2"],
    '[1]\n': ["line 1", "JSON object"],
    '{"text": "a"}\n': ["line 1", "prompt, query"],
    '{"prompt": "  "}\n': ["line 1", "no text"],
    '{"prompt": "a", "length_range": [9, 3]}\n': ["line 1", "lo <= hi", "[9, 3]"],
    '{"prompt": "a", "length": "long"}\n': ["line 1", "positive number", "'long'"],
    '{"prompt": "a", "id": 7}\n{"prompt": "b", "id": 7}\n': ["line 2", "'7'", "line 1"],
    '{"prompt": "a", "range": [0, 0]}\n': ["0 usable prompts", "'unanswerable': 1"],
}


@pytest.mark.parametrize("lines", PROMPTS)
@pytest.mark.parametrize("option", ["--prompts", "--eval_prompts"])
def test_a_prompts_file_that_cannot_be(option, lines, tmp_path, capsys, monkeypatch):
    file, run_dir = write(tmp_path / "p.jsonl", lines), tmp_path / "run"
    line = fails(capsys, monkeypatch, option, file, "--run_dir", str(run_dir))
    assert "p.jsonl" in line and all(part in line for part in PROMPTS[lines]), line
    assert not run_dir.exists()


def test_prompts_in_another_encoding(tmp_path, capsys, monkeypatch):
    (tmp_path / "p.jsonl").write_bytes('{"prompt": "déjà"}'.encode("latin-1"))
    assert "p.jsonl, line 1: 'utf-8'" in fails(capsys, monkeypatch, "--prompts", str(tmp_path / "p.jsonl"))


def cut(folder: Path):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def drop_a_shard(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    names["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def reshape(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, folder / "model.safetensors")


def rename(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.bias"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")


CHECKPOINTS = {
    "cut short": (cut, ["model.safetensors"]),
    "half": (drop_a_shard, ["model-00002-of-00002.safetensors", "download"]),
    "misshaped": (reshape, ["model.norm.weight", "127"]),
    "another name": (rename, ["model.norm.weight", "model.norm.bias"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["neither model.safetensors"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json cannot be read (No"]),
    "broken tokenizer": (lambda f: write(f / "tokenizer.json", "{"), ["tokenizer.json cannot be read"]),
    "no end of text": (lambda f: write(f / "tokenizer_config.json", "{}"), ["end-of-text"]),
    "broken config": (lambda f: write(f / "config.json", "{"), ["config.json cannot be read"]),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_that_cannot_be(case, tmp_path, capsys, monkeypatch):
    damage, parts = CHECKPOINTS[case]
    damage(checkpoint(tmp_path / "base"))
    line = fails(capsys, monkeypatch, "--model", str(tmp_path / "base"), "--run_dir", str(tmp_path / "run"))
    assert str(tmp_path / "base") in line and all(part in line for part in parts), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes, parts", [
    ({"model_type": "llama"}, ["'llama'", "qwen2"]), ({"hidden_act": "gelu"}, ["silu"]),
    ({"num_key_value_heads": 3}, ["num_key_value_heads 3"]), ({"hidden_size": 256}, ["does not fit"]),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, ["'linear'"])])
def test_a_config_json_that_cannot_be(changes, parts, tmp_path, capsys, monkeypatch):
    line = fails(capsys, monkeypatch, "--model", str(checkpoint(tmp_path / "base", **changes)))
    assert all(part in line for part in parts), line


def test_a_tokenizer_of_another_model(tmp_path, capsys, monkeypatch):
    folder = checkpoint(tmp_path / "base", vocab_size=1000)
    tensors = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file(tensors | {name: tensors[name][:1000].clone()}, folder / "model.safetensors")
    line = fails(capsys, monkeypatch, "--model", str(folder))
    assert "1024 ids" in line and "1000 rows" in line
    line = fails(capsys, monkeypatch, "--beta", "0.1", "--reference", str(folder))
    assert "1024 ids" in line and "1000 rows" in line


# ------------------------------------------------------------------------------------------ run folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    in_process(folder, "--steps", "2", "--eval_prompts", "")
    return folder


@pytest.mark.parametrize("options, parts", [
    (["--seed", "5"], ["another config", "seed (0 there, 5 now)"]),
    (["--resume", "false"], ["resume is false"])])
def test_a_folder_that_holds_another_run(options, parts, finished, capsys, monkeypatch):
    before = {f: f.read_bytes() for f in finished.rglob("*") if f.is_file()}
    line = fails(capsys, monkeypatch, *SMALL, "--eval_prompts", "", "--run_dir", str(finished), *options)
    assert str(finished) in line and all(part in line for part in parts), line
    assert before == {f: f.read_bytes() for f in finished.rglob("*") if f.is_file()}


def test_nothing_to_resume(tmp_path, capsys, monkeypatch):
    line = fails(capsys, monkeypatch, "--resume", "true", "--run_dir", str(tmp_path / "run"))
    assert "no checkpoint" in line and str(tmp_path / "run") in line


def test_a_run_folder_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    file = write(tmp_path / "file", "")
    assert f"run_dir {file}/run cannot be written" in fails(capsys, monkeypatch, "--run_dir", f"{file}/run")


def test_a_run_folder_with_a_broken_record(tmp_path, capsys, monkeypatch):
    write(tmp_path / "config.json", "{")
    assert f"{tmp_path}/config.json cannot be read" in fails(capsys, monkeypatch, "--run_dir", str(tmp_path))


def test_a_folder_in_which_another_process_runs_even_a_stopped_one(tmp_path, capsys, monkeypatch):
    folder, (told, tell) = tmp_path / "run", os.pipe()
    if not (pid := os.fork()):
        try:
            run.lock(folder)
            os.write(tell, b"1")
            signal.pause()
        finally:
            os._exit(1)
    try:
        os.close(tell)
        os.read(told, 1)
        os.kill(pid, signal.SIGSTOP)
        line = fails(capsys, monkeypatch, *SMALL, "--steps", "1", "--run_dir", str(folder))
        assert f"{folder} is in use by process {pid} on {socket.gethostname()}: " in line
        assert [f.name for f in folder.iterdir()] == ["lock"]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    in_process(folder, "--steps", "1", "--eval_prompts", "")
    assert "warning" not in capsys.readouterr().err


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, capsys, monkeypatch):
    def lockf(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    in_process(tmp_path / "run", "--steps", "1", "--eval_prompts", "")
    assert capsys.readouterr().err == (f"warning: {tmp_path}/run cannot be locked (No locks available): "
                                       "start no other run in it\n")


def test_new_runs_of_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    """Also a restart does not take the folder of another run with the same options."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "now")
    config = train.parse([])
    folders = [run.choose_folder(config, restarted=False) for _ in range(3)]
    assert [f.name for f in folders] == ["now", "now-2", "now-3"]
    for folder in folders[:2]:
        run.open_folder(config, folder, None)
        assert run.choose_folder(config, restarted=True) == folder

    def lockf(file, how):
        if os.fstat(file).st_ino == (folder / "lock").stat().st_ino:
            raise BlockingIOError(errno.EAGAIN, "")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert run.choose_folder(config, restarted=True) == folders[0]


# ------------------------------------------------------------------------------------------ rewards


def raises(completion, prompt):
    return 1 / len([])


@pytest.mark.parametrize("function, parts", [
    (raises, ["ZeroDivisionError", "test_errors.py, line"]),
    (lambda c, p: float("nan"), ["nan", "finite number"]),
    (lambda c, p: "good", ["'good'"]), (lambda c, p: [1.0], ["[1.0]"]),
    (lambda c, p: 1e39, ["1e+39", "finite number"]),
    (rewards.batched(lambda c, p: [1.0] * (len(c) - 1)), ["7 values for 8 completions"]),
    (rewards.batched(lambda c, p: None), ["TypeError"]),
    (rewards.remote(lambda c, p: "good"), ["'good'"]), (rewards.remote(lambda c, p: float("nan")), ["nan"]),
    (rewards.remote(rewards.batched(lambda c, p: [])), ["both @batched and @remote"])])
def test_a_reward_that_is_none(function, parts, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "mine", (function, 1.0))
    line = fails(capsys, monkeypatch, *SMALL, "--eval_prompts", "", "--run_dir", str(tmp_path / "run"))
    assert "reward 'mine'" in line and all(part in line for part in parts), line


@pytest.mark.parametrize("entry, part", [
    (rewards.length, "for 'mine': it must be (function, weight)"),
    ((rewards.length, "2"), "(function, weight)"),
    ((1.0, rewards.length), "(function, weight)"),
    ((rewards.length, -3.0), "have weight -1 together: give them more")])
def test_an_entry_of_the_table_that_cannot_be(entry, part, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "mine", entry)
    names = ["--reward", "length,format,mine"]
    line = fails(capsys, monkeypatch, *names, "--run_dir", str(tmp_path / "run"))
    assert part in line and not (tmp_path / "run").exists()


def test_a_transform_that_fails(tmp_path, capsys, monkeypatch):
    """Where it can be known, before anything is written; and where only a sample shows it, in step 3, after a
    checkpoint of step 2."""
    run = ["--eval_prompts", "", "--run_dir", str(tmp_path / "run")]
    monkeypatch.setitem(rewards.TRANSFORMS, "length", lambda r: 1 / r)
    assert "transform of reward 'length' raised ZeroDivisionError" in fails(capsys, monkeypatch, *SMALL, *run)
    assert not (tmp_path / "run").exists()
    calls = []
    monkeypatch.setitem(rewards.TRANSFORMS, "length",
                        lambda r: float("inf") if len(calls) == 2 + 2 * 8 + 3 else calls.append(r) or r)
    line = fails(capsys, monkeypatch, *SMALL, *run, "--save_every", "100")
    assert "transform of reward 'length' returned inf" in line
    assert [m["step"] for m in metrics(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run/checkpoints/step_000002").exists()


def test_a_reward_that_fails_later_loses_no_step_and_the_repaired_run_goes_on(tmp_path, capsys, monkeypatch):
    """It fails in step 4; checkpoints are due at 2 and 4. The steps so far are saved, and equal those of a
    run in which nothing failed."""
    calls = []

    def mine(completion, prompt):
        calls.append(completion)
        return 1 / (len(calls) != 2 + 3 * 8 + 5)

    options = [*SMALL, "--eval_prompts", "", "--steps", "5"]
    monkeypatch.setitem(rewards.REWARDS, "mine", (mine, 1.0))
    assert "ZeroDivisionError" in fails(capsys, monkeypatch, *options, "--run_dir", str(tmp_path / "run"))
    assert [m["step"] for m in metrics(tmp_path / "run")] == [1, 2, 3]
    assert (tmp_path / "run" / "checkpoints" / "step_000003").exists()
    monkeypatch.setitem(rewards.REWARDS, "mine", (lambda c, p: 1.0, 1.0))
    for name in ("run", "undisturbed"):
        train.train(train.parse([*options, "--run_dir", str(tmp_path / name)]))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "undisturbed")
    assert rollouts(tmp_path / "run") == rollouts(tmp_path / "undisturbed")
    assert equal(tensors(tmp_path / "run", 5), tensors(tmp_path / "undisturbed", 5))


def test_a_bug_of_ours_still_shows_its_traceback(tmp_path, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(train.grpo, "advantages", broken)
    options = [*SMALL, "--eval_prompts", "", "--run_dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train.py", *options])
    with pytest.raises(ZeroDivisionError, match="ours"):
        train.main()


# ------------------------------------------------------------------------------------------ processes


def process(*options: str, **environment) -> tuple[subprocess.CompletedProcess, float]:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *options], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, timeout=60)
    return done, time.perf_counter() - start


def test_a_port_in_use(tmp_path):
    """Another program listens at the address where rank 0 should."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        done, seconds = process("--run_dir", str(tmp_path / "run"), RANK="0", WORLD_SIZE="1",
                                MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert done.returncode == 2 and seconds < 45 and not (tmp_path / "run").exists()
    assert f"error: cannot join the process group at 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_as_a_user_sees_it(tmp_path):
    """The whole process: exit code, one sentence, and quick."""
    done, seconds = process("--temprature", "0.5", "--run_dir", str(tmp_path / "run"))
    assert done.returncode == 2 and seconds < 45
    said = "error: command line: there is no option 'temprature'; did you mean 'temperature'?\n"
    assert done.stderr == said


def test_help_into_a_pipe_that_closes_is_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "scripts.pretrain", "--help"], cwd=ROOT, stdout=writer,
                          stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": ""})
    os.close(writer)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


@pytest.mark.parametrize("options, part", [
    (["--learning_rate", "1"], "command line: there is no option 'learning_rate'"),
    (["--prompts_per_step", "3"], "prompts_per_step 3 does not divide by 2 ranks"),
    (["--prompts", "nowhere.jsonl"], "nowhere.jsonl cannot be read")])
def test_of_several_ranks_one_speaks(options, part, forks, tmp_path):
    codes, said = forks.train(tmp_path / "run", *options, ranks=2, agent=False)
    lines = [line for text in said for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and part in lines[0] and codes == [2, 2] and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_so_it_is_under_torchrun(tmp_path):
    done = launch(2, "train.py", "--run_dir", tmp_path / "run", "--prompts", "nowhere.jsonl", timeout=60)
    assert done.stderr.count("error: ") == 1 and done.returncode == 1  # torchrun's own, whatever workers say
    assert "exitcode  : 2" in done.stderr and not (tmp_path / "run").exists()
