"""Whether an installation and a machine work: `graft doctor` without a run."""

import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from graft.errors import GraftError

State = Literal["ok", "warn", "fail"]

NEEDED = {"torch": (2, 11), "transformers": (5, 17), "accelerate": (1, 10), "pydantic": (2, 10), "safetensors": (0, 5)}
"""Packages that everything needs, and the first version that works, as in pyproject.toml."""
EXTRAS = {
    "gguf": ("gguf", "models in GGUF files"),
    "reasoning_gym": ("tasks", "generated tasks (task:NAME)"),
    "sacrebleu": ("metrics", "BLEU and chrF"),
    "rouge_score": ("metrics", "ROUGE"),
    "bitsandbytes": ("nf4", "bases in 4 bits, and optimizers in 8"),
    "pyarrow": ("parquet", "Parquet files"),
    "peft": ("peft", "tuners of peft through the bridge"),
    "fastapi": ("serve", "serving"),
}
"""Packages that some need: the extra that installs each, and what for."""
ROOM = 5 * 10**9
"""Bytes of free disk below which a warning is given: the starter models take 0.5 GB, a full fine-tuning of 1 B
parameters with two checkpoints 8."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    found: str
    """What is there."""
    remedy: str = ""
    """What to do, where something is not as it should be."""


def check_installation() -> list[Check]:
    """Every check, in the order in which they matter. None of them raises, measures or fetches anything."""
    looks: list[Callable[[], list[Check]]] = [
        _python, _packages, _hardware, _compiler, _tunables, _disk, _assets, _extras,
    ]  # fmt: skip
    found: list[Check] = []
    for look in looks:
        try:
            found += look()
        except (ImportError, OSError, RuntimeError, GraftError) as error:
            said = (str(error).splitlines() or [""])[0]
            found.append(Check(look.__name__.strip("_"), "fail", f"{type(error).__name__}: {said}", "install it again"))
    return found


def _python() -> list[Check]:
    told = f"{platform.python_version()} ({sys.executable})"
    old = numbers_of(platform.python_version()) < (3, 11)
    return [Check("python", "fail" if old else "ok", told, "Graft needs Python 3.11 or later" if old else "")]


def _packages() -> list[Check]:
    return [_package(name, least) for name, least in NEEDED.items()]


def _package(name: str, least: tuple[int, ...]) -> Check:
    wanted = ".".join(map(str, least))
    found = installed(name)
    if found is None:
        return Check(name, "fail", "not installed", f"pip install '{name}>={wanted}'")
    if numbers_of(found) < least:
        return Check(name, "fail", f"{found}, {wanted} is needed", f"pip install '{name}>={wanted}'")
    return Check(name, "ok", found)


def installed(name: str) -> str | None:
    """The version of an installed package; None without it."""
    try:
        return version(name.replace("_", "-"))
    except PackageNotFoundError:
        return None


def numbers_of(told: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.13.0+cpu is (2, 13, 0)."""
    found = []
    for part in told.split("+")[0].split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)


def _hardware() -> list[Check]:
    import torch

    from graft.planning.machine import free_memory, remembered, total_memory
    from graft.train.precision import choose

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {threads} threads"
    free, total = free_memory(device), total_memory(device)
    scarce = free < 2 * 2**30
    remedy = "end other programs: the smallest runs take 1 to 2 GiB" if scarce else ""
    precision = choose("auto", device)
    slow = precision.name == "fp32" and device.type == "cpu"
    known = remembered()
    return [
        Check("device", "ok", name),
        Check("memory", "warn" if scarce else "ok", f"{_gib(free)} free of {_gib(total)}", remedy),
        Check("number format", "ok", str(precision), "steps take two to four times as long as in bf16" if slow else ""),
        Check(
            "rates", "ok", "measured" if known else "not measured", "" if known else "`graft hardware` measures them"
        ),
    ]


def _compiler() -> list[Check]:
    from graft.engine.compiled import unavailable

    why = unavailable()
    if why is None:
        return [Check("torch.compile", "ok", "works as far as can be seen")]
    remedy = "install triton" if "triton" in why else "install g++ or clang++, or set CXX"
    return [Check("torch.compile", "warn", f"{why}, so long runs take a fifth longer", remedy)]


def _tunables() -> list[Check]:
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return [Check("C library", "ok", "no glibc, whose memory needs settings")]
    given = os.environ.get("GLIBC_TUNABLES")
    told = f"glibc {platform.libc_ver()[1]}"
    if given is None or "tcache_count" in given:
        return [Check("C library", "ok", f"{told}; training commands set GLIBC_TUNABLES themselves")]
    remedy = "add glibc.malloc.tcache_count=0 to it, or unset it: peaks are up to 30 % lower"
    return [Check("C library", "warn", f"{told}; GLIBC_TUNABLES={given} is left as it is", remedy)]


def _disk() -> list[Check]:
    from graft.assets import cache_dir

    found = []
    for name, place in (("cache", cache_dir()), ("this folder", Path.cwd())):
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            remedy = "set GRAFT_CACHE to a folder that can be written" if name == "cache" else "give -o another folder"
            found.append(Check(name, "fail" if name == "cache" else "warn", f"{place} cannot be written", remedy))
        else:
            scarce = free < ROOM
            told = f"{place}, {free / 1e9:,.0f} GB free"
            found.append(Check(name, "warn" if scarce else "ok", told, "free some space" if scarce else ""))
    return found


def _assets() -> list[Check]:
    from graft import assets

    there = [name for name in assets.ASSETS if assets.is_pulled(name)]
    told = f"{len(there)} of {len(assets.ASSETS)} fetched"
    missing = [name for name in assets.ASSETS if name not in there]
    remedy = f"`graft assets pull {missing[0]}` fetches one, a run that needs it does too" if missing else ""
    return [Check("starter assets", "ok", told, remedy)]


def _extras() -> list[Check]:
    found = []
    for name, (extra, what) in EXTRAS.items():
        there = installed(name)
        if there is None:
            remedy = f"pip install 'graft-tuning[{extra}]'"
            found.append(Check(name, "ok", f"not installed; only for {what}", remedy))
        else:
            found.append(Check(name, "ok", f"{there}, for {what}"))
    return found


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
