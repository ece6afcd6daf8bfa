"""A bridge to the tuners of the installed peft: each by its own configuration, at Graft's sites.

peft gets a *shell* to work on: a tree of modules with the dotted paths of the chosen sites, whose leaves look like
linear layers and read the base's weights where they are. It puts its layers into the shell, and a part at each site
calls one of them. Nothing of the base is renamed, wrapped, copied or registered anew.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from graft.errors import DamagedError, NotMergeable, UsageError, nearest
from graft.methods.base import Bypass, Method, methods
from graft.methods.folder import adapted_sites, base_path, check_peft_config, check_tensors, peft_targets, task_path
from graft.methods.linears import AtLinears
from graft.model import Base
from graft.parts.base import Adapter, Part, at_dtype_of
from graft.quantize import require_bitsandbytes
from graft.sites import Site

_ADAPTER = "default"
"""peft's name of the one adapter in a shell; its files do not have it."""
_MERGED = 1e-3
"""Largest difference, relative to the outputs' size, between a layer and its merged weight in fp32. An exact merge
stays below 1e-5; a tuner whose merge means another function is far above."""

UNFIT = {
    "ADAPTION_PROMPT": "it adds prompts inside attention; see `prefix`",
    "CARTRIDGE": "it trains keys and values before a row; see `prefix`",
    "CPT": "it trains virtual tokens; see `prompt` and `ptuning`",
    "LILY": "it averages over all tokens of a batch, so a row's result depends on the others",
    "LN_TUNING": "it trains norms; see `frozen` with norms: true",
    "MULTITASK_PROMPT_TUNING": "it trains virtual tokens; see `prompt` and `ptuning`",
    "POLY": "it needs a task for each row",
    "SHADOW": "it runs a second model beside the base",
    "TRAINABLE_TOKENS": "it trains rows of the embedding table; see `frozen` with a pattern",
    "XLORA": "it mixes finished adapters by a first pass of the whole model",
}
"""Types of peft that are no tuners of linear layers, row by row, and no methods of Graft either."""

TRANSPOSED = {
    "DEFT", "FOURIERFT", "FROD", "GRALORA", "HIRA", "PVERA", "RANDLORA", "TINYLORA", "UNILORA", "VBLORA", "WAVEFT",
}  # fmt: skip
"""Types that peft puts at GPT-2's Conv1D too, with the same tensors and fan_in_fan_out."""

_INDEXED = {"SHIRA", "SUPERTUNING"}
"""Types whose files hold indices into a weight; another type's integers must be those that its settings make."""

_PLAIN = {"GLORA"}
"""Types that take nothing but a torch.nn.Linear itself, not a class derived from it."""

_OURS = {
    "target_modules": "give it beside `config`",
    "layers_to_transform": "give it beside `config`",
    "layers_pattern": "give layers_to_transform beside `config`",
    "exclude_modules": "give target_modules beside `config`",
    "modules_to_save": "the task head trains by itself",
    "fan_in_fan_out": "Graft knows how a weight lies",
    "bias": "the base's biases stay",
    "save_only_topk_weights": "what it saves cannot train on",
    "use_asa": "it needs a call at each step",
    "inference_mode": "Graft sets it",
    "task_type": "Graft sets it",
    "base_model_name_or_path": "Graft sets it",
    "revision": "Graft sets it",
    "auto_mapping": "Graft sets it",
    "peft_version": "Graft sets it",
}
"""Settings of peft's configurations that are Graft's to decide, or that do not fit."""


class HostLinear(nn.Linear):
    """What peft takes for a linear layer: a site's weight [d_out, d_in] and bias, read where they are.

    It owns no tensor. With `copies`, while peft builds its layers, what is read may be written to.
    """

    def __init__(self, site: Site, copies: bool = False) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features = site.d_in, site.d_out
        self.site = site
        self.copies = copies
        self.given: tuple[Tensor, Tensor] | None = None

    def _read(self, tensor: Tensor) -> Tensor:
        return tensor.detach().clone() if self.copies else tensor.detach()

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The site's weight."""
        return self._read(self.site.dense_weight())

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The site's bias."""
        return None if self.site.bias is None else self._read(self.site.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The site's output: the one already there for the site's own input, computed for any other x."""
        if self.given is not None and x is self.given[0]:
            return self.given[1]
        weight = self.weight
        return F.linear(at_dtype_of(x, weight), weight, self.bias)


class PeftPart(Part):
    """One layer of peft at a site."""

    reads_weight: ClassVar[bool] = True

    def __init__(self, layer: nn.Module, kind: str) -> None:
        super().__init__()
        self.layer = layer
        self.kind = kind
        self.follows = self._follows()

    @property
    def host(self) -> HostLinear:
        """What the layer takes for its base."""
        host = self.layer.base_layer
        assert isinstance(host, HostLinear)
        return host

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """x [..., d_in], y [..., d_out] -> [..., d_out].

        A layer that computes from the weight alone would undo what other adapters did to y: its change is added.
        """
        result = self._result(x, y)
        return result if self.follows else y + (result - self.host(x))

    def _result(self, x: Tensor, y: Tensor) -> Tensor:
        self.host.given = (x, y)
        try:
            result: Tensor = self.layer(x)
        finally:
            self.host.given = None
        return result

    @torch.no_grad()
    def _follows(self) -> bool:
        """Whether the layer's result depends on the site's output, found by changing that by one."""
        weight = self.host.weight
        x, y = weight.new_ones(1, 1, weight.shape[1]), weight.new_zeros(1, 1, weight.shape[0])
        training = self.training
        self.eval()
        with torch.autocast(weight.device.type, weight.dtype, enabled=weight.dtype in (torch.bfloat16, torch.float16)):
            change = self._result(x, y + 1) - self._result(x, y)
        self.train(training)
        return float(change.abs().max()) > 0.1

    @torch.no_grad()
    def merge(self, site: Site) -> dict[str, Tensor]:
        """What peft's own merge makes of a copy of the weight in fp32; the copy must then compute what the layer does.

        Raises `NotMergeable` with peft's reason.
        """
        host, training = self.host, self.training
        copy = _plain(site, torch.float32)
        x = torch.randn(8, site.d_in, generator=torch.Generator().manual_seed(0)).to(copy.weight.device)
        self.eval()
        try:
            self.layer.base_layer = copy
            attached = self.layer(x)
            self.layer.merge(safe_merge=True)  # type: ignore[operator]
            merged = F.linear(x, copy.weight, copy.bias)
        except (NotImplementedError, ValueError) as error:
            raise NotMergeable(f"{self.kind} at {site.name}: {_first_line(error) or 'peft cannot merge it'}") from None
        finally:
            self.layer.base_layer = host
            self.layer.merged_adapters.clear()  # type: ignore[operator, union-attr]
            self.train(training)
        largest = float((merged - attached).abs().max())
        if not largest <= _MERGED * max(1.0, float(attached.abs().max())):
            raise NotMergeable(f"{self.kind} at {site.name}: merged by peft, its outputs differ by {largest:.3g}")
        update = site.host_update(copy.weight)
        if copy.bias is None or (host.bias is not None and torch.equal(copy.bias, host.bias.float())):
            return update
        if host.bias is None:
            raise NotMergeable(f"{self.kind} at {site.name}: merged, it needs a bias, which {site.path} does not have")
        return update | site.bias_update(copy.bias)


class PeftBridge(AtLinears):
    """A tuner of the installed peft that replaces linear layers, by its own configuration."""

    name: ClassVar[str] = "peft"
    source: ClassVar[str] = "the documentation of peft, https://huggingface.co/docs/peft"
    unified: ClassVar[Bypass] = Bypass("as the tuner says", "site input (parallel)", "chosen linears", "as it says")
    peft_type: ClassVar[str] = "GRAFT_PEFT"
    mergeable: ClassVar[bool] = True  # what cannot be merged says so when it is tried
    small: ClassVar[Mapping[str, Any]] = {"config": {"peft_type": "LOHA", "r": 4, "alpha": 8}}
    rate_small: ClassVar[float] = 2e-2  # of LOHA; other tuners have their own
    rate_large: ClassVar[float] = 2e-4

    aliases: ClassVar[dict[str, str]] = Method.aliases | {"sites": "target_modules", "lora_target": "target_modules"}

    config: dict[str, Any] = Field(default_factory=lambda: {"peft_type": "LOHA", "r": 8, "alpha": 16})
    """The tuner's configuration as peft spells it: `peft_type` and its settings. Where it sits stands beside it."""

    @field_validator("config")
    @classmethod
    def _fits(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Refuse what can be refused without peft, before a model is loaded."""
        kind = config.get("peft_type")
        if not isinstance(kind, str):
            raise ValueError("peft_type is missing: LOHA, LOKR, OFT, … as peft spells it")
        kind = kind.upper()
        own = _own_method(kind)
        if own is not None:
            raise ValueError(f"{kind} is a method of Graft: write `name: {own}`")
        if kind in UNFIT:
            raise ValueError(f"{kind} cannot be bridged: {UNFIT[kind]}")
        for key, reason in _OURS.items():
            if key in config:
                raise ValueError(f"{key} does not belong there: {reason}")
        for key, value in config.items():
            _check_pattern(key, value)
        return config | {"peft_type": kind}

    def build(self, base: Base, name: str) -> Adapter:
        """peft's layers on a shell of the chosen sites; what they share stays in peft's model, `Adapter.shared`."""
        peft = load_peft()
        order = {path: index for index, path in enumerate(base.modules_by_path)}
        # peft goes through modules in the order of the model, and some tuners share by it.
        sites = sorted(self.chosen(base), key=lambda site: order[site.path])
        kind, settings = self.config["peft_type"], {k: v for k, v in self.config.items() if k != "peft_type"}
        config_class = _config_class(kind)
        known = {field.name for field in dataclasses.fields(config_class)} - _OURS.keys() - {"peft_type"}
        for key in settings:
            if key not in known:
                raise UsageError(f"config: {kind} has no setting {key!r}", nearest(key, known))
        shell: Any = _shell(sites, plain=kind in _PLAIN)
        shell.hf_device_map = {"": base.device}  # else peft asks the shell's first parameter, and it has none
        with _refused(kind):
            config = config_class(**settings, target_modules=[_leaf(site) for site in sites])
            model = peft.get_peft_model(shell, config).float()  # in fp32, as every adapter trains
        placed: list[tuple[Site, Part]] = []
        for site in sites:
            layer = shell.get_submodule(_leaf(site))
            if not isinstance(getattr(layer, "base_layer", None), nn.Linear):
                raise UsageError(f"{kind} does not keep the layer at {site.name} as it is, so it cannot be bridged")
            layer.base_layer = HostLinear(site)
            with _refused(kind):
                placed.append((site, PeftPart(layer, kind)))
        return Adapter(name, self, placed, shared=model)

    def to_folder(self, adapter: Adapter, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """peft's own folder of the tuner; of a GRAFT_… type where peft has no such layer."""
        kind = self.config["peft_type"]
        config = dataclasses.asdict(_model(adapter).peft_config[_ADAPTER])
        config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        transposed = {site.transposed for site, _ in adapter.placed}
        readable = all(site.whole for site, _ in adapter.placed) and (
            transposed == {False} or (transposed == {True} and kind in TRANSPOSED)
        )
        config |= {"peft_type": kind if readable else self.peft_type, "target_modules": peft_targets(adapter, base)}
        if "fan_in_fan_out" in config:
            config["fan_in_fan_out"] = transposed == {True}
        prefix = task_path(adapter, base, "")
        return config, {
            f"{prefix}{name.removeprefix(_SITES)}" if name.startswith(_SITES) else name: tensor
            for name, tensor in _state(adapter).items()
        }

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Every type of the installed peft that can be bridged."""
        kind = config.get("peft_type")
        if not isinstance(kind, str) or kind in UNFIT or _own_method(kind) is not None:
            return kind == cls.peft_type
        return kind in load_peft().PEFT_TYPE_TO_CONFIG_MAPPING

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, source: str) -> Method:
        """The method of a folder that peft wrote, at the sites of its tensors; where a tuner has none of its own at a
        site, at those of target_modules, which must then be a list.
        """
        kind = str(config["peft_type"])
        if kind == cls.peft_type:
            return super().from_peft(config, tensors, base, source)
        fields = {field.name for field in dataclasses.fields(_config_class(kind))}
        unread = {"bias", "save_only_topk_weights", "use_asa"}
        check_peft_config(config, fields - unread, source, neutral={"bias": ("none",)})
        settings = {key: value for key, value in config.items() if key in fields - _OURS.keys()}
        for key, value in settings.items():
            if key.endswith("_pattern") and isinstance(value, dict):
                settings[key] = {base_path(base, name.removeprefix("^")): entry for name, entry in value.items()}
        method: dict[str, Any] = {"config": settings}
        marker = _prefix(kind)
        at_sites = {name: tensor for name, tensor in tensors.items() if name.startswith(_SITES)}
        if any(f".{marker}" in name for name in at_sites):
            sites = adapted_sites(config, at_sites, marker, base, source)
            return cls.parse(method | {"target_modules": [site.path for site in sites]}, source)
        targets = config.get("target_modules")
        if not isinstance(targets, list) or config.get("exclude_modules") or config.get("layers_pattern"):
            raise DamagedError(
                f"{source}: target_modules is {targets!r}, and no tensor says where {kind} sits",
                "spell the names of the modules there",
            )
        method["target_modules"] = [base_path(base, str(target)) for target in targets]
        layers = config.get("layers_to_transform")
        return cls.parse(method | {"layers_to_transform": [layers] if isinstance(layers, int) else layers}, source)

    def load(self, adapter: Adapter, base: Base, tensors: Mapping[str, Tensor], source: str) -> None:
        """Read peft's names, checked before peft itself puts them in."""
        own = _state(adapter)
        given = {
            f"{_SITES}{base_path(base, name)}" if name.startswith(_SITES) else name: tensor
            for name, tensor in tensors.items()
        }
        check_tensors(own, given, source)
        _check_integers(self.config["peft_type"], adapter, own, given, source)
        load_peft().set_peft_model_state_dict(_model(adapter), given)


_SITES = "base_model.model."
"""What stands before a site's path in the names of peft's tensors."""


def load_peft() -> Any:
    """The installed peft. Imported late: it takes seconds, and most runs do without. Raises `UsageError` without it."""
    with suppress(UsageError):  # peft loads it too, and it would ask the hub for a kernel
        require_bitsandbytes()
    try:
        import peft
    except ImportError as error:
        raise UsageError(f"the method peft needs the package peft: pip install peft ({error})") from None
    return peft


def _own_method(kind: str) -> str | None:
    """The method of Graft that is this type of peft's; of several, the one of its name."""
    names = [name for name, method in methods().items() if method.peft_type == kind]
    return min(names, key=lambda name: name != kind.lower(), default=None)


def _config_class(kind: str) -> Any:
    known = {str(getattr(name, "value", name)): cls for name, cls in load_peft().PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in known:
        fitting = [name for name in known if name not in UNFIT and _own_method(name) is None]
        raise UsageError(f"config: the installed peft has no peft_type {kind!r}", nearest(kind, fitting))
    return known[kind]


def _prefix(kind: str) -> str:
    """What the names of a tuner's tensors start with, as `hada_`."""
    return str(load_peft().PEFT_TYPE_TO_TUNER_MAPPING[kind].prefix)


def _check_pattern(key: str, value: Any) -> None:
    """Refuse a regular expression, which could run without end, in rank_pattern and its like."""
    if not key.endswith("_pattern") or not isinstance(value, dict):
        return
    for pattern in value:
        if not all(letter.isalnum() or letter in "._-" for letter in str(pattern)):
            raise ValueError(f"{key} has the regular expression {pattern!r}: spell the paths of the modules")


def _leaf(site: Site) -> str:
    """A site's path in the shell; slices of a fused projection are beside each other."""
    return site.path if site.columns is None else f"{site.path}_{site.key}"


def _plain(site: Site, dtype: torch.dtype | None = None) -> nn.Linear:
    """A linear layer with a copy of a site's weight and bias."""
    layer = nn.Linear(site.d_in, site.d_out, bias=site.bias is not None, device="meta")
    with torch.no_grad():
        layer.weight = nn.Parameter(site.dense_weight().to(dtype, copy=True).contiguous(), requires_grad=False)
        if site.bias is not None:
            layer.bias = nn.Parameter(site.bias.to(dtype, copy=True), requires_grad=False)
    return layer


def _shell(sites: list[Site], plain: bool) -> nn.Module:
    """A tree of modules with the sites as leaves, and nothing else of the base; with `plain`, copies of the sites."""
    shell = nn.Module()
    for site in sites:
        *above, last = _leaf(site).split(".")
        parent = shell
        for name in above:
            if name not in parent._modules:
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(last, _plain(site) if plain else HostLinear(site, copies=True))
    return shell


def _model(adapter: Adapter) -> Any:
    """peft's model of a shell."""
    return adapter.shared


def _state(adapter: Adapter) -> dict[str, Tensor]:
    """An adapter's tensors by peft's names, as it saves them."""
    state = load_peft().get_peft_model_state_dict(_model(adapter), save_embedding_layers=False)
    return {name: tensor.detach() for name, tensor in state.items()}


def _check_integers(
    kind: str, adapter: Adapter, own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str
) -> None:
    """Refuse indices out of range: torch would read and write outside of a sparse tensor with them."""
    sites = {f"{_SITES}{_leaf(site)}": site for site, _ in adapter.placed}
    for name, expected in own.items():
        indices = given[name]
        if expected.is_floating_point() or torch.equal(indices.to(expected.device), expected):
            continue
        site = sites.get(name.rpartition(".")[0])
        fits = kind in _INDEXED and site is not None and not indices.is_floating_point()
        if fits and site is not None:
            rows = indices[:1] if indices.dim() == 2 else indices // site.d_in
            columns = indices[1:] if indices.dim() == 2 else indices % site.d_in
            fits = bool(((indices >= 0).all() & (rows < site.d_out).all() & (columns < site.d_in).all()).item())
        if not fits:
            raise DamagedError(f"{source}: {name} holds indices that do not fit", "the file was altered")


@contextmanager
def _refused(kind: str) -> Iterator[None]:
    """peft's errors about a configuration, in one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each tuner has its own
        raise UsageError(f"config: peft refuses it for {kind} ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""
