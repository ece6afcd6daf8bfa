"""The engine: every piece gives what training without it gives."""

import os
import subprocess
import sys
from types import SimpleNamespace

import bases
import pytest
import tiny
import tiny_chat
import torch
from test_causal import DECODERS, Line, lines
from torch.nn import functional as F

from graft import hidden_states, read_method
from graft.engine import attention, compiled, fewrows, loss, runtime
from graft.engine.attention import dense_attention, is_faster
from graft.engine.compiled import LayerCompiler, layers_of, pays
from graft.engine.dropout import cheaper_dropout, drop, keep_mask
from graft.engine.fewrows import FewRows
from graft.engine.loss import chunked_loss
from graft.engine.settings import Engine
from graft.errors import RecipeError
from graft.model import Base
from graft.objectives.base import silent
from graft.objectives.causal import token_losses
from graft.objectives.instruct import Instruct
from graft.parts.attach import attach
from graft.parts.attention import FAST, choose_kernels
from graft.recipe import Recipe
from graft.run import execute
from graft.train.loop import Trainer, make_accelerator
from graft.train.optim import make_optimizer
from graft.train.settings import Training

# Attention ----------------------------------------------------------------------------------------


def heads(rows=3, heads=6, groups=2, queries=7, keys=7, width=8, dtype=torch.float32, seed=0):
    """q, k, v as a model gives them: views of [rows, length, heads, width]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((queries, heads), (keys, groups), (keys, groups))
    made = [torch.randn(rows, length, count, width, generator=generator).to(dtype) for length, count in sizes]
    return [tensor.transpose(1, 2).requires_grad_() for tensor in made]


def masks(queries=7, keys=7, rows=3):
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None].repeat(rows, 1, 1, 1)
    seen[1, :, :, :2] = False  # padded on the left: the first query of row 1 sees nothing when queries are keys
    seen[1, :, :2, 0] = True
    return {"bool": seen, "additive": torch.zeros(seen.shape).masked_fill(~seen, -1e9), "one for all": seen[:1]}


def fused(q, k, v, mask, causal):
    repeat = q.shape[1] // k.shape[1]
    k, v = (tensor.repeat_interleave(repeat, dim=1) for tensor in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def with_gradients(output, inputs):
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)]


@pytest.mark.parametrize("kept", [128, 0])
@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize("mask", ["causal", "none", "bool", "additive", "one for all"])
def test_dense_attention_is_the_fused_one(mask, groups, kept, monkeypatch):
    monkeypatch.setattr(attention, "KEPT", kept)
    given = heads(groups=groups)
    chosen = masks().get(mask)
    expected = with_gradients(fused(*given, chosen, mask == "causal"), given)
    found = with_gradients(dense_attention(*given, chosen, causal=mask == "causal"), given)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_keys_may_be_more_than_queries():
    given = heads(queries=3, keys=9)
    mask = masks(3, 9)["bool"]
    expected = with_gradients(fused(*given, mask, False), given)
    for a, b in zip(with_gradients(dense_attention(*given, mask), given), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_query_that_sees_nothing_gets_numbers():
    given = heads()
    mask = torch.zeros(3, 1, 7, 7, dtype=torch.bool)
    for tensor in with_gradients(dense_attention(*given, mask), given):
        assert bool(tensor.isfinite().all())


@pytest.mark.parametrize("length", [40, 200])
def test_rounding_in_bf16_is_that_of_bf16(length):
    """Against fp32, the error is at most four times the fused kernel's, which keeps scores in fp32."""
    exact = heads(queries=length, keys=length, width=64)
    rounded = heads(queries=length, keys=length, width=64, dtype=torch.bfloat16)
    truth = with_gradients(fused(*exact, None, True), exact)
    ours = with_gradients(dense_attention(*rounded, None, causal=True), rounded)
    theirs = with_gradients(fused(*rounded, None, True), rounded)
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert float((a.float() - c).norm()) < 4 * float((b.float() - c).norm())
        assert float((a.float() - c).norm()) < 0.02 * float(c.norm())


@pytest.mark.parametrize("kept", [128, 0])
def test_dropout_drops_and_its_gradient_knows_what(kept, monkeypatch):
    monkeypatch.setattr(attention, "KEPT", kept)
    q, k, v = heads(groups=6, width=4)
    torch.manual_seed(5)
    output = dense_attention(q, k, v, None, dropout=0.5)
    found = with_gradients(output, (q, k, v))
    torch.manual_seed(5)
    keep = keep_mask(torch.ones(18, 7, 7), 0.5).float().view(3, 6, 7, 7)
    expected = torch.softmax(q @ k.transpose(2, 3) / 2, dim=-1) * keep * 2 @ v
    for a, b in zip(found, with_gradients(expected, (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert 0.3 < float(keep.float().mean()) < 0.7


def test_where_dense_attention_is_chosen():
    q, k, v = (tensor.detach() for tensor in heads(groups=6, dtype=torch.bfloat16))
    assert is_faster(q, k, v, None)
    assert not is_faster(q[:, :, :1], k, v, None)
    assert not is_faster(q, k, v[..., :4], None)
    assert not is_faster(q, k, v, torch.zeros(1, 6, 7, 7, requires_grad=True))
    assert not is_faster(q.to("meta"), k.to("meta"), v.to("meta"), None)
    long = [tensor.detach() for tensor in heads(queries=65, keys=65)]
    assert not is_faster(*long, None)
    assert is_faster(*(tensor.bfloat16() for tensor in long), None)
    assert not is_faster(*(tensor.double() for tensor in long), None)


@pytest.mark.parametrize("name", list(bases.FACTORIES))
@pytest.mark.parametrize("method", bases.METHODS)
def test_every_method_trains_alike_with_the_engines_attention(name, method, monkeypatch):
    """States and gradients at every real token; decoders get no mask of what is padded behind them."""
    if method not in bases.suited(name):
        pytest.skip("refused")
    results = []
    used = []
    original = attention.dense_attention
    monkeypatch.setattr("graft.parts.attention.dense_attention", lambda *a, **k: used.append(1) or original(*a, **k))
    for fast in (False, True):
        base = bases.make(name)
        if fast:
            choose_kernels(base)
        torch.manual_seed(1)
        adapter = bases.put(base, method)
        given = bases.batch()
        states = hidden_states(base, given, method).last
        real = given["attention_mask"].bool()
        states[real].square().sum().backward()
        gradients = [p.grad for _, p in adapter.trainable() if p.grad is not None]
        results.append([states[real].detach(), *gradients])
        assert (base.config._attn_implementation == FAST) == fast
    assert len(results[0]) > 1
    # T5's learned distances are added to its scores, by parts that attend as one mask that needs no gradient.
    assert bool(used) or name == "t5"
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


def test_other_implementations_are_left_alone():
    base = bases.make("llama")
    base.model.set_attn_implementation("eager")
    choose_kernels(base)
    assert base.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", DECODERS)
def test_a_mask_with_holes_is_kept(name):
    """Only padding behind a row needs no mask."""
    base = bases.make(name)
    bases.put(base, "lora")
    given = bases.batch(padded=None)
    holes = {**given, "attention_mask": given["attention_mask"].clone()}
    holes["attention_mask"][:, 3] = 0
    with base.route("lora"):
        expected = base.hidden(holes).last[:, 4:]
    torch.testing.assert_close(hidden_states(base, holes, "lora").last[:, 4:], expected, atol=1e-5, rtol=1e-5)
    assert float((hidden_states(base, given, "lora").last[:, 4:] - expected).abs().max().detach()) > 1e-3


# Loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 1 << 24])
@pytest.mark.parametrize("name", DECODERS)
def test_the_chunked_loss_is_the_plain_one(name, at_once, monkeypatch):
    monkeypatch.setattr(loss, "AT_ONCE", at_once)
    monkeypatch.setattr(loss, "_size", lambda words: 3 if at_once == 1 else 1000)
    base = bases.make(name)
    states = torch.randn(2, 9, 32, requires_grad=True)
    targets = torch.randint(0, bases.VOCABULARY, (2, 9))
    targets[0, :4] = -100
    known = targets != -100

    def score(part):
        return base.logits(part[None])[0]

    expected = token_losses(base, states, targets, None).sum() / 7
    found = chunked_loss(states[known], targets[known], score, bases.VOCABULARY) / 7
    with torch.no_grad():
        still = chunked_loss(states[known], targets[known], score, bases.VOCABULARY) / 7
    for value in (found, still):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(value, states)[0] for value in (expected, found)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_scores_of_all_tokens_are_never_there_at_once(monkeypatch):
    monkeypatch.setattr(loss, "AT_ONCE", 16 * bases.VOCABULARY)
    base = bases.make("llama")
    seen = []
    original = base.logits
    base.logits = lambda states: seen.append(states.shape[1]) or original(states)
    bases.put(base, "lora")
    row = Line(list(range(3, 60)), [0] + [1] * 56)
    Instruct().loss(base, [row], "lora").total.backward()
    assert seen == [16, 16, 16, 8]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_trains_at_the_head_gets_its_gradient(method):
    base = bases.make("llama")
    more = {"target_modules": ["attn.q", "head"]} if method == "lora" else {}
    adapter = bases.put(base, method, **more)
    Instruct().loss(base, lines(), method).total.backward()
    at_head = [p.grad for name, p in adapter.trainable() if name.startswith(("head", "lm_head"))]
    assert at_head
    assert all(bool(gradient.any()) for gradient in at_head)


# Dropout ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9, 0.01])
def test_dropout_drops_its_share_anywhere_and_independently(dropout):
    torch.manual_seed(0)
    kept = keep_mask(torch.empty(400, 1001), dropout).float()
    error = 5 * (dropout * (1 - dropout) / kept.numel()) ** 0.5
    assert float(kept.mean()) == pytest.approx(1 - dropout, abs=error)
    lanes = kept.view(-1)[:400_400].view(-1, 4).mean(0)
    assert lanes.tolist() == pytest.approx([1 - dropout] * 4, abs=2 * error)
    for distance in (1, 2, 3, 4, 1001):  # elements of one draw, and of neighbouring ones
        both = float((kept.view(-1)[distance:] * kept.view(-1)[:-distance]).mean())
        assert both == pytest.approx((1 - dropout) ** 2, abs=2 * error)
    torch.manual_seed(0)
    assert torch.equal(keep_mask(torch.empty(400, 1001), dropout).float(), kept)
    torch.manual_seed(1)
    assert not torch.equal(keep_mask(torch.empty(400, 1001), dropout).float(), kept)


@pytest.mark.parametrize("shape", [(3,), (5, 7), (4, 8), ()])
def test_dropped_values_and_gradients(shape):
    x = torch.randn(shape, requires_grad=True)
    torch.manual_seed(3)
    kept = keep_mask(x, 0.25).float()
    torch.manual_seed(3)
    output = drop(x, 0.25)
    torch.testing.assert_close(output, x * kept / 0.75)
    output.sum().backward()
    torch.testing.assert_close(x.grad, kept / 0.75)
    assert bool((drop(torch.ones(9), 1.0) == 0).all())


def test_dropout_modules_are_changed_for_a_while_and_in_training_only():
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Dropout(0.0), torch.nn.Linear(4, 4))
    x = torch.ones(64, 4)
    with cheaper_dropout(model):
        assert [type(module).__name__ for module in model] == ["CheaperDropout", "Dropout", "Linear"]
        torch.manual_seed(3)
        expected = drop(x, 0.5)
        torch.manual_seed(3)
        assert torch.equal(model[0](x), expected)
        model.eval()
        assert torch.equal(model[0](x), x)
    assert type(model[0]) is torch.nn.Dropout


# Compilation --------------------------------------------------------------------------------------


def trained(name, method, engine, rows, say=silent, steps=6, checkpointing=False):
    """Losses of a few steps, and the tensors after them."""
    base = bases.make(name)
    if engine.attention == "auto":
        choose_kernels(base)
    torch.manual_seed(1)
    adapter = read_method({"name": method} | bases.settings(method)).build(base, "tuned")
    attach(base, adapter)
    points = []
    settings = Training(
        per_device_train_batch_size=3,
        num_train_epochs=9,
        max_steps=steps,
        eval_steps=99,
        load_best_model_at_end=False,
        gradient_checkpointing=checkpointing,
    )
    trainer = Trainer(
        base, adapter, Instruct(), settings, 1e-2, 1, make_accelerator("fp32"), None, points.append,
        engine=engine, say=say,
    )  # fmt: skip
    trainer._evaluate = lambda validation, result, point, total: point
    trainer.fit(rows, rows)
    assert all(layer._compiled_call_impl is None for layer in layers_of(base))
    return [point.train_loss for point in points], dict(adapter.named_tensors())


OFF = Engine(attention="sdpa", compile=False, keep_memory=False, cheaper_dropout=False, fused_optimizer=False)


@pytest.fixture
def counted(monkeypatch):
    """Compile with a backend that counts its graphs."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: original(self, backend=backend, **given))
    torch._dynamo.reset()
    return graphs


@pytest.mark.parametrize("method", ["lora", "dora", "bottleneck", "prefix", "full", "ia3"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_compiled_training_is_the_same_and_has_one_graph(name, method, counted):
    """One for all lengths, on both sides of where probabilities are kept, and for the last, smaller batch."""
    rows = [Line(list(range(3, 3 + size)), [0] + [1] * (size - 1)) for size in (9, 11, 14, 12, 10, 17, 13, 9, 15, 12)]
    said = []
    plain = trained(name, method, OFF, rows)
    found = trained(name, method, Engine(compile=True), rows, said.append)
    assert found[0] == pytest.approx(plain[0], abs=1e-4)
    assert len(plain[0]) == 6
    for key, tensor in plain[1].items():
        torch.testing.assert_close(found[1][key], tensor, atol=2e-3, rtol=2e-3)
    assert len(counted) == 1
    assert "compiling" in said[0]


def test_recomputed_activations_are_not_compiled(counted, monkeypatch):
    """torch 2.13 compiles no checkpoint that restores the route."""
    monkeypatch.setattr(compiled, "COST", 0.0)
    monkeypatch.setattr(compiled, "unavailable", lambda: None)
    trained("llama", "lora", Engine(), lines(10), steps=8, checkpointing=True)
    assert not counted
    both = {"model": "m", "data": {"train": "d"}, "engine": {"compile": True}}
    with pytest.raises(RecipeError, match=r"engine\.compile and training\.gradient_checkpointing"):
        Recipe.parse({**both, "training": {"gradient_checkpointing": True}})


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """A folder for generated code, empty at first. torch does not compile its headers ahead there: kernels are few."""
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        patch.setattr("torch._inductor.config.cpp_cache_precompile_headers", False)
        yield folder


def sources(folder):
    return set(folder.rglob("*.cpp"))


@pytest.mark.slow
@pytest.mark.skipif(compiled.unavailable() is not None, reason="there is no compiler")
def test_generated_code_trains_alike(kernels):
    torch._dynamo.reset()
    before = sources(kernels)
    rows = lines(10)
    plain = trained("llama", "lora", OFF, rows)
    found = trained("llama", "lora", Engine(compile=True), rows)
    assert found[0] == pytest.approx(plain[0], abs=1e-4)
    assert sources(kernels) > before


@pytest.mark.faults
@pytest.mark.skipif(compiled.unavailable() is not None, reason="there is no compiler")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_generated_code_knows_dropout(precision, kernels, tmp_path):
    """An encoder drops attention in training. Every part has to get a gradient, and the run to learn."""
    torch._dynamo.reset()
    before = sources(kernels)
    folder = tiny.write_all(tmp_path / "data")
    training = {"num_train_epochs": 2, "per_device_train_batch_size": 16, "precision": precision}
    report = execute(tiny.recipe(folder, training=training, engine={"compile": True}), tmp_path / "run")
    assert report["quality"] > 0.8
    assert sources(kernels) > before


def test_auto_compiles_when_the_rest_of_a_run_pays_for_it(counted, monkeypatch):
    monkeypatch.setattr(compiled, "unavailable", lambda: None)
    said = []
    losses, _ = trained("llama", "lora", Engine(), lines(10), said.append, steps=8)
    assert not counted
    assert said == []
    monkeypatch.setattr(compiled, "COST", 0.0)
    again, _ = trained("llama", "lora", Engine(), lines(10), said.append, steps=8)
    graphs = len(counted)
    assert 1 <= graphs <= 2  # the first batches have one length, which is a size of their own to torch
    assert again == pytest.approx(losses, abs=1e-4)
    assert said[0].startswith("compiling the repeated layer: the run is long enough")
    monkeypatch.setattr(compiled, "unavailable", lambda: "there is no C++ compiler")
    trained("llama", "lora", Engine(), lines(10), said.append, steps=8)
    assert len(counted) == graphs


def test_compiling_pays_by_what_the_run_computes():
    base = bases.make("llama")
    weights = sum(parameter.numel() for layer in layers_of(base) for parameter in layer.parameters())
    seconds = 4 * weights / compiled.RATE[torch.float32] / torch.get_num_threads()
    enough = compiled.COST / compiled.GAIN / seconds
    assert pays(base, round(enough * 1.01))
    assert not pays(base, round(enough * 0.99))


@pytest.mark.parametrize("choice", ["auto", True])
def test_a_compiler_that_fails(choice, monkeypatch, tmp_path):
    """auto goes on without; a recipe that asks for compiled code hears why there is none."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiled, "unavailable", lambda: None)
    monkeypatch.setattr(compiled, "COST", 0.0)

    def backend(graph, inputs):
        raise RuntimeError("cc1plus: out of memory")

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: original(self, backend=backend, **given))
    torch._dynamo.reset()
    rows = lines(10)
    said = []
    plain, _ = trained("llama", "lora", OFF, rows, steps=8)
    if choice is True:
        with pytest.raises(RuntimeError, match="out of memory"):
            trained("llama", "lora", Engine(compile=choice), rows, said.append, steps=8)
        return
    found, _ = trained("llama", "lora", Engine(compile=choice), rows, said.append, steps=8)
    assert found == pytest.approx(plain, abs=1e-4)
    assert "the run goes on without" in said[1]


def test_pausing_takes_the_compiled_layers_away_for_a_while(counted):
    base = bases.make("llama")
    compiler = LayerCompiler(base, True, silent)
    compiler.start(1)
    calls = [layer._compiled_call_impl for layer in layers_of(base)]
    assert calls
    assert all(calls)
    with compiler.paused():
        assert not any(layer._compiled_call_impl for layer in layers_of(base))
    assert [layer._compiled_call_impl for layer in layers_of(base)] == calls


# Products of a few rows ---------------------------------------------------------------------------


def large_and_small(monkeypatch, able=True):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_fp16": able})
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(512, 1500), torch.nn.Linear(1500, 8), torch.nn.Linear(8, 90_000, False))


@pytest.mark.parametrize("rows", [1, 3, 4, 8, 15, 16])
def test_products_of_a_few_rows_are_the_plain_ones(rows, monkeypatch):
    model = large_and_small(monkeypatch)
    x = torch.randn(rows, 1, 512)
    seen = []
    monkeypatch.setattr(
        fewrows, "_product", lambda layer, x, product=fewrows._product: seen.append(layer) or product(layer, x)
    )
    with torch.no_grad():
        plain = model(x)
        with FewRows(model).of(rows):
            found = model(x)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    assert seen == ([model[0], model[2]] if 4 <= rows < 16 else [])
    assert not any("forward" in vars(layer) for layer in model)


@pytest.mark.parametrize("case", ["gradients", "autocast", "bf16", "another processor", "an error"])
def test_other_products_stay_as_they_are(case, monkeypatch):
    model = large_and_small(monkeypatch, able=case != "another processor")
    if case == "bf16":
        model.bfloat16()
    if case == "an error":
        with pytest.raises(RuntimeError), torch.no_grad(), FewRows(model).of(8):
            model(torch.zeros(8, 1, 511))
    with torch.set_grad_enabled(case == "gradients"), torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        rows = 1 if case == "an error" else 8
        with FewRows(model).of(rows):
            assert not any("forward" in vars(layer) for layer in model)


# The rest -----------------------------------------------------------------------------------------


def test_the_fused_optimizer_takes_the_same_steps():
    results = []
    for fused_kernel in (False, True):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(size)) for size in ((5, 3), (4,), (2, 2))]
        optimizer = make_optimizer(parameters, 1e-2, 0.1, fused=fused_kernel)
        assert optimizer.defaults["fused"] is fused_kernel
        for step in range(20):
            for parameter in parameters:
                parameter.grad = torch.sin(parameter.detach() * (step + 1))
            optimizer.step()
        results.append([parameter.detach().clone() for parameter in parameters])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def in_a_process(code, **environment):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "ONEDNN_"))}
    return subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, check=True, timeout=120
    ).stdout.split()


def test_the_environment_is_prepared_before_torch_and_leaves_what_is_set():
    code = (
        "import sys, os; from graft.engine.runtime import prepare_environment; prepare_environment();"
        "names = ('GOMP_SPINCOUNT', 'ONEDNN_PRIMITIVE_CACHE_CAPACITY');"
        "print('torch' in sys.modules, *(os.environ.get(name) for name in names))"
    )
    assert in_a_process(code) == ["False", "1000", "64"]
    assert in_a_process(code, OMP_WAIT_POLICY="ACTIVE") == ["False", "None", "64"]
    given = {"GOMP_SPINCOUNT": "7", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "9"}
    assert in_a_process(code, **given) == ["False", "7", "9"]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_is_kept_for_reuse():
    """Blocks that are freed and asked for again cost no page faults."""
    code = (
        "import resource, sys, torch; from graft.engine.runtime import keep_freed_memory;"
        "kept = {} and keep_freed_memory();"
        "sums = [float(torch.ones(1 << 24).sum()) for _ in range(5)];"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt;"
        "sums = [float(torch.ones(1 << 24).sum()) for _ in range(10)];"
        "print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    with_it = in_a_process(code.format("True"))
    without = in_a_process(code.format("False"))
    if with_it[0] != "True":
        pytest.skip("no glibc")
    assert int(with_it[1]) < 0.5 * int(without[1])


def test_libraries_other_than_glibc_are_left_alone(monkeypatch):
    monkeypatch.setattr(runtime, "platform", SimpleNamespace(libc_ver=lambda: ("musl", "1.2")))
    assert runtime.keep_freed_memory() is False


@pytest.mark.parametrize(
    ("command", "given", "anew"),
    [(["train", "x"], None, True), (["compare"], None, True), (["plan", "x"], None, False), ([], None, False),
     (["train", "x"], "glibc.malloc.check=3", False)],
)  # fmt: skip
def test_long_commands_start_anew_once(monkeypatch, command, given, anew):
    started = []
    monkeypatch.setattr(runtime.os, "execv", lambda *told: started.append(told))
    monkeypatch.setattr(runtime.sys, "platform", "linux")
    monkeypatch.setattr(runtime.sys, "orig_argv", ["python", "-X", "utf8", "-m", "graft", *command])
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if given is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", given)
    runtime.start_anew(command)
    runtime.start_anew(command)  # the process that was started comes here too
    expected = [(sys.executable, [sys.executable, "-X", "utf8", "-m", "graft", *command])]
    assert started == (expected if anew else [])


@pytest.mark.parametrize("kind", [tiny, tiny_chat])
def test_a_whole_run_gives_the_same_with_and_without_the_engine(kind, tmp_path):
    data = kind.write_all(tmp_path / "data")
    method = {"name": "lora", "learning_rate": 2e-2, "lora_dropout": 0.0}
    reports = [
        execute(kind.recipe(data, method=method, engine=engine.model_dump()), tmp_path / name)
        for name, engine in (("off", OFF), ("on", Engine()))
    ]
    first, second = reports
    assert first["steps"] == second["steps"] > 10
    # Dropout of the BERT base draws other numbers in another kernel.
    tolerance = 0.25 if kind is tiny else 2e-3
    for a, b in zip(first["curve"], second["curve"], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=tolerance)


def test_full_tuning_of_short_rows_in_bf16():
    """In place, fp32 weights under autocast: rotary positions make fp32 queries and keys of them, values stay bf16."""
    base = Base(bases.llama())
    choose_kernels(base)
    adapter = read_method("full").build(base, "tuned")
    attach(base, adapter)
    base.model.train()
    ids = torch.arange(2 * 9).view(2, 9) % 20 + 3
    mask = torch.ones_like(ids)
    with torch.autocast("cpu", torch.bfloat16):
        states = hidden_states(base, {"input_ids": ids, "attention_mask": mask}, "tuned").last
    states.float().square().sum().backward()
    gradients = [parameter.grad for name, parameter in adapter.trainable() if "q_proj" in name or "v_proj" in name]
    assert gradients
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)
