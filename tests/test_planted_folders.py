"""Run folders with a fault (K1, K2, K4, K5, X1), given to every command that reads one."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import planted
import pytest
import tiny
import torch
from planted import Planted
from safetensors.torch import load_file, save_file

from graft.errors import DamagedError
from graft.model import load_base
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


CUT = ("adapter_model.safetensors", "the file is cut off or altered")
PLANTS: list[tuple[str, str, Callable[[Path], None], int | None, tuple[str, ...]]] = [
    ("K1", "tensors cut off", _adapter(None), 5, CUT),
    ("K1", "no bytes", _adapter(b""), 5, CUT),
    ("K1", "a header of 2^63 bytes", _adapter(struct.pack("<Q", 2**63) + b"{}"), 5, CUT),
    ("K1", "a header that is no JSON", _adapter(struct.pack("<Q", 4) + b"{{{{"), 5, CUT),
    ("K1", "no tensors", _adapter(_header({})), 5, ("run/adapter", "missing", "another base")),
    ("K1", "an offset below 0", _adapter(_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}})),
     5, CUT),
    ("K1", "an unknown dtype", _adapter(_header({"a": {"dtype": "Q", "shape": [], "data_offsets": [0, 0]}})), 5, CUT),
    ("K2", "no settings", _config(None), 5, ("adapter_config.json is missing", "adapter")),
    ("K2", "settings cut off", _config(b'{"peft_type": "LO'), 5,
     ("adapter_config.json: not JSON", "copy the folder again")),
    ("K2", "settings that are a list", _config(b"[]"), 5,
     ("adapter_config.json: expected an object, got list", "copy the folder again")),
    ("X1", "a pickle in place of the tensors", _pickle, 5, ("adapter_model.safetensors is missing", "save it again")),
    ("K5", "no such folder", _gone, 2, ("run", ";")),
    ("K5", "a file", _file, 2, ("run", ";")),
    ("K5", "an empty folder", _empty, 2, ("run", ";")),
    ("K5", "a recipe cut off", _recipe, None, ("recipe.yaml",)),
]  # fmt: skip


def _about(**changed: object) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        path = folder / "run" / "adapter" / "graft.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return plant


def _tensors(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        path = folder / "run" / "adapter" / "adapter_model.safetensors"
        save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path)

    return plant


OVERLAP = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
}
HEAD = {"labels": ["a", "b"], "pooling": "mean"}
ALTERED = ("graft.json", "not as written", "the file was altered")

TOLD = [
    Planted(fault, name, COMMANDS["eval"], says, 5, plant)
    for fault, name, plant, says in [
        ("K1", "offsets that overlap", _adapter(_header(OVERLAP) + bytes(12)),
         ("adapter_model.safetensors", "offset", "cut off or altered")),
        ("K1", "numbers of 8 bits", _tensors(lambda tensor: tensor.to(torch.float8_e4m3fn)), ("run/adapter", "; ")),
        ("K1", "NaN", _tensors(lambda tensor: tensor * float("nan")), ("10 of 10 tensors", "no numbers", "earlier")),
        ("K1", "infinity", _tensors(lambda tensor: tensor + float("inf")), ("10 of 10", "no numbers", "earlier")),
        ("K2", "settings nested deep", _config(b"[" * 100_000), ("adapter_config.json: not JSON", "copy the folder")),
        ("K2", "a rank that disagrees", _about(method={"name": "lora", "r": 3}), ("8 of another shape", "settings")),
        ("K2", "dropout that is a word", _about(head=HEAD | {"dropout": "x"}), ("head", *ALTERED)),
        ("K2", "dropout above 1", _about(head=HEAD | {"dropout": 2}), ("head", *ALTERED)),
        ("K2", "a probe of words", _about(probe=["a"]), ("probe", *ALTERED)),
        ("K2", "a probe of ragged rows", _about(probe=[[1.0], [1.0, 2.0]]), ("probe", *ALTERED)),
    ]
]  # fmt: skip
"""What is said names the file and what to do."""

CASES = [
    Planted(fault, f"{verb}: {name}", command, says, code or 2, plant)
    for fault, name, plant, code, says in PLANTS
    for verb, command in COMMANDS.items()
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_all(tmp_path_factory.mktemp("tiny"))
    execute(tiny.recipe(folder, training={"max_steps": 2, "precision": "fp32"}), folder / "run")
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.fault} {case.name}")
def test_folder(case, place, tmp_path_factory, monkeypatch, capsys):
    folder = tmp_path_factory.mktemp("p")  # tmp_path is named after the case, whose words are looked for
    shutil.copytree(place / "run", folder / "run")
    planted.check(case, folder, monkeypatch, capsys)


@pytest.mark.parametrize("case", TOLD, ids=lambda case: f"{case.fault} {case.name}")
def test_what_is_said_of_a_folder(case, place, tmp_path_factory, monkeypatch, capsys):
    folder = tmp_path_factory.mktemp("p")
    shutil.copytree(place / "run", folder / "run")
    planted.check(case, folder, monkeypatch, capsys)


@pytest.mark.parametrize("how", ["whole", "missing", "outside", "no index", "nested deep"])
def test_shards_of_a_base(tmp_path, how):
    folder = tiny.write_model(tmp_path / "model")
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    shard = folder / "model-00001-of-00001.safetensors"
    save_file(tensors, shard, metadata={"format": "pt"})
    named = "../moved.safetensors" if how == "outside" else shard.name
    index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, named)})
    broken = {"no index": "[]", "nested deep": "[" * 100_000}
    (folder / "model.safetensors.index.json").write_text(broken.get(how, index))
    if how == "whole":
        assert load_base(str(folder)).parameter_count() > 0
        return
    if how == "outside":
        shutil.copy(shard, tmp_path / "moved.safetensors")
    if how == "missing":
        shard.unlink()
    with pytest.raises(DamagedError, match=r"model\.safetensors\.index\.json.*; fetch the model again") as caught:
        load_base(str(folder))
    told = {"missing": shard.name, "outside": "outside the folder"}
    assert told.get(how, "cannot be read") in str(caught.value)


def test_a_configuration_nested_deep(tmp_path):
    folder = tiny.write_model(tmp_path / "model")
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(DamagedError, match=r"config\.json cannot be read"):
        load_base(str(folder))


def test_how_many():
    assert len({case.name for case in CASES}) == len(CASES) == 45
    assert len({case.name for case in TOLD}) == len(TOLD) == 10
