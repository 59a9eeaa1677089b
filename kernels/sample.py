"""Drawing tokens from an LM head: one hashed uniform per draw, and inverse CDF over vocabulary tiles.

Shapes: S rows, C hidden, V vocabulary, N tiles of `TILE` ids.

The rule is the same on any device and for any split of the vocabulary: weights exp(z - max z) are summed per
tile of `TILE` ids, prefix sums run in fp64, the tile that holds u * total is found, then the id inside it.
One number per draw instead of Gumbel's V makes it cheap, and keying that number by (request seed, sample,
position) makes a sample independent of its neighbours, batch and rank.

On a GPU no logits exist in memory: `head_tiles` streams the head's weight once and leaves two numbers a tile,
`pick` finds the tile and computes its TILE logits again. Two devices, or two splits, draw different ids only
where u * total lies within rounding of an id's edge.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from kernels import backend
from kernels.backend import tl, triton
from kernels.logprob import matmul_fp32

TILE = 64
GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # splitmix64's increment, as a signed 64-bit number


# ---------------------------------------------------------------------- uniforms


def mix64(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser (Steele, Lea, Flood, OOPSLA 2014) on int64; products wrap, shifts are made
    logical by masks."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))


def streams(seeds_S: torch.Tensor, samples_S: torch.Tensor) -> torch.Tensor:
    """The key of each sample's sequence of draws; int64 in, int64 out."""
    return mix64(mix64(seeds_S) + GOLDEN * (samples_S + 1))


def uniforms(streams_S: torch.Tensor, positions_S: torch.Tensor) -> torch.Tensor:
    """fp64 in (0, 1), one for each (stream, completion position)."""
    bits = (mix64(streams_S + GOLDEN * (positions_S + 1)) >> 12) & (2**52 - 1)
    return (bits.double() + 0.5) * 2.0**-52


# ---------------------------------------------------------------------- from logits


def keep_top(weights_SV: torch.Tensor, top_p_S: torch.Tensor, top_k_S: torch.Tensor) -> torch.Tensor:
    """Zeroes all but the top_k_S largest weights (0: all), and of those all but the fewest that reach top_p_S
    of their sum."""
    ranked, ids = weights_SV.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ranked.shape[-1], device=ranked.device)
    ranked = ranked.masked_fill((top_k_S[:, None] > 0) & (rank >= top_k_S[:, None]), 0)
    before = ranked.double().cumsum(-1) - ranked
    ranked = ranked.masked_fill(
        before >= top_p_S[:, None].double() * ranked.sum(-1, keepdim=True, dtype=torch.float64), 0)
    return torch.zeros_like(weights_SV).scatter_(-1, ids, ranked)


def inverse_cdf(weights_SV: torch.Tensor, uniform_S: torch.Tensor) -> torch.Tensor:
    """The id at which the running sum of each row passes uniform * total; never an id of weight 0. V must be
    a multiple of TILE."""
    tiles = weights_SV.unflatten(-1, (-1, TILE))
    return pick_id(tiles, tile_cdf(tiles), uniform_S)


def tile_cdf(tiles_SNW: torch.Tensor) -> torch.Tensor:
    return tiles_SNW.sum(-1).double().cumsum(-1)  # a tile's own sum in fp32: 64 terms


def pick_id(tiles_SNW: torch.Tensor, cdf_SN: torch.Tensor, uniform_S: torch.Tensor) -> torch.Tensor:
    target = uniform_S * cdf_SN[:, -1]
    tile = (cdf_SN <= target[:, None]).sum(-1).clamp_(max=cdf_SN.shape[1] - 1)
    rows = torch.arange(len(tile), device=tile.device)
    weight = tiles_SNW[rows, tile]
    rest = target - F.pad(cdf_SN, (1, 0))[rows, tile]
    inside = (weight.double().cumsum(-1) <= rest[:, None]).sum(-1)
    last = TILE - 1 - (weight > 0).flip(-1).int().argmax(-1)  # rounding must not step past the mass
    return tile * TILE + torch.minimum(inside, last)


def draw(logits_SV: torch.Tensor, uniform_S: torch.Tensor, temperature_S: torch.Tensor,
         top_p_S: torch.Tensor | None = None,
         top_k_S: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their log-probabilities for fp32 logits.

    Temperature 0 is greedy. The log-probability is that under the full softmax at the sampling temperature
    (greedy: at 1), whatever top-p and top-k leave. top_p_S and top_k_S come together or not at all.
    """
    return draw_(logits_SV.clone(), uniform_S, temperature_S, top_p_S, top_k_S)


def whole_tiles(ids: int) -> int:
    """Rows of a head that end with a tile: a head that is padded so far saves `draw_` a copy."""
    return -(-ids // TILE) * TILE


def draw_(z: torch.Tensor, uniform_S, temperature_S, top_p_S=None, top_k_S=None):
    """`draw` in the memory of its logits: fresh pages for a batch's logits cost a CPU more than its sums."""
    greedy_S = temperature_S == 0
    z.div_(torch.where(greedy_S, 1.0, temperature_S)[:, None])
    if z.shape[1] % TILE:
        z = F.pad(z, (0, -z.shape[1] % TILE), value=-torch.inf)
    tiles = z.unflatten(-1, (-1, TILE))
    peak_SN = tiles.amax(-1)  # on a CPU a hundred times faster than max, which finds the place too
    peak_S1 = peak_SN.amax(-1, keepdim=True)
    highest = (peak_SN == peak_S1).int().argmax(-1)
    rows = torch.arange(len(z), device=z.device)
    best = highest * TILE + (tiles[rows, highest] == peak_S1).int().argmax(-1)
    z.sub_(peak_S1).exp_()  # now the weights
    cdf_SN = tile_cdf(tiles)
    drawn = pick_id(tiles, cdf_SN, uniform_S) if top_p_S is None else inverse_cdf(
        keep_top(z, top_p_S, top_k_S), uniform_S)
    token_S = torch.where(greedy_S, best, drawn)
    return token_S, z[rows, token_S].log() - cdf_SN[:, -1].log().float()


# ---------------------------------------------------------------------- from the hidden state


def head_draw(hidden_SC: torch.Tensor, weight_VC: torch.Tensor, n_valid: int, uniform_S: torch.Tensor,
              temperature_S: torch.Tensor, top_p_S: torch.Tensor | None = None,
              top_k_S: torch.Tensor | None = None, group=None,
              product=matmul_fp32) -> tuple[torch.Tensor, torch.Tensor]:
    """`draw` from logits hidden @ weight.T of the first n_valid ids.

    product: computes fp32 logits where no kernel does.

    group: ranks that share a vocabulary-parallel head. weight_VC is then this rank's slice, of the same size
    on each, laid end to end in rank order; every rank passes the same rows and gets the same draws.
    """
    size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    if top_p_S is not None or not backend.fused(hidden_SC):
        end = whole_tiles(n_valid)
        logits_SV = gathered(product(hidden_SC, weight_VC if size > 1 else weight_VC[:end]), size, group)
        logits_SV[:, n_valid:] = -torch.inf
        return draw_(logits_SV[:, :end], uniform_S, temperature_S, top_p_S, top_k_S)
    assert hidden_SC.stride(1) == weight_VC.stride(1) == 1
    uniform_S, temperature_S = uniform_S.contiguous(), temperature_S.contiguous()
    columns = min(max(n_valid - rank * len(weight_VC), 0), len(weight_VC))
    tiles = triton.cdiv(len(weight_VC), TILE)
    peak_SN, mass_SN = (gathered(x, size, group) for x in measure_tiles(hidden_SC, weight_VC, columns,
                                                                       temperature_S, tiles))
    rows, width = hidden_SC.shape
    token_S = torch.empty(rows, dtype=torch.int64, device=hidden_SC.device)
    logp_S = torch.empty(rows, device=hidden_SC.device)
    pick[(rows, )](hidden_SC, hidden_SC.stride(0), weight_VC, weight_VC.stride(0), width, columns, peak_SN,
                   mass_SN, peak_SN.shape[1], rank * tiles, tiles, rank * len(weight_VC), uniform_S,
                   temperature_S, token_S, logp_S, TILE=TILE,
                   BLOCK_TILES=triton.next_power_of_2(peak_SN.shape[1]),
                   **backend.blocks("pick", hidden_SC.dtype, width))
    if group is not None:  # all but the rank that holds the tile left zeros
        dist.all_reduce(token_S, group=group)
        dist.all_reduce(logp_S, group=group)
    return token_S, logp_S


def gathered(x_SN: torch.Tensor, size: int, group) -> torch.Tensor:
    """The columns of all ranks of a group, end to end."""
    if group is None:
        return x_SN
    parts = [torch.empty_like(x_SN) for _ in range(size)]
    dist.all_gather(parts, x_SN.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def measure_tiles(hidden_SC, weight_VC, columns, temperature_S, tiles):
    """Of each tile of logits over temperature z: peak_SN = max z and mass_SN = sum exp(z - peak)."""
    rows, width = hidden_SC.shape
    size = backend.blocks("head_tiles", hidden_SC.dtype, rows)
    block_rows = min(128, max(16, triton.next_power_of_2(rows)))
    peak_SN, mass_SN = (torch.empty(rows, tiles, device=hidden_SC.device) for _ in range(2))
    grid = triton.cdiv(rows, block_rows), triton.cdiv(tiles * TILE, size["BLOCK_V"])
    head_tiles[grid](hidden_SC, hidden_SC.stride(0), weight_VC, weight_VC.stride(0), rows, width, columns,
                     temperature_S, peak_SN, mass_SN, tiles, TILE=TILE, BLOCK_S=block_rows, **size)
    return peak_SN, mass_SN


@triton.jit(do_not_specialize=["rows"])
def head_tiles(hidden, hidden_stride, weight, weight_stride, rows, width, columns, temperature, peak, mass,
               tiles, TILE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
               BLOCK_C: tl.constexpr):
    """A program for BLOCK_S rows and BLOCK_V ids, whose logits stay in registers. The programs that need the
    same part of the weight are neighbours, so that it comes from HBM once."""
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    c = tl.arange(0, BLOCK_C)
    h = hidden + s.to(tl.int64)[:, None] * hidden_stride + c[None, :]
    w = weight + v.to(tl.int64)[None, :] * weight_stride + c[:, None]
    z = tl.zeros((BLOCK_S, BLOCK_V), dtype=tl.float32)
    for start in range(0, width, BLOCK_C):
        inside = c < width - start
        a = tl.load(h + start, mask=(s < rows)[:, None] & inside[None, :], other=0.0)
        b = tl.load(w + start, mask=(v < columns)[None, :] & inside[:, None], other=0.0)
        z = tl.dot(a, b, z, input_precision="ieee")
    t = tl.load(temperature + s, mask=s < rows, other=1.0)
    z = z / tl.where(t == 0.0, 1.0, t)[:, None]
    z = tl.where((v < columns)[None, :], z, -float("inf"))
    z = tl.reshape(z, (BLOCK_S, BLOCK_V // TILE, TILE))
    top = tl.max(z, 2)
    e = tl.exp(z - tl.maximum(top, -3.4e38)[:, :, None])  # a tile without an id: 0, not NaN
    n = tl.program_id(1) * (BLOCK_V // TILE) + tl.arange(0, BLOCK_V // TILE)
    at, real = s[:, None] * tiles + n[None, :], (s < rows)[:, None] & (n < tiles)[None, :]
    tl.store(peak + at, top, mask=real)
    tl.store(mass + at, tl.sum(e, 2), mask=real)


@triton.jit
def pick(hidden, hidden_stride, weight, weight_stride, width, columns, peak, mass, all_tiles, first_tile,
         tiles, first_id, uniform, temperature, token, logp, TILE: tl.constexpr, BLOCK_TILES: tl.constexpr,
         BLOCK_C: tl.constexpr):
    """A program a row: finds the tile, computes its logits again, finds the id. Zeros where the tile is
    another rank's."""
    s = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_TILES)
    highs = tl.load(peak + s * all_tiles + n, mask=n < all_tiles, other=-float("inf"))
    masses = tl.load(mass + s * all_tiles + n, mask=n < all_tiles, other=0.0)
    top = tl.max(highs, 0)
    masses = masses.to(tl.float64) * tl.exp(highs - top)
    cdf = tl.cumsum(masses, 0)
    total = tl.max(cdf, 0)
    target = tl.load(uniform + s) * total
    t = tl.load(temperature + s)
    tile = tl.sum((cdf <= target).to(tl.int32), 0)
    tile = tl.minimum(tile, tl.max(tl.where(masses > 0, n, 0), 0))  # rounding must not step past the mass
    if t == 0.0:
        tile = tl.min(tl.where(highs == top, n, BLOCK_TILES), 0)
    rest = target - tl.max(tl.where(n < tile, cdf, 0.0), 0)
    local_tile = tile - first_tile

    i = tl.arange(0, TILE)
    v = local_tile * TILE + i
    real = (v >= 0) & (v < columns) & (local_tile < tiles)
    c = tl.arange(0, BLOCK_C)
    z = tl.zeros((TILE, BLOCK_C), dtype=tl.float32)
    for start in tl.range(0, width, BLOCK_C, num_stages=3):
        inside = c < width - start
        h = tl.load(hidden + s * hidden_stride + start + c, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + v.to(tl.int64)[:, None] * weight_stride + start + c[None, :],
                    mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
        z += w * h[None, :]
    z = tl.where(real, tl.sum(z, 1) / tl.where(t == 0.0, 1.0, t), -float("inf"))
    e = tl.exp(z - top)
    place = tl.sum((tl.cumsum(e.to(tl.float64), 0) <= rest).to(tl.int32), 0)
    place = tl.minimum(place, tl.max(tl.where(e > 0, i, 0), 0))
    if t == 0.0:
        place = tl.min(tl.where(z == tl.max(z, 0), i, TILE), 0)
    drawn = tl.sum(tl.where(i == place, z, 0.0), 0)
    owned = (local_tile >= 0) & (local_tile < tiles)
    tl.store(token + s, tl.where(owned, first_id + (local_tile * TILE + place).to(tl.int64), 0))
    tl.store(logp + s, tl.where(owned, drawn - top - tl.log(total).to(tl.float32), 0.0))
