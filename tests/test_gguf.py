"""GGUF files as bases: what was written comes out, and what transformers loses is put right."""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from graft import assets, load_base
from graft import gguf as ours
from graft.errors import DamagedError, GraftError, ModelError, ResourceError, UsageError
from graft.model import family_of, locate

WIDTH, INNER, HEADS, GROUPS, LAYERS = 32, 64, 4, 2, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
TEXT = ["the sea is wide and the sky is high", "a  12 345 year", "def f(x):\n    return x", "naïve — 東京"]


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE, learned where each digit stands alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([*TEXT, "a  b  c    d"] * 4, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(pair) for pair in model["merges"]]


TOKENS, MERGES = vocabulary()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head as GGUF keeps them for Llama: the two halves of a rotation next to each other."""
    half = weight.shape[0] // heads // 2
    return weight.view(heads, 2, half, -1).transpose(1, 2).reshape(weight.shape)


def tensors() -> dict[str, torch.Tensor]:
    """Random weights by the names that transformers gives them."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    made = {"model.embed_tokens.weight": random(len(TOKENS), WIDTH), "model.norm.weight": 1 + random(WIDTH)}
    kv = WIDTH * GROUPS // HEADS
    shapes = {"self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (kv, WIDTH), "self_attn.v_proj": (kv, WIDTH)}
    shapes |= {"self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (INNER, WIDTH)}
    shapes |= {"mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER)}
    for layer in range(LAYERS):
        made |= {f"model.layers.{layer}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            made[f"model.layers.{layer}.{name}.weight"] = 1 + random(WIDTH)
    return made


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def stored(name: str, tensor: torch.Tensor) -> tuple[str, numpy.ndarray]:
    """A tensor under GGUF's name, as GGUF keeps it."""
    outside = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in outside:
        return outside[name], tensor.numpy()
    _, _, layer, inner = name.removesuffix(".weight").split(".", 3)
    if inner in ("self_attn.q_proj", "self_attn.k_proj"):
        tensor = interleaved(tensor, HEADS if "q_proj" in inner else GROUPS)
    return f"blk.{layer}.{NAMES[inner]}.weight", tensor.contiguous().numpy()


def write(
    path: Path,
    matrices: str = "F32",
    *,
    arch: str = "llama",
    tokenizer: bool = True,
    pre: str | None = "smollm",
    more: Callable[[gguf.GGUFWriter], None] = lambda _: None,
    without: str = "",
    rope_theta: float = 100_000.0,
    eps: float = 1e-5,
) -> Path:
    """A tiny Llama; `matrices` is the type of its matrices, `without` a tensor to leave out, or "all"."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(eps)
    writer.add_rope_freq_base(rope_theta)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(TOKENS))
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(2)
        writer.add_add_bos_token(False)
        writer.add_chat_template(TEMPLATE)
    more(writer)
    kind = gguf.GGMLQuantizationType[matrices]
    for name, tensor in tensors().items():
        told, array = stored(name, tensor)
        if without in (told, "all"):
            continue
        if array.ndim == 1 or matrices == "F32":
            writer.add_tensor(told, array)
        elif matrices == "F16":
            writer.add_tensor(told, array.astype(numpy.float16))
        else:
            writer.add_tensor(told, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf")


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> Path:
    """The folder of the tiny file."""
    folder = tmp_path_factory.mktemp("made")
    ours.convert(tiny, folder, lambda *_: None)
    return folder


# What comes out ---------------------------------------------------------------------------------


def test_every_tensor_is_the_one_that_was_written(made):
    found, wanted = load_file(made / "model.safetensors"), tensors()
    assert found.keys() == wanted.keys()
    assert len(wanted) == 2 + 9 * LAYERS
    for name, tensor in wanted.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.bfloat16)]
)
def test_stored_precision(kind, dtype, tmp_path):
    path = write(tmp_path / "x.gguf", kind)
    ours.convert(path, tmp_path, lambda *_: None)
    found, wanted = load_file(tmp_path / "model.safetensors"), tensors()
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert found.keys() == wanted.keys()
    largest = max(float((found[name].float() - wanted[name]).abs().max()) for name in wanted)
    assert largest < {"F16": 1e-3, "BF16": 5e-3, "Q8_0": 6e-3}[kind]
    if kind != "Q8_0":
        assert all(torch.equal(found[name], wanted[name].to(dtype)) for name in wanted)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_configuration(made):
    config = json.loads((made / "config.json").read_text())
    wanted = {
        "model_type": "llama",
        "vocab_size": len(TOKENS),
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": WIDTH // HEADS,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in wanted} == wanted
    assert config["rope_parameters"]["rope_theta"] == 100_000
    assert "quantization_config" not in config
    assert str(made.parent) not in "".join(path.read_text() for path in made.glob("*.json"))
    assert json.loads((made / "generation_config.json").read_text())["eos_token_id"] == 2


def test_an_answer_may_end_in_more_than_one_way(tmp_path):
    path = write(tmp_path / "x.gguf", more=lambda writer: writer.add_eot_token_id(0))
    ours.convert(path, tmp_path, lambda *_: None)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_tokenizer(made):
    base = load_base(str(made))
    tokenizer: Any = base.tokenizer
    numbers = {token: number for number, token in enumerate(TOKENS)}
    reference = Tokenizer(models.BPE(numbers, [tuple(pair.split()) for pair in MERGES]))
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in [*TEXT, "1  23   4", "x 1²３"]:
        assert tokenizer(text)["input_ids"] == reference.encode(text).ids
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("a  1") == ["a", "ĠĠ", "1"]
    ids = tokenizer("<|im_start|>the<|im_end|>")["input_ids"]
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (SPECIAL[1], SPECIAL[2], SPECIAL[2])
    assert tokenizer.model_max_length == 512
    said = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert said == "<|im_start|>the<|im_end|>"


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_other_architectures_give_the_same_logits(arch, tmp_path):
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": len(TOKENS)}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "tie_word_embeddings": arch == "qwen3"}
    if arch == "qwen3":
        heads["head_dim"] = 16  # wider than 32 / 4
    config = AutoConfig.for_model(arch, **sizes, **heads)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = AutoModelForCausalLM.from_config(config).eval()
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(number, LAYERS)

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_key_length(16 if arch == "qwen3" else WIDTH // HEADS)
        for name, tensor in model.state_dict().items():
            stem, _, end = name.rpartition(".")
            if name != "lm_head.weight" or arch == "qwen2":
                writer.add_tensor(f"{names.get_name(stem)}.{end}", tensor.contiguous().numpy())

    path = write(tmp_path / "x.gguf", arch=arch, rope_theta=10_000.0, eps=1e-6, more=add, without="all")
    base = load_base(str(path))
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits, model(input_ids=ids).logits)


# The cache --------------------------------------------------------------------------------------


def test_a_file_is_a_base_and_is_converted_once(tiny, cache, tmp_path, monkeypatch):
    seen: list[tuple[str, float]] = []
    folder = assets.converted(tiny, lambda message, fraction: seen.append((message, fraction)))
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1], len(fractions) > 3) == (0, 1, True)
    assert folder.parent == cache / "gguf"
    assert folder.name.endswith("-tiny.F32")
    assert [path.name for path in cache.iterdir()] == ["gguf"]
    monkeypatch.setattr(ours, "convert", lambda *_: pytest.fail("converted again"))
    copy = tmp_path / "tiny.F32.gguf"
    copy.write_bytes(tiny.read_bytes())
    assert assets.converted(copy) == folder
    assert locate(str(tiny)) == str(folder)
    assert family_of(str(tiny)).kind == "decoder"
    assert load_base(str(tiny)).parameter_count() == sum(tensor.numel() for tensor in tensors().values())


@pytest.mark.parametrize("damage", ["cut", "missing", "older"])
def test_a_damaged_folder_is_made_again(tiny, damage, monkeypatch):
    folder = assets.converted(tiny)
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    if damage == "cut":
        os.truncate(weights, 100)
    elif damage == "missing":
        weights.unlink()
    else:
        monkeypatch.setattr(ours, "VERSION", ours.VERSION + 1)
    assert assets.converted(tiny) == folder
    assert weights.stat().st_size == size
    if damage == "older":
        assert json.loads((folder / "manifest.json").read_text())["pins"] == {"conversion": str(ours.VERSION)}


def test_files_beside_it_are_not_read(tiny, tmp_path):
    path = tmp_path / "beside.gguf"
    path.write_bytes(tiny.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "wrong", "auto_map": {"AutoTokenizer": "evil.T"}}')
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n")
    folder = assets.converted(path)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"


def test_nothing_is_printed(tiny, capfd):
    assets.converted(tiny)
    assert capfd.readouterr() == ("", "")


def test_odd_file_names(tiny, tmp_path):
    path = tmp_path / "ü & .. 模型.GGUF"
    path.write_bytes(tiny.read_bytes())
    assert Path(locate(str(path))).name.endswith("-ü-..-模型")


# Bad files --------------------------------------------------------------------------------------


def fails(path: Path, kind: type[GraftError], *phrases: str) -> None:
    with pytest.raises(kind) as caught:
        locate(str(path))
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    for phrase in (str(path), *phrases):
        assert phrase in message
    assert [left for left in assets.cache_dir().rglob("*") if left.name != "gguf"] == []


@pytest.mark.parametrize("content", [b"", b"GGU", b"\x80\x04 a pickle", b"PK\x03\x04"])
def test_other_files(content, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    fails(path, ModelError, "is no GGUF file")


def test_cut_off_anywhere(tiny, tmp_path):
    content = tiny.read_bytes()
    path = tmp_path / "x.gguf"
    end = len(content)
    places = [4, 5, 8, 23, 24, 60, 1000, end // 8, end // 2, end - 40_000, end - 1]
    for place in places:
        path.write_bytes(content[:place])
        fails(path, DamagedError, "is cut off or altered", "fetch the file again")


def test_altered_counts(tiny, tmp_path):
    """Lengths and counts of a damaged file are believed to no end."""
    content = bytearray(tiny.read_bytes())
    path = tmp_path / "x.gguf"
    for start in (8, 16, 24):
        changed = bytes(content[:start]) + b"\xff\xff\xff\xff\xff\xff\xff\x7f" + bytes(content[start + 8 :])
        path.write_bytes(changed)
        fails(path, DamagedError, "is cut off or altered")


def test_unknown_architectures(tmp_path):
    fails(write(tmp_path / "x.gguf", arch="rwkv6"), ModelError, "rwkv6")
    fails(write(tmp_path / "y.gguf", arch="starcoder2"), ModelError, "'starcoder2' is not known")


def test_parts_and_vocabularies_alone(tmp_path):
    fails(write(tmp_path / "a.gguf", more=lambda w: w.add_uint16("split.count", 3)), ModelError, "one of 3 parts")
    path = tmp_path / "b.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fails(path, ModelError, "holds no model")


def test_no_tokenizer(tmp_path):
    fails(write(tmp_path / "x.gguf", tokenizer=False), ModelError, "has no tokenizer")


def test_unknown_splitting(tmp_path):
    fails(
        write(tmp_path / "m.gguf", pre="hunyuan-dense"), ModelError, "splits text as 'hunyuan-dense'", "known: ",
        "llama-bpe", "qwen2", "smollm", "gpt-2", "give the model's own folder",
    )  # fmt: skip
    for pre in ("gpt-2", "llama-bpe", "qwen2", None):
        folder = tmp_path / str(pre)
        folder.mkdir()
        ours.convert(write(tmp_path / f"{pre}.gguf", pre=pre), folder, lambda *_: None)
        split = json.loads((folder / "tokenizer.json").read_text())["pre_tokenizer"]
        assert ("Split" in json.dumps(split)) == (pre in ("llama-bpe", "qwen2"))


def test_a_tensor_is_missing(tmp_path):
    path = write(tmp_path / "x.gguf", without="blk.1.ffn_up.weight")
    fails(path, ModelError, "weights cannot be converted", "1 tensors are missing", "model.layers.1.mlp.up_proj.weight")


def test_no_such_file(tmp_path):
    for name in (str(tmp_path / "none.gguf"), "models/none.gguf"):
        with pytest.raises(ModelError, match=r"none\.gguf: no such model file"):
            locate(name)
    (tmp_path / "x.bin").write_text("")
    with pytest.raises(ModelError, match=r"x\.bin is a file, a base model is a folder, a \.gguf file"):
        locate(str(tmp_path / "x.bin"))


def test_without_the_package(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    fails(tiny, UsageError, "the package gguf is missing", "pip install 'graft-tuning[gguf]'")


def test_full_disk(tiny, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(ours, "_save", full)
    fails(tiny, ResourceError, "No space left on device", "GRAFT_CACHE")


def test_many_processes_at_once(tiny, cache):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=assets.converted, args=(tiny,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [path.name for path in cache.iterdir()] == ["gguf"]
    assert len(list((cache / "gguf").iterdir())) == 1
    load_base(str(tiny))
