"""Alignment on a real model: reward model, PPO, DPO and GRPO on SmolLM2-135M, each beside where it started.

    OMP_NUM_THREADS=2 python -m benchmarks.alignment runs/alignment          # some ninety minutes on two cores
    python -m benchmarks.alignment runs/alignment --keep                     # also docs/results/alignment.json

The shipped recipes run as they are: `rlhf.yaml` (supervised tuning, reward model, PPO), a short supervised warm-up with
`instruct.yaml`, then `dpo.yaml` and `grpo.yaml` from it. Finished runs in the folder are not repeated. Policy and start
are then judged by the same rows: the task's exact match, or the learned reward of greedy answers, with intervals of the
paired difference.
"""

import argparse
import json
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t as student

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "results" / "alignment.json"
SAMPLES = 3
LAST = 10
"""Drawings at the end of PPO whose mean distance is held against the target."""
PARTS = ("rlhf", "warm", "dpo", "grpo")
WARM = ["training.max_steps=40", "transfer=[]", "forgetting=[]"]


def train(recipe: str, folder: Path, *assignments: str) -> None:
    """`graft train` in a process of its own."""
    command = [sys.executable, "-m", "graft", "train", f"recipes/{recipe}.yaml", "-o", str(folder), *assignments]
    print("  " + " ".join(command[3:]), flush=True)
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def read(folder: Path, name: str = "report.json") -> dict[str, Any]:
    """A file of a run."""
    found: dict[str, Any] = json.loads((folder / name).read_text("utf-8"))
    return found


def judge(recipe: Any, adapter: Path) -> tuple[list[float], list[dict[str, Any]]]:
    """Whether the answer to each test row is right under an adapter, or its reward; and the answers."""
    from graft.build import ADAPTER, load_for, prepare
    from graft.methods import store

    accelerator, precision = prepare(recipe)
    splits = recipe.objective.load(recipe.data)
    base = load_for(recipe, precision, accelerator.device)
    store.load(base, adapter, ADAPTER)
    assert base.tokenizer is not None
    rows = recipe.objective.examples(splits.test, base.tokenizer, splits.labels, recipe.max_length)
    with accelerator.autocast():
        result = recipe.objective.evaluate(base, rows, ADAPTER, recipe.training.per_device_eval_batch_size)
    rewarded = recipe.objective.name == "ppo"
    return [one["score"] for one in result.samples] if rewarded else result.correct, result.samples


def beside(recipe: Any, start: Path, end: Path) -> dict[str, Any]:
    """Start and end of a policy on the same rows: means, paired difference with interval and p, a few answers."""
    from scipy import stats

    from graft.stats import compare_pair

    (before, first), (after, last) = (judge(recipe, run / "adapter") for run in (start, end))
    if recipe.objective.name == "ppo":  # rewards have no bounds: Student's interval of the paired differences
        tested = stats.ttest_rel(after, before)
        difference = [mean(after) - mean(before), *map(float, tested.confidence_interval()), float(tested.pvalue)]
    else:
        pair = compare_pair([after], [before])
        difference = [pair.difference, pair.low, pair.high, pair.p]
    samples = [
        {"prompt": one["prompt"], "start": one["answer"], "end": two["answer"], "scores": [x, y]}
        for one, two, x, y in zip(first[:SAMPLES], last, before, after, strict=False)
    ]
    means = {"rows": len(before), "start": mean(before), "end": mean(after)}
    return means | {"difference": difference, "samples": samples}


def costs(folder: Path) -> dict[str, Any]:
    """What a run took, and what it logged at each step and evaluation."""
    report = read(folder)
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    names = sorted({name for point in points for name in point["watched"]})
    kept = (
        "quality",
        "quality_low",
        "quality_high",
        "steps",
        "train_seconds",
        "peak_memory_bytes",
        "trainable_parameters",
    )
    return {key: report[key] for key in kept} | {
        "seconds": folder_seconds(folder),
        "machine": read(folder, "env.json")["machine"],
        "curve": {name: [[point["step"], point["watched"].get(name)] for point in points] for name in names},
        "evaluations": [[point["step"], point["quality"]] for point in points if point["quality"] is not None],
    }


def folder_seconds(folder: Path) -> float:
    """Seconds from a run's first file to its report: all of it, with reading, loading and measuring."""
    return (folder / "report.json").stat().st_mtime - (folder / "recipe.yaml").stat().st_mtime


def measured(folder: Path, parts: list[str]) -> dict[str, Any]:
    """Run what has not run yet, and all figures."""
    from graft.recipe import Recipe, read_recipe

    found: dict[str, Any] = {}
    if "rlhf" in parts:
        train("rlhf", folder / "rlhf")
        for name in ("sft", "reward", "ppo"):
            found[name] = costs(folder / "rlhf" / name)
        recipe = Recipe.parse(_recipe(folder / "rlhf" / "ppo"), "ppo")
        found["ppo"] |= beside(recipe, folder / "rlhf" / "sft", folder / "rlhf" / "ppo")
        found["ppo"] |= distance(found["ppo"]["curve"]["kl"]) | {"kl_target": recipe.objective.kl_target}
    task = read_recipe(str(ROOT / "recipes" / "instruct.yaml"), WARM)
    for name in ("warm", "dpo", "grpo"):
        if name in parts:
            given = WARM if name == "warm" else [f"objective.init={folder / 'warm'}"]
            train("instruct" if name == "warm" else name, folder / name, *given)
            found[name] = costs(folder / name)
            if name != "warm":
                found[name] |= {"task": beside(task, folder / "warm", folder / name)}
    return found


def distance(curve: list[tuple[int, float | None]]) -> dict[str, Any]:
    """The mean KL of PPO's last drawings and its 95 % interval. A drawing stands at each step that learns from it."""
    drawn = [value for value, _ in groupby(value for _, value in curve if value is not None)][-LAST:]
    half = float(student.ppf(0.975, len(drawn) - 1)) * stdev(drawn) / len(drawn) ** 0.5
    return {"kl": mean(drawn), "kl_interval": [mean(drawn) - half, mean(drawn) + half]}


def _recipe(folder: Path) -> dict[str, Any]:
    import yaml

    values: dict[str, Any] = yaml.safe_load((folder / "recipe.yaml").read_text("utf-8"))
    return values


def main() -> None:
    """Run the parts and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--parts", nargs="*", default=list(PARTS), choices=PARTS, help="with --keep others keep their figures"
    )
    parser.add_argument("--keep", action="store_true", help="write docs/results/alignment.json too")
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    earlier = read(KEPT.parent, KEPT.name) if given.keep and KEPT.exists() else {}
    found = earlier | measured(folder, given.parts)
    text = json.dumps(found, indent=1) + "\n"
    if given.keep:
        KEPT.write_text(text)
    for name, run in found.items():
        print(
            name,
            json.dumps(
                {key: value for key, value in run.items() if key not in ("curve", "evaluations", "machine")}, indent=1
            ),
        )


if __name__ == "__main__":
    main()
