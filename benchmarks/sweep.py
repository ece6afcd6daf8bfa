"""Sweep learning rates (or any other setting) of methods, and print the quality of each.

    python benchmarks/sweep.py lora learning_rate=3e-4,1e-3,3e-3
    python benchmarks/sweep.py prefix learning_rate=1e-2,3e-2 init_std=0.02,0.5 -- epochs=1

The test rows are not touched: 1,500 of the training rows are held out, and quality is measured on them and
the validation rows together (2,004 rows of the movie reviews, so ±1.5 points of sampling error).
"""

import itertools
import random
import sys
import time

import torch
import yaml
from accelerate.utils import set_seed

from graft.build import ADAPTER, build_adapter, load_for
from graft.methods.base import read_method
from graft.recipe import Recipe, read_recipe
from graft.train.loop import Trainer, make_accelerator
from graft.train.precision import choose


def trial(recipe: Recipe) -> tuple[float, float, float]:
    """Quality and loss on the held-out rows, and seconds of training."""
    splits = recipe.objective.load(recipe.data)
    order = list(range(len(splits.train)))
    random.Random(0).shuffle(order)
    held = [splits.train[i] for i in order[:1500]] + splits.validation
    kept = [splits.train[i] for i in order[1500:]]
    set_seed(recipe.seed)
    precision = choose(recipe.training.precision, torch.device("cpu"))
    accelerator = make_accelerator(precision.name)
    base = load_for(recipe, precision, accelerator.device)
    length = recipe.max_length
    train = recipe.objective.examples(kept, base.tokenizer, splits.labels, length)
    validation = recipe.objective.examples(held, base.tokenizer, splits.labels, length)
    adapter = build_adapter(recipe, recipe.method, base, splits.labels)
    training = recipe.training.model_copy(update={"eval_steps": 10**9})
    trainer = Trainer(base, adapter, recipe.objective, training, recipe.method.rate(base), recipe.seed, accelerator)
    fitted = trainer.fit(train, validation)
    with accelerator.autocast():
        result = recipe.objective.evaluate(base, validation, ADAPTER, 64)
    return result.quality, result.loss, fitted.seconds


def main() -> None:
    given = sys.argv[1:]
    shared = given[given.index("--") + 1 :] if "--" in given else []
    name, *settings = given[: given.index("--")] if "--" in given else given
    keys = [setting.partition("=")[0] for setting in settings]
    grid = [[yaml.safe_load(value) for value in setting.partition("=")[2].split(",")] for setting in settings]
    for values in itertools.product(*grid):
        chosen = dict(zip(keys, values, strict=True))
        recipe = read_recipe("recipes/movie-reviews.yaml", shared)
        recipe = recipe.model_copy(update={"method": read_method({"name": name} | chosen)})
        started = time.perf_counter()
        try:
            quality, loss, seconds = trial(recipe)
            outcome = f"{quality:.1%}  loss {loss:.3f}  {seconds:.0f} s"
        except Exception as error:
            outcome = f"failed after {time.perf_counter() - started:.0f} s: {error}"
        print(f"{name} {chosen} {shared}: {outcome}", flush=True)


if __name__ == "__main__":
    main()
