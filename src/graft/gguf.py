"""GGUF files as bases: one file of llama.cpp becomes a folder that transformers reads, once.

Weights are stored dense: transformers reads the file's architecture, the `gguf` package its numbers. What transformers
leaves behind is put right here: how digits are split, where an answer ends, rounded constants.
"""

import json
import math
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from graft.errors import DamagedError, ModelError, UsageError
from graft.fetch import Report

if TYPE_CHECKING:
    import torch

VERSION = 2
"""Counts the changes of what `convert` writes, so that folders of an older Graft are made again."""

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
"""What `convert` writes in any case; `chat_template.jinja` comes with a file that has a template."""

_MAGIC = b"GGUF"
_KEPT = frozenset({"F32", "F16"})
"""Types of matrices that are kept. Every other one becomes bf16: BF16 itself, and quantized ones, whose error is far
above bf16's 2^-9."""
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Values of `tokenizer.ggml.pre` whose vocabularies split off every digit before GPT-2's own splitting."""
_GPT2 = frozenset(
    {"gpt-2", "phi-2", "roberta-bpe", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "mpt", "olmo", "jais"}
)
"""Values whose vocabularies were learned on GPT-2's own splitting."""
_COMPOSED = frozenset({"qwen2", "qwen35", "deepseek-r1-qwen", "megrez"})
"""Values of Qwen's vocabularies: letters with separate accents are joined (NFC) before."""
_LONG = frozenset({"tokens", "token_type", "merges", "scores", "precompiled_charsmap"})
"""Metadata of a tokenizer that is as long as its vocabulary; transformers reads it."""

_SHAPE = (
    ".attention.key_length", ".context_length", ".feed_forward_length",
    ".rope.freq_base", ".rope.scaling.type", ".rope.scaling.factor", ".rope.scaling.original_context_length",
)  # fmt: skip
"""Ends of keys that begin with the architecture and that transformers does not read for every one."""
SPACES = "tokenizer.graft.spaces"
"""The key by which Graft's own files say where pieces get a space before text, if not at the start; others do not."""

_ROPE = "rope_freqs"
"""The tensor of what each rotary frequency is divided by (Llama 3's scaling); transformers leaves it out."""


def convert(path: Path, target: Path, report: Report, known: Container[str] | None = None) -> None:
    """Write the model of the GGUF file `path` into the existing folder `target`, as transformers has it.

    `known` limits the architectures (transformers' `model_type`). Raises `ModelError` for a file of another kind, an
    architecture that cannot be read or a file without a tokenizer, `DamagedError` for one that is cut off,
    `UsageError` without the package `gguf` and `OSError` for a full disk. `target` is then of no use.
    """
    head = path.name
    report(f"reading {head}", 0.0)
    metadata, types = _read(path)
    _check_splitting(path, metadata)
    dtype = stored_dtype(types)
    with TemporaryDirectory(dir=target.parent, prefix=".gguf-") as alone, _quiet():
        link = Path(alone) / "model.gguf"  # alone in its folder: transformers would read files beside it too
        link.symlink_to(path.absolute())
        config = _attempt(path, "configuration", lambda: _config(alone, link.name, metadata))
        if known is not None and config.model_type not in known:
            raise ModelError(f"{path}: architecture {config.model_type!r} is not known", "give another model")
        report(f"converting the tokenizer of {head}", 0.2)
        tokenizer = _attempt(path, "tokenizer", lambda: _tokenizer(alone, link.name, metadata))
        report(f"converting the weights of {head}", 0.4)
        model = _attempt(path, "weights", lambda: _model(alone, link.name, config, dtype))
        _constants(model, tokenizer, metadata)
        report(f"writing the weights of {head}", 0.8)
        _save(model, tokenizer, target)
    report(f"converted {head}", 1.0)


def read_tokenizer(path: Path) -> Any:
    """The tokenizer of a GGUF file, as `convert` writes it; the file may lack weights. Raises what `convert` raises."""
    metadata, _ = _read(path, weights=False)
    _check_splitting(path, metadata)
    with _quiet():
        return _attempt(path, "tokenizer", lambda: _tokenizer(str(path.parent), path.name, metadata))


def check_package(name: str) -> None:
    """Raise `UsageError` when the package that reads `name` is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UsageError(
            f"{name} is stored as a GGUF file, and the package gguf is missing", "pip install 'graft-tuning[gguf]'"
        ) from None


def _read(path: Path, weights: bool = True) -> tuple[dict[str, Any], list[str]]:
    """The metadata that transformers does not carry over, and the types of the matrices."""
    check_package(str(path))
    from gguf import GGUFReader

    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from None
    if magic != _MAGIC:
        raise ModelError(f"{path} is no GGUF file: it does not start with the four letters GGUF")
    try:
        reader = GGUFReader(path)
        wanted = [key for key in reader.fields if key.startswith("tokenizer.") and key.split(".")[-1] not in _LONG]
        metadata = {key: reader.fields[key].contents() for key in wanted}
        for end in _SHAPE:
            key = next((key for key in reader.fields if key.endswith(end)), None)
            metadata[end] = reader.fields[key].contents() if key else None
        divided = next((tensor.data for tensor in reader.tensors if tensor.name.startswith(_ROPE)), None)
        metadata[_ROPE] = None if divided is None else [float(value) for value in divided.reshape(-1)]
        types = [tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1]
        architecture, tokens = reader.get_field("general.architecture"), reader.get_field("tokenizer.ggml.tokens")
        parts = reader.get_field("split.count")
        count = int(parts.contents()) if parts is not None else 1
    except Exception as error:  # whatever numpy makes of bytes that are not what they should be
        raise DamagedError(
            f"{path} is cut off or altered ({_first_line(error)})", "fetch the file again and compare its checksum"
        ) from None
    if count > 1:
        raise ModelError(f"{path} is one of {count} parts of a model", "join them with `llama-gguf-split --merge`")
    if architecture is None or (weights and not types):
        raise ModelError(f"{path} holds no model, only metadata", "give the file with the weights")
    if tokens is None:
        raise ModelError(f"{path} has no tokenizer", "give a GGUF file that has one, or the model's own folder")
    return metadata, types


def _check_splitting(path: Path, metadata: Mapping[str, Any]) -> None:
    """Raise `ModelError` where text would be split in another way than the vocabulary was learned on.

    Any unknown value would get GPT-2's splitting: the model would read other tokens than it was trained on. Files from
    before 2024 state none and get it too.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    known = {*GGUF_PRE_TOKENIZER_SPLITS, *_SINGLE_DIGITS, *_GPT2}
    stated = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") == "gpt2" and stated is not None and stated not in known:
        raise ModelError(
            f"{path} splits text as {stated!r} says (tokenizer.ggml.pre), which is not known; known: "
            f"{', '.join(sorted(known))}",
            "give the model's own folder",
        )


def stored_dtype(types: Collection[str]) -> "torch.dtype":
    """What `convert` stores weights in, from GGUF's types of the matrices."""
    import torch

    if not _KEPT.issuperset(types):
        return torch.bfloat16
    return torch.float32 if "F32" in types else torch.float16


def _config(folder: str, file: str, metadata: Mapping[str, Any]) -> Any:
    """The configuration, with what transformers does not read for every architecture."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
    width = metadata.get(".attention.key_length")
    if width and hasattr(config, "head_dim"):
        config.head_dim = int(width)
    if config.model_type == "gemma3_text":  # all sizes but 27B, whose files state no other
        config.query_pre_attn_scalar = config.head_dim
    if config.model_type == "gpt2":
        config.n_positions = int(metadata.get(".context_length") or config.n_positions)
        config.n_inner = metadata.get(".feed_forward_length")
    _set_positions(config, metadata)
    return config


def _set_positions(config: Any, metadata: Mapping[str, Any]) -> None:
    """How rotary positions are scaled. Raises `ValueError` for a kind that is not known.

    Llama 3's scaling is kept in files as what each frequency is divided by. Divisors of no known setting are what
    transformers has as `longrope`, where short and long rows share them.
    """
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        return
    rope = rope.get("full_attention", rope)
    if metadata.get(".rope.freq_base"):
        rope["rope_theta"] = float(metadata[".rope.freq_base"])
    kind, factor = metadata.get(".rope.scaling.type"), metadata.get(".rope.scaling.factor")
    divisors = metadata.get(_ROPE)
    if divisors and (known := _llama3(divisors, float(rope["rope_theta"]))):
        rope |= known
    elif divisors:
        original = config.max_position_embeddings
        more = {"short_factor": divisors, "long_factor": divisors, "factor": 1.0, "attention_factor": 1.0}
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": original} | more
    elif kind in ("linear", "yarn") and factor:
        rope |= {"rope_type": kind, "factor": float(factor)}
        if kind == "yarn":
            original = metadata.get(".rope.scaling.original_context_length")
            rope["original_max_position_embeddings"] = int(original or config.max_position_embeddings / factor)
    elif kind not in (None, "none", "linear", "yarn"):
        raise ValueError(f"rotary positions scaled as {kind!r} are not known")


def _llama3(divisors: Sequence[float], theta: float) -> dict[str, Any] | None:
    """Llama 3's settings where these are its divisors (Llama 3.1, 3.2 and 3.3 differ in the factor): 1 for wavelengths
    below 8192 / 4, the factor above 8192, and between them a line in the number of turns.
    """
    low, high, original, factor = 1.0, 4.0, 8192, max(divisors)
    for index, divisor in enumerate(divisors):
        turns = original / (2 * math.pi * theta ** (index / len(divisors)))
        share = min(1.0, max(0.0, (turns - low) / (high - low)))
        if not math.isclose(divisor, 1 / ((1 - share) / factor + share), rel_tol=1e-4):
            return None
    more = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
    return {"rope_type": "llama3", "factor": factor} | more


def _tokenizer(folder: str, file: str, metadata: Mapping[str, Any]) -> Any:
    """The tokenizer, splitting digits as the vocabulary wants it."""
    from tokenizers import normalizers, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
    if metadata.get("tokenizer.ggml.pre") in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if metadata.get("tokenizer.ggml.pre") in _COMPOSED:
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    if metadata.get("tokenizer.ggml.model") == "llama":
        never = metadata.get("tokenizer.ggml.add_space_prefix") is False
        _set_spaces(tokenizer.backend_tokenizer, "never" if never else str(metadata.get(SPACES, "first")))
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def _set_spaces(backend: Any, spaces: str) -> None:
    """Where a vocabulary of pieces puts a space before text: transformers gives every one but Gemma's "first", at the
    start. Others are "always", behind special tokens too, "prepend", the same even where text begins with a space, and
    "never".
    """
    from tokenizers import decoders, normalizers, pre_tokenizers

    if spaces == "first" or not isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        return
    if spaces == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
        return
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=spaces, split=False)
    if spaces == "never":
        pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(pieces)


def _model(folder: str, file: str, config: Any, dtype: "torch.dtype") -> Any:
    """The dense model; a tensor that the file lacks is a `ValueError`."""
    import transformers

    more: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # weights stay packed unless told otherwise
        more["quantization_config"] = transformers.GgufConfig(dequantize=True)
    reads_twice = bool(getattr(config, "is_encoder_decoder", False))
    kind: Any = transformers.AutoModelForSeq2SeqLM if reads_twice else transformers.AutoModelForCausalLM
    model, told = kind.from_pretrained(
        folder, config=config, gguf_file=file, dtype=dtype, output_loading_info=True, trust_remote_code=False, **more
    )
    missing = sorted(told["missing_keys"])
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing, first {missing[0]!r}")
    return model


def _constants(model: Any, tokenizer: Any, metadata: Mapping[str, Any]) -> None:
    """Decimal constants as they were before float32, where answers end, and how long a row can be."""
    import numpy

    for key, value in model.config.to_dict().items():
        if isinstance(value, float):
            short = float(f"{value:.7g}")
            if numpy.float32(short) == numpy.float32(value):
                setattr(model.config, key, short)
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    unique = list(dict.fromkeys(int(end) for end in ends if end is not None))
    if unique:
        model.generation_config.eos_token_id = unique[0] if len(unique) == 1 else unique
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest:
        tokenizer.model_max_length = longest


def _save(model: Any, tokenizer: Any, target: Path) -> None:
    from safetensors import SafetensorError

    try:
        model.save_pretrained(target, max_shard_size="1TB")  # one file: its name is in FILES
        tokenizer.save_pretrained(target)
    except SafetensorError as error:  # a full disk, as safetensors tells it
        raise OSError(_first_line(error)) from None  # as writes by others tell it
    (target / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner reads
    for name in ("config.json", "tokenizer_config.json"):  # the folder of the conversion is gone by now
        written = json.loads((target / name).read_text(encoding="utf-8"))
        for key in ("_name_or_path", "_model_name_or_path", "name_or_path"):
            written.pop(key, None)
        (target / name).write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _attempt(path: Path, what: str, call: Callable[[], Any]) -> Any:
    """`call()`, with what transformers raises in the user's words, and without its bars on stderr."""
    try:
        with redirect_stderr(StringIO()):
            return call()
    except OSError as error:
        if error.errno is not None:  # the disk's word; transformers raises OSError without a number too
            raise
        raise ModelError(f"{path}: the {what} cannot be converted ({_first_line(error)})") from None
    except MemoryError:
        raise
    except Exception as error:  # transformers' mapping of files raises whatever it runs into
        raise ModelError(
            f"{path}: the {what} cannot be converted ({_first_line(error)})",
            "give another GGUF file of the model, or its own folder",
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and notes of transformers."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
