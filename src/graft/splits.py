"""Splits without leaks: near-equal texts stay together, groups are dealt out in the order of a hash.

Near duplicates: MinHash signatures in a locality-sensitive index (Broder 1997; `datasketch`), every
candidate pair checked by its exact Jaccard similarity.
"""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from zlib import crc32

SHINGLE = 5
"""Letters per shingle. Unrelated English sentences share under 5 % of such shingles."""

BANDS, ROWS = 32, 4
"""128 hashes as 32 bands of 4: a pair of similarity 0.8 is missed with probability
(1 - 0.8^4)^32 = 5e-8, so the groups do not depend on which hashes a library version draws."""


def normal_form(text: str) -> str:
    """`text` folded to its letters and digits; text without any (":-)") stands for itself."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    letters = "".join(character for character in folded if character.isalnum())
    return letters or text.strip()


def shingles(form: str) -> frozenset[str]:
    """All runs of `SHINGLE` characters of a normal form; the form itself when it is shorter."""
    count = max(1, len(form) - SHINGLE + 1)
    return frozenset(form[start : start + SHINGLE] for start in range(count))


def group_near_equal(texts: Sequence[str], threshold: float = 0.8) -> list[int]:
    """The group number of every text, counted from 0 in the order of first appearance.

    Two texts share a group when their normal forms are equal or their shingles have a Jaccard
    similarity of at least `threshold`, or when a chain of such pairs joins them.
    Raises `ValueError` for a threshold below 0.5, where the index would miss pairs.
    """
    if not 0.5 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}, allowed are 0.5 to 1")
    numbers: dict[str, int] = {}
    form_of = [numbers.setdefault(normal_form(text), len(numbers)) for text in texts]
    sets = [shingles(form) for form in numbers]
    parents = list(range(len(sets)))
    for left, right in _candidates(sets):
        small, large = sorted((len(sets[left]), len(sets[right])))
        if small < threshold * large or _root(parents, left) == _root(parents, right):
            continue
        shared = len(sets[left] & sets[right])
        if shared >= threshold * (small + large - shared):
            _join(parents, left, right)
    groups: dict[int, int] = {}
    return [groups.setdefault(_root(parents, number), len(groups)) for number in form_of]


def _candidates(sets: Sequence[frozenset[str]]) -> Iterator[tuple[int, int]]:
    """Pairs (earlier, later) of sets that share at least one band of their signatures."""
    from datasketch import MinHash, MinHashLSH  # 1 s to import, needed only here

    index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    encoded = ([piece.encode("utf-8", "surrogatepass") for piece in pieces] for pieces in sets)
    for number, signature in enumerate(MinHash.generator(encoded, num_perm=BANDS * ROWS, seed=1, hashfunc=crc32)):
        yield from ((earlier, number) for earlier in index.query(signature))
        index.insert(number, signature, check_duplication=False)


def _root(parents: list[int], number: int) -> int:
    while parents[number] != number:
        parents[number] = parents[parents[number]]
        number = parents[number]
    return number


def _join(parents: list[int], left: int, right: int) -> None:
    roots = sorted((_root(parents, left), _root(parents, right)))
    parents[roots[1]] = roots[0]


def split_by_group(groups: Sequence[int], fractions: Mapping[str, float], key: Sequence[str]) -> list[str]:
    """The split of every row; no group is divided.

    `fractions` maps split names to shares of the rows; the first named split takes what the others
    leave. `key` has a text per row; a group's place is the SHA-256 of its smallest key, so neither
    the order of the rows nor a seed matters. Each further split takes groups in that order while
    they fit its share (at least one row); a group larger than the room left stays in the first.
    """
    smallest: dict[int, str] = {}
    sizes: dict[int, int] = {}
    for group, text in zip(groups, key, strict=True):
        smallest[group] = min(smallest.get(group, text), text)
        sizes[group] = sizes.get(group, 0) + 1
    first, *others = fractions
    room = {name: max(1, round(fractions[name] * len(groups))) for name in others}
    names: dict[int, str] = {}
    for group in sorted(smallest, key=lambda group: hash_of(smallest[group])):
        fits = [name for name in others if room[name] >= sizes[group]]
        names[group] = fits[0] if fits else first
        if fits:
            room[fits[0]] -= sizes[group]
    return [names[group] for group in groups]


def hash_of(text: str) -> bytes:
    """SHA-256 of `text` (32 bytes): a fixed order without a seed."""
    return sha256(text.encode("utf-8", "surrogatepass")).digest()
