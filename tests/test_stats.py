import numpy as np
import pytest
import scipy.stats
from scipy.stats import binomtest, norm

from graft.errors import UsageError
from graft.stats import Interval, compare_pair, holm, interval, verdicts


def answers(rng, quality, seeds=3, items=400, luck=0.0, noise=0.6):
    """Answers [seeds, items] of one method per entry of `quality`, which share the difficulty of the items.

    `quality` and `luck` (the spread over training runs) are on the scale of the latent score.
    """
    difficulty = rng.normal(0, 2, items)
    return [
        difficulty + rng.normal(0, noise, (seeds, items)) + rng.normal(0, luck, (seeds, 1)) + level > 0
        for level in quality
    ]


@pytest.fixture
def few_draws(monkeypatch):
    """A tenth of the draws, for tests that repeat a comparison hundreds of times."""
    monkeypatch.setattr("graft.stats.DRAWS", 2000)


# --- interval ---


@pytest.mark.parametrize(("right", "items"), [(0, 10), (7, 10), (850, 1000), (20, 20), (1, 1)])
def test_one_seed_is_wilson(right, items):
    found = interval([[1] * right + [0] * (items - right)])
    share, z = right / items, norm.ppf(0.975)
    centre = (share + z**2 / (2 * items)) / (1 + z**2 / items)
    half = z / (1 + z**2 / items) * np.sqrt(share * (1 - share) / items + z**2 / (4 * items**2))
    assert found.mean == share
    assert found.low == pytest.approx(max(0, centre - half), abs=1e-9)
    assert found.high == pytest.approx(min(1, centre + half), abs=1e-9)


@pytest.mark.parametrize(("share", "items"), [(0.5, 50), (0.85, 200), (0.97, 100)])
def test_wilson_covers(share, items):
    # Coverage of Wilson's interval swings around 95 %: 93 to 97 % at these points.
    rng = np.random.default_rng(1)
    found = [interval([rng.random(items) < share]) for _ in range(1000)]
    covered = np.mean([one.low <= share <= one.high for one in found])
    assert 0.925 <= covered <= 0.98


@pytest.mark.parametrize(("luck", "lowest"), [(0.0, 0.93), (0.3, 0.92)])
def test_interval_over_seeds_covers(luck, lowest, few_draws):
    # The true quality is that of 10 000 runs on 80 000 rows. 300 trials: standard error 1.3 %.
    rng = np.random.default_rng(2)
    truth = np.mean([answers(rng, [2.2], seeds=50, items=400, luck=luck)[0].mean() for _ in range(200)])
    found = [interval(answers(rng, [2.2], luck=luck)[0]) for _ in range(300)]
    assert np.mean([one.low <= truth <= one.high for one in found]) >= lowest


def test_interval_over_seeds_is_never_narrower_than_one_seed_over_the_same_rows():
    one = interval(np.ones((1, 50)))
    assert interval(np.ones((4, 50))) == one
    rng = np.random.default_rng(3)
    mixed = rng.random((5, 200)) < 0.8
    wide = interval(mixed)
    narrow = binomtest(round(mixed.mean() * 200), 200).proportion_ci(method="wilson")
    assert wide.low <= narrow.low
    assert wide.high >= narrow.high


def test_unlike_seeds_widen_the_interval():
    rng = np.random.default_rng(4)
    calm, lucky = (np.stack([rng.random(500) < s for s in shares]) for shares in ([0.8] * 3, [0.7, 0.8, 0.9]))
    assert interval(lucky).high - interval(lucky).low > 2 * (interval(calm).high - interval(calm).low)


def test_interval_is_reproducible_and_within_bounds():
    rng = np.random.default_rng(5)
    values = rng.random((2, 40)) < 0.9
    assert interval(values) == interval(values.astype(float)) == interval(values.tolist())
    assert 0 <= interval(values).low < interval(values).high <= 1


# --- pairs ---


def test_one_seed_is_exact_mcnemar():
    a = [[1] * 15 + [0] * 5 + [1] * 60 + [0] * 20]
    b = [[0] * 15 + [1] * 5 + [1] * 60 + [0] * 20]
    found = compare_pair(a, b)
    # Of 20 rows that only one got right, 15 or more are a's: probability 21700 / 2^20, twice for both sides.
    assert found.p == pytest.approx(2 * 21700 / 2**20)
    assert found.difference == pytest.approx(0.10)
    # Agresti and Min: cells 15.5 and 5.5 of 102 rows.
    spread = np.sqrt((21 / 102 - (10 / 102) ** 2) / 102)
    assert (found.low, found.high) == pytest.approx((10 / 102 - 1.96 * spread, 10 / 102 + 1.96 * spread), abs=1e-5)


def test_no_discordant_rows_and_identical_arrays_tie():
    rng = np.random.default_rng(6)
    for seeds in (1, 3):
        same = rng.random((seeds, 100)) < 0.7
        found = compare_pair(same, same)
        assert (found.difference, found.p) == (0, 1)
        assert found.low < 0 < found.high
        assert verdicts({"a": same, "b": same})[0].outcome == "tie"


def test_turning_a_pair_round_changes_the_sign_only():
    rng = np.random.default_rng(7)
    for seeds in (1, 3):
        a, b = answers(rng, [2.2, 1.9], seeds=seeds)
        forth, back = compare_pair(a, b), compare_pair(b, a)
        assert back.difference == -forth.difference
        assert (back.low, back.high) == pytest.approx((-forth.high, -forth.low), abs=3e-3)
        assert back.p == pytest.approx(forth.p, rel=0.3)


def test_p_and_interval_over_seeds_agree():
    rng = np.random.default_rng(8)
    seen = set()
    for level in np.linspace(1.4, 2.2, 25):
        found = compare_pair(*answers(rng, [2.2, level], luck=0.05))
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)
        seen.add(found.p < 0.05)
    assert seen == {True, False}


def test_p_is_never_zero():
    found = compare_pair(np.ones((3, 500)), np.zeros((3, 500)))
    assert found.difference == 1
    assert 0 < found.p <= 1 / 20_001 + 1e-9


@pytest.mark.parametrize(("items", "luck"), [(60, 0.0), (500, 0.1), (1000, 0.3)])
def test_equal_methods_are_rarely_called_different(items, luck, few_draws):
    # 300 pairs: 5 % has a standard error of 1.3 %, so 9 % allows for three of them.
    rng = np.random.default_rng(9)
    called = [compare_pair(*answers(rng, [2.2, 2.2], items=items, luck=luck)).p < 0.05 for _ in range(300)]
    assert np.mean(called) <= 0.09


def test_a_bootstrap_of_seeds_would_call_equal_methods_different():
    # The reason why seeds are not resampled: their bootstrap draws the same three means.
    rng = np.random.default_rng(10)
    wrong = []
    for _ in range(300):
        a, b = answers(rng, [2.2, 2.2], items=1000, luck=0.5)
        gaps = a.astype(float) - b
        drawn = gaps.mean(axis=1)[rng.integers(0, 3, (2000, 3))].mean(axis=1)
        wrong.append((1 + (np.abs(drawn - gaps.mean()) >= abs(gaps.mean())).sum()) / 2001 < 0.05)
    assert np.mean(wrong) > 0.15


# --- verdicts ---


@pytest.mark.parametrize(("seeds", "luck"), [(1, 0.0), (3, 0.15)])
def test_verdicts_on_equal_methods(seeds, luck, few_draws):
    # Any wrong verdict among 6 pairs of 4 equal methods, 200 times: 5 % with a standard error of 1.5 %.
    rng = np.random.default_rng(11)
    wrong = 0
    for _ in range(200):
        arrays = answers(rng, [2.0] * 4, seeds=seeds, items=300, luck=luck)
        wrong += any(v.outcome != "tie" for v in verdicts(dict(zip("abcd", arrays, strict=True))))
    assert wrong / 200 <= 0.09


@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_verdicts_find_a_real_difference(seeds):
    # About 84 %, 83 % and 70 % right on 1000 rows.
    rng = np.random.default_rng(12)
    found = 0
    for _ in range(20):
        best, close, behind = answers(rng, [2.1, 2.05, 1.1], seeds=seeds, items=1000, luck=0.05)
        outcomes = {(v.first, v.second): v.outcome for v in verdicts({"a": best, "b": close, "c": behind})}
        found += outcomes["a", "c"] == outcomes["b", "c"] == "better"
    assert found >= 18


def test_verdicts_keep_the_order_of_labels_and_adjust():
    rng = np.random.default_rng(13)
    arrays = dict(zip(("z", "a", "m"), answers(rng, [1.0, 2.0, 1.1], seeds=1), strict=True))
    found = verdicts(arrays)
    assert [(v.first, v.second) for v in found] == [("z", "a"), ("z", "m"), ("a", "m")]
    raw = [compare_pair(arrays[v.first], arrays[v.second]).p for v in found]
    assert [v.p for v in found] == holm(raw)
    assert found[0].outcome == "worse"
    assert found[2].outcome == "better"
    assert verdicts({"alone": arrays["a"]}) == []


def test_holm_by_hand():
    # 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1 is 0.04, 0.06, 0.06, 0.04; never falling: the last is 0.06.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


# --- bad input ---


@pytest.mark.parametrize(
    "bad",
    [
        [[0, 1, 2]],
        [[-0.5, 1]],
        [[float("nan"), 1]],
        [],
        [[]],
        [0, 1],
        [[[0, 1]]],
        [[0, 1], [1]],
        [["0", "1"]],
        [[None, 1]],
    ],
)
def test_what_is_outside_0_to_1_is_refused(bad):
    with pytest.raises(UsageError, match="expected"):
        interval(bad)
    with pytest.raises(UsageError, match="expected"):
        compare_pair(bad, bad)
    with pytest.raises(UsageError, match="'lora'"):
        verdicts({"lora": bad, "full": [[0, 1]]})


def test_unlike_shapes_are_refused():
    with pytest.raises(UsageError, match=r"\[1, 2\] and \[1, 3\]"):
        compare_pair([[0, 1]], [[0, 1, 1]])
    with pytest.raises(UsageError, match="repeat an untrained base"):
        verdicts({"base": [[0, 1]], "lora": [[0, 1], [1, 1]]})


def test_nothing_to_compare_is_refused():
    with pytest.raises(UsageError, match="no results"):
        verdicts({})


# Scores between 0 and 1 ---------------------------------------------------------------------------


def graded(seeds: int, items: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Scores of items of unlike difficulty."""
    rng = np.random.default_rng(seed)
    difficulty = np.random.default_rng(99).uniform(0.2, 0.8, items)
    return np.clip(difficulty + shift + rng.normal(0, 0.1, (seeds, items)), 0, 1)


def test_the_interval_of_scores_of_one_seed_is_students_with_two_more_rows():
    scores = graded(1, 40, 1)
    found = interval(scores)
    more = [*scores[0], 0, 1]
    expected = scipy.stats.t.interval(0.95, 39, np.mean(more), scipy.stats.sem(more))
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.mean == pytest.approx(scores.mean())
    assert interval([[0.5]]) == Interval(0.5, 0.0, 1.0)


def test_the_pair_of_scores_of_one_seed_is_the_paired_t_test_with_two_more_rows():
    a, b = graded(1, 60, 1, 0.1), graded(1, 60, 2)
    found = compare_pair(a, b)
    # Every gap twice, then one row of 1, one of -1 and two of 0 stand for half rows.
    twice = np.array([*np.repeat(a[0] - b[0], 2), 1, -1, 0, 0])
    error = twice.std() / np.sqrt(61)
    centre = twice.mean()
    assert found.difference == pytest.approx((a - b).mean())
    assert found.p == pytest.approx(2 * scipy.stats.t.sf(centre / error, 59))
    half = scipy.stats.t.ppf(0.975, 59) * error
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half))
    turned = compare_pair(b, a)
    assert (turned.difference, turned.p) == pytest.approx((-found.difference, found.p))


@pytest.mark.parametrize("seeds", [1, 3])
def test_scores_without_variance_are_no_certainty(seeds):
    found = interval([[0.01] * 300] * seeds)
    assert 0 < found.low < 0.01 < 0.013 < found.high < 0.03
    found = interval([[0.01] * 20] * seeds)
    assert found.high > 0.1
    pair = compare_pair([[0.5, 0.5]] * seeds, [[0.25, 0.25]] * seeds)
    assert (pair.difference, pair.p > 0.3, pair.low < 0 < pair.high) == (0.25, True, True)
    pair = compare_pair([[0.5] * 300] * seeds, [[0.25] * 300] * seeds)
    assert 0 < pair.p < 0.01
    assert pair.low < 0.25 < pair.high
    assert verdicts({"a": [[0.5, 0.5]] * seeds, "b": [[0.25, 0.25]] * seeds})[0].outcome == "tie"


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("share", [0.03, 0.05, 0.1, 0.2, 0.5])
def test_intervals_of_rare_high_scores_cover(seeds, share, few_draws):
    # 20 rows of 0.01, and 1.0 in a share of them; 250 trials: 95 % has a standard error of 1.4 %.
    rng = np.random.default_rng(20)
    truth = share + 0.01 * (1 - share)
    found = [interval([np.where(rng.random(20) < share, 1.0, 0.01)] * seeds) for _ in range(250)]
    assert np.mean([one.low <= truth <= one.high for one in found]) >= 0.92


@pytest.mark.parametrize("items", [3, 10, 20])
def test_pairs_of_rare_high_scores_are_rarely_called_different(items):
    rng = np.random.default_rng(21)
    pairs = [rng.choice([0.01, 1.0], (2, 1, items), p=[0.9, 0.1]) for _ in range(300)]
    assert np.mean([compare_pair(*pair).p < 0.05 for pair in pairs]) <= 0.05


def test_luck_counts_in_pairs_of_scores(few_draws):
    # 400 rows: runs 0.05 apart differ by far more than rows do. Without luck two in three pairs are called different.
    rng = np.random.default_rng(22)
    called = []
    for number in range(200):
        a, b = (graded(3, 400, 2 * number + one) + rng.normal(0, 0.05, (3, 1)) for one in (0, 1))
        called.append(compare_pair(np.clip(a, 0, 1), np.clip(b, 0, 1)).p < 0.05)
    assert np.mean(called) <= 0.1


def test_luck_counts_in_pairs_of_right_and_wrong_rows():
    alike = np.tile(np.arange(400) % 10 < 7, (3, 1))
    lucky = np.stack([np.arange(400) % 10 < right for right in (5, 6, 10)])
    steady = np.stack([np.arange(400) % 10 < 6] * 3)
    assert compare_pair(alike, steady).p < 0.001
    assert compare_pair(alike, lucky).p > compare_pair(alike, np.roll(steady, 1, axis=0)).p
    assert compare_pair(lucky, steady).p > 0.3
    assert compare_pair(lucky, steady).high - compare_pair(lucky, steady).low > 0.3


@pytest.mark.parametrize("scale", [1.0, 0.9])
def test_luck_counts_in_intervals(scale):
    # Rows alone leave 0.05 open on either side; the three runs are 0.5, 0.6 and 1.0.
    lucky = np.stack([np.arange(400) % 10 < right for right in (5, 6, 10)]) * scale
    found = interval(lucky)
    assert found.high - found.low > 0.4


@pytest.mark.parametrize("seeds", [1, 3])
def test_scores_that_are_far_apart_are_told_apart_and_equal_ones_are_not(seeds):
    assert compare_pair(graded(seeds, 100, 1, 0.2), graded(seeds, 100, 2)).p < 0.001
    alike = [compare_pair(graded(seeds, 100, number), graded(seeds, 100, 50 + number)).p for number in range(40)]
    assert sum(p < 0.05 for p in alike) <= 6
    same = graded(seeds, 30, 1)
    assert compare_pair(same, same).p == 1.0


def test_the_interval_of_scores_holds_luck():
    lucky = graded(3, 50, 1) + np.array([[0.1], [0.0], [-0.1]])
    plain = interval(graded(3, 50, 1))
    wide = interval(np.clip(lucky, 0, 1))
    assert wide.high - wide.low > 1.5 * (plain.high - plain.low)
