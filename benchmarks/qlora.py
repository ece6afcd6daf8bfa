"""QLoRA beside LoRA on the same task: memory of the weights, exact match, and seconds a step.

    OMP_NUM_THREADS=2 python benchmarks/qlora.py runs/qlora      # recipes/instruct.yaml, some fifteen minutes
    python benchmarks/qlora.py runs/look training.max_steps=4 data.max_eval_samples=20   # a look

The recipe runs as it is and with `quantization: nf4`, each seed in a process and folder of its own; finished ones are
not repeated. Neither is compiled (`engine.compile=auto` compiles LoRA in long runs, and nothing over NF4), and neither
measures forgetting. Figures go to FOLDER/qlora.json, and with `--keep` also to docs/results/qlora.json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "results" / "qlora.json"
TRIALS = {"LoRA": "quantization=null", "QLoRA": "quantization=nf4"}
ALWAYS = ("engine.compile=false", "forgetting=[]", "transfer=[]")


def weights(recipe: str, assignments: list[str]) -> dict[str, int]:
    """Bytes of a base as a run holds it: of the matrices inside the layers, and of everything."""
    import torch

    from graft.build import load_for
    from graft.recipe import read_recipe
    from graft.sites import Packed
    from graft.train.precision import choose

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    read = read_recipe(recipe, assignments)
    base = load_for(read, choose(read.training.precision, device), device)
    layers = {site.path: site.leave for site in base.select("all-linear")}
    matrices = {
        id(tensor): tensor.nbytes
        for layer in layers.values()
        for tensor in (layer.buffers() if isinstance(layer, Packed) else [layer.get_parameter("weight")])
    }
    everything = {id(tensor): tensor.nbytes for tensor in [*base.model.parameters(), *base.model.buffers()]}
    return {"matrices": sum(matrices.values()), "model": sum(everything.values())}


def run(recipe: str, folder: Path, assignments: list[str]) -> dict[str, Any]:
    """The report of a run in a process of its own, with which answers were right."""
    command = [sys.executable, "-m", "graft", "train", recipe, "-o", str(folder), *assignments]
    print("  " + " ".join(command[3:]), flush=True)
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report | json.loads((folder / "correct.json").read_text())


def measured(recipe: str, folder: Path, assignments: list[str], seeds: list[int]) -> dict[str, Any]:
    """All figures."""
    from graft.measure import environment
    from graft.stats import compare_pair, interval

    rows = {}
    correct = {}
    for name, how in TRIALS.items():
        given = [*assignments, *ALWAYS, how]
        runs = [run(recipe, folder / f"{name.lower()}-{seed}", [*given, f"seed={seed}"]) for seed in seeds]
        correct[name] = [one["correct"] for one in runs]
        quality = interval(correct[name])
        rows[name] = {
            "weights": weights(recipe, given),
            "quality": [quality.mean, quality.low, quality.high],
            "seconds_per_step": sum(one["train_seconds"] for one in runs) / sum(one["steps"] for one in runs),
            "peak_memory_bytes": max(one["peak_memory_bytes"] for one in runs),
            "steps": runs[0]["steps"],
        }
    pair = compare_pair(correct["QLoRA"], correct["LoRA"])
    return {
        "recipe": recipe,
        "assignments": [*assignments, *ALWAYS],
        "seeds": seeds,
        "rows": rows,
        "difference": [pair.difference, pair.low, pair.high, pair.p],
        "environment": environment(),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The figures as a table, and what follows from them."""
    told = [
        "| | matrices, MB | all weights, MB | exact match, % | seconds a step | peak memory, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["rows"].items():
        mean, low, high = (100 * value for value in row["quality"])
        told.append(
            f"| {name} | {row['weights']['matrices'] / 1e6:.1f} | {row['weights']['model'] / 1e6:.1f} | "
            f"{mean:.1f} ({low:.1f} to {high:.1f}) | {row['seconds_per_step']:.2f} | "
            f"{row['peak_memory_bytes'] / 2**30:.2f} |"
        )
    saved = {
        what: 1 - found["rows"]["QLoRA"]["weights"][what] / found["rows"]["LoRA"]["weights"][what]
        for what in ("matrices", "model")
    }
    difference, low, high, p = found["difference"]
    return [
        *told,
        "",
        f"weights: {saved['matrices']:.1%} less for the matrices inside the layers, {saved['model']:.1%} less for the "
        "whole model",
        f"exact match: QLoRA minus LoRA {100 * difference:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}), "
        f"p = {p:.2g}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("assignments", nargs="*", help="key=value, as of graft train")
    parser.add_argument("--recipe", default="recipes/instruct.yaml")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="write docs/results/qlora.json too")
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    found = measured(given.recipe, folder, given.assignments, list(range(1, given.seeds + 1)))
    text = json.dumps(found, indent=2) + "\n"
    (folder / "qlora.json").write_text(text)
    if given.keep:
        KEPT.write_text(text)
    print("\n".join(lines(found)))


if __name__ == "__main__":
    main()
