"""The sampler's form of a model: fused linear layers, packed weights on a CPU, tensor-parallel slices.

The model keeps the parameters and names of model.py; `fuse_linears_` changes only how its linear layers are
computed.
"""

from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from lib.options import UserError
from model import ModelConfig, Qwen2, RMSNorm


class FusedLinear:
    """Several linear layers of one input as a single matrix product; returns one output for each.

    The layers' parameters become slices of `weight` and `bias`, so writing to them updates the fused layer.
    """
    def __init__(self, *layers: nn.Linear):
        self.layers, self.sizes = layers, [layer.out_features for layer in layers]
        self.weight, self.bias, self.packed = layers[0].weight.data, layers[0].bias, None
        if self.bias is not None:
            self.bias = torch.cat([layer.bias.data for layer in layers])
            for layer, part in zip(layers, self.bias.split(self.sizes)):
                layer.bias.data = part
        if len(layers) > 1:
            self.weight = torch.cat([layer.weight.data for layer in layers])
            for layer, part in zip(layers, self.weight.split(self.sizes)):
                layer.weight.data = part

    def holds(self) -> bool:
        """Whether the layers' parameters still are its slices; after model.to(...) they are not."""
        return self.weight.data_ptr() == self.layers[0].weight.data_ptr()

    def __call__(self, x: torch.Tensor):
        if torch.is_grad_enabled():  # keeps the model trainable
            parts = tuple(layer(x) for layer in self.layers)
            return parts if len(parts) > 1 else parts[0]
        y = (self.packed or F.linear)(x, self.weight, self.bias)
        return y.split_with_sizes(self.sizes, -1) if len(self.sizes) > 1 else y


def fused_linears(layer) -> tuple:
    """The four linear functions of a layer; FusedLinear objects after `fuse_linears_`."""
    return layer.self_attn.qkv, layer.self_attn.out, layer.mlp.gate_up, layer.mlp.down


@torch.inference_mode(False)  # the parameters' new storage is to be trained too
@torch.no_grad()
def fuse_linears_(model: Qwen2):
    """Fuses linear layers that read the same input. On a CPU the weights are packed too: until the next call,
    a forward without gradients uses the weights as they are now."""
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        if not (isinstance(attention.qkv, FusedLinear) and attention.qkv.holds()):
            attention.qkv = FusedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
            attention.out = FusedLinear(attention.o_proj)
            mlp.gate_up = FusedLinear(mlp.gate_proj, mlp.up_proj)
            mlp.down = FusedLinear(mlp.down_proj)
        for product in fused_linears(layer):
            product.packed = pack(product.weight)
    if model.layers and not model.head_weight.is_cuda:
        for norm in (x for x in model.modules() if isinstance(x, RMSNorm)):
            norm.forward = short_norm(norm)


@contextmanager
def released(model: Qwen2):
    """Context manager that frees the memory of the weights and allocates it again on exit, uninitialised."""
    for layer in model.layers:
        for product in fused_linears(layer):
            if isinstance(product, FusedLinear):
                product.packed = None
    storages = {s.data_ptr(): s for s in (p.untyped_storage() for p in model.parameters())}.values()
    sizes = [(s, s.nbytes()) for s in storages if s.nbytes()]
    for s, _ in sizes:
        s.resize_(0)
    try:
        yield
    finally:
        for s, size in sizes:
            s.resize_(size)


def short_norm(norm: RMSNorm):
    """RMSNorm in four operations. On a CPU torch's takes nine, and few rows cost per operation, not per
    byte."""
    size, floor = len(norm.weight), torch.tensor((len(norm.weight) * norm.eps)**0.5)
    weight = norm.weight.detach().float() * size**0.5

    def forward(x):
        if torch.is_grad_enabled():
            return RMSNorm.forward(norm, x)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return (x / torch.hypot(length, floor) * weight).to(x.dtype)

    return forward


# ---------------------------------------------------------------------- packed weights


def pack(weight: torch.Tensor):
    """A replacement of F.linear that uses a copy of the weight in the layout that MKL (fp32) or oneDNN reads
    fastest for few rows; None without either library. In fp32 a row's result does not depend on the number of
    rows, from four on."""
    if weight.device.type != "cpu":
        return None
    weight = weight.contiguous()
    if weight.dtype == torch.float32 and mkl_packs():
        return mkl_product(weight)
    mkldnn = torch.backends.mkldnn
    if not (mkldnn.is_available() and mkldnn.enabled):
        return None
    if weight.dtype != torch.float32 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
    return lambda x, _, bias=None: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def mkl_product(weight: torch.Tensor):
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, 32)
    return lambda x, _, bias=None: torch.ops.mkl._mkl_linear(x, packed, weight, bias, x.shape[0])


@cache
def mkl_packs() -> bool:
    """Whether MKL is available and a weight packed for 32 rows gives right results for other numbers of rows,
    which its manual does not promise."""
    if not torch.backends.mkl.is_available():
        return False
    weight, x = torch.linspace(-1, 1, 320 * 640).sin().view(320, 640), torch.linspace(-1, 1, 640).cos()
    product = mkl_product(weight)
    return all(torch.allclose(product(rows, None), rows @ weight.T, atol=1e-3)
               for rows in (x.expand(n, -1) * torch.arange(1, n + 1)[:, None] / n for n in (4, 100)))


def pack_head(weight: torch.Tensor):
    """A function from hidden states to fp32 logits, or None where a plain product is used. A bf16 weight is
    converted to fp32, because oneDNN rounds the result of a bf16 product to bf16."""
    product = pack(weight.float()) if weight.device.type == "cpu" else None
    return product and (lambda x: product(x.float(), None))


# ---------------------------------------------------------------------- tensor parallelism


def check_tp(config: ModelConfig, tp: int):
    """Raises UserError if a model cannot be split over tp ranks."""
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        if getattr(config, name) % tp:
            raise UserError(f"tp {tp} does not divide the model's {name} of {getattr(config, name)}: "
                            "choose one that does")


def tp_dim(name: str) -> int | None:
    """The dimension along which a parameter is split (Megatron-LM): 0 for column-parallel layers and the
    vocabulary, 1 for row-parallel ones, None for norms, which are not split."""
    return None if "norm" in name else 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0


def tp_slice(name: str, parameter: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    """A rank's slice of a parameter."""
    dim = tp_dim(name)
    return parameter if tp == 1 or dim is None else parameter.chunk(tp, dim)[rank]
