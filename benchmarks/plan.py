"""A plan beside the run: memory that a process grows by, and time, predicted and measured.

    python -m benchmarks.plan [--only NAME] [--out FILE]

Every case is a process of its own that loads the base, then trains on the same rows that were planned with, without
compiling; the machine's rates are measured anew before each. Growth is the kernel's high-water mark of resident memory
during the training above what is resident when base and adapter are there; predicted are the live tensors at the peak
beyond weights and adapter, and WORKSPACE. Takes ten minutes.
"""

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

CASES: tuple[tuple[str, str, list[str]], ...] = (
    ("lora", "movie-reviews", []),
    ("lora, fp32", "movie-reviews", ["precision=fp32"]),
    ("lora, recomputed", "movie-reviews", ["gradient_checkpointing=true"]),
    ("full", "movie-reviews", ["method=full"]),
    ("prefix", "movie-reviews", ["method=prefix"]),
    ("bottleneck", "movie-reviews", ["method=bottleneck"]),
    ("dora", "movie-reviews", ["method=dora"]),
    ("lora", "instruct", []),
    ("lora, fp32", "instruct", ["precision=fp32"]),
    ("lora, recomputed", "instruct", ["gradient_checkpointing=true"]),
    ("lora, nf4", "instruct", ["quantization=nf4"]),
    ("full", "instruct", ["method=full"]),
    ("prefix", "instruct", ["method=prefix"]),
    ("ia3", "movie-reviews", ["method=ia3"]),
    ("vera", "instruct", ["method=vera"]),
    ("bottleneck, fp32", "instruct", ["method=bottleneck", "precision=fp32"]),
)
"""A name, a recipe and settings. The last three had no say in the plan's constants."""
CUT = {
    "movie-reviews": ["method=lora", "max_train_samples=1600", "max_eval_samples=64"],
    "instruct": ["data.train=task:family_relationships:size=160"],
}
SHARED = [
    "engine.compile=false", "preflight=false", "num_train_epochs=1", "load_best_model_at_end=false",
    "eval_steps=100000",
]  # fmt: skip


def measure(recipe_name: str, settings: list[str]) -> dict[str, Any]:
    """Plan and run one case in this process."""
    from graft.engine import runtime

    runtime.prepare_environment()
    import torch

    from graft.build import build_adapter, load_for, prepare
    from graft.measure import PeakMemory
    from graft.model import load_tokenizer
    from graft.planning.catalogue import config_of
    from graft.planning.machine import measured
    from graft.planning.plan import WORKSPACE, estimate
    from graft.planning.simulate import Job, Rows
    from graft.recipe import read_recipe
    from graft.train.loop import Trainer
    from graft.train.points import Point

    machine = measured()
    recipe = read_recipe(Path("recipes") / f"{recipe_name}.yaml", [*CUT[recipe_name], *SHARED, *settings])
    assert recipe.method is not None
    accelerator, precision = prepare(recipe)
    splits = recipe.objective.load(recipe.data)
    read = recipe.objective.examples
    tokenizer = load_tokenizer(recipe.model)
    train, held = (
        read(rows, tokenizer, splits.labels, recipe.max_length) for rows in (splits.train, splits.validation)
    )
    job = Job(recipe, recipe.method, config_of(recipe.model), precision, Rows(train, held, splits.labels, tokenizer))
    planned = estimate(job, machine, beside=False)
    base = load_for(recipe, precision, accelerator.device)
    for tensor in base.state().values():  # what is read from a mapped file is in memory from now on
        tensor.detach().reshape(-1).view(torch.uint8)[::1024].max()  # leaves no freed memory that training would use
    adapter = build_adapter(recipe, recipe.method, base, splits.labels)
    points: list[Point] = []

    class Unevaluated(Trainer):
        def _evaluate(self, validation: Any, result: Any, point: Point, total: int) -> Point:
            return point

    trainer = Unevaluated(base, adapter, recipe.objective, recipe.training, recipe.method.rate(base), recipe.seed,
                          accelerator, record=points.append, engine=recipe.engine)  # fmt: skip
    torch._dynamo.reset()  # loaded here, since attaching needs it
    memory = PeakMemory(base.device)
    before = memory.bytes()
    fitted = trainer.fit(train, held)
    warm = 3
    steps = [after.seconds - point.seconds for point, after in pairwise(points)]
    live = sum(planned.kinds.values()) - planned.kinds["weights"] - planned.kinds["adapter"]
    return {
        "predicted_growth": live + WORKSPACE,
        "measured_growth": memory.bytes() - before,
        "predicted_step": planned.step_seconds,
        "measured_step": sum(steps[warm:]) / len(steps[warm:]),
        "steps": fitted.steps,
    }


def main() -> None:
    """Run every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        recipe, settings = json.loads(given.case)
        print(json.dumps(measure(recipe, settings)))
        return
    from graft.planning.machine import measured

    rows = []
    print("| run | growth predicted, MiB | measured | ratio | step predicted, ms | measured | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for name, recipe, settings in CASES:
        if given.only and given.only not in f"{recipe} {name}":
            continue
        measured(again=True)
        command = [sys.executable, "-m", "benchmarks.plan", "--case", json.dumps([recipe, settings])]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            print(f"| {recipe}, {name} | {run.stderr.strip().splitlines()[-1][:120]} |")
            continue
        found = json.loads(run.stdout.splitlines()[-1])
        rows.append({"run": f"{recipe}, {name}"} | found)
        space, pace = (found[f"predicted_{what}"] / found[f"measured_{what}"] for what in ("growth", "step"))
        print(
            f"| {recipe}, {name} | {found['predicted_growth'] / 2**20:,.0f} | {found['measured_growth'] / 2**20:,.0f} "
            f"| {space:.2f} | {found['predicted_step'] * 1000:,.0f} | {found['measured_step'] * 1000:,.0f} "
            f"| {pace:.2f} |",
            flush=True,
        )
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
