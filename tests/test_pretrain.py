"""Tokenised corpora, their rows and mixtures, pretraining, fine-tuning on chats, documents from rollouts."""

import json
import math
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import model as qwen
import parallel
from data import corpus, prompts, sft
from data.tokenizer import Tokenizer
from kernels import linear_logprob
from lib.options import UserError
from lib.schedule import learning_rate
from scripts import curves, distil, export, pretrain, tokenise
from tests.helpers import ROOT, equal, obeys_umask, random_model, tensors

BASE = ROOT / "data/tiny/base"
ONE = SimpleNamespace(rank=0, size=1, main=True, device=torch.device("cpu"))
SMALL = ["--device", "cpu", "--hidden_size", "16", "--intermediate_size", "16", "--num_hidden_layers", "1",
         "--num_attention_heads", "2", "--num_key_value_heads", "1", "--row_tokens", "32", "--warmup", "2",
         "--rows_per_step", "2", "--save_every", "3"]
SENTENCES = ["The fog came over the harbour.", "雾气漫过了港口，灯塔亮了。", "Nobody had seen such a kite.",
             "Dear Mila, how are things in Kostad?", "她把一只旧钟卖给了面包师。"]


def write(file: Path, *lines) -> Path:
    """A file of the lines: objects as JSON, bytes as they are."""
    file.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return file


def documents(n: int, seed=0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(SENTENCES, k=rng.randint(1, 9))) for _ in range(n)]


def folder(path: Path, texts: list[str], **options) -> Path:
    """A corpus of the texts."""
    file = write(path.with_suffix(".jsonl"), *({"text": text} for text in texts))
    tokenise.tokenise(tokenise.Config((str(file), ), str(BASE), str(path), **options))
    return path


def source(name="a", lengths=(), shards=1, row_tokens=16, seed=0) -> corpus.Corpus:
    """Documents of the lengths, in which each token is its own number."""
    lengths = np.array(lengths).reshape(shards, -1)
    ids = np.split(np.arange(lengths.sum()), lengths.sum(1).cumsum()[:-1])
    sizes = [[len(x), int(x.sum())] for x in lengths]
    return corpus.Corpus(name, Path(), sizes, lambda i: (ids[i], lengths[i]), row_tokens, seed)


def run(capsys, *options, config=SMALL) -> str:
    pretrain.train(pretrain.options.parse(pretrain.Config, [*config, *map(str, options)], ""))
    return capsys.readouterr().out


def lines(folder: Path) -> list[dict]:
    """metrics.jsonl without what depends on the machine."""
    depends = ("time/", "memory/", "tokens_per_second/")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(depends)}
            for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------- tokeniser


def test_documents_keep_their_order_and_what_cannot_be_used_is_counted_with_its_first_place(tmp_path, capsys,
                                                                                            monkeypatch):
    """Batches of any size, one document or many, give the tokens that each document has by itself."""
    texts = documents(60)
    (tmp_path / "in").mkdir()
    jsonl = write(tmp_path / "in/a.jsonl", {"text": texts[0]}, b"{", {"text": 1}, b"", {"text": " "}, b"[1]",
                  b'{"text": "\xff"}', b'{"text": "\\ud800"}', {"text": "a"}, {"other": "b"},
                  *({"text": text} for text in texts[1:50]))
    for i, text in enumerate(texts[50:]):
        (tmp_path / f"in/b{i}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "in/c.txt").write_bytes(b"\xff")
    (tmp_path / "in/d.txt").write_bytes(b"")
    tokenizer, found = Tokenizer(BASE), []
    for batch in (1, 500, 2**20):
        monkeypatch.setattr(corpus, "BATCH", batch)
        out = tmp_path / str(batch)
        monkeypatch.setattr(sys, "argv", ["tokenise", str(tmp_path / "in"), f"--tokenizer={BASE}",
                                          f"--out={out}"])
        tokenise.main()
        meta = json.loads((out / "meta.json").read_text())
        found.append((out / "shard_00000.bin").read_bytes())
        assert meta["dropped"] == {
            "no JSON object": {"first": f"{jsonl}, line 2", "documents": 2},
            "without text": {"first": f"{jsonl}, line 3", "documents": 4},
            "not UTF-8": {"first": f"{jsonl}, line 7", "documents": 3},
            "of one token": {"first": f"{jsonl}, line 9", "documents": 1}}
    expected = [tokenizer.encode(text) + tokenizer.eos_ids for text in texts]
    flat = [*sum(expected, []), *map(len, expected)]
    assert np.frombuffer(found[0], "<u4").tolist() == flat and found[0] == found[1] == found[2]
    assert f"left out: 2 no JSON object, first {jsonl}, line 2\n" in capsys.readouterr().out


@pytest.mark.slow
def test_a_tokeniser_that_is_killed_goes_on_to_the_same_bytes(tmp_path, forks, capsys):
    """After the second of several shards; and between a shard and its mention in meta.json."""
    texts, size = documents(120), 0.004
    whole = folder(tmp_path / "whole", texts, shard_mib=size)
    for kill, calls in (("os.fsync", 4), ("tokenise.replace", 2)):
        out = tmp_path / kill
        config = tokenise.Config((str(whole.with_suffix(".jsonl")), ), str(BASE), str(out), size)
        code = (f"import os; from scripts import tokenise\nleft = [1] * {calls}\n"
                f"{kill} = lambda *a, f={kill}: f(*a) if left and left.pop() else os.kill(os.getpid(), 9)\n"
                f"tokenise.tokenise(tokenise.{config!r})")
        codes, said = forks.start(main="", code=code)[1]()
        assert codes == [-9], said
        there = json.loads((out / "meta.json").read_text())
        assert len(there["shards"]) == 2 and not there["complete"]
        with pytest.raises(UserError, match="is not complete: give scripts.tokenise the same command again"):
            corpus.open_corpus("a", out, Tokenizer(BASE), 16, 0)
        capsys.readouterr()
        tokenise.tokenise(config)
        assert "shard_00001" not in capsys.readouterr().out, "whole shards stay"
        names = sorted(f.name for f in whole.iterdir() if f.name != "lock")
        assert len(names) > 4 and names == sorted(f.name for f in out.iterdir() if f.name != "lock")
        assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in names)


def test_a_corpus_is_of_its_tokenizer_and_whole(tmp_path):
    made = folder(tmp_path / "made", documents(40), shard_mib=0.004)
    tokenizer = Tokenizer(BASE)
    assert corpus.open_corpus("a", made, tokenizer, 16, 0).rows > 10
    for command, said in ((["other.jsonl"], "is made of other files"), ([], "--out is missing")):
        write(tmp_path / "other.jsonl", {"text": "Another text."})
        with pytest.raises(UserError, match=said):
            tokenise.tokenise(tokenise.Config((str(tmp_path / "other.jsonl"), ), str(BASE),
                                              str(made) if command else ""))
    with pytest.raises(UserError, match="no document is left of"):
        folder(tmp_path / "nothing", [""])
    with pytest.raises(UserError, match="nowhere/meta.json does not exist: make the folder by"):
        corpus.open_corpus("a", tmp_path / "nowhere", tokenizer, 16, 0)
    shutil.copytree(BASE, tmp_path / "tokenizer")
    (tmp_path / "tokenizer/generation_config.json").write_text('{"eos_token_id": 5}')
    with pytest.raises(UserError, match="has tokens of another tokenizer than .*: make it again"):
        corpus.open_corpus("a", made, Tokenizer(tmp_path / "tokenizer"), 16, 0)
    shard = made / "shard_00001.bin"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"shard_00001.bin must have [\d,]+ bytes by its meta.json: copy it"):
        corpus.open_corpus("a", made, tokenizer, 16, 0)


# ---------------------------------------------------------------------- rows


@pytest.mark.parametrize("row_tokens", [1, 7, 64, 1000])
def test_every_token_but_a_documents_first_is_predicted_once_an_epoch(row_tokens):
    """From the token before it, in one sequence with those of its document that stand in the row."""
    lengths = random.Random(1).choices([1, 2, 3, 30, 90], k=24)
    a = source(lengths=lengths, shards=4, row_tokens=row_tokens)
    starts, pairs = np.cumsum([0, *lengths[:-1]]), sum(lengths) - len(lengths)
    rows = [a.row(k) for k in range(2 * pairs // row_tokens + 1)]
    assert all(len(row.tokens_T) == len(row.targets_T) == sum(row.lengths) == row_tokens for row in rows)
    seen = np.concatenate([row.targets_T for row in rows])
    for epoch in (seen[:pairs], seen[pairs:2 * pairs]):
        assert sorted(epoch) == sorted(set(range(sum(lengths))) - set(starts))
    assert (seen[:pairs] != seen[pairs:2 * pairs]).any(), "an epoch has its own order"
    for row in rows:
        assert (row.targets_T == row.tokens_T + 1).all()
        for part in np.split(row.tokens_T, np.cumsum(row.lengths)[:-1]):
            assert (np.diff(part) == 1).all() and not set(part[1:]) & set(starts)
    one = source(lengths=[9] * 20, row_tokens=160)
    assert (one.row(0).tokens_T != one.row(1).tokens_T).any(), "so has its only shard"
    first = {tuple(source(lengths=lengths, shards=4, row_tokens=99, seed=seed, name=name).row(0).tokens_T)
             for seed, name in ((0, "a"), (1, "a"), (0, "b"))}
    assert len(first) == 3, "keyed by seed and source"


def test_one_shard_is_read_at_a_time_whatever_the_number_of_shards():
    """Sequential rows of an epoch read each shard once, and hold two."""
    a = source(lengths=[5] * 200, shards=20, row_tokens=8)
    reads, read = [], a.read
    a.read = lambda i: reads.append(i) or read(i)
    for k in range(a.rows):
        a.row(k)
    assert sorted(reads) == list(range(20)) and a.documents.cache_info().maxsize == 2


@pytest.mark.parametrize("weights", [(1, ), (1, 1), (0.7, 0.2, 0.1), (90, 9, 1), (1 / 3, 2 / 3)])
def test_a_mixture_meets_its_weights_and_goes_on_from_any_position(weights):
    sources = [SimpleNamespace(name=str(i)) for i in range(len(weights))]
    start = dict.fromkeys("012"[:len(weights)], 0)
    rows, after = corpus.take(sources, weights, start, 1000)
    counts = np.bincount([i for i, _ in rows], minlength=len(weights))
    assert abs(counts / 1000 - np.array(weights) / sum(weights)).max() < 0.01
    for s, n in enumerate(counts):
        assert [k for i, k in rows if i == s] == list(range(n)) and after[str(s)] == n
    parts, position = [], start
    for n in (1, 9, 490, 500):
        more, position = corpus.take(sources, weights, json.loads(json.dumps(position)), n)
        parts += more
    assert parts == rows and position == after


# ---------------------------------------------------------------------- chats


@pytest.mark.parametrize("chats, style, before, end", [
    (False, "think", prompts.render("Ask", "think"), "<|endoftext|>"),
    (False, "direct", prompts.render("Ask", "direct"), "<|endoftext|>"),
    (True, "think", "<|im_start|>user\nAsk<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>")])
def test_only_the_response_of_a_chat_is_trained(chats, style, before, end):
    tokenizer = Tokenizer(BASE)
    if chats:
        tokenizer.inner.add_special_tokens(["<|im_end|>"])
        tokenizer.eos_ids = tokenizer.inner.encode("<|im_end|>").ids
    assert tokenizer.chats == chats
    for record in ({"prompt": "Ask", "response": "Told."}, {"messages": [
            {"role": "user", "content": "Ask"}, {"role": "assistant", "content": "Told."}]}):
        row = sft.encode(record, tokenizer, style)
        assert tokenizer.decode([*row.tokens_T, row.targets_T[-1]]) == before + "Told." + end
        trained = row.targets_T[row.targets_T >= 0]
        assert tokenizer.decode(trained) == "Told." + end and row.lengths == [len(row.tokens_T)]
        assert row.tokens_T[-len(trained)] == tokenizer.encode(before)[-1]


def test_earlier_messages_stand_before_the_response():
    tokenizer = Tokenizer(BASE)
    chat = [{"role": role, "content": text} for role, text in (
        ("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "D"))]
    assert tokenizer.decode(sft.encode({"messages": chat}, tokenizer, "direct").tokens_T) == prompts.render(
        "S\n\nA\n\nB\n\nC", "direct") + "D"
    assert tokenizer.chat(chat[:2]) == ("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n"
                                        "<|im_start|>assistant\n")


def test_chats_are_packed_whole_and_longer_ones_are_dropped_and_counted(tmp_path):
    tokenizer, style = Tokenizer(BASE), "direct"
    records = [{"prompt": "Ask", "response": "word " * n} for n in (1, 2, 5, 9, 400, 3)]
    file = write(tmp_path / "chats.jsonl", *records)
    lengths = [sft.encode(x, tokenizer, style).lengths[0] for x in records]
    room = max(n for n in lengths if n < 400) + 10
    chats = sft.Chats(str(file), tokenizer, style, room, seed=0)
    assert chats.dropped == 1 and chats.rows > 1
    epochs = [[chats.row(k + e * chats.rows) for k in range(chats.rows)] for e in range(3)]
    for epoch in epochs:
        assert all(len(row.tokens_T) == sum(row.lengths) <= room for row in epoch)
        assert sorted(n for row in epoch for n in row.lengths) == sorted(n for n in lengths if n <= room)


@pytest.mark.parametrize("line", [
    {"prompt": "Ask"}, {"response": "Told"}, {"prompt": "Ask", "response": ""}, {"messages": "Ask"},
    {"messages": [{"role": "assistant", "content": "Told"}]}, {"messages": [1, 2]}, {"messages": [
        {"role": "user", "content": "Ask"}, {"role": "user", "content": "Ask"}]},
    {"prompt": "\ud800", "response": "Told"}, b"{"])
def test_a_chat_that_is_none_is_named(line, tmp_path):
    file = write(tmp_path / "chats.jsonl", {"prompt": "Ask", "response": "Told"}, line)
    with pytest.raises(UserError, match=f"^{file}, line 2: "):
        sft.Chats(str(file), Tokenizer(BASE), "direct", 512, 0)


# ---------------------------------------------------------------------- loss


def test_the_loss_of_packed_documents_is_that_of_each_by_itself():
    lengths = random.Random(2).choices(range(2, 40), k=30)
    a = source(lengths=lengths, row_tokens=100)
    model, rows = random_model(vocab_size=sum(lengths), scale=0.1), [a.row(k) for k in range(3)]
    packed, _ = pretrain.logprobs(model, rows, model.config.vocab_size)
    alone = []
    for row in rows:
        for ids, targets in zip(*(np.split(x, np.cumsum(row.lengths)[:-1]) for x in row[:2])):
            hidden = model(torch.tensor(ids), qwen.packed([len(ids)]))
            alone.append(linear_logprob(hidden, model.head_weight, torch.tensor(targets))[0])
    assert torch.allclose(packed, torch.cat(alone), rtol=0, atol=1e-5) and packed.std() > 0.01


def test_micro_batches_leave_the_step_as_it_is():
    """Also of chats, whose rows have different numbers of trained tokens."""
    a = source(lengths=[9] * 14, row_tokens=12)
    rows = [a.row(k) for k in range(6)]
    for row in rows[:3]:
        row.targets_T[:7] = -1
    found = []
    for micro_batch_tokens in (12, 24, 1000):
        model = random_model(scale=0.1)
        config = pretrain.Config(row_tokens=12, micro_batch_tokens=micro_batch_tokens)
        said = pretrain.update(model, torch.optim.SGD(model.parameters()), rows, 1.0, config, 131, world())
        found.append((said, torch.cat([p.flatten() for p in model.parameters()])))
    for said, weights in found[1:]:
        assert torch.allclose(weights, found[0][1], rtol=0, atol=1e-5)
        assert said["loss"] == pytest.approx(found[0][0]["loss"], abs=1e-5)
    assert said["tokens"] == 72 - 21 and said["skipped_updates"] == 0


def world():
    return pretrain.distributed.setup("cpu")


def test_evaluation_reports_each_source_and_perplexity_by_position(monkeypatch):
    monkeypatch.setattr(pretrain, "BUCKETS", {"near": 0, "middle": 4, "far": 16, "beyond": 99})
    model, written = random_model(scale=0.1), []
    log = SimpleNamespace(evaluated=set(), say=print, write=lambda file, m, records: written.append(m))
    held_out = [source("a", [31] * 4, row_tokens=30), source("b", [5] * 26, row_tokens=8)]
    inputs = SimpleNamespace(held_out=held_out, n_valid=131)
    config = pretrain.Config(row_tokens=30, micro_batch_tokens=60, steps=7, eval_every=5)
    for step in (0, 1, 5, 7):
        pretrain.evaluate(step, model, inputs, config, log, world())
    assert [m["step"] for m in written] == [0, 5, 7], "in steps, and at the end"
    names = {"eval/loss/a", "eval/loss/b", "eval/perplexity/b/near"} | {
        f"eval/perplexity/a/{x}" for x in ("near", "middle", "far")}
    assert written[0].keys() == names | {"step"}, "no document of b reaches further"
    logp = pretrain.logprobs(model, [held_out[0].row(k) for k in range(4)], 131)[0].detach().view(4, 30)
    expected = {"near": logp[:, :4], "middle": logp[:, 4:16], "far": logp[:, 16:]}
    assert written[0]["eval/loss/a"] == pytest.approx(-logp.mean().item(), abs=1e-5)
    for name, part in expected.items():
        assert written[0][f"eval/perplexity/a/{name}"] == pytest.approx(math.exp(-part.mean()), rel=1e-5)


@pytest.mark.parametrize("decay, linear, expected", [
    (1.0, False, [0.5, 1, 1, 0.05 + 0.95 * (1 + math.cos(math.pi / 8)) / 2]),
    (0.4, True, [0.5, 1, 1, 1, 1, 1, 1, 0.7625, 0.525, 0.2875]), (0.0, True, [0.5] + [1] * 9)])
def test_the_rate_warms_up_stays_and_decays(decay, linear, expected):
    found = [learning_rate(step, 10, 2, 1.0, decay, linear) for step in range(len(expected))]
    assert found == pytest.approx(expected)


# ---------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Options of a mixture of two corpora, with a third held out."""
    path = tmp_path_factory.mktemp("corpora")
    a, b, held = (folder(path / x, documents(n, n), shard_mib=0.01) for x, n in zip("abh", (60, 50, 8)))
    return ["--data", f"a={a}:3,b={b}", "--eval_data", f"held={held}", "--steps", "8", "--eval_every", "4"]


def test_a_run_that_is_killed_goes_on_to_the_same_bits(tmp_path, folders, capsys, monkeypatch):
    """In the middle of documents, shards and an epoch. curves and export read the run."""
    said = run(capsys, *folders, "--run_dir", tmp_path / "whole", "--out", tmp_path / "hf")
    assert "resumed" not in said and "step 8/8  loss" in said and "eval after step 8: loss/held" in said
    take, calls = corpus.take, []

    def dies(*arguments):
        calls.append(1)
        return take(*arguments) if len(calls) < 6 else 1 / 0

    monkeypatch.setattr(corpus, "take", dies)
    with pytest.raises(ZeroDivisionError):
        run(capsys, *folders, "--run_dir", tmp_path / "cut")
    assert len(lines(tmp_path / "cut")) == 7, "five steps and two evaluations"
    monkeypatch.setattr(corpus, "take", take)
    again = run(capsys, *folders, "--run_dir", tmp_path / "cut")
    assert "resumed after step 3" in again
    assert equal(tensors(tmp_path / "whole", 8), tensors(tmp_path / "cut", 8))
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    state = json.loads((tmp_path / "cut/checkpoints/step_000008/state.json").read_text())
    assert state["position"] == {"a": 12, "b": 4}
    assert "done" in run(capsys, *folders, "--run_dir", tmp_path / "cut"), "a finished run stays as it is"
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    assert curves.curves((str(tmp_path / "cut"), ), ["loss", "eval/*"]).keys() == {
        "loss", "eval/loss/held", "eval/perplexity/held/0-1k"}
    export.export(tmp_path / "cut", tmp_path / "exported")
    exported, out = (qwen.load(tmp_path / x) for x in ("exported", "hf"))
    assert equal(exported.state_dict(), out.state_dict()) and Tokenizer(tmp_path / "exported").n_valid == 1024
    losses = [m["loss"] for m in lines(tmp_path / "cut") if "loss" in m]
    assert losses[-1] < losses[0] - 0.05 and losses[0] == pytest.approx(math.log(1024), abs=0.1)


@pytest.mark.slow
def test_two_ranks_are_one_and_go_on_to_the_same_bits_when_they_are_killed(tmp_path, folders, capsys, forks):
    options = [*folders, "--steps", "4", "--rows_per_step", "4"]
    run(capsys, *options, "--run_dir", tmp_path / "one", "--out", tmp_path / "a")
    code = "import os, sys; from scripts import pretrain; sys.argv = {!r}; {}; pretrain.main()"
    argv = ["pretrain", *SMALL, *options, "--out", str(tmp_path / "b"), "--run_dir"]
    said = forks.run(code.format([*argv, str(tmp_path / "two")], "pass"), 2)
    assert "2 x cpu" in said[0] and said[1] == ""
    one, two = (qwen.load(tmp_path / x).state_dict() for x in "ab")
    assert all(torch.allclose(one[k], two[k], rtol=0, atol=1e-5) for k in one)
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, abs=1e-5, rel=1e-5)
    argv.append(str(tmp_path / "killed"))
    dies = ("left, take = [1] * 3, pretrain.corpus.take; pretrain.corpus.take = lambda *a: "
            "take(*a) if left and left.pop() else os.kill(os.getpid(), 9)")
    codes, _ = forks.start(main="", ranks=2, code=code.format(argv, dies))[1]()
    assert codes == [-9, -9] and len(lines(tmp_path / "killed")) == 4, "an evaluation and three steps"
    assert "resumed after step 3" in forks.run(code.format(argv, "pass"), 2)[0]
    assert equal(tensors(tmp_path / "two", 4), tensors(tmp_path / "killed", 4))
    assert lines(tmp_path / "two") == lines(tmp_path / "killed")


def test_the_folder_of_a_base_from_scratch_is_complete(tmp_path, capsys):
    """From one command; also where it is the tokenizer's own, and a Qwen3."""
    file = write(tmp_path / "documents.jsonl", *({"text": text} for text in documents(20)))
    shutil.copytree(BASE, tmp_path / "own")
    for i, (out, tokenizer, more) in enumerate((
            ("base", BASE, []), ("own", tmp_path / "own", []),
            ("3", BASE, ["--qk_norm", "true", "--head_dim", "12"]))):
        run(capsys, "--documents", file, "--tokenizer", tokenizer, "--out", tmp_path / out, "--run_dir",
            tmp_path / f"run{i}", "--rows_per_step", "10", "--peak_tflops", "2", *more)
        made = qwen.load(tmp_path / out).config
        assert Tokenizer(tmp_path / out).n_valid == made.vocab_size and obeys_umask(tmp_path / out)
        assert (made.qk_norm, made.head_dim) == ((True, 12) if more else (False, 8))
        m = json.loads((tmp_path / f"run{i}/metrics.jsonl").read_text().splitlines()[0])
        assert m["tokens"] == 320 and m["tokens_per_second/train"] == pytest.approx(320 / m["time/total"])
        flops = m["mfu"] * 2e12 * m["time/total"] / (3 * 320)
        assert made.flops_per_token(0) < flops <= made.flops_per_token(16), "by the tokens' own contexts"


def test_a_checkpoint_is_gone_on_from_and_chats_are_trained(tmp_path, capsys):
    """--model, --sft; the template's own file is the tokenizer's."""
    run(capsys, "--documents", write(tmp_path / "d.jsonl", *({"text": x} for x in documents(20))),
        "--run_dir", tmp_path / "base", "--out", tmp_path / "hf", "--max_position_embeddings", "512")
    chats = [{"prompt": "Ask", "response": f"Told {i} times."} for i in range(30)]
    file = write(tmp_path / "chats.jsonl", *chats, {"prompt": "Ask", "response": "word " * 900})
    said = run(capsys, "--model", tmp_path / "hf", "--sft", file, "--row_tokens", 256, "--run_dir",
               tmp_path / "sft", "--steps", 6, "--lr", 0.01)
    found = lines(tmp_path / "sft")
    assert "1 longer chats dropped" in said and found[-1]["loss"] < found[0]["loss"] - 0.2
    row = sft.Chats(str(file), Tokenizer(BASE), "think", 256, 0).row(0)
    assert found[0]["tokens"] < 2 * len(row.tokens_T) / 4, "prompts are not trained"
    export.export(tmp_path / "sft", tmp_path / "exported")
    assert qwen.load(tmp_path / "exported").config.hidden_size == 16


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(tmp_path, folders, capsys, monkeypatch):
    clip, norms = parallel.clip_grad_, iter([1, math.nan, 1, math.inf, math.nan, math.nan])
    monkeypatch.setattr(parallel, "clip_grad_", lambda *a: clip(*a) * next(norms))
    with pytest.raises(UserError, match="3 gradients in a row were not finite: lower lr; the same command "
                                        "goes on after step 3"):
        run(capsys, *folders, "--run_dir", tmp_path / "run")
    found = [m for m in lines(tmp_path / "run") if "loss" in m]
    assert [m["skipped_updates"] for m in found] == [0, 1, 0, 1, 1, 1] and found[1]["grad_norm"] is None
    assert json.loads((tmp_path / "run/checkpoints/step_000003/state.json").read_text())["updates"] == 2


def test_a_stopped_run_keeps_its_last_step(tmp_path, folders, capsys, monkeypatch):
    check_stop, calls = pretrain.distributed.check_stop, []

    def stop(world):
        calls.append(1)
        if len(calls) == 3:
            raise pretrain.Stopped(15)
        check_stop(world)

    monkeypatch.setattr(pretrain.distributed, "check_stop", stop)
    with pytest.raises(pretrain.Stopped):
        run(capsys, *folders, "--run_dir", tmp_path / "run")
    assert "stopped by SIGTERM: step 2 is kept" in capsys.readouterr().out
    assert "resumed after step 2" in run(capsys, *folders, "--run_dir", tmp_path / "run")


@pytest.mark.parametrize("options, said", [
    (["--row_tokens", "0"], "row_tokens must be positive, not 0"),
    (["--decay", "1.5"], "decay must be at most 1, not 1.5"),
    (["--hidden_size", "15"], "command line: hidden_size 15, num_attention_heads 2 and num_key"),
    (["--num_key_value_heads", "3"], "do not divide each other"),
    (["--head_dim", "7"], "a head's size is odd"),
    (["--rope_theta", "1"], "command line: rope_theta must be"),
    (["--row_tokens", "4096"], "row_tokens 4096 exceeds the context of 2048"),
    (["--data", "a"], "data: 'a' must be NAME=FOLDER"), (["--data", "a=x:0"], "data: 'a=x:0' must be"),
    (["--data", "a=nowhere"], "nowhere/meta.json does not exist: make the folder by scripts.tokenise"),
    (["--eval_data", "a=nowhere:2"], "nowhere/meta.json does not exist"),
    (["--documents", "nowhere"], "nowhere"), (["--sft", "nowhere"], "sft file nowhere cannot be read"),
    (["--documents", "FEW"], "too few tokens for a row of row_tokens 32 or rows_per_step 2"),
    (["--eval_data", "a=FEW"], "FEW/meta.json does not exist"),
    (["--documents", "BAD"], ", line 2 is no JSON object: mend it"),
    (["--tokenizer", "nowhere"], "nowhere/tokenizer.json cannot be read"),
    (["--model", "WRITING"], "is a reward model"), (["--resume", "true"], "has no checkpoint to go on from"),
    (["--rows_per_step", "3", "--replicate", "2"], "and replicate 2 divide them"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence(options, said, tmp_path, monkeypatch, capsys):
    fog = {"text": "The fog came over the harbour."}
    files = {"FEW": write(tmp_path / "few.jsonl", fog), "BAD": write(tmp_path / "bad.jsonl", fog, b"{"),
             "WRITING": BASE.parent / "writing"}
    documents = str(write(tmp_path / "enough.jsonl", *[fog] * 20))
    monkeypatch.setattr(sys, "argv", ["pretrain", *SMALL, "--documents", documents, "--run_dir",
                                      str(tmp_path / "run"), *(str(files.get(x, x)) for x in options)])
    with pytest.raises(SystemExit, match="2"):
        pretrain.main()
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and len(error.splitlines()) == 1


def test_another_corpus_is_refused_on_resume(tmp_path, folders, capsys):
    a = folder(tmp_path / "a", documents(40))
    run(capsys, "--data", f"a={a}", "--steps", "3", "--run_dir", tmp_path / "run")
    shutil.rmtree(a)
    folder(a, documents(41))
    with pytest.raises(UserError, match=f"^a={a} is not what .*step_000003 was made with: put it back"):
        run(capsys, "--data", f"a={a}", "--steps", "3", "--run_dir", tmp_path / "run")


# ---------------------------------------------------------------------- rollouts


def test_good_rollouts_become_documents_up_to_a_share(tmp_path, monkeypatch, capsys):
    (tmp_path / "run/rollouts").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text(json.dumps({"model": str(BASE)}))
    rewards = [{"a": 0.2, "b": 0.4}, {"a": 0.9, "b": None}, {"a": None}, {"a": 1.0, "b": 0.4}, {"a": 2.0}]
    write(tmp_path / "run/rollouts/step_000001.jsonl", *(
        {"prompt": f"Ask {i}:", "text": " The fog came.", "rewards": x, "finish_reason": "stop"}
        for i, x in enumerate(rewards[:4])))
    write(tmp_path / "run/rollouts/step_000002.jsonl", {
        "prompt": "Ask", "text": "Cut", "rewards": rewards[4], "finish_reason": "length"})
    out = tmp_path / "documents.jsonl"
    monkeypatch.setattr(sys, "argv", ["distil", str(tmp_path / "run"), "--min_reward=0.5", f"--out={out}"])
    distil.main()
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert texts == ["Ask 1: The fog came.", "Ask 3: The fog came."], "best first, without the cut one"
    made = folder(tmp_path / "made", documents(20))
    total = sum(tokens for _, tokens in json.loads((made / "meta.json").read_text())["shards"])
    sizes = [len(Tokenizer(BASE).encode(text)) + 1 for text in texts]
    for tokens, n in ((sizes[0], 1), (sum(sizes) - 1, 1), (sum(sizes), 2)):
        config = distil.Config(str(tmp_path / "run"), 0.5, str(made), tokens / total + 1e-9)
        assert len(distil.distil(config)) == n
    with pytest.raises(UserError, match="none of 2 rollouts of min_reward 0.5 fits into share"):
        distil.distil(distil.Config(str(tmp_path / "run"), 0.5, str(made), 1e-6))
