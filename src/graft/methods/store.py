"""Adapter folders: PEFT's layout where peft has the method, the same shape with `GRAFT_…` types elsewhere.

    adapter_config.json        what peft reads; of a GRAFT_… type too where peft would score otherwise
    adapter_model.safetensors  tensors by peft's names
    graft.json                 settings, the base's fingerprint, the head, and a probe: outputs on fixed ids
    README.md                  a card
    tokenizer.json, …          of an adapter trained through a chat template: the tokenizer and that template

A folder without graft.json was written by peft; it is read all the same.
"""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from graft import __version__
from graft.errors import DamagedError, GraftError, RecipeError, UsageError
from graft.files import sha256_of, whole_folder, write_json, write_text
from graft.methods.base import Method, method_of, methods, read_method
from graft.methods.folder import without_base_layers
from graft.model import Base
from graft.parts.attach import attach, detach
from graft.parts.base import Adapter
from graft.parts.head import Pooling, TaskHead, adapter_head, default_pooling, scores
from graft.quantize import packed_layers

TEMPLATE = "chat_template.jinja"
"""The file of the chat template, as transformers names it."""

_TASKS = {"encoder": "FEATURE_EXTRACTION", "decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}
"""peft's task_type of an adapter without a head. Without one peft loads a prefix or virtual tokens and ignores them."""


_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save(adapter: Adapter, base: Base, folder: Path, card: str = "", template: str | None = None) -> str | None:
    """Write an attached adapter to `folder`, whole or not at all, and check what was written.

    `template` is the chat template that it was trained through; it is kept there with the tokenizer.
    Returns why vLLM cannot serve the folder, None when it can.
    """
    method = method_of(adapter)
    kept = method.saved_as(adapter)
    training = adapter.training
    adapter.eval()  # P-tuning's tokens would be a sample of its network's dropout
    config, tensors = method.to_folder(adapter, base)
    adapter.train(training)
    unserved = _not_in_vllm(adapter, kept, base, tensors)
    head = adapter_head(adapter)
    if head is not None:
        tensors |= head_tensors(head, method.head_prefix)
    if head is not None and not transformers_scores_alike(adapter, head, base):
        config["peft_type"] = f"GRAFT_{kept.name.upper()}"  # peft refuses it, rather than giving other scores
    config |= {
        "task_type": "SEQ_CLS" if head is not None else _TASKS[base.family.kind],
        "base_model_name_or_path": _public_name(base.name),
        "inference_mode": True,
        "modules_to_save": sorted({name.split(".")[0] for name in head.names.values()}) if head else None,
        "revision": None,
        "auto_mapping": None,
    }
    about = {
        "graft_version": __version__,
        "method": {"name": kept.name} | kept.settings(),
        "base": {"name": _public_name(base.name), "fingerprint": base.fingerprint} | _how(base),
        "head": head.description() if head is not None else None,
        "probe": _probe(base, adapter),
        "probe_dtype": base.number_format,
    }
    if template is not None:
        about["template"] = {"sha256": sha256(template.encode()).hexdigest()}
    with whole_folder(folder) as work:
        stored = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        save_file(stored, work / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(work / "adapter_config.json", config)
        write_json(work / "graft.json", about | {"sha256": sha256_of(work / "adapter_model.safetensors")})
        read = not str(config["peft_type"]).startswith("GRAFT_")
        write_text(work / "README.md", card or _card(method, base, read, unserved))
        if template is not None:
            _write_tokenizer(base, work, template)
        _check_written(work / "adapter_model.safetensors", stored)
    return unserved


def quantized_from(folder: Path | str) -> torch.dtype | None:
    """The number format that the base of an adapter folder was in before it was quantized; None when it never was.

    Raises `DamagedError` for a quantization that is not known here.
    """
    made_for = about_of(Path(folder)).get("base", {})
    if made_for.get("quantization") is None:
        return None
    dtype = _FORMATS.get(str(made_for.get("quantized_from")))
    if made_for["quantization"] != "nf4" or dtype is None:
        raise DamagedError(
            f"{folder}: its base was quantized to {made_for['quantization']!r} from {made_for.get('quantized_from')!r}",
            "it was written by another version of Graft, or altered",
        )
    return dtype


def template_of(folder: Path) -> str | None:
    """The chat template kept with an adapter; None without one. Raises `DamagedError` when it is not what was saved."""
    path = folder / TEMPLATE
    stated = about_of(folder).get("template", {}).get("sha256")
    if not path.is_file():
        if stated:
            raise DamagedError(f"{path} is missing", "copy the folder again")
        return None
    if stated and sha256_of(path) != stated:
        raise DamagedError(f"{path} is not what was saved", "copy the folder again")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path}: not text ({error})", "copy the folder again") from None


def template_file(folder: Path) -> str | None:
    """The path of `template_of`, as a renderer takes it; None without a template. Raises as that does."""
    return None if template_of(folder) is None else str(folder / TEMPLATE)


def _how(base: Base) -> dict[str, Any]:
    """How the base was quantized, for graft.json."""
    layer = next((layer for _, layer in packed_layers(base)), None)
    if layer is None:
        return {}
    return {"quantization": base.quantization, "quantized_from": str(layer.source).removeprefix("torch.")}


def size(folder: Path) -> int:
    """Bytes of an adapter on disk, without the tokenizer that may lie beside it."""
    names = ("adapter_model.safetensors", "adapter_config.json", "graft.json", "README.md")
    return sum((folder / name).stat().st_size for name in names)


def _write_tokenizer(base: Base, folder: Path, template: str) -> None:
    assert base.tokenizer is not None
    before = base.tokenizer.chat_template
    base.tokenizer.chat_template = template
    try:
        base.tokenizer.save_pretrained(folder)
    finally:
        base.tokenizer.chat_template = before


def load(base: Base, folder: Path | str, name: str | None = None) -> Adapter:
    """Read an adapter folder, attach it under `name` (default: the folder's own), check its probe and return it.

    Raises `DamagedError` when it is cut off, was made for another base, or gives other outputs than when it was saved.
    """
    folder = Path(folder)
    source = str(folder)
    config = _read_json(folder / "adapter_config.json")
    about = about_of(folder)
    quantized_from(folder)  # or a quantization that is not known here would only leave the probe out
    tensors = _read_tensors(folder)
    made_for = about.get("base")
    if made_for is not None and made_for.get("fingerprint") != base.fingerprint:
        raise DamagedError(
            f"{source}: made for {made_for.get('name')}, whose weights differ from those of {base.name}",
            "load the base that it was trained on",
        )
    tensors = without_base_layers(tensors, base, source)
    with torch.random.fork_rng(devices=[]):  # building draws starting values that are overwritten below
        method = _method(config, about, tensors, base, source)
        adapter = _built(method, base, name or _default_name(folder), source)
        adapter.head = _read_head(base, about, tensors, method, source)
    head_keys = set(head_tensors(adapter.head, method.head_prefix)) if isinstance(adapter.head, TaskHead) else set()
    method.load(adapter, base, {key: value for key, value in tensors.items() if key not in head_keys}, source)
    if "sha256" in about and about["sha256"] != sha256_of(folder / "adapter_model.safetensors"):
        raise DamagedError(f"{source}: adapter_model.safetensors is not what was saved", "copy the folder again")
    attach(base, adapter)
    adapter.eval()
    if about.get("probe"):
        _check_probe(base, adapter, about, source)
    return adapter


def method_class(folder: Path | str) -> type[Method]:
    """The method of an adapter folder, without its base. Raises `DamagedError` as `load`."""
    folder = Path(folder)
    config, about = _read_json(folder / "adapter_config.json"), about_of(folder)
    return type(_stated(about, str(folder))) if "method" in about else _reader(config, str(folder))


def _not_in_vllm(adapter: Adapter, method: Method, base: Base, tensors: dict[str, Tensor]) -> str | None:
    """Why vLLM cannot serve a folder; None when it can, as it does for plain LoRA on decoders by default."""
    if base.family.kind != "decoder":
        return "it serves adapters of decoders only"
    if not method.in_vllm or any(site.columns is not None for site, _ in adapter.placed):
        return "it reads plain LoRA adapters of whole matrices only"
    if adapter.head is not None:
        return "the adapter has a task head"
    if any(site.role in ("head", "embed") for site, _ in adapter.placed):
        return "the adapter changes the embeddings or the output layer"
    if method.settings().get("rank_pattern") or method.settings().get("alpha_pattern"):
        return "it reads one rank and one scale for all modules"
    rank = max(tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A.weight"))
    return f"rank {rank} is above 16, unless it is started with --max-lora-rank {rank}" if rank > 16 else None


def transformers_scores_alike(adapter: Adapter, head: TaskHead, base: Base) -> bool:
    """Whether transformers' sequence classifier, which peft puts below a head, pools as this adapter does.

    It pools in one way for each architecture, T5's has layers that ours has not, and in an encoder it reads the first
    virtual token as if it were the row's first.
    """
    if base.family.kind == "encoder-decoder" or head.pooling != default_pooling(base):
        return False
    tokens = adapter.virtual_parts()
    return base.family.kind != "encoder" or not tokens or (head.pooling == "pooler" and tokens[0].pool_virtual)


def _default_name(folder: Path) -> str:
    name = folder.parent.name if folder.name == "adapter" else folder.name
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)[:64] or "adapter"


def _method(
    config: dict[str, Any], about: dict[str, Any], tensors: dict[str, Tensor], base: Base, source: str
) -> Method:
    if "method" in about:
        return _stated(about, source)
    try:
        return _reader(config, source).from_peft(config, tensors, base, source)
    except RecipeError as error:
        raise DamagedError(error.message, "adapter_config.json was altered: save the adapter again") from None


def _built(method: Method, base: Base, name: str, source: str) -> Adapter:
    Adapter(name, method, [])  # a bad name is the caller's fault, not the folder's
    try:
        return method.build(base, name)
    except UsageError as error:
        raise DamagedError(
            f"{source}: {error.message}", "it was altered, or the adapter was made for another base"
        ) from None


def _stated(about: dict[str, Any], source: str) -> Method:
    try:
        return read_method(about["method"], f"{source}/graft.json")
    except GraftError as error:
        raise DamagedError(error.message, "it was written by another version of Graft") from None


def _reader(config: dict[str, Any], source: str) -> type[Method]:
    reader = next((method for method in methods().values() if method.reads(config)), None)
    if reader is None:
        known = sorted({m.peft_type for m in methods().values() if not m.peft_type.startswith("GRAFT_")})
        raise DamagedError(
            f"{source}: peft_type {config.get('peft_type')!r} cannot be read", f"known: {', '.join(known)}"
        )
    return reader


def head_tensors(head: TaskHead, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a head by the names that they have in transformers' sequence classifier, after `prefix`."""
    return {
        f"{prefix}{head.names[layer]}.{kind}": tensor
        for layer, kind, tensor in ((*name.split("."), tensor) for name, tensor in head.state_dict().items())
    }


def _read_head(
    base: Base, about: dict[str, Any], tensors: dict[str, Tensor], method: Method, source: str
) -> TaskHead | None:
    described = about.get("head")
    out = f"{method.head_prefix}{base.family.task_head['out']}.weight"
    if described is None and out not in tensors:
        return None
    if described is None:
        described = {
            "labels": [str(index) for index in range(tensors[out].shape[0])],
            "pooling": default_pooling(base),
        }
    head = TaskHead.for_base(base, tuple(described["labels"]), described["pooling"], described.get("dropout", 0.1))
    expected = head_tensors(head, method.head_prefix)
    wrong = [key for key, value in expected.items() if key not in tensors or tensors[key].shape != value.shape]
    if wrong:
        raise DamagedError(
            f"{source}: {len(wrong)} tensors of the task head are missing or misshapen, first {wrong[0]}",
            "the adapter was made for another base or settings",
        )
    with torch.no_grad():
        for key, value in expected.items():
            value.copy_(tensors[key])
    return head


@torch.no_grad()
def _probe(base: Base, adapter: Adapter) -> list[list[float]]:
    """Outputs [2, up to 8] on two fixed rows of ids, in evaluation mode and without autocast, which would round."""
    vocabulary = int(base.config.vocab_size)
    taken = adapter.positions + sum(part.positions for part in adapter.virtual_parts())
    length = 8 if base.max_positions is None else max(1, min(8, base.max_positions - taken))
    ids = ((torch.arange(2 * length) * 7919 + 1000) % vocabulary).view(2, length).to(base.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    training = base.model.training, adapter.training
    base.model.eval()
    adapter.eval()
    try:
        with torch.autocast(base.device.type, enabled=False):
            if adapter_head(adapter) is not None:
                output = scores(base, batch, adapter.name)
            else:
                with base.route(adapter.name):
                    output = base.hidden(batch).last[:, -1]
    finally:
        base.model.train(training[0])
        adapter.train(training[1])
    return [[round(value, 6) for value in row] for row in output[:, :8].float().tolist()]


_OTHER_DTYPE = 8
"""How much farther outputs may differ when the base is in another number format than when the adapter was saved: those
of an adapter on SmolLM2-135M (30 layers) are 0.06 apart in bf16 and fp32."""


def _check_probe(base: Base, adapter: Adapter, about: dict[str, Any], source: str) -> None:
    # An adapter trained on a quantized base is used on the dense one, and the other way round. On the probe's made-up
    # text adapters of SmolLM2-135M then differ by 0.4 to 0.8 of the largest output, so there it tells nothing; the
    # file's sha256 and the base's fingerprint still do.
    if about["base"].get("quantization") != base.quantization:
        return
    now = torch.tensor(_probe(base, adapter))
    then = torch.tensor(about["probe"])
    allowed = method_of(adapter).probe_tolerance * max(1.0, float(then.abs().max()))
    if about.get("probe_dtype", "unknown") != base.number_format:
        allowed *= _OTHER_DTYPE
    largest = float((now - then).abs().max()) if now.shape == then.shape else float("inf")
    if not largest <= allowed:
        detach(base, adapter.name)
        raise DamagedError(
            f"{source}: outputs on fixed ids differ by {largest:.3g} from those when it was saved",
            "its files or the base were changed",
        )


def _check_written(path: Path, stored: dict[str, Tensor]) -> None:
    read = load_file(path)
    if read.keys() != stored.keys() or any(not torch.equal(read[name], stored[name]) for name in stored):
        raise DamagedError(f"{path}: what was written is not what was to be saved", "check the disk")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedError(f"{path.parent}: {path.name} is missing", "give the folder of an adapter") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: not JSON ({error})", "copy the folder again") from None
    if not isinstance(value, dict):
        raise DamagedError(f"{path}: expected an object, got {type(value).__name__}", "copy the folder again")
    return value


def about_of(folder: Path) -> dict[str, Any]:
    """graft.json of an adapter folder, its entries of the right kinds; empty in a folder that peft wrote.

    Raises `DamagedError`.
    """
    path = folder / "graft.json"
    if not path.exists():
        return {}
    about = _read_json(path)
    kinds = {"method": dict, "base": dict, "probe": list}
    wrong = [key for key, kind in kinds.items() if not isinstance(about.get(key), kind)]
    wrong += ["template"] if not isinstance(about.get("template", {}), dict) else []
    if "probe" not in wrong and not _is_table(about["probe"]):
        wrong.append("probe")
    head = about.get("head")
    if head is not None and not (
        isinstance(head, dict)
        and isinstance(head.get("labels"), list)
        and head.get("pooling") in get_args(Pooling)
        and isinstance(head.get("dropout", 0.1), int | float)
        and 0 <= head.get("dropout", 0.1) < 1
    ):
        wrong.append("head")
    if wrong:
        raise DamagedError(f"{path}: {', '.join(wrong)} is missing or not as written", "the file was altered")
    return about


def _is_table(given: list[Any]) -> bool:
    """Whether these are rows of numbers, all of one length."""
    rows = [row for row in given if isinstance(row, list) and all(isinstance(value, int | float) for value in row)]
    return len(rows) == len(given) and len({len(row) for row in rows}) <= 1


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        pickled = (folder / "adapter_model.bin").exists()
        remedy = "save it again as safetensors: .bin files can run code when read" if pickled else "save it again"
        raise DamagedError(f"{folder}: adapter_model.safetensors is missing", remedy)
    try:
        tensors = dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedError(f"{path}: {error}", "the file is cut off or altered") from None
    # 8-bit formats of floating point have no isfinite of their own.
    unsound = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor.float()).all())]
    if unsound:
        raise DamagedError(
            f"{folder}: {len(unsound)} of {len(tensors)} tensors hold values that are no numbers, first {unsound[0]}",
            "its training failed: take an earlier checkpoint, or train it again",
        )
    return tensors


def _public_name(name: str) -> str:
    """A base's name without the private folders before it."""
    return Path(name).name if Path(name).is_absolute() or name.startswith((".", "~")) else name


def _card(method: Method, base: Base, read_by_peft: bool, unserved: str | None) -> str:
    served = "peft reads this folder. " if read_by_peft else "peft does not read this folder. "
    served += f"vLLM cannot serve it: {unserved}." if unserved else "vLLM can serve it."
    return (
        f"---\nbase_model: {_public_name(base.name)}\nlibrary_name: graft\ntags: [{method.name}]\n---\n\n"
        f"A `{method.name}` adapter for `{_public_name(base.name)}`, trained with Graft.\n\n"
        f"Method: {method.source}.\n\n{served}\n"
    )
