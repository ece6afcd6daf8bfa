"""The methods side by side, in the unified view."""

from typing import Any

from graft.errors import GraftError
from graft.methods.base import Method, methods
from graft.model import load_base


def served_by(method: type[Method]) -> str:
    """What can serve an adapter of this method attached to its base."""
    others = ["PEFT"] if not method.peft_type.startswith("GRAFT_") else []
    others += ["vLLM"] if method.in_vllm else []
    return ", ".join(["Graft", *others])


def method_rows(model: str | None = None) -> list[dict[str, Any]]:
    """A row per method; with a base, also the number of parameters that its default settings train (without a head)."""
    base = load_base(model) if model is not None else None
    rows = []
    for name, method in methods().items():
        row: dict[str, Any] = {
            "method": name,
            "function": method.unified.function,
            "sees": method.unified.sees,
            "changes": method.unified.changes,
            "composition": method.unified.composition,
            "merges": method.mergeable,
            "served by": served_by(method),
        }
        if base is not None:
            try:
                row["parameters"] = method().build(base, name).trainable_count()
            except GraftError as error:
                row["parameters"] = str(error)
            base.model.requires_grad_(False)
        rows.append(row)
    return rows
