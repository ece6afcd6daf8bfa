"""One package archive from the user's package index, through pip, without installing it.

pip knows the user's index, mirrors, proxy and certificates; its configuration is left as it is.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage

from graft.errors import DamagedError, GraftError, ResourceError
from graft.files import sha256_of

Report = Callable[[str, float], None]
"""Called with what is being done and the fraction that is done, 0 to 1."""

_POLL = 0.05
"""Seconds between two looks at the growing file."""

_SHARE = 0.9
"""The fraction of a pull that is fetching; the rest is unpacking."""


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A wheel or source archive of a package: its file name, size in bytes and SHA-256 in hexadecimal."""

    package: str
    version: str
    archive: str
    size: int
    sha256: str


def download(archive: Archive, work: Path, report: Report, offered: Path) -> Path:
    """Fetch `archive` into the folder `work`; returns the file, whose SHA-256 has been checked.

    `offered` is named in errors: where the user can lay the file by hand. Raises `ResourceError`
    without pip, network or disk space and `DamagedError` when the index serves another file.
    """
    message = f"fetching {archive.archive} ({archive.size / 1e6:.1f} MB)"
    report(message, 0.0)
    # pip's temporary file, its copy in the destination and the unpacked files exist at once.
    if disk_usage(work).free < 3 * archive.size:
        raise ResourceError(
            f"{archive.archive} cannot be fetched: {work.parent} has less than {3 * archive.size / 1e6:.0f} MB free",
            "free some space there or set GRAFT_CACHE to another folder",
        )
    temporary, out, log = work / "tmp", work / "out", work / "pip.log"
    temporary.mkdir()
    shown = 0.0
    with _pip(archive, work, temporary, out, log) as process:
        while True:
            ended = process.poll() is not None
            files = _files(temporary, out)
            found = next((path for path, size in files if size == archive.size), None)
            if found and _is(found, archive):
                # For a source archive pip would go on to run its setup.py to learn its metadata.
                # Nothing more is needed of pip: leaving the block ends it.
                break
            if ended:
                raise _failure(archive, log, offered)
            fraction = _SHARE * min(1.0, max((size for _, size in files), default=0) / archive.size)
            if fraction - shown >= 0.01:
                report(message, fraction)
                shown = fraction
            with suppress(subprocess.TimeoutExpired):
                process.wait(_POLL)
    if not found.exists():
        # While it was hashed (0.3 s for 93 MB) pip had copied it to its destination and removed its own.
        found = out / found.name
        if not _is(found, archive):
            raise _failure(archive, log, offered)
    return found


def _is(path: Path, archive: Archive) -> bool:
    """Whether the file is the archive; one that pip has just removed is not."""
    try:
        return sha256_of(path) == archive.sha256
    except FileNotFoundError:
        return False


def _files(temporary: Path, out: Path) -> list[tuple[Path, int]]:
    """The files that pip is writing or has written, with their sizes in bytes."""
    files = []
    for path in (*temporary.glob("*/*"), *out.glob("*")):
        try:
            if path.is_file():
                files.append((path, path.stat().st_size))
        except OSError:  # removed by pip meanwhile
            continue
    return files


@contextmanager
def _pip(archive: Archive, work: Path, temporary: Path, out: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """pip, downloading `archive` to `out`, with its temporary files in `temporary`; ended on leaving."""
    requirements = work / "requirements.txt"
    requirements.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
    only = "--only-binary" if archive.archive.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    command += ["--require-hashes", "--progress-bar", "off", f"{only}={archive.package}"]
    command += ["--dest", str(out), "--requirement", str(requirements)]
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))}
    environment |= {"PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    # pip's own defaults, 5 retries of 15 s each with growing pauses, take minutes without a network.
    environment.setdefault("PIP_RETRIES", "1")
    if "PIP_TIMEOUT" not in environment and "PIP_DEFAULT_TIMEOUT" not in environment:
        environment["PIP_TIMEOUT"] = "15"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill pip and what it started. No gentler signal: pip would delete the file on the way out."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _failure(archive: Archive, log: Path, offered: Path) -> GraftError:
    """The error for what pip wrote, in one line."""
    output = log.read_text(encoding="utf-8", errors="replace")
    name = f"{archive.package} {archive.version}"
    if "DO NOT MATCH THE HASHES" in output:
        return DamagedError(
            f"{name} from the package index is not the pinned file: its SHA-256 differs",
            f"check the index that pip uses, or lay {archive.archive} into {offered.parent}",
        )
    if "No module named pip" in output:
        return ResourceError(
            f"{name} cannot be fetched: this Python has no pip",
            f"run `{sys.executable} -m ensurepip`, or lay {archive.archive} into {offered.parent}",
        )
    if "No space left on device" in output or "Disk quota exceeded" in output:
        return ResourceError(
            f"{name} cannot be fetched: no space left in {offered.parent.parent}",
            "free some space there or set GRAFT_CACHE to another folder",
        )
    return ResourceError(
        f"{name} cannot be fetched: {_last_words(output)}",
        "check the network or pip's index options (PIP_INDEX_URL, pip config), "
        f"or lay {archive.archive} into {offered.parent}",
    )


def _last_words(output: str) -> str:
    """The line of pip's output that tells most: a broken connection, else the last error."""
    lines = [re.sub(r"//[^/\s@]+@", "//", line.strip()) for line in output.splitlines() if line.strip()]
    broken = [line for line in lines if "connection broken by" in line]
    if broken:
        system = re.search(r"\[Errno -?\d+\] [^'\")]+", broken[-1])
        reason = system.group() if system else broken[-1].partition("connection broken by ")[2]
        return f"no connection to the package index ({reason})"
    if not lines:
        return "pip ended without a word"
    errors = [line for line in lines if line.startswith("ERROR: ") and line != "ERROR: Exception:"]
    return (errors or lines)[-1].removeprefix("ERROR: ")  # the last line of a traceback says what it was
