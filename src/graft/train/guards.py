"""Guards: what stops a run that would train the wrong thing, or nothing."""

import torch
from torch import Tensor

from graft.errors import GuardError
from graft.model import Base
from graft.parts.base import Adapter


class MovementGuard:
    """Every trainable tensor must get a gradient and move, and every other tensor of the base must stay.

    Looked at once, after the first `due` steps of a run, which steps that were left out do not count among.
    """

    def __init__(self, base: Base, adapter: Adapter, due: int = 1) -> None:
        self.base = base
        self.adapter = adapter
        self.due = due
        self.begun = 0
        """Steps that were done before this guard was made: of a run that goes on beyond `due` nothing is asked, since
        its last learning rates may move nothing."""
        self.moves = 0
        self.moving = {name: digest(tensor) for name, tensor in adapter.trainable()}
        self.touched: set[str] = set()
        trained = {id(parameter) for _, parameter in adapter.trainable()}
        live = dict(base.model.named_parameters(remove_duplicate=False)) | dict(base.model.named_buffers())
        self.still = {
            name: digest(tensor)
            for name, tensor in live.items()
            if ".graft." not in f".{name}" and id(tensor) not in trained
        }
        if not self.moving:
            raise GuardError(f"{adapter.method.name} has nothing to train", "choose other sites or layers")

    def saw_gradients(self) -> None:
        """Note which trainable tensors have a gradient that is not all zero."""
        for name, parameter in self.adapter.trainable():
            if name not in self.touched and parameter.grad is not None and bool(parameter.grad.any()):
                self.touched.add(name)

    def after_step(self, step: int) -> None:
        """Called after each optimizer step. Raises `GuardError`."""
        self.moves += 1
        if self.moves == self.due and self.begun < self.due:
            self.check_moved(step)
            self.check_still(step)

    def check_begun(self, step: int) -> None:
        """Stop at the end of a run all of whose steps were left out: too few for the run's guard to stop it."""
        if not self.moves and not self.begun:
            raise GuardError(
                f"none of {step} steps could be used: their losses or gradients were no numbers",
                "their rows are in bad_batch.jsonl; look at these, lower the rate, or train with precision=fp32",
            )

    def check_moved(self, step: int) -> None:
        """Stop when a trainable tensor got no gradient, or did not move, in the steps so far."""
        without = [name for name in self.moving if name not in self.touched]
        if without:
            self._stop(step, without, "got no gradient", "an objective or a site that never reaches them")
        fixed = [name for name, tensor in self.adapter.trainable() if digest(tensor) == self.moving[name]]
        if fixed:
            self._stop(step, fixed, "did not move", "a learning rate too small for their size")

    def check_still(self, step: int) -> None:
        """Stop when a tensor of the base that should not train has changed."""
        live = dict(self.base.model.named_parameters(remove_duplicate=False)) | dict(self.base.model.named_buffers())
        changed = [name for name, before in self.still.items() if digest(live[name]) != before]
        if changed:
            self._stop(step, changed, "of the frozen base changed", "code that writes to the base")

    def _stop(self, step: int, names: list[str], what: str, cause: str) -> None:
        shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
        total = len(self.moving) if "base" not in what else len(self.still)
        raise GuardError(
            f"after step {step}, {len(names)} of {total} tensors {what} ({shown})", f"likely cause: {cause}"
        )


_CHUNK = 1 << 20
"""Values summed at a time: a whole embedding table as int64 would show in the run's peak memory."""


@torch.no_grad()
def digest(tensor: Tensor) -> tuple[int, int]:
    """Two sums over a tensor's bits, the second weighted by position: a change of any value, or an exchange
    of two, shows.
    """
    flat = tensor.detach().reshape(-1)
    if flat.is_floating_point():
        flat = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    plain = weighted = 0
    for start in range(0, flat.numel(), _CHUNK):
        bits = flat[start : start + _CHUNK].to(torch.int64)
        weighted += int((bits * torch.arange(start + 1, start + 1 + bits.numel(), device=bits.device)).sum())
        plain += int(bits.sum())
    return plain, weighted
