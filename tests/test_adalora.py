"""AdaLoRA against the installed peft: outputs, loss and gradients, the whole schedule, and folders both ways."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_tools import (
    Match,
    Pair,
    difference,
    given,
    loss_of,
    make,
    our_values,
    ours,
    peft_values,
    peft_warnings,
    same,
    shake,
    twin,
    wrapped,
)
from safetensors.torch import load_file, save_file

from graft.errors import DamagedError, RecipeError, UsageError
from graft.methods import store
from graft.methods.adalora import Adalora, Memory
from graft.methods.base import Progress, read_method
from graft.objectives.base import Result
from graft.objectives.classify import Classify, LabelledExample
from graft.parts.attach import attach, merge_into
from graft.train import checkpoint
from graft.train.loop import Trainer, make_accelerator
from graft.train.settings import Training

TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "bert": ["query", "value"]}
TASKS = [("llama", False), ("gpt2", False), ("bert", True), ("llama", True)]
"""Family, and whether there is a task head: without one peft gives BERT no loss, and so no penalty."""
SMALL = {"init_r": 6, "target_r": 3, "lora_alpha": 9.0}
STEPS = 40


def peft_config(kind: str, **settings: Any) -> peft.AdaLoraConfig:
    given = {"total_step": STEPS, "target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2"}
    return peft.AdaLoraConfig(**given | SMALL | settings)


def pair(kind: str, head: bool = False, **settings: Any) -> Pair:
    """The same adapter in both; every tensor that either of them trains is matched."""
    base, adapter = ours(kind, {"name": "adalora"} | SMALL | settings, head)
    model = wrapped(base, kind, peft_config(kind, **settings), head)
    prefix = f"{base.family.task_prefix}." if head and base.family.task_prefix else ""
    matches = []
    for site, part in adapter.placed:
        layer = model.get_base_model().get_submodule(prefix + site.path)
        for name, parameter in part.named_parameters():
            matches.append(Match(f"{site.name}.{name}", (parameter,), getattr(layer, name)["default"]))
    if head:
        saved = model.get_base_model().get_submodule(adapter.head.names["out"]).modules_to_save["default"]
        matches += [
            Match(f"head {name}", (value,), saved.get_parameter(name))
            for name, value in adapter.head.out.named_parameters()
        ]
    with torch.no_grad():
        for match in matches:
            match.theirs.copy_(match.ours[0])
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(match.theirs) for match in matches}
    assert [id(p) for _, p in adapter.trainable()] == [id(match.ours[0]) for match in matches]
    return Pair(kind, base, adapter, model, matches)


def backward(both: Pair, padded: str | None = "right") -> dict[str, float]:
    """Losses with the penalty and their gradients, in both; the largest differences."""
    head = both.adapter.head is not None
    batch = given(both.kind, head, padded)
    mine = our_values(both.base, "mine", batch, head)
    theirs, their_loss = peft_values(both.model, both.kind, batch, head)
    found = same(mine, theirs)
    penalty = both.adapter.method.penalty(both.adapter)
    our_loss = loss_of(mine, batch) + penalty
    assert float(penalty.detach()) > 0.1
    found["loss"] = difference(our_loss.detach(), their_loss.detach(), "loss")
    our_loss.backward()
    their_loss.backward()
    for match in both.matches:
        found[f"d {match.name}"] = difference(match.ours[0].grad, match.theirs.grad, f"gradient of {match.name}")
    return found


# Outputs, loss and gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("padded", [None, "right"])
@pytest.mark.parametrize(("kind", "head"), TASKS)
def test_outputs_loss_and_gradients(kind, head, padded):
    both = pair(kind, head)
    found = backward(both, padded)
    sites = 2 if kind == "gpt2" else 4
    assert len(both.adapter.placed) == sites
    assert len(found) == (1 if head else 2) + 1 + 3 * sites + (0 if not head else 2 if kind == "bert" else 1)
    with torch.no_grad():
        batch = given(kind, False, padded)
        plain, adapted = (our_values(both.base, name, batch) for name in (None, "mine"))
    assert float((plain["states"] - adapted["states"]).abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("given_settings", "spelled", "modules"),
    [
        ({"target_modules": ["attn.o", "mlp.gate"]}, {"target_modules": ["o_proj", "gate_proj"]}, 4),
        ({"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1]}, {}, 2),
        ({"orth_reg_weight": 0.02, "init_r": 1, "target_r": 1}, {}, 4),
    ],
)
def test_settings_mean_what_they_mean_in_peft(given_settings, spelled, modules):
    base, adapter = ours("llama", {"name": "adalora"} | SMALL | given_settings)
    model = wrapped(base, "llama", peft_config("llama", **given_settings | spelled))
    assert sorted(model.targeted_module_names) == sorted(site.path for site, _ in adapter.placed)
    assert len(adapter.placed) == modules
    with torch.no_grad():
        for site, part in adapter.placed:
            layer = model.get_base_model().get_submodule(site.path)
            for name, parameter in part.named_parameters():
                getattr(layer, name)["default"].copy_(parameter)
        batch = given("llama", padded="right")
        mine, (theirs, their_loss) = our_values(base, "mine", batch), peft_values(model, "llama", batch)
        same(mine, theirs)
        difference(loss_of(mine, batch) + adapter.method.penalty(adapter), their_loss, "loss")


def test_it_starts_as_the_base_with_the_scale_of_lora():
    base = make("llama")
    adapter, lora = (read_method(name).build(base, name) for name in ("adalora", "lora"))
    for (_, part), (_, other) in zip(adapter.placed, lora.placed, strict=True):
        assert part.scale == pytest.approx(other.scale, rel=1e-5)
        assert not part.lora_E.any()
        assert float(part.lora_A.detach().std()) == pytest.approx(0.02, rel=0.2)
        assert float(part.lora_B.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert adapter.method.penalty(adapter) is not None
    assert Adalora(orth_reg_weight=0).penalty(adapter) is None


# The schedule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        ("llama", {"tinit": 4, "tfinal": 12, "deltaT": 1}),
        ("llama", {"tinit": 0, "tfinal": 10, "deltaT": 3, "target_r": 1, "beta1": 0.5, "beta2": 0.9}),
        ("llama", {"tinit": 5, "tfinal": 0, "deltaT": 4}),
        ("gpt2", {"tinit": 10, "tfinal": 15, "deltaT": 7, "target_r": 5}),
        ("bert", {"tinit": 1, "tfinal": 20, "deltaT": 2, "target_r": 2}),
    ],
)
def test_the_schedule_is_pefts(kind, schedule):
    """The same gradients in both: E, with what is pruned in it, is bit for bit the same after every step."""
    both = pair(kind, kind == "bert", **schedule)
    method, memory, sites = both.adapter.method, both.adapter.shared, both.adapter.placed
    optimizers = [
        torch.optim.AdamW([match.ours[0] for match in both.matches], lr=2e-3),
        torch.optim.AdamW([match.theirs for match in both.matches], lr=2e-3),
    ]
    counts = []
    for step in range(1, STEPS + 1):
        progress = Progress(step, STEPS)
        method.before_step(both.adapter, progress)
        backward(both)
        for match in both.matches:
            match.ours[0].grad.copy_(match.theirs.grad)
        for optimizer in optimizers:
            optimizer.step()
        method.after_optimizer(both.adapter, progress)
        both.model.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for match in both.matches:
            assert torch.equal(match.ours[0], match.theirs), f"step {step}, {match.name}"
        counts.append(sum(int(part.lora_E.count_nonzero()) for _, part in sites))
        final = step >= STEPS - schedule["tfinal"]
        assert method.settled(progress) == final
        assert bool(memory.kept.all()) != final
        if not final:
            theirs = _averages(both)
            torch.testing.assert_close(memory.sensitivity, theirs[0], rtol=1e-5, atol=1e-12)
            torch.testing.assert_close(memory.uncertainty, theirs[1], rtol=1e-3, atol=1e-12)
    target = method.target_r * len(sites)
    assert counts[schedule["tinit"]] <= 6 * len(sites)
    assert min(counts) == target
    assert counts[STEPS - schedule["tfinal"] - 1 :] == [target] * (schedule["tfinal"] + 1)
    pattern = both.model.peft_config["default"].rank_pattern
    prefix = "bert." if kind == "bert" else ""
    theirs = [pattern[f"{prefix}{site.path}.lora_E.default"] for site, _ in sites]
    assert memory.kept.tolist() == theirs


def _averages(both: Pair) -> list[torch.Tensor]:
    """peft's two moving averages, in the order of ours."""
    names = {id(parameter): name for name, parameter in both.model.base_model.model.named_parameters()}
    keys = [names[id(match.theirs)] for match in both.matches if ".lora_" in match.name]
    allocator = both.model.base_model.rankallocator
    return [
        torch.cat([average[key].flatten() for key in keys])
        for average in (allocator.exp_avg_ipt, allocator.exp_avg_unc)
    ]


def test_equal_importance_keeps_the_budget():
    """Gradients that underflow give every triplet the importance 0; peft prunes all of them."""
    both = pair("llama", tinit=0, tfinal=0)
    for _ in range(2):
        for match in both.matches:
            match.ours[0].grad = torch.full_like(match.ours[0], 1e-30)
            match.theirs.grad = match.ours[0].grad.clone()
        both.adapter.method.after_optimizer(both.adapter, Progress(STEPS, STEPS))
    both.model.base_model.update_and_allocate(1)
    found = [sum(int(e.count_nonzero()) for e in energies) for energies in _energies(both)]
    assert found == [12, 0]


def _energies(both: Pair) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    matches = [match for match in both.matches if match.name.endswith("lora_E")]
    return [match.ours[0] for match in matches], [match.theirs for match in matches]


def test_nothing_is_pruned_where_both_ranks_are_the_same():
    """peft looks for the 0th smallest importance then, and fails."""
    both = pair("llama", tinit=0, tfinal=10, init_r=4, target_r=4)
    for step in range(1, STEPS + 1):
        for match in both.matches:
            match.ours[0].grad = torch.randn_like(match.ours[0])
        both.adapter.method.after_optimizer(both.adapter, Progress(step, STEPS))
    assert all(bool(e.all()) for e in _energies(both)[0])
    for match in both.matches:
        match.theirs.grad = match.ours[0].grad.clone()
    with pytest.raises(RuntimeError, match="kthvalue"):
        both.model.base_model.update_and_allocate(1)


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 9, 10, 30, 100, 1234])
def test_a_schedule_left_out_is_a_share_of_the_run(total):
    first, last, every = Adalora().schedule(total)
    assert 0 <= first < last <= total
    assert first >= 2 or total <= 2
    assert every == max(1, total // 100)
    if total >= 30:
        assert (first, total - last) == (math.floor(0.1 * total), math.floor(0.3 * total))
    assert Adalora(tinit=total - 1).schedule(total) == (total - 1, total, every)
    if total > 2:
        assert Adalora(tfinal=total - 1).schedule(total) == (0, 1, every)


@pytest.mark.parametrize(
    ("settings", "total"),
    [({"tinit": 10, "tfinal": 10}, 20), ({"tinit": 5}, 5), ({"tfinal": 7}, 7), ({"tinit": 3, "tfinal": 0}, 2)],
)
def test_a_schedule_that_does_not_fit_the_run(settings, total):
    base = make("llama")
    adapter = read_method({"name": "adalora"} | SMALL | settings).build(base, "x")
    with pytest.raises(UsageError, match=rf"tinit and tfinal: .* leave none of {total} steps") as caught:
        adapter.method.before_step(adapter, Progress(1, total))
    assert "\n" not in str(caught.value)


# Training -----------------------------------------------------------------------------------------


class Falling(Classify):
    """Every evaluation is worse than the one before: the best allowed is the first allowed."""

    name = "falling"
    asked: int = 0

    def evaluate(self, base, examples, entry, batch_size, report=None, quick=False):
        result = super().evaluate(base, examples, entry, batch_size)
        self.asked += 1
        return Result(1 / self.asked, result.loss, result.correct)


def trained(folder: Path | None, steps: int, objective: Classify, kind: str = "bert", **settings: Any):
    base = make(kind)
    torch.manual_seed(1)
    adapter = read_method({"name": "adalora"} | SMALL | settings).build(base, "mine")
    objective.prepare(base, adapter, ("no", "yes"))
    attach(base, adapter)
    rows = [LabelledExample([3 + i, 5 + i % 2, 7 + i, 1], None, i % 2, f"row {i}") for i in range(24)]
    training = Training(
        max_steps=steps, num_train_epochs=100, per_device_train_batch_size=4, eval_steps=4, max_grad_norm=10
    )
    made = Trainer(base, adapter, objective, training, 5e-3, 1, make_accelerator("fp32"), folder)
    return adapter, made.fit(rows, rows)


def ranks(adapter: Any) -> list[int]:
    return [int(part.lora_E.count_nonzero()) for part in adapter.parts]


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_a_run_ends_with_the_budget(kind, weight):
    adapter, fit = trained(None, 24, Classify(), kind, orth_reg_weight=weight)
    assert fit.steps == 24
    assert sum(ranks(adapter)) == 3 * len(adapter.parts)
    # In runs as short as this one the penalty's gradient, which is much the same everywhere, outweighs the loss's.
    assert weight or min(ranks(adapter)) < max(ranks(adapter))
    assert fit.points[-1].train_loss < fit.points[0].train_loss


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_short_runs_end_with_the_budget(steps):
    adapter, _ = trained(None, steps, Classify())
    assert sum(ranks(adapter)) == 3 * len(adapter.parts)


def test_the_best_step_is_within_the_budget(tmp_path):
    """Quality falls from the first evaluation at step 4, and the budget of 40 steps is final at step 28."""
    adapter, fit = trained(tmp_path, 40, Falling())
    assert adapter.method.schedule(40) == (4, 28, 1)
    assert [point.step for point in fit.points if point.quality is not None] == list(range(4, 41, 4))
    assert fit.best_step == 28
    assert sum(ranks(adapter)) == 3 * len(adapter.parts)
    assert int(adapter.shared.kept.sum()) == 3 * len(adapter.parts)


def steps(adapter: Any, optimizer: torch.optim.Optimizer, which: range) -> None:
    for step in which:
        generator = torch.Generator().manual_seed(step)
        for _, parameter in adapter.trainable():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        adapter.method.before_step(adapter, Progress(step, STEPS))
        optimizer.step()
        adapter.method.after_optimizer(adapter, Progress(step, STEPS))


@pytest.mark.parametrize("at", [15, 28, 33])
def test_a_checkpoint_holds_what_is_remembered(at, tmp_path):
    """Interrupted while the budget shrinks, at its last step, and after."""

    def fresh() -> tuple[Any, torch.optim.Optimizer]:
        adapter = read_method({"name": "adalora"} | SMALL).build(make("llama"), "mine")
        return adapter, torch.optim.AdamW([parameter for _, parameter in adapter.trainable()], lr=2e-3)

    torch.manual_seed(2)
    adapter, optimizer = fresh()
    steps(adapter, optimizer, range(1, at + 1))
    tensors = adapter.tensors()
    assert {name for name in tensors if name.startswith("shared")} == {
        "shared.sensitivity", "shared.uncertainty", "shared.kept",
    }  # fmt: skip
    assert not any(parameter is tensors[name] for name in tensors for parameter in adapter.shared.parameters())
    path = tmp_path / "best"
    checkpoint.write(path, adapter, {"step": at})
    state = optimizer.state_dict()
    results = []
    for forget in (False, True):
        again, other = fresh()
        checkpoint.read(path, again)
        other.load_state_dict(copied(state))
        if forget:
            again.shared.reset()
        steps(again, other, range(at + 1, STEPS + 1))
        results.append(again.tensors())
    steps(adapter, optimizer, range(at + 1, STEPS + 1))
    resumed, forgetful = results
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in adapter.tensors().items())
    assert sum(ranks(adapter)) == 3 * len(adapter.parts)
    assert any(not torch.equal(tensor, forgetful[name]) for name, tensor in adapter.tensors().items())


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with tensors of its own."""
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    return state.clone() if isinstance(state, torch.Tensor) else state


def test_a_second_run_starts_anew():
    adapter = read_method({"name": "adalora"} | SMALL).build(make("llama"), "mine")
    optimizer = torch.optim.AdamW([parameter for _, parameter in adapter.trainable()], lr=2e-3)
    steps(adapter, optimizer, range(1, STEPS + 1))
    assert not bool(adapter.shared.kept.all())
    steps(adapter, optimizer, range(1, 4))
    assert bool(adapter.shared.kept.all())
    assert ranks(adapter) == [6] * 4


# Merging ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize(
    ("kind", "targets"), [("llama", None), ("gpt2", None), ("gpt2", ["attn.q", "attn.v"]), ("bert", ["mlp.up"])]
)
def test_merged_equals_attached(kind, targets, pruned):
    base, adapter = ours(kind, {"name": "adalora", "target_modules": targets} | SMALL)
    if pruned:
        prune(adapter)
    batch = given(kind, padded="right")
    with torch.no_grad():
        attached = our_values(base, "mine", batch)
        plain = our_values(base, None, batch)
        merge_into(base, "mine")
        same(our_values(base, None, batch), attached)
    assert float((plain["states"] - attached["states"]).abs().max()) > 1e-2


# Folders ------------------------------------------------------------------------------------------

KEPT = [
    [True, False, True, True, False, True],
    [False] * 6,
    [True] * 6,
    [False, False, False, False, False, True],
]
"""What is kept at the first four sites: one is pruned wholly, one not at all."""


def prune(adapter: Any) -> None:
    """An adapter as after its last pruning."""
    for index, part in enumerate(adapter.parts):
        adapter.shared.kept[index] = torch.tensor(KEPT[index % 4])
        part.lora_E.data[~adapter.shared.kept[index]] = 0.0


def prune_peft(model: peft.PeftModel) -> int:
    """The same in peft, as its own last pruning leaves it; the triplets that are left."""
    names = [name for name, _ in model.base_model.model.named_parameters() if "lora_E" in name]
    pattern = {name: KEPT[index] for index, name in enumerate(names)}
    model.base_model.rankallocator.mask_using_rank_pattern(model.base_model.model, pattern)
    model.peft_config["default"].rank_pattern = pattern
    return sum(map(sum, pattern.values()))


def written_by_peft(folder: Path, kind: str, head: bool, pruned: bool, **settings: Any) -> peft.PeftModel:
    model = wrapped(make(kind), kind, peft_config(kind, **settings), head)
    shake(model)
    if pruned:
        assert prune_peft(model) == (4 if kind == "gpt2" else 11)
    save_by_peft(model, folder)
    return model.eval()


def save_by_peft(model: peft.PeftModel, folder: Path) -> None:
    """peft takes the tensors of a module that is pruned wholly for shards, and says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Adapter 'default': \d LoRA tensor\(s\) have invalid shape")
        model.save_pretrained(str(folder), save_embedding_layers=False)


def read_by_peft(folder: Path, kind: str, head: bool) -> peft.PeftModel:
    """peft reads the ranks, though it warns that it ignores them: there it looks for LoRA's."""
    with peft_warnings():
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
        model = peft.PeftModel.from_pretrained(twin(make(kind), kind, head), str(folder)).eval()
    model.base_model.trainable_adapter_name = "default"  # which a loss is computed with, and only training sets
    return model


def from_peft(model: peft.PeftModel, kind: str, head: bool) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return peft_values(model, kind, given(kind, head, "right"), head)[0]


def from_graft(base: Any, kind: str, head: bool) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return our_values(base, next(iter(base.adapters)), given(kind, head, "right"), head)


STORED = [(kind, head, pruned) for kind in TARGETS for head in (False, True) for pruned in (False, True)]


@pytest.mark.parametrize(("kind", "head", "pruned"), STORED)
def test_graft_reads_what_peft_wrote(kind, head, pruned, tmp_path):
    model = written_by_peft(tmp_path / "theirs", kind, head, pruned)
    base = make(kind)
    adapter = store.load(base, tmp_path / "theirs")
    assert adapter.method.name == "adalora"
    assert (adapter.head is not None) == head
    left = [sum(KEPT[index]) if pruned else 6 for index in range(len(adapter.parts))]
    assert ranks(adapter) == left == adapter.shared.kept.sum(dim=1).tolist()
    assert len(same(from_graft(base, kind, head), from_peft(model, kind, head))) == (1 if head else 2)
    # What was read can be written, and read by both again.
    store.save(adapter, base, tmp_path / "again")
    again = make(kind)
    loaded = store.load(again, tmp_path / "again")
    assert all(torch.equal(tensor, loaded.tensors()[name]) for name, tensor in adapter.tensors().items())
    same(from_peft(read_by_peft(tmp_path / "again", kind, head), kind, head), from_peft(model, kind, head))


@pytest.mark.parametrize(("kind", "head", "pruned"), STORED)
def test_peft_reads_what_graft_wrote(kind, head, pruned, tmp_path):
    base, adapter = ours(kind, {"name": "adalora"} | SMALL, head)
    if pruned:
        prune(adapter)
    store.save(adapter, base, tmp_path / "mine")
    stored = load_file(tmp_path / "mine" / "adapter_model.safetensors")
    assert len([name for name in stored if "lora_" in name]) == 3 * len(adapter.parts)
    rows = sum(len(tensor) for name, tensor in stored.items() if name.endswith("lora_E"))
    assert rows == sum(sum(KEPT[index]) if pruned else 6 for index in range(len(adapter.parts)))
    model = read_by_peft(tmp_path / "mine", kind, head)
    same(from_graft(base, kind, head), from_peft(model, kind, head))
    # No tensor was left out on the way: peft writes the same ones again.
    save_by_peft(model, tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[name], again[name]) for name in stored)
    first, second = (read_config(tmp_path / name) for name in ("mine", "again"))
    assert second["rank_pattern"] == first["rank_pattern"]
    assert (first["rank_pattern"] is not None) == pruned
    assert {key: second[key] for key in ("init_r", "target_r", "lora_alpha", "total_step")} == {
        key: first[key] for key in ("init_r", "target_r", "lora_alpha", "total_step")
    }


def test_slices_are_stored_as_graft_has_them(tmp_path):
    base, adapter = ours("gpt2", {"name": "adalora", "target_modules": ["attn.q", "attn.v"]} | SMALL)
    prune(adapter)
    store.save(adapter, base, tmp_path / "mine")
    assert read_config(tmp_path / "mine")["peft_type"] == "GRAFT_ADALORA"
    stored = load_file(tmp_path / "mine" / "adapter_model.safetensors")
    assert stored["layers.0.attn.q.lora_A"].shape == (4, 32)
    again = make("gpt2")
    loaded = store.load(again, tmp_path / "mine")
    assert ranks(loaded) == [4, 0, 6, 1]
    same(from_graft(again, "gpt2", False), from_graft(base, "gpt2", False))


def test_a_folder_of_a_run_in_which_peft_was_never_called(tmp_path):
    """target_r above init_r means nothing there, nor do settings of LoRA that peft's AdaLoRA ignores."""
    ignored = {"target_r": 8, "use_rslora": True, "alpha_pattern": {"q_proj": 3}, "tinit": 5}
    model = written_by_peft(tmp_path / "theirs", "llama", False, False, **ignored)
    base = make("llama")
    adapter = store.load(base, tmp_path / "theirs")
    assert (adapter.method.init_r, adapter.method.target_r, adapter.method.tinit) == (6, 6, None)
    same(from_graft(base, "llama", False), from_peft(model, "llama", False))


def test_a_pruned_adapter_can_be_trained_again(tmp_path):
    """What is not stored has no gradient, so it is what is pruned first."""
    written_by_peft(tmp_path / "theirs", "llama", False, True)
    base = make("llama")
    adapter = store.load(base, tmp_path / "theirs")
    adapter.train()
    optimizer = torch.optim.AdamW([parameter for _, parameter in adapter.trainable()], lr=2e-3)
    for step in range(1, 11):
        adapter.method.before_step(adapter, Progress(step, 10))
        batch = given("llama")
        (loss_of(our_values(base, adapter.name, batch), batch) + adapter.method.penalty(adapter)).backward()
        optimizer.step()
        adapter.method.after_optimizer(adapter, Progress(step, 10))
        optimizer.zero_grad()
        assert sum(ranks(adapter)) <= 11


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


# Faults -------------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"


def setting(key: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "adapter_config.json").write_text(json.dumps(read_config(folder) | {key: value}))


def pattern(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        ranks = read_config(folder)["rank_pattern"]
        change(ranks)
        setting("rank_pattern", ranks)(folder)

    return damage


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        stored = load_file(folder / "adapter_model.safetensors")
        change(stored)
        save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    return damage


def replaced(last: str, tensor: torch.Tensor | None) -> Callable[[Path], None]:
    """A tensor of the first site, which keeps 4 of 6 triplets, exchanged or dropped."""
    name = f"base_model.model.{Q}.{last}"
    return weights(lambda stored: stored.pop(name) if tensor is None else stored.update({name: tensor}))


THEIRS: dict[str, tuple[Callable[[Path], None], str]] = {
    "ranks too short": (pattern(lambda p: p[f"{Q}.lora_E"].pop()), "lora_E is not a list of 6 truth values"),
    "ranks not bool": (pattern(lambda p: p.update({f"{Q}.lora_E": [1] * 6})), "is not a list of 6 truth values"),
    "a rank": (pattern(lambda p: p.update({f"{Q}.lora_E": 4})), "is not a list of 6 truth values"),
    "one more kept": (pattern(lambda p: p.update({f"{Q}.lora_E": [True] * 6})), r"shape \[4, 1\].* leave 6 rows"),
    "a module left out": (pattern(lambda p: p.pop(f"{Q}.lora_E")), "leave 6 rows"),
    "another module": (pattern(lambda p: p.update({"model.norm.lora_E": [True] * 6})), "'model.norm.lora_E', which"),
    "ranks a list": (setting("rank_pattern", [4, 0]), "rank_pattern is not an object"),
    "no ranks": (setting("rank_pattern", None), "leave 6 rows"),
    "init_r": (setting("init_r", 5), "is not a list of 5 truth values"),
    "init_r a word": (setting("init_r", "six"), "init_r: Input should be a valid integer"),
    "init_r too large": (setting("init_r", 0), "init_r: Input should be greater than or equal to 1"),
    "beta1": (setting("beta1", 1.5), "beta1: Input should be less than 1"),
    "no A": (replaced("lora_A", None), r"of 12 tensors 1 missing \(layers.0.attn.q.lora_A\)"),
    "no E": (replaced("lora_E", None), "1 missing .*lora_E"),
    "no B": (replaced("lora_B", None), "1 missing .*lora_B"),
    "A unpruned": (replaced("lora_A", torch.ones(6, 32)), r"1 of another shape \(layers.0.attn.q.lora_A\)"),
    "B of another site": (replaced("lora_B", torch.ones(16, 4)), r"1 of another shape \(layers.0.attn.q.lora_B\)"),
    "A flat": (replaced("lora_A", torch.ones(128)), r"1 of another shape \(layers.0.attn.q.lora_A\)"),
    "E flat": (replaced("lora_E", torch.ones(4)), "of another shape"),
    "E a number": (replaced("lora_E", torch.tensor(1.0)), r"shape \[\].* leave 4 rows"),
    "more": (replaced("lora_F", torch.ones(4)), "1 unexpected"),
    "biases": (setting("bias", "all"), "bias = 'all' is not supported"),
}


@pytest.mark.parametrize("case", THEIRS)
def test_a_damaged_folder_of_peft_is_refused(case, tmp_path):
    damage, message = THEIRS[case]
    written_by_peft(tmp_path / "theirs", "llama", False, True)
    damage(tmp_path / "theirs")
    base = make("llama")
    with pytest.raises(DamagedError, match=message) as caught:
        store.load(base, tmp_path / "theirs")
    assert "\n" not in str(caught.value)
    assert not base.adapters


MINE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no A": (replaced("lora_A", None), "1 missing .*lora_A"),
    "A unpruned": (replaced("lora_A", torch.ones(6, 32)), "1 of another shape .*lora_A"),
    "E longer than init_r": (replaced("lora_E", torch.ones(9, 1)), "2 of another shape|3 of another shape"),
    "E another value": (replaced("lora_E", torch.ones(4, 1)), "is not what was saved"),
}


@pytest.mark.parametrize("case", MINE)
def test_a_damaged_folder_of_graft_is_refused(case, tmp_path):
    damage, message = MINE[case]
    base, adapter = ours("llama", {"name": "adalora"} | SMALL)
    prune(adapter)
    store.save(adapter, base, tmp_path / "mine")
    damage(tmp_path / "mine")
    with pytest.raises(DamagedError, match=message) as caught:
        store.load(make("llama"), tmp_path / "mine")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_r": 13}, "target_r: 13 is above init_r, 12"),
        ({"init_r": 4}, "target_r: 8 is above init_r, 4"),
        ({"init_r": 0, "target_r": 0}, "init_r: Input should be greater than or equal to 1"),
        ({"beta1": 1}, "beta1: Input should be less than 1"),
        ({"orth_reg_weight": -1}, "orth_reg_weight: Input should be greater"),
        ({"deltaT": 0}, "deltaT: Input should be greater"),
        ({"tinit": -1}, "tinit: Input should be greater"),
        ({"rank": 8}, "unknown key 'rank'"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(RecipeError, match=message) as caught:
        read_method({"name": "adalora"} | settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_r": 17}, "init_r: 17 is not from 1 to 16, the size of layers.0.attn.v"),
        ({"target_modules": ["head"]}, "only the output layer"),
        ({"target_modules": ["embed"]}, "adalora cannot sit at 'embed'"),
        ({"layers_to_transform": [2]}, "no layer 2, the base has 0 to 1"),
    ],
)
def test_settings_that_do_not_fit_the_base(settings, message):
    with pytest.raises(UsageError, match=message):
        read_method({"name": "adalora"} | settings).build(make("llama"), "x")


def test_memory_is_three_buffers_and_nothing_that_trains():
    adapter = read_method({"name": "adalora"} | SMALL).build(make("llama"), "x")
    assert isinstance(adapter.shared, Memory)
    assert adapter.trainable_count() == adapter.shared.sensitivity.numel() == adapter.shared.uncertainty.numel()
    assert adapter.trainable_count() == 2 * (6 * (32 + 1 + 32) + 6 * (32 + 1 + 16))
