"""The trials of the demo comparison with peft and Trainer, one after another in one process, as one would write them.

    python -m benchmarks.speed.trials FOLDER [--best]

FOLDER has train, validation and test `.jsonl` and `trials.json`. Without --best: fp32, all rows padded to the recipe's
length. With it: bf16, rows of like length together. The validation rows are evaluated four times, the test rows once.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.configs import task_model, tuned
from benchmarks.speed.work import WARMUP, WEIGHT_DECAY, Work


def rows_of(path: Path, tokenizer: Any, labels: list[str], length: int, best: bool) -> list[dict[str, Any]]:
    """The rows of a file as ids."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    padding = False if best else "max_length"
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=length, padding=padding)
    keys = list(encoded)
    return [
        {**{key: encoded[key][number] for key in keys}, "labels": labels.index(row["label"])}
        for number, row in enumerate(rows)
    ]


def trial(told: dict[str, Any], method: dict[str, Any], rate: float, data: dict[str, Any], best: bool) -> float:
    """Train one method and return its accuracy on the test rows."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    steps = -(-len(data["train"]) // told["batch"])
    arguments = TrainingArguments(
        output_dir=str(data["folder"] / "out"), num_train_epochs=1, per_device_train_batch_size=told["batch"],
        per_device_eval_batch_size=64, learning_rate=rate, weight_decay=WEIGHT_DECAY, warmup_steps=int(steps * WARMUP),
        eval_strategy="steps", eval_steps=-(-steps // 4), save_strategy="no", report_to="none", disable_tqdm=True,
        bf16=best, train_sampling_strategy="group_by_length" if best else "random", seed=told["seed"],
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    work = Work("labels", told["model"], told["batch"], rate, told["max_length"], method)
    trainer = Trainer(
        model=tuned(task_model(work, told, torch.float32), work, steps), args=arguments, train_dataset=data["train"],
        eval_dataset=data["validation"], data_collator=DataCollatorWithPadding(data["tokenizer"]),
        compute_metrics=lambda found: {"accuracy": float((found[0].argmax(-1) == found[1]).mean())},
    )  # fmt: skip
    trainer.train()
    accuracy = trainer.evaluate(data["test"])["eval_accuracy"]
    trainer.model.save_pretrained(data["folder"] / method["name"])
    return float(accuracy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--best", action="store_true")
    given = parser.parse_args()
    from transformers import AutoTokenizer, set_seed

    told = json.loads((given.folder / "trials.json").read_text("utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(told["path"])
    data: dict[str, Any] = {"folder": given.folder, "tokenizer": tokenizer}
    for name in ("train", "validation", "test"):
        path = given.folder / f"{name}.jsonl"
        data[name] = rows_of(path, tokenizer, told["labels"], told["max_length"], given.best)
    quality, seconds = {}, {}
    for method, rate in told["methods"]:
        started = time.perf_counter()
        set_seed(told["seed"])
        quality[method["name"]] = trial(told, method, rate, data, given.best)
        seconds[method["name"]] = time.perf_counter() - started
    print(json.dumps({"quality": quality, "trial_seconds": seconds}))


if __name__ == "__main__":
    main()
