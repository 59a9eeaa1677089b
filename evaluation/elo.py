"""Bradley-Terry (Elo) ratings with bootstrap intervals, and the paired comparison of two results.

Shapes: R bootstrap rounds, P prompts, N players; S scores, Q records.
"""

import math
from dataclasses import dataclass

import numpy as np

SCALE = 400 / math.log(10)  # P(a beats b) = 1 / (1 + 10^((R_b - R_a) / 400))
MEAN = 1000.0  # rating of the baselines where none is pinned
VIRTUAL = 0.25  # points to both of a pair, half a game and a tie, where ratings would be infinite
LEVEL = 0.05  # of chance in one family of differences that none is real, and one is called so


@dataclass(frozen=True)
class Rating:
    rating: float
    lo: float  # 95 % interval
    hi: float
    games: int
    wins: int
    ties: int
    losses: int
    virtual: bool  # all ratings rest on virtual games; of a perfect record the interval is too narrow


@dataclass(frozen=True)
class Difference:
    difference: float  # a - b
    lo: float  # 95 % interval
    hi: float
    p: float
    adjusted: float  # p for having compared several scores
    n: int  # records that have this score in both
    real: bool  # adjusted < LEVEL


# ---------------------------------------------------------------------- ratings


def fit(games: list, pinned: dict[str, float] | None = None, rounds: int = 1000,
        seed: int = 0) -> dict[str, Rating]:
    """Ratings by maximum likelihood, best first. A game: [model, baseline, prompt id, model's points].

    Points are 1, 0.5 (half a win each), 0, or None (not counted). Pinned players that play keep their
    ratings. Without any the mean rating of the baselines (players that never come first) is 1000, or of all
    players if there are no baselines. Intervals are percentiles over `rounds` bootstrap samples of prompts.

    A player that won, or lost, all games has no finite rating; nor has a group of players against the others.
    Where that is so, in the games or in a draw, each pair that met plays half a game more, a tie. Raises
    ValueError.
    """
    pinned, games = pinned or {}, [game for game in games if game[3] is not None]
    players = sorted({player for game in games for player in game[:2]})
    prompts = sorted({game[2] for game in games})
    place, row = ({name: i for i, name in enumerate(names)} for names in (players, prompts))
    if not games:
        raise ValueError("no game has both verdicts: there is nothing to rate")
    points_PNN = np.zeros((len(prompts), len(players), len(players)))
    results = np.zeros((len(players), 3), dtype=int)  # wins, ties, losses
    for model, baseline, prompt, points in games:
        if points not in (0, 0.5, 1) or model == baseline:
            raise ValueError(f"game {[model, baseline, prompt, points]}: give two players and 1, 0.5, 0")
        i, j = place[model], place[baseline]
        points_PNN[row[prompt], i, j] += points
        points_PNN[row[prompt], j, i] += 1 - points
        results[i, round(2 - 2 * points)] += 1
        results[j, round(2 * points)] += 1
    fixed_N = np.array([pinned.get(name, np.nan) for name in players]) / SCALE
    met = points_PNN.sum(0) + points_PNN.sum(0).T > 0
    if not linked(met[None], fixed_N)[0]:
        raise ValueError("the players fall into groups that never met, so they have no common scale: "
                         "rate each group alone, or pin a player of each")
    counts_RP = draws(np.random.default_rng(seed), rounds, len(prompts))
    counts_RP = np.concatenate((np.ones((1, len(prompts))), counts_RP))  # the first: the games as played
    points_RNN = np.tensordot(counts_RP, points_PNN, 1)
    virtual_R = ~linked(points_RNN > 0, fixed_N)
    points_RNN += virtual_R[:, None, None] * VIRTUAL * met
    ratings_RN = SCALE * strengths(points_RNN, fixed_N)
    if np.isnan(fixed_N).all():
        models = {game[0] for game in games}
        anchors = [place[name] for name in players if name not in models] or [*place.values()]
        ratings_RN += MEAN - ratings_RN[:, anchors].mean(1, keepdims=True)
    lo_N, hi_N = np.percentile(ratings_RN[1:], [2.5, 97.5], axis=0)
    return {players[i]: Rating(float(ratings_RN[0, i]), float(lo_N[i]), float(hi_N[i]),
                               int(results[i].sum()), *results[i].tolist(), bool(virtual_R[0]))
            for i in np.argsort(-ratings_RN[0], kind="stable")}


def draws(random: np.random.Generator, rounds: int, n: int) -> np.ndarray:
    """Counts of n items in n draws with replacement, one row per round."""
    return random.multinomial(n, np.full(n, 1 / n), rounds).astype(float)


def linked(beat_RNN: np.ndarray, fixed_N: np.ndarray) -> np.ndarray:
    """Whether every player is connected to every other by a chain of wins; pinned players (not NaN) count as
    one. Otherwise maximum likelihood ratings do not exist."""
    pinned = ~np.isnan(fixed_N)
    reach = (beat_RNN | np.eye(len(pinned), dtype=bool) | np.outer(pinned, pinned)).astype(np.float32)
    for _ in range(len(pinned).bit_length()):
        reach = (reach @ reach > 0).astype(np.float32)
    return reach.all(axis=(1, 2))


def strengths(points_RNN: np.ndarray, fixed_N: np.ndarray) -> np.ndarray:
    """Log strengths that maximise each round's likelihood, by Newton's method. Players with a value in
    fixed_N (not NaN) keep it; if there are none, the first player has 0."""
    if np.isnan(fixed_N).all():
        fixed_N = np.where(np.arange(len(fixed_N)), np.nan, 0.0)
    free = np.flatnonzero(np.isnan(fixed_N))
    games_RNN = points_RNN + points_RNN.swapaxes(1, 2)
    theta_RN = np.tile(np.where(np.isnan(fixed_N), np.nanmean(fixed_N), fixed_N), (len(points_RNN), 1))
    for _ in range(200):
        chance_RNN = 1 / (1 + np.exp(theta_RN[:, None, :] - theta_RN[:, :, None]))
        gradient_RN = (points_RNN - games_RNN * chance_RNN).sum(2)
        curve_RNN = games_RNN * chance_RNN * (1 - chance_RNN)
        hessian_RNN = np.eye(len(fixed_N)) * curve_RNN.sum(2)[:, :, None] - curve_RNN
        step = np.linalg.solve(hessian_RNN[:, free][:, :, free], gradient_RN[:, free, None])[..., 0]
        longest = np.abs(step).max(1, initial=0.0)
        theta_RN[:, free] += step * np.minimum(1, 1 / np.maximum(longest, 1e-300))[:, None]
        if longest.max() < 1e-9:
            return theta_RN
    raise ValueError("the ratings do not converge: are pinned ones far from what the games say?")


# ---------------------------------------------------------------------- two results


def paired(a: dict, b: dict, rounds: int = 10_000, seed: int = 0, field: str = "scores",
           without: set[str] = frozenset()) -> dict[str, Difference]:
    """The paired difference of two result.json of the same data in each score (or statistic of the "texts"),
    except those `without`, over common records.

    The interval holds percentiles of the mean difference over bootstrap samples of the records. p is that of
    a permutation test which exchanges each record's two values at random, because a bootstrap's p is too
    small for few records. A difference is real if its p stays below LEVEL after Holm's correction, headlines
    (names without a slash) among headlines, parts among parts. Raises ValueError where no record is common.
    """
    other = {record["id"]: record[field] for record in b["records"]}
    rows = [(record[field], other[record["id"]]) for record in a["records"] if record["id"] in other]
    names = list(dict.fromkeys(name for row, _ in rows for name in row if name not in without))
    if not rows:
        raise ValueError(f"{a['name']} and {b['name']} have no common record to compare")
    one_QS, two_QS = (np.array([[row[i].get(name) for name in names] for row in rows], float)
                      for i in (0, 1))
    gap_QS, given_QS = np.nan_to_num(one_QS - two_QS), ~np.isnan(one_QS - two_QS)
    n_S, sum_S, drawn, extreme_S = given_QS.sum(0), gap_QS.sum(0), [], np.zeros(len(names), int)
    random = np.random.default_rng(seed)
    for start in range(0, rounds, 1000):
        size = min(1000, rounds - start)
        counts_RQ = draws(random, size, len(rows))
        n_RS = counts_RQ @ given_QS
        drawn.append(counts_RQ @ gap_QS / np.where(n_RS, n_RS, np.nan))
        signs_RQ = random.integers(0, 2, (size, len(rows))) * 2.0 - 1
        extreme_S += (abs(signs_RQ @ gap_QS) >= abs(sum_S) - 1e-9).sum(0)
    drawn_RS, p = np.concatenate(drawn), ((extreme_S + 1) / (rounds + 1)).tolist()
    adjusted = {}
    for part in (False, True):
        adjusted |= holm({i: p[i] for i, name in enumerate(names) if n_S[i] and ("/" in name) == part})
    return {names[i]: Difference(
        float(sum_S[i] / n_S[i]), *np.nanpercentile(drawn_RS[:, i], [2.5, 97.5]).tolist(), p[i],
        adjusted[i], int(n_S[i]), adjusted[i] < LEVEL) for i in sorted(adjusted)}


def holm(p: dict[int, float]) -> dict[int, float]:
    """p-values of a family after Holm's correction: the smallest times n, the next times n - 1, and so on,
    made non-decreasing."""
    adjusted, worst = {}, 0.0
    for rank, i in enumerate(sorted(p, key=p.get)):
        adjusted[i] = worst = max(worst, min(1.0, p[i] * (len(p) - rank)))
    return adjusted
