"""Run folders with a fault (K1, K2, K4, K5, X1), given to every command that reads one."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import planted
import pytest
import tiny
from planted import Planted

from graft.run import execute

COMMANDS: dict[str, tuple[str, ...]] = {
    "eval": ("eval", "{f}/run"),
    "merge": ("merge", "{f}/run", "-o", "{o}"),
    "export": ("export", "{f}/run", "--to", "hf", "-o", "{o}"),
}


def _adapter(content: bytes | None) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        path = next((folder / "run" / "adapter").glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-100] if content is None else content)

    return plant


def _config(content: bytes | None) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        path = folder / "run" / "adapter" / "adapter_config.json"
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)

    return plant


def _pickle(folder: Path) -> None:
    path = next((folder / "run" / "adapter").glob("*.safetensors"))
    path.rename(path.with_suffix(".bin"))


def _gone(folder: Path) -> None:
    shutil.rmtree(folder / "run")


def _file(folder: Path) -> None:
    _gone(folder)
    (folder / "run").write_text("a file")


def _empty(folder: Path) -> None:
    _gone(folder)
    (folder / "run").mkdir()


def _recipe(folder: Path) -> None:
    (folder / "run" / "recipe.yaml").write_text("model: [")


def _header(given: object) -> bytes:
    text = json.dumps(given).encode()
    return struct.pack("<Q", len(text)) + text


PLANTS: list[tuple[str, str, Callable[[Path], None], int | None]] = [
    ("K1", "tensors cut off", _adapter(None), 5),
    ("K1", "no bytes", _adapter(b""), 5),
    ("K1", "a header of 2^63 bytes", _adapter(struct.pack("<Q", 2**63) + b"{}"), 5),
    ("K1", "a header that is no JSON", _adapter(struct.pack("<Q", 4) + b"{{{{"), 5),
    ("K1", "no tensors", _adapter(_header({})), 5),
    ("K1", "an offset below 0", _adapter(_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}})), 5),
    ("K1", "an unknown dtype", _adapter(_header({"a": {"dtype": "Q", "shape": [], "data_offsets": [0, 0]}})), 5),
    ("K2", "no settings", _config(None), 5),
    ("K2", "settings cut off", _config(b'{"peft_type": "LO'), 5),
    ("K2", "settings that are a list", _config(b"[]"), 5),
    ("X1", "a pickle in place of the tensors", _pickle, 5),
    ("K5", "no such folder", _gone, 2),
    ("K5", "a file", _file, 2),
    ("K5", "an empty folder", _empty, 2),
    ("K5", "a recipe cut off", _recipe, None),
]  # fmt: skip

CASES = [
    Planted(fault, f"{verb}: {name}", command, ("run",), code or 2, plant)
    for fault, name, plant, code in PLANTS
    for verb, command in COMMANDS.items()
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_all(tmp_path_factory.mktemp("tiny"))
    execute(tiny.recipe(folder, training={"max_steps": 2, "precision": "fp32"}), folder / "run")
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.fault} {case.name}")
def test_folder(case, place, tmp_path, monkeypatch, capsys):
    shutil.copytree(place / "run", tmp_path / "run")
    planted.check(case, tmp_path, monkeypatch, capsys)


def test_how_many():
    assert len({case.name for case in CASES}) == len(CASES) == 45
