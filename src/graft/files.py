"""Writing files and folders whole: a temporary name, flushed to disk, then renamed."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from graft.errors import NO_FILE, DamagedError, GraftError, ResourceError, UsageError


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or all of the new."""
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented, whole."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def whole_folder(path: Path, rejected: Path | None = None) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends without an error. Where it ends with a
    `DamagedError`, what was written, if anything, takes the place of `rejected`, if given.
    """
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield work
            os.chmod(work, 0o755)
            for file in sorted(work.rglob("*")):
                if file.is_file():
                    os.chmod(file, 0o644)  # safetensors writes files that only their owner reads
                    _flush(file)
            if path.exists():
                old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
                os.replace(path, old / path.name)
                os.replace(work, path)
                shutil.rmtree(old)
            else:
                os.replace(work, path)
            _flush(path.parent)
        except BaseException as error:
            if rejected is not None and isinstance(error, DamagedError) and any(work.iterdir()):
                shutil.rmtree(rejected, ignore_errors=True)
                os.chmod(work, 0o755)
                os.replace(work, rejected)
            shutil.rmtree(work, ignore_errors=True)
            raise


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # a full disk, as safetensors tells it
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError | SafetensorError) -> GraftError:
    """What the system's refusal to write a path means: a path that can be no file is bad input, the rest a lack."""
    message = f"{path} cannot be written ({getattr(error, 'strerror', None) or error})"
    if getattr(error, "errno", None) in NO_FILE:
        return UsageError(message, "choose another place")
    return ResourceError(message, "free space or choose another place")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_bytes(path: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
