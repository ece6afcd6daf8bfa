"""A trained adapter becomes a model of its own: merged into its base, written, read from disk again and compared."""

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from graft.errors import DamagedError, ModelError, NotMergeable, RecipeError, UsageError, nearest
from graft.files import folder_bytes, whole_folder, write_json
from graft.methods import store
from graft.methods.base import Method, method_of, read_method
from graft.model import Base, load_base, locate, signature_of
from graft.objectives.classify import LabelledExample, collate
from graft.parts.attach import attach, detach, merge_into
from graft.parts.base import Adapter
from graft.parts.head import TaskHead, adapter_head, pool
from graft.quantize import quantize
from graft.recipe import Recipe
from graft.rendering.render import Renderer
from graft.runfolder import find_run
from graft.train.guards import digest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Number formats of a written model."""

TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.02}
"""Largest difference allowed between outputs of the written model, computed in fp32, and of the attached adapter,
relative to the largest output (at least 1). In bf16 and fp16 it is the rounding of the weights: 0.005 and 0.0005 on
MiniLM (6 layers), 0.04 and 0.006 on random Llamas and BERTs of 24 layers with weights three times as large as at first.
That every tensor on disk is the merged one is checked apart from this, bit for bit."""

SENTENCES = (
    "The film begins slowly, but its second half is wonderful.",
    "Refund of 1,249.50 EUR was refused on 3 May; please call (555) 010-0199.",
    "Der Vertrag läuft am Ende des Jahres aus.",
    "def add(a, b): return a + b  # 2 + 2 = 4",
    "No.",
    "Why would anyone, after all that has been said and written about it, still buy the first one they see?",
)
"""What the outputs are compared on."""

SHARD_BYTES = 5_000_000_000
"""Weights above this are written in several files, as model hubs want it."""

_TOKENS = 32
NAME = "merged"
"""What the adapter is called while it is attached."""

_HEAD = "head"
_INSTEAD = "use the adapter attached: `graft eval`, or load_adapter in Python"
_AUTO = {"encoder": "AutoModel", "decoder": "AutoModelForCausalLM", "encoder-decoder": "AutoModelForSeq2SeqLM"}
_HEAD_CARD = """---
library_name: graft
---

The task head of the model in the folder above, as an adapter without parts: `load_adapter(base, FOLDER)` with that
model as base.
"""

Watch = Callable[[str, float], None]
"""Called with what is being done and the share of it all that is done, 0 to 1."""


@dataclass(frozen=True)
class Source:
    """An adapter folder, its base by name, and the folder that holds the adapter, where nothing may be added."""

    adapter: Path
    model: str
    holder: Path


@dataclass(frozen=True)
class _Plan:
    """What is written of a merged model: its class, whether that is transformers' sequence classifier, the head, and
    the number format; and whether the scores of words are compared too.
    """

    model_class: str
    classifier: bool
    head: TaskHead | None
    dtype: str
    words: bool


def merge_run(
    run: Path | str,
    output: Path | str,
    *,
    rank: int | None = None,
    dtype: str | None = None,
    model: str | None = None,
    original: bool = False,
    rejected: Path | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Merge an adapter into its base and write that to the folder `output`, whole or not at all, as a model of
    transformers with its tokenizer. The adapter is a finished run's, or an adapter folder's with its base `model`.

    A task head goes to `output`/head as an adapter without parts, and into the model too where transformers' own
    sequence classifier gives the same scores. `rank` is for methods that have ranks; `dtype`, one of `DTYPES`, is by
    default that of the base's weights on disk. An adapter that was trained on a quantized base is merged into what
    that base computes with, the dequantized weights, or into the `original` ones; how far the result is from what was
    trained is measured in both cases. Raises `NotMergeable` for what no weight of the base can hold,
    `UsageError` for an `output` that is not empty, and `DamagedError` when the folder, read again, does not compute
    what the attached adapter does; nothing is left there then, and what was written is moved to `rejected`, if given.
    """
    tell = watch or (lambda phase, share: None)
    source, folder = source_of(Path(run), model), Path(output).resolve()
    check_method(store.method_class(source.adapter), rank)
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known", nearest(dtype, DTYPES))
    quantized = store.quantized_from(source.adapter)
    if original and quantized is None:
        raise UsageError(
            f"{run} was not trained on a quantized base, so there is one base only", "leave `original` out"
        )
    place = locate(source.model)
    check_output(folder, output, source.holder, Path(place))
    base, adapter, rank = attached(source, rank, quantized, tell)
    words = base.family.kind == "decoder" or quantized is not None
    plan = _plan(base, adapter, dtype or checkpoint_dtype(place), words)
    tell("computing with the adapter attached", 0.3)
    trained = expected = _outputs(base, NAME, plan)
    if original:
        del base, adapter
        base, adapter, rank = attached(source, rank, None, tell)
        expected = _outputs(base, NAME, plan)
    method, kind = method_of(adapter).name, base.family.kind
    tell("merging", 0.4)
    _merge(base)
    with whole_folder(folder, rejected) as work:
        tell("writing", 0.5)
        bits = _write(base, plan, work)
        del base, adapter  # reading takes as much memory again
        tell("reading what was written", 0.7)
        difference, found = _check(work, folder.name, plan, expected, bits)
        check_output(folder, output, source.holder, Path(place))  # again: it took a while
    tell("done", 1.0)
    how = _kept(trained, found)
    if quantized is not None:
        how["merged_into"] = "original" if original else "dequantized"
    about = {"folder": str(output), "method": method, "rank": rank, "bytes": folder_bytes(folder)}
    return about | _described(plan, kind, Path(output), difference) | how


def _merge(base: Base) -> None:
    try:
        merge_into(base, NAME)
    except NotMergeable as error:
        raise NotMergeable(error.message, error.remedy or _INSTEAD) from None


def _described(plan: _Plan, kind: str, output: Path, difference: float) -> dict[str, Any]:
    """What was written, how it is loaded, and how far its outputs are from the attached adapter's."""
    return {
        "class": plan.model_class,
        "load_with": "AutoModelForSequenceClassification" if plan.classifier else _AUTO[kind],
        "dtype": plan.dtype,
        "largest_difference": difference,
        "tolerance": TOLERANCE[plan.dtype],
        "head": None if plan.head is None else str(output / _HEAD),
        "pooling": None if plan.head is None else plan.head.pooling,
        "labels": None if plan.head is None else list(plan.head.labels),
    }


def attached(
    source: Source, rank: int | None, quantized: torch.dtype | None, tell: Watch
) -> tuple[Base, Adapter, int | None]:
    """The base in fp32, quantized from a format or not, with the adapter attached, at `rank` or its highest one."""
    tell("loading the base", 0.0)
    base = load_base(source.model)
    if quantized is not None:
        quantize(base, quantized)
    tell("loading the adapter", 0.25)
    adapter = store.load(base, source.adapter, NAME)
    _take_template(base, source.adapter)
    method = method_of(adapter)
    if rank is None and method.ranks():
        rank = method.ranks()[-1]
    if rank is not None:
        method.use_rank(adapter, rank)
    return base, adapter, rank


def _kept(trained: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Any]:
    """How far a merged model is from the adapter on its quantized base: the largest difference of the scores of words
    or labels (of hidden states where there are no scores), and where the best one is the same.
    """
    key = next(key for key in ("logits", "scores", "hidden states") if key in trained)
    then, now = trained[key], found[key]
    same = None if key == "hidden states" else float((then.argmax(dim=-1) == now.argmax(dim=-1)).float().mean())
    return {
        "compared": key,
        "difference_from_trained": float((then - now).abs().max()),
        "same_best": same,
        "positions": len(then),
    }


def merged_lines(result: dict[str, Any]) -> list[str]:
    """What `merge_run` gives, in sentences."""
    folder, head = result["folder"], result["head"]
    lines = [
        f"{result['method']} merged: {folder} is a {result['class']} in {result['dtype']}, "
        f"{result['bytes'] / 1e6:,.1f} MB",
        f"read from disk, its outputs differ from the attached adapter's by {result['largest_difference']:.2g} "
        f"(allowed: {result['tolerance']:g})",
        f"load it with {result['load_with']}.from_pretrained({folder!r})",
    ]
    if "merged_into" in result:
        same = "" if result["same_best"] is None else f", the best one is the same at {result['same_best']:.1%}"
        lines.append(
            f"trained on a quantized base and merged into its {result['merged_into']} weights: beside the adapter on "
            f"the quantized base, {result['compared']} at {result['positions']} positions differ by "
            f"{result['difference_from_trained']:.2g} at most{same}"
        )
    if head is not None and result["load_with"] != "AutoModelForSequenceClassification":
        lines.append(
            f"transformers has no classifier of this architecture that scores like this head, with pooling "
            f"{result['pooling']!r}: {folder} is the model below it"
        )
    if head is not None:
        lines.append(f"its head for Graft: load_adapter(load_base({folder!r}), {head!r})")
    return lines


def source_of(path: Path, model: str | None) -> Source:
    """The adapter that a run folder, or an adapter folder with its base `model`, holds. Raises `RecipeError` and
    `UsageError` where there is none.
    """
    if (path / "adapter_config.json").is_file():
        if model is None:
            raise UsageError(f"{path} is an adapter folder, which has no base in it", "give its base with --model")
        return Source(path, model, path)
    if (path / "trials").is_dir():
        trials = sorted(str(entry) for entry in (path / "trials").iterdir() if entry.is_dir())
        raise RecipeError(f"{path} is a comparison", f"give one of its trials: {', '.join(trials)}")
    found = find_run(path)
    recipe = Recipe.parse(found.recipe(), str(found.path / "recipe.yaml"))
    if recipe.method is None:
        raise RecipeError(f"{path} measured the untouched base, so it has no adapter to merge", "give another run")
    holder = path.parents[1] if path.parent.name == "trials" else path
    return Source(found.path / "adapter", model or recipe.model, holder)


def check_method(method: type[Method], rank: int | None) -> None:
    """Raise `NotMergeable` for a method that never merges, `UsageError` for a rank that it does not have."""
    if not method.mergeable:
        raise NotMergeable(f"{method.name} computes what no weight of the base can hold", _INSTEAD)
    if rank is not None and method.ranks is Method.ranks:
        raise UsageError(f"rank {rank}: {method.name} has no ranks to choose from", "leave the rank out")


def check_output(folder: Path, given: Path | str, *kept: Path) -> None:
    """Raise `UsageError` for an output that is not empty, is a file, or lies inside one of `kept`."""
    for path in kept:
        if path.is_dir() and folder.is_relative_to(path.resolve()):
            raise UsageError(f"{given} is in {path}, which stays as it is", "choose another folder with -o")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{given} is not empty", "choose another folder with -o")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{given} is a file", "choose another folder with -o")


def checkpoint_dtype(place: str) -> str:
    """The format (a key of `DTYPES`) of most numbers in a base's safetensors files; a configuration may not say."""
    folder = Path(place)
    if not folder.is_dir():  # a hub id: its files are in the cache now
        folder = Path(cached_file(place, "config.json", local_files_only=True) or "").parent
    numbers: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                piece = file.get_slice(name)
                numbers[piece.get_dtype()] += math.prod(piece.get_shape())
    known = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
    return known.get(max(numbers, key=lambda name: numbers[name], default="F32"), "fp32")


def _plan(base: Base, adapter: Adapter, dtype: str, words: bool) -> _Plan:
    head = adapter_head(adapter)
    own, words = type(base.model).__name__, words and head is None and bool(base.family.lm_head)
    if head is None or not store.transformers_scores_alike(adapter, head, base):
        return _Plan(own, False, head, dtype, words)
    known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if type(base.config) not in known or (base.family.kind == "decoder" and not _ends_are_seen(base)):
        return _Plan(own, False, head, dtype, words)
    return _Plan(str(known[type(base.config)].__name__), True, head, dtype, words)  # type: ignore[attr-defined]


def _ends_are_seen(base: Base) -> bool:
    """Whether transformers' decoders, which take the last token whose id is not the pad token's, find a row's end."""
    assert base.tokenizer is not None
    pad = base.tokenizer.pad_token_id
    return pad is not None and all(ids[-1] != pad for ids in base.tokenizer(list(SENTENCES))["input_ids"])


def _batch(base: Base) -> dict[str, Tensor]:
    """The sentences, cut to a few tokens: input_ids, attention_mask and token_type_ids [B, S]."""
    assert base.tokenizer is not None
    longest = min(_TOKENS, base.max_positions or _TOKENS)
    encoded = base.tokenizer(list(SENTENCES), truncation=True, max_length=longest, return_attention_mask=False)
    kinds = encoded.get("token_type_ids", [None] * len(SENTENCES))
    pairs = zip(encoded["input_ids"], kinds, strict=True)
    return collate(base, [LabelledExample(ids, kind, 0, "") for ids, kind in pairs])


@torch.no_grad()
def _outputs(base: Base, name: str | None, plan: _Plan) -> dict[str, Tensor]:
    """What the sentences give through an adapter: token ids [T], hidden states of these tokens [T, d] and, with a head,
    scores [B, labels], or scores of words [T, V] where the plan says so.
    """
    batch, head = _batch(base), plan.head
    real = batch["attention_mask"].bool()
    with base.route(name):
        hidden = base.hidden(batch)
        states = hidden.last[real]
        words = {"logits": base.logits(hidden.last)[real]} if plan.words else {}
    found = {"token ids": batch["input_ids"][real], "hidden states": states.float()} | words
    return found if head is None else found | {"scores": head(pool(hidden, head.pooling)).float()}


def _take_template(base: Base, adapter: Path) -> None:
    """Give the base the chat template that the adapter was trained through, and every id that ends a turn in it."""
    template = store.template_of(adapter)
    if template is None or base.tokenizer is None:
        return
    base.tokenizer.chat_template = template
    # A model stops at the ids of its generation configuration; the end of a turn is often another one than eos.
    base.model.generation_config.eos_token_id = sorted(Renderer(base.tokenizer).stop_ids)


def _write(base: Base, plan: _Plan, folder: Path) -> dict[str, tuple[int, int]]:
    """Write a model and its tokenizer; returns a digest of each tensor by its name in `base`.

    A sequence classifier is written with everything that `load_base` reads, so with an output head or a pooler that the
    classifier does not have.
    """
    once = {name for name, _ in base.model.named_parameters()} | {name for name, _ in base.model.named_buffers()}
    dtype = DTYPES[plan.dtype]
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in base.state().items()
        if name in once  # a tied tensor has one name here
    }
    wrong = next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)
    if wrong is not None:
        remedy = "use --dtype bf16" if plan.dtype == "fp16" else "train it again"
        raise UsageError(f"{wrong} has values that are no numbers in {plan.dtype}", remedy)
    bits = {name: digest(tensor) for name, tensor in tensors.items()}
    config = copy.deepcopy(base.config)
    config.architectures, config.dtype = [plan.model_class], dtype
    assert base.tokenizer is not None
    if plan.classifier and plan.head is not None:
        prefix = f"{base.family.task_prefix}." if base.family.task_prefix else ""
        tensors = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
        tensors |= {name: tensor.to(dtype) for name, tensor in store.head_tensors(plan.head).items()}
        config.id2label = dict(enumerate(plan.head.labels))
        config.label2id = {label: index for index, label in config.id2label.items()}
        config.problem_type = "single_label_classification"
        if base.family.kind == "decoder":
            config.pad_token_id = base.tokenizer.pad_token_id
    elif base.model.can_generate():
        base.model.generation_config.to_json_file(folder / "generation_config.json")
    config.to_json_file(folder / "config.json")
    base.tokenizer.save_pretrained(folder)
    _save(tensors, folder)
    return bits


def _save(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write weights, in several files with an index where they are large."""
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES)
    for name, keys in split.filename_to_tensors.items():
        save_file({key: tensors[key] for key in keys}, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _check(
    folder: Path, name: str, plan: _Plan, expected: dict[str, Tensor], bits: dict[str, tuple[int, int]]
) -> tuple[float, dict[str, Tensor]]:
    """Read a written folder, add the head's own, and return the largest difference of any output, and the outputs.

    Raises `DamagedError` when a tensor is not the merged one, or outputs differ by more than is allowed.
    """
    try:
        base = load_base(str(folder))
    except (ModelError, DamagedError) as error:
        raise DamagedError(f"what was written cannot be read: {error.message}", "please report this") from None
    base.name = name
    state = base.state()
    changed = [key for key, bit in bits.items() if key not in state or digest(state[key].to(DTYPES[plan.dtype])) != bit]
    if changed:
        raise DamagedError(
            f"{len(changed)} of {len(bits)} tensors are not what was to be written, first {changed[0]}",
            "check the disk",
        )
    del state
    if plan.head is not None:
        _write_head(base, plan.head, folder / _HEAD)
        loaded = store.load(base, folder / _HEAD, _HEAD)
        found = [_outputs(base, _HEAD, replace(plan, head=adapter_head(loaded)))]
    else:
        found = [_outputs(base, None, plan)]
    if plan.classifier:
        batch, kind = _batch(base), base.family.kind
        del base, loaded
        found.append({"scores": _classifier_scores(folder, batch, kind)})
    difference = max(_difference(expected, outputs) for outputs in found)
    if not difference <= TOLERANCE[plan.dtype]:
        raise DamagedError(
            f"in {plan.dtype} the merged model's outputs differ by {difference:.3g} from the attached adapter's, "
            f"{TOLERANCE[plan.dtype]:g} is allowed",
            "use --dtype fp32" if plan.dtype != "fp32" else "please report this",
        )
    return difference, found[0]


def _write_head(base: Base, head: TaskHead, folder: Path) -> None:
    """A head alone, as the folder of an adapter without parts."""
    nothing = {"name": "frozen", "last_layers": 0, "pooler": False, "exclusive": False}
    adapter = read_method(nothing).build(base, _HEAD)
    adapter.head = head
    attach(base, adapter)
    store.save(adapter, base, folder, _HEAD_CARD)
    detach(base, _HEAD)


@torch.no_grad()
def _classifier_scores(folder: Path, batch: dict[str, Tensor], kind: str) -> Tensor:
    """Scores [B, labels] of transformers' own class."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns of the tensors that only `load_base` reads
    try:
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    finally:
        transformers_logging.set_verbosity(before)
    known = signature_of(model).parameters
    given = {key: value for key, value in batch.items() if key in known}
    if kind == "decoder":
        given.pop("token_type_ids", None)  # as in Base.hidden
    logits: Tensor = model.eval()(**given).logits
    return logits


def _difference(expected: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    """The largest difference of any output, relative to the largest value (at least 1); infinite when token ids differ
    or anything is no number.
    """
    worst = 0.0
    for key, now in found.items():
        then = expected[key]
        if then.shape != now.shape or (key == "token ids" and not torch.equal(then, now)):
            return math.inf
        difference = float((then - now).abs().max()) / max(1.0, float(then.abs().max()))
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return worst
