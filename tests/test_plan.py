"""The planner: its bytes against real FSDP2 on 64 fake ranks and against torch's own memory tracker.

What this cannot show: the memory that CUDA's allocator, NCCL and cuBLAS take beside tensors, which the
planner assumes, and the time of anything.
"""

import dataclasses
import json
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

import checkpoints
import grpo
import kernels.attention
import kernels.logprob
import model as qwen
import parallel
import reward_model
import train
from data.corpus import Row
from kernels import backend
from lib import distributed
from lib.options import UserError
from model import ModelConfig, Qwen2
from scripts import plan as planner
from scripts import pretrain
from scripts.plan import SHAPES, Machine, Plan
from tests.helpers import ROOT
from train import Config, parse

SMALL = ModelConfig(1000, 140, 70, 3, 10, 2)  # nothing in it divides by 64


@contextmanager
def fake_ranks(rank: int, size: int):
    """This process as one of many, whose collectives do nothing."""
    distributed.close()  # what a test before may have left
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield distributed.World(rank, size, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def meta(shape: ModelConfig, group=None) -> Qwen2:
    with torch.device("meta"):
        return Qwen2(shape, group)


def plan_of(shape: ModelConfig, ranks: int, cuda: bool = True, prompt_tokens: int = 512, **options) -> Plan:
    config = dataclasses.replace(parse([]), **{"prompts_per_step": ranks} | options)
    return Plan(config, Machine(min(ranks, 8), -(-ranks // 8), 80.0, prompt_tokens), shape, cuda)


def as_layer_0(name: str) -> str:
    parts = name.split(".")
    return ".".join(["0" if part.isdigit() else part for part in parts])


def held(tensors) -> int:
    """Bytes of the memory behind tensors, each counted once."""
    return sum({id(s): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


# ---------------------------------------------------------------------- persistent bytes


@pytest.mark.parametrize("shape, size, rank", [
    (SHAPES["Qwen2.5-32B"], 64, 0), (SHAPES["Qwen2.5-32B"], 64, 63), (SHAPES["Qwen2.5-32B"], 48, 47),
    (SHAPES["Qwen3-4B"], 48, 47),
    *((SMALL, 64, rank) for rank in (0, 1, 20, 43, 63)),
], ids=lambda x: str(x) if isinstance(x, int) else f"{x.num_hidden_layers} layers")
def test_every_rank_holds_the_shards_and_bytes_that_are_planned(shape, size, rank):
    """Real parallel.shard and AdamW's state on the meta device; ranks with full, smaller and empty shards."""
    plan = plan_of(shape, size)
    with fake_ranks(rank, size) as world:
        model = parallel.shard(meta(shape), world)
        moments = checkpoints.tensors_of(model, torch.optim.AdamW(model.parameters()))["optimizer"].values()
        local = {name: p.to_local() for name, p in model.named_parameters()}
        for name, p in local.items():
            assert p.shape == plan.shard(as_layer_0(name), rank), name
        assert sum(p.numel() for p in local.values()) == plan.numbers(rank=rank)
        persistent = plan.persistent(rank)
        assert sum(p.untyped_storage().nbytes() for p in local.values()) == persistent["weights, fp32"]
        assert sum(m.to_local().nbytes for m in moments) == persistent["AdamW's moments, fp32"]


def test_replicas_shard_over_fewer_ranks():
    plan = plan_of(SMALL, 64, replicate=8)
    with fake_ranks(13, 64) as world:
        model = parallel.shard(meta(SMALL), dataclasses.replace(world, replicate=8))
        for name, p in model.named_parameters():
            assert p.to_local().shape == plan.shard(as_layer_0(name), 13 % 8), name


@pytest.mark.parametrize("tp, name", [(1, "Qwen2.5-32B"), (2, "Qwen2.5-32B"), (8, "Qwen2.5-32B"),
                                      (8, "Qwen3-32B")])
def test_a_sampler_holds_the_bytes_that_are_planned(tp, name):
    shape = SHAPES[name]
    with fake_ranks(3, 64):
        slices = meta(shape, parallel.tp_group(tp)).to(torch.bfloat16)
    total = sum(p.nbytes for p in slices.parameters())
    assert total == plan_of(shape, 64, tp=tp).persistent()["sampler's weights"]


# ---------------------------------------------------------------------- activations


def update_once(model, config: Config, lengths: list[int], n_valid: int):
    """The real forward, logprobs and backward of a micro-batch, in which the shortest sample has no
    gradient."""
    samples = [grpo.Sample([1, 1], [2] * (n - 2), [0.0] * (n - 2), float(n > min(lengths))) for n in lengths]
    batch = grpo.collate(samples)
    logp_N, _ = train.logprobs(model, batch, config, n_valid)
    (logp_N * batch.advantage_T[batch.mask_T]).sum().backward()


def tracked(model, optimizer, step) -> int:
    """Peak bytes of a step, by torch's tracker, with gradients and moments of one before it."""
    step()
    optimizer.step()
    tracker = FSDPMemTracker(model, optimizer) if isinstance(model, FSDPModule) else MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        step()
        parallel.clip_grad_(model, 1.0)
        optimizer.step()
    (peak, ) = tracker.get_tracker_snapshot("peak").values()
    return peak["Total"]


def measured(shape: ModelConfig, lengths: list[int], recompute: bool, world) -> tuple[int, int]:
    """Bytes at the peak beside persistent ones: planned, and seen by the tracker in a real run."""
    torch.manual_seed(0)
    model = parallel.shard(Qwen2(shape).init_weights_(0), world)
    model.recompute = recompute
    plan = plan_of(shape, world.size, False, 2, max_new_tokens=lengths[0], recompute=recompute,
                   micro_batch_tokens=sum(lengths))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    seen = tracked(model, optimizer,
                   lambda: update_once(model, plan.config, lengths, shape.vocab_size - 8))
    stays = sum(size for name, size in plan.persistent(world.rank).items() if "sampler" not in name)
    return max(sum(b.values()) for b in plan.moments().values()), seen - stays


CASES = [  # the first peaks in a layer's backward, the others in logprobs
    (ModelConfig(512, 128, 384, 4, 8, 2), [400, 300, 20]),
    (ModelConfig(3000, 64, 160, 4, 4, 2), [250, 150, 20]),
    (ModelConfig(2000, 64, 96, 2, 4, 2, tie_word_embeddings=True), [300, 250, 20]),
    (ModelConfig(512, 128, 384, 4, 8, 2, head_dim=48, qk_norm=True), [400, 300, 20]),
]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shape, lengths", CASES, ids=["layer", "logprobs", "tied", "Qwen3"])
def test_the_peak_of_a_real_update_is_within_a_tenth_of_torchs_tracker(shape, lengths, recompute):
    planned, seen = measured(shape, lengths, recompute, distributed.setup("cpu"))
    distributed.close()
    assert planned == pytest.approx(seen, rel=0.1)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("job", ["pretrain", "train_rm"])
@pytest.mark.parametrize("shape, lengths", CASES[:3], ids=["layer", "logprobs", "tied"])
def test_the_peak_of_the_other_jobs_is_within_a_tenth_too(shape, lengths, job, recompute):
    """The losses of scripts.pretrain and of scripts.train_rm, whose scalar head needs no logits."""
    shape = dataclasses.replace(shape, scalar_head=job == "train_rm")
    world = distributed.setup("cpu")
    model = parallel.shard(qwen.build(shape).init_weights_(0), world)
    model.recompute = recompute
    config = dataclasses.replace(parse([]), recompute=recompute, micro_batch_tokens=sum(lengths))
    plan = Plan(config, Machine(1, 1, 80.0, job=job, row_tokens=lengths[0]), shape, False)
    rows = [Row(np.full(n, 3), np.full(n, 4), [n]) for n in lengths]

    def step():
        if job == "train_rm":
            found = reward_model.forward(model, [row.tokens_T.tolist() for row in rows], "cpu")
        else:
            found, _ = pretrain.logprobs(model, rows, shape.vocab_size - 8)
        found.sum().backward()

    seen = tracked(model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), step)
    distributed.close()
    assert list(plan.phases()) == ["load", "update"]
    planned = sum(plan.persistent().values()) + max(sum(b.values()) for b in plan.moments().values())
    assert planned == pytest.approx(seen, rel=0.1)


@pytest.mark.slow
def test_so_is_that_of_two_ranks(forks, tmp_path):
    """Where layers are gathered from others and gradients reduced to them."""
    forks.run(f"import tests.test_plan as t; t.two_ranks({str(tmp_path / 'out.json')!r})", ranks=2)
    for planned, seen in json.loads((tmp_path / "out.json").read_text()):
        assert planned == pytest.approx(seen, rel=0.1)


def two_ranks(out: str):
    world = distributed.setup("cpu")
    found = [measured(*CASES[0], recompute, world) for recompute in (False, True)]
    if world.main:
        with open(out, "w") as f:
            json.dump(found, f)
    distributed.close()


class CudaNorm(torch.autograd.Function):
    """What torch's fused rms_norm of CUDA allocates and keeps: input, weight and 1/rms in fp32."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, torch.empty(*x.shape[:-1], 1))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class NoKernel:
    def __getitem__(self, grid):
        return lambda *arguments, **options: None


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Fake tensors that take the code paths of CUDA: bf16 compute, variable-length flash attention (with
    torch's own account of its outputs), fused norms, kernels that allocate nothing."""
    init_device_mesh = dist.init_device_mesh

    def mesh(kind, *arguments, **options):
        with unset_fake_temporarily():
            return init_device_mesh("cpu", *arguments, **options)

    def attention(q, k, v, lengths, cu_seqlens):
        return kernels.attention.varlen()(q, k, v, cu_seqlens, cu_seqlens, max(lengths), max(lengths),
                                          window_size=(-1, 0))

    # Fake tensors have no values: all targets are trained, and all but one have a gradient.
    nonzero = torch.Tensor.nonzero
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda x: torch.arange(
        len(x) - (not torch.is_grad_enabled()))[:, None] if isinstance(x, FakeTensor) else nonzero(x))
    monkeypatch.setattr(FakeTensor, "__int__", lambda x: 0)
    monkeypatch.setattr(dist, "init_device_mesh", mesh)
    monkeypatch.setattr(qwen, "packed_attention", attention)
    monkeypatch.setattr(qwen.RMSNorm, "forward", lambda self, x: CudaNorm.apply(x, self.weight))
    monkeypatch.setattr(backend, "fused", lambda x: True)
    monkeypatch.setattr(kernels.logprob, "row_stats", NoKernel())
    monkeypatch.setattr(kernels.logprob, "row_gradient", NoKernel())
    monkeypatch.setattr(kernels.logprob, "matmul_fp32",
                        lambda a, weight, *_: torch.mm(a, weight.T, out_dtype=torch.float32))
    monkeypatch.setitem(kernels.logprob.CHUNK_BYTES, "cpu", kernels.logprob.CHUNK_BYTES["cuda"])


def fake_backward(model, tokens: int):
    zeros_T = torch.zeros(tokens, dtype=torch.int64)
    batch = grpo.Batch(zeros_T, qwen.packed([tokens // 2] * 2), zeros_T, torch.arange(tokens), None, None, [])
    train.logprobs(model, batch, Config(), model.config.vocab_size - 8)[0].sum().backward()


@pytest.mark.parametrize("rank", [0, 20, 43, 63])
def test_every_rank_holds_padded_gradients(rank, as_on_a_gpu):
    with fake_ranks(rank, 64) as world, FakeTensorMode():
        model = parallel.shard(Qwen2(SMALL), dataclasses.replace(world, device=torch.device("cuda")))
        fake_backward(model, 64)
        bytes_held = held(p.grad.to_local() for p in model.parameters())
    assert bytes_held == plan_of(SMALL, 64).persistent(rank)["gradients, fp32"]


@pytest.mark.parametrize("name, layers, ranks, tokens, recompute", [
    ("Qwen2.5-32B", 4, 64, 16384, True), ("Qwen2.5-32B", 2, 64, 16384, False),
    ("Qwen2.5-7B", 3, 8, 1024, True), ("Qwen2.5-0.5B", 4, 8, 8192, False),
    ("Qwen3-4B", 4, 8, 8192, False), ("Qwen3-32B", 3, 64, 16384, True),
])
def test_the_peak_on_a_gpu_is_that_of_torchs_tracker_over_fake_tensors(name, layers, ranks, tokens, recompute,
                                                                       as_on_a_gpu):
    """Real FSDP2, model and linear_logprob of full width; gradients are seen to the byte. Tied embeddings
    with few tokens are left out: while a tracker looks, autograd adds their gradients into a third tensor."""
    shape = dataclasses.replace(SHAPES[name], num_hidden_layers=layers)
    plan = plan_of(shape, ranks, max_new_tokens=tokens - 512, micro_batch_tokens=tokens, recompute=recompute)
    with fake_ranks(0, ranks) as world, FakeTensorMode():
        model = parallel.shard(Qwen2(shape), dataclasses.replace(world, device=torch.device("cuda")))
        model.recompute = recompute
        fake_backward(model, tokens)
        gradients = held(p.grad.to_local() for p in model.parameters())
        with (tracker := FSDPMemTracker(model)):
            fake_backward(model, tokens)
        (peak, ) = tracker.get_tracker_snapshot("peak").values()
    stays = plan.persistent()
    assert gradients == stays["gradients, fp32"]
    moments = {m: sum(b.values()) for m, b in plan.moments().items() if m != "optimizer"}
    assert max(moments.values()) == pytest.approx(
        peak["Total"] - stays["weights, fp32"] - stays["gradients, fp32"], rel=0.02)


# ---------------------------------------------------------------------- the shipped configs


def shipped(name: str, *options: str) -> Plan:
    return planner.read(["--config", str(ROOT / "configs" / name), *options])[0]


def test_14k_tokens_of_32b_fit_into_80_gb_on_64_gpus():
    """Buffer by buffer, from the arithmetic of its shape: 64 layers, C 5120, M 27648, 1024 of keys, as many
    of values, V 152,064, 16,384 tokens of a micro-batch."""
    plan = shipped("qwen2.5-32b.json", "--nodes", "8", "--gpu_memory", "80")
    assert (plan.ranks, plan.config.tp, plan.longest) == (64, 8, 14512)
    parameters, layer, c = 32_763_876_352, 487_605_248, 16384 * 5120 * 2
    m, head = 16384 * 27648 * 2, 152_064 * 5120 * 2
    norms = 129 * 5120  # whole in every slice of a sampler
    update = {
        "weights, fp32": 4 * parameters // 64, "gradients, fp32": 4 * parameters // 64,
        "AdamW's moments, fp32": 8 * parameters // 64,
        "embedding and head, gathered": 2 * head + 5120 * 2,
        "inputs of the layers": 62 * c + 2 * 16384 * 128 * 4,  # and cos and sin
        "activations of one layer": 6 * c + 16384 * 2048 * 2 + 3 * m + 16384 * (40 * 4 + 8),
        "gradients of activations": c + 3 * m, "layer, gathered": 2 * layer,
        "next layer, in the gathering": 2 * layer, "gradient of a matrix": 5120 * 27648 * 2,
        "layer's gradient, in reduction": 4 * layer, "head's gradient": head,
        "reward model's weights": 2 * 71_460_503_552 // 64,
    }
    got = plan.phases()["update"]
    assert plan.phases()["sample"]["sampler's weights"] == 2 * (parameters - norms) // 8 + 2 * norms
    assert {name: got[name] for name in update} == update
    assert sum(got.values()) == pytest.approx(1.05 * sum(got[name] for name in update), rel=1e-6)
    assert plan.phases()["publish"]["handoff, at most"] == 4 * layer
    for buffers in plan.phases().values():
        assert sum(buffers.values()) + planner.RESERVE["cuda"] < 80e9
    assert plan.page_bytes == 16 * 2 * 64 * 1024 * 2 // 8
    taken = sum(plan.phases()["sample"].values()) + plan.pages * plan.page_bytes
    assert taken + planner.RESERVE["cuda"] < 80 * 2**30
    assert plan.pages // plan.columns >= 100, "sequences of full length at a time"
    assert not plan.lacking()


@pytest.mark.parametrize("name, machine", [("tiny.json", ["--device", "cpu"]),
                                           ("qwen2.5-7b.json", ["--gpus", "8"])])
def test_the_other_configs_fit_where_they_are_for(name, machine):
    assert not shipped(name, *machine).lacking()


# ---------------------------------------------------------------------- what it says


@pytest.mark.parametrize("name, billions", [
    ("Qwen2.5-0.5B", 0.494), ("Qwen2.5-1.5B", 1.544), ("Qwen2.5-3B", 3.086), ("Qwen2.5-7B", 7.616),
    ("Qwen2.5-14B", 14.770), ("Qwen2.5-32B", 32.764), ("Qwen2.5-72B", 72.706), ("Qwen3-0.6B", 0.596),
    ("Qwen3-1.7B", 1.721), ("Qwen3-4B", 4.022), ("Qwen3-8B", 8.191), ("Qwen3-14B", 14.768),
    ("Qwen3-32B", 32.762)])
def test_known_shapes_have_the_parameters_that_their_model_cards_say(name, billions):
    assert SHAPES[name].num_parameters / 1e9 == pytest.approx(billions, abs=5e-4)
    shape, note = planner.find_shape(f"/nowhere/{name}-Instruct")
    assert shape == SHAPES[name] and "there is no folder" in note


def test_a_folder_that_exists_is_read():
    shape, note = planner.find_shape("data/tiny/base")
    assert shape == qwen.read_config(ROOT / "data/tiny/base") and note == ""


@pytest.mark.parametrize("arguments, part", [
    (["--model", "nowhere/Llama-3"], "nowhere/Llama-3 does not exist"), (["--gpus", "-1"], "gpus"),
    (["--nodes", "two"], "nodes"), (["--model", "Qwen2.5-7B", "--tp", "8"], "tp 8"),
    (["--gpus"], "lacks its value"), (["--gpus", "0"], "gpus must be positive, not 0"),
    (["--nodes=0"], "nodes must be"), (["--gpu_memory", "0"], "gpu_memory must be"),
    (["--gpu-memory", "inf"], "gpu_memory must be"), (["--gpu_memry", "80"], "did you mean 'gpu_memory'"),
    (["--temprature", "1"], "did you mean 'temperature'"),
])
def test_what_cannot_be_planned_is_refused_in_a_sentence(arguments, part):
    with pytest.raises((UserError), match=part):
        planner.read(arguments)


def test_what_does_not_fit_is_said_by_phase_with_what_saves_memory_there():
    """An option that is named makes it fit, or needs less memory in that phase."""
    one_node = ["qwen2.5-32b.json", "--nodes", "1", "--reward_model", "http://gpu9:8000/classify"]
    (said,) = shipped(*one_node).lacking()
    assert said == ("update needs 89.5 GiB of 77.0, 12.5 too many: there recompute, offload_activations, "
                    "fewer micro_batch_tokens, offload_optimizer, offload_reward_model and more nodes save "
                    "memory")
    assert not shipped(*one_node, "--offload_optimizer", "true").lacking()
    score, update = shipped(*one_node[:3]).lacking()
    assert score.startswith("score needs 79.1 GiB") and update.startswith("update needs 106.9 GiB")
    offload = ["--offload_optimizer", "true", "--offload_reward_model", "true"]
    assert not shipped(*one_node[:3], *offload).lacking()
    short = shipped("qwen2.5-7b.json", "--gpus", "8")
    short.__dict__["pages"] = 3
    assert short.lacking() == [
        f"the KV pool has 3 pages, the longest sample needs {short.columns + 2}: while sampling tp, "
        "offload_optimizer, offload_reward_model and more nodes save memory"]
    big = dict(max_new_tokens=14_000, prompts_per_step=64)
    plain, saving = (plan_of(SHAPES["Qwen2.5-72B"], ranks, **big | more) for ranks, more in (
        (8, {}), (16, {"tp": 8, "offload_optimizer": True})))
    assert [problem.split()[0] for problem in plain.lacking()] == ["load", "sample", "update", "publish"]
    assert "sample" not in [problem.split()[0] for problem in saving.lacking()]


def test_a_reward_model_is_counted_by_its_folder_or_its_name(monkeypatch):
    """By its config alone; gathered layers and activations only while it scores."""
    options, scorer = ["--gpus", "4", "--offload_reward_model"], qwen.read_config(ROOT / "data/tiny/writing")
    (there, note), (away, _) = (planner.read([*options, x]) for x in ("false", "true"))
    whole = 2 * scorer.num_parameters // 4
    assert note == "" and there.persistent()["reward model's weights"] == whole
    assert away.persistent()["reward model's weights"] == 0 and away.pinned() == 4 * whole
    for plan in (there, away):
        score, load = plan.phases()["score"], sum(plan.phases()["load"].values())
        assert score["reward model's weights"] == whole and sum(score.values()) > load
    for more, size in ((["--reward_model", "Qwen2.5-7B-writing"], 7_070_622_720), (["--reward", "length"], 0),
                       (["--reward_model", "http://gpu9:8000/classify"], 0)):
        plan, note = planner.read([*options, "false", *more])
        assert plan.persistent()["reward model's weights"] == 2 * size // 4
        assert ("score" in plan.phases()) == ("the shape is that of Qwen2.5-7B" in note) == (size > 0)
    with pytest.raises(UserError, match="nowhere does not exist, and its name begins with none of"):
        planner.read([*options, "false", "--reward_model", "nowhere"])


def test_a_job_of_next_tokens_is_planned_by_its_tokens(monkeypatch, capsys):
    """6 flops a parameter and token, and its attention; a job's own default is not to recompute."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # is set for the check of the config
    job = ["--job", "pretrain", "--model", "Qwen2.5-7B", "--row_tokens", "32768", "--gpus", "8"]
    with pytest.raises(SystemExit):
        planner.show(job)
    assert "too many: there recompute, fewer micro_batch_tokens" in capsys.readouterr().out
    planner.show([*job, "--recompute", "true", "--billion_tokens", "2"])
    hours = 2e9 * 4 * SHAPES["Qwen2.5-7B"].flops_per_token(16384) / (0.4 * 989e12) / 8 / 3600
    assert f"2e+09 tokens in rows of 32,768: {hours:,.1f} hours" in capsys.readouterr().out
    with pytest.raises(UserError, match="job must be one of rl, pretrain, sft, train_rm, not 'x'"):
        planner.read([*job, "--job", "x"])


def test_options_change_what_they_are_for():
    base = dict(max_new_tokens=8000, micro_batch_tokens=16384, recompute=True, tp=4)
    plan = plan_of(SHAPES["Qwen2.5-14B"], 16, **base)
    total = {name: sum(b.values()) for name, b in plan.phases().items()}

    def change(**options):
        other = dataclasses.replace(plan, config=dataclasses.replace(plan.config, **options))
        return {name: sum(b.values()) - total[name] for name, b in other.phases().items()}, other

    weights = 4 * plan.numbers()
    more, _ = change(beta=0.1)
    assert more["load"] == weights and more["update"] > 1.05 * weights
    less, other = change(offload_optimizer=True)
    assert less["publish"] == -2 * weights and other.pinned() == 8 * 2 * weights
    less, other = change(offload_activations=True)
    assert less["update"] < 0 and other.pinned() == 8 * 48 * 16384 * 5120 * 2
    more, _ = change(replicate=2)
    assert more["load"] == weights, "shards twice as large"


def test_the_scheduler_gives_way_where_the_pool_is_short():
    roomy = plan_of(SHAPES["Qwen2.5-0.5B"], 8, max_new_tokens=2000, max_sequences=8)
    assert roomy.rehearse(True)["preemptions"] == roomy.rehearse(True)["again"] == 0
    short = dataclasses.replace(roomy)
    short.__dict__["pages"] = roomy.columns + 2
    found = short.rehearse(True)
    assert found["preemptions"] > 0 and found["again"] > 0
    assert found["seconds"] > roomy.rehearse(True)["seconds"]


def test_the_command_line_prints_it(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # is set for the check of the config
    for nodes, code in (("8", None), ("1", 1)):
        config = str(ROOT / "configs" / "qwen2.5-32b.json")
        monkeypatch.setattr(sys, "argv", ["plan", "--config", config, f"--nodes={nodes}"])
        if code:
            with pytest.raises(SystemExit, match=str(code)):
                planner.main()
        else:
            planner.main()
    said = capsys.readouterr().out
    assert "32,763,876,352 parameters (there is no folder Qwen2.5-32B" in said and "\nIt fits." in said
    assert "\nIt does not fit: update needs 106.9 GiB of 77.0, 29.9 too many" in said
    assert "assumed" in said
    line = next(line for line in said.splitlines() if line.startswith("all 150 steps: "))
    numbers = [float(word.replace(",", "")) for word in line.split() if word[0].isdigit()][1:]
    assert 20 < numbers[0] < numbers[1] < 48
    assert numbers[2:] == pytest.approx([64 * hours for hours in numbers[:2]], rel=0.01)


def test_the_config_is_checked_for_the_machine_that_is_planned(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(sys, "argv", ["plan", "--gpus", "3"])
    with pytest.raises(SystemExit, match="2"):
        planner.main()
    assert "does not divide by 3 ranks" in capsys.readouterr().err
