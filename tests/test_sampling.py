"""Random numbers and draws of kernels/sample.py, against pure Python, NumPy and known distributions."""

import math

import numpy as np
import pytest
import torch

from kernels.sample import GOLDEN, TILE, draw, inverse_cdf, keep_top, mix64, streams, uniforms

MASK = 2**64 - 1
SMALLEST, LARGEST = 2.0**-53, 1 - 2.0**-53


def splitmix64(state):
    """One output of splitmix64, whose state was stepped already; unsigned 64 bits, in Python integers."""
    z = state & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def signed(x):
    return x - 2**64 if x >= 2**63 else x


def numbers(seed, sample, positions):
    """Uniforms of one sample at many positions."""
    key = streams(torch.tensor([seed]), torch.tensor([sample]))
    return uniforms(key.expand(len(positions)), torch.as_tensor(positions))


def kolmogorov_smirnov(u):
    """sqrt(n) times the largest distance to the uniform CDF; 1.95 is passed once in 1,000 times."""
    u, n = np.sort(u), len(u)
    grid = np.arange(n)
    return math.sqrt(n) * max((u - grid / n).max(), ((grid + 1) / n - u).max())


def chi_square(counts, expected):
    """Standard deviations by which the statistic exceeds its mean, the degrees of freedom."""
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


# ------------------------------------------------------------------------------------------ uniforms


def test_mix64_is_splitmix64():
    """On random and extreme words, and on the well-known first outputs for seed 1234567."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-2**63, 2**63 - 1, (5000,), generator=generator)
    words = torch.cat((words, torch.tensor([0, 1, -1, 2**63 - 1, -2**63, GOLDEN, 2**31, -2**31])))
    assert mix64(words).tolist() == [signed(splitmix64(w)) for w in words.tolist()]
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
                 16408922859458223821]
    states = 1234567 + GOLDEN * torch.arange(1, 6)
    assert [x & MASK for x in mix64(states).tolist()] == published


@pytest.mark.parametrize("seed, sample, position", [
    (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**62 + 12345, 31, 13999), (-7, 5, 3),
    (2**63 - 1, 2**31, 2**40)])
def test_a_uniform_is_the_top_52_bits_of_a_keyed_splitmix64(seed, sample, position):
    """Independent of torch's generators, devices and versions: the same number anywhere, for ever."""
    golden = 0x9E3779B97F4A7C15
    key = splitmix64(splitmix64(seed) + golden * (sample + 1))
    bits = splitmix64(key + golden * (position + 1)) >> 12
    got = numbers(seed, sample, [position])
    assert got.dtype == torch.float64 and got.item() == (bits + 0.5) / 2**52


def test_uniforms_lie_strictly_between_zero_and_one():
    """Also where the hashed bits are all zeros or all ones: at 0 or 1 a draw could fall on weight zero."""
    def unmixed(x):  # the state that mix64 maps to x: its xor-shifts and odd products undone
        x = x ^ (x >> 31) ^ (x >> 62)
        x = x * pow(0x94D049BB133111EB, -1, 2**64) & MASK
        x = x ^ (x >> 27) ^ (x >> 54)
        x = x * pow(0xBF58476D1CE4E5B9, -1, 2**64) & MASK
        return x ^ (x >> 30) ^ (x >> 60)

    for bits, value in ((0, SMALLEST), (MASK, LARGEST)):
        stream = torch.tensor([signed((unmixed(bits) - (GOLDEN & MASK)) & MASK)])
        assert uniforms(stream, torch.tensor([0])).item() == value
    u = numbers(3, 0, range(100_000))
    assert 0 < u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1


def test_uniforms_are_reproducible_and_independent_of_their_neighbours():
    seeds, samples, positions = torch.arange(50), torch.arange(50) % 7, torch.arange(50) * 13
    together = uniforms(streams(seeds, samples), positions)
    shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(together, uniforms(streams(seeds, samples), positions))
    moved = uniforms(streams(seeds[shuffled], samples[shuffled]), positions[shuffled])
    assert torch.equal(together[shuffled], moved)
    keys = zip(seeds.tolist(), samples.tolist(), positions.tolist(), strict=True)
    alone = [numbers(seed, sample, [position]).item() for seed, sample, position in keys]
    assert together.tolist() == alone


def test_uniforms_differ_by_seed_by_sample_and_by_position():
    """All 30,000 of a small grid are different, nor is a sample another one moved by some positions."""
    grid = torch.meshgrid(torch.arange(30), torch.arange(20), torch.arange(50), indexing="ij")
    seeds, samples, positions = (x.flatten() for x in grid)
    u = uniforms(streams(seeds, samples), positions)
    assert len(u.unique()) == 30 * 20 * 50


@pytest.mark.parametrize("along", ["seed", "sample", "position"])
def test_uniforms_are_uniform_and_uncorrelated_along_each_key(along):
    """1e5 draws: mean, variance, Kolmogorov-Smirnov, chi-square, and 20 x 20 bins of neighbours."""
    n = 100_000
    moving, zero = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    seeds, samples, positions = (moving if along == key else zero for key in ("seed", "sample", "position"))
    u = uniforms(streams(seeds, samples), positions).numpy()
    assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * n) and abs(u.var() - 1 / 12) < 4 / math.sqrt(180 * n)
    assert kolmogorov_smirnov(u) < 1.95
    assert abs(chi_square(np.histogram(u, 100, (0, 1))[0], n / 100)) < 4
    low_bits = (u * 2**30) % 1
    assert kolmogorov_smirnov(low_bits) < 1.95
    for lag in (1, 2, 64):
        a, b = u[:-lag], u[lag:]
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(n)
        assert abs(chi_square(np.histogram2d(a, b, 20, [[0, 1]] * 2)[0].ravel(), len(a) / 400)) < 4


# ------------------------------------------------------------------------------------------ inverse CDF


def searched(weights, u):
    """The id by NumPy: fp64 running sum over the whole row, first id that passes u * total."""
    cdf = weights.astype(np.float64).cumsum()
    return int(np.searchsorted(cdf, u * cdf[-1], side="right"))


def sparse_weights(seed, rows, columns):
    """Weights over many magnitudes, more than half of them zero, some whole tiles of zeros."""
    rng = np.random.default_rng(seed)
    weights = np.exp(rng.normal(0, 4, (rows, columns))) * (rng.random((rows, columns)) < 0.4)
    for tile in range(columns // TILE):
        weights[rng.random(rows) < 0.3, tile * TILE:(tile + 1) * TILE] = 0
    weights[np.arange(rows), rng.integers(0, columns, rows)] = 1.0
    return weights.astype(np.float32)


@pytest.mark.parametrize("tiles", [1, 2, 5, 16])
def test_inverse_cdf_equals_a_search_over_the_whole_row(tiles):
    """Summing by tiles, two levels deep, is only a faster way to the same id."""
    weights = sparse_weights(tiles, 400, tiles * TILE)
    u = np.random.default_rng(tiles + 100).random(400)
    ids = inverse_cdf(torch.tensor(weights), torch.tensor(u))
    assert ids.tolist() == [searched(w, x) for w, x in zip(weights, u, strict=True)]


def test_inverse_cdf_is_exact_at_every_edge():
    """Whole-number weights have exact sums: u = k / 4096 is an edge, which belongs to the id after it."""
    rng = np.random.default_rng(0)
    weights = rng.multinomial(4096, rng.dirichlet(np.full(3 * TILE, 0.05))).astype(np.float32)
    weights[TILE:2 * TILE], weights[0] = 0, 0
    weights[-2] += 4096 - weights.sum()
    u = torch.arange(4096, dtype=torch.float64) / 4096
    ids = inverse_cdf(torch.tensor(weights).expand(4096, -1), u)
    assert ids.tolist() == np.repeat(np.arange(3 * TILE), weights.astype(int)).tolist()


@pytest.mark.parametrize("u", [SMALLEST, LARGEST, 0.5, 1 / 3, 2.0**-30])
def test_an_id_of_weight_zero_is_never_drawn(u):
    """At both ends of (0, 1), with zeros before, between and after the mass, and tiles without any."""
    weights = sparse_weights(7, 2000, 3 * TILE)
    weights[:500, :TILE], weights[500:1000, -TILE:] = 0, 0
    weights[np.arange(2000), np.where(np.arange(2000) % 2, 1, 3 * TILE - 2)] = 1e-6
    weights[:, [0, -1]] = 0
    ids = inverse_cdf(torch.tensor(weights), torch.full((2000,), u, dtype=torch.float64))
    assert (weights[np.arange(2000), ids] > 0).all()
    if u == SMALLEST:
        assert ids.tolist() == [int(np.flatnonzero(w)[0]) for w in weights]


def test_a_single_possible_id_is_drawn_for_any_uniform():
    for at in (0, 1, TILE - 1, TILE, 2 * TILE - 1):
        weights = torch.zeros(5, 2 * TILE)
        weights[:, at] = torch.tensor([1e-38, 1e-10, 1.0, 7.0, 1e30])
        for u in (SMALLEST, 0.5, LARGEST):
            assert inverse_cdf(weights, torch.full((5,), u, dtype=torch.float64)).tolist() == [at] * 5


# ------------------------------------------------------------------------------------------ draw


def logits_of(seed, rows, columns, scale=3.0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def weights_of(logits, temperature):
    """exp(z - max z) as draw computes it, bit for bit: another rounding could move an edge past a u."""
    z = logits / torch.full((len(logits), 1), temperature)
    return (z - z.max(-1, keepdim=True).values).exp().numpy()


def spread(rows):
    return numbers(11, 0, range(rows))


@pytest.mark.parametrize("columns", [1, 7, TILE - 1, TILE, TILE + 1, 2500])
def test_draw_handles_any_vocabulary_and_never_leaves_it(columns):
    """Padding to whole tiles has weight zero; the ids are those of a search without tiles."""
    logits, rows = logits_of(columns, 300, columns), 300
    weights = weights_of(logits, 0.9)
    ends = [torch.full((rows,), u, dtype=torch.float64) for u in (SMALLEST, LARGEST)]
    for u in (spread(rows), *ends):
        token, logp = draw(logits, u, torch.full((rows,), 0.9))
        assert token.min() >= 0 and token.max() < columns and logp.isfinite().all()
        for row, (w, x) in enumerate(zip(weights, u.tolist(), strict=True)):
            if (expected := searched(w, x)) != token[row]:  # tiles are summed in fp32: at an edge
                edges = np.cumsum(w, dtype=np.float64) / w.sum(dtype=np.float64)
                between = slice(*sorted((expected, token[row].item())))
                assert (abs(edges[between] - x) < 1e-6).all()


def test_frequencies_of_draws_follow_the_softmax_at_the_temperature():
    """20,000 draws at 0.7 over both sides of a tile's edge; the softmax at temperature 1 is far off."""
    logits = torch.full((1, TILE + 20), -50.0)
    ids = torch.arange(TILE - 8, TILE + 8)
    logits[0, ids] = torch.linspace(-2, 1.5, 16)
    n, counts = 20_000, np.zeros(TILE + 20)
    for start in range(0, n, 1000):
        u = numbers(5, 2, range(start, start + 1000))
        token, _ = draw(logits.expand(1000, -1), u, torch.full((1000,), 0.7))
        counts += np.bincount(token, minlength=TILE + 20)
    assert counts[ids].sum() == n
    assert abs(chi_square(counts[ids], n * (logits[0, ids] / 0.7).double().softmax(-1).numpy())) < 4
    assert chi_square(counts[ids], n * logits[0, ids].double().softmax(-1).numpy()) > 20


def test_greedy_and_sampled_rows_live_in_one_batch():
    """Temperature 0 takes the argmax whatever u, top-p and top-k are, and changes no other row."""
    logits, u = logits_of(1, 60, 1500, scale=0.5), spread(60)
    temperature = torch.where(torch.arange(60) % 3 == 0, 0.0, 0.8)
    greedy = temperature == 0
    for filters in ((), (torch.full((60,), 0.9), torch.full((60,), 40))):
        token, logp = draw(logits, u, temperature, *filters)
        assert torch.equal(token[greedy], logits[greedy].argmax(-1))
        others = [f[~greedy] for f in filters]
        alone = draw(logits[~greedy], u[~greedy], temperature[~greedy], *others)
        assert torch.equal(token[~greedy], alone[0])
        torch.testing.assert_close(logp[~greedy], alone[1], rtol=1e-6, atol=1e-6)
        assert (token[~greedy] != logits[~greedy].argmax(-1)).any()


@pytest.mark.parametrize("filters", [(), (0.3, 0), (1.0, 3), (0.8, 20)])
def test_the_logprob_is_that_of_the_full_softmax_at_the_temperature(filters):
    """The trainer recomputes it from logits and temperature, without top-p and top-k; greedy counts as 1."""
    rows = 90
    logits, temperature = logits_of(2, rows, 1300), torch.tensor([0.0, 0.6, 1.7]).repeat(30)
    given = (torch.full((rows,), filters[0]), torch.full((rows,), filters[1])) if filters else ()
    token, logp = draw(logits, spread(rows), temperature, *given)
    scaled = logits.double() / torch.where(temperature == 0, 1.0, temperature)[:, None]
    expected = scaled.log_softmax(-1).gather(-1, token[:, None])[:, 0]
    np.testing.assert_allclose(logp, expected, rtol=1e-5, atol=1e-5)
    assert logp.dtype == torch.float32 and (logp <= 0).all()


def test_logits_of_any_size_and_impossible_ids_are_safe():
    """Large logits must not overflow; an id at minus infinity is impossible."""
    logits = logits_of(3, 40, 1100) + torch.tensor([1e4, -1e4]).repeat(20)[:, None]
    logits[:, ::2] = -torch.inf
    token, logp = draw(logits, spread(40), torch.tensor([0.0, 0.0, 1.0, 0.01]).repeat(10))
    assert (token % 2 == 1).all() and logp.isfinite().all()


def test_draw_leaves_its_arguments_alone():
    logits, u = logits_of(4, 8, 1100), spread(8)
    given = [logits, u, torch.full((8,), 0.5), torch.full((8,), 0.9), torch.full((8,), 5)]
    before = [x.clone() for x in given]
    draw(*given)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


# ------------------------------------------------------------------------------------------ top-k and top-p


def kept_by(weights, top_p, top_k):
    """In NumPy: top-k first, then the fewest of those, largest first, that reach top_p of them."""
    ranked = np.argsort(-weights, kind="stable")[:top_k or None]
    ranked = ranked[weights[ranked] > 0]
    sums = weights[ranked].astype(np.float64).cumsum()
    return set(ranked[:int(np.searchsorted(sums, top_p * sums[-1], side="left")) + 1].tolist())


@pytest.mark.parametrize("top_p, top_k, kept", [
    (1.0, 0, {0, 1, 2, 3, 4}), (1.0, 1, {2}), (1.0, 2, {2, 0}), (1.0, 9, {0, 1, 2, 3, 4}),
    (0.5, 0, {2}), (0.51, 0, {2, 0}), (0.75, 0, {2, 0}), (0.76, 0, {2, 0, 4}), (1e-9, 0, {2}),
    (0.999, 0, {0, 1, 2, 3, 4}),
    # of the two that top-k leaves, 0.5 is 2/3: top-p first would have kept both
    (0.6, 2, {2}), (0.7, 2, {2, 0}), (0.85, 3, {2, 0}), (0.9, 3, {2, 0, 4}),
    # of equal weights the lower id stays
    (1.0, 4, {2, 0, 4, 1})])
def test_top_k_then_top_p_by_hand(top_p, top_k, kept):
    weights = torch.tensor([[0.25, 0.0625, 0.5, 0.0625, 0.125]])
    out = keep_top(weights, torch.tensor([top_p]), torch.tensor([top_k]))
    assert set(out[0].nonzero()[:, 0].tolist()) == kept
    assert torch.equal(out[0, sorted(kept)], weights[0, sorted(kept)]), "weights that stay are unchanged"


def test_top_k_and_top_p_keep_exactly_the_right_sets_row_by_row():
    """Every row has its own setting, as requests in one batch have."""
    rng = np.random.default_rng(9)
    logits = rng.normal(0, 2, (400, 300))
    weights = np.exp(logits - logits.max(-1, keepdims=True)).astype(np.float32)
    top_p = rng.choice([0.05, 0.3, 0.5, 0.9, 0.95, 0.99, 1.0], 400)
    top_k = rng.choice([0, 1, 2, 5, 50, 299, 300, 1000], 400)
    out = keep_top(torch.tensor(weights), torch.tensor(top_p), torch.tensor(top_k)).numpy()
    for row, w, p, k in zip(out, weights, top_p, top_k, strict=True):
        kept = kept_by(w, p, k)
        assert set(np.flatnonzero(row).tolist()) == kept, (p, k)
        ids = sorted(kept)
        assert (row[ids] == w[ids]).all()


def test_draws_reach_all_ids_that_top_k_and_top_p_keep_and_no_other():
    """The nucleus is taken at the temperature of the row, after scaling."""
    logits = logits_of(6, 1, 1200, scale=1.5)
    for temperature, top_p, top_k in ((1.0, 0.2, 0), (0.5, 0.8, 0), (1.3, 1.0, 12), (1.0, 0.7, 30)):
        weights = weights_of(logits, temperature)[0]
        kept = kept_by(weights, top_p, top_k)
        n = 1000
        settings = (torch.full((n,), x) for x in (temperature, top_p, top_k))
        token, _ = draw(logits.expand(n, -1), (torch.arange(n).double() + 0.5) / n, *settings)
        assert set(token.tolist()) <= kept and len(kept) > 3
        share = weights / weights[sorted(kept)].sum()
        likely = {i for i in kept if share[i] > 2 / n}
        assert likely <= set(token.tolist())
