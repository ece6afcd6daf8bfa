"""Shapes of known models: exact sizes, names, and models without numbers."""

import time

import pytest
import tiny
import torch

from graft import assets
from graft.errors import DamagedError, ModelError, ResourceError
from graft.families import FAMILIES
from graft.model import load_base
from graft.planning import catalogue
from graft.planning.catalogue import config_of, entries, find, skeleton

EXACT = {
    "bert-base": 109_482_240,
    "bert-large": 335_141_888,
    "roberta-base": 124_645_632,
    "roberta-large": 355_359_744,
    "distilbert": 66_362_880,
    "minilm-l6": 22_713_216,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "t5-base": 222_903_552,
    "llama-7b": 6_738_415_616,
    "llama-65b": 65_285_660_672,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-405b": 405_853_388_800,
    "codellama-34b": 33_743_970_304,
    "mistral-7b-v0.1": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "smollm2-135m": 134_515_008,
}
"""Of the models' own pages; the encoders with their pooler and without a language-model head."""


@pytest.fixture
def nothing_here(monkeypatch, tmp_path):
    """A machine without starters, in an empty folder."""
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", list(entries()))
def test_every_model_has_its_size(name, nothing_here):
    entry = entries()[name]
    model = skeleton(config_of(name), torch.bfloat16)
    parameters = list(model.parameters())
    assert sum(parameter.numel() for parameter in parameters) == entry.parameters
    assert all(tensor.is_meta for tensor in [*parameters, *model.buffers()])
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
    assert not model.training
    published = float(entry.published[:-1]) * {"M": 1e6, "B": 1e9}[entry.published[-1]]
    assert entry.parameters == pytest.approx(published, rel=0.08)  # Qwen2-7B is announced as 7.07B
    assert entry.source


def test_the_sizes_are_those_of_the_models():
    assert {name: entries()[name].parameters for name in EXACT} == EXACT
    # Of GPT-3 no weights are public. Its table 2.1: 96 layers, 12,288 wide, 96 heads; 12 d² and 13 d for each layer.
    wide = 12288
    gpt3 = 96 * (12 * wide**2 + 13 * wide) + (50257 + 2048 + 2) * wide
    assert entries()["gpt3-175b"].parameters == gpt3


def test_every_architecture_is_known_and_every_name_is_one_model():
    assert len(entries()) > 60
    assert {entry.model_type for entry in entries().values()} == set(FAMILIES)
    names = [other.lower() for entry in entries().values() for other in (entry.name, *entry.aliases)]
    assert len(names) == len(set(names))
    for name, entry in entries().items():
        assert name == name.lower()
        for other in (name, *entry.aliases, name.upper()):
            assert find(other) is entry
    assert find("llama-9b") is None


@pytest.mark.parametrize("name", ["gpt2", "t5-small", "smollm2-135m", "llama-3.2-1b"])
def test_tied_weights_are_one(name):
    model = skeleton(config_of(name))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_untied_weights_are_two():
    model = skeleton(config_of("llama-7b"))
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


def test_a_large_skeleton_is_quick_and_leaves_the_configuration_alone():
    config = config_of("llama-3-70b")
    before = config.to_dict()
    started = time.perf_counter()
    skeleton(config, torch.bfloat16)
    assert time.perf_counter() - started < 5
    assert config.to_dict() == before
    assert config_of("llama-3-70b").to_dict() == before
    changed = config_of("llama-3.1-8b")
    changed.rope_parameters["factor"] = 1.0
    assert config_of("llama-3.1-8b").rope_parameters["factor"] == 8.0


@pytest.mark.parametrize("own", ["folder", "starter"])
def test_a_skeleton_is_the_model_that_is_loaded(own, tmp_path):
    name = "smollm2-135m" if own == "starter" else str(tiny.write_model(tmp_path / "model"))
    if own == "starter" and not assets.is_pulled(name):
        pytest.skip("the starter is not on this machine")
    loaded = load_base(name, dtype=torch.bfloat16).model
    model = skeleton(config_of(name), torch.bfloat16)
    assert type(model) is type(loaded)
    assert {n: (t.shape, t.dtype) for n, t in model.named_parameters()} == {
        n: (t.shape, t.dtype) for n, t in loaded.named_parameters()
    }
    assert {n: (b.shape, b.dtype) for n, b in model.named_buffers()} == {
        n: (b.shape, b.dtype) for n, b in loaded.named_buffers()
    }
    assert model.config._attn_implementation == loaded.config._attn_implementation
    if own == "starter":
        assert entries()[name].parameters == sum(p.numel() for p in loaded.parameters())


def test_a_starter_on_this_machine_has_its_own_configuration(nothing_here, monkeypatch, tmp_path):
    tiny.write_model(tmp_path / "cache" / "minilm-l6")
    assert config_of("minilm-l6").hidden_size == 384
    monkeypatch.setattr(assets, "is_pulled", lambda name: True)
    monkeypatch.setattr(assets, "folder", lambda name: tmp_path / "cache" / name)
    assert config_of("minilm-l6").hidden_size == tiny.WIDTH


def test_a_folder_goes_before_the_catalogue_and_needs_no_weights(nothing_here, tmp_path):
    folder = tiny.write_model(tmp_path / "bert-base")
    (folder / "model.safetensors").unlink()
    assert config_of("bert-base").hidden_size == tiny.WIDTH
    assert config_of(str(folder)).hidden_size == tiny.WIDTH
    assert config_of("bert-large").hidden_size == 1024
    skeleton(config_of("./bert-base"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llama-65", "did you mean 'llama-65b'?"),
        ("lama-2-7b", "did you mean 'llama-2-7b'?"),
        ("LLAMA-3.1-7B", "did you mean 'llama-3.1-70b'?"),
        ("zzz", "known are names such as llama-2-7b"),
        ("./none", "known are names such as"),
        ("", "known are names such as"),
        ("none.gguf", "known are names such as"),
    ],
)
def test_an_unknown_model(name, said, nothing_here):
    with pytest.raises(ModelError) as caught:
        config_of(name)
    assert repr(name) in caught.value.message
    assert said in caught.value.remedy
    assert "\n" not in str(caught.value)


def test_a_misspelled_hub_id(nothing_here, monkeypatch):
    def unreachable(name):
        raise ResourceError(f"{name}: the model hub cannot be reached", "check the network")

    monkeypatch.setattr(catalogue, "family_of", unreachable)
    with pytest.raises(ResourceError, match=r"cannot be reached; did you mean 'meta-llama/Llama-2-7b-hf'\?"):
        config_of("meta-llama/Llama-2-7b-hff")
    with pytest.raises(ResourceError, match="check the network"):
        config_of("somebody/another-thing")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "config.json is missing"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "cannot be read"),
        ('{"model_type": "nothing"}', "cannot be read"),
        ('{"model_type": "mamba"}', "architecture 'mamba' is not known"),
    ],
)
def test_a_folder_that_is_no_model(text, said, nothing_here, tmp_path):
    (tmp_path / "odd").mkdir()
    if text is not None:
        (tmp_path / "odd" / "config.json").write_text(text)
    with pytest.raises((ModelError, DamagedError), match=said) as caught:
        config_of("./odd")
    assert "\n" not in str(caught.value)


def test_an_adapter_is_no_model(nothing_here, tmp_path):
    folder = tiny.write_model(tmp_path / "odd")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter"):
        config_of("./odd")
