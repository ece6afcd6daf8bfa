"""Base models: load one, select among its sites, read its hidden states."""

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import get_session
from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from graft import assets
from graft.errors import DamagedError, ModelError, ResourceError, RouteError, UsageError, nearest
from graft.families import FAMILIES, Family
from graft.routing import Entry, Route, Router
from graft.sites import LINEAR, Packed, Site, bare, find_sites, matches


@dataclass(frozen=True)
class Hidden:
    """What a body gives: `last` [B, S, d], `pooled` [B, d] where the base has a pooler, and the mask [B, S]
    of `last`.
    """

    last: Tensor
    pooled: Tensor | None
    mask: Tensor

    @property
    def rows(self) -> int:
        """B."""
        return self.last.shape[0]


@dataclass(eq=False)
class Base:
    """A pretrained model with named sites. Its modules and tensors are never renamed, wrapped or copied."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None
    name: str = "model"
    fresh: tuple[str, ...] = ()
    """Parameters that the checkpoint does not have, started at random."""
    router: Router = field(default_factory=Router)
    adapters: dict[str, nn.Module] = field(default_factory=dict)
    exclusive: str | None = None
    """The adapter that trains the base in place, if there is one; nothing else can then be routed."""
    quantization: Literal["nf4"] | None = None
    """How the matrices inside the layers are kept, where not as they were loaded."""

    recomputed: bool = False
    """Whether the backward pass computes activations anew."""

    fingerprint: str = ""
    """What tells this base's weights from others; made of them when left out."""

    def __post_init__(self) -> None:
        kind = self.model.config.model_type
        if kind not in FAMILIES:
            raise ModelError(f"{self.name}: architecture {kind!r} is not known", nearest(kind, FAMILIES))
        self.family: Family = FAMILIES[kind]
        self.sites: tuple[Site, ...] = tuple(find_sites(self.model, self.family))
        self.modules_by_path = dict(self.model.named_modules())
        self.model.requires_grad_(False)
        self.fingerprint = self.fingerprint or self._fingerprint()

    @property
    def body(self) -> nn.Module:
        """The model without its output head."""
        return self.model.get_submodule(self.family.body)

    @property
    def config(self) -> Any:
        """The transformers config."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def hidden_size(self) -> int:
        """Width d of the hidden states."""
        return int(self.config.hidden_size)

    @property
    def max_positions(self) -> int | None:
        """The longest row that the position table allows, None when there is no table."""
        if self.family.positions != "absolute":
            return None
        size = int(self.config.max_position_embeddings)
        return size - self.config.pad_token_id - 1 if self.family.starts_after_pad else size

    def state(self) -> dict[str, Tensor]:
        """The base's own tensors by name, without any part that is attached."""
        return {name: tensor for name, tensor in self.model.state_dict().items() if ".graft." not in f".{name}"}

    def parameter_count(self) -> int:
        """Number of the base's own parameters, tied ones once; of a quantized matrix those that it has dense."""
        own = {id(p): p for name, p in self.model.named_parameters() if ".graft." not in f".{name}"}
        packed = (math.prod(module.shape) for module in self.modules_by_path.values() if isinstance(module, Packed))
        return sum(parameter.numel() for parameter in own.values()) + sum(packed)

    @property
    def number_format(self) -> str:
        """What the weights are kept in: `bfloat16`, or `nf4 in bfloat16` where the matrices are quantized."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return dtype if self.quantization is None else f"{self.quantization} in {dtype}"

    def _fingerprint(self) -> str:
        """sha256 over names, shapes and up to 1,024 evenly spaced values of every tensor, as bf16: another base, or a
        changed one, has another fingerprint; one loaded in another precision has the same, and one that is quantized
        later keeps it. Empty on the device "meta", where there are no values."""
        digest = hashlib.sha256()
        if self.device.type == "meta":
            return ""
        for name, tensor in sorted(self.state().items()):
            flat = tensor.detach().reshape(-1)
            step = max(1, flat.numel() // 1024)
            values = flat[::step][:1024].to("cpu", torch.bfloat16).to(torch.float32)
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + values.numpy().tobytes())
        return digest.hexdigest()

    @contextmanager
    def route(self, entry: Entry | Route) -> Iterator[None]:
        """Send the rows of every call inside through `entry`, or as a `Route` says."""
        route = entry if isinstance(entry, Route) else Route.all(entry)
        if self.exclusive is not None and route.stacks != ((self.exclusive,),):
            raise RouteError(
                f"{self.exclusive!r} trains the base in place, so nothing else can be routed",
                "reload the base, or give the method `exclusive: false`",
            )
        with self.router.use(route):
            yield

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass: non-reentrant, and under the route of the forward pass."""
        # transformers renames this in v6, and warns of the old name from 5.20 on.
        enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
        enable({"use_reentrant": False, "context_fn": self.router.checkpoint_contexts})
        # It also makes embeddings ask for a gradient, which only reentrant recomputation needs: layers below all that
        # trains would run again for nothing.
        self.model.disable_input_require_grads()
        self.recomputed = True

    def hidden(self, batch: Mapping[str, Tensor], causal_parts: bool = False) -> Hidden:
        """Hidden states of the current route for `input_ids` [B, S] and `attention_mask` [B, S].

        Packed rows bring `position_ids` [B, S] and a mask [B, 1, S, S] of what each token may see. An encoder-decoder
        reads the row on both sides (the decoder shifted right, as transformers' sequence classifiers do) and gives the
        decoder's states.

        `causal_parts` promises that no attached part lets a token see later ones. A decoder is then called without a
        mask for rows that are padded on the right: no token sees what is behind it.
        """
        mask = batch["attention_mask"]
        inputs = {
            key: value
            for key, value in batch.items()
            if key in ("input_ids", "attention_mask", "token_type_ids", "position_ids")
        }
        if self.family.kind == "encoder-decoder":
            return self._decoder_hidden(inputs, mask)
        if "position_ids" not in inputs and bool((mask[:, 0] == 0).any()):
            # Left padding: transformers counts positions from the pad, so a row's result would depend on its batch.
            inputs["position_ids"] = self.position_ids(mask)
        elif causal_parts and self.family.kind == "decoder" and mask.dim() == 2 and not _has_holes(mask):
            del inputs["attention_mask"]
        if self.family.kind == "decoder":
            inputs["use_cache"] = False  # type: ignore[assignment]
            inputs.pop("token_type_ids", None)  # GPT-2 would add word embeddings for them
        output = self.body(**inputs)
        return Hidden(output.last_hidden_state, output.get("pooler_output"), mask)

    def logits(self, states: Tensor) -> Tensor:
        """Scores of the vocabulary [B, …, V] of hidden states [B, …, d], in fp32, under the current route.

        The head module is called rather than its weight: a part that sits there would be left out without an error
        (off by 0.97 in a trial). Gemma's scores are capped, softly, where its configuration says so.
        """
        scores: Tensor = self.select("head")[0].leave(states).float()
        cap = getattr(self.config, "final_logit_softcapping", None)
        return scores if cap is None else torch.tanh(scores / cap) * cap

    def _decoder_hidden(self, inputs: dict[str, Tensor], mask: Tensor) -> Hidden:
        if bool((mask[:, 0] == 0).any()):
            raise RouteError(
                "an encoder-decoder reads the row on both sides, so its start must come first", "pad on the right"
            )
        ids = inputs["input_ids"]
        start = self.first_decoder_ids(ids)
        encoded = self.model.get_submodule("encoder")(input_ids=ids, attention_mask=mask).last_hidden_state
        decoded = self.model.get_submodule("decoder")(
            input_ids=torch.cat([start, ids[:, :-1]], dim=1),
            encoder_hidden_states=encoded,
            encoder_attention_mask=mask,
            use_cache=False,
        )
        return Hidden(decoded.last_hidden_state, None, mask)

    def first_decoder_ids(self, like: Tensor) -> Tensor:
        """What a decoder starts with, [B, 1], for B rows of ids."""
        # T5's own configuration class has no decoder_start_token_id; its decoder starts with the pad token.
        first = getattr(self.config, "decoder_start_token_id", None)
        return torch.full_like(like[:, :1], first if first is not None else self.config.pad_token_id)

    def position_ids(self, mask: Tensor) -> Tensor:
        """Positions [B, S] counted over the real tokens of a mask [B, S]; 0 at padding before them."""
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        return positions + self.first_position

    @property
    def first_position(self) -> int:
        """The position id of a row's first token."""
        return int(self.config.pad_token_id) + 1 if self.family.starts_after_pad else 0

    def select(self, patterns: Sequence[str] | str) -> list[Site]:
        """The sites that match: a role (`attn.q`), a site's name (`layers.3.attn.q`), the end of a module path as PEFT
        spells it (`q_proj`, `query`, `c_attn`), or `all-linear` (every matrix inside the layers, fused ones whole).

        Raises `UsageError` for a pattern that matches nothing.
        """
        chosen: dict[str, Site] = {}
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = self._match(pattern)
            if not found:
                raise UsageError(f"{pattern!r} matches no site of {self.name}", nearest(pattern, self.site_names()))
            chosen |= {site.name: site for site in found}
        order = {site.name: position for position, site in enumerate(self.sites)}
        return sorted(chosen.values(), key=lambda site: order.get(site.name, len(order)))

    def site_names(self) -> list[str]:
        """Every name that `select` knows for this base: roles, and last parts of module paths."""
        roles = {site.role for site in self.sites} | {bare(site.role) for site in self.sites}
        modules = {
            path.rsplit(".", 1)[-1] for path, module in self.modules_by_path.items() if isinstance(module, LINEAR)
        }
        return sorted(roles | modules | {"all-linear"})

    def _match(self, pattern: str) -> list[Site]:
        if pattern == "all-linear":
            return [site for site in self.sites if site.linear and site.columns is None and site.layer is not None]
        named = [site for site in self.sites if pattern in (site.role, site.name) or bare(site.role) == pattern]
        return named or [site for site in self.sites if matches(pattern, site)]


def _has_holes(mask: Tensor) -> bool:
    """Whether a token stands behind padding."""
    return bool((mask[:, 1:] > mask[:, :-1]).any())


def load_base(name: str, *, dtype: torch.dtype = torch.float32) -> Base:
    """Load a base model by starter name, local folder or hub id.

    Weights are read from safetensors only and no code of the model's repository is run. Raises `ModelError`
    (missing, incomplete, unknown
    architecture), `DamagedError` (weights cut off) or `ResourceError` (no network for a hub id).
    """
    source = locate(name)
    transformers_logging.disable_progress_bar()
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        return _load(name, source, dtype)
    finally:
        transformers_logging.set_verbosity(before)


def family_of(name: str) -> Family:
    """The architecture of a base, from its configuration alone. Raises what `load_base` raises."""
    return _read_family(name, locate(name))


def config_of(name: str) -> Any:
    """The transformers configuration of a base, without its weights. Raises what `load_base` raises."""
    return _read_config(name, locate(name))


def _read_family(name: str, source: str) -> Family:
    return FAMILIES[_read_config(name, source).model_type]


def _read_config(name: str, source: str) -> Any:
    config = _attempt(name, source, "config", lambda: AutoConfig.from_pretrained(source, trust_remote_code=False))
    if config.model_type not in FAMILIES:
        inner = getattr(getattr(config, "text_config", None), "model_type", None)
        raise ModelError(
            f"{name}: architecture {config.model_type!r} is not known", _instead_of(config.model_type, inner)
        )
    return config


_LOADING = (
    OSError, ValueError, ImportError, KeyError, RuntimeError, TypeError, AttributeError, StrictDataclassError,
)  # fmt: skip
"""What transformers raises; the last one where settings of a configuration contradict each other."""


def _attempt(name: str, source: str, what: str, call: Callable[[], Any]) -> Any:
    """`call()`, with what transformers raises in the user's words."""
    try:
        return call()
    except _LOADING as error:
        raise _load_error(name, source, what, error) from error
    except Exception as error:  # safetensors' own error type is not importable by name in every version
        if "safetensor" not in type(error).__name__.lower():
            raise
        raise DamagedError(
            f"{name}: the weights are damaged ({_first_line(error)})", "fetch the model again"
        ) from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a base, as `load_base` gives it, without the weights. Raises what `load_base` raises."""
    return _tokenizer(name, locate(name))


def _tokenizer(name: str, source: str) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = _attempt(
        name, source, "tokenizer", lambda: AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(name: str, source: str, dtype: torch.dtype) -> Base:
    kind = _read_family(name, source).kind
    factory = {
        "encoder": AutoModel,
        "decoder": AutoModelForCausalLM,
        "encoder-decoder": AutoModelForSeq2SeqLM,
    }[kind]
    tokenizer = _tokenizer(name, source)

    def weights() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # a pooler that the checkpoint does not have starts alike, and so has one fingerprint
            return factory.from_pretrained(
                source, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )

    model, report = _attempt(name, source, "weights", weights)
    missing = tuple(sorted(report["missing_keys"]))
    unusable = [key for key in missing if "pooler" not in key]
    if unusable:
        raise ModelError(
            f"{name}: {len(unusable)} tensors are missing from the weights, first {unusable[0]!r}",
            "fetch the model again",
        )
    vectors = len(model.get_input_embeddings().weight)
    if _has_words_beyond(tokenizer, vectors):
        raise ModelError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model embeddings for {vectors}",
            "take the tokenizer that belongs to the model",
        )
    return Base(model.eval(), tokenizer, name, fresh=missing)


def _has_words_beyond(tokenizer: PreTrainedTokenizerBase, vectors: int) -> bool:
    """Whether tokens have no embedding. Special ones that plain text does not get are let pass: the tokenizers of
    Gemma 3's text models know a token of images, of which these models have no embedding.
    """
    if len(tokenizer) <= vectors:
        return False
    added = {tokenizer.pad_token_id, tokenizer.unk_token_id, *tokenizer("")["input_ids"]}
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} - added
    return any(index >= vectors and index not in special for index in tokenizer.get_vocab().values())


def _instead_of(kind: Any, inner: Any) -> str:
    """What to do about an unknown architecture; `inner` is that of its text model, if it has one inside."""
    if isinstance(inner, str) and inner in FAMILIES:
        return f"it reads more than text, and Graft only texts: give a {inner} model"
    return nearest(str(kind), FAMILIES)


def locate(name: str) -> str:
    """The folder or hub id of a base; a starter model is fetched when it is not there yet, a GGUF file converted.

    Raises `ModelError` when there is no such folder, or files are missing in it, and what `assets.converted` raises.
    """
    if name in assets.ASSETS and assets.ASSETS[name].kind == "model":
        return str(assets.folder(name))
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked_folder(name, path)
    single = path.suffix.lower() == ".gguf"
    if single and path.is_file():
        return _checked_folder(name, assets.converted(path, known=FAMILIES))
    if path.exists():
        raise ModelError(f"{name} is a file, a base model is a folder, a .gguf file, a hub id or a starter name")
    local = single or name.startswith((".", "/", "~")) or name.count("/") != 1
    if local:
        starters = [key for key, asset in assets.ASSETS.items() if asset.kind == "model"]
        what = "file" if single else "folder"
        raise ModelError(f"{name}: no such model {what}", f"starter models: {', '.join(starters)}")
    hooks = get_session().event_hooks
    if _limit not in hooks["request"]:
        get_session().event_hooks = hooks | {"request": [*hooks["request"], _limit]}
    return name


def _limit(request: Any) -> None:
    """Ask a hub that takes requests and says nothing for HF_HUB_ETAG_TIMEOUT seconds, 10 unless set, each time.

    huggingface_hub 2.4 has no limit for what it asks of a model first, and one of 60 s for each of six further tries.
    """
    most = float(HF_HUB_ETAG_TIMEOUT)
    limits = request.extensions.get("timeout", {})
    if request.method == "HEAD":
        limits = {key: min(value or most, most) for key, value in limits.items()}
    request.extensions["timeout"] = {key: most if value is None else value for key, value in limits.items()}


def _checked_folder(name: str, path: Path) -> str:
    if (path / "adapter_config.json").exists():
        raise ModelError(f"{name} is an adapter, not a base model", "give the base that it was trained on")
    config = path / "config.json"
    if not config.is_file():
        raise ModelError(f"{name}: config.json is missing", "a model folder holds config.json, weights and a tokenizer")
    try:
        written = dict(json.loads(config.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise DamagedError(
            f"{name}: config.json cannot be read ({_first_line(error)})", "fetch the model again"
        ) from None
    kind, inner = written.get("model_type"), written.get("text_config")
    if kind not in FAMILIES:
        inner = inner.get("model_type") if isinstance(inner, dict) else None
        raise ModelError(f"{name}: model_type {kind!r} in config.json is not known", _instead_of(kind, inner))
    _check_index(name, path / "model.safetensors.index.json")
    if not any(path.glob("*.safetensors")):
        pickled = any(path.glob("*.bin"))
        remedy = (
            "convert the .bin weights, which can run code when read, to safetensors"
            if pickled
            else "fetch the model again"
        )
        raise ModelError(f"{name}: no .safetensors weights", remedy)
    if not any((path / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        raise ModelError(f"{name}: no tokenizer files", "copy tokenizer.json beside the weights")
    return str(path)


def _check_index(name: str, index: Path) -> None:
    """Raise `DamagedError` for an index of shards that cannot be read, or names a file that is not beside it."""
    if not index.is_file() or (index.parent / "model.safetensors").is_file():  # a whole file goes before shards
        return
    try:
        shards = {str(shard) for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError) as error:
        raise DamagedError(
            f"{name}: {index.name} cannot be read ({_first_line(error)})", "fetch the model again"
        ) from None
    outside = sorted(shard for shard in shards if Path(shard).name != shard)
    missing = sorted(shard for shard in shards if not (index.parent / shard).is_file())
    if outside:
        raise DamagedError(f"{name}: {index.name} names {outside[0]!r}, outside the folder", "fetch the model again")
    if missing:
        raise DamagedError(f"{name}: {missing[0]} is missing, which {index.name} names", "fetch the model again")


def _load_error(name: str, source: str, what: str, error: Exception) -> Exception:
    first = _first_line(error)
    if "ignore_mismatched_sizes" in first:  # as transformers tells it, which points to a table in its log
        first = "their shapes are not those of config.json"
    if Path(source).is_dir():
        damaged = what == "weights"
        kind = DamagedError if damaged else ModelError
        return kind(f"{name}: the {what} cannot be read ({first})", "fetch the model again")
    if any(sign in str(error).lower() for sign in ("connect", "resolve", "offline", "internet", "timed out")):
        return ResourceError(f"{name}: the model hub cannot be reached", "check the network, or give a local folder")
    return ModelError(f"{name}: the {what} cannot be loaded ({first})", "check the hub id")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def signature_of(module: nn.Module) -> inspect.Signature:
    """The call signature of a module's forward."""
    return inspect.signature(module.forward)
