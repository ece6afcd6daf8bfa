"""Sites: the places of a base where a part can sit.

A site is named by role, the same for every architecture: the linears
`attn.q attn.k attn.v attn.o mlp.gate mlp.up mlp.down`, the blocks `attn mlp`, the softmax core
`attention`, `embed`, `pooler`, `norm.embed norm.attn norm.mlp norm.final` and `head`, with `enc.`, `dec.` and `cross.`
in encoder-decoders.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from graft.families import Family


class Packed(nn.Module):
    """A linear layer that keeps its weight in fewer bits than a number format has. Its bias, if any, is a parameter.

    `shape` is (d_out, d_in); `transposed` says that it was a `Conv1D`, whose weight is [d_in, d_out].
    """

    shape: tuple[int, int]
    transposed: bool

    def dense(self) -> Tensor:
        """The weight [d_out, d_in], made anew at each call, in the number format of the base."""
        raise NotImplementedError


LINEAR = (nn.Linear, Conv1D, Packed)
"""The modules that are one matrix."""


@dataclass(frozen=True, eq=False)
class Site:
    """A place in the base: the module where x [B, S, d_in] enters, the module where y [B, S, d_out] leaves, and a
    slice of y's columns when a projection is fused.

    `path` is the dotted path of `leave`; `heads`, `kv_heads` and `head_dim` are set at attention sites.
    """

    name: str
    role: str
    layer: int | None
    path: str
    enter: nn.Module
    leave: nn.Module
    d_in: int
    d_out: int
    columns: slice | None = None
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0

    @property
    def linear(self) -> bool:
        """Whether this is one matrix (or a column block of one)."""
        return isinstance(self.leave, LINEAR)

    @property
    def transposed(self) -> bool:
        """Whether the base has this matrix as [d_in, d_out], as GPT-2 does: peft's fan_in_fan_out."""
        return self.leave.transposed if isinstance(self.leave, Packed) else isinstance(self.leave, Conv1D)

    @property
    def whole(self) -> bool:
        """Whether peft could adapt it: one whole matrix, or the embedding table."""
        return (self.linear and self.columns is None) or self.role == "embed"

    @property
    def block(self) -> bool:
        """Whether this is a whole attention or feed-forward block."""
        return bare(self.role).removeprefix("cross.") in ("attn", "mlp")

    @property
    def key(self) -> str:
        """The name without dots, unique among the sites of one module."""
        return self.name.replace(".", "_")

    def dense_weight(self) -> Tensor:
        """The host's weight [d_out, d_in], dequantized where it is packed."""
        weight = self._whole_weight()
        return weight if self.columns is None else weight[self.columns]

    def _whole_weight(self) -> Tensor:
        """The weight [d_out of the whole host, d_in]."""
        if isinstance(self.leave, Packed):
            return self.leave.dense()
        weight: Tensor = self.leave.get_parameter("weight")
        return weight.T if self.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """The host's bias [d_out], if it has one."""
        bias = dict(self.leave.named_parameters(recurse=False)).get("bias")
        return bias if bias is None or self.columns is None else bias[self.columns]

    def host_update(self, weight: Tensor) -> dict[str, Tensor]:
        """Full new tensors of the host, by path, for a new value [d_out, d_in] of this site's weight."""
        host = self._whole_weight().detach().clone()
        host[self.columns if self.columns is not None else slice(None)] = weight.to(host.dtype)
        return {f"{self.path}.weight": host.T if self.transposed else host}

    def bias_update(self, bias: Tensor) -> dict[str, Tensor]:
        """The full new bias of the host, by path, for a new value [d_out] of this site's bias."""
        host: Tensor = self.leave.get_parameter("bias").detach().clone()
        host[self.columns if self.columns is not None else slice(None)] = bias.to(host.dtype)
        return {f"{self.path}.bias": host}


def bare(role: str) -> str:
    """`attn.q` for `enc.attn.q` and `dec.attn.q`; cross attention keeps its name."""
    return role.removeprefix("enc.").removeprefix("dec.")


def matches(pattern: str, site: Site) -> bool:
    """Whether a pattern is a site's role, its name, or the path of its module (or the end of it)."""
    if pattern in (site.role, site.name) or bare(site.role) == pattern:
        return True
    return site.whole and (site.path == pattern or site.path.endswith(f".{pattern}"))


def find_sites(model: PreTrainedModel, family: Family) -> Iterator[Site]:
    """Every site of a model, from the input to the output."""
    body = model.get_submodule(family.body)
    hidden = int(model.config.hidden_size)
    prefix = f"{family.body}." if family.body else ""
    yield _site("embed", "embed", None, model, f"{prefix}{family.embed}", hidden=hidden)
    for stack in family.stacks:
        for index in range(layer_count(body, stack.layers)):
            layer = f"{prefix}{stack.layers}.{index}"
            for role, spot in stack.spots.items():
                if not _exists(model, f"{layer}.{spot.out}"):
                    continue
                site = _site(
                    f"{stack.prefix}layers.{index}.{role}",
                    f"{stack.prefix}{role}",
                    index,
                    model,
                    f"{layer}.{spot.out}",
                    enter=f"{layer}.{spot.enter}",
                    hidden=hidden,
                    share=(spot.part, spot.parts),
                )
                yield site
    for role, path in family.singles.items():
        if _exists(model, f"{prefix}{path}"):
            yield _site(role, role, None, model, f"{prefix}{path}", hidden=hidden)
    if family.lm_head:
        yield _site("head", "head", None, model, family.lm_head, hidden=hidden)


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of one of `LINEAR`."""
    if isinstance(linear, Packed):
        return linear.shape
    first, second = linear.get_parameter("weight").shape
    return (second, first) if isinstance(linear, Conv1D) else (first, second)


def layer_count(body: nn.Module, path: str) -> int:
    """The number of layers in a stack."""
    return sum(1 for _ in body.get_submodule(path).children())


def _exists(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _site(
    name: str,
    role: str,
    layer: int | None,
    model: PreTrainedModel,
    path: str,
    *,
    hidden: int,
    enter: str | None = None,
    share: tuple[int, int] = (0, 1),
) -> Site:
    leave = model.get_submodule(path)
    sizes: dict[str, int] = {"d_in": hidden, "d_out": hidden}
    columns = None
    if isinstance(leave, LINEAR):
        d_out, d_in = shape_of(leave)
        part, parts = share
        width = d_out // parts
        columns = slice(part * width, (part + 1) * width) if parts > 1 else None
        sizes = {"d_in": d_in, "d_out": width}
    elif isinstance(leave, nn.Embedding):
        sizes = {"d_in": leave.num_embeddings, "d_out": leave.embedding_dim}
    elif "norm." in role:
        width = int(leave.get_parameter("weight").shape[0])
        sizes = {"d_in": width, "d_out": width}
    elif role.endswith("attention"):
        config = model.config
        heads = int(config.num_attention_heads)
        sizes |= {
            "heads": heads,
            "kv_heads": int(getattr(config, "num_key_value_heads", None) or heads),
            "head_dim": int(getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or hidden // heads),
        }
    return Site(name, role, layer, path, model.get_submodule(enter or path), leave, columns=columns, **sizes)
