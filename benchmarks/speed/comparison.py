"""The demo comparison: `graft compare` beside the same trials with peft and Trainer."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.speed.drive import LIMIT, ROOT, Drive, environment, json_of

SHARED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("full", {}),
    ("frozen", {}),
    ("lora", {"r": 8, "target_modules": ["attn.q", "attn.v"]}),
    ("prefix", {"num_virtual_tokens": 20}),
    ("prompt", {"num_virtual_tokens": 20}),
)
"""Methods of the demo that peft and Trainer have too; `bottleneck` they have not."""
ROWS = 640
EVALUATED = 300
"""Validation rows, and test rows, at most."""
EXTRA = ("graft all",)
"""Sides with --extra only."""
SIDES = {
    "graft": "`graft compare`: these methods and the untouched base, each in a process of its own, with latencies, "
    "merging and the report; without forgetting and transfer",
    "graft all": "the same with forgetting and transfer, as the demo has them",
    "trainer": "one script, one trial after another: fp32, all rows padded to 96 tokens",
    "trainer best": "the same script: bf16, rows of like length together",
}


def measure(drive: Drive, plan: Callable[[int], None], rows: int | None) -> dict[str, Any]:
    """Wall time of each side, once: each runs five or six trainings."""
    wanted = [
        name for name in SIDES if (drive.extra or name not in EXTRA if drive.only is None else name in drive.only)
    ]
    plan(len(wanted))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="graft-bench-") as place:
        recipe, shown = _write(Path(place), rows or ROWS, drive.graft)
        for name in wanted:
            drive.tell(f"compare: {name}")
            started = time.perf_counter()
            if name.startswith("graft"):
                told = _graft(recipe, Path(place) / name.replace(" ", "-"), name in EXTRA, drive.threads)
            else:
                best = ["--best"] * (name == "trainer best")
                told = json_of(["-m", "benchmarks.speed.trials", place, *best], drive.threads)
            if "error" not in told:
                told["seconds"] = time.perf_counter() - started
            found[name] = {"about": SIDES[name], "rounds": [told]}
            drive.tell(None)
    return {"sides": found, "settings": shown}


def _write(folder: Path, rows: int, assignments: list[str]) -> tuple[Path, dict[str, Any]]:
    """Graft's recipe, and the same rows, settings and rates for the peers."""
    from graft.model import load_base, locate
    from graft.recipe import read_recipe

    names = ",".join(json.dumps({"name": name, **settings}) for name, settings in SHARED)
    cut = [f"data.max_train_samples={rows}", f"data.max_eval_samples={EVALUATED}", f"methods=[{names}]"]
    recipe = read_recipe(ROOT / "recipes" / "demo.yaml", [*cut, *assignments])
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), "utf-8")
    splits = recipe.objective.load(recipe.data)
    for name in ("train", "validation", "test"):
        lines = (json.dumps({"text": row.text, "label": row.label}) for row in getattr(splits, name))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    base = load_base(recipe.model)
    told = {
        "model": recipe.model, "path": locate(recipe.model), "labels": list(splits.labels), "seed": recipe.seed,
        "batch": recipe.training.per_device_train_batch_size, "max_length": recipe.max_length,
        "methods": [
            ({"name": name, **settings}, method.rate(base))
            for (name, settings), method in zip(SHARED, recipe.methods, strict=True)
        ],
    }  # fmt: skip
    (folder / "trials.json").write_text(json.dumps(told), "utf-8")
    shown = {"model": recipe.model, "rows": len(splits.train), "evaluated": len(splits.test), "batch": told["batch"]}
    return folder / "recipe.yaml", shown | {"methods": [name for name, _ in SHARED]}


def _graft(recipe: Path, folder: Path, everything: bool, threads: int | None) -> dict[str, Any]:
    """`graft compare` into a folder; its qualities, or what it said when it failed."""
    less = [] if everything else ["forgetting=[]", "transfer=[]"]
    command = [sys.executable, "-m", "graft", "compare", str(recipe), *less, "-o", str(folder), "--json"]
    run = subprocess.run(
        command, env=environment(threads), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    if run.returncode:
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        return {"error": (lines or [f"exit code {run.returncode}"])[-1][:300]}
    rows = json.loads(run.stdout)["rows"]
    return {
        "quality": {row["label"]: row["quality"] for row in rows},
        "trial_seconds": {row["label"]: row["train_seconds"] for row in rows if row["train_seconds"] is not None},
    }
