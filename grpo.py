"""Group relative policy optimisation, as pure functions: advantages, loss, packing, mismatch metrics.

Shapes: B prompts, G samples of each (a group), R rewards, T packed tokens, N trained tokens (completion
tokens of a micro-batch).

With one update per batch of rollouts the policy that is trained is the one that sampled: the ratio is exactly
1 and the clip never acts. The loss is then minus the mean advantage: its value carries no information (about
0 is normal), only its gradient does.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import Packed, packed

ADVANTAGES = ("per_reward", "sum", "gdpo")
LOSSES = ("token", "sequence", "constant")
EPS = 0.2  # the paper's clip, below and above
FORMS = {  # is_ratio: the loss, eps_low and eps_high that it is published with
    "token": ("token", EPS, EPS),  # the paper; its aggregation is open, DAPO's
    "sequence": ("sequence", 3e-4, 4e-4),  # GSPO, section 5.1
    "cispo": ("token", 1.0, 4.0),  # no lower clip; its paper names no upper: a weight up to 5 is our choice
}
IS_RATIOS = tuple(FORMS)
DEAD = 1e-6  # a group whose rewards differ by no more than this carries no signal
STD_FLOOR = 0.1  # default of `advantages` and of the option of this name
EIGHTHS = 8  # of max_new_tokens, by which quantities along the text are averaged
ALONG = 5 * 2 * EIGHTHS  # sums of `along`
VIOLATION = 0.1  # a sample that violates a requirement has at most minus this advantage


@dataclass(frozen=True)
class Sample:
    """One completion as the update sees it."""

    prompt_ids: torch.Tensor | list[int]
    token_ids: torch.Tensor | list[int]
    rollout_logp: torch.Tensor | list[float]  # the sampler's, one per token
    advantage: float
    trained: bool = True  # False: masked out of numerator and denominator
    think_tokens: int = 0  # of token_ids, up to the end of the thinking


@dataclass(frozen=True)
class Batch:
    """A micro-batch of samples end to end. targets_T[t] is the token after t; mask_T is true where that token
    is trained; lengths are the trained tokens of each sample, thinking those to the end of its thinking."""

    tokens_T: torch.Tensor
    attention: Packed
    targets_T: torch.Tensor
    mask_T: torch.Tensor
    rollout_logp_T: torch.Tensor
    advantage_T: torch.Tensor
    lengths: list[int]
    thinking: list[int] = ()


# ---------------------------------------------------------------------- advantages


def group_spread(rewards_BGR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and population standard deviation within each group, and whether it is dead; (B, R) each, missing
    (NaN) rewards left out."""
    present = ~rewards_BGR.isnan()
    count = present.sum(1).clamp(min=1)
    filled = rewards_BGR.nan_to_num(0)
    mean = filled.sum(1) / count
    std = (((filled - mean[:, None]) * present).square().sum(1) / count).sqrt()
    highest = rewards_BGR.masked_fill(~present, -torch.inf).amax(1)
    lowest = rewards_BGR.masked_fill(~present, torch.inf).amin(1)
    dead = ~(highest - lowest > DEAD)
    return mean, std.masked_fill(dead, 0), dead


def place_lowest(rewards_BGR: torch.Tensor) -> torch.Tensor:
    """Replaces each -inf, the mark of a sample with nothing to judge, by a number. Pass the rewards of all
    ranks.

    The number is the lowest of its group minus the larger of the group's std and the rms of the batch's stds.
    So the sample ranks below every sample that can be judged, at any scale and offset of the reward, and
    widens its group no more than an ordinary bad sample. If no other sample of the group can be judged, the
    reward is missing (NaN).
    """
    nothing_BGR = rewards_BGR.isneginf()
    judged_BGR = rewards_BGR.masked_fill(nothing_BGR, torch.nan)
    _, std, _ = group_spread(judged_BGR)
    step = torch.maximum(std, live_rms(std))
    step = step.masked_fill(step == 0, 1)  # no spread anywhere in the batch: any distance will do
    place = judged_BGR.nan_to_num(torch.inf).amin(1) - step
    return torch.where(nothing_BGR, place.masked_fill(place.isinf(), torch.nan)[:, None], rewards_BGR)


def live_rms(std_BR: torch.Tensor) -> torch.Tensor:
    """Root mean square of each reward's group stds over the groups that are not dead; 0 if all are."""
    return (std_BR.square().sum(0) / (std_BR > 0).sum(0).clamp(min=1)).sqrt()


def advantages(rewards_BGR: torch.Tensor, weights_R: torch.Tensor, mode: str = "per_reward",
               std_floor: float = STD_FLOOR,
               normalise_std: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantage of each sample, and of each of its rewards: (advantage_BG, per_reward_BGR). Pass the rewards
    of all ranks, in fp64 where an offset is large against the spread.

    per_reward (the paper, section 3.1): A_k = (r_k - mean) / max(std_k, floor_k) in the group for each
    reward, then the mean over rewards with the given weights. Raw rewards are never summed: the one of
    largest scale would win. gdpo (arXiv 2601.05242): that, then whitened over the whole batch.
    sum (plain GRPO): the weighted mean of raw rewards, normalised once; per_reward_BGR holds the parts that
    add up to it. Without normalise_std no group is divided by its standard deviation (Dr. GRPO, arXiv
    2503.20783).

    floor_k = std_floor * rms of the batch's group stds of reward k, and at least DEAD: a group of ordinary
    spread is normalised exactly, scale and offset of a reward do not matter, and one that is nearly saturated
    beside others that are not keeps its small share. Dead groups are left out of the rms: counted as 0 they
    would lower the floor just where most groups are saturated. With one live group the rms is its
    own std and the floor never acts, and |A_k| is at most sqrt(G - 1).

    A reward that is missing (NaN) leaves mean and std alone and has A_k = 0; so has a group without spread,
    where rounding divided by a tiny std would make noise.
    """
    if mode not in ADVANTAGES:
        raise ValueError(f"advantages: mode must be one of {', '.join(ADVANTAGES)}, not {mode!r}")
    if rewards_BGR.isinf().any() or not weights_R.sum() > 0:
        raise ValueError(f"advantages: rewards must be finite and weights sum above 0, not {weights_R}")
    shares_R = weights_R.double() / weights_R.double().sum()
    mean, std, dead = group_spread(rewards_BGR.double())
    centred = (rewards_BGR.double() - mean[:, None]).nan_to_num(0).masked_fill(dead[:, None], 0)
    if mode == "sum":
        centred *= shares_R
        _, std, dead = group_spread(centred.sum(-1, keepdim=True))
        centred = centred.masked_fill(dead[:, None], 0)
    scale = torch.maximum(std, (std_floor * live_rms(std)).clamp(min=DEAD))
    scale = scale if normalise_std else torch.ones_like(std)
    per_reward = centred / scale[:, None]
    advantage = per_reward.sum(-1) if mode == "sum" else per_reward @ shares_R
    if mode == "gdpo":
        spread = advantage.std(correction=0)
        advantage = (advantage - advantage.mean()) / spread if spread > DEAD else advantage * 0
    return advantage.float(), per_reward.float()


def require(advantage_BG: torch.Tensor, rewards_BGR: torch.Tensor,
            least_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes the advantage of every sample with less than `least` of some reward negative: (advantage_BG,
    violates_BGR). A missing reward (NaN) is no violation; a `least` of -inf requires nothing.

    RLMR (arXiv 2508.18642) introduced the idea that a violating sample must not be reinforced and that the
    penalty depends on its group; it subtracts the penalty from rewards. Here it is subtracted from
    advantages: all violating samples of a group lose the same amount, the smallest that brings the best of
    them to -VIOLATION. They keep their distances, other samples keep their advantages, and it also works in a
    group where all samples violate.
    """
    violates_BGR = rewards_BGR < least_R
    violates_BG = violates_BGR.any(-1)
    best_B = advantage_BG.masked_fill(~violates_BG, -torch.inf).amax(1)
    return advantage_BG - violates_BG * (best_B + VIOLATION).clamp(min=0)[:, None], violates_BGR


def conflicts(per_reward_BGR: torch.Tensor, weights_R: torch.Tensor, names: list[str],
              mode: str = "per_reward") -> dict[str, float]:
    """How much the rewards disagree, from their advantages. Pass those of all ranks.

    correlation/K,L: over samples with a non-zero advantage in both K and L (not missing, group not dead),
    about mean 0; 0 without such samples. disagreement/K,L: share of all samples that one raises and the other
    lowers. dominance/K: share of sum |w A| that belongs to K. mode: with `sum` the advantages include the
    weights.
    """
    A_SR = per_reward_BGR.double().flatten(0, 1)
    pull_R = (A_SR if mode == "sum" else A_SR * weights_R).abs().sum(0)
    out = {f"dominance/{name}": x for name, x in zip(names, (pull_R / pull_R.sum().clamp(min=DEAD)).tolist())}
    for k, l in itertools.combinations(range(len(names)), 2):
        both = A_SR[(A_SR[:, k] != 0) & (A_SR[:, l] != 0)]
        product = both[:, k] * both[:, l]
        norm = (both[:, k].square().sum() * both[:, l].square().sum()).sqrt().clamp(min=DEAD)
        pair = f"{names[k]},{names[l]}"
        out[f"correlation/{pair}"] = (product.sum() / norm).item()
        out[f"disagreement/{pair}"] = (product < 0).sum().item() / len(A_SR)
    return out


# ---------------------------------------------------------------------- packing


def pack(chosen: list[int], lengths: list[int], flops: list[int], budget: int,
         ranks: int = 1) -> list[list[list[int]]]:
    """Packs the chosen samples into rounds of one micro-batch per rank, of at most `budget` tokens each (a
    longer sample gets its own), with as few rounds as possible and about equal flops.

    FSDP's collectives keep the ranks in lockstep, so a round takes as long as its largest micro-batch.
    Samples are placed in order of decreasing flops, each into the micro-batch with the least flops that has
    room; a round combines micro-batches of similar size. A micro-batch is empty only if there are too few
    samples.
    """
    ranked = sorted(chosen, key=lambda i: -flops[i])
    fewest = min(len(chosen), -(-sum(lengths[i] for i in chosen) // budget))
    for count in range(-(-fewest // ranks) * ranks, len(chosen) + ranks, ranks):
        bins, room, load = [[] for _ in range(count)], [budget] * count, [0] * count
        for i in ranked:
            fits = [b for b in range(count) if room[b] >= lengths[i] or not bins[b]]
            if not fits:
                break
            b = min(fits, key=load.__getitem__)
            bins[b].append(i)
            room[b] -= lengths[i]
            load[b] += flops[i]
        else:
            order = sorted(range(count), key=lambda b: -load[b])
            return [[bins[b] for b in order[k:k + ranks]] for k in range(0, count, ranks)]
    return []


def minibatches(samples: list[Sample], parts: int) -> list[list[int]]:
    """Indices of the samples that each optimiser step trains, group after group; groups stay whole."""
    size = len(samples) // parts
    return [[i for i in range(start, start + size) if samples[i].trained]
            for start in range(0, len(samples), size)]


def balance(rounds: list[list[list[int]]], lengths: list[int], flops: list[int],
            budget: int) -> dict[str, float]:
    """Utilisation of the rounds of `pack`: flops done as a share of ranks x largest micro-batch, and tokens
    as a share of the budget."""
    load = [[sum(flops[i] for i in part) for part in parts] for parts in rounds]
    tokens = sum(lengths[i] for parts in rounds for part in parts for i in part)
    whole = sum(max(x) * len(x) for x in load)
    return {"balance/flops": sum(map(sum, load)) / max(1, whole),
            "balance/tokens": tokens / max(1, budget * sum(map(len, rounds)))}


def collate(samples: list[Sample], device="cpu") -> Batch:
    """Packs samples end to end. Without samples it returns one token that is not trained, which keeps the
    ranks' collectives in step."""
    rows, lengths = [], []
    for s in samples:
        prompt, ids = (torch.as_tensor(x, dtype=torch.int64) for x in (s.prompt_ids, s.token_ids))
        logp = torch.as_tensor(s.rollout_logp, dtype=torch.float32)
        if not len(prompt) or len(logp) != len(ids):
            raise ValueError("collate: a sample needs a prompt and one rollout logprob for each token")
        around = len(prompt) - 1, 1  # the token before the first trained one predicts it
        targets, mask, logp = (F.pad(x, around) for x in (ids, torch.ones_like(ids), logp))
        tokens = torch.cat((prompt, ids))
        rows.append((tokens, targets, mask.bool(), logp, torch.full(tokens.shape, s.advantage)))
        lengths.append(len(ids))
    nothing = torch.zeros(1, dtype=torch.int64)
    rows = rows or [(nothing, nothing, nothing.bool(), nothing.float(), nothing.float())]
    tokens_T, *others = (torch.cat(column).to(device) for column in zip(*rows))
    return Batch(tokens_T, packed([len(row[0]) for row in rows], device), *others, lengths,
                 [s.think_tokens for s in samples])


# ---------------------------------------------------------------------- loss


def denominators(lengths: list[int], loss: str, samples: int, tokens: int, max_tokens: int,
                 device="cpu") -> torch.Tensor:
    """denominator_N: the divisor of each token's loss, for samples of the given lengths packed end to end.

    `samples` and `tokens` count the trained samples and tokens of the whole minibatch, over all micro-batches
    and ranks, so that the losses of micro-batches add up.

    token      tokens of the batch              equal weight per token (DAPO, arXiv 2503.14476)
    sequence   samples x the sample's tokens    equal weight per sample (GRPO, arXiv 2402.03300)
    constant   samples x max_tokens             equal weight per token, independent of lengths (Dr. GRPO,
                                                arXiv 2503.20783)
    """
    if loss not in LOSSES:
        raise ValueError(f"denominators: loss must be one of {', '.join(LOSSES)}, not {loss!r}")
    each = {"token": [tokens] * len(lengths), "sequence": [samples * n for n in lengths],
            "constant": [samples * max_tokens] * len(lengths)}[loss]
    lengths_S = torch.tensor(lengths, dtype=torch.int64, device=device)
    return torch.tensor(each, dtype=torch.float32, device=device).repeat_interleave(lengths_S)


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """rho - 1 - log rho: an estimate of KL(p || q) on tokens of p with rho = q / p, never negative (Schulman,
    2020). rho is at most e^20, or 5e8: millions of tokens add up in fp32, and p hardly ever samples a token
    to which it gives less than e^-20."""
    log_ratio = log_ratio.clamp(max=20)
    return log_ratio.expm1() - log_ratio


def policy_loss(logp_N: torch.Tensor, old_logp_N: torch.Tensor, advantage_N: torch.Tensor,
                denominator_N: torch.Tensor | float, eps_low: float = EPS, eps_high: float = EPS,
                is_ratio: str = "token", lengths: list[int] | None = None,
                correction_N: torch.Tensor | float = 1.0, reference_logp_N: torch.Tensor | None = None,
                beta: float = 0.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The surrogate loss of a micro-batch, its share of the whole batch's: (loss, sums over its tokens).

    is_ratio says how rho = p / p_old enters:
    token      -min(rho A, clip(rho) A)                                    (PPO; paper, eq. 1)
    sequence   the same with rho's geometric mean over the sample          (GSPO, arXiv 2507.18071)
    cispo      -clip(rho) A log p, clip(rho) detached: no token is muted   (arXiv 2506.13585)
    The clip is [1 - eps_low, 1 + eps_high]; FORMS has those of the papers. While on-policy (old_logp_N =
    logp_N.detach()) rho is 1, the clip never acts and all three have the gradient of -A log p, `sequence`
    averaged over the sample.

    lengths: tokens of each sample, needed by `sequence`. correction_N: weight of each token, see
    `truncated_ratio`. beta: of the KL to a reference policy, `k3` of p_ref / p, whose gradient flows.
    Sums: `clipped` tokens, those whose gradient the clip mutes (cispo: whose weight it changes), and `kl`.
    `clipped_N` says which they are.
    """
    if is_ratio not in IS_RATIOS:
        raise ValueError(f"policy_loss: is_ratio must be one of {', '.join(IS_RATIOS)}, not {is_ratio!r}")
    log_ratio = logp_N - old_logp_N
    if is_ratio == "sequence" and lengths:
        log_ratio = torch.cat([x.mean().expand(len(x)) for x in log_ratio.split(lengths)])
    ratio = log_ratio.exp()
    inside = ratio.clamp(1 - eps_low, 1 + eps_high)
    if is_ratio == "cispo":
        objective = inside.detach() * advantage_N * logp_N
        clipped = (inside != ratio) & (advantage_N != 0)
    else:
        objective = torch.minimum(ratio * advantage_N, inside * advantage_N)
        clipped = inside * advantage_N < ratio * advantage_N
    loss_N = -correction_N * objective
    sums = {"clipped": clipped.sum(), "clipped_N": clipped}
    if reference_logp_N is not None:
        kl_N = k3(reference_logp_N - logp_N)
        loss_N = loss_N + beta * kl_N
        sums["kl"] = kl_N.detach().sum()
    return (loss_N / denominator_N).sum(), sums


def truncated_ratio(old_logp_N: torch.Tensor, rollout_logp_N: torch.Tensor, cap: float) -> torch.Tensor:
    """min(p_trainer / p_sampler, cap) for each token: corrects for numerical differences between sampler and
    trainer (truncated importance sampling; Yao et al., 2025). Per token, because a product over 14,000 tokens
    is noise."""
    return (old_logp_N - rollout_logp_N).exp().clamp(max=cap).detach()


def mismatch(logp_N: torch.Tensor, rollout_logp_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """How far trainer and sampler disagree on the sampled tokens: sums of |difference| (`gap/mean` once it is
    divided by a number of tokens) and of `k3` of p_trainer / p_sampler (`gap/k3`, KL(sampler || trainer)),
    and the largest |difference| (`gap/max`)."""
    difference = logp_N.detach() - rollout_logp_N
    return {
        "gap/mean": difference.abs().sum(), "gap/k3": k3(difference).sum(),
        "gap/max": difference.abs().max() if len(difference) else difference.sum()
    }


# ---------------------------------------------------------------------- along the text


def along(batch: Batch, max_tokens: int, *values_N: torch.Tensor) -> dict[int, float]:
    """Sums over a micro-batch's tokens of 1, entropy, gap, clipped and |advantage|, each by where a token
    stands: in the thinking or after it, and in which eighth of max_tokens. Key: its index in (5, 2, EIGHTHS).
    """
    lengths_S, thinking_S = torch.tensor([batch.lengths, batch.thinking], dtype=torch.int64)
    at_N = torch.arange(len(values_N[0])) - (lengths_S.cumsum(0) - lengths_S).repeat_interleave(lengths_S)
    place_N = (at_N * EIGHTHS // max_tokens).clamp(max=EIGHTHS - 1)
    place_N += EIGHTHS * (at_N >= thinking_S.repeat_interleave(lengths_S))
    values = torch.stack([x.double() for x in (torch.ones_like(values_N[0]), *values_N)])
    sums = values.new_zeros(len(values), 2 * EIGHTHS).index_add_(1, place_N.to(values.device), values)
    return dict(enumerate(sums.flatten().tolist()))


def along_metrics(sums: dict[int, float]) -> dict[str, list[float]]:
    """Metrics from the sums of `along` over all ranks: tokens, means (NaN without a token), and shares of all
    |advantage|."""
    sums = torch.tensor([sums[i] for i in range(ALONG)], dtype=torch.float64)
    tokens, *values, pull = sums.view(-1, 2, EIGHTHS)
    rows = {"tokens": tokens, "advantage_share": pull / pull.sum()}
    rows |= dict(zip(("entropy", "gap", "clip_share"), (x / tokens for x in values)))
    return {f"along/{name}/{part}": row.tolist() for name, x in rows.items()
            for part, row in zip(("think", "answer"), x)}


def slope(x_BG: torch.Tensor, y_BG: torch.Tensor) -> float:
    """Slope of y against x at the same prompt: least squares over all groups, each centred on its own; 0
    where x does not vary. Samples with a missing (NaN) y are left out."""
    x_BG = x_BG.masked_fill(y_BG.isnan(), torch.nan)
    x_BG, y_BG = ((v - v.nanmean(1, keepdim=True)).nan_to_num(0) for v in (x_BG, y_BG))
    return ((x_BG * y_BG).sum() / x_BG.square().sum()).nan_to_num(0).item()
