"""What a run trains: its base as the recipe wants it, and the adapter on it."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from graft.engine import runtime
from graft.errors import UsageError
from graft.methods.base import Method
from graft.model import Base, load_base
from graft.parts.attach import attach
from graft.parts.attention import choose_kernels
from graft.parts.base import Adapter
from graft.quantize import quantize
from graft.recipe import Recipe
from graft.train.loop import make_accelerator
from graft.train.optim import check_optimizer
from graft.train.precision import Precision, choose

ADAPTER = "tuned"
"""The name under which a run attaches what it trains."""


def prepare(recipe: Recipe) -> tuple[Accelerator, Precision]:
    """Set the process and the random numbers up for a run: devices, and the number format it multiplies in."""
    if recipe.engine.keep_memory:
        runtime.keep_freed_memory()
    set_seed(recipe.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_optimizer(recipe.training.optimizer, device)
    precision = choose(recipe.training.precision, device)
    return make_accelerator(precision.name), precision


def load_for(recipe: Recipe, precision: Precision, device: torch.device) -> Base:
    """The recipe's base. Frozen weights are kept in the format of the products; weights that train in place in fp32.

    Quantized before it goes to a device, so that the device never holds more, and every machine has the same bytes.
    """
    in_place = recipe.method is not None and recipe.method.in_place
    base = load_base(recipe.model, dtype=torch.float32 if in_place else precision.dtype)
    return fit_out(base, recipe, device)


def fit_out(base: Base, recipe: Recipe, device: torch.device) -> Base:
    """A base as the recipe wants it: quantized, on its device, with the engine's kernels."""
    if recipe.quantization is not None:
        quantize(base)
    base.model.to(device)  # type: ignore[arg-type]
    if recipe.engine.attention == "auto":
        choose_kernels(base)
    return base


def head_parameters(adapter: Adapter) -> list[torch.nn.Parameter]:
    """The parameters of an adapter's task head."""
    return [] if adapter.head is None else list(adapter.head.parameters())


def build_adapter(recipe: Recipe, method: Method, base: Base, labels: tuple[str, ...]) -> Adapter:
    """The recipe's adapter, with the objective's head, attached; the seed decides its starting values."""
    set_seed(recipe.seed)
    adapter = method.build(base, ADAPTER)
    recipe.objective.prepare(base, adapter, labels)
    attach(base, adapter)
    return adapter


def check_positions(base: Base, adapter: Adapter | None, max_length: int) -> None:
    """Raise `UsageError` where rows of this length, with an adapter's virtual tokens, exceed the base's positions."""
    virtual = 0
    if adapter is not None:
        virtual = adapter.positions + sum(part.positions for part in adapter.virtual_parts())
    if base.max_positions is not None and max_length + virtual > base.max_positions:
        what = f"{max_length} and {virtual} virtual tokens exceed" if virtual else f"{max_length} exceeds"
        raise UsageError(
            f"max_length {what} the {base.max_positions} positions of {base.name}",
            "shorten one of them",
        )
