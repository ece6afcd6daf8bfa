"""Where a policy starts and what it is held against: an adapter of an earlier run, or the plain base.

The reference is a route, never a second model: None is the plain base, and a policy that starts from an earlier run has
that run's adapter attached a second time, frozen. The policy itself is loaded with the same values and trained on, so a
finished run is one adapter that needs no other.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from graft.errors import GuardError, UsageError
from graft.methods import store
from graft.methods.base import method_of
from graft.model import Base
from graft.parts.attach import detach
from graft.parts.base import Adapter, Part
from graft.routing import Entry

START = "start"
"""The name under which a run's start is attached."""


def adapter_folder(run: str) -> Path:
    """The adapter of a run folder, or of an adapter folder. Raises `UsageError` where there is none."""
    path = Path(run).expanduser()
    found = next((folder for folder in (path / "adapter", path) if (folder / "adapter_config.json").is_file()), None)
    if found is None:
        raise UsageError(f"{run} is neither a finished run nor an adapter folder", "`graft runs` lists the runs")
    return found


def is_simulated(base: Base) -> bool:
    """Whether a base has shapes and no values, as in a plan: nothing can then be read from disk into it."""
    return isinstance(next(base.model.parameters()), FakeTensor)


def start_from(run: str, base: Base, adapter: Adapter) -> None:
    """Give a built adapter, not attached yet, the values of an earlier run's. Raises `UsageError` where that run has
    another method or other settings.
    """
    if is_simulated(base):
        return
    earlier = store.load(base, adapter_folder(run), START)
    try:
        mine, theirs = method_of(adapter), method_of(earlier)
        if mine.name != theirs.name or mine.settings() != theirs.settings():
            shown = {"name": theirs.name} | {
                key: value for key, value in theirs.settings().items() if value != mine.settings().get(key)
            }
            raise UsageError(f"init: {run} has the method {shown}, the recipe has {mine.name} with other settings",
                             f"give method: {shown}")  # fmt: skip
        if earlier.head is not None:
            raise UsageError(f"init: {run} has a task head, so it is no language model", "give an instruct run")
        own, given = dict(adapter.named_tensors(head=False)), earlier.tensors()
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(given[name])
    finally:
        detach(base, START)


def reference(run: str | None, base: Base) -> Entry:
    """The route of the reference: the plain base, or the frozen start, which is attached when it is not yet."""
    if run is None or is_simulated(base):
        return None
    if START not in base.adapters:
        store.load(base, adapter_folder(run), START).requires_grad_(False)
    return START


def starts_as_reference(adapter: Adapter, run: str | None) -> bool:
    """Whether a policy has to be its reference exactly before the first step: it starts from the same run, or its
    method changes nothing at first."""
    return run is not None or method_of(adapter).starts_as_base


def require_reference(policy: Tensor, known: Tensor, place: str) -> None:
    """Raise `GuardError` where the log-probabilities of a policy are not those of its reference, to the bit."""
    if not torch.equal(policy, known):
        raise GuardError(
            f"before the first step the policy is not the reference: log-probabilities of {place} differ "
            f"by {float((policy - known).abs().max()):.3g}",
            "a base with random parts of its own cannot be aligned; with init, give the base of that run",
        )


def as_evaluated(*modules: nn.Module) -> None:
    """Switch off for good what only training does, dropout and attention in groups: log-probabilities of training have
    to be those of a second pass, of the reference, and of the policy that writes."""
    for whole in modules:
        for module in whole.modules():
            if isinstance(module, Part):
                module.cuts_rows = False
            elif isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(vars(module).get("attention_dropout"), float):
                module.attention_dropout = 0.0  # type: ignore[assignment]


def refuse_in_place(adapter: Adapter, what: str) -> None:
    """Refuse a method that trains the base itself where the untouched base has to stay."""
    if adapter.exclusive:
        raise UsageError(
            f"{adapter.method.name} trains the base in place, and {what} needs the base as it was",
            f"take an adapter, such as lora, or give {adapter.method.name} `exclusive: false`",
        )
