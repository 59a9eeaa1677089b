"""Group relative policy optimisation, as pure functions: advantages, loss, packing, mismatch metrics.

Shapes: B prompts, G samples of each (a group), R rewards, T packed tokens, N trained tokens (completion
tokens of a micro-batch).

With one update per batch of rollouts the policy that is trained is the one that sampled: the ratio is exactly
1, the clip never acts, and the loss is minus the mean advantage, whose value says nothing (0 is normal) while
its gradient says everything.
"""

from dataclasses import dataclass

import torch

from model import Packed, packed

DEAD = 1e-6  # a group whose rewards spread no more than this has no signal, only rounding


@dataclass(frozen=True)
class Sample:
    """One completion as the update sees it."""

    prompt_ids: list[int]
    token_ids: list[int]
    rollout_logp: list[float]  # the sampler's, one per token
    advantage: float


@dataclass(frozen=True)
class Batch:
    """A micro-batch of samples end to end. targets_T[t] is the token after t; mask_T is true where that token
    is trained."""

    tokens_T: torch.Tensor
    attention: Packed
    targets_T: torch.Tensor
    mask_T: torch.Tensor
    rollout_logp_T: torch.Tensor
    advantage_T: torch.Tensor


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


def advantages(rewards_BGR: torch.Tensor, weights_R: torch.Tensor, mode: str = "per_reward",
               std_floor: float = 1e-4) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantage of each sample, and of each of its rewards: (advantage_BG, per_reward_BGR).

    per_reward (the paper, section 3.1): A_k = (r_k - mean) / (std + floor) in the group for each reward, then
    the mean over rewards with the given weights. Raw rewards are never summed: the one of largest scale would
    win. A reward that is missing (NaN) leaves mean and std alone and has A_k = 0; so has a group without
    spread, where rounding divided by a tiny std would make noise.
    """
    if mode != "per_reward":
        raise ValueError(f"advantages: mode {mode!r} is unknown, only 'per_reward' is there")
    if rewards_BGR.isinf().any() or not weights_R.sum() > 0:
        raise ValueError(f"advantages: rewards must be finite and weights sum above 0, not {weights_R}")
    rewards_BGR = rewards_BGR.double()
    mean, std, dead = group_spread(rewards_BGR)
    normal = (rewards_BGR - mean[:, None]) / (std + std_floor)[:, None]
    per_reward = normal.nan_to_num(0).masked_fill(dead[:, None], 0)
    weights_R = weights_R.double()
    return (per_reward @ (weights_R / weights_R.sum())).float(), per_reward.float()


# ---------------------------------------------------------------------- packing


def pack(lengths: list[int], budget: int, count: int = 0) -> list[list[int]]:
    """Splits samples into micro-batches of at most `budget` tokens (a longer sample stands alone); indices of
    each.

    Longest first, into the first micro-batch with room. With `count` larger than needed the fullest ones are
    split, and empty ones added, so that every rank has as many: FSDP's collectives must match.
    """
    bins, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((b for b, r in enumerate(room) if r >= lengths[i]), len(bins))
        if at == len(bins):
            bins.append([])
            room.append(budget)
        bins[at].append(i)
        room[at] -= lengths[i]
    while len(bins) < count:
        fullest = max(range(len(bins)), key=lambda b: len(bins[b]), default=None)
        split = bins[fullest] if fullest is not None else []
        bins.append(split[1::2])
        if split:
            bins[fullest] = split[::2]
    return bins


def collate(samples: list[Sample], device="cpu") -> Batch:
    """Lays samples end to end. No samples make a batch of one token that trains nothing, which keeps the
    collectives in step."""
    rows = []
    for s in samples:
        if not s.prompt_ids or len(s.rollout_logp) != len(s.token_ids):
            raise ValueError("collate: a sample needs a prompt and one rollout logprob for each token")
        ahead = len(s.prompt_ids) - 1
        rows.append((s.prompt_ids + s.token_ids, [0] * ahead + s.token_ids + [0],
                     [0] * ahead + [1] * len(s.token_ids) + [0], [0.0] * ahead + s.rollout_logp + [0.0],
                     [s.advantage] * (ahead + len(s.token_ids) + 1)))
    rows = rows or [([0], [0], [0], [0.0], [0.0])]
    tokens, targets, mask, logp, advantage = ([x for row in column for x in row] for column in zip(*rows))
    return Batch(torch.tensor(tokens, device=device), packed([len(row[0]) for row in rows], device),
                 torch.tensor(targets, device=device),
                 torch.tensor(mask, device=device).bool(), torch.tensor(logp, device=device),
                 torch.tensor(advantage, device=device))


# ---------------------------------------------------------------------- loss


def policy_loss(logp_N: torch.Tensor, old_logp_N: torch.Tensor, advantage_N: torch.Tensor, denominator: float,
                eps_low: float = 0.2, eps_high: float = 0.2) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped surrogate (PPO; paper, eq. 1), as this micro-batch's share of the whole batch's loss.

    Aggregation `token` (DAPO, arXiv 2503.14476): the sum over tokens divided by `denominator`, the number of
    trained tokens of the whole batch over all micro-batches and ranks. Losses and metrics of all shares add
    up to those of the batch. old_logp_N is detached; passing logp_N.detach() says that the batch is
    on-policy.
    """
    ratio = (logp_N - old_logp_N).exp()
    unclipped = ratio * advantage_N
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high) * advantage_N
    loss = -torch.minimum(unclipped, clipped).sum() / denominator
    share = (clipped < unclipped).sum() / denominator
    return loss, {"loss": loss.detach(), "clip_share": share}


def mismatch(logp_N: torch.Tensor, rollout_logp_N: torch.Tensor,
             denominator: float) -> dict[str, torch.Tensor]:
    """How far trainer and sampler disagree on the sampled tokens, as shares of sums like the loss; `gap/max`
    is a maximum.

    gap/k3 estimates KL(sampler || trainer) by r - 1 - log r with r = p_trainer / p_sampler (Schulman, 2020);
    it is never negative.
    """
    difference = logp_N.detach() - rollout_logp_N
    return {
        "gap/mean": difference.abs().sum() / denominator,
        "gap/k3": (difference.expm1() - difference).sum() / denominator,
        "gap/max": difference.abs().max() if len(difference) else difference.sum()
    }
