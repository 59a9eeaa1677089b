"""Drawing tokens: one hashed uniform per draw, and inverse CDF over vocabulary tiles.

Shapes: S rows, V vocabulary.

The rule is the same on any device and for any split of the vocabulary: weights exp(z - max z) are summed per
tile of `TILE` ids, prefix sums run in fp64, the tile that holds u * total is found, then the id inside it.
One number per draw instead of Gumbel's V makes it cheap, and keying that number by (request seed, sample,
position) makes a sample independent of its neighbours, batch and rank.
"""

import torch
import torch.nn.functional as F

TILE = 1024
GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # splitmix64's increment, as a signed 64-bit number


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
    cdf = tiles.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniform_S * cdf[:, -1]
    tile = (cdf <= target[:, None]).sum(-1).clamp_(max=tiles.shape[1] - 1)
    rows = torch.arange(len(tile), device=tile.device)
    weight = tiles[rows, tile]
    rest = target - F.pad(cdf, (1, 0))[rows, tile]
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
    greedy_S = temperature_S == 0
    z = logits_SV / torch.where(greedy_S, 1.0, temperature_S)[:, None]
    peak, best = z.max(-1)
    weights = F.pad((z - peak[:, None]).exp_(), (0, -z.shape[1] % TILE))
    total = weights.sum(-1, dtype=torch.float64)
    kept = weights if top_p_S is None else keep_top(weights, top_p_S, top_k_S)
    token = torch.where(greedy_S, best, inverse_cdf(kept, uniform_S))
    logp = z.gather(-1, token[:, None])[:, 0] - peak - total.log().float()
    return token, logp
