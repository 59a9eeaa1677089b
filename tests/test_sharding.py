"""Several processes against one: loss, gradients, weights read, published and saved, and memory."""

import ctypes
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule

import grpo
import model as qwen
import parallel
import train
from lib import distributed
from lib.options import UserError
from replica import tp_slice
from run import Clock
from tests import resident
from tests.helpers import ROOT, equal, flat, in_process, metrics, rollouts, tensors

pytestmark = pytest.mark.slow
BASE = ROOT / "data" / "tiny" / "base"
# On 4 ranks no dimension is cut evenly, and the last ranks have no row of some tensors.
ODD = qwen.ModelConfig(37, 10, 9, 3, 5, 1)
CONFIG = train.Config(micro_batch_tokens=260, clip_grad=1e9, loss="sequence")
LENGTHS = [200, 180, 60, 250, 90, 40, 3]  # of samples
M_MMAP_THRESHOLD = -3  # of <malloc.h>
UPDATES = [[0, 1, 2, 3, 4, 5], [6, 1]]  # in the second, two of four ranks have none


def made_up_samples() -> list[grpo.Sample]:
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(ODD.vocab_size, (n, ), generator=generator).tolist()

    return [grpo.Sample(ids(4), ids(n), [-3.6] * n, math.cos(3 * i)) for i, n in enumerate(LENGTHS)]


def gradients(model, world) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Of train.update, whose optimiser only looks; and its metrics."""
    seen = []

    class Look:
        def step(self):
            seen.append({name: parallel.entire(p.grad) for name, p in model.named_parameters()})

        def zero_grad(self):
            model.zero_grad()

    metrics = train.update(model, None, Look(), made_up_samples(), UPDATES, CONFIG, ODD.vocab_size, world,
                           Clock()).metrics
    gradients = {f"{i} {name}": grad for i, grads in enumerate(seen) for name, grad in grads.items()}
    return gradients, {k: v for k, v in metrics.items() if not k.startswith("balance/")}


def replica(config: qwen.ModelConfig, group=None, dtype=torch.float32) -> qwen.Qwen2:
    with torch.device("meta"):
        empty = qwen.Qwen2(config, group).to(dtype)
    return empty.to_empty(device="cpu")


def worker(folder: Path):
    """What each rank does: `folder` holds the checkpoint `odd`, and then what the tests compare."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)  # what is freed is not resident any more
    world, found = distributed.setup("cpu"), {}
    if world.size == 2:  # of `odd` only so that all of torch is there that is loaded at first use
        found["memory"] = [resident.measure(folder / name, world) for name in ("odd", "deep", "wide")][1:]
    for copies in sorted({1, world.size // 2}):
        world, name = replace(world, replicate=copies), f"{world.size // copies}x{copies}"
        model = parallel.load_sharded(folder / "odd", world)
        model.recompute, model.offload_activations = copies > 1, copies > 1
        seen, found[name] = gradients(model, world)
        sampler = replica(ODD, dtype=torch.bfloat16)
        found[name]["fingerprint"] = parallel.publish(model, sampler)
        if world.rank == world.size - 1:
            save_file(seen, folder / f"gradients_{name}.safetensors")
            save_file(dict(sampler.named_parameters()), folder / f"published_{name}.safetensors")
        parallel.save_sharded(model, folder / f"saved_{name}", world, max_shard_bytes=4000)
        found[name]["errors"] = list(staged_errors(model, sampler, world))
    model = parallel.load_sharded(BASE, world)
    sampler = replica(model.config, parallel.tp_group(2))
    found["tp"] = parallel.publish(model, sampler)
    save_file(dict(sampler.named_parameters()), folder / f"slice_{world.size}_{world.rank}.safetensors")
    reduce, found["reduced"] = FSDPModule.set_requires_all_reduce, []
    FSDPModule.set_requires_all_reduce = lambda *a: found["reduced"].append(a[1]) or reduce(*a)
    in_process(folder / f"run_{world.size}", *STEP, *RUNS[world.size])
    (folder / f"found_{world.size}_{world.rank}.json").write_text(json.dumps(found))
    distributed.close()


def staged_errors(model, sampler, world):
    """What `publish` says on every rank if a rank's copy fails, and if replicas have drifted apart."""
    real = parallel.tp_slice
    if world.rank == 1:
        parallel.tp_slice = lambda name, whole, *_: whole + (name == "model.layers.1.mlp.up_proj.weight")
    try:
        parallel.publish(model, sampler)
    except UserError as e:
        yield str(e)
    parallel.tp_slice = real
    if world.rank == world.size - 1:
        model.model["norm"].weight.data.to_local().neg_()
    try:
        parallel.publish(model, sampler)
        yield ""
    except UserError as e:
        yield str(e)
    dist.barrier()


@pytest.fixture(scope="module")
def folder(forks, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    qwen.save(qwen.Qwen2(ODD).init_weights_(0), folder / "odd")
    resident.write(folder / "deep", 30, vocabulary=1000, hidden=512)
    resident.write(folder / "wide", 30, vocabulary=20000, hidden=256)
    for ranks in (2, 4):
        forks.run(f"import pathlib, tests.test_sharding as t; t.worker(pathlib.Path({str(folder)!r}))", ranks)
    return folder


STEP = ["--steps", "1", "--prompts_per_step", "4", "--max_new_tokens", "100", "--eval_prompts", ""]
RUNS = {2: ["--tp", "2"], 4: ["--replicate", "2", "--max_sequences", "3", "--micro_batch_tokens", "500"]}


def found(folder: Path, ranks: int) -> list[dict]:
    return [json.loads((folder / f"found_{ranks}_{rank}.json").read_text()) for rank in range(ranks)]


CASES = pytest.mark.parametrize("ranks, name", [(2, "2x1"), (4, "4x1"), (4, "2x2")])


@CASES
def test_ranks_and_replicas_have_the_loss_and_the_gradients_of_one_process(folder, ranks, name):
    """Samples of very different lengths, a rank without any; with replicas also recomputed and offloaded."""
    world = distributed.setup("cpu")
    expected, one = gradients(parallel.load_sharded(folder / "odd", world), world)
    actual = load_file(folder / f"gradients_{name}.safetensors")
    assert actual.keys() == expected.keys() and one["grad_norm"] > 0.1
    for key, gradient in expected.items():
        assert (actual[key] - gradient).norm() <= 1e-5 * gradient.norm(), key
    for rank in found(folder, ranks):
        assert flat({k: rank[name][k] for k in one}) == pytest.approx(flat(one), rel=1e-5, abs=1e-6)


def test_the_first_step_of_a_run_is_the_same_on_four_ranks_and_under_tensor_parallelism(folder, tmp_path):
    """The same texts, which under tensor parallelism are only likely; the same loss and gradient."""
    in_process(tmp_path / "run", *STEP)
    seen = []
    for run in (tmp_path / "run", folder / "run_2", folder / "run_4"):
        texts = [json.loads(line)["text"] for line in rollouts(run)["step_000001.jsonl"].splitlines()]
        (numbers,) = metrics(run)
        unlike = ("gap/max", "weights/fingerprint", "balance/")  # of rounding; of the number of ranks
        seen.append((texts, {k: v for k, v in numbers.items() if not k.startswith(unlike)}))
    (texts, numbers), *others = seen
    assert len(set(texts)) > 10 and numbers["grad_norm"] > 0.01
    for other_texts, other_numbers in others:
        assert other_texts == texts and other_numbers == pytest.approx(numbers, rel=1e-5, abs=1e-6)


def test_gradients_cross_replicas_once_an_update(folder):
    """After the last micro-batch of several."""
    for rank in found(folder, 4):
        assert rank["reduced"] == [False] * (len(rank["reduced"]) - 1) + [True] and len(rank["reduced"]) > 1
    assert all(rank["reduced"] == [] for rank in found(folder, 2))


@CASES
def test_what_is_read_in_shards_is_published_and_saved_bit_for_bit(folder, ranks, name):
    base = qwen.load(folder / "odd")
    published = load_file(folder / f"published_{name}.safetensors")
    assert equal(published, {k: p.detach().bfloat16() for k, p in base.named_parameters()})
    assert equal(dict(qwen.load(folder / f"saved_{name}").named_parameters()), dict(base.named_parameters()))
    assert len(list((folder / f"saved_{name}").glob("*.safetensors"))) > 2
    sampler = replica(ODD, dtype=torch.bfloat16)
    distributed.setup("cpu")
    fingerprint = parallel.publish(base, sampler)
    assert {rank[name]["fingerprint"] for rank in found(folder, ranks)} == {fingerprint}


@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel_slices_have_the_fingerprint_of_the_whole(folder, ranks):
    base = qwen.load(BASE)
    for rank in range(ranks):
        part = load_file(folder / f"slice_{ranks}_{rank}.safetensors")
        assert equal(part, {k: tp_slice(k, p.detach(), rank % 2, 2) for k, p in base.named_parameters()})
    distributed.setup("cpu")
    assert {rank["tp"] for rank in found(folder, ranks)} == {parallel.publish(base, replica(base.config))}


@CASES
def test_a_handoff_that_fails_on_one_rank_ends_all_with_its_name(folder, ranks, name):
    for rank in found(folder, ranks):
        copied, drifted = rank[name]["errors"]
        assert copied.startswith("publish: on rank 1 the sampler's model.layers.1.mlp.up_proj.weight is not")
        if name == "2x2":
            assert drifted.startswith(f"publish: on rank {ranks // 2} weights are not rank 0's")
        else:
            assert drifted == ""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel counts resident pages")
def test_a_rank_needs_little_more_memory_than_its_shard_to_load_and_a_layer_or_two_to_publish(folder):
    for rank in found(folder, 2):
        deep, wide = rank["memory"]
        assert deep["publish_bar"] == 2 * deep["layer"] and wide["publish_bar"] == wide["embedding"]
        for m in (deep, wide):
            assert 0.9 * m["shard"] < m["load"] < m["shard"] + 0.6 * m["checkpoint"]
            assert 0.1 * m["publish_bar"] < m["publish"] < m["publish_bar"]


def test_the_fingerprint_sees_what_a_wrong_copy_would_change():
    distributed.setup("cpu")
    base = qwen.load(BASE)

    def of(change) -> int:
        changed = qwen.load(BASE)
        with torch.no_grad():
            change({name.removeprefix("model.layers."): p for name, p in changed.named_parameters()})
        return parallel.publish(changed, replica(base.config))

    def swap(a, b):
        saved = a.clone()
        a.copy_(b)
        b.copy_(saved)

    changes = [
        lambda p: None, lambda p: p["0.mlp.up_proj.weight"].view(torch.int32)[3, 5].bitwise_xor_(1),
        lambda p: swap(p["0.mlp.up_proj.weight"], p["0.mlp.gate_proj.weight"]),
        lambda p: swap(p["0.mlp.up_proj.weight"], p["1.mlp.up_proj.weight"]),
        lambda p: swap(p["0.self_attn.q_proj.weight"][0], p["0.self_attn.q_proj.weight"][1]),
        lambda p: swap(p["0.self_attn.q_proj.weight"][:, 0], p["0.self_attn.q_proj.weight"][:, 1]),
        lambda p: p["0.input_layernorm.weight"].view(torch.int32)[7].bitwise_xor_(-2**31),
    ]  # fmt: skip
    assert len({of(change) for change in changes}) == len(changes)


def test_what_saves_memory_changes_no_bit(tmp_path):
    in_process(tmp_path / "plain", "--steps", "2", "--eval_prompts", "")
    for steps in ("1", "2"):  # the second resumes
        in_process(tmp_path / "small", "--steps", steps, "--eval_prompts", "", "--recompute", "true",
                   "--offload_activations", "true", "--offload_optimizer", "true")
    assert metrics(tmp_path / "small") == metrics(tmp_path / "plain")
    assert equal(tensors(tmp_path / "small", 2), tensors(tmp_path / "plain", 2))


def test_of_a_recomputed_layer_only_its_input_goes_to_host_memory(monkeypatch):
    saved = []

    class Spy(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory):
            super().__init__(lambda x: saved.append(x.shape) or x.clone(), lambda x: x)

    monkeypatch.setattr(qwen, "save_on_cpu", Spy)
    model = qwen.load(BASE)
    model.recompute = model.offload_activations = True
    model(torch.arange(40), qwen.packed([30, 10])).sum().backward()
    assert saved == [(40, model.config.hidden_size)] * model.config.num_hidden_layers


def test_a_broken_handoff_ends_the_run_with_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "tp_slice", lambda name, whole, *_: whole * 2)
    monkeypatch.setattr(sys, "argv", ["train.py", "--run_dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    assert capsys.readouterr().err.startswith("error: publish: on rank 0 the sampler's model.embed_tokens")
