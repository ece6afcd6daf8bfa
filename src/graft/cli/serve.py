"""The command that serves a base and adapters over HTTP."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from graft.cli.shared import run_bar, terminal
from graft.errors import UsageError

if TYPE_CHECKING:
    from graft.serve.app import Service


def serve(
    base: Annotated[str, typer.Argument(help="The base: a starter, a folder, a .gguf file or a hub id.")],
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="NAME=RUN", help="A run or adapter folder; repeatable.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="The address; any but this machine's own demands a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option("--api-key", help="Better in the environment: GRAFT_API_KEY is not seen by others.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="What requests call the base.")] = None,
    adapter_root: Annotated[
        Path | None, typer.Option("--adapter-root", help="Let requests load adapters from inside this folder.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option("--state", help="Note those in this folder, and serve them again at the next start.")
    ] = None,
    max_loaded: Annotated[int, typer.Option("--max-loaded", min=1, help="Adapters in memory at most.")] = 16,
    max_rows: Annotated[int, typer.Option("--max-rows", min=1, help="Answers that are written at once.")] = 64,
    queue: Annotated[int, typer.Option("--queue", min=0, help="Answers that may wait; beyond them 429.")] = 256,
    kv_memory: Annotated[
        str | None,
        typer.Option("--kv-memory", help="For keys and values, such as 2GB; else a quarter of what is free."),
    ] = None,
    precision: Annotated[Literal["auto", "bf16", "fp32"], typer.Option("--precision", help="The number format.")] = (
        "auto"
    ),
    grace: Annotated[
        float, typer.Option("--grace", min=0, help="Seconds that answers may go on for when the server is stopped.")
    ] = 30.0,
    engine: Annotated[
        Literal["graft", "vllm"], typer.Option("--engine", help="vllm: start an installed vLLM, for LoRA adapters.")
    ] = "graft",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --engine vllm: print its command, then stop.")
    ] = False,
) -> None:
    """Serve a base and adapters of any method over HTTP, in OpenAI's shape; requests for all of them share a batch."""
    try:
        from graft.serve.security import Access, Limits, key_from
        from graft.serve.server import bind, run
        from graft.serve.start import Settings, check_base, load_service, parse_adapters, public_name
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "starlette", "uvicorn", "prometheus_client"):
            raise
        raise UsageError(f"graft serve needs {error.name}", "pip install 'graft-tuning[serve]'") from None
    adapters = parse_adapters(adapter or [])
    access = Access(host, key_from(api_key))
    _check_folders(adapter_root, state)
    if engine == "vllm":
        from graft.serve.vllm import start_vllm

        served = name or public_name(base)
        start_vllm(base, adapters, served, access, port, dry_run=dry_run, say=lambda line: print(line, file=sys.stderr))
        return
    if dry_run:
        raise UsageError("--dry-run prints the command of another engine", "give --engine vllm with it")
    check_base(base, bool(adapters) or adapter_root is not None)
    memory = _memory(kv_memory)
    settings = Settings(precision, max_loaded, max_rows, queue, memory, root=adapter_root, state=state)
    with bind(host, port) as listening:
        with run_bar(False) as bar:
            service = load_service(base, adapters, settings, name, bar)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        code = run(
            service, listening, access, Limits(), grace=grace, ready=lambda: _tell(service, address, bool(access.key))
        )
    if code == 130:
        raise KeyboardInterrupt
    raise typer.Exit(code)


def _memory(given: str | None) -> int | None:
    from graft.planning.machine import parse_memory

    return None if given is None else parse_memory(given)


def _check_folders(root: Path | None, state: Path | None) -> None:
    if root is not None and not root.is_dir():
        raise UsageError(f"--adapter-root {root}: no such folder", "make it first")
    if state is not None and root is None:
        raise UsageError("--state notes what requests load, which needs --adapter-root", "give both, or neither")


def _tell(service: "Service", address: str, key: bool) -> None:
    """What is served, where, and a first request."""
    from rich.table import Table

    table = Table("model", "method", "answers at", "note", box=None)
    writes, labels = "/v1/chat/completions", "/v1/classify"
    versions = [one for one in service.adapters.versions() if one.task != "none"]
    for version in versions:
        path = writes if version.task == "generate" else labels
        table.add_row(version.name, version.method or "base", path, version.note)
    terminal().print(table)
    print(f"listening on {address}", flush=True)
    if not versions:
        return
    shown = versions[-1]
    body: dict[str, object] = {"model": shown.name}
    if shown.task == "generate":
        body["messages"] = [{"role": "user", "content": "Hello!"}]
    else:
        body["input"] = "Hello!"
    path = writes if shown.task == "generate" else labels
    header = " -H 'Authorization: Bearer KEY'" if key else ""
    print(f"curl {address}{path}{header} -H 'Content-Type: application/json' -d '{json.dumps(body)}'", flush=True)
