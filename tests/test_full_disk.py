"""A disk that fills: exit 3, what was there before stays, and there is no need to begin again when there is room."""

import os
import subprocess
from pathlib import Path

import pytest
import tiny
from test_resume import curve, digests, recipe

from graft.errors import ResourceError
from graft.files import write_json
from graft.merge import merge_run
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
