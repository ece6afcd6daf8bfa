"""Checkpoints of an adapter: tensors in safetensors, and a manifest by which a damaged file is found."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from graft.errors import DamagedError
from graft.files import sha256_of, whole_folder, write_json
from graft.parts.base import Adapter


def at(folder: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return folder / f"step-{step:06d}"


def write(folder: Path, adapter: Adapter, state: dict[str, Any]) -> Path:
    """Write `folder`/step-NNNNNN, whole or not at all; `state` has at least `step`."""
    target = at(folder, state["step"])
    with whole_folder(target) as work:
        tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in adapter.tensors().items()}
        save_file(tensors, work / "adapter.safetensors", metadata={"format": "pt"})
        write_json(work / "state.json", state)
        files = [work / "adapter.safetensors", work / "state.json"]
        write_json(
            work / "manifest.json",
            {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files},
        )
    return target


def read(path: Path, adapter: Adapter) -> dict[str, Any]:
    """Put a checkpoint's tensors into the adapter and return its state. Raises `DamagedError`."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            file = path / name
            if file.stat().st_size != expected["bytes"] or sha256_of(file) != expected["sha256"]:
                raise DamagedError(f"{file}: not what was written", "remove this checkpoint")
        tensors = load_file(path / "adapter.safetensors")
        state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DamagedError(f"{path}: the checkpoint cannot be read ({error})", "remove it") from None
    own = dict(adapter.named_tensors())
    if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in tensors.items()}:
        raise DamagedError(
            f"{path}: its {len(tensors)} tensors are not the {len(own)} of the adapter", "it is another run's"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    return state


def remove(folder: Path, step: int) -> None:
    """Remove the checkpoint of a step."""
    shutil.rmtree(at(folder, step), ignore_errors=True)
