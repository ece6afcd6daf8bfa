"""Checkpoints of a run: tensors in safetensors, and a manifest by which a damaged file is found.

checkpoints/  best/         the adapter at the best evaluated step
              step-NNNNNN/  the adapter, the optimizer and the random numbers behind a step: where a run goes on
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from graft.errors import DamagedError
from graft.files import sha256_of, whole_folder, write_json
from graft.parts.base import Adapter

BEST = "best"
"""The folder of the best evaluated step."""
_ADAPTER, _TRAINING, _STATE, _MANIFEST = "adapter.safetensors", "training.safetensors", "state.json", "manifest.json"


def at(folder: Path, step: int) -> Path:
    """The checkpoint behind a step."""
    return folder / f"step-{step:06d}"


def write(target: Path, adapter: Adapter, state: dict[str, Any], training: Mapping[str, Tensor] | None = None) -> None:
    """Write a checkpoint, whole or not at all. `state` is plain values with at least `step`; `training` are tensors
    beside the adapter's that the next step depends on."""
    with whole_folder(target) as work:
        _save(adapter.tensors(), work / _ADAPTER)
        if training is not None:
            _save(training, work / _TRAINING)
        write_json(work / _STATE, state)
        write_json(
            work / _MANIFEST,
            {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in sorted(work.iterdir())},
        )


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    whole = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, metadata={"format": "pt"})


def check(path: Path) -> dict[str, Any]:
    """The state of a checkpoint whose files are what was written. Raises `DamagedError`."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            file = path / name
            if file.stat().st_size != expected["bytes"] or sha256_of(file) != expected["sha256"]:
                raise DamagedError(f"{file}: not what was written", "remove this checkpoint")
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or type(state["step"]) is not int or _STATE not in manifest:
            raise DamagedError(f"{path}: its state has no step", "remove this checkpoint")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path}: the checkpoint cannot be read ({error})", "remove it") from None
    return state


def read(path: Path, adapter: Adapter) -> dict[str, Any]:
    """Put a checkpoint's tensors into the adapter and return its state. Raises `DamagedError`."""
    state, tensors = check(path), _load(path / _ADAPTER)
    own = dict(adapter.named_tensors())
    if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in tensors.items()}:
        raise DamagedError(
            f"{path}: its {len(tensors)} tensors are not the {len(own)} of the adapter", "it is another run's"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    return state


def read_training(path: Path) -> dict[str, Tensor]:
    """The tensors beside the adapter's. Raises `DamagedError`."""
    return _load(path / _TRAINING)


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{file}: the checkpoint cannot be read ({error})", "remove it") from None


def steps(folder: Path) -> list[int]:
    """Steps behind which a run can go on, the newest first; their files may be damaged."""
    found = [re.fullmatch(r"step-(\d{6,})", path.name) for path in folder.glob("step-*")]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are whole, where a run can go on; `say` names each that is passed over."""
    for step in steps(folder):
        path = at(folder, step)
        try:
            check(path)
            if (path / _TRAINING).is_file():
                return path
        except DamagedError as error:
            say(f"passed over: {error.message}")
    return None


def remove(path: Path) -> None:
    """Remove a checkpoint."""
    shutil.rmtree(path, ignore_errors=True)
