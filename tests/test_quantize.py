"""NF4: the bits are bitsandbytes' and those of the formulas, and methods see the values that these bits stand for."""

import json
import math
import subprocess
import sys
from pathlib import Path

import bases
import pytest
import tiny_chat
import torch
from scipy.stats import norm
from test_causal import lines
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from graft.compare import trials
from graft.engine.settings import Engine
from graft.errors import DamagedError, ModelError, RecipeError, UsageError
from graft.merge import merge_run, merged_lines
from graft.methods import store
from graft.methods.base import methods, read_method
from graft.model import Base
from graft.objectives.instruct import Instruct
from graft.parts.attach import attach, detach, hidden_states, merge_into
from graft.quantize import (
    BITS,
    NF4Linear,
    dequantize,
    described,
    packed_layers,
    quantize,
    require_bitsandbytes,
)
from graft.recipe import COMPARED, Recipe
from graft.run import evaluate_run, execute
from graft.sites import Packed
from graft.train.loop import Trainer, make_accelerator
from graft.train.optim import check_optimizer, make_optimizer
from graft.train.settings import Training

FAMILIES = ("llama", "gpt2", "bert")
REFUSED = {"full", "frozen"}
"""Methods that train the base's own matrices."""

require_bitsandbytes()


def quantized(name: str, seed: int = 0) -> Base:
    base = bases.make(name, seed)
    quantize(base)
    return base


def stored(base: Base) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in base.state().items()}


def layer_of(weight: torch.Tensor, transposed: bool = False) -> NF4Linear:
    """One quantized matrix [d_out, d_in], as a layer of a base."""
    base = bases.make("gpt2" if transposed else "llama")
    site = base.select("attn.o")[0]
    tensor = weight.T.contiguous() if transposed else weight
    site.leave.weight = nn.Parameter(tensor, requires_grad=False)
    quantize(base)
    assert isinstance(site.leave, NF4Linear)
    return site.leave


# Bits ---------------------------------------------------------------------------------------------

LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def dynamic_code() -> torch.Tensor:
    """8 bits of dynamic tree quantization: a sign, zeros that count powers of ten, then a linear fraction."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values))


def in_blocks(values: torch.Tensor, size: int) -> torch.Tensor:
    return nn.functional.pad(values, (0, -len(values) % size)).view(-1, size)


def reference(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """NF4 with double quantization of a weight [d_out, d_in], by its definition."""
    blocks = in_blocks(weight.float().flatten(), 64)
    scales = blocks.abs().amax(dim=1)
    shares = (blocks * (1 / scales)[:, None]).flatten()
    levels = (shares[:, None] - LEVELS).abs().argmin(dim=1)
    offset = scales.mean()
    groups = in_blocks(scales - offset, 256)
    of_groups = groups.abs().amax(dim=1)
    code = dynamic_code()
    # bitsandbytes looks up, on CPUs, which code is nearest to each of 65,536 shares, so that next to a middle between
    # two codes the farther one can come out.
    shares = (groups * (1 / of_groups)[:, None]).flatten()[: len(scales)]
    looked_up = torch.floor((shares + 1) * 32767.5 + 0.5).double() / 32767.5 - 1
    eight = (looked_up[:, None] - code.double()).abs().argmin(dim=1)
    again = (code[eight] * of_groups.repeat_interleave(256)[: len(scales)]) + offset
    dense = (LEVELS[levels] * again.repeat_interleave(64))[: weight.numel()].view(weight.shape)
    packed = (levels[::2] * 16 + levels[1::2]).to(torch.uint8)
    return {
        "packed": packed, "scales": eight.to(torch.uint8), "scale_scales": of_groups, "offset": offset, "code": code,
        "dense": dense,
    }  # fmt: skip


def test_the_levels_are_quantiles_of_a_normal_distribution():
    """Eight equal steps of probability above zero, seven below; the largest is 1."""
    end = 0.9677083
    above = [norm.ppf(end - (end - 0.5) * step / 8) for step in range(8)]
    below = [-norm.ppf(end - (end - 0.5) * step / 7) for step in range(7)]
    expected = torch.tensor(sorted([*above, *below, 0.0]), dtype=torch.float32) / max(above)
    torch.testing.assert_close(LEVELS, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (300, 128), (7, 9), (33, 48), (1, 1), (130, 257)])
def test_every_bit_is_that_of_the_formulas_and_of_bitsandbytes(shape, dtype, transposed):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(sum(shape))
    weight = (torch.randn(shape) * torch.rand(shape[0], 1)).to(dtype)
    layer = layer_of(weight, transposed)
    assert (layer.shape, layer.transposed, layer.source) == (shape, transposed, dtype)
    expected = reference(weight)
    for name in ("scales", "scale_scales", "offset", "code"):
        assert torch.equal(getattr(layer, name), expected[name]), name
    filled = math.ceil(weight.numel() / 2)
    last = 0xF0 if weight.numel() % 2 else 0xFF  # the half of a byte behind an odd number of values means nothing
    assert torch.equal(layer.packed[: filled - 1], expected["packed"][: filled - 1])
    assert int(layer.packed[filled - 1]) & last == int(expected["packed"][filled - 1]) & last
    torch.testing.assert_close(layer.dense(), expected["dense"].to(dtype), rtol=0, atol=0)

    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
    assert torch.equal(layer.packed[:filled], packed.flatten())
    assert torch.equal(layer.scales, state.absmax)
    assert torch.equal(layer.scale_scales, state.state2.absmax)
    assert torch.equal(layer.offset, state.offset)
    assert torch.equal(layer.code, state.state2.code)
    if shape[1] % 64 == 0:  # for other widths its kernel for CPUs takes wrong scales, or compiles something
        assert torch.equal(layer.dense(), dequantize_4bit(packed, state))


def test_a_block_of_zeros_stays_zero():
    weight = torch.randn(4, 64)
    weight[1] = 0.0
    assert not layer_of(weight).dense()[1].any()


def test_bits_of_a_weight():
    layer = layer_of(torch.randn(512, 1024))
    taken = sum(tensor.nbytes for name, tensor in layer.named_buffers() if name not in ("offset", "code"))
    assert 8 * taken / (512 * 1024) == BITS == pytest.approx(4.127, abs=5e-4)
    assert list(dict(layer.named_parameters())) == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_without_weights_the_buffers_have_the_same_shapes(family, kind):
    real = quantized(family)
    if kind == "meta":
        with torch.device("meta"):
            base = Base(bases.FACTORIES[family]())
        assert base.fingerprint == ""
        quantize(base)
    else:
        base = Base(bases.FACTORIES[family]())
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = {
                tensor: nn.Parameter(mode.from_tensor(tensor.detach()), False) for tensor in base.model.parameters()
            }
            for module in base.model.modules():
                module._parameters.update({name: fakes[t] for name, t in module._parameters.items() if t is not None})
            quantize(base)
            layer = base.select("mlp.down")[0].leave
            x = torch.empty(2, layer.shape[1], requires_grad=True)
            y = layer(x)
            y.backward(torch.empty_like(y))
            assert (y.shape, x.grad.shape) == ((2, 32), x.shape)

    def of(given: Base) -> dict:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in given.model.named_buffers()}

    assert of(base) == of(real)
    assert base.parameter_count() == real.parameter_count() == bases.make(family).parameter_count()


# The layer ----------------------------------------------------------------------------------------


def dense_twin(layer: NF4Linear) -> nn.Linear:
    twin = nn.Linear(layer.shape[1], layer.shape[0], bias=layer.bias is not None, dtype=layer.dtype)
    twin.weight.data = layer.dense()
    if layer.bias is not None:
        twin.bias.data = layer.bias.data.clone()
    return twin


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (7, 9), (33, 48)])
def test_outputs_and_gradients_are_those_of_a_dense_layer(shape, transposed):
    torch.manual_seed(1)
    layer = layer_of(torch.randn(shape), transposed)
    layer.bias = nn.Parameter(torch.randn(shape[0]))
    twin = dense_twin(layer)
    given = torch.randn(2, 3, shape[1])
    found = []
    for linear in (layer, twin):
        x = given.clone().requires_grad_()
        y = linear(x)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        found.append((y.detach(), x.grad, linear.bias.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    assert layer.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_it_computes_in_its_format(dtype):
    layer = layer_of(torch.randn(64, 64).to(dtype))
    twin, x = dense_twin(layer), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, twin(x))
    assert layer(x).dtype == torch.float32
    assert layer(x.double()).dtype == torch.float64


def test_no_dense_weight_is_kept_for_the_backward_pass():
    layer = layer_of(torch.randn(128, 256))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(2, 256, requires_grad=True))
    assert {id(tensor) for tensor in kept} == {id(tensor) for tensor in layer.buffers()}


def test_a_change_of_format_does_not_touch_the_scales():
    layer = layer_of(torch.randn(64, 64))
    before, dense = {name: tensor.clone() for name, tensor in layer.named_buffers()}, layer.dense()
    layer.bias = nn.Parameter(torch.randn(64))
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert len(before) == 5
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.named_buffers())
    assert torch.equal(layer.dense(), dense)


def test_the_weight_has_a_shape_and_no_values():
    assert layer_of(torch.randn(8, 64)).weight.shape == (8, 64)
    weight = layer_of(torch.randn(8, 64).bfloat16(), transposed=True).weight
    assert (weight.shape, weight.dtype, weight.is_meta) == ((64, 8), torch.bfloat16, True)
    assert repr(layer_of(torch.randn(8, 64))) == "NF4Linear(in_features=64, out_features=8, bias=False)"


# Bases --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", bases.FACTORIES)
def test_a_quantized_base_is_its_dequantized_self(family):
    base = bases.make(family)
    paths, names = list(base.modules_by_path), set(base.state())
    fingerprint, count = base.fingerprint, base.parameter_count()
    plain = bases.hidden(base, bases.batch(), None).last
    quantize(base)
    assert (base.quantization, base.fingerprint, base.parameter_count()) == ("nf4", fingerprint, count)
    assert list(dict(base.model.named_modules())) == paths
    matrices = {site.path for site in base.select("all-linear")}
    assert {path for path, _ in packed_layers(base)} == matrices
    assert len(matrices) >= 8
    kept = names - {f"{path}.weight" for path in matrices}
    assert kept < set(base.state())
    assert all("weight" not in name.removeprefix(path) for path in matrices for name in base.state() if path in name)
    found = bases.hidden(base, bases.batch(), None).last
    dequantize(base)
    assert base.quantization is None
    assert set(base.state()) == names
    assert not any(isinstance(module, Packed) for module in base.model.modules())
    assert torch.equal(bases.hidden(base, bases.batch(), None).last, found)
    assert 1e-3 < float((found - plain).abs().max()) < 2


def test_sites_stay_what_they_are():
    base = bases.make("gpt2")
    dense = {site.name: site.dense_weight().clone() for site in base.sites if site.linear and site.layer is not None}
    sites = {site.name: (site.linear, site.whole, site.transposed, site.d_in, site.d_out) for site in base.sites}
    quantize(base)
    assert sites == {s.name: (s.linear, s.whole, s.transposed, s.d_in, s.d_out) for s in base.sites}
    again = Base(base.model)
    assert sites == {s.name: (s.linear, s.whole, s.transposed, s.d_in, s.d_out) for s in again.sites}
    assert len(dense) == 14
    for site in base.sites:
        if site.name in dense:
            assert site.dense_weight().shape == dense[site.name].shape
            assert (
                float((site.dense_weight() - dense[site.name]).abs().max()) < 0.1 * float(dense[site.name].std()) * 10
            )
    site = base.select("layers.0.attn.k")[0]
    update = site.host_update(torch.zeros(site.d_out, site.d_in))[f"{site.path}.weight"]
    assert update.shape == (32, 96)
    assert not update[:, 32:64].any()
    assert torch.equal(update[:, :32], base.select("layers.0.attn.q")[0].dense_weight().T)


def test_what_cannot_be_quantized_says_so():
    base = quantized("llama")
    with pytest.raises(UsageError, match="llama is in nf4 already"):
        quantize(base)
    base = bases.make("llama")
    bases.put(base, "lora")
    with pytest.raises(UsageError, match="has adapters attached"):
        quantize(base)
    small = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    nothing = Base(LlamaForCausalLM(LlamaConfig(**small, num_hidden_layers=0)), None, "small")
    with pytest.raises(ModelError, match=r"small: no layer has a matrix to quantize; leave `quantization` out"):
        quantize(nothing)


def test_it_can_be_quantized_from_another_format():
    """An fp32 base quantized from bf16 has the bytes of a base that was loaded in bf16."""
    full, half = bases.make("bert"), bases.make("bert")
    half.model.to(torch.bfloat16)
    quantize(full, torch.bfloat16)
    quantize(half)
    pairs = list(zip(packed_layers(full), packed_layers(half), strict=True))
    assert len(pairs) == 12
    for (_, one), (_, other) in pairs:
        assert (one.dtype, one.source, other.source) == (torch.float32, torch.bfloat16, torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(one._stored(), other._stored(), strict=True))


# Methods ------------------------------------------------------------------------------------------


def loss_of(base: Base, name: str, given: dict) -> torch.Tensor:
    hidden = hidden_states(base, given, name)
    pooled = 0.0 if hidden.pooled is None else hidden.pooled.float().square().mean()
    return hidden.last.float().square().mean() + pooled


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", bases.METHODS)
def test_every_method_trains_on_a_quantized_base(family, method):
    """In two steps, with an evaluation between, every tensor trains; no byte of the base changes; and it all is what
    the same method does on the dequantized base."""
    refusal = methods()[method].refuses(bases.family_of(family))
    if refusal is not None:
        assert method == "longlora"
        return
    base = quantized(family)
    if method in REFUSED:
        with pytest.raises(UsageError, match="is kept in nf4, where nothing can train"):
            bases.put(base, method)
        return
    before, given = stored(base), bases.batch()
    outputs, touched = [], set()
    for step in ("quantized", "dequantized"):
        torch.manual_seed(4)
        adapter = bases.put(base, method)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
        start = {name: tensor.detach().clone() for name, tensor in adapter.trainable()}
        for _ in range(2):
            base.model.train()
            loss_of(base, method, given).backward()
            touched |= {name for name, tensor in adapter.trainable() if tensor.grad is not None and tensor.grad.any()}
            optimizer.step()
            optimizer.zero_grad()
            base.model.eval()
            outputs.append(bases.hidden(base, given, method).last)
        assert start
        assert not [name for name, tensor in adapter.trainable() if torch.equal(tensor, start[name])]
        assert touched == set(start)
        detach(base, method)
        if step == "quantized":
            now = base.state()
            assert now.keys() == before.keys()
            assert not [name for name, tensor in before.items() if not torch.equal(now[name], tensor)]
            dequantize(base)
    torch.testing.assert_close(outputs[:2], outputs[2:], atol=1e-5, rtol=1e-4)


def test_what_is_refused_is_listed():
    """The families refuse what they refuse, and a quantized base what trains its matrices: no more."""
    assert set(bases.METHODS) - REFUSED >= {
        "lora", "dora", "adalora", "dylora", "vera", "ia3", "bitfit", "bottleneck", "parallel", "mam", "prefix",
        "ptuning_v2", "prompt", "ptuning", "longlora", "molora", "malora", "unified", "peft",
    }  # fmt: skip
    assert set(bases.METHODS) - REFUSED == {name for name, cls in methods().items() if not read_method(name).in_place}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_norms_train_on_a_quantized_base(family):
    base = quantized(family)
    adapter = bases.put(base, "frozen", last_layers=0, norms=True, pooler=False)
    loss_of(base, "frozen", bases.batch()).backward()
    assert len(adapter.trainable()) >= 5
    assert all(tensor.grad is not None and tensor.grad.any() for _, tensor in adapter.trainable())


def test_rows_go_their_own_ways():
    base = quantized("llama")
    bases.put(base, "lora")
    bases.put(base, "dora")
    given = bases.batch(padded=None)
    from graft.routing import Route

    mixed = bases.hidden(base, given, Route.of(["lora", None, "dora", "lora"])).last
    for row, entry in enumerate(["lora", None, "dora", "lora"]):
        alone = bases.hidden(base, bases.row_of(given, row), entry).last
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-5, rtol=1e-4)


def test_activations_can_be_computed_again():
    gradients = []
    for again in (False, True):
        base = quantized("llama")
        torch.manual_seed(2)
        adapter = bases.put(base, "dora")
        if again:
            base.checkpoint_activations()
        base.model.train()
        loss_of(base, "dora", bases.batch()).backward()
        gradients.append([tensor.grad for _, tensor in adapter.trainable()])
    assert len(gradients[0]) > 4
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


# Folders and merging ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "adalora", "vera"])
def test_an_adapter_folder_is_that_of_a_dense_base(family, method, tmp_path):
    """It loads on its quantized base, on the dense one, and not on another."""
    base = quantized(family)
    bases.put(base, method)
    store.save(base.adapters[method], base, tmp_path / "q")
    expected = bases.hidden(base, bases.batch(), method).last
    fresh = quantized(family)
    store.load(fresh, tmp_path / "q", "a")
    torch.testing.assert_close(bases.hidden(fresh, bases.batch(), "a").last, expected, atol=1e-5, rtol=1e-4)
    dense = bases.make(family)
    store.load(dense, tmp_path / "q", "a")
    detach(dense, "a")
    with pytest.raises(DamagedError, match="whose weights differ"):
        store.load(quantized(family, seed=1), tmp_path / "q", "a")
    attach(dense, read_method({"name": method} | bases.settings(method)).build(dense, "b"))
    store.save(dense.adapters["b"], dense, tmp_path / "d")
    about = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("q", "d")]
    assert about[0] == about[1]
    said = [json.loads((tmp_path / name / "graft.json").read_text())["base"] for name in ("q", "d")]
    assert said[0] == said[1] | {"quantization": "nf4", "quantized_from": "float32"}
    assert (store.quantized_from(tmp_path / "q"), store.quantized_from(tmp_path / "d")) == (torch.float32, None)


def test_on_the_same_kind_of_base_the_probe_still_counts(tmp_path):
    base = quantized("llama")
    bases.put(base, "lora")
    store.save(base.adapters["lora"], base, tmp_path / "q")
    path = tmp_path / "q" / "graft.json"
    about = json.loads(path.read_text())
    about["probe"][0][0] += 9
    path.write_text(json.dumps(about))
    with pytest.raises(DamagedError, match="outputs on fixed ids differ"):
        store.load(quantized("llama"), tmp_path / "q", "a")
    about["base"]["quantization"] = "int3"
    path.write_text(json.dumps(about))
    with pytest.raises(DamagedError, match="its base was quantized to 'int3' from 'float32'"):
        store.quantized_from(tmp_path / "q")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "adalora", "dylora", "vera", "peft"])
def test_merging_goes_into_the_dequantized_base(family, method):
    base = quantized(family)
    bases.put(base, method)
    expected = bases.hidden(base, bases.batch(), method).last
    merge_into(base, method)
    assert base.quantization is None
    assert not list(packed_layers(base))
    torch.testing.assert_close(bases.hidden(base, bases.batch(), None).last, expected, atol=2e-5, rtol=1e-4)


def test_two_adapters_are_merged_one_after_the_other():
    base = quantized("gpt2")
    bases.put(base, "lora", target_modules=["attn.q", "attn.v", "mlp.up"])
    bases.put(base, "bitfit")
    expected = bases.hidden(base, bases.batch(), ("lora", "bitfit")).last
    merge_into(base, ("lora", "bitfit"))
    torch.testing.assert_close(bases.hidden(base, bases.batch(), None).last, expected, atol=2e-5, rtol=1e-4)


# Recipes ------------------------------------------------------------------------------------------

LEAST = {"model": "m", "data": {"train": "x.jsonl"}}


@pytest.mark.parametrize(
    "given",
    [
        {"quantization": "nf4"}, {"quantization": "4bit"}, {"quantization": "NF4"}, {"quantization": 4},
        {"load_in_4bit": True}, {"quantization_bit": 4},
    ],
)  # fmt: skip
def test_as_users_write_it(given):
    recipe, notes = Recipe.parse_with_notes(LEAST | given)
    assert recipe.quantization == "nf4"
    assert [note for note in notes if "quantization" in note] == [
        f"{key!r} read as 'quantization'" for key in given if key != "quantization"
    ]
    assert [method.name for method in recipe.methods] == [name for name in COMPARED if name not in REFUSED]
    assert Recipe.parse(recipe.resolved()) == recipe


@pytest.mark.parametrize("given", [{}, {"quantization": None}, {"load_in_4bit": False}])
def test_without_it_nothing_changes(given):
    recipe = Recipe.parse(LEAST | given)
    assert recipe.quantization is None
    assert [method.name for method in recipe.methods] == list(COMPARED)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"quantization": "int8"}, "quantization: Input should be 'nf4' (got 'int8')"),
        ({"quantization_bit": 8}, "quantization: Input should be 'nf4' (got 8)"),
        ({"method": "full"}, "quantization: full trains the base's own weights, and in nf4 none can train"),
        ({"method": {"name": "frozen"}}, "quantization: frozen trains the base's own weights"),
        ({"method": {"name": "full", "exclusive": True}}, "quantization: full trains the base's own weights"),
        ({"engine": {"compile": True}}, "engine.compile and quantization do not go together"),
        ({"training": {"optimizer": "sgd"}}, "training.optimizer: Input should be 'adamw', 'adamw_8bit'"),
    ],
)
def test_what_a_recipe_cannot_have(given, told):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(LEAST | ({} if "quantization_bit" in given else {"quantization": "nf4"}) | given)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_in_a_comparison_only_the_methods_that_cannot_train_fail():
    recipe = Recipe.parse(LEAST | {"quantization": "nf4", "methods": ["lora", "full"]})
    assert Recipe.parse(recipe.resolved()) == recipe
    refused = []
    for trial in trials(recipe, Path("x")):
        try:
            assert Recipe.parse(trial.recipe.resolved()) == trial.recipe
        except RecipeError as error:
            refused.append((trial.label, "trains the base's own weights" in str(error)))
    assert refused == [("full", True)]


# Without bitsandbytes -----------------------------------------------------------------------------


def test_without_bitsandbytes_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    base = bases.make("llama")
    for call in (require_bitsandbytes, lambda: quantize(base)):
        with pytest.raises(
            UsageError, match=r"quantization: nf4 needs the package bitsandbytes .*pip install"
        ) as caught:
            call()
        assert "'graft-tuning[nf4]'" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert base.quantization is None
    with pytest.raises(UsageError, match=r"training.optimizer: adamw_8bit needs the package bitsandbytes"):
        check_optimizer("adamw_8bit", torch.device("cpu"))
    check_optimizer("adamw", torch.device("cpu"))


@pytest.mark.slow
def test_it_is_loaded_late_and_fetches_nothing(tmp_path):
    """bitsandbytes would fetch a kernel by the package kernels, where that is installed."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*names, **more): raise SystemExit('fetched')\n")
    code = (
        "import sys, kernels; import graft.cli; from graft import quantize; assert 'bitsandbytes' not in sys.modules; "
        "quantize.require_bitsandbytes(); assert 'bitsandbytes' in sys.modules; import kernels as again; "
        "assert again is kernels"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": str(tmp_path), "PATH": "", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Training -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tiny_chat.write_all(tmp_path_factory.mktemp("chat"))


LORA = {"name": "lora", "r": 16, "target_modules": "all-linear", "learning_rate": 3e-2}


@pytest.fixture(scope="module")
def run(place) -> tuple[Recipe, Path, dict]:
    training = {"num_train_epochs": 4, "per_device_train_batch_size": 8, "precision": "bf16"}
    recipe = tiny_chat.recipe(place, quantization="nf4", method=LORA, training=training)
    return recipe, place / "run", execute(recipe, place / "run")


def test_a_run_from_its_recipe_to_its_report(run):
    recipe, folder, report = run
    model = json.loads((folder / "env.json").read_text())["model"]
    assert model["quantization"] == "nf4"
    assert model["parameters"] == bases_count(recipe)
    log = (folder / "log.txt").read_text()
    assert "14 matrices in nf4: 0.0 MB instead of 0.1 in bfloat16" in log
    assert "compiling" not in log
    losses = [point["train_loss"] for point in report["curve"]]
    assert losses[-1] < losses[0] - 0.3
    assert report["merged_latency_ms"] is not None
    assert report["merged_difference"] < 0.2
    again = evaluate_run(folder)
    assert (again["quality"], again["rows"]) == (report["quality"], 24)
    assert execute(recipe, folder) == report


def bases_count(recipe: Recipe) -> int:
    from graft.model import load_base

    return load_base(recipe.model).parameter_count()


def test_merging_a_run_tells_what_it_costs(run, tmp_path):
    folder, found = run[1], {}
    for original in (False, True):
        result = merge_run(folder, tmp_path / str(original), original=original)
        found[original] = result["difference_from_trained"]
        assert result["largest_difference"] < 1e-5
        assert (result["compared"], result["dtype"]) == ("logits", "fp32")
        assert result["positions"] > 50
        assert 0 <= result["same_best"] <= 1
        said = merged_lines(result)[-1]
        assert ("into its original weights" if original else "into its dequantized weights") in said
        assert "the best one is the same at" in said
        if not original:
            assert result["same_best"] == 1
            assert "same at 100.0%" in said
    assert found[False] < 1e-4 < 1e-2 < found[True]


def test_only_a_quantized_run_has_an_original_base(place, tmp_path):
    base = bases.make("llama")
    bases.put(base, "lora")
    store.save(base.adapters["lora"], base, tmp_path / "a")
    with pytest.raises(UsageError, match="was not trained on a quantized base"):
        merge_run(tmp_path / "a", tmp_path / "m", model=str(place / "model"), original=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_evaluating_and_training_again(dtype):
    """An evaluation does not repack anything: the next step has the gradients that it would have had without it."""
    gradients = []
    for evaluations in (0, 2):
        base = bases.make("llama")
        base.model.to(dtype)
        quantize(base)
        torch.manual_seed(3)
        adapter = bases.put(base, "lora", target_modules=["all-linear"])
        before = stored(base)
        for _ in range(evaluations):
            base.model.eval()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                bases.hidden(base, bases.batch(rows=1, padded=None), "lora")
                bases.hidden(base, bases.batch(), "lora")
            assert all(torch.equal(tensor, before[name]) for name, tensor in base.state().items())
        base.model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss_of(base, "lora", bases.batch()).backward()
        gradients.append({name: tensor.grad for name, tensor in adapter.trainable()})
        assert all(gradient is not None and gradient.any() for gradient in gradients[-1].values())
    assert len(gradients[0]) == 28
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_layers_are_not_compiled():
    base = quantized("llama")
    adapter = read_method("lora").build(base, "tuned")
    attach(base, adapter)
    said: list[str] = []
    settings = Training(per_device_train_batch_size=3, max_steps=2, load_best_model_at_end=False)
    trainer = Trainer(
        base, adapter, Instruct(), settings, 1e-2, 1, make_accelerator("fp32"), engine=Engine(compile=True),
        say=said.append,
    )  # fmt: skip
    trainer._evaluate = lambda validation, result, point, total: point
    assert trainer.fit(lines(), lines()).steps == 2
    assert said == []


# Optimizers ---------------------------------------------------------------------------------------


def fitted(kind: str) -> tuple[float, torch.optim.Optimizer, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    truth, x = (torch.randn(size, 64, generator=generator) for size in (64, 512))
    given = [nn.Parameter(torch.zeros(64, 64)), nn.Parameter(torch.zeros(64))]
    optimizer = make_optimizer(given, 2e-2, 0.0, kind=kind)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (x @ given[0].T + given[1] - x @ truth.T).square().mean()
        loss.backward()
        optimizer.step()
    return float(loss.detach()), optimizer, given


def test_moments_in_8_bits_learn_as_those_in_32():
    full, _, _ = fitted("adamw")
    eight, optimizer, (matrix, vector) = fitted("adamw_8bit")
    assert full < 1
    assert eight == pytest.approx(full, rel=0.2, abs=0.02)
    assert [optimizer.state[matrix][name].dtype for name in ("state1", "state2")] == [torch.uint8] * 2
    assert [optimizer.state[vector][name].dtype for name in ("state1", "state2")] == [torch.float32] * 2
    groups = make_optimizer([matrix, vector], 1.0, 0.1, kind="adamw_8bit").param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it works")
def test_pages_need_a_device(place, tmp_path):
    with pytest.raises(
        UsageError, match="paged_adamw_8bit pages its states out of a CUDA device's memory, and this is a cpu"
    ):
        check_optimizer("paged_adamw_8bit", torch.device("cpu"))
    training = {"max_steps": 2, "optimizer": "paged_adamw_8bit"}
    with pytest.raises(UsageError, match="use adamw_8bit"):
        execute(tiny_chat.recipe(place, method=LORA, training=training), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("spelled", "kind"), [("adamw_torch", "adamw"), ("adamw_bnb_8bit", "adamw_8bit"), ("adamw_8bit", "adamw_8bit")]
)
def test_optimizers_as_transformers_spells_them(spelled, kind):
    assert Training.parse({"optim": spelled}).optimizer == kind


def test_a_run_with_moments_in_8_bits(place, tmp_path):
    training = {"max_steps": 12, "per_device_train_batch_size": 8, "precision": "fp32", "optimizer": "adamw_8bit"}
    recipe = tiny_chat.recipe(place, quantization="nf4", method={**LORA, "r": 64, "lora_alpha": 64}, training=training)
    report = execute(recipe, tmp_path / "run")
    assert report["curve"][-1]["train_loss"] < report["curve"][0]["train_loss"]


def test_conv1d_is_one_of_the_hosts():
    base = bases.make("gpt2")
    assert any(isinstance(module, Conv1D) for module in base.model.modules())
    quantize(base)
    assert not any(isinstance(module, Conv1D) for module in base.model.modules())
    assert described(base).startswith("8 matrices in nf4: ")
