"""Serving by an installed vLLM, for more than one machine: its command, with the adapters that it can serve."""

import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from graft.errors import ResourceError, UsageError
from graft.methods import store
from graft.model import locate
from graft.serve.adapters import adapter_folder, trains_in_place
from graft.serve.security import KEY, Access

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be."""


def start_vllm(
    base: str,
    adapters: Mapping[str, Path],
    name: str,
    access: Access,
    port: int,
    *,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Become `vllm serve` with these adapters, or with `dry_run` print its command. `say` is told which adapters are
    left out, and why. Raises `ResourceError` where vLLM is not installed, `UsageError` where it can serve none of the
    adapters.
    """
    folders = {key: adapter_folder(path) for key, path in adapters.items()}
    refused = {key: why for key, folder in folders.items() if (why := unserved(folder)) is not None}
    for key, why in refused.items():
        say(f"left out: {key}: {why}")
    kept = {key: folder for key, folder in folders.items() if key not in refused}
    if folders and not kept:
        raise UsageError("vLLM can serve none of these adapters", "leave --engine out, or `graft merge` one first")
    command = vllm_command(base, kept, name, access, port)
    if dry_run:
        print(shlex.join(command))
        return
    program = shutil.which(command[0])
    if program is None:
        raise ResourceError(
            "vLLM is not installed: there is no `vllm` on the PATH", "install it, or leave --engine out"
        )
    environment = os.environ | ({"VLLM_API_KEY": access.key} if access.key else {})
    environment.pop(KEY, None)
    os.execve(program, command, environment)


def vllm_command(base: str, adapters: Mapping[str, Path], name: str, access: Access, port: int) -> list[str]:
    """The words of vLLM's command line. The key is not among them: it goes by the environment."""
    command = ["vllm", "serve", locate(base), "--served-model-name", name]
    command += ["--host", access.host, "--port", str(port)]
    if adapters:
        rank = max(_rank(folder) for folder in adapters.values())
        fitting = next((size for size in _RANKS if size >= rank), rank)
        command += ["--enable-lora", "--max-loras", str(min(len(adapters), 8)), "--max-lora-rank", str(fitting)]
        command += ["--lora-modules", *(f"{key}={folder.resolve()}" for key, folder in adapters.items())]
    return command


def unserved(folder: Path) -> str | None:
    """Why vLLM cannot serve an adapter folder; None when it can: LoRA of whole matrices, without a head."""
    if trains_in_place(folder):
        return "it changed the base's own weights: merge it and serve the merged model"
    method = store.method_class(folder)
    if not method.in_vllm:
        return f"vLLM reads LoRA only, this is {method.name}"
    config = _config(folder)
    if config.get("task_type") == "SEQ_CLS" or str(config.get("peft_type")) != "LORA":
        return "it has a task head, or parts that peft has not"
    if config.get("modules_to_save") or config.get("rank_pattern") or config.get("alpha_pattern"):
        return "vLLM reads one rank and one scale for all modules, and no saved ones"
    if config.get("use_dora") or config.get("bias", "none") != "none":
        return "vLLM reads neither DoRA nor biases"
    if _rank(folder) > _RANKS[-1]:
        return f"rank {_rank(folder)} is above {_RANKS[-1]}"
    return None


def _config(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return found


def _rank(folder: Path) -> int:
    rank = _config(folder).get("r", 0)
    return rank if isinstance(rank, int) else 0
