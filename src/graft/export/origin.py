"""What is exported, where it goes, and whether there is room."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from graft.errors import ResourceError, UsageError
from graft.merge import check_output, source_of

MANIFEST = "export.json"
"""The file that says where an export is from and what was checked; it also marks a folder that `--force` replaces."""

_SLACK = 50_000_000
"""Bytes for a tokenizer, a manifest and what a file system keeps for itself."""


@dataclass(frozen=True)
class Origin:
    """An adapter with its base, or a base alone."""

    given: str
    """As the user called it."""
    model: str
    """The base, by what `load_base` takes."""
    adapter: Path | None
    """The adapter's folder; None for a base."""
    holder: Path | None
    """The folder of the run or adapter, into which nothing is written."""

    @property
    def name(self) -> str:
        """A name for files, of letters, digits, dots, dashes and underscores."""
        path = Path(self.given)
        parts = [path.stem if path.suffix == ".gguf" else path.name]
        if path.parent.name == "trials":  # "lora-seed1" is in every comparison
            parts.insert(0, path.parents[1].name)
        if path.name == "adapter" and path.parent.name:
            parts = [path.parent.name]
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip(".-")
        return plain[:80] or "model"


def origin_of(run: str, model: str | None) -> Origin:
    """What `run` names: a finished run, an adapter folder with its base `model`, or a base.

    Raises `UsageError` and `RecipeError` for anything else.
    """
    path = Path(run)
    if (path / "adapter_config.json").is_file() or (path / "recipe.yaml").exists() or (path / "trials").is_dir():
        source = source_of(path, model)
        return Origin(run, source.model, source.adapter, source.holder)
    # A hub would be asked for "runs/mine" for half a minute.
    beside = path.parent != Path(".") and (path.parts[0] == "runs" or path.parent.is_dir())
    if model is not None or (beside and not path.exists()):
        raise UsageError(f"{run} is neither a run nor an adapter folder", "`graft runs` lists the runs")
    return Origin(run, run, None, path if path.is_dir() else None)


def check_target(folder: Path, given: Path | str, force: bool, *kept: Path | None) -> None:
    """Raise `UsageError` where an export cannot go: into one of `kept`, over a file or over anything that is no earlier
    export; over one only with `force`. Raise `ResourceError` where nothing can be written.
    """
    here = [path for path in kept if path is not None]
    for path in here:
        if path.is_dir() and path.resolve().is_relative_to(folder):
            raise UsageError(f"{given} holds {path}, which stays as it is", "choose another folder with -o")
    if (folder / MANIFEST).is_file():
        if not force:
            raise UsageError(f"{given} holds an export already", "replace it with --force, or choose another with -o")
        check_output(folder / "any", given, *here)
    else:
        check_output(folder, given, *here)
    parent = next(parent for parent in folder.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ResourceError(f"{given}: nothing can be written into {parent}", "choose another folder with -o")


def check_room(folder: Path, needed: int) -> None:
    """Raise `ResourceError` when the disk of `folder` has fewer than `needed` bytes free."""
    parent = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < needed + _SLACK:
        raise ResourceError(
            f"{folder} takes {(needed + _SLACK) / 1e9:.2f} GB while it is written and checked, {parent} has "
            f"{free / 1e9:.2f} GB free",
            "free space or choose another disk with -o",
        )


def public_name(name: str) -> str:
    """A model's name without the private folders before it."""
    return Path(name).name if Path(name).is_absolute() or name.startswith((".", "~")) else name
