"""The reward model against transformers' (a dev-only oracle), packed, sharded, saved; what it reads.

Not exercised here: CUDA.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jinja2
import pytest
import tokenizers
import torch

import model as qwen
import parallel
import reward_model
import rewards
import train
from data import prompts
from data.preferences import Pair
from data.tiny.pairs import pairs
from data.tokenizer import Tokenizer
from lib import distributed, offload
from lib.options import UserError
from sampler import Completion
from scripts import train_rm
from tests.helpers import KINDS, ROOT, TINY, assert_same_bits, random_tokens

BASE, DEFAULT = ROOT / "data/tiny/base", ROOT / "data/tiny/writing"
LENGTHS = [5, 1, 37, 12]


def random_scorer(seed=0, **fields) -> qwen.RewardModel:
    model = qwen.RewardModel(qwen.ModelConfig(**{**TINY, **fields}, scalar_head=True))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator) + ("norm" in name))
    return model


def transformers_scores(path, rows, dtype=torch.float32) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        path, dtype=dtype, output_loading_info=True, local_files_only=True)
    assert not any(info.values()), info
    with torch.no_grad():
        return torch.cat([model(row[None]).logits[0] for row in rows])


@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_saved_folders_are_those_of_transformers(kind, max_shard_bytes, tmp_path):
    """In both directions: saved, read by transformers, saved by it, read again; a sequence of one token and
    one that ends in the end of text among them."""
    model = random_scorer(**KINDS[kind])
    qwen.save(model, tmp_path / "ours", max_shard_bytes)
    rows = random_tokens(sum(LENGTHS)).split(LENGTHS)
    with torch.no_grad():
        score_S = model(torch.cat(rows), qwen.packed(LENGTHS))
    expected_S = transformers_scores(tmp_path / "ours", rows)
    assert score_S.shape == (4, ) and (score_S - expected_S).norm() < 1e-5 * expected_S.norm()
    loaded = qwen.load(tmp_path / "ours")
    assert type(loaded) is qwen.RewardModel and loaded.config == model.config
    assert_same_bits(loaded, model)
    transformers = pytest.importorskip("transformers")
    transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert_same_bits(qwen.load(tmp_path / "theirs"), model)
    assert qwen.read_config(tmp_path / "theirs") == model.config


def test_a_reward_model_has_the_parameters_and_flops_that_its_config_says():
    tied, untied = (random_scorer(tie_word_embeddings=tie) for tie in (True, False))
    for model in (tied, untied):
        assert model.config.num_parameters == sum(p.numel() for p in model.parameters())
    policy = qwen.ModelConfig(**TINY)
    assert policy.flops_per_token(7) - untied.config.flops_per_token(7) == 2 * 131 * 64


def rows_of(lengths: list[int]) -> list[list[int]]:
    return [row.tolist() for row in random_tokens(sum(lengths)).split(lengths)]


def trained(folder: Path, out: Path) -> dict:
    """Two steps of three pairs, two on one rank and one on the other; and the report on eight."""
    config = train_rm.Config(str(BASE), str(folder / "pairs.jsonl"), str(folder / "eval.jsonl"), str(out),
                             pairs_per_step=3, micro_batch_tokens=600, warmup=0, lr=1e-3, device="cpu")
    return train_rm.run(config)


def worker(folder: Path):
    """What each rank scores: rank 0 has seven rows, rank 1 two, and then none has any, or one alone."""
    world, rows = distributed.setup("cpu"), rows_of([9, 80, 3, 44, 10, 10, 31, 2, 50])
    model = parallel.load_sharded(folder / "rm", world)
    mine = rows[:7] if world.rank == 0 else rows[7:]
    found = [reward_model.scores(model, part, 90, world)
             for part in (mine, [], mine[:1] if world.rank == 0 else [], mine)]
    parallel.save_sharded(model, folder / "saved", world, max_shard_bytes=20_000)
    fresh = parallel.load_sharded(folder / "policy", world, scalar_head=True)
    found += [fresh.score.weight.full_tensor().tolist(), trained(folder, folder / "trained")]
    (folder / f"found_{world.rank}.json").write_text(json.dumps(found))
    distributed.close()


@pytest.mark.slow
def test_two_ranks_score_as_one_packed_as_one_by_one_and_save_the_same_bits(forks, tmp_path, capsys):
    model = random_scorer()
    qwen.save(model, tmp_path / "rm")
    qwen.save(qwen.Qwen2(qwen.ModelConfig(**TINY)).init_weights_(0), tmp_path / "policy")
    for name, count in (("pairs", 6), ("eval", 8)):
        lines = [json.dumps(pair) + "\n" for pair in pairs(name, 60) if len(pair["chosen"]) < 200][:count]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    forks.run(f"import pathlib, tests.test_writing as t; t.worker(pathlib.Path({str(tmp_path)!r}))", ranks=2)
    rows, world = rows_of([9, 80, 3, 44, 10, 10, 31, 2, 50]), distributed.setup("cpu")
    with torch.no_grad():
        single = [model(torch.tensor(row), qwen.packed([len(row)])).item() for row in rows]
    whole = parallel.load_sharded(tmp_path / "rm", world)
    assert reward_model.scores(whole, rows, 10**6, world) == pytest.approx(single, rel=1e-5, abs=1e-6)
    waiting = offload.Offloaded(whole)
    for _ in range(2):
        assert {x.untyped_storage().nbytes() for x in waiting.shards} == {0}, "weights wait elsewhere"
        with waiting:
            assert reward_model.scores(whole, rows, 90, world) == pytest.approx(single, rel=1e-5, abs=1e-6)
    zero, one = (json.loads((tmp_path / f"found_{rank}.json").read_text()) for rank in range(2))
    assert zero[0] + one[0] == pytest.approx(single, rel=1e-5, abs=1e-6)
    assert zero[1] == one[1] == one[2] == [] and zero[2] == pytest.approx(single[:1], rel=1e-5)
    assert zero[3] == zero[0] and len(set(single)) == len(single)
    assert_same_bits(qwen.load(tmp_path / "saved"), model)
    assert zero[4] == one[4] and 0.3 < torch.tensor(zero[4]).std() * 65**0.5 < 3
    capsys.readouterr()
    fresh = parallel.load_sharded(tmp_path / "policy", world, scalar_head=True)
    assert capsys.readouterr().out == f"{tmp_path}/policy has no scalar head: a new one starts at random\n"
    assert fresh.score.weight.tolist() == zero[4]
    expected = trained(tmp_path, tmp_path / "trained_by_one")
    assert zero[5] == one[5] and expected["pairs"] == 8 and len(set(expected["reliability"])) > 1
    for name in ("mean_score", "calibration_error"):
        assert zero[5][name] == pytest.approx(expected[name], rel=1e-3)


def completion(text: str) -> Completion:
    return Completion(0, 0, [], [], text, "stop")


def test_the_reward_is_the_answer_bodys_raw_score(monkeypatch, capsys):
    """Thinking and tags are not read; without a body it is the lowest; what does not fit into the model is
    counted."""
    config = train.parse(["--micro_batch_tokens", "300"])
    world, reward = distributed.setup("cpu"), rewards.Writing()
    reward.check(config)
    with monkeypatch.context() as once:
        once.setattr(reward_model, "Tokenizer", None)  # what `check` has read is not read again
        reward.prepare(config, world)
    prompt = prompts.Prompt("1", "Write a story about Ada.", "Write a story about Ada.", None, "en")
    bodies = ["Ada lived in Rome.", "Ada.", "Ada went home and sold a " + "very " * 150 + "old cat."]
    texts = [f"<think>Ada?</think><answer>{bodies[0]}</answer>", "no tags", f"<answer>{bodies[1]}</answer>",
             f"<think>other thoughts</think>\n<answer> {bodies[0]}", f"<answer>{bodies[2]}</answer>"]
    found = reward([completion(text) for text in texts], [prompt] * 5)
    rows = [reward_model.encode(reward.scorer.tokenizer, prompt.query, body, 2048)[0] for body in bodies]
    plain = qwen.load(DEFAULT)
    with torch.no_grad():
        exact = [plain(torch.tensor(row), qwen.packed([len(row)])).item() for row in rows]
    assert found == pytest.approx([exact[0], rewards.LOWEST, exact[1], exact[0], exact[2]], abs=1e-4)
    assert reward([completion("")], [prompt]) == [rewards.LOWEST] and capsys.readouterr().err == ""
    monkeypatch.setattr(reward.scorer, "shape", replace(plain.config, max_position_embeddings=60))
    cut = reward([completion(text) for text in texts], [prompt] * 5)
    assert cut[:4] == pytest.approx(found[:4], abs=1e-4) and cut[4] != found[4]
    said = capsys.readouterr().err
    assert said.startswith("warning: 1 answers exceed the 60 tokens") and len(said.splitlines()) == 1


def test_a_folder_whose_tokenizer_is_anothers_is_refused(tmp_path):
    shutil.copytree(DEFAULT, tmp_path / "rm")
    raw = json.loads((tmp_path / "rm" / "tokenizer.json").read_text())
    raw["added_tokens"] += [raw["added_tokens"][0] | {"id": 5000, "content": "<|other|>"}]
    (tmp_path / "rm" / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="has only 1024 rows"):
        reward_model.check(str(tmp_path / "rm"))


def test_the_default_writing_model_keeps_its_accuracy_on_held_out_pairs():
    """0.9 over all and 0.7 for each kind, with names and fillers that it was not trained on."""
    held_out = [Pair(r["prompt"], r["chosen"], r["rejected"], r["kind"]) for r in pairs("bar", 200, True)]
    tokenizer, world = Tokenizer(DEFAULT), distributed.setup("cpu")
    model = parallel.load_sharded(DEFAULT, world)

    def encode(pair, side):
        return reward_model.encode(tokenizer, pair.query, getattr(pair, side), 2048)[0]

    accuracy = train_rm.evaluate(model, held_out, encode, train_rm.Config(), world)["accuracy"]
    assert accuracy["all"][0] >= 0.9
    assert min(right for name, (right, _) in accuracy.items() if name.startswith("kind/")) >= 0.7


@pytest.mark.parametrize("query, marks", [("Write of Paz.", ("<|user|>: ", " <|assistant|>: ")),
                                          ("写一篇", ("<|用户|>: ", " <|助手|>: "))])
def test_a_writing_model_reads_the_request_the_answer_and_the_end(query, marks):
    tokenizer = Tokenizer(BASE)
    ids, cut = reward_model.encode(tokenizer, query, "A text.\nIts end.", 500)
    assert tokenizer.decode(ids) == f"{marks[0]}{query}{marks[1]}A text.\nIts end.<|endoftext|>" and not cut
    assert prompts.render(query, "think").endswith(prompts.frame(query))


CHATS = {True: r"{% for m in messages %}{{ '<|im_start|>user\n' + m.content if m.role == 'user' else "
               r"'<|im_start|>assistant\n<think>\n' + '\n</think>\n\n' + m.content }}{{ '<|im_end|>\n' }}"
               r"{% endfor %}",
         False: r"{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% for m in messages %}"
                r"{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"}


@pytest.mark.parametrize("thinks", [True, False])
def test_a_public_reward_model_reads_a_chat_as_its_template_writes_it(thinks, tmp_path):
    """The end of the template included: there public models have their score. Qwen3's template puts an empty
    thinking before an answer without one; so does a prompt for an answer without thinking."""
    shutil.copytree(BASE, tmp_path / "rm")
    inner = tokenizers.Tokenizer.from_file(str(BASE / "tokenizer.json"))
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    inner.save(str(tmp_path / "rm/tokenizer.json"))
    (tmp_path / "rm/tokenizer_config.json").write_text(json.dumps(
        {"eos_token": "<|im_end|>", "chat_template": CHATS[thinks]}))
    tokenizer = Tokenizer(tmp_path / "rm")
    query, answer = "Write of Paz.", "A text.\nIts end."
    written = jinja2.Template(CHATS[thinks]).render(messages=[{"role": "user", "content": query},
                                                             {"role": "assistant", "content": answer}])
    ids, cut = reward_model.encode(tokenizer, query, answer, 500)
    assert tokenizer.decode(ids) == written and ids == tokenizer.encode(written) and not cut
    assert written.startswith(tokenizer.chat(query, think=not thinks))
    assert reward_model.encode(tokenizer, query, "very long " * 50, 60)[0][-2:] == ids[-2:]


def test_of_a_text_that_is_too_long_the_answers_middle_is_left_out():
    tokenizer = Tokenizer(BASE)
    answer = " ".join(f"Sentence number {i} stands here." for i in range(100))
    whole, cut = reward_model.encode(tokenizer, "Write.", answer, 10**6)
    head = len(tokenizer.encode(prompts.frame("Write.")))
    assert not cut and reward_model.encode(tokenizer, "Write.", answer, len(whole)) == (whole, False)
    for most in (len(whole) - 1, 301, 300):
        ids, cut = reward_model.encode(tokenizer, "Write.", answer, most)
        kept = most - head - 1
        assert cut and len(ids) == most and ids[:most - kept // 2 - 1] == whole[:most - kept // 2 - 1]
        assert ids[-(kept // 2) - 1:] == whole[-(kept // 2) - 1:]
    ids, cut = reward_model.encode(tokenizer, answer, answer, 100)
    assert cut and len(ids) == 100 and ids[-1] == tokenizer.eos_ids[0]
    assert tokenizer.decode(ids[:50]).endswith(" <|assistant|>:"), "of a long query too"


def test_a_scorer_whose_weights_wait_in_host_memory_scores_as_one_that_keeps_them():
    world, known = distributed.setup("cpu"), reward_model.check(str(DEFAULT))
    keeps, waits = (reward_model.Scorer(str(DEFAULT), known, 512, world, wait) for wait in (False, True))
    texts = [("Write a story.", "Once there was a dog."), ("Write.", "A cat.")]
    assert waits(texts) == keeps(texts) and not any(p.untyped_storage() for p in waits.model.parameters())
