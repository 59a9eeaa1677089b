"""Qwen2.5 (0.5B to 72B) and dense Qwen3 (0.6B to 32B): one definition for training, sampling and scoring, and
their Hugging Face checkpoints.

Shapes: T packed tokens, H query heads, K key/value heads, D head dim, C hidden, V vocabulary, S sequences.
Under tensor parallelism H, K and V are those of one rank.

`forward` sees only a flat row of tokens. How those tokens attend to each other is the business of the
attention plan that is passed in: `packed(lengths)` for whole sequences laid end to end (training), or the
sampler's paged plan. A plan has `positions_T` and is called as `plan(layer, q_THD, k_TKD, v_TKD, cos, sin)`,
with q and k as they come out of their projections and norms, and returns out_THD: to rotate them is the
plan's business too, because the sampler does it while it writes its pages.

Left out on purpose: dropout, sliding windows (no checkpoint of these uses them) and padding. The model
returns hidden states, never logits: the LM head belongs to `kernels.linear_logprob` and to the sampler, which
know how to avoid T x V tensors.
"""

import json
import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from kernels.attention import packed_attention, rotate
from lib.options import Field, UserError, read_json, shown, typed
from lib.weights import check_finite, open_weights, plan_files, weight_files, write_file, write_index

SCORER = "ForSequenceClassification"  # ends a name in config.json's `architectures`: a RewardModel
DTYPES = ("F64", "F32", "BF16", "F16")  # that safetensors' headers may give weights


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_scaling: dict | None = None  # None or YaRN: {"rope_type": "yarn", "factor": ..., ...}
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    head_dim: int = 0  # D; 0: hidden_size / num_attention_heads
    qk_norm: bool = False  # Qwen3: RMSNorm of each head's queries and keys, and no bias on q, k and v
    scalar_head: bool = False  # a RewardModel: one score a sequence in the place of the LM head

    def __post_init__(self):
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @property
    def query_size(self) -> int:
        """H D: numbers in a token's queries, and in attention's output."""
        return self.num_attention_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Parameters, the embedding counted once when tied, or with a scalar head."""
        c, q, kv = self.hidden_size, self.query_size, self.num_key_value_heads * self.head_dim
        attention = 2 * c * (q + kv) + (2 * self.head_dim if self.qk_norm else q + 2 * kv)
        layer = attention + 3 * c * self.intermediate_size + 2 * c
        head = c if self.scalar_head else 0 if self.tie_word_embeddings else self.vocab_size * c
        return self.num_hidden_layers * layer + c + self.vocab_size * c + head

    def flops_per_token(self, context: int = 0) -> int:
        """Forward flops of one token that attends to `context` tokens, LM head included; a training step
        costs three times that.

        Two per multiply-add on matrix weights (the embedding look-up is free), and 4 H D context for scores
        and values.
        """
        c, q, kv = self.hidden_size, self.query_size, self.num_key_value_heads * self.head_dim
        matrices = self.num_hidden_layers * (2 * c * (q + kv) + 3 * c * self.intermediate_size)
        head = 0 if self.scalar_head else self.vocab_size * c
        return 2 * (matrices + head) + 4 * self.num_hidden_layers * q * context

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values that one token keeps in the cache, over all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * dtype.itemsize


# ---------------------------------------------------------------------- rotary embedding


def rope_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Angular frequencies, fp32 of shape (D/2,), and the factor on cos and sin.

    Plain RoPE (arXiv 2104.09864), or YaRN (arXiv 2309.00071, section 3.4): low frequencies are interpolated
    by `factor`, high ones kept, with a linear ramp between the dimensions that turn `beta_fast` and
    `beta_slow` times in the original context.
    """
    dim, theta = config.head_dim, config.rope_theta
    plain = 1.0 / theta**(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    scaling = config.rope_scaling
    if scaling is None:
        return plain, 1.0
    factor = float(scaling["factor"])
    original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings

    def turning(turns):  # the dimension index whose wave turns so many times within the original context
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turning(scaling.get("beta_fast") or 32), turning(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
    magnitude = scaling.get("attention_factor") or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return plain / factor * ramp + plain * (1 - ramp), float(magnitude)


# ---------------------------------------------------------------------- attention plan


class Packed:
    """Causal attention inside each of several whole sequences that lie end to end."""
    def __init__(self, lengths: list[int], device="cpu"):
        if not lengths or min(lengths) < 1:
            raise ValueError(f"packed: every sequence needs at least one token, got lengths {lengths}")
        self.lengths = list(lengths)
        self.positions_T = torch.cat([torch.arange(n, device=device) for n in lengths])
        self.cu_seqlens = F.pad(
            torch.tensor(lengths, device=device, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))

    def __call__(self, layer: int, q_THD, k_TKD, v_TKD, cos_T1D, sin_T1D):
        q_THD, k_TKD = rotate(q_THD, k_TKD, cos_T1D, sin_T1D)
        return packed_attention(q_THD, k_TKD, v_TKD, self.lengths, self.cu_seqlens)


def tied_embedding(tokens_T: torch.Tensor, weight_VC: torch.Tensor) -> torch.Tensor:
    """The look-up, whose gradient goes into that of the head, there before it: autograd would make a second
    matrix of V rows and add the two. Not for bf16, in which a frequent token's sum would lose its small
    parts, nor for CUDA, where index_add_ has no fixed order."""
    def add_(gradient_TC: torch.Tensor):
        if weight_VC.grad is None:  # the loss does not come from the head
            weight_VC.grad = torch.zeros_like(weight_VC)
        weight_VC.grad.index_add_(0, tokens_T, gradient_TC)

    x_TC = F.embedding(tokens_T, weight_VC.detach()).requires_grad_()
    x_TC.register_hook(add_)
    return x_TC


def packed(lengths: list[int], device="cpu") -> Packed:
    """The plan for sequences of the given lengths, laid end to end in this order."""
    return Packed(lengths, device)


# ---------------------------------------------------------------------- layers


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # in fp32 inside, whatever x is


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, tp: int):
        super().__init__()
        c, d = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads // tp, config.num_key_value_heads // tp
        self.layer, self.head_dim = layer, d
        self.q_proj = nn.Linear(c, heads * d, bias=not config.qk_norm)
        self.k_proj = nn.Linear(c, kv_heads * d, bias=not config.qk_norm)
        self.v_proj = nn.Linear(c, kv_heads * d, bias=not config.qk_norm)
        self.o_proj = nn.Linear(heads * d, c, bias=False)
        self.q_norm, self.k_norm = (
            RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in range(2))

    def qkv(self, x_TC):  # the sampler puts one product in the place of these, see replica.py
        return self.q_proj(x_TC), self.k_proj(x_TC), self.v_proj(x_TC)

    def out(self, x):
        return self.o_proj(x)

    def forward(self, x_TC, cos, sin, attention):
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in self.qkv(x_TC))
        return self.out(attention(self.layer, self.q_norm(q), self.k_norm(k), v, cos, sin).flatten(1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, tp: int):
        super().__init__()
        c, m = config.hidden_size, config.intermediate_size // tp
        self.gate_proj = nn.Linear(c, m, bias=False)
        self.up_proj = nn.Linear(c, m, bias=False)
        self.down_proj = nn.Linear(m, c, bias=False)

    def gate_up(self, x):  # likewise
        return self.gate_proj(x), self.up_proj(x)

    def down(self, x):
        return self.down_proj(x)

    def forward(self, x):
        gate, up = self.gate_up(x)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, group=None, tp: int = 1):
        super().__init__()
        self.group = group
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, tp)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, tp)

    def forward(self, x_TC, cos, sin, attention):
        x_TC = x_TC + summed(self.self_attn(self.input_layernorm(x_TC), cos, sin, attention), self.group)
        return x_TC + summed(self.mlp(self.post_attention_layernorm(x_TC)), self.group)


def summed(x: torch.Tensor, group) -> torch.Tensor:
    """The sum over the ranks of a tensor-parallel group, in place: each holds a part of it."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


class Qwen2(nn.Module):
    """The decoder. Parameter names equal those of the Hugging Face checkpoint, so nothing is ever renamed.

    group: ranks that share the model by tensor parallelism (Megatron-LM, arXiv 1909.08053), for inference:
        each holds 1/tp of the heads, of the MLP's columns and of the vocabulary, as `replica.tp_slice` says,
        and two sums a layer put them together.
    """
    def __init__(self, config: ModelConfig, group=None):
        super().__init__()
        self.config, self.group = config, group
        self.tp, self.tp_rank = 1, 0
        if group is not None:
            self.tp, self.tp_rank = dist.get_world_size(group), dist.get_rank(group)
        self.recompute = False  # True: each layer's activations are recomputed in backward
        self.offload_activations = False  # True: what recomputing starts from waits in host memory
        self.rope = None  # `rope_frequencies`, once they are on the device of the tokens
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size // self.tp, config.hidden_size),
            "layers": nn.ModuleList(Layer(config, i, group, self.tp)
                                    for i in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        if not (config.tie_word_embeddings or config.scalar_head):
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size // self.tp, bias=False)

    @property
    def layers(self) -> nn.ModuleList:
        return self.model["layers"]

    @property
    def head_weight(self) -> torch.Tensor:
        """weight_VC of the LM head, tied or not: hidden @ head_weight.T are the logits (of this rank's part
        of the vocabulary). Under FSDP valid after forward."""
        return self.model["embed_tokens"].weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, tokens_T: torch.Tensor, attention) -> torch.Tensor:
        """Hidden states (T, C) after the final norm, for tokens laid out as `attention` says."""
        if self.rope is None or self.rope[0].device != tokens_T.device:
            frequencies, magnitude = rope_frequencies(self.config)
            self.rope = frequencies.to(tokens_T.device), magnitude
        frequencies, magnitude = self.rope
        angles = attention.positions_T[:, None].float() * frequencies
        cos = (magnitude * torch.cat((angles.cos(), angles.cos()), dim=-1))[:, None]
        sin = (magnitude * torch.cat((-angles.sin(), angles.sin()), dim=-1))[:, None]
        x_TC = self.embed(tokens_T)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                # x alone is an argument: cos and sin, which all layers share, need not be saved by each
                run = partial(layer, cos=cos, sin=sin, attention=attention)
                with save_on_cpu(pin_memory=True) if self.offload_activations else nullcontext():
                    x_TC = checkpoint(run, x_TC, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TC = layer(x_TC, cos, sin, attention)
        return self.model["norm"](x_TC)

    def embed(self, tokens_T: torch.Tensor) -> torch.Tensor:
        embedding = self.model["embed_tokens"]
        if self.group is None:
            trained = embedding.weight.requires_grad and torch.is_grad_enabled()
            tied = self.config.tie_word_embeddings and embedding.weight.dtype == torch.float32
            if trained and tied and not tokens_T.is_cuda:
                return tied_embedding(tokens_T, embedding.weight)
            return embedding(tokens_T)
        rows = len(embedding.weight)
        local_T = tokens_T - self.tp_rank * rows
        mine_T = (local_T >= 0) & (local_T < rows)
        return summed(embedding(local_T.where(mine_T, 0)) * mine_T[:, None], self.group)

    @torch.no_grad()
    def init_weights_(self, seed: int):
        """Fresh weights for pretraining: N(0, initializer_range), the two projections into the residual
        stream scaled by 1/sqrt(2 L)."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() < 2:
                p.fill_(1.0 if "norm" in name else 0.0)
                continue
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = (2 * self.config.num_hidden_layers)**-0.5 if residual else 1.0
            p.copy_(torch.randn(p.shape, generator=generator) * self.config.initializer_range * scale)
        return self


class RewardModel(Qwen2):
    """The decoder with a scalar head, Hugging Face's Qwen2- or Qwen3ForSequenceClassification, one label."""
    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, tokens_T: torch.Tensor, attention: Packed) -> torch.Tensor:
        """score_S in fp32: one a sequence, at its last token."""
        last_S = attention.cu_seqlens[1:].long() - 1
        hidden_SC = super().forward(tokens_T, attention)[last_S]
        return hidden_SC.float() @ self.score.weight[0].float()


def build(config: ModelConfig) -> Qwen2:
    """The model that a config describes, its weights not set."""
    return RewardModel(config) if config.scalar_head else Qwen2(config)


# ---------------------------------------------------------------------- config.json

FIELDS = {
    "vocab_size": Field(int, 1, 2**24), "hidden_size": Field(int, 1, 2**17),
    "intermediate_size": Field(int, 1, 2**20), "num_hidden_layers": Field(int, 1, 1000),
    "num_attention_heads": Field(int, 1, 2**10), "num_key_value_heads": Field(int, 1, 2**10, None),
    "max_position_embeddings": Field(int, 1, 2**24, ModelConfig.max_position_embeddings),
    "rms_norm_eps": Field(float, 1e-12, 1, ModelConfig.rms_norm_eps),
    "rope_theta": Field(float, 2, 1e12, 1e4),  # what transformers takes where it is missing
    "tie_word_embeddings": Field(bool, default=ModelConfig.tie_word_embeddings),
    "initializer_range": Field(float, 0, 1, ModelConfig.initializer_range),
    "head_dim": Field(int, 0, 2**13, 0), "qk_norm": Field(bool, default=False)}
YARN = {
    "factor": Field(float, 1, 1e6), "original_max_position_embeddings": Field(int, 1, 2**24, None),
    "attention_factor": Field(float, 1e-3, 1e3, None), "beta_fast": Field(float, 1e-3, 1e6, None),
    "beta_slow": Field(float, 1e-3, 1e6, None), "truncate": Field(bool, default=None)}


def read_config(path: str | Path) -> ModelConfig:
    """`parse_config` of a checkpoint's config.json."""
    file = Path(path) / "config.json"
    return parse_config(file, read_json(
        file, "`model` must be a folder with config.json and safetensors weights, as downloaded"))


def parse_config(file: str | Path, raw: dict) -> ModelConfig:
    """The shape in a config.json of either generation (rope at top level, or inside `rope_parameters`).

    Raises UserError, which names the file, for another architecture, a value out of its range, or a feature
    that neither Qwen2.5 nor dense Qwen3 has.
    """
    kind = raw.get("model_type")
    if kind not in ("qwen2", "qwen3"):
        raise UserError(f"{file}: model_type {shown(kind)} is not supported, only 'qwen2' (Qwen2, Qwen2.5) "
                        "and 'qwen3' (Qwen3, dense) are")
    if raw.get("use_sliding_window") or raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{file}: use_sliding_window and activations other than silu are not supported")
    rope, scaling, architectures = typed(raw, file, {
        "rope_parameters": Field(dict, default={}), "rope_scaling": Field(dict, default={}),
        "architectures": Field(list, default=[])}).values()
    scaling = scaling or rope
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in ("default", "yarn"):
        raise UserError(
            f"{file}: rope type {shown(rope_type)} is not supported, only 'default' and 'yarn' are")
    given = {k for k, v in scaling.items() if v is not None} - {"rope_type", "type", "rope_theta"}
    if rope_type == "yarn" and (unknown := sorted(given - YARN.keys())):
        raise UserError(f"{file}: YaRN's {shown(', '.join(unknown))} is not supported")
    yarn = typed(scaling, f"{file}: YaRN", YARN) if rope_type == "yarn" else {}
    qwen3 = kind == "qwen3"
    values = typed({"head_dim": 128 * qwen3} | raw | {  # 128: what transformers takes where it is missing
        "qk_norm": qwen3, "rope_theta": rope.get("rope_theta", raw.get("rope_theta"))}, file, FIELDS)
    values["num_key_value_heads"] = values["num_key_value_heads"] or values["num_attention_heads"]
    config = ModelConfig(
        **values, scalar_head=any(str(name).endswith(SCORER) for name in architectures),
        rope_scaling={k: yarn[k] for k in yarn if k in given} | {"rope_type": "yarn"} if yarn else None)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads or config.head_dim % 2 or not values["head_dim"] and config.hidden_size % heads:
        raise UserError(f"{file}: hidden_size {config.hidden_size}, num_attention_heads {heads} and "
                        f"num_key_value_heads {kv_heads} do not divide each other, or a head's size is odd")
    return config


def write_config(config: ModelConfig, path: str | Path, dtype: torch.dtype):
    """Writes config.json of the older generation, which every reader understands."""
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__
              if name not in ("rope_scaling", "scalar_head", "qk_norm")}
    family = "Qwen3" if config.qk_norm else "Qwen2"
    out = {
        "architectures": [family + (SCORER if config.scalar_head else "ForCausalLM")],
        "model_type": family.lower(), "hidden_act": "silu", "attention_bias": not config.qk_norm,
        "attention_dropout": 0.0, "use_sliding_window": False, "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."), **fields
    }
    if config.rope_scaling:
        out["rope_scaling"] = {**config.rope_scaling, "type": "yarn"}
    if config.scalar_head:  # transformers counts labels here, and would take two; a pad_token_id that is the
        out["id2label"] = {"0": "score"}  # end of text would make it score the token before the end
    (Path(path) / "config.json").write_text(json.dumps(out, indent=2) + "\n")


# ---------------------------------------------------------------------- weights


def check_tensors(config: ModelConfig, path: str | Path) -> dict[str, Path]:
    """Compares names and shapes in the files with the model's, reading headers only. Returns name -> file;
    raises UserError."""
    files = weight_files(path)
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in build(config).named_parameters()}
    found, problems = {}, []
    for file in sorted(set(files.values())):
        with open_weights(file) as f:  # what the index places elsewhere, or nowhere, is not read
            parts = {name: f.get_slice(name) for name in f.keys() if files.get(name) == file}
            found |= {name: tuple(part.get_shape()) for name, part in parts.items()}
            problems += [f"{name} has dtype {part.get_dtype()}, not one of {', '.join(DTYPES)}"
                         for name, part in parts.items() if part.get_dtype() not in DTYPES]
    tied = ("lm_head.weight", "model.embed_tokens.weight")
    if config.tie_word_embeddings and all(found.get(n) == expected[tied[1]] for n in tied):  # written twice
        del found["lm_head.weight"]
        head, embedding = (open_weights(files[name]).get_slice(name) for name in tied)
        if any(not torch.equal(head[i:i + 4096], embedding[i:i + 4096])
               for i in range(0, config.vocab_size, 4096)):
            raise UserError(f"{path} says tie_word_embeddings, but its lm_head.weight differs from the "
                            "embedding: set tie_word_embeddings to false in config.json")
        del files["lm_head.weight"]
    problems += [f"missing {n}" for n in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected {n}" for n in sorted(found.keys() - expected.keys())]
    problems += [
        f"{n} has shape {found[n]}, not {expected[n]}" for n in sorted(expected.keys() & found.keys())
        if expected[n] != found[n]
    ]
    if problems:
        more = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
        index = Path(path) / "model.safetensors.index.json"
        where = f"{index}, with the files it names," if index.exists() else path
        raise UserError(f"{where} does not fit config.json: " + "; ".join(problems[:20]) + more)
    return files


def load(path: str | Path, dtype: torch.dtype = torch.float32, device="cpu") -> Qwen2:
    """Reads a Hugging Face checkpoint folder. Raises UserError, listing missing, unexpected and
    misshaped tensors."""
    config = read_config(path)
    files = check_tensors(config, path)
    with torch.device("meta"):
        model = build(config).to(dtype)
    model.to_empty(device=device)
    for name, p in model.named_parameters():
        with safe_open(files[name], framework="pt") as f, torch.no_grad():
            check_finite(p.copy_(f.get_tensor(name)), name, files[name])
    return model


def save(model: Qwen2, path: str | Path, max_shard_bytes: int = 5 * 2**30):
    """Writes a Hugging Face checkpoint folder: config.json and one safetensors file, or several with an
    index."""
    dtype, parameters = next(model.parameters()).dtype, dict(model.named_parameters())
    files = plan_files(model, dtype.itemsize, max_shard_bytes)
    for file, names in files.items():
        write_file({name: parameters[name].detach().contiguous() for name in names}, Path(path) / file)
    write_index(model, path, dtype, files)
    write_config(model.config, path, dtype)
