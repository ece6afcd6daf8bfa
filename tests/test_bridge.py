"""The bridge to peft's tuners: each of them at Graft's sites gives what peft gives, and its folders go both ways."""

import ast
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import bases
import peft
import pytest
import tiny
import torch
from peft_tools import difference, given, loss_of, make, our_values, peft_values, peft_warnings, shake, twin, wrapped
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from graft import assess
from graft.errors import DamagedError, NotMergeable, UsageError
from graft.methods import store
from graft.methods.base import read_method
from graft.methods.peft import TRANSPOSED, UNFIT, PeftBridge
from graft.objectives.classify import Classify
from graft.parts.attach import attach, detach, merge_into
from graft.parts.head import scores
from graft.recipe import Recipe
from graft.routing import Route
from graft.run import execute

SAID = (
    "Failed to load the CUDA extension",
    "Setting boft_n_butterfly_factor",
    "Detected that the base layer",
    "Sparse invariant checks are implicitly disabled",
)
"""What peft's tuners say of themselves, with and without the bridge."""
pytestmark = [pytest.mark.slow, *(pytest.mark.filterwarnings(f"ignore:{said}") for said in SAID)]

TUNERS: dict[str, dict[str, Any]] = {
    "ADAMSS": {"r": 8, "num_subspaces": 2},
    "BEFT": {},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 30, "scaling": 5.0},
    "FROD": {"progressbar": False, "sparse_rate": 0.05},
    "GLORA": {"r": 4},
    "GRALORA": {"r": 8, "alpha": 8},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "LOHA": {"r": 4, "alpha": 8},
    "LOKR": {"r": 2, "alpha": 3},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 8},
    "OSF": {"effective_rank": 4},
    "PEANUT": {"r": 4, "depth": 2, "act_fn": "silu"},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 8},
    "RANDLORA": {"r": 4, "randlora_alpha": 8},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {"sparsity": 0.9},
    "TINYLORA": {"r": 2, "u": 8},
    "UNILORA": {"r": 4, "theta_d_length": 64},
    "VBLORA": {"r": 2, "num_vectors": 16, "vector_length": 8},
    "WAVEFT": {"n_frequency": 30},
}
"""Every tuner that can be bridged, sized for a base 32 wide."""
MISSING = set() if find_spec("sklearn") else {"ADAMSS"}
"""Tuners that need scikit-learn, which the tests do not install."""
USED = sorted(TUNERS.keys() - MISSING)
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "bert": ["query", "value"], "gpt2": ["c_attn", "c_proj"]}
CASES = [(kind, family) for kind in USED for family in TARGETS if family != "gpt2" or kind in TRANSPOSED]
MIXING = {"BOFT", "FROD", "GLORA", "HRA", "OFT", "SHIRA", "SUPERTUNING"}
"""Tuners that compute from the weight, without the site's output."""


def method(kind: str, targets: list[str] | None, **more: Any) -> dict[str, Any]:
    config = {"peft_type": kind} | TUNERS.get(kind, {}) | more
    return {"name": "peft", "config": config} | ({"target_modules": targets} if targets else {})


def ours(kind: str, family: str, targets: list[str] | None = None):
    """A base and an attached adapter, away from its starting values."""
    base = make(family)
    torch.manual_seed(1)
    adapter = read_method(method(kind, targets or TARGETS[family])).build(base, "mine")
    attach(base, adapter)
    shake(adapter, 0.3 if kind == "PEANUT" else 0.1)  # four matrices in a row
    return base, adapter.eval()


def theirs(base, kind: str, family: str, head: bool = False) -> peft.PeftModel:
    """peft's model on the same base, its adapter as peft starts it."""
    transposed = {"fan_in_fan_out": True} if family == "gpt2" else {}
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind](**TUNERS[kind], **transposed, target_modules=TARGETS[family])
    torch.manual_seed(1)
    return wrapped(base, family, config, head).eval()


def hidden(base, entry, batch):
    with torch.no_grad(), base.route(entry):
        return base.hidden(batch).last


# Which tuners ------------------------------------------------------------------------------------


def test_every_type_of_the_installed_peft_is_tried_or_refused():
    installed = {str(kind.value) for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING}
    own = {cls.peft_type for cls in bases.methods().values()} & installed
    assert len(TUNERS) == 28
    assert not TUNERS.keys() & (UNFIT.keys() | own)
    assert installed == TUNERS.keys() | UNFIT.keys() | own
    assert len(CASES) == 2 * len(USED) + 11 >= 65


def test_a_tuner_that_misses_a_package_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(UsageError, match="pip install scikit-learn"):
        read_method(method("ADAMSS", None)).build(make("bert"), "x")


# Parity ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_outputs_and_gradients_equal_pefts(kind, family):
    base, adapter = ours(kind, family)
    model = theirs(base, kind, family)
    _, stored = adapter.method.to_folder(adapter, base)
    assert peft.get_peft_model_state_dict(model).keys() == stored.keys()
    peft.set_peft_model_state_dict(model, {name: tensor.clone() for name, tensor in stored.items()})
    batch = given(family)
    plain, mine = our_values(base, None, batch), our_values(base, "mine", batch)
    reference, _ = peft_values(model, family, batch)
    assert mine.keys() == reference.keys()
    for name in mine:
        difference(mine[name].detach(), reference[name].detach(), name)
        assert float((mine[name] - plain[name]).detach().abs().max()) > 1e-3
    loss_of(mine, batch).backward()
    loss_of(reference, batch).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {name: p for name, p in adapter.shared.named_parameters() if p.requires_grad}
    assert found.keys() == trained.keys()
    assert len(adapter.trainable()) == len(found) > 0
    for name in found:
        difference(found[name].grad, trained[name].grad, f"gradient of {name}")
    assert not any(p.grad is not None for path, p in base.model.named_parameters() if ".graft." not in path)


@pytest.mark.parametrize("kind", USED)
def test_nothing_of_the_base_is_touched(kind):
    base = make("llama")
    condition = bases.Condition(base)
    own = {id(tensor) for tensor in base.model.parameters()}
    storages = {tensor.untyped_storage().data_ptr() for tensor in base.model.parameters()}
    adapter = read_method(method(kind, ["all-linear"])).build(base, "mine")
    assert not condition.changes(base)
    tensors = [tensor for _, tensor in adapter.named_tensors()]
    assert not own & {id(tensor) for tensor in tensors}
    assert not storages & {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert {id(p) for p in adapter.parameters()} == {id(t) for t in tensors if isinstance(t, nn.Parameter)}
    attach(base, adapter)
    base.model.train()
    adapter.train()
    optimizer = torch.optim.AdamW([tensor for _, tensor in adapter.trainable()], lr=1e-2)
    moved = {name: tensor.detach().clone() for name, tensor in adapter.trainable()}
    for _ in range(2):
        loss_of(our_values(base, "mine", given("llama")), given("llama")).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert moved
    assert not [name for name, tensor in adapter.trainable() if torch.equal(tensor, moved[name])]
    assert all(torch.equal(base.state()[name], tensor) for name, tensor in condition.tensors.items())
    base.model.eval()
    detach(base, "mine")
    assert not condition.changes(base)


@pytest.mark.parametrize("kind", USED)
def test_rows_alone_equal_rows_mixed_and_stacked(kind):
    base, _ = ours(kind, "bert", ["query", "value", "mlp.down"])
    bases.put(base, "lora", shake=0.3)
    entries = ["mine", None, ("lora", "mine"), "lora"]
    batch = bases.batch(4, 9, "right")
    mixed = hidden(base, Route.of(entries), batch)
    alone = []
    for row, entry in enumerate(entries):
        real = batch["attention_mask"][row].bool()
        one = {key: value[row : row + 1, real] for key, value in batch.items()}
        alone.append(hidden(base, entry, one))
        torch.testing.assert_close(mixed[row][real], alone[-1][0], atol=2e-5, rtol=1e-5)
    both, single = hidden(base, ("lora", "mine"), batch), hidden(base, "mine", batch)
    assert float((both - single).abs().max()) > 1e-2  # the second does not undo the first
    follows = {part.follows for part in base.adapters["mine"].parts}
    assert follows == {kind not in MIXING}


def test_a_tuner_that_reads_the_weight_adds_its_change_to_what_is_there():
    _, adapter = ours("OFT", "bert", ["layers.0.attn.q"])
    site, part = adapter.placed[0]
    x, other = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    y = F.linear(x, site.dense_weight(), site.bias)
    with torch.no_grad():
        torch.testing.assert_close(part.after(x, y + other), part.after(x, y) + other, atol=1e-5, rtol=1e-5)
        assert float((part.after(x, y) - y).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", USED)
def test_bf16_with_autocast(kind):
    base = make("llama")
    base.model.to(torch.bfloat16)
    adapter = read_method(method(kind, TARGETS["llama"])).build(base, "mine")
    attach(base, adapter)
    assert {tensor.dtype for _, tensor in adapter.trainable()} == {torch.float32}
    shake(adapter, 0.01)
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), base.route("mine"):
            output = base.hidden(given("llama")).last
        assert output.dtype == torch.bfloat16
        output.float().square().mean().backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for _, tensor in adapter.trainable())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_code_compiled_for_all_layers_is_compiled_once():
    base, _ = ours("LOHA", "llama")
    expected = hidden(base, "mine", given("llama"))
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for layer in base.body.layers:
        layer.compile(backend=backend, dynamic=True)
    torch.testing.assert_close(hidden(base, "mine", given("llama")), expected, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1


# Merging -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", USED)
@pytest.mark.parametrize("targets", [["c_attn", "c_proj", "c_fc"], ["attn.q", "attn.v"]])
def test_merged_equals_attached(kind, targets):
    base, adapter = ours(kind, "gpt2", targets)
    assert len({site.path for site, _ in adapter.placed}) == (8 if "c_fc" in targets else 2)
    attached = hidden(base, "mine", given("gpt2"))
    assert float((attached - hidden(base, None, given("gpt2"))).abs().max()) > 1e-3
    training = [module.training for module in adapter.modules()]
    update = adapter.placed[0][1].merge(adapter.placed[0][0])
    assert [module.training for module in adapter.modules()] == training
    assert torch.equal(hidden(base, "mine", given("gpt2")), attached)
    assert ("transformer.h.0.attn.c_attn.bias" in update) == (kind in ("ADAMSS", "BEFT", "GLORA", "ROAD"))
    merge_into(base, "mine")
    torch.testing.assert_close(hidden(base, None, given("gpt2")), attached, atol=1e-5, rtol=1e-5)


def test_what_peft_cannot_merge_is_refused_with_its_reason(monkeypatch):
    base, adapter = ours("BEFT", "llama")
    before = {name: tensor.clone() for name, tensor in base.state().items()}
    with pytest.raises(NotMergeable, match=r"BEFT at layers.0.attn.q: Base layer has no bias"):
        merge_into(base, "mine")
    base, adapter = ours("LOHA", "llama")
    layer = type(adapter.placed[0][1].layer)
    with monkeypatch.context() as patch:
        patch.setattr(layer, "merge", lambda self, safe_merge: None)
        with pytest.raises(NotMergeable, match=r"LOHA at layers.0.attn.q: merged by peft, its outputs differ by"):
            merge_into(base, "mine")
    adapter.placed[-1][1].layer.hada_w1_a["default"].data.fill_(float("nan"))
    with pytest.raises(NotMergeable, match="NaNs"):
        merge_into(base, "mine")
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state().items())
    assert base.adapters["mine"] is adapter


def test_a_run_of_an_adapter_that_cannot_be_merged_has_its_figures(tmp_path, monkeypatch):
    place = tiny.write_all(tmp_path / "tiny")

    def refuse(base: Any, name: str) -> None:
        raise NotMergeable("not this one")

    monkeypatch.setattr(assess, "merge_into", refuse)
    recipe: Recipe = tiny.recipe(place, method=method("OFT", None), training={"max_steps": 2})
    report = execute(recipe, tmp_path / "run")
    assert report["method"] == "peft"
    assert report["latency_ms"] > 0
    assert report["merged_latency_ms"] is report["merged_difference"] is None


# Folders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_folders_go_both_ways(kind, family, tmp_path):
    base, adapter = ours(kind, family)
    batch = given(family)
    with torch.no_grad():
        mine = our_values(base, "mine", batch)
    store.save(adapter, base, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["peft_type"] == kind
    with peft_warnings(), torch.no_grad():
        model = peft.PeftModel.from_pretrained(twin(base, family), tmp_path / "ours").eval()
        reference, _ = peft_values(model, family, batch)
    for name in mine:
        difference(reference[name], mine[name], name)
    model.peft_config["default"].base_model_name_or_path = None  # peft would look for it on the hub
    model.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "graft.json").exists()
    for folder in ("ours", "theirs"):
        fresh = make(family)
        torch.manual_seed(99)  # what building draws must not matter
        read = store.load(fresh, tmp_path / folder, "read")
        assert isinstance(read.method, PeftBridge)
        assert [site.path for site, _ in read.placed] == [site.path for site, _ in adapter.placed]
        with torch.no_grad():
            again = our_values(fresh, "read", batch)
        for name in mine:
            torch.testing.assert_close(again[name], mine[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["LOHA", "OFT", "VBLORA"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_folders_with_a_task_head_go_both_ways(kind, family, tmp_path):
    base, adapter = ours(kind, family)
    Classify(head_dropout=0.0).prepare(base, adapter, ("a", "b", "c"))
    adapter.eval()
    batch = given(family, head=True)
    with torch.no_grad():
        mine = scores(base, batch, "mine")
    store.save(adapter, base, tmp_path / "ours")
    with peft_warnings(), torch.no_grad():
        model = peft.PeftModel.from_pretrained(twin(base, family, head=True), tmp_path / "ours").eval()
        difference(model(**batch).logits, mine, "scores")
    model.peft_config["default"].base_model_name_or_path = None  # peft would look for it on the hub
    model.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        fresh = make(family)
        store.load(fresh, tmp_path / folder, "read")
        with torch.no_grad():
            difference(scores(fresh, batch, "read"), mine, "scores")


@pytest.mark.parametrize("kind", USED)
@pytest.mark.parametrize("targets", [["attn.q", "attn.v"], ["attn.k", "c_fc"]])
def test_where_peft_has_no_such_layer_the_folder_is_grafts(kind, targets, tmp_path):
    base, adapter = ours(kind, "gpt2", targets)
    before = hidden(base, "mine", given("gpt2"))
    store.save(adapter, base, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "GRAFT_PEFT"
    fresh = make("gpt2")
    torch.manual_seed(99)
    store.load(fresh, tmp_path / "a", "again")
    torch.testing.assert_close(hidden(fresh, "again", given("gpt2")), before, atol=1e-6, rtol=1e-6)
    (tmp_path / "a" / "graft.json").unlink()
    with pytest.raises(DamagedError, match=r"graft.json is missing"):
        store.load(make("gpt2"), tmp_path / "a", "other")


def test_two_kinds_of_layers_make_a_folder_of_grafts():
    base, adapter = ours("FOURIERFT", "gpt2", ["c_attn", "head"])
    assert adapter.method.to_folder(adapter, base)[0]["peft_type"] == "GRAFT_PEFT"
    base, adapter = ours("FOURIERFT", "gpt2", ["c_attn"])
    assert adapter.method.to_folder(adapter, base)[0]["peft_type"] == "FOURIERFT"


def test_ranks_by_path_are_read_from_a_task_model(tmp_path):
    base = make("bert")
    path = "bert.encoder.layer.1.attention.self.query"
    config = peft.LoHaConfig(r=4, alpha=8, target_modules=["query"], rank_pattern={path: 2}, alpha_pattern={path: 3})
    model = wrapped(base, "bert", config, head=True).eval()
    shake(model)
    model.peft_config["default"].base_model_name_or_path = None  # peft would look for it on the hub
    model.save_pretrained(tmp_path / "theirs")
    read = store.load(base, tmp_path / "theirs", "read")
    assert [part.layer.hada_w1_a["default"].shape[1] for part in read.parts] == [4, 2]
    batch = given("bert", head=True)
    with torch.no_grad():
        difference(scores(base, batch, "read"), model(**batch).logits, "scores")


def edit(**changes: Any):
    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def tensors(change):
    def damage(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        values = load_file(path)
        change(values)
        save_file(values, path)

    return damage


def drop(values):
    del values[next(name for name in values if "layers.0" in name)]


def cut(values):
    name = next(name for name in values if "layers.0" in name)
    values[name] = values[name][..., :1].clone()


def far(values):
    name = next(name for name in values if "indices" in name)
    values[name] = values[name].clone().fill_(10_000)


DAMAGES = {
    "one is missing": ("LOHA", tensors(drop), "of 24 tensors 1 missing"),
    "one more": ("LOHA", tensors(lambda v: v.update(x=torch.zeros(2))), r"1 unexpected \(x\)"),
    "another shape": ("LOHA", tensors(cut), "of 24 tensors 1 of another shape"),
    "another rank": ("LOHA", edit(r=5), "of 24 tensors 24 of another shape"),
    "no tensors": ("LOHA", tensors(lambda v: v.clear()), "no tensor says where LOHA sits|0 tensors|missing"),
    "another base": (
        "LOHA",
        tensors(lambda v: v.update({"base_model.model.encoder.x.hada_w1_a": torch.zeros(2)})),
        "1 of 7 adapted modules are not in llama",
    ),
    "modules without tensors": ("LOHA", edit(target_modules=["q_proj", "o_proj"]), "2 modules of target_modules have"),
    "unknown key": ("LOHA", edit(magic=3), "magic = 3 is not supported"),
    "a trained bias": ("OFT", edit(bias="all"), "bias = 'all' is not supported"),
    "regular expression": ("LOHA", edit(rank_pattern={"(a+)+$": 2}), "regular expression"),
    "settings of no kind": ("LOHA", edit(alpha="x"), "peft refuses it for LOHA"),
    "indices outside": ("SHIRA", tensors(far), "shira_indices holds indices that do not fit"),
    "indices outside, flat": ("SUPERTUNING", tensors(far), "supertuning_indices holds indices that do not fit"),
    "indices of another key": ("FROD", tensors(far), "frod_s_indices.* holds indices that do not fit"),
    "targets by a pattern": ("UNILORA", edit(target_modules="(a+)+$"), "no tensor says where UNILORA sits"),
    "a type of none": ("LOHA", edit(peft_type="LOHAA"), "peft_type 'LOHAA' cannot be read"),
    "a type that is refused": ("LOHA", edit(peft_type="LILY"), "peft_type 'LILY' cannot be read"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_folders(case, tmp_path):
    kind, damage, said = DAMAGES[case]
    base = make("llama")
    theirs(base, kind, "llama").save_pretrained(tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(DamagedError, match=said):
        store.load(base, tmp_path / "a", "x")
    assert not base.adapters


def test_targets_by_a_pattern_are_read_from_the_tensors(tmp_path):
    base = make("llama")
    theirs(base, "LOHA", "llama").save_pretrained(tmp_path / "a")
    edit(target_modules=".*(q_proj|v_proj|down_proj)")(tmp_path / "a")
    assert len(store.load(base, tmp_path / "a", "x").placed) == 6


# Settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "peft_type is missing"),
        ({"peft_type": "LORA"}, "LORA is a method of Graft: write `name: lora`"),
        ({"peft_type": "prefix_tuning"}, "PREFIX_TUNING is a method of Graft: write `name: prefix`"),
        ({"peft_type": "LILY"}, "LILY cannot be bridged: it averages over all tokens"),
        ({"peft_type": "CPT"}, "CPT cannot be bridged: it trains virtual tokens; see `prompt`"),
        ({"peft_type": "LOHAA"}, "the installed peft has no peft_type 'LOHAA'; did you mean 'LOHA'"),
        ({"peft_type": "LOHA", "rang": 3}, "LOHA has no setting 'rang'"),
        ({"peft_type": "LOHA", "alhpa": 3}, "LOHA has no setting 'alhpa'; did you mean 'alpha'"),
        ({"peft_type": "LOHA", "r": 0}, "peft refuses it for LOHA"),
        ({"peft_type": "LOHA", "r": "many"}, "peft refuses it for LOHA"),
        ({"peft_type": "C3A", "block_size": 7}, "peft refuses it for C3A"),
        ({"peft_type": "LOHA", "target_modules": ["q_proj"]}, "target_modules does not belong there: give it beside"),
        ({"peft_type": "OFT", "bias": "all"}, "bias does not belong there: the base's biases stay"),
        ({"peft_type": "LOHA", "rank_pattern": {".*": 3}}, "rank_pattern has the regular expression"),
    ],
)
def test_settings_that_are_refused(config, said):
    with pytest.raises(UsageError, match=said) as caught:
        read_method({"name": "peft", "config": config}).build(make("llama"), "x")
    assert "\n" not in str(caught.value)


def test_every_refusal_is_one_line():
    for kind in UNFIT:
        with pytest.raises(UsageError, match=kind) as caught:
            read_method({"name": "peft", "config": {"peft_type": kind}})
        assert "\n" not in str(caught.value)


def test_without_peft(monkeypatch):
    base = make("bert")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match="pip install peft"):
        read_method("peft").build(base, "x")


def test_the_default_starts_as_the_base():
    base = make("gpt2")
    adapter = read_method("peft").build(base, "mine")
    attach(base, adapter.eval())
    assert adapter.shared.peft_config["default"].alpha == 16
    assert adapter.trainable_count() == 2 * 2 * 8 * (32 + 96)
    assert torch.equal(hidden(base, "mine", given("gpt2")), hidden(base, None, given("gpt2")))


def test_peft_is_imported_only_when_it_is_needed():
    """It takes seconds, which the command line would spend at every start."""
    files = sorted(Path(assess.__file__).parent.rglob("*.py"))
    assert len(files) > 40
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "peft"], file
