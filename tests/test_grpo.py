"""Advantages, packing and loss, against hand-worked numbers and NumPy; the gradient of a split batch."""

import copy
import dataclasses
import inspect
import math
import random

import numpy as np
import pytest
import torch

import grpo
import train
from grpo import Sample, advantages, collate, mismatch, pack, policy_loss
from kernels import linear_logprob
from model import ModelConfig, Qwen2

NAN = float("nan")


def rewards(*groups):
    """rewards_BGR of one reward, from lists of a group's values."""
    return torch.tensor(groups, dtype=torch.float64)[..., None]


def one(values, floor=0.0):
    """Advantages of a single group with a single reward, as a list."""
    return advantages(rewards(values), torch.ones(1), std_floor=floor)[0][0].tolist()


# ------------------------------------------------------------------------------------------ advantages


def test_each_reward_is_normalised_in_its_group_and_then_averaged_by_weight():
    """By hand: the std of 1, 2, 3, 4 is sqrt(5)/2, that of 0, 0, 0, 1 is sqrt(3)/4 (population)."""
    groups = [[1, 0], [2, 0], [3, 0], [4, 1]], [[7, 0], [7, 2], [7, 0], [7, 2]]
    r_BGR = torch.tensor(groups, dtype=torch.float64)
    total_BG, each_BGR = advantages(r_BGR, torch.tensor([1.0, 3.0]), std_floor=0.0)
    a = np.array([-3, -1, 1, 3]) / math.sqrt(5)
    b = np.array([-1, -1, -1, 3]) / math.sqrt(3)
    assert each_BGR.shape == (2, 4, 2) and total_BG.shape == (2, 4) and total_BG.dtype == torch.float32
    np.testing.assert_allclose(each_BGR[0], np.stack((a, b), 1), atol=1e-6)
    np.testing.assert_allclose(total_BG[0], (a + 3 * b) / 4, atol=1e-6)
    np.testing.assert_allclose(each_BGR[1], [[0, -1], [0, 1], [0, -1], [0, 1]], atol=1e-6)
    np.testing.assert_allclose(total_BG[1], [-0.75, 0.75, -0.75, 0.75], atol=1e-6)


def test_only_the_proportion_of_weights_matters():
    r_BGR = torch.rand(3, 8, 3, generator=torch.Generator().manual_seed(0))
    a = advantages(r_BGR, torch.tensor([1.0, 2.0, 5.0]))[0]
    torch.testing.assert_close(advantages(r_BGR, torch.tensor([10.0, 20.0, 50.0]))[0], a)
    alone = advantages(r_BGR, torch.tensor([0.0, 1.0, 0.0]))[0]
    torch.testing.assert_close(alone, advantages(r_BGR[..., 1:2], torch.ones(1))[0])


def test_a_group_of_ordinary_spread_knows_nothing_of_another():
    r_BGR = torch.rand(4, 6, 2, generator=torch.Generator().manual_seed(1))
    whole = advantages(r_BGR, torch.ones(2))[0]
    for b in range(4):
        torch.testing.assert_close(advantages(r_BGR[b:b + 1], torch.ones(2))[0][0], whole[b])


def test_one_failure_among_31_successes_gets_minus_root_31_and_a_floor_bounds_it():
    """With mean 31/32 and std sqrt(31)/32 the failure stands sqrt(31) = 5.57 deviations below."""
    group = [1.0] * 31 + [0.0]
    a = one(group)
    assert a[31] == pytest.approx(-5.5678, abs=1e-4) and a[0] == pytest.approx(1 / math.sqrt(31), abs=1e-6)
    assert one(group, floor=2) == pytest.approx([x / 2 for x in a])


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def test_the_floor_is_a_share_of_the_batchs_spread_and_below_it_a_group_is_exact():
    """Stds 1, 1, .05 and a dead group: the floor is .1 of sqrt(2.0025 / 3). The dead group is not counted."""
    r_BGR = rewards([-1, 1], [6, 4], [0.05, -0.05], [3, 3])
    a_BG = advantages(r_BGR, torch.ones(1))[0]
    floor = 0.1 * math.sqrt(2.0025 / 3)
    np.testing.assert_allclose(a_BG, [[-1, 1], [1, -1], [0.05 / floor, -0.05 / floor], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(a_BG[:3], advantages(r_BGR[:3], torch.ones(1))[0])
    lone = advantages(rewards([0, 4e-3, 0], *[[7, 7, 7]] * 31), torch.ones(1))[0]
    np.testing.assert_allclose(lone[0], np.array([-1, 2, -1]) / math.sqrt(2), atol=1e-6)
    summed = advantages(torch.stack((r_BGR[..., 0],) * 2, -1), torch.ones(2), "sum")[0]
    np.testing.assert_allclose(summed, a_BG, atol=1e-6)


@pytest.mark.parametrize("mode", grpo.ADVANTAGES)
@pytest.mark.parametrize("scale", [1e-3, 1, 1e3])
@pytest.mark.parametrize("offset", [0, 1e3])
def test_the_size_of_an_advantage_depends_on_neither_scale_nor_offset(mode, scale, offset):
    generator = torch.Generator().manual_seed(3)
    r_BGR = torch.randn(16, 8, 1, generator=generator, dtype=torch.float64)
    plain, moved = (advantages(x, torch.ones(1), mode)[0] for x in (r_BGR, offset + scale * r_BGR))
    assert rms(moved) == pytest.approx(rms(plain), rel=0.01) and 0.95 < rms(plain) < 1.01
    torch.testing.assert_close(moved, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1, 1e3])
def test_a_group_with_a_twentieth_of_the_batchs_spread_is_not_blown_up(scale):
    r_BGR = torch.randn(16, 8, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mean, std, _ = grpo.group_spread(r_BGR)
    r_BGR = (r_BGR - mean[:, None]) / std[:, None]
    r_BGR[0] /= 20
    a_BG = advantages(scale * r_BGR, torch.ones(1))[0]
    assert 0.4 < rms(a_BG[0]) <= 0.6 and rms(a_BG[1:]) == pytest.approx(1, rel=1e-6)


def test_a_sample_with_nothing_to_judge_is_placed_below_all_of_its_group_that_can_be_judged():
    """Stds of the judged are 1, .1, 0 (one alone) and none: rms of the live ones sqrt(1.01 / 2). The place is
    below the lowest by the larger of the group's and that."""
    low, rms_of_live = -math.inf, math.sqrt(1.01 / 2)
    groups = [[4, 6, low, low], [5, 5.2, NAN, low], [7, low, low, low], [low, low, NAN, low]]
    for scale, offset in ((1, 0), (1e3, -5e3), (1e-3, 1e3)):
        r_BGR = rewards(*groups)
        placed = (grpo.place_lowest(offset + scale * r_BGR)[..., 0] - offset) / scale
        step = rms_of_live
        np.testing.assert_allclose(placed, [[4, 6, 3, 3], [5, 5.2, NAN, 5 - step],
                                            [7, 7 - step, 7 - step, 7 - step], [NAN] * 4], rtol=1e-6)
    a_BG = advantages(grpo.place_lowest(r_BGR), torch.ones(1))[0]
    assert (a_BG[:3][r_BGR[:3, :, 0] == low] < -0.3).all() and torch.count_nonzero(a_BG[3]) == 0
    alone = grpo.place_lowest(rewards([7, low], [low, low]))
    assert alone[0, 1] < alone[0, 0] == 7 and alone[1].isnan().all()
    assert torch.equal(grpo.place_lowest(rewards([1, 2])), rewards([1, 2]))


def test_the_options_default_is_the_functions():
    default = inspect.signature(advantages).parameters["std_floor"].default
    assert train.Config().std_floor == default == 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value, size", [
    (0.1, 7), (0.1, 3), (1 / 3, 31), (0.7, 32), (1e6 / 7, 9), (0.0, 4), (-0.1, 7)])
def test_a_constant_group_has_advantage_exactly_zero(value, size, dtype):
    """The mean of 0.1 given seven times is not 0.1: over a tiny deviation its rounding would be a signal."""
    r_BGR = torch.full((1, size, 1), value, dtype=dtype)
    for floor in (0.0, 1e-12, 1e-4):
        total, each = advantages(r_BGR, torch.ones(1), std_floor=floor)
        assert torch.count_nonzero(total) == 0 and torch.count_nonzero(each) == 0
    mean, std, dead = grpo.group_spread(r_BGR.double())
    assert std.item() == 0 and dead.item()


def test_a_spread_below_one_in_a_million_is_dead_and_one_above_is_not():
    assert one([0.5, 0.5 + 9e-7]) == [0.0, 0.0]
    assert one([0.5, 0.5 + 1.1e-6]) == pytest.approx([-0.55, 0.55], rel=1e-6), "the least floor"
    assert one([0.5, 0.5 + 2.1e-6]) == pytest.approx([-1.0, 1.0], rel=1e-6)
    assert one([0.3, 0.3 + 5e-7, 0.3 - 3e-7]) == [0.0, 0.0, 0.0]


def test_a_dead_reward_keeps_its_weight_so_that_it_damps_the_others():
    r_BGR = torch.tensor([[[0.0, 1.0], [1.0, 1.0]]])
    assert advantages(r_BGR, torch.ones(2), std_floor=0.0)[0].tolist() == [[-0.5, 0.5]]


def test_a_missing_reward_leaves_the_mean_and_deviation_and_contributes_nothing():
    """Not the same as 0, which would drag the mean; and its weight still counts in the average."""
    r_BGR = torch.tensor([[[0.0, 1.0], [1.0, 1.0], [NAN, 3.0], [NAN, NAN]]])
    total, each = advantages(r_BGR, torch.tensor([1.0, 1.0]), std_floor=0.0)
    second = np.array([-1, -1, 2]) / math.sqrt(2)
    np.testing.assert_allclose(each[0, :, 0], [-1, 1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(each[0, :, 1], [*second, 0], atol=1e-6)
    averages = [(-1 + second[0]) / 2, (1 + second[1]) / 2, second[2] / 2, 0]
    np.testing.assert_allclose(total[0], averages, atol=1e-6)
    mean, std, dead = grpo.group_spread(r_BGR.double())
    np.testing.assert_allclose(mean[0], [0.5, 5 / 3])
    np.testing.assert_allclose(std[0], [0.5, math.sqrt(8) / 3])
    assert not dead.any()


@pytest.mark.parametrize("values", [[NAN] * 4, [NAN, NAN, 0.7, NAN], [0.1, NAN, 0.1, 0.1]])
def test_a_group_with_nothing_to_compare_has_advantage_zero(values):
    """All missing, all but one missing, or those that are there equal: zero, and never NaN."""
    assert one(values) == [0.0] * 4 == one(values, floor=1e-4)
    assert grpo.group_spread(rewards(values))[2].item()


def test_the_scale_of_a_reward_does_not_matter_its_offset_neither():
    """Summed raw, the reward of largest scale would win; normalised first, its unit drops out."""
    r_BGR = torch.rand(5, 8, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    a = advantages(r_BGR, torch.ones(3), std_floor=0.0)[0]
    scaled = r_BGR * torch.tensor([1.0, 100.0, 1.0]) + torch.tensor([0.0, 0.0, -40.0])
    torch.testing.assert_close(advantages(scaled, torch.ones(3), std_floor=0.0)[0], a, rtol=1e-6, atol=1e-6)


def test_sum_normalises_the_weighted_mean_of_raw_rewards():
    """By hand: (r1 + 3 r2) / 4 is .25, .5, .75, 1.75 with mean 13/16; the parts add up to the advantage."""
    r_BGR = torch.tensor([[[1, 0], [2, 0], [3, 0], [4, 1]]], dtype=torch.float64)
    total, each = advantages(r_BGR, torch.tensor([1.0, 3.0]), "sum", 0.0)
    raw = np.array([0.25, 0.5, 0.75, 1.75])
    np.testing.assert_allclose(total[0], (raw - raw.mean()) / raw.std(), atol=1e-6)
    np.testing.assert_allclose(each.sum(-1), total, atol=1e-6)
    np.testing.assert_allclose(each[0, :, 0], 0.25 * (np.arange(4) - 1.5) / raw.std(), atol=1e-6)
    floored = advantages(r_BGR, torch.tensor([1.0, 3.0]), "sum", 0.5)[0]
    np.testing.assert_allclose(floored[0], (raw - raw.mean()) / raw.std(), atol=1e-6)


def test_in_a_sum_the_reward_of_largest_scale_wins_and_opposite_ones_cancel():
    r_BGR = torch.tensor([[[0.0, 100.0], [1.0, 0.0]]])
    assert advantages(r_BGR, torch.ones(2), "sum", 0.0)[0][0].tolist() == pytest.approx([1, -1])
    assert advantages(r_BGR, torch.ones(2), "per_reward", 0.0)[0][0].tolist() == pytest.approx([0, 0])
    opposite = torch.tensor([[[0.1, 0.7], [0.7, 0.1], [0.3, 0.5]]], dtype=torch.float64)
    total, each = advantages(opposite, torch.ones(2), "sum", 0.0)
    assert torch.count_nonzero(total) == 0 == torch.count_nonzero(each)


def test_a_missing_reward_in_a_sum_counts_as_its_groups_mean():
    r_BGR = torch.tensor([[[0.0, NAN], [1.0, 4.0], [NAN, 6.0]]])
    parts = np.array([[-0.25, 0], [0.25, -0.5], [0, 0.5]])
    total = advantages(r_BGR, torch.ones(2), "sum", 0.0)[0]
    np.testing.assert_allclose(total[0], parts.sum(1) / parts.sum(1).std(), atol=1e-6)


def test_gdpo_whitens_the_averaged_advantages_over_the_batch():
    r_BGR = torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    r_BGR[1, :, 0] = 0.5
    plain, each = advantages(r_BGR, torch.tensor([1.0, 2.0]), "per_reward", 0.01)
    total, each_too = advantages(r_BGR, torch.tensor([1.0, 2.0]), "gdpo", 0.01)
    a = plain.double().numpy()
    np.testing.assert_allclose(total, (a - a.mean()) / a.std(), atol=1e-5)
    assert torch.equal(each, each_too) and total.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert torch.count_nonzero(advantages(torch.ones(3, 4, 2), torch.ones(2), "gdpo")[0]) == 0


def test_without_the_standard_deviation_advantages_are_centred_rewards():
    r_BGR = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [6.0, 0.3]], [[5.0, 1.0], [5.0, 1.0], [5.0, 1.0]]])
    total, each = advantages(r_BGR, torch.tensor([1.0, 3.0]), "per_reward", 0.1, normalise_std=False)
    np.testing.assert_allclose(each[0], [[-2, -0.1], [-1, -0.1], [3, 0.2]], atol=1e-6)
    np.testing.assert_allclose(total[0], [-0.575, -0.325, 0.9], atol=1e-6)
    assert torch.count_nonzero(total[1]) == 0
    summed = advantages(r_BGR, torch.tensor([1.0, 3.0]), "sum", 0.1, normalise_std=False)[0]
    np.testing.assert_allclose(summed[0], [-0.575, -0.325, 0.9], atol=1e-6)


def test_advantages_leave_their_arguments_alone():
    r_BGR, weights_R = torch.tensor([[[0.0, NAN], [1.0, 0.3], [0.2, 0.3]]]), torch.tensor([1.0, 2.0])
    before = r_BGR.clone(), weights_R.clone()
    advantages(r_BGR, weights_R)
    grpo.group_spread(r_BGR)
    assert torch.equal(r_BGR.nan_to_num(-9), before[0].nan_to_num(-9)) and torch.equal(weights_R, before[1])


def test_an_infinite_reward_is_an_error_and_no_advantage():
    for value in (math.inf, -math.inf):
        with pytest.raises(ValueError, match="rewards must be finite"):
            advantages(rewards([0.0, value, 1.0]), torch.ones(1))
    with pytest.raises(ValueError, match="weights sum above 0"):
        advantages(rewards([0.0, 1.0]), torch.zeros(1))


def test_an_unknown_mode_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="no_such_mode"):
        advantages(torch.zeros(1, 2, 1), torch.ones(1), mode="no_such_mode")


# ------------------------------------------------------------------------------------------ papers' forms


@pytest.mark.parametrize("given, resolved", [
    ({}, ("token", 0.2, 0.2)), ({"is_ratio": "sequence"}, ("sequence", 3e-4, 4e-4)),
    ({"is_ratio": "cispo"}, ("token", 1.0, 4.0)), ({"is_ratio": "gspo"}, ("token", 0.2, 0.2)),
    ({"is_ratio": "sequence", "loss": "token", "eps_high": 0.0}, ("token", 3e-4, 0.0)),
    ({"is_ratio": "cispo", "eps_low": 0.2}, ("token", 0.2, 4.0))])
def test_a_ratio_brings_the_loss_and_the_clip_of_its_paper_unless_told_otherwise(given, resolved):
    config = train.Config(**given)
    assert (config.loss, config.eps_low, config.eps_high) == resolved
    assert train.Config(**dataclasses.asdict(config)) == config, "what is recorded is what was resolved"


def test_gspo_by_its_name_weighs_a_long_sample_like_a_short_one():
    """Of 200 and 14,000 tokens, on-policy: with `token` the long one had .986 of the gradient."""
    config, lengths = train.Config(is_ratio="sequence"), [200, 14_000]
    logp = torch.zeros(sum(lengths), requires_grad=True)
    denominator = grpo.denominators(lengths, config.loss, 2, sum(lengths), 14_000)
    policy_loss(logp, logp.detach(), torch.ones(len(logp)), denominator, config.eps_low, config.eps_high,
                config.is_ratio, lengths)[0].backward()
    assert [x.sum().item() for x in logp.grad.split(lengths)] == pytest.approx([-0.5, -0.5], rel=1e-4)


def test_cispo_by_its_name_has_no_lower_clip_and_weighs_no_token_more_than_five_times():
    config = train.Config(is_ratio="cispo")
    logp = torch.tensor([-9.0, 0.1, 1.0, 9.0], requires_grad=True)
    policy_loss(logp, torch.zeros(4), torch.ones(4), 1.0, config.eps_low, config.eps_high,
                config.is_ratio)[0].backward()
    np.testing.assert_allclose(-logp.grad, [math.exp(-9), math.exp(0.1), math.e, 5], rtol=1e-6)


# ------------------------------------------------------------------------------------------ what is required


def required(advantage, rewards, least):
    """One group with one reward."""
    a_BG, violates = grpo.require(torch.tensor([advantage]), torch.tensor([rewards])[..., None],
                                  torch.tensor([least]))
    return a_BG[0].tolist(), violates[0, :, 0].tolist()


def test_violators_of_a_group_lose_what_brings_the_best_of_them_to_minus_a_tenth():
    """By hand: the best violator stands at 0.5 and loses 0.6, as does the one at -0.25."""
    a, violates = required([2.0, 0.5, -0.25, -2.25], [1.0, 0.4, 0.2, 0.5], 0.5)
    assert violates == [False, True, True, False], "what is required is enough"
    assert a == pytest.approx([2.0, -0.1, -0.85, -2.25])
    assert required([1.0, -0.5, -0.5], [1.0, 0.0, 0.0], 0.5)[0] == [1.0, -0.5, -0.5], "they are below already"


@pytest.mark.parametrize("seed", range(5))
def test_no_violator_stays_at_0_and_nobody_else_moves(seed):
    """Whatever the rewards: violators keep order and distances in their group, a group nothing of another; a
    second time changes nothing. Among them groups of violators alone, and groups of none."""
    g = torch.Generator().manual_seed(seed)
    r_BGR = torch.rand(40, 8, 3, generator=g)
    r_BGR[torch.rand(40, 8, 3, generator=g) < 0.2] = NAN
    least_R = torch.tensor([0.3, -torch.inf, 0.2])
    r_BGR[0], r_BGR[1] = 0.0, 1.0
    a_BG = advantages(r_BGR, torch.ones(3))[0]
    new_BG, violates = grpo.require(a_BG, r_BGR, least_R)
    assert torch.equal(violates, (r_BGR < least_R) & ~r_BGR.isnan()) and not violates[..., 1].any()
    bad_BG = violates.any(-1)
    assert bad_BG[0].all() and not bad_BG[1].any() and (new_BG[bad_BG] <= 1e-6 - grpo.VIOLATION).all()
    assert torch.equal(new_BG[~bad_BG], a_BG[~bad_BG])
    for b in range(40):
        lost = (a_BG[b] - new_BG[b])[bad_BG[b]]
        assert len(lost) == 0 or lost.max() - lost.min() < 1e-6
        assert torch.equal(grpo.require(a_BG[b:b + 1], r_BGR[b:b + 1], least_R)[0][0], new_BG[b])
    torch.testing.assert_close(grpo.require(new_BG, r_BGR, least_R)[0], new_BG, rtol=0, atol=1e-6)


def test_a_missing_reward_violates_nothing_and_a_dead_group_of_violators_is_pushed_down():
    assert required([1.0, -1.0], [NAN, NAN], 0.5) == ([1.0, -1.0], [False, False])
    assert required([0.0, 0.0], [0.0, 0.0], 0.5)[0] == pytest.approx([-0.1, -0.1])


# ------------------------------------------------------------------------------------------ conflicts


def test_conflicts_of_three_rewards_by_hand():
    """Four samples; b opposes a where both judge, c is silent about two of them."""
    a, b, c = [3.0, -1.0, -1.0, -1.0], [-1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]
    each_BGR = torch.tensor([list(zip(a, b, c))[:2], list(zip(a, b, c))[2:]])
    seen = grpo.conflicts(each_BGR, torch.tensor([1.0, 3.0, 0.0]), ["a", "b", "c"])
    assert seen == pytest.approx({
        "dominance/a": 6 / 12, "dominance/b": 6 / 12, "dominance/c": 0,
        "correlation/a,b": -4 / math.sqrt(10 * 2), "disagreement/a,b": 0.5,
        "correlation/a,c": 0.0, "disagreement/a,c": 0.25, "correlation/b,c": 0.0, "disagreement/b,c": 0.0})


def test_conflicts_see_agreement_opposition_and_whose_sum_it_is():
    r_BGR = torch.rand(30, 8, 1, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    r_BGR = torch.cat((r_BGR, 5 * r_BGR + 3, 100 * (1 - r_BGR)), -1)
    for mode, dominance in (("per_reward", [1 / 3] * 3), ("sum", [1 / 106, 5 / 106, 100 / 106])):
        each_BGR = advantages(r_BGR, torch.ones(3), mode, 0.0)[1]
        seen = grpo.conflicts(each_BGR, torch.ones(3), ["x", "y", "z"], mode)
        assert [seen[f"dominance/{n}"] for n in "xyz"] == pytest.approx(dominance, abs=1e-5)
        assert seen["correlation/x,y"] == pytest.approx(1) and seen["disagreement/x,y"] == 0
        assert seen["correlation/x,z"] == pytest.approx(-1) and seen["disagreement/x,z"] == 1
    weighted = advantages(r_BGR, torch.tensor([1.0, 2.0, 1.0]), "sum", 0.0)[1]
    seen = grpo.conflicts(weighted, torch.tensor([1.0, 2.0, 1.0]), ["x", "y", "z"], "sum")
    assert seen["dominance/y"] == pytest.approx(10 / 111), "the weights are in its parts already"


def test_conflicts_of_nothing_are_0_and_of_one_reward_only_its_share():
    nothing = grpo.conflicts(torch.zeros(2, 3, 2), torch.ones(2), ["a", "b"])
    assert set(nothing.values()) == {0.0} and len(nothing) == 4
    assert grpo.conflicts(torch.tensor([[[1.0], [-1.0]]]), torch.ones(1), ["a"]) == {"dominance/a": 1.0}


# ------------------------------------------------------------------------------------------ packing


def lengths_of(seed, n):
    rng = random.Random(seed)
    return [rng.choice([1, 5, 17, 40, 99, 100, 101, 250]) for _ in range(n)]


def work(lengths):
    """Flops with a share of attention."""
    return [n * (50 + n) for n in lengths]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 64])
def test_every_sample_is_in_one_micro_batch_and_only_a_long_one_exceeds_the_budget(n, ranks):
    """And every rank has as many micro-batches, or FSDP's collectives would hang."""
    lengths, chosen = lengths_of(n, 2 * n), list(range(0, 2 * n, 2))
    rounds = pack(chosen, lengths, work(lengths), 100, ranks)
    bins = sum(rounds, [])
    assert all(len(parts) == ranks for parts in rounds) and sorted(sum(bins, [])) == chosen
    assert all(sum(lengths[i] for i in part) <= 100 or len(part) == 1 for part in bins)
    assert bins.count([]) <= max(0, len(bins) - n), "a micro-batch is empty though there are samples"


def test_packing_fills_the_budget():
    for lengths in ([60, 40, 50, 50, 30, 70, 100], [25] * 16):
        assert len(pack(list(range(len(lengths))), lengths, work(lengths), 100)) == 4
    assert pack([], [], [], 100) == pack([], [5], [5], 100, 4) == []


def test_ranks_get_equal_flops():
    """Long tails up to 14,000 tokens, with the 7B's attention; equal shares of tokens would not be equal."""
    config = ModelConfig(152064, 3584, 18944, 28, 28, 4)
    rng = random.Random(6)
    lengths = [int(min(14000, rng.lognormvariate(8, 0.9))) + 300 for _ in range(512)]
    flops, everyone = [n * config.flops_per_token(n // 2) for n in lengths], list(range(512))
    for ranks, used, filled in ((8, 0.99, 0.85), (64, 0.9, 0.7)):  # 64 have three rounds, rounded up
        seen = grpo.balance(pack(everyone, lengths, flops, 16384, ranks), lengths, flops, 16384)
        assert seen["balance/flops"] > used and seen["balance/tokens"] > filled, (ranks, seen)
    one_long = pack([0, 1, 2, 3, 4], [400, 100, 100, 100, 100], [800, 100, 100, 100, 100], 400, 2)
    assert sorted(map(sorted, one_long[0])) == [[0], [1, 2, 3, 4]], "attention makes the long one cost more"
    in_order = pack([0, 1, 2, 3, 4], [90, 60, 55, 50, 45], [90, 60, 55, 50, 45], 100, 2)
    assert in_order == [[[3, 4], [0]], [[1], [2]]], "a round lasts as long as its largest"


def test_balance_by_hand():
    """Two rounds on two ranks last 4 and 2, so that 3 + 4 + 1 + 2 out of 12 is used; 4 x 10 tokens fit."""
    rounds = [[[0], [1]], [[2], [3]]]
    assert grpo.balance(rounds, [5, 6, 7, 8], [3, 4, 1, 2], 10) == {
        "balance/flops": 10 / 12, "balance/tokens": 26 / 40}
    assert set(grpo.balance([], [3], [3], 10).values()) == {0.0}


def test_packing_is_a_pure_function():
    lengths = lengths_of(3, 30)
    before, flops = list(lengths), work(lengths)
    assert all(pack(list(range(30)), lengths, flops, 100, n) == pack(list(range(30)), lengths, flops, 100, n)
               for n in (1, 4))
    assert lengths == before and flops == work(before)


# ------------------------------------------------------------------------------------------ collate


def samples_of(seed, n, vocabulary=53):
    """Random samples; a token is never 0, so that a padded target could not be mistaken for one."""
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(1, vocabulary) for _ in range(rng.randint(low, high))]

    out = []
    for _ in range(n):
        token_ids = ids(1, 12)
        logp = [-rng.uniform(0.1, 4) for _ in token_ids]
        out.append(Sample(ids(1, 7), token_ids, logp, rng.choice([-1, 1]) * rng.uniform(0.2, 2)))
    return out


def test_targets_are_the_next_tokens_and_only_completions_are_trained():
    batch = collate([Sample([3, 4, 5], [6, 7], [-0.5, -0.25], 2.0), Sample([8], [9], [-1.5], -1.0)])
    assert batch.tokens_T.tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert batch.mask_T.tolist() == [False, False, True, True, False, True, False]
    assert batch.targets_T[batch.mask_T].tolist() == [6, 7, 9]
    assert batch.rollout_logp_T[batch.mask_T].tolist() == [-0.5, -0.25, -1.5]
    assert batch.advantage_T[batch.mask_T].tolist() == [2.0, 2.0, -1.0]
    assert batch.attention.lengths == [5, 2] and batch.attention.positions_T.tolist() == [0, 1, 2, 3, 4, 0, 1]


def test_a_batch_aligns_for_any_samples():
    """Every completion token once, in order, where it is predicted; nothing crosses from sample to sample."""
    samples = samples_of(0, 40)
    batch = collate(samples)
    keep = batch.mask_T
    assert batch.targets_T[keep].tolist() == [t for s in samples for t in s.token_ids]
    assert torch.equal(batch.targets_T[:-1][keep[:-1]], batch.tokens_T[1:][keep[:-1]]) and not keep[-1]
    assert batch.rollout_logp_T[keep].tolist() == pytest.approx([p for s in samples for p in s.rollout_logp])
    expected = [s.advantage for s in samples for _ in s.token_ids]
    assert batch.advantage_T[keep].tolist() == pytest.approx(expected)
    assert batch.attention.lengths == [len(s.prompt_ids) + len(s.token_ids) for s in samples]
    ends = np.cumsum(batch.attention.lengths) - 1
    assert not keep[ends].any(), "the last token of a sample predicts nothing"
    for tensor in (batch.targets_T, keep, batch.rollout_logp_T, batch.advantage_T):
        assert tensor.shape == batch.tokens_T.shape
    assert (batch.tokens_T.dtype, batch.targets_T.dtype, keep.dtype) == (torch.int64, torch.int64, torch.bool)
    assert batch.rollout_logp_T.dtype == batch.advantage_T.dtype == torch.float32


def test_a_batch_of_no_samples_trains_nothing_and_has_gradient_zero():
    """A rank without samples runs it to stay in step; it must not bring NaN into the sum."""
    model = tiny_model()
    batch = collate([])
    assert len(batch.tokens_T) == 1 and not batch.mask_T.any()
    loss, metrics, grads = gradient(model, [[]])
    assert loss == 0 and all(g.abs().max() == 0 for g in grads)
    assert len(grads) == len(list(model.parameters()))
    assert all(value == 0 for value in metrics.values())


# ------------------------------------------------------------------------------------------ loss


def reference(logp, old, advantage, denominator, low, high):
    """The clipped surrogate and its gradient in fp64: clipping acts where it makes the objective smaller."""
    ratio = np.exp(logp - old)
    clipped = np.clip(ratio, 1 - low, 1 + high)
    acts = np.where(advantage > 0, ratio > 1 + high, ratio < 1 - low)
    value = -np.where(acts, clipped, ratio) * advantage / denominator
    return value.sum(), np.where(acts, 0.0, -ratio * advantage / denominator), acts.sum()


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.2, 0.28), (0.1, 0.5)])
def test_the_loss_and_its_gradient_equal_numpy_in_every_branch(low, high):
    """Ratios below, inside and above the clip, each with a good and a bad advantage."""
    ratio = np.array([0.3, 0.85, 1.0, 1.15, 1.24, 1.35, 2.5] * 2)
    advantage = np.array([1.5] * 7 + [-0.5] * 7)
    old = np.log(np.linspace(0.1, 0.3, 14))
    logp = torch.tensor(old + np.log(ratio), requires_grad=True)
    loss, sums = policy_loss(logp, torch.tensor(old), torch.tensor(advantage), 20, low, high)
    loss.backward()
    value, grad, clipped = reference(logp.detach().numpy(), old, advantage, 20, low, high)
    np.testing.assert_allclose(loss.item(), value, rtol=1e-12)
    np.testing.assert_allclose(logp.grad, grad, rtol=1e-12, atol=1e-15)
    assert sums["clipped"] == clipped and not sums["clipped"].requires_grad


def test_the_four_clipped_and_unclipped_corners_by_hand():
    """A > 0 stops at ratio 1.28 and is free below; A < 0 stops at ratio 0.8 and is free above."""
    logp = torch.tensor([2.0, 2.0, 0.5, 0.5]).log().requires_grad_()
    loss, sums = policy_loss(logp, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), 4, 0.2, 0.28)
    loss.backward()
    assert loss.item() == pytest.approx(-(1.28 - 2 + 0.5 - 0.8) / 4)
    assert logp.grad.tolist() == pytest.approx([0, 0.5, -0.125, 0]) and sums["clipped"] == 2


def test_on_policy_the_gradient_is_minus_the_advantage_over_the_denominator():
    """The ratio is 1: the value is minus the mean advantage, and nothing is clipped, whatever eps is."""
    advantage = torch.tensor([2.0, -1.0, 0.0, 0.5])
    for eps in (0.0, 0.2):
        logp = torch.tensor([-0.3, -2.0, -5.0, -40.0], requires_grad=True)
        loss, sums = policy_loss(logp, logp.detach(), advantage, 10, eps, eps)
        loss.backward()
        assert logp.grad.tolist() == pytest.approx((-advantage / 10).tolist())
        assert loss.item() == pytest.approx(-0.15) and sums["clipped"] == 0


LENGTHS = [3, 1, 4]


def numpy_loss(logp, old, advantage, divisor, is_ratio, low, high, correction, ref, beta):
    """Every variant, by samples, in fp64."""
    loss, start = 0.0, 0
    for n in LENGTHS:
        rows = slice(start, start + n)
        lp, d, a = logp[rows], (logp - old)[rows], advantage[rows]
        ratio = np.exp(np.full(n, d.mean()) if is_ratio == "sequence" else d)
        inside = np.clip(ratio, 1 - low, 1 + high)
        surrogate = inside * a * lp if is_ratio == "cispo" else np.minimum(ratio * a, inside * a)
        rho = np.exp(ref[rows] - lp)
        loss += ((-correction[rows] * surrogate + beta * (rho - 1 - np.log(rho))) / divisor[rows]).sum()
        start += n
    return loss


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("is_ratio", grpo.IS_RATIOS)
@pytest.mark.parametrize("loss", grpo.LOSSES)
def test_every_variant_equals_numpy_and_its_gradient_finite_differences(loss, is_ratio, beta):
    rng = np.random.default_rng(7)
    old = np.log(rng.uniform(0.1, 0.6, 8))
    logp = old + rng.uniform(-0.6, 0.6, 8)
    advantage = np.repeat([1.3, -0.7, -1.1], LENGTHS)
    ref, correction = old + rng.uniform(-0.5, 0.5, 8), rng.uniform(0.5, 2, 8)
    divisor = {"token": np.full(8, 20.0), "sequence": np.repeat([5 * 3.0, 5 * 1.0, 5 * 4.0], LENGTHS),
               "constant": np.full(8, 5 * 30.0)}[loss]
    given = grpo.denominators(LENGTHS, loss, samples=5, tokens=20, max_tokens=30)
    assert given.dtype == torch.float32
    assert given.tolist() == divisor.tolist()
    x = torch.tensor(logp, requires_grad=True)
    options = {"reference_logp_N": torch.tensor(ref), "beta": beta} if beta else {}
    value, sums = policy_loss(x, torch.tensor(old), torch.tensor(advantage), given.double(), 0.2, 0.28,
                              is_ratio, LENGTHS, torch.tensor(correction), **options)
    value.backward()
    settings = (divisor, is_ratio, 0.2, 0.28, correction, ref, beta)
    assert value.item() == pytest.approx(numpy_loss(logp, old, advantage, *settings), rel=1e-10)
    for i in range(8):
        step = np.eye(8)[i] * 1e-6
        if is_ratio == "cispo":  # the clipped weight is detached: it stays while log p moves
            weight = np.clip(np.exp(logp - old), 0.8, 1.28)
            k3 = beta * (1 - np.exp(ref - logp))
            slope = ((-correction * weight * advantage + k3) / divisor)[i]
        else:
            up, down = (numpy_loss(logp + h, old, advantage, *settings) for h in (step, -step))
            slope = (up - down) / 2e-6
        assert x.grad[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)
    if beta:
        rho = np.exp(ref - logp)
        assert sums["kl"].item() == pytest.approx((rho - 1 - np.log(rho)).sum(), rel=1e-6)


def test_clipped_tokens_by_hand_for_each_ratio():
    """Ratios 2, .5, 1.1, 2 with advantages +, +, -, 0. Token: only 2 with + is muted. Cispo: 2 and .5 get
    another weight. Sequence: the mean ratio is 1 for the first two and 1.48 for the others, free if A < 0."""
    logp = torch.tensor([2.0, 0.5, 1.1, 2.0]).log()
    advantage = torch.tensor([1.0, 1.0, -1.0, 0.0])
    counts = {r: policy_loss(logp, torch.zeros(4), advantage, 4, 0.2, 0.2, r, [2, 2])[1]["clipped"].item()
              for r in grpo.IS_RATIOS}
    assert counts == {"token": 1, "cispo": 2, "sequence": 0}
    flipped = policy_loss(logp, torch.zeros(4), -advantage, 4, 0.2, 0.2, "sequence", [2, 2])[1]["clipped"]
    assert flipped == 1, "the sample of ratio 1.48 is muted; its token without advantage has nothing to mute"


@pytest.mark.parametrize("is_ratio", grpo.IS_RATIOS)
def test_on_policy_every_ratio_gives_the_same_gradient_of_a_sample(is_ratio):
    """-A log p, averaged over the sample by `sequence`: with `sequence` aggregation all are equal."""
    weight = torch.randn(8, 3, generator=torch.Generator().manual_seed(8), requires_grad=True)
    logp = (weight @ torch.tensor([0.3, -0.2, 0.9])).tanh() - 2
    divisor = grpo.denominators(LENGTHS, "sequence", 3, 8, 30)
    advantage = torch.tensor([1.0, -2.0, 0.5]).repeat_interleave(torch.tensor(LENGTHS))
    loss, sums = policy_loss(logp, logp.detach(), advantage, divisor, is_ratio=is_ratio, lengths=LENGTHS)
    grad = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    plain = torch.autograd.grad((-advantage * logp / divisor).sum(), weight)[0]
    if is_ratio == "sequence":  # per sample, not per token
        torch.testing.assert_close(grad.sum(0), plain.sum(0))
    else:
        torch.testing.assert_close(grad, plain)
    assert sums["clipped"] == 0


def test_the_correction_for_the_sampler_is_capped_and_detached():
    old = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    weight = grpo.truncated_ratio(old, torch.tensor([-1.0, -3.0, -0.5]), 2.0)
    assert weight.tolist() == pytest.approx([1.0, 2.0, math.exp(-0.5)]) and not weight.requires_grad


def test_unknown_variants_are_errors_that_name_them():
    with pytest.raises(ValueError, match="'sentence'"):
        grpo.denominators([1], "sentence", 1, 1, 1)
    with pytest.raises(ValueError, match="'gspo'"):
        policy_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), 1, is_ratio="gspo")


def test_the_denominator_is_the_one_that_is_given():
    """Not the number of tokens at hand: those are one micro-batch's."""
    logp = torch.full((6,), -1.0)
    for denominator in (6, 60, 1e6):
        loss, _ = policy_loss(logp, logp, torch.ones(6), denominator)
        assert loss.item() == pytest.approx(-6 / denominator)


def test_mismatch_by_hand():
    """Differences log 2, 0, -log 4: r is 2, 1, 1/4 and r - 1 - log r is 1 - log 2, 0, log 4 - 3/4."""
    rollout = torch.tensor([-1.0, -2.0, -3.0])
    logp = rollout + torch.tensor([math.log(2), 0.0, -math.log(4)])
    sums = mismatch(logp.requires_grad_(), rollout)
    assert sums["gap/mean"].item() == pytest.approx(3 * math.log(2))
    assert sums["gap/k3"].item() == pytest.approx(0.25 + math.log(2))
    assert sums["gap/max"].item() == pytest.approx(math.log(4))
    assert not any(value.requires_grad for value in sums.values())


def test_k3_stays_finite_however_far_two_policies_are_apart():
    x = torch.tensor([20.0, 21.0, 90.0, 1e4, -90.0, -1e4], requires_grad=True)
    found = grpo.k3(x)
    found.sum().backward()
    assert found.tolist() == pytest.approx([math.exp(20) - 21] * 4 + [89, 9999], rel=1e-6)
    assert x.grad.isfinite().all() and x.grad[0] > 1e8
    assert mismatch(torch.zeros(10**4), torch.full((10**4,), -200.0))["gap/k3"].isfinite()


def test_mismatch_is_zero_without_tokens_and_never_negative():
    assert all(value == 0 for value in mismatch(torch.empty(0), torch.empty(0)).values())
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(1000, generator=generator), torch.randn(1000, generator=generator)
    for scale in (1.0, 1e-3, 1e-6):
        assert mismatch(a, a + scale * b)["gap/k3"] >= 0


# ------------------------------------------------------------------------------------------ micro-batches


def tiny_model():
    config = ModelConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                         initializer_range=0.2)
    return Qwen2(config).init_weights_(0)


def gradient(model, parts, loss="token", **options):
    """Loss, sums and gradients of all parameters, added up over micro-batches as in the training loop."""
    model = copy.deepcopy(model)
    samples = [s for part in parts for s in part]
    count = len(samples), sum(len(s.token_ids) for s in samples)
    total = {}
    for part in parts:
        batch = collate(part)
        hidden_TC, keep = model(batch.tokens_T, batch.attention), batch.mask_T
        logp, _ = linear_logprob(hidden_TC[keep], model.head_weight[:53], batch.targets_T[keep], 0.8)
        old = batch.rollout_logp_T[keep]
        divisor = grpo.denominators(batch.lengths, loss, *count, 16)
        if "beta" in options:
            options["reference_logp_N"] = old - 0.3
        value, sums = policy_loss(logp, old, batch.advantage_T[keep], divisor, 0.2, 0.28,
                                  lengths=batch.lengths, correction_N=grpo.truncated_ratio(logp, old, 1.1),
                                  **options)
        value.backward()
        sums |= mismatch(logp, old) | {"loss": value.detach()}
        sums.pop("gap/max"), sums.pop("clipped_N")
        total = {name: total.get(name, 0.0) + sums[name].item() for name in sums}
    return total["loss"], total, [p.grad for p in model.parameters()]


def off_policy(model, samples):
    """The samples with an old policy's logprobs near the model's own, so that some ratios are clipped."""
    rng, out = random.Random(5), []
    for s in samples:
        batch = collate([s])
        with torch.no_grad():
            hidden_TC = model(batch.tokens_T, batch.attention)[batch.mask_T]
            logp, _ = linear_logprob(hidden_TC, model.head_weight[:53], batch.targets_T[batch.mask_T], 0.8)
        old = [p + rng.uniform(-0.4, 0.4) for p in logp.tolist()]
        out.append(dataclasses.replace(s, rollout_logp=old))
    return out


@pytest.mark.parametrize("options", [{}, {"is_ratio": "sequence"}, {"is_ratio": "cispo"}, {"beta": 0.1}],
                         ids=str)
@pytest.mark.parametrize("loss", grpo.LOSSES)
def test_a_batch_split_into_micro_batches_has_the_same_loss_and_gradient(loss, options):
    """1, 2 and 5 micro-batches, permuted samples, a split by budget, empty ones: one global denominator.

    It does not exercise several ranks, whose gradients are summed the same way.
    """
    model = tiny_model()
    samples = off_policy(model, samples_of(1, 14))
    value, sums, grads = gradient(model, [samples], loss, **options)
    norm = math.sqrt(sum(g.square().sum().item() for g in grads))
    assert norm > 0.01 and sums["clipped"] > 0 and abs(value) > 1e-3 and ("kl" in sums) == ("beta" in options)
    shuffled = random.Random(6).sample(samples, len(samples))
    lengths = [len(s.prompt_ids) + len(s.token_ids) for s in samples]
    everyone = list(range(len(samples)))
    splits = {
        "permuted": [shuffled],
        "2": [samples[:5], samples[5:]],
        "5": [samples[:1], samples[1:4], samples[4:5], samples[5:11], samples[11:]],
        "5 permuted": [shuffled[i::5] for i in range(5)],
        "each alone": [[s] for s in samples],
        "budget": [[samples[i] for i in part] for (part,) in pack(everyone, lengths, work(lengths), 40)],
        "budget and empty ones": [[samples[i] for i in part]
                                   for part in pack(everyone, lengths, work(lengths), 40, 17)[0]],
    }
    assert len(splits["budget"]) > 2 and [] in splits["budget and empty ones"]
    for name, parts in splits.items():
        other_value, other_sums, other_grads = gradient(model, parts, loss, **options)
        assert other_value == pytest.approx(value, rel=1e-5), name
        assert other_sums == pytest.approx(sums, rel=1e-5), name
        pairs = zip(grads, other_grads, strict=True)
        difference = math.sqrt(sum((a - b).square().sum().item() for a, b in pairs))
        assert difference <= 1e-5 * norm, name


def test_neighbours_in_a_batch_do_not_change_a_samples_logprobs():
    """Attention stays inside a sample and positions start anew with each."""
    model, samples = tiny_model(), samples_of(2, 9)

    def logprobs(part):
        batch = collate(part)
        with torch.no_grad():
            hidden_TC = model(batch.tokens_T, batch.attention)[batch.mask_T]
            logp, _ = linear_logprob(hidden_TC, model.head_weight, batch.targets_T[batch.mask_T])
        return logp.split([len(s.token_ids) for s in part])

    for s, together in zip(samples, logprobs(samples), strict=True):
        torch.testing.assert_close(logprobs([s])[0], together, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- along the text


@pytest.mark.parametrize("seed", range(20))
def test_sums_along_the_text_are_those_of_a_loop_and_add_up_over_micro_batches(seed):
    rng, most = random.Random(seed), random.Random(seed).choice([1, 7, 64, 1000])
    samples, rows = [], []
    for _ in range(rng.randint(1, 7)):
        n = rng.randint(1, most)
        thought = rng.choice([0, n, rng.randint(0, n)])
        samples.append(Sample([1], [2] * n, [0.0] * n, 1.0, think_tokens=thought))
        rows.append(torch.rand(4, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)))
    expected = torch.zeros(5, 2, 8, dtype=torch.float64)
    for s, x in zip(samples, rows):
        for t in range(len(s.token_ids)):
            expected[:, int(t >= s.think_tokens), min(7, 8 * t // most)] += torch.tensor([1, *x[:, t]])
    cut = rng.randint(0, len(samples))
    total = torch.zeros(5, 2, 8, dtype=torch.float64)
    for part in (slice(cut), slice(cut, None)):
        values = torch.cat([torch.zeros(4, 0, dtype=torch.float64), *rows[part]], 1)
        sums = grpo.along(collate(samples[part]), most, *values)
        assert list(sums) == list(range(grpo.ALONG))
        total += torch.tensor(list(sums.values())).view(5, 2, 8)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
    found = grpo.along_metrics(dict(enumerate(total.flatten().tolist())))
    mean = expected[1] / expected[0]
    assert found["along/entropy/answer"] == pytest.approx(mean[1].tolist(), nan_ok=True)
    assert found["along/gap/think"] == pytest.approx((expected[2] / expected[0])[0].tolist(), nan_ok=True)
    shares = found["along/advantage_share/think"] + found["along/advantage_share/answer"]
    assert sum(shares) == pytest.approx(1) and sum(found["along/tokens/think"]) == expected[0, 0].sum()


def test_the_slope_at_the_same_prompt_is_that_of_least_squares_with_an_intercept_for_each():
    generator = torch.Generator().manual_seed(0)
    x, offset = torch.rand(6, 5, generator=generator).double() * 100, torch.arange(6.0)[:, None] * 50
    y = 0.3 * x + offset + torch.rand(6, 5, generator=generator).double()
    y[2, 1] = torch.nan
    present = ~y.isnan()
    groups = torch.nn.functional.one_hot(torch.arange(6).repeat_interleave(5), 6).view(6, 5, 6).double()
    columns = torch.cat((x[..., None], groups), -1)[present]
    expected = torch.linalg.lstsq(columns, y[present][:, None]).solution[0].item()
    assert grpo.slope(x, y) == pytest.approx(expected) and 0.25 < expected < 0.35
    assert grpo.slope(torch.ones(2, 3), torch.rand(2, 3)) == 0
