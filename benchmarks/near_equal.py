"""Time and memory of `group_near_equal` on many short rows, and how many of the planted near-duplicates it finds.

    python benchmarks/near_equal.py            # 1,000,000 rows, 5 % of them altered copies of others
    python benchmarks/near_equal.py 100000
    python benchmarks/near_equal.py 100000 pattern   # every row a line of one pattern: the hard case

Rows are 60 to 120 characters of made-up words; a planted copy has one letter of another row changed, and counts where
its exact similarity is at least 0.8.
"""

import random
import resource
import sys
import time

from graft.splits import group_near_equal, normal_form, shingles


def words(generator: random.Random, count: int = 30_000) -> list[str]:
    parts = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]
    return ["".join(generator.choices(parts, k=generator.choice((1, 2, 2, 3, 3, 4)))) for _ in range(count)]


def rows(count: int) -> tuple[list[str], list[tuple[int, int]]]:
    """Texts, and the pairs (row, altered copy) that are near equal."""
    generator = random.Random(0)
    known = words(generator)
    texts: list[str] = []
    while len(texts) < count - count // 20:
        text = " ".join(generator.choices(known, k=14))[: generator.randint(60, 120)]
        texts.append(text)
    originals = len(texts)
    pairs = []
    for number in range(originals, count):
        source = generator.randrange(originals)
        place = generator.randrange(len(texts[source]))
        texts.append(texts[source][:place] + generator.choice("aeiou") + texts[source][place + 1 :])
        one, other = shingles(normal_form(texts[source])), shingles(normal_form(texts[-1]))
        if len(one & other) >= 0.8 * len(one | other):
            pairs.append((source, number))
    return texts, pairs


def pattern(count: int) -> tuple[list[str], list[tuple[int, int]]]:
    """One sentence with another number in it: rows are 0.6 to 0.9 similar, so bands are crowded; nothing is planted."""
    generator = random.Random(0)
    return [
        f"Find the square root of the number {generator.randrange(10**6)} and explain it." for _ in range(count)
    ], []


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    texts, pairs = pattern(count) if "pattern" in sys.argv else rows(count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    started = time.perf_counter()
    groups = group_near_equal(texts)
    seconds = time.perf_counter() - started
    found = sum(groups[left] == groups[right] for left, right in pairs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{count:,} rows: {seconds:.0f} s, peak {peak:.2f} GiB in all ({before:.2f} before), "
        f"{len(set(groups)):,} groups, {found:,} of {len(pairs):,} planted near-duplicates found"
    )


if __name__ == "__main__":
    main()
