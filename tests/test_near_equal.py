"""Near-equal groups at some scale: the same answer as comparing everything with everything."""

import random
import tracemalloc

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from graft import splits
from graft.splits import WHOLE_RUN, group_near_equal, normal_form, shingles


def made_up(count: int, seed: int = 0) -> list[str]:
    """Texts of 60 to 90 characters; every tenth is an earlier one with a letter or three altered."""
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdefghiklmnoprstuvwy", k=generator.randint(3, 9))) for _ in range(4000)]
    texts: list[str] = []
    for number in range(count):
        if number % 10 or not texts:
            texts.append(" ".join(generator.choices(words, k=14))[: generator.randint(60, 90)])
            continue
        text = list(texts[generator.randrange(len(texts))])
        for _ in range(generator.choice((1, 1, 2, 3))):
            text[generator.randrange(len(text))] = generator.choice("aeiouxyz ")
        texts.append("".join(text))
    return texts


def all_pairs(texts: list[str], threshold: float) -> tuple[list[int], int]:
    """Groups from the exact similarity of all pairs, and how many pairs are near."""
    numbers: dict[str, int] = {}
    forms = [numbers.setdefault(normal_form(text), len(numbers)) for text in texts]
    columns: dict[str, int] = {}
    sets = [[columns.setdefault(piece, len(columns)) for piece in shingles(form)] for form in numbers]
    ends = np.cumsum([0, *map(len, sets)])
    flat = np.concatenate([np.array(pieces) for pieces in sets])
    matrix = csr_array((np.ones(len(flat), dtype=np.int32), flat, ends), shape=(len(sets), len(columns)))
    left, right = [], []
    sizes = np.diff(ends)
    for first in range(0, len(sets), 1000):
        shared = (matrix[first : first + 1000] @ matrix.T).tocoo()
        rows = shared.row + first
        near = shared.data >= threshold * (sizes[rows] + sizes[shared.col] - shared.data)
        left.append(rows[near])
        right.append(shared.col[near])
    one, other = np.concatenate(left), np.concatenate(right)
    graph = csr_array((np.ones(len(one)), (one, other)), shape=(len(sets), len(sets)))
    _, component = connected_components(graph, directed=False)
    order: dict[int, int] = {}
    return [order.setdefault(int(component[form]), len(order)) for form in forms], int((one < other).sum())


def test_twenty_thousand_rows_against_all_pairs():
    texts = made_up(20_000)
    expected, near = all_pairs(texts, 0.8)
    assert near > 1000
    told: list[float] = []
    assert group_near_equal(texts, progress=told.append) == expected
    assert told == sorted(told)
    assert told[-1] == 1


@pytest.mark.parametrize("threshold", [0.7, 0.9, 1.0])
def test_other_thresholds(threshold):
    texts = made_up(2000, seed=3)
    expected, near = all_pairs(texts, threshold)
    assert near >= 5 or threshold == 1
    assert group_near_equal(texts, threshold) == expected


def test_rows_of_one_pattern_share_bands_by_the_hundred(monkeypatch):
    """The windows of crowded bands find what all pairs find, in far fewer comparisons."""
    generator = random.Random(0)
    texts = [f"Find the square root of the number {generator.randrange(10**5)} and explain it." for _ in range(1500)]
    expected, near = all_pairs(texts, 0.8)
    compared = 0
    true_near = splits._Shingles.near

    def counted(self, left, right, threshold):
        nonlocal compared
        compared += 1
        return true_near(self, left, right, threshold)

    monkeypatch.setattr(splits._Shingles, "near", counted)
    found = group_near_equal(texts)
    assert near > 100
    # No group is joined that is none, and at most one in a hundred of the groups is found in two halves.
    together = {}
    for group, true in zip(found, expected, strict=True):
        assert together.setdefault(group, true) == true
    assert len(set(found)) <= 1.01 * len(set(expected))
    assert compared < 1500 * 1499 / 2 / 4


def test_many_equal_and_chained_rows_take_no_square_time():
    """4,000 rows of which neighbours are near equal, and 20,000 that are equal: one group each."""
    base = list("thequickbrownfoxjumpsoverthelazydogwhilethecatsleepsinthewarmsunofaspringday")
    generator = random.Random(1)
    chain = []
    for number in range(4000):
        base[(7 * number) % len(base)] = generator.choice("abcdefghij")
        chain.append("".join(base))
    texts = chain + ["the same row again and again, which has its own words"] * 20_000
    groups = group_near_equal(texts)
    assert len(set(groups[:4000])) == 1
    assert len(set(groups[4000:])) == 1
    assert groups[0] != groups[-1]


def test_a_long_text_is_hashed_in_slices():
    generator = random.Random(2)
    long = "".join(generator.choices("abcdefghij", k=100_000))
    tracemalloc.start()
    groups = group_near_equal([long, long[:-5] + "zzzzz", long[:30_000], "short"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert groups == [0, 0, 1, 2]
    assert peak < 120e6  # 128 hashes of all shingles at once would take 100 MB, several times over


def test_small_inputs():
    assert group_near_equal([]) == []
    assert group_near_equal(["", " ", ":-)", "a", "A!"]) == [0, 0, 1, 2, 2]
    assert group_near_equal(["same"] * (2 * WHOLE_RUN)) == [0] * (2 * WHOLE_RUN)
    assert group_near_equal(["\ud800", "\ud800 "]) == [0, 0]  # half a surrogate pair


def test_equal_keys_join_groups():
    texts = ["the first of the texts", "a wholly other one", "THE first of the texts!", "nothing like the rest", "last"]
    assert group_near_equal(texts) == [0, 1, 0, 2, 3]
    assert group_near_equal(texts, keys=["", "", "", "", " "]) == [0, 1, 0, 2, 3]
    assert group_near_equal(texts, keys=["Why?", "", "", "why", "where"]) == [0, 1, 0, 0, 2]
    assert group_near_equal(texts, keys=["", "a", "b", "b", "A!"]) == [0, 1, 0, 0, 1]
    assert group_near_equal([], keys=[]) == []
    with pytest.raises(ValueError, match="argument 2"):
        group_near_equal(texts, keys=["a"])
