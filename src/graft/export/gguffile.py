"""Writing a GGUF file: metadata, tokenizer, and one tensor after the other in the number format asked for."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graft.errors import UsageError
from graft.export.layouts import (
    ROPE_FREQS,
    Layout,
    Metadata,
    from_file,
    model_metadata,
    rope_divisors,
    tensor_names,
    to_file,
)
from graft.export.vocabulary import Vocabulary
from graft.gguf import SPACES, stored_dtype
from graft.merge import Watch
from graft.model import Base
from graft.train.guards import digest

if TYPE_CHECKING:
    import gguf

QUANTS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""Number formats of matrices that the `gguf` package can write; the q ones keep blocks of 32 numbers."""

_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32}
"""`general.file_type`."""
_BLOCK = 32
_FINE = ("token_embd.weight", "output.weight")
"""In 4 and 5 bits these lose most, and stay in 8."""


@dataclass(frozen=True)
class Speech:
    """Where texts begin and end in a file, and its chat template."""

    bos: int | None
    eos: int | None
    unknown: int | None
    pad: int | None
    more_ends: tuple[int, ...]
    """Further tokens that end an answer; a file has room for two."""
    add_bos: bool
    """Whether a reader puts `bos` before a text."""
    template: str
    """Jinja text, or ""."""


@dataclass(frozen=True)
class Written:
    """What a file holds."""

    bits: dict[str, tuple[int, int]]
    """A digest of each tensor, by its name in the base, as a reader of the file gets it in fp32."""
    kinds: dict[str, int]
    """How many tensors are in each number format."""
    coarse: int
    """Matrices whose rows are no multiple of 32, so that they are kept in f16."""


def kind_of(name: str, shape: tuple[int, ...], quant: str) -> str:
    """GGUF's type of a tensor by its name in the file: vectors and positions in F32, matrices as asked where rows
    divide by the block, embeddings and output no coarser than 8 bits.
    """
    if len(shape) == 1 or name == "position_embd.weight":
        return "F32"
    if not quant.startswith("q"):
        return quant.upper()
    if shape[-1] % _BLOCK:
        return "F16"
    return "Q8_0" if name in _FINE else quant.upper()


def file_bytes(base: Base, layout: Layout, quant: str) -> int:
    """Bytes of the tensors in a file, and of the folder that it is read back into."""
    import gguf

    names, total, back = tensor_names(base, layout), 0, 0
    kinds = {name: kind_of(told, _shape(base.state()[name], name, layout), quant) for name, told in names.items()}
    width = stored_dtype([kind for name, kind in kinds.items() if base.state()[name].dim() > 1]).itemsize
    for name, kind in kinds.items():
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        total += math.ceil(base.state()[name].numel() / block) * size
        back += base.state()[name].numel() * width
    return total + back


def _shape(tensor: Tensor, name: str, layout: Layout) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    turned = layout.transposed and len(shape) == 2 and name.rsplit(".", 2)[-2].startswith("c_")
    return shape[::-1] if turned else shape


def write_vocabulary(path: Path, config: Any, layout: Layout, vocabulary: Vocabulary, speech: Speech) -> None:
    """Write a file without weights, to see whether its tokenizer survives."""
    writer = _writer(path, "vocabulary", config, layout, vocabulary, speech)
    _begin(writer)
    writer.close()


def write_gguf(
    base: Base, path: Path, title: str, quant: str, layout: Layout, vocabulary: Vocabulary, speech: Speech, tell: Watch
) -> Written:
    """Write a base, in fp32 in memory, as a GGUF file; one tensor is converted at a time, and rounded in the base to
    what the file holds of it.

    Raises `UsageError` for numbers that the format cannot hold.
    """
    import gguf

    state, names = base.state(), tensor_names(base, layout)
    kinds = {name: kind_of(told, _shape(state[name], name, layout), quant) for name, told in names.items()}
    dtype = stored_dtype([kind for name, kind in kinds.items() if state[name].dim() > 1])
    writer = _writer(path, title, base.config, layout, vocabulary, speech)
    writer.add_file_type(_FILE_TYPES[quant])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    divisors = rope_divisors(base)
    if divisors is not None:
        writer.add_tensor_info(ROPE_FREQS, divisors.shape, divisors.numpy().dtype, divisors.numpy().nbytes)
    for name, told in names.items():
        _announce(writer, told, _shape(state[name], name, layout), kinds[name])
    try:
        _begin(writer)
        if divisors is not None:
            writer.write_tensor_data(divisors.numpy())
        bits = {}
        for index, name in enumerate(names):
            tell(f"writing {path.name}", index / len(names))
            data, back = _converted(name, state[name], kinds[name], base.config, layout)
            writer.write_tensor_data(data)
            back = back.to(dtype).float()
            bits[name] = digest(back)
            with torch.no_grad():
                state[name].copy_(back)
    finally:
        writer.close()
    rows = Counter(kinds.values())
    coarse = sum(kind == "F16" for kind in kinds.values()) if quant.startswith("q") else 0
    return Written(bits, dict(rows), coarse)


def _converted(name: str, tensor: Tensor, kind: str, config: Any, layout: Layout) -> tuple[Any, Tensor]:
    """A tensor's bytes in the file, and what a reader makes of them in the model's order, in fp32."""
    import gguf
    import numpy

    number = gguf.GGMLQuantizationType[kind]
    array = to_file(name, tensor.detach().float().cpu(), config, layout).contiguous().numpy()
    with numpy.errstate(all="ignore"):  # what is no number any more is found below
        data = gguf.quantize(array, number)
    back = torch.from_numpy(gguf.dequantize(data, number).reshape(array.shape).copy())
    if not bool(torch.isfinite(back).all()):
        remedy = "use --quant bf16 or f32" if kind != "F32" else "train it again"
        raise UsageError(f"{name} has values that are no numbers in {kind}", remedy)
    return data, from_file(name, back, config, layout)


def _announce(writer: "gguf.GGUFWriter", name: str, shape: tuple[int, ...], kind: str) -> None:
    import gguf
    import numpy

    number = gguf.GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        plain = numpy.dtype(numpy.float32 if kind == "F32" else numpy.float16)
        writer.add_tensor_info(name, shape, plain, math.prod(shape) * plain.itemsize)
    else:
        packed = gguf.quant_shape_to_byte_shape(shape, number)
        writer.add_tensor_info(name, packed, numpy.dtype(numpy.uint8), math.prod(packed), raw_dtype=number)


def _begin(writer: "gguf.GGUFWriter") -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _writer(
    path: Path, name: str, config: Any, layout: Layout, vocabulary: Vocabulary, speech: Speech
) -> "gguf.GGUFWriter":
    """A writer with all metadata."""
    import gguf

    writer = gguf.GGUFWriter(path, layout.arch)
    writer.add_type("model")
    writer.add_name(name)
    _add(writer, model_metadata(config, layout))
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([int(kind) for kind in vocabulary.kinds])
    if vocabulary.model == "gpt2":
        writer.add_tokenizer_pre(vocabulary.pre)
        writer.add_add_space_prefix(False)
        writer.add_token_merges(list(vocabulary.merges))
    else:
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_add_space_prefix(vocabulary.spaces != "never")
        if vocabulary.spaces in ("always", "prepend"):
            writer.add_string(SPACES, vocabulary.spaces)
    ids: Mapping[str, int | None] = {
        "bos": speech.bos, "eos": speech.eos, "unknown": speech.unknown, "padding": speech.pad,
        **dict(zip(("eot", "eom"), speech.more_ends, strict=False)),
    }  # fmt: skip
    for key, value in ids.items():
        if value is not None and value < len(vocabulary.tokens):
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", value)
    writer.add_add_bos_token(speech.add_bos)
    if speech.template:
        writer.add_chat_template(speech.template)
    return writer


def _add(writer: "gguf.GGUFWriter", metadata: Metadata) -> None:
    for key, (kind, value) in metadata.items():
        if kind == "uint32":
            writer.add_uint32(key, int(value))
        elif kind == "float32":
            writer.add_float32(key, float(value))
        else:
            writer.add_string(key, str(value))
