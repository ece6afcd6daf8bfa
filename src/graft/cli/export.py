"""graft export: a run in the form that another program loads."""

import json
from pathlib import Path
from typing import Annotated

import typer

from graft.cli.shared import Json, run_bar


def export(
    run: Annotated[
        str, typer.Argument(help="A run folder, an adapter folder together with --model, or for GGUF a base.")
    ],
    to: Annotated[str, typer.Option("--to", help="hf, peft, gguf or ollama.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The folder to write; exports/NAME-KIND when left out.")
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(
            "--quant", help="f32, f16, bf16; for GGUF, which has f16 by default, q8_0, q5_1, q5_0, q4_1, q4_0."
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="Of a method that has ranks; the highest by default.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="The base, if not as the run says.")] = None,
    original: Annotated[
        bool, typer.Option("--original", help="Merge into the base as it was before it was quantized to NF4.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    as_json: Json = False,
) -> None:
    """Write a run for transformers, peft, llama.cpp or Ollama: read again and compared before it counts."""
    from graft.export.export import export_run, exported_lines

    with run_bar(as_json) as bar:
        manifest = export_run(
            run, to, output, quant=quant, rank=rank, model=model, original=original, force=force, watch=bar
        )
    typer.echo(json.dumps(manifest, indent=2) if as_json else "\n".join(exported_lines(manifest)))
