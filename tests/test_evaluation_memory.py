"""Evaluation keeps one batch of scores: memory stays flat however many rows there are, and fits where it runs out."""

from pathlib import Path
from typing import Any

import bases
import pytest
import tiny
import torch

from graft.data.batch import in_batches
from graft.errors import ResourceError
from graft.model import load_base
from graft.objectives.causal import row_figures
from graft.objectives.classify import Classify, LabelledExample
from graft.objectives.pretrain import Piece

ROWS = 600_000


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Repeated:
    """Many rows that take no memory of their own."""

    def __init__(self, rows: list[Any], count: int) -> None:
        self.rows, self.count = rows, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Any:
        return self.rows[number % len(self.rows)]

    def __iter__(self) -> Any:
        return (self[number] for number in range(self.count))


@pytest.mark.faults
def test_memory_is_flat_over_600_000_rows(tmp_path):
    place = tiny.write_all(tmp_path)
    recipe = tiny.recipe(place)
    base = load_base(recipe.model)
    adapter = recipe.method.build(base, "tuned")
    objective = Classify()
    objective.prepare(base, adapter, ("no", "yes"))
    from graft.parts.attach import attach

    attach(base, adapter)
    rows = [LabelledExample([2, 5 + row, 3], None, row % 2, f"row {row}") for row in range(50)]
    seen: list[int] = []

    def note(phase: str, share: float) -> None:
        if int(share * 20) > len(seen):
            seen.append(resident())

    result = objective.evaluate(base, Repeated(rows, ROWS), "tuned", 4096, note)
    assert len(result.correct) == ROWS
    assert len(seen) >= 15
    growth = seen[-1] - seen[2]
    print(f"{ROWS:,} rows: {growth / 2**20:.1f} MiB more at the end than after a tenth")
    assert growth < 8 << 20


def out_of_memory_above(rows: int) -> Any:
    asked: list[int] = []

    def work(chosen: list[int]) -> None:
        asked.append(len(chosen))
        if len(chosen) > rows:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")
        done.extend(chosen)

    done: list[int] = []
    return work, asked, done


def test_batches_get_smaller_where_memory_runs_out():
    work, asked, done = out_of_memory_above(3)
    shares: list[float] = []
    assert in_batches([5, 9, 1, 7, 7, 7, 2, 3, 4, 8], 8, work, shares.append) == 2
    assert asked == [8, 4, 2, 2, 2, 2, 2]
    assert done[:2] == [1, 9]
    assert sorted(done) == list(range(10))
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_one_row_that_does_not_fit():
    work, asked, _ = out_of_memory_above(0)
    with pytest.raises(ResourceError, match="out of memory with one row of 9 tokens in evaluation"):
        in_batches([9, 4], 2, work)
    assert asked == [2, 1]


def test_other_errors_are_not_memory():
    def work(chosen: list[int]) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        in_batches([9, 4], 2, work)


def test_figures_do_not_depend_on_where_memory_ran_out(monkeypatch):
    base = bases.make("llama")
    rows = [Piece([3 + (7 * row + place) % 90 for place in range(4 + row)], f"row {row}", row) for row in range(9)]
    whole = row_figures(base, rows, None, 9)
    logits = base.logits
    failed: list[int] = []

    def short(states: torch.Tensor) -> torch.Tensor:
        if states.shape[1] > 40:
            failed.append(states.shape[1])
            raise RuntimeError("CUDA out of memory")
        return logits(states)

    monkeypatch.setattr(base, "logits", short)
    found = row_figures(base, rows, None, 9)
    assert failed
    assert found.batch_size < 9
    torch.testing.assert_close(found.loss, whole.loss)
    assert torch.equal(found.tokens, whole.tokens)
    assert torch.equal(found.right, whole.right)
