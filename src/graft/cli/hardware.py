"""The command that shows how fast a machine is."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli.shared import Json, run_bar, terminal

if TYPE_CHECKING:
    from graft.planning.machine import Machine

_GIB = 2**30


def hardware(
    again: Annotated[bool, typer.Option("--again", help="Measure, even if that was done before.")] = False,
    device: Annotated[
        str | None, typer.Option("--device", help="A card by name, such as a100-80gb, instead of this machine.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what this machine is and its rates, which plans are made from: measured once, in up to 20 seconds."""
    from graft.errors import UsageError
    from graft.planning.machine import known, measured

    if device is not None and again:
        raise UsageError("a card's rates are from its data sheet, so --again has no use beside --device")
    if device is not None:
        machine = known(device)
    else:
        with run_bar(as_json) as bar:
            machine = measured(again, bar)
    figures = _figures(machine, here=device is None)
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
        return
    _print(machine, figures)


def _figures(machine: "Machine", here: bool) -> dict[str, Any]:
    """What `--json` prints."""
    import torch

    from graft.planning.machine import free_memory

    device = torch.device(machine.kind)
    return {
        "name": machine.name,
        "kind": machine.kind,
        "memory_bytes": machine.memory,
        "free_memory_bytes": free_memory(device) if here else None,
        "cores": machine.cores,
        "threads": machine.threads,
        "source": machine.source,
        "precision": machine.precision.name,
        "precision_reason": machine.precision.reason,
        "overhead_seconds": machine.overhead,
        "bandwidth_bytes_per_second": machine.bandwidth,
        "flops_per_second": {"fp32": machine.rate(torch.float32), "bf16": machine.rate(torch.bfloat16)},
        "products": [{"flops": size} | rates for size, rates in _rows(machine.products)] if here else [],
        "moves": [{"bytes": size} | rates for size, rates in _rows(machine.moves)] if here else [],
    }


def _rows(curves: Any) -> list[tuple[float, dict[str, float]]]:
    """Sizes that were measured, and the rate of each number format there."""
    sizes = sorted({size for curve in curves.values() for size, _ in curve})
    rates = {name: {size: size / seconds for size, seconds in curve} for name, curve in curves.items()}
    return [(size, {name: found[size] for name, found in rates.items() if size in found}) for size in sizes]


def _print(machine: "Machine", figures: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    free = figures["free_memory_bytes"]
    rows = {
        "machine": machine.name,
        "cores": "" if machine.cores is None else f"{machine.cores}, {machine.threads} threads",
        "memory": f"{machine.memory / _GIB:.1f} GiB" + ("" if free is None else f", {free / _GIB:.1f} GiB free"),
        "number format": str(machine.precision),
        "matrix products": ", ".join(f"{name} {_flops(rate)}" for name, rate in figures["flops_per_second"].items()),
        "memory bandwidth": f"{machine.bandwidth / 1e9:,.1f} GB/s",
        "overhead": f"{machine.overhead * 1e6:.1f} µs an operation",
        "rates": machine.source,
    }
    for name, value in rows.items():
        if value:
            facts.add_row(name, Text(value))
    screen = terminal()
    screen.print(facts)
    if figures["products"]:
        screen.print()
        screen.print(_curves("product, Gflop", figures["products"], "flops", 1e9, _flops))
        screen.print()
        screen.print(_curves("element-wise, MiB", figures["moves"], "bytes", 2**20, _bytes))


def _curves(title: str, rows: list[dict[str, float]], size: str, unit: float, write: Any) -> Any:
    """A table of rates by size; a dash where none was measured."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in (title, "fp32", "bf16"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row[size] / unit:,.3g}", *(write(row[name]) if name in row else "–" for name in ("fp32", "bf16"))
        )
    return table


def _flops(rate: float) -> str:
    return f"{rate / 1e12:,.1f} Tflop/s" if rate >= 1e12 else f"{rate / 1e9:,.1f} Gflop/s"


def _bytes(rate: float) -> str:
    return f"{rate / 1e9:,.1f} GB/s"
