"""GGUF exports: what transformers reads from the file is the model, for every architecture, and nothing else counts."""

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from export_models import CONFIGS, change_config, tokenizer_of, write_adapter, write_model
from test_cli import Command, graft, refused
from transformers import AutoConfig, AutoModelForCausalLM

from graft.errors import DamagedError, NotMergeable, ResourceError, UsageError
from graft.export import gguffile, llamacpp, origin
from graft.export.export import KINDS, export_run, exported_lines
from graft.export.gguffile import QUANTS, kind_of
from graft.export.layouts import LAYOUTS, from_file, layout_of, to_file
from graft.export.probes import compare
from graft.export.vocabulary import Kind, vocabulary_of
from graft.methods import store
from graft.model import Base, load_base

__all__ = ["graft"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def model(place: Path, name: str = "llama") -> Path:
    folder = place / name
    return folder if folder.exists() else write_model(folder, name)


@torch.no_grad()
def logits(base: Base, rows: int = 3, length: int = 24) -> torch.Tensor:
    ids = torch.arange(rows * length).view(rows, length) * 7 % 300
    return base.model(input_ids=ids).logits.float()


def only(folder: Path) -> Path:
    """The file of an export, beside which there is the manifest alone."""
    (file,) = folder.glob("*.gguf")
    assert {path.name for path in folder.iterdir()} == {file.name, "export.json"}
    return file


# Every architecture -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_the_file_is_the_model(place, tmp_path, name):
    source = model(place, name)
    made = export_run(str(source), "gguf", tmp_path / "out", quant="f32")
    file = only(tmp_path / "out")
    base, again = load_base(str(source)), load_base(str(file))
    assert float((logits(base) - logits(again)).abs().max()) < 1e-4
    assert float(logits(base).abs().max()) > 0.5
    state, back = base.state(), again.state()
    assert len(back) >= 10
    for key in back:
        assert torch.allclose(back[key], state[key], atol=1e-6), key
    checks = made["checks"]
    assert checks["tensors"] == sum(made["tensors"].values()) >= len({id(value) for value in state.values()}) - 1
    assert checks["file_and_model"]["top1"] == 1.0
    assert checks["file_and_model"]["positions"] > 100
    assert checks["file_and_rounded"]["largest"] < 1e-4
    for text in ("Hello there, how are you?", "x  12 345\n", "<|im_start|>user"):
        cut = base.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert again.tokenizer(text, add_special_tokens=False)["input_ids"] == cut


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gpt2"])
def test_f16_agrees_within_a_hundredth(place, tmp_path, name):
    made = export_run(str(model(place, name)), "gguf", tmp_path / "out")
    assert made["quant"] == "f16"
    base, again = load_base(str(model(place, name))), load_base(str(only(tmp_path / "out")))
    assert float((logits(base) - logits(again)).abs().max()) < 1e-2
    assert made["checks"]["file_and_model"]["largest"] < 1e-2
    assert "F16" in made["tensors"]


@pytest.mark.parametrize("quant", [quant for quant in QUANTS if quant not in ("f32", "f16")])
def test_other_formats(place, tmp_path, quant):
    made = export_run(str(model(place)), "gguf", tmp_path / "out", quant=quant)
    file = only(tmp_path / "out")
    assert file.name == f"llama-{quant}.gguf"
    reader = gguf.GGUFReader(file)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.1.ffn_up.weight"] == quant.upper()
    assert kinds["token_embd.weight"] == (quant.upper() if quant in ("bf16", "q8_0") else "Q8_0")
    assert made["checks"]["file_and_model"]["kl"] <= made["checks"]["bound"]["kl"]
    assert made["checks"]["file_and_rounded"]["largest"] < 1e-4  # all that differs is the rounding
    assert reader.get_field("general.file_type").contents() == gguffile._FILE_TYPES[quant]


def test_rows_that_no_block_divides_stay_in_f16(tmp_path):
    source = write_model(tmp_path / "m", "llama", intermediate_size=88)
    made = export_run(str(source), "gguf", tmp_path / "out", quant="q8_0")
    assert made["tensors"]["F16"] == 2
    assert "2 matrices stay in f16" in made["notes"][0]
    assert kind_of("blk.0.ffn_down.weight", (64, 88), "q4_0") == "F16"


def test_orders_are_undone(place):
    for name in CONFIGS:
        config = AutoConfig.from_pretrained(model(place, name))
        layout = layout_of(config)
        changed = 0
        for key, value in load_base(str(model(place, name))).state().items():
            there = to_file(key, value, config, layout)
            assert torch.allclose(from_file(key, there, config, layout), value, atol=1e-6)
            changed += there.shape != value.shape or not torch.equal(there, value)
        assert (changed > 0) == (layout.pairs or layout.plus_one or layout.transposed)


# Metadata -----------------------------------------------------------------------------------------


def test_metadata(place, tmp_path):
    export_run(str(model(place)), "gguf", tmp_path / "out")
    reader = gguf.GGUFReader(only(tmp_path / "out"))
    tokenizer = tokenizer_of("llama-bpe")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    wanted = {
        "general.architecture": "llama", "general.name": "llama", "llama.context_length": 128,
        "llama.embedding_length": 64, "llama.block_count": 2, "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 16,
        "llama.vocab_size": len(tokenizer) + 3, "llama.rope.freq_base": 10_000.0,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id, "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eot_token_id": end, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }  # fmt: skip
    found = {key: reader.get_field(key).contents() for key in wanted}
    assert found == wanted
    tokens, kinds = (reader.get_field(f"tokenizer.ggml.{key}").contents() for key in ("tokens", "token_type"))
    assert len(tokens) == len(kinds) == len(tokenizer) + 3
    assert (tokens[end], kinds[end]) == ("<|im_end|>", Kind.CONTROL)
    assert tokens[-1].startswith("[PAD")
    assert kinds[-1] == Kind.UNUSED
    assert kinds[tokens.index("<think>")] == Kind.USER_DEFINED
    again = load_base(str(only(tmp_path / "out")))
    assert set(again.model.generation_config.eos_token_id) == {tokenizer.eos_token_id, end}


def test_a_window_bounds_the_context(tmp_path):
    source = write_model(tmp_path / "m", "mistral", sliding_window=32)
    made = export_run(str(source), "gguf", tmp_path / "out")
    assert any("context_length is 32 of 128" in note for note in made["notes"])
    assert load_base(str(only(tmp_path / "out"))).config.max_position_embeddings == 32


def test_bos_is_counted_once(tmp_path):
    """Pieces get BOS before plain text; ChatML does not write it, Llama 2 does."""
    for template, begins in (("chatml", False), ("llama2", True), (None, True)):
        source = write_model(tmp_path / str(template), "llama pieces", template)
        export_run(str(source), "gguf", tmp_path / f"{template}-out")
        reader = gguf.GGUFReader(only(tmp_path / f"{template}-out"))
        assert reader.get_field("tokenizer.ggml.add_bos_token").contents() is begins
        assert (reader.get_field("tokenizer.chat_template") is None) == (template is None)


def test_vocabularies_of_pieces():
    tokenizer = tokenizer_of("pieces first")
    found = vocabulary_of(tokenizer, len(tokenizer))
    assert found.model == "llama"
    assert found.spaces == "first"
    assert not found.merges
    assert sum(kind == Kind.BYTE for kind in found.kinds) == 256
    assert found.kinds[tokenizer.unk_token_id] == Kind.CONTROL or found.kinds[tokenizer.unk_token_id] == Kind.UNKNOWN
    assert vocabulary_of(tokenizer_of("pieces none"), 1000).spaces == "never"
    assert vocabulary_of(tokenizer_of("pieces prepend"), 1000).spaces == "prepend"


# Adapters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method"), [("llama", "lora"), ("qwen2", "dora"), ("gpt2", "lora"), ("gemma3", "ia3")]
)
def test_an_adapter_is_merged(place, tmp_path, name, method):
    source = model(place, name)
    adapter = write_adapter(source, tmp_path / "a", method, template="smollm")
    made = export_run(str(adapter), "gguf", tmp_path / "out", model=str(source), quant="f32")
    base = load_base(str(source))
    before = logits(base)
    store.load(base, adapter, "x")
    with base.route("x"):
        attached = logits(base)
    again = load_base(str(only(tmp_path / "out")))
    assert float((attached - logits(again)).abs().max()) < 1e-3
    assert float((attached - before).abs().max()) > 1e-2
    agreed = made["checks"]["merged_and_attached"]
    assert agreed["top1"] >= 0.999
    assert agreed["positions"] > 100
    assert made["source"]["method"] == method
    assert made["source"]["adapter_sha256"] == json.loads((adapter / "graft.json").read_text())["sha256"]
    assert made["source"]["base_fingerprint"] == base.fingerprint
    assert "named SmolLM" in again.tokenizer.chat_template  # the adapter's template, not the base's


def test_manifest_and_lines(place, tmp_path):
    made = export_run(str(model(place)), "gguf", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "export.json").read_text())
    assert {key: made[key] for key in written} == written
    ((name, about),) = written["files"].items()
    assert (name, about["bytes"]) == ("llama-f16.gguf", (tmp_path / "out" / name).stat().st_size)
    assert {"torch", "transformers", "gguf"} <= written["versions"].keys()
    assert str(place) not in (tmp_path / "out" / "export.json").read_text()
    lines = exported_lines(made)
    assert "read again and compared" in lines[0]
    assert any("llama-cli -m" in line for line in lines)


# What is refused ----------------------------------------------------------------------------------


CHANGED = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("llama", {"attention_bias": True}, "attention_bias = True"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "of type 'dynamic'"),
    ("qwen2 yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "beta_fast": 16,
      "original_max_position_embeddings": 64}}, "of type 'yarn' with beta_fast"),
    ("gemma3", {"layer_types": ["full_attention"] * 7}, "layer_types"),
    ("gemma3", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar = 64"),
    ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    ("gpt2", {"activation_function": "relu"}, "activation_function = 'relu'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "more", "what"), CHANGED)
def test_settings_that_a_file_cannot_state(place, tmp_path, monkeypatch, name, more, what):
    shutil.copytree(model(place, name), tmp_path / "m")
    change_config(tmp_path / "m", **more)
    monkeypatch.setattr(llamacpp, "load_base", None)  # before weights are read
    with pytest.raises(UsageError, match="cannot state") as caught:
        export_run(str(tmp_path / "m"), "gguf", tmp_path / "out")
    assert what in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_contradictory_configurations(place, tmp_path, graft: Command):
    for number, (more, what) in enumerate(
        [({"num_attention_heads": 3}, "cannot be read"), ({"vocab_size": -5}, "vocab_size is -5")]
    ):
        shutil.copytree(model(place), tmp_path / str(number))
        change_config(tmp_path / str(number), **more)
        result = graft("export", tmp_path / str(number), "--to", "gguf", "-o", tmp_path / "out")
        assert (result.code, what in result.err, "Traceback" in result.err) == (2, True, False)


def test_other_architectures_and_tokenizers(place, tmp_path, monkeypatch):
    import tiny

    monkeypatch.setattr(llamacpp, "load_base", None)
    bert = tiny.write_model(tmp_path / "bert")
    with pytest.raises(UsageError, match=f"bert models are not written as GGUF; known: {', '.join(LAYOUTS)}"):
        export_run(str(bert), "gguf", tmp_path / "out")
    shutil.copytree(model(place), tmp_path / "m")
    path = tmp_path / "m" / "tokenizer.json"
    described = json.loads(path.read_text())
    for change, what in (
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits text in a way without a name"),
        ({"normalizer": {"type": "Lowercase"}}, r"changes text first \(Lowercase\)"),
    ):
        path.write_text(json.dumps(described | change))
        with pytest.raises(UsageError, match=what):
            export_run(str(tmp_path / "m"), "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_does_not_survive(place, tmp_path, monkeypatch):
    monkeypatch.setattr(llamacpp, "load_base", None)
    original = llamacpp.vocabulary_of

    def other(tokenizer: Any, rows: int) -> Any:
        found = original(tokenizer, rows)
        a, e = found.tokens.index("a"), found.tokens.index("e")
        found.tokens[a], found.tokens[e] = "e", "a"
        return found

    monkeypatch.setattr(llamacpp, "vocabulary_of", other)
    with pytest.raises(UsageError, match=r"cuts '.*' into other tokens when it is read from a GGUF file"):
        export_run(str(model(place)), "gguf", tmp_path / "out")


def test_usage(place, tmp_path, graft: Command):
    source = model(place)
    prefix = write_adapter(source, tmp_path / "prefix", "prefix")
    lora = write_adapter(source, tmp_path / "lora")
    out = tmp_path / "out"
    refused(graft("export", source, "--to", "gguff", "-o", out), 2, "'gguff' is not known", "did you mean 'gguf'?")
    refused(graft("export", source, "--to", "gguf", "--quant", "q3_k", "-o", out), 2, "known: f32, f16")
    refused(graft("export", lora, "--to", "hf", "--quant", "q8_0", "--model", source), 2, "is not known for --to hf")
    refused(graft("export", lora, "--to", "peft", "--quant", "f16", "--model", source), 2, "leave --quant out")
    refused(graft("export", source, "--to", "hf", "-o", out), 2, "is a base, without an adapter to export")
    refused(graft("export", source, "--to", "gguf", "--rank", 2, "-o", out), 2, "without an adapter")
    refused(graft("export", lora, "--to", "gguf", "-o", out), 2, "has no base in it; give its base with --model")
    refused(graft("export", tmp_path / "none", "--to", "gguf"), 2, "is neither a run nor an adapter folder")
    result = graft("export", prefix, "--to", "gguf", "--model", source, "-o", out)
    refused(result, 2, "prefix computes what no weight", "--to peft")
    refused(graft("export", lora, "--to", "gguf", "--model", source, "--original", "-o", out), 2, "not trained on a")
    refused(graft("export", source, "--to", "gguf", "-o", source / "x"), 2, "which stays as it is")
    refused(graft("export", lora, "--to", "gguf", "--model", source, "-o", tmp_path), 2, "which stays as it is")
    (tmp_path / "file").write_text("")
    refused(graft("export", source, "--to", "gguf", "-o", tmp_path / "file"), 2, "is a file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "lora", "prefix"]
    assert set(KINDS) == {"hf", "peft", "gguf", "ollama"}
    assert NotMergeable.exit_code == 2


def test_an_earlier_export_is_replaced_with_force_alone(place, tmp_path, graft: Command):
    source, out = model(place), tmp_path / "out"
    done = graft("export", source, "--to", "gguf", "-o", out, "--json")
    assert json.loads(done.out)["quant"] == "f16"
    refused(
        graft("export", source, "--to", "gguf", "-o", out, "--quant", "q8_0"), 2, "holds an export already", "--force"
    )
    assert only(out).name == "llama-f16.gguf"
    graft("export", source, "--to", "gguf", "-o", out, "--quant", "q8_0", "--force")
    assert only(out).name == "llama-q8_0.gguf"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    refused(graft("export", source, "--to", "gguf", "-o", foreign, "--force"), 2, "is not empty")
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]


# Damage and disks ---------------------------------------------------------------------------------


def test_a_wrong_file_is_kept_beside(place, tmp_path, monkeypatch):
    original = gguffile.to_file

    def swapped(name: str, tensor: torch.Tensor, *more: Any) -> torch.Tensor:
        there = original(name, tensor, *more)
        return there.flip(0).contiguous() if "v_proj" in name else there

    monkeypatch.setattr(gguffile, "to_file", swapped)
    with pytest.raises(DamagedError, match=r"the largest difference of a score.*kept in .*out\.rejected") as caught:
        export_run(str(model(place)), "gguf", tmp_path / "out")
    assert caught.value.exit_code == 5
    assert [path.name for path in (tmp_path / "out.rejected").iterdir()] == ["llama-f16.gguf"]
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    monkeypatch.setattr(llamacpp, "DIVERGENCE", dict.fromkeys(llamacpp.DIVERGENCE, 1e-12))
    with pytest.raises(DamagedError, match=r"in q4_0 the mean divergence.*use a finer format, such as --quant f16"):
        export_run(str(model(place)), "gguf", tmp_path / "out", quant="q4_0")
    assert [path.name for path in (tmp_path / "out.rejected").iterdir()] == ["llama-q4_0.gguf"]


def test_a_tensor_that_changes_on_disk(place, tmp_path, monkeypatch):
    original = llamacpp.convert

    def altered(path: Path, *more: Any) -> None:
        content = bytearray(path.read_bytes())
        content[-40] ^= 1
        path.write_bytes(content)
        original(path, *more)

    monkeypatch.setattr(llamacpp, "convert", altered)
    with pytest.raises(DamagedError, match=r"1 of \d+ tensors are not what was to be written, first lm_head"):
        export_run(str(model(place)), "gguf", tmp_path / "out")


def test_no_room_and_a_full_disk(place, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as small:
        small.setattr(origin.shutil, "disk_usage", lambda path: usage(1, 1, 1000))
        with pytest.raises(ResourceError, match=r"has 0\.00 GB free; free space or choose another disk with -o"):
            export_run(str(model(place)), "gguf", tmp_path / "out")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(ResourceError, match="cannot be written"):
        export_run(str(model(place)), "gguf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_f16_cannot_hold(tmp_path):
    source = write_model(tmp_path / "m", "llama")
    huge = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        huge.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    huge.save_pretrained(source)
    with pytest.raises(UsageError, match=r"up_proj\.weight has values that are no numbers in F16; use --quant bf16"):
        export_run(str(source), "gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_comparing():
    one = [torch.tensor([[1.0, 2.0], [3.0, 0.0]])]
    same = compare(one, one)
    assert (same.positions, same.top1, same.largest, same.kl, same.scale) == (2, 1.0, 0.0, 0.0, 3.0)
    other = compare(one, [torch.tensor([[2.0, 1.0], [3.0, 0.0]])])
    assert (other.top1, other.largest) == (0.5, 1.0)
    p = torch.tensor([1.0, 2.0]).softmax(0)
    assert other.kl == pytest.approx(float((p * (p / p.flip(0)).log()).sum()) / 2)
    assert compare(one, [torch.tensor([[1.0, 2.0]])]).largest == float("inf")
    assert compare(one, [one[0] * float("nan")]).kl == float("inf")
