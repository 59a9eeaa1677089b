"""Ratings and comparisons against games of known strengths, another algorithm and numbers by hand."""

import math

import numpy as np
import pytest

from evaluation import elo


def tournament(seed: int, models: int, baselines: int, prompts: int,
               ties: float = 0.0) -> tuple[dict[str, float], list]:
    """(true ratings, the baselines' mean being 1000; games), that share of the weaker's wins tied."""
    random = np.random.default_rng(seed)
    names = [f"model {i}" for i in range(models)], [f"baseline {i}" for i in range(baselines)]
    ratings = dict(zip(names[0] + names[1], random.normal(1000, 150, models + baselines).tolist()))
    offset = elo.MEAN - np.mean([ratings[name] for name in names[1]])
    ratings = {name: rating + offset for name, rating in ratings.items()}
    games = []
    for model in names[0]:
        for baseline in names[1]:
            chance = 1 / (1 + 10**((ratings[baseline] - ratings[model]) / 400))
            tie = ties * min(chance, 1 - chance)  # half to each: the expected points stay
            drawn = random.choice([1.0, 0.5, 0.0], prompts, p=[chance - tie, 2 * tie, 1 - chance - tie])
            games += [[model, baseline, f"p{i}", points] for i, points in enumerate(drawn.tolist())]
    return ratings, games


def by_minorisation(games: list, rounds: int = 20_000) -> dict[str, float]:
    """Bradley-Terry by Hunter's MM iterations, in plain Python: the mean of all ratings is 0."""
    players = sorted({name for game in games for name in game[:2]})
    wins, met = dict.fromkeys(players, 0.0), {}
    for a, b, _, points in games:
        wins[a] += points
        wins[b] += 1 - points
        met[a, b] = met.get((a, b), 0) + 1
    strength = dict.fromkeys(players, 1.0)
    for _ in range(rounds):
        shares = dict.fromkeys(players, 0.0)
        for (a, b), n in met.items():
            for name in (a, b):
                shares[name] += n / (strength[a] + strength[b])
        new = {name: wins[name] / shares[name] for name in players}
        scale = math.exp(sum(math.log(s) for s in new.values()) / len(new))
        new = {name: s / scale for name, s in new.items()}
        if max(abs(new[name] / strength[name] - 1) for name in players) < 1e-12:
            break
        strength = new
    return {name: 400 * math.log10(s) for name, s in strength.items()}


def result(name: str, values: list, **changes) -> dict:
    records = [{"id": str(i), "scores": scores, "texts": {"words": i}}
               for i, scores in enumerate(values)]
    return {"name": name, "benchmark": "ruler", "data": {"sha256": "1"}, "judge": None,
            "records": records} | changes


# ---------------------------------------------------------------------- ratings


@pytest.mark.parametrize("ties", [0.0, 0.6])
def test_known_strengths_are_recovered_from_ten_thousand_games(ties):
    """Each within its interval for this seed; over 20 seeds 95 % are."""
    truth, games = tournament(9, 5, 5, 400, ties)
    assert len(games) == 10_000
    fitted = elo.fit(games, seed=1)
    assert all(r.lo <= truth[name] <= r.hi and r.hi - r.lo < 50 for name, r in fitted.items())
    ratings = [r.rating for r in fitted.values()]
    assert ratings == sorted(ratings, reverse=True)
    inside = []
    for seed in range(20):
        truth, games = tournament(100 + seed, 5, 5, 100, ties)
        inside += [r.lo <= truth[name] <= r.hi for name, r in elo.fit(games, rounds=300).items()]
    assert 0.90 <= np.mean(inside) <= 0.99  # of 200 ratings, which are not independent


def test_ratings_are_those_of_another_algorithm_and_do_not_depend_on_the_order_of_games():
    _, games = tournament(3, 4, 3, 25, ties=0.5)
    fitted, other = elo.fit(games, rounds=50), by_minorisation(games)
    offset = 1000 - np.mean([other[f"baseline {i}"] for i in range(3)])
    assert all(r.rating == pytest.approx(other[name] + offset, abs=1e-6) for name, r in fitted.items())
    assert np.mean([fitted[f"baseline {i}"].rating for i in range(3)]) == pytest.approx(1000)
    assert elo.fit(games[::-1], rounds=50) == fitted != elo.fit(games, rounds=50, seed=1)
    assert not any(r.virtual for r in fitted.values())


def test_two_players_by_hand_with_ties_and_a_missing_verdict():
    """7 wins, 2 ties and 1 loss are 8 points of 10: 400 log10(8 / 2) above the other."""
    points = [1] * 7 + [0.5] * 2 + [0] + [None]
    fitted = elo.fit([["m", "b", str(i), p] for i, p in enumerate(points)])
    m, b = fitted["m"], fitted["b"]
    assert (m.rating, b.rating) == pytest.approx((1000 + 400 * math.log10(4), 1000))
    assert (m.games, m.wins, m.ties, m.losses) == (10, 7, 2, 1)
    assert (b.games, b.wins, b.ties, b.losses) == (10, 1, 2, 7)
    assert m.lo < m.rating < m.hi and b.lo == b.hi == 1000
    swapped = elo.fit([["b", "m", str(i), None if p is None else 1 - p] for i, p in enumerate(points)])
    assert swapped["b"].rating - swapped["m"].rating == pytest.approx(b.rating - m.rating)
    assert swapped["m"].rating == 1000  # it stands second now


def test_pinned_ratings_stay_and_set_the_scale():
    _, games = tournament(3, 4, 3, 25)
    free = elo.fit(games, rounds=100)
    shift = 1200 - free["baseline 0"].rating
    pinned = {"baseline 0": 1200.0, "baseline 2": free["baseline 2"].rating + shift}
    fitted = elo.fit(games, pinned, rounds=100)
    for name, rating in pinned.items():
        assert fitted[name].rating == fitted[name].lo == fitted[name].hi == pytest.approx(rating)
    assert all(r.rating == pytest.approx(free[name].rating + shift) for name, r in fitted.items())
    far = elo.fit(games, {"baseline 0": 800, "baseline 1": 1000, "baseline 2": 1500}, rounds=20)
    gradient = 0.0  # of the likelihood in model 0's rating: its points, less those that are expected
    for model, baseline, _, points in games:
        if model == "model 0":
            gradient += points - 1 / (1 + 10**((far[baseline].rating - far[model].rating) / 400))
    assert gradient == pytest.approx(0, abs=1e-6)
    everyone = dict.fromkeys(free, 1000.0)
    assert all(r.rating == pytest.approx(1000) for r in elo.fit(games, everyone, rounds=5).values())


def test_a_perfect_record_has_a_finite_rating_that_says_so():
    """10 wins of 10 with a virtual tie of half a game are 10.25 points of 10.5."""
    perfect = [["m", "b", str(i), 1] for i in range(10)]
    fitted = elo.fit(perfect)
    assert fitted["m"].virtual and fitted["m"].rating == pytest.approx(1000 + 400 * math.log10(41))
    lost = [["m", "b", str(i), 0] for i in range(10)]
    assert elo.fit(lost)["m"].rating == pytest.approx(1000 - 400 * math.log10(41))
    assert elo.fit(perfect, {"b": 1100})["m"].rating == pytest.approx(1100 + 400 * math.log10(41))
    group = perfect + [["m", "n", "0", 1], ["n", "m", "1", 1], ["n", "b", "2", 1]]  # b never wins
    assert all(r.virtual and math.isfinite(r.lo + r.hi) for r in elo.fit(group).values())
    once = [["m", "b", str(i), i > 0] for i in range(10)]  # a draw may miss the only loss
    fitted = elo.fit(once)
    assert not fitted["m"].virtual and fitted["m"].rating == pytest.approx(1000 + 400 * math.log10(9))
    assert math.isfinite(fitted["m"].hi) and fitted["m"].hi > 1500


def test_strengths_of_any_size_converge():
    random = np.random.default_rng(0)
    points = random.random((200, 9, 9)) * 10.0 ** random.uniform(-6, 6, (200, 9, 9)) * (1 - np.eye(9))
    theta = elo.strengths(points, np.full(9, np.nan))
    chance = 1 / (1 + np.exp(theta[:, None, :] - theta[:, :, None]))
    gradient = (points - (points + points.swapaxes(1, 2)) * chance).sum(2)
    assert (abs(gradient) <= 1e-6 * points.sum(2)).all()


@pytest.mark.parametrize("games, pinned, why", [
    ([], None, "no game has both verdicts"),
    ([["m", "b", "1", None]], None, "no game has"),
    ([["m", "b", "1", 0.7]], None, r"game \['m', 'b', '1', 0.7\]: give two players"),
    ([["m", "m", "1", 1]], None, "give two players"),
    ([["m", "b", "1", 1], ["n", "c", "1", 0]], None, "groups that never met"),
])
def test_games_that_cannot_be_rated_are_refused(games, pinned, why):
    with pytest.raises(ValueError, match=why):
        elo.fit(games, pinned)


def test_a_pinned_player_without_a_game_changes_nothing():
    games = [["m", "b", str(i), i % 2] for i in range(4)]
    assert elo.fit(games, {"c": 7.0}, rounds=5) == elo.fit(games, rounds=5)


def test_groups_that_never_met_have_a_scale_by_pinned_players():
    games = [[m, b, str(i), i % 2] for m, b in (("m", "b"), ("n", "c")) for i in range(4)]
    fitted = elo.fit(games, {"b": 900, "c": 1300})
    assert (fitted["m"].rating, fitted["n"].rating) == pytest.approx((900, 1300))


# ---------------------------------------------------------------------- two results


def test_a_difference_by_hand():
    """Gaps 1, 2, 3 and 6 of mean 3: all four of one sign in 2 of 16 exchanges, so p is 1/8."""
    a = result("a", [{"S_l": 11.0}, {"S_l": 12.0}, {"S_l": 13.0}, {"S_l": 16.0}, {"S_l": None}])
    b = result("b", [{"S_l": 10.0}] * 6)
    d = elo.paired(a, b)["S_l"]
    assert (d.difference, d.n, d.real) == (3.0, 4, False)
    assert d.p == d.adjusted == pytest.approx(1 / 8, abs=0.01)
    assert 1 <= d.lo < 2 and 4 < d.hi <= 6
    back = elo.paired(b, a)["S_l"]
    assert (back.difference, back.lo, back.hi, back.p) == pytest.approx((-3.0, -d.hi, -d.lo, d.p))
    assert elo.paired(a, b) == elo.paired(a, b) != elo.paired(a, b, seed=1)
    assert elo.paired(a, b, field="texts")["words"].difference == 0
    same = elo.paired(a, a)["S_l"]
    assert (same.difference, same.lo, same.hi, same.p, same.real) == (0, 0, 0, 1, False)


def test_scores_that_one_result_lacks_are_not_compared():
    a = result("a", [{"S_l": 1.0, "S_q": None, "S_l/1": 2.0}])
    assert list(elo.paired(a, result("b", [{"S_l": 1.0, "S_q": 3.0, "S_l/2": 2.0}]))) == ["S_l"]


def test_the_interval_is_that_of_normal_differences():
    gaps = np.random.default_rng(0).normal(1, 2, 400)
    d = elo.paired(result("a", [{"S": x} for x in gaps]), result("b", [{"S": 0.0}] * 400))["S"]
    half = 1.96 * gaps.std() / 20
    assert (d.lo, d.hi) == pytest.approx((gaps.mean() - half, gaps.mean() + half), abs=0.02)
    assert d.real and d.p == pytest.approx(1 / 10_001)


def test_no_difference_is_rarely_called_real_however_few_the_records():
    """60 comparisons of 20 parts of 8 records each: p below 0.05 in 5 % of the parts, one called real in
    hardly any comparison; without Holm's correction it would be in two of three."""
    random, calls, p = np.random.default_rng(1), 0, []
    for _ in range(60):
        a, b = ([{f"part/{i // 8}": x} for i, x in enumerate(random.normal(size=160))] for _ in "ab")
        found = elo.paired(result("a", a), result("b", b), rounds=1000).values()
        calls += any(d.real for d in found)
        p += [d.p for d in found]
    assert calls <= 7 and np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.02)


def test_many_comparisons_are_corrected_within_their_family():
    assert elo.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert elo.holm({0: 0.6, 1: 0.7}) == {0: 1.0, 1: 1.0} and elo.holm({}) == {}
    gaps = np.random.default_rng(2).normal(0.5, 1, 40)
    rows = [{"S": x, **{f"part/{i}": x for i in range(50)}} for x in gaps]
    found = elo.paired(result("a", rows), result("b", [dict.fromkeys(row, 0.0) for row in rows]))
    assert found["S"].adjusted == found["S"].p == found["part/0"].p and found["S"].real
    assert found["part/0"].adjusted == pytest.approx(50 * found["part/0"].p) and not found["part/0"].real


def test_results_without_a_common_record_are_refused():
    with pytest.raises(ValueError, match="a and b have no common record"):
        elo.paired(result("a", [{"S": 1.0}]), result("b", [{"S": 1.0}], records=[]))


def test_scores_that_are_left_out_are_in_no_family():
    a, b = result("a", [{"S": 1.0, "T": x} for x in range(9)]), result("b", [{"S": 0.0, "T": 0.0}] * 9)
    found = elo.paired(a, b, without={"T"})
    assert list(found) == ["S"] and found["S"].adjusted == found["S"].p
