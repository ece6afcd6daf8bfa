"""Values that replace the base's own tensors: what full and frozen fine-tuning train."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from graft.errors import UsageError
from graft.model import Base
from graft.parts.base import Part
from graft.quantize import packed_layers
from graft.sites import Site


class OwnPart(Part):
    """New values for some tensors of one module, by the module's own names."""

    def __init__(self, values: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, value)

    def own(self) -> dict[str, Tensor]:
        """The values."""
        return dict(self.named_parameters())

    def merge(self, site: Site) -> dict[str, Tensor]:
        """The values, by path."""
        return {f"{site.path}.{name}": value.detach() for name, value in self.named_parameters()}


def own_parts(base: Base, wanted: Callable[[str], bool], exclusive: bool) -> list[tuple[Site, OwnPart]]:
    """A part at every module that has parameters whose name (dotted, in the base) is `wanted`.

    Exclusive parts hold the base's own parameters, others hold copies in fp32; a parameter that several modules share
    (tied embeddings) is one in both cases. Raises `UsageError` when a quantized matrix is wanted.
    """
    packed = next((path for path, _ in packed_layers(base) if wanted(f"{path}.weight")), None)
    if packed is not None:
        raise UsageError(
            f"{packed} is kept in {base.quantization}, where nothing can train",
            "leave `quantization` out, or use a method that trains beside the base, such as lora",
        )
    copies: dict[int, nn.Parameter] = {}
    named = {
        id(parameter)
        for path, module in base.modules_by_path.items()
        for name, parameter in module.named_parameters(recurse=False)
        if wanted(f"{path}.{name}")
    }
    placed = []
    for path, module in base.modules_by_path.items():
        chosen = {
            name: parameter for name, parameter in module.named_parameters(recurse=False) if id(parameter) in named
        }
        if not chosen:
            continue
        if not exclusive and any(child != "graft" for child, _ in module.named_children()):
            raise UsageError(
                f"{path} holds parameters beside modules, so rows cannot have values of their own there",
                "use `exclusive: true`",
            )
        values: dict[str, nn.Parameter] = {}
        for name, parameter in chosen.items():
            if id(parameter) not in copies:
                copies[id(parameter)] = parameter if exclusive else _master(parameter)
                copies[id(parameter)].requires_grad_(True)
            values[name] = copies[id(parameter)]
        placed.append((_module_site(path, module), OwnPart(values)))
    return placed


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """A copy in fp32: a bf16 weight loses updates below 1/256 of its size."""
    return nn.Parameter(parameter.detach().to(torch.float32, copy=True))


def _module_site(path: str, module: nn.Module) -> Site:
    return Site(name=path, role="module", layer=None, path=path, enter=module, leave=module, d_in=0, d_out=0)
