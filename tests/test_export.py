"""A run as a Hugging Face folder: what transformers makes of it."""

import json
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
import transformers

import model as qwen
import rewards
from data.tokenizer import FILES, Tokenizer
from lib import weights
from sampler import Request, Sampler
from scripts import export
from tests.helpers import ROOT, in_process, obeys_umask, tensors, write_qwen3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    in_process(folder, "--steps", "4", "--eval_prompts", "", "--lr", "1e-3")
    return folder


@pytest.mark.slow
def test_transformers_writes_the_same_hundred_tokens_as_our_sampler(run, tmp_path):
    command = [sys.executable, "-m", "scripts.export", str(run), str(tmp_path / "hf")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and str(run / "checkpoints" / "step_000004") in done.stdout, done.stderr
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = Sampler(qwen.load(tmp_path / "hf"))  # without a tokenizer only length ends a sample
    for line in (ROOT / "data/tiny/eval_prompts.jsonl").read_text().splitlines()[:5]:
        prompt = f"<|user|>: {json.loads(line)['prompt']} <|assistant|>:"
        ids = Tokenizer(tmp_path / "hf").encode(prompt)
        assert tokenizer(prompt)["input_ids"] == ids
        (mine,) = ours.generate([Request(ids, max_new_tokens=100, temperature=0)])
        out = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=100, eos_token_id=None,
                              pad_token_id=0)
        assert out[0, len(ids):].tolist() == mine.token_ids
    base = qwen.load(ROOT / "data/tiny/base").state_dict()
    assert any(not torch.equal(p, base[name]) for name, p in theirs.state_dict().items() if name in base)
    assert theirs.generation_config.eos_token_id == Tokenizer(ROOT / "data/tiny/base").eos_ids


def test_an_older_checkpoint_and_another_dtype(run, tmp_path):
    export.export(run / "checkpoints" / "step_000002", tmp_path / "two", "bfloat16")
    export.export(run, tmp_path / "four")
    two, four = (qwen.load(tmp_path / name).state_dict() for name in ("two", "four"))
    assert json.loads((tmp_path / "two" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert any(not torch.equal(two[name], four[name].bfloat16().float()) for name in two)


def test_the_tokenizers_files_go_along_alone_and_all_files_obey_the_umask(run, tmp_path):
    base = shutil.copytree(ROOT / "data/tiny/base", tmp_path / "base")
    for name in [*FILES, "evaluation.json", "pytorch_model.bin.index.json"]:
        if not (base / name).exists():
            (base / name).write_text('{"eos_token_id": 0}' if name == "generation_config.json" else "{}")
    export.export(run, tmp_path / "hf", model_path=str(base))
    assert {f.name for f in (tmp_path / "hf").iterdir()} == {"config.json", "model.safetensors", *FILES}
    assert "chat_template.jinja" in FILES and obeys_umask(tmp_path / "hf") and obeys_umask(run)


def test_a_file_at_a_time_is_the_same_checkpoint(run, tmp_path, monkeypatch):
    export.export(run, tmp_path / "one", "bfloat16")
    monkeypatch.setattr(weights, "plan_files", partial(weights.plan_files, max_shard_bytes=300_000))
    export.export(run, tmp_path / "many", "bfloat16")
    one, many = (qwen.load(tmp_path / name, torch.bfloat16).state_dict() for name in ("one", "many"))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    trained = {k.split("/")[-1]: v.bfloat16() for k, v in tensors(run, 4).items() if k.startswith("weights")}
    assert one.keys() == trained.keys() and all(torch.equal(one[name], trained[name]) for name in one)


@pytest.mark.slow
def test_a_qwen3_trains_and_is_exported_as_one_bit_for_bit(tmp_path, monkeypatch):
    """Two steps from random weights, on a reward that they can earn."""
    start = write_qwen3(tmp_path / "start")
    monkeypatch.setitem(rewards.REWARDS, "low", (lambda c, _: sum(t < 512 for t in c.token_ids) / 48, 1.0))
    in_process(tmp_path / "run", "--config", str(ROOT / "configs/tiny.json"), "--model", str(start),
               "--steps", "2", "--reward", "low", "--eval_prompts", "", "--lr", "1e-3")
    export.export(tmp_path / "run", tmp_path / "hf")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto",
                                                                     output_loading_info=True)
    assert type(theirs) is transformers.Qwen3ForCausalLM and not any(info.values()), info
    trained = {k.split("/")[-1]: v for k, v in tensors(tmp_path / "run", 2).items() if "weights/" in k}
    exported, before = dict(theirs.named_parameters()), qwen.load(start).state_dict()
    assert exported.keys() == trained.keys() == before.keys()
    for name, p in exported.items():
        assert torch.equal(p, trained[name]) and not torch.equal(p, before[name]), name
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (raw["architectures"], raw["model_type"]) == (["Qwen3ForCausalLM"], "qwen3")
    assert raw["head_dim"] == 32 and raw["attention_bias"] is False and "qk_norm" not in raw
    assert qwen.read_config(tmp_path / "hf") == qwen.read_config(start)


def test_what_cannot_be_exported(run, tmp_path, capsys, monkeypatch):
    def says(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
        with pytest.raises(SystemExit, match="2"):
            export.main()
        return capsys.readouterr().err

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    (tmp_path / "young" / "config.json").write_text('{"model": "data/tiny/base"}')
    assert "nowhere is neither a run nor" in says(tmp_path / "nowhere", tmp_path / "out")
    assert "neither a run nor a checkpoint" in says(tmp_path / "empty", tmp_path / "out")
    assert "no complete checkpoint" in says(tmp_path / "young", tmp_path / "out")
    assert "full is not empty" in says(run, tmp_path / "full")
    assert "elsewhere/config.json does not exist" in says(run, tmp_path / "out", "--model", "elsewhere")
    assert not (tmp_path / "out").exists() and [f.name for f in (tmp_path / "full").iterdir()] == ["notes"]
