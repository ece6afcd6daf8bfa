"""Reward models, preference optimization and policies that learn from rewards: whole runs, invariants and guards."""

import copy
import gc
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import tiny_pairs
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from graft.alignment import losses
from graft.alignment.pairs import sides
from graft.alignment.rewards import Rewards, RewardSource, Said
from graft.alignment.rollouts import Prompt, Rollout, distinct
from graft.build import ADAPTER, build_adapter, load_for, make_accelerator
from graft.chain import execute_chain, read_chain
from graft.data.load import DataConfig, load_splits
from graft.errors import DataError, GuardError, RecipeError, UsageError
from graft.methods.base import read_method
from graft.model import Base, load_tokenizer
from graft.objectives.base import read_objective
from graft.objectives.causal import collate
from graft.objectives.dpo import Dpo
from graft.objectives.grpo import Grpo
from graft.objectives.ppo import Ppo
from graft.objectives.reward import rewards_of
from graft.parts.attach import adapter_of, hidden_states
from graft.planning.plan import plan_recipe
from graft.recipe import Recipe
from graft.run import execute
from graft.train.loop import Trainer
from graft.train.precision import choose

LORA = {"name": "lora", "r": 8, "learning_rate": 5e-3, "target_modules": "all-linear"}
SHORT = {"max_steps": 4, "per_device_train_batch_size": 8, "precision": "fp32", "eval_steps": 4}


@pytest.fixture(autouse=True, scope="module")
def unplanned():
    """No simulated step and no timing, which take longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graft.run._forecast", lambda *_: None)
        patch.setattr("graft.assess.TextAssessor._latency", lambda *_: 1.0)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tiny_pairs.write_all(tmp_path_factory.mktemp("aligned"))


@pytest.fixture(scope="module")
def start(place) -> Path:
    """A supervised run to start from."""
    execute(tiny_chat.recipe(place, method=LORA, training=SHORT), place / "sft")
    return place / "sft"


def ready(recipe: Recipe, rows: int = 8) -> tuple[Base, Any, list[Any]]:
    """The base with its adapter as a run begins, and the first rows."""
    base = load_for(recipe, choose("fp32", torch.device("cpu")), torch.device("cpu"))
    assert recipe.method is not None
    splits = recipe.objective.load(recipe.data)
    examples = recipe.objective.examples(splits.train, load_tokenizer(recipe.model), (), recipe.max_length)
    build_adapter(recipe, recipe.method, base, ())
    recipe.objective.begin(base, adapter_of(base, ADAPTER), examples[:rows])
    return base, recipe.objective, examples[:rows]


def shaken(base: Base, scale: float = 0.05) -> None:
    """Move what trains away from its start."""
    for _, parameter in adapter_of(base, ADAPTER).trainable():
        parameter.data += scale * torch.randn_like(parameter)


def slow_logps(base: Base, row: Any, entry: Any) -> Tensor:
    """log π of a row's trained tokens from all its logits: the way without chunks, batches or padding."""
    ids = torch.tensor([list(row.ids)])
    with base.route(entry):
        logits = base.logits(base.hidden({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).last)[0]
    table = torch.log_softmax(logits[:-1], dim=1)
    known = torch.tensor(list(row.trained[1:])).bool()
    return table[torch.arange(len(table)), ids[0, 1:]][known]


def gradients(base: Base, loss: Tensor) -> list[Tensor]:
    parameters = [parameter for _, parameter in adapter_of(base, ADAPTER).trainable()]
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for gradient, parameter in zip(
            torch.autograd.grad(loss, parameters, allow_unused=True), parameters, strict=True
        )
    ]


def same(base: Base, mine: Tensor, written: Tensor) -> None:
    """The same value and gradients within 1e-5."""
    assert mine.item() == pytest.approx(written.item(), rel=1e-5, abs=1e-5)
    pairs = list(zip(gradients(base, mine), gradients(base, written), strict=True))
    assert len(pairs) > 10
    assert any(bool(first.any()) for first, _ in pairs)
    for first, second in pairs:
        assert float((first - second).abs().max()) < 1e-5


# Losses on a model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["sigmoid", "rpo", "ipo", "kto", "orpo", "simpo"])
def test_a_variant_is_its_formula_on_a_model(place, variant):
    given = {"variant": variant} if variant != "rpo" else {"learn_weight": 0.7}
    base, objective, examples = ready(tiny_pairs.recipe(place, {"name": "dpo"} | given))
    shaken(base)
    objective._kl = 0.3
    total = objective.loss(base, examples, ADAPTER)
    answers = sides(examples)
    sums = [slow_logps(base, answer, ADAPTER) for answer in answers]
    with torch.no_grad():
        theirs = [slow_logps(base, answer, None) for answer in answers]
    half, written = len(examples), torch.zeros(())
    for number in range(half):
        mine = [sums[number], sums[number + half]]
        known = [theirs[number], theirs[number + half]]
        c, r = (one.sum() - other.sum() for one, other in zip(mine, known, strict=True))
        if variant == "sigmoid":
            written = written - F.logsigmoid(0.1 * (c - r))
        elif variant == "rpo":
            written = written - F.logsigmoid(0.1 * (c - r)) - 0.7 * mine[0].mean()
        elif variant == "ipo":
            written = written + (c / len(mine[0]) - r / len(mine[1]) - 5) ** 2
        elif variant == "kto":
            written = written + 2 - torch.sigmoid(0.1 * (c - 0.3)) - torch.sigmoid(0.1 * (0.3 - r))
        elif variant == "simpo":
            written = written - F.logsigmoid(2 * (mine[0].mean() - mine[1].mean()) - 0.5)
        else:
            odds = [one.mean() - torch.log(1 - one.mean().exp()) for one in mine]
            written = written - mine[0].mean() - 0.1 * F.logsigmoid(odds[0] - odds[1])
    assert total.weight == (2 * half if variant == "kto" else half)
    same(base, total.total, written)


def test_accumulation_changes_no_gradient(place):
    for variant in ("sigmoid", "kto"):
        recipe = tiny_pairs.recipe(place, {"name": "dpo", "variant": variant})
        base, objective, examples = ready(recipe)
        shaken(base)
        found = []
        for size in (8, 3):
            trainer = Trainer(
                base, adapter_of(base, ADAPTER), objective, recipe.training, 1e-3, 1, make_accelerator("fp32"),
                pass_rows=size,
            )  # fmt: skip
            trainer.objective.collect(base, examples, ADAPTER, size, False)
            trainer.gradients(examples)
            found.append([parameter.grad.clone() for parameter in trainer.parameters()])
            trainer._drop_gradients()
        assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*found, strict=True))


def rollouts(base: Base, objective: Any, prompts: list[Prompt]) -> list[Rollout]:
    """Made-up answers with made-up advantages."""
    found = []
    for number, prompt in enumerate(prompts):
        drawn = 3 + number % 4
        ids = [*prompt.ids[: prompt.prompt], *torch.randint(5, 90, (drawn,)).tolist()]
        tensors = [torch.randn(drawn) for _ in range(3)]
        found.append(Rollout(ids, prompt.prompt, True, prompt, tensors[0], values=tensors[1], returns=tensors[2]))
    for name in ("old", "reference"):
        for one, values in zip(found, objective.known(base, found, ADAPTER, 4), strict=True):
            setattr(one, name, values + 0.3 * torch.randn_like(values))
    return found


@pytest.mark.parametrize("kind", ["dapo", "grpo", "dr_grpo"])
def test_grpo_is_its_formula_on_a_model(place, kind):
    given = {"name": "grpo", "loss_type": kind, "num_iterations": 2, "rewards": "exact_match", "max_new_tokens": 8}
    base, objective, prompts = ready(tiny_chat.recipe(place, objective=given, method=LORA), 6)
    shaken(base)
    answers = rollouts(base, objective, prompts)
    loss = objective.loss(base, answers, ADAPTER)
    written, tokens = torch.zeros(()), 0
    for one in answers:
        logps = slow_logps(base, one, ADAPTER)
        ratio = torch.exp(logps - one.old)
        surrogate = torch.min(ratio * one.advantages, ratio.clamp(0.8, 1.2) * one.advantages)
        away = one.reference - logps
        each = -surrogate + 0.04 * (away.exp() - away - 1)
        written = written + (each.mean() if kind == "grpo" else each.sum())
        tokens += one.drawn
    assert loss.weight == {"dapo": tokens, "grpo": 6, "dr_grpo": 48}[kind]
    same(base, loss.total, written)


@pytest.mark.parametrize("kind", ["dapo", "grpo", "dr_grpo"])
def test_an_answer_that_was_drawn_often_counts_as_often(place, kind):
    given = {"name": "grpo", "loss_type": kind, "rewards": "exact_match", "max_new_tokens": 8}
    base, objective, prompts = ready(tiny_chat.recipe(place, objective=given, method=LORA), 4)
    shaken(base)
    one, *others = rollouts(base, objective, prompts)
    whole = [one, *others, replace(one), replace(others[0]), replace(one)]
    loss = objective.loss(base, whole, ADAPTER)
    assert loss.weight == objective.weight(whole)
    merged = distinct(whole)
    assert [answer.times for answer in merged] == [3, 2, 1, 1]
    again = objective.loss(base, merged, ADAPTER)
    assert again.weight == loss.weight
    same(base, again.total, loss.total)


def test_ppo_is_its_formula_on_a_model(place):
    given = {"name": "ppo", "rewards": "exact_match", "max_new_tokens": 8}
    base, objective, prompts = ready(tiny_chat.recipe(place, objective=given, method=LORA), 6)
    shaken(base)
    answers = rollouts(base, objective, prompts)
    loss = objective.loss(base, answers, ADAPTER)
    head = adapter_of(base, ADAPTER).head
    assert head is not None
    written = torch.zeros(())
    for one in answers:
        ratio = torch.exp(slow_logps(base, one, ADAPTER) - one.old)
        batch, targets = collate(base, [one])
        values = head.out(hidden_states(base, batch, ADAPTER).last[targets != -100])[:, 0]
        near = one.values + (values - one.values).clamp(-0.2, 0.2)
        worse = torch.max((values - one.returns) ** 2, (near - one.returns) ** 2)
        surrogate = torch.min(ratio * one.advantages, ratio.clamp(0.8, 1.2) * one.advantages)
        written = written + (-surrogate + 0.1 * 0.5 * worse).sum()
    same(base, loss.total, written)


def test_drawn_answers_have_the_rewards_advantages_and_distances_of_their_formula(place, start, tmp_path):
    (tmp_path / "mine.py").write_text("def reward(prompt, answer, row):\n    return len(answer) / 10\n")
    given = {"name": "ppo", "init": str(start), "rewards": [{"file": str(tmp_path / "mine.py")}], "max_new_tokens": 6}
    base, objective, prompts = ready(tiny_chat.recipe(place, objective=given, method=LORA), 8)
    torch.nn.init.normal_(adapter_of(base, ADAPTER).head.out.weight, std=0.05)
    before = objective.collect(base, prompts, ADAPTER, 4, False)
    assert base.model.training
    assert objective.collect(base, prompts, ADAPTER, 4, True) is before
    assert objective._watched["kl"] == 0.0  # the policy is its start still
    raw = []
    for one in before:
        said = base.tokenizer.decode(one.ids[one.prompt :], skip_special_tokens=True)
        rewards = torch.zeros(one.drawn)
        rewards[-1] = len(said) / 10
        raw.append(losses.generalized_advantages(rewards, one.values, 1.0, 0.95))
    assert len(raw) == 8
    for one, advantages in zip(before, raw, strict=True):
        assert torch.allclose(one.returns, advantages + one.values, atol=1e-5)
    assert torch.allclose(torch.cat([one.advantages for one in before]), losses.whitened(torch.cat(raw)), atol=1e-5)
    shaken(base)
    with torch.no_grad():
        moved = objective.collect(base, prompts, ADAPTER, 4, False)
        for one in moved:
            assert torch.allclose(one.old, slow_logps(base, one, ADAPTER), atol=1e-4)
    assert objective._watched["kl"] > 0


def test_the_price_of_kl_follows_its_target():
    objective = Ppo(rewards=["exact_match"], init_kl_coef=0.1, kl_target=2.0, kl_horizon=100)
    objective._coef = 0.1
    objective._follow(10.0, 10)
    assert objective._coef == pytest.approx(0.1 * 1.02)
    objective._follow(1.9, 10)
    assert objective._coef == pytest.approx(0.1 * 1.02 * (1 - 0.05 * 0.1))


# Invariants and guards ------------------------------------------------------------------------------


@pytest.mark.parametrize("with_start", [False, True])
def test_the_policy_is_the_reference_at_first(place, start, with_start):
    given = {"name": "dpo"} | ({"init": str(start)} if with_start else {})
    base, objective, examples = ready(tiny_pairs.recipe(place, given, method=LORA))
    loss = objective.loss(base, examples, ADAPTER)
    assert loss.total.item() / loss.weight == pytest.approx(math.log(2), abs=1e-7)
    assert objective.after_step(1)["margin"] == 0.0
    if with_start:  # and the start is not the plain base
        answers = sides(examples)[:1]
        with torch.no_grad():
            assert not torch.equal(slow_logps(base, answers[0], ADAPTER), slow_logps(base, answers[0], None))
        assert not adapter_of(base, "start").trainable()


def test_a_policy_that_is_not_its_reference_is_refused(place):
    recipe = tiny_pairs.recipe(place, "dpo", method=LORA)
    base, objective, examples = ready(recipe)
    shaken(base)
    with pytest.raises(GuardError, match="the policy is not the reference"):
        objective.begin(base, adapter_of(base, ADAPTER), examples)


def test_a_margin_that_stays_is_an_error():
    objective = Dpo()
    for step in range(1, 10):
        objective._seen = [(0.0, 0.0)]
        objective.after_step(step)
    objective._seen = [(0.0, 0.0)]
    with pytest.raises(GuardError, match="after step 10 no margin has moved"):
        objective.after_step(10)


def test_groups_without_a_signal_are_counted_told_and_stop_a_run():
    equal, different = torch.ones(4, 8), torch.arange(32.0).view(4, 8)
    objective, said = Grpo(rewards=["exact_match"]), []
    objective._say = said.append
    objective._judge_groups(different)
    for _ in range(9):
        objective._judge_groups(equal)
    assert objective._watched["silent"] == 1.0
    assert said == ["90% of the groups of the last 10 steps had equal rewards and taught nothing: the last earned 1; "
                    "likely the policy is always right"]  # fmt: skip
    objective = Grpo(rewards=["exact_match"])
    for _ in range(9):
        objective._judge_groups(equal)
    with pytest.raises(GuardError, match="every group of 8 answers had equal rewards, the last 1"):
        objective._judge_groups(equal)


def test_in_place_methods_are_refused_where_a_reference_is_needed(place):
    full = {"name": "full", "learning_rate": 1e-3}
    with pytest.raises(UsageError, match="trains the base in place, and a reference needs the base as it was"):
        ready(tiny_pairs.recipe(place, "dpo", method=full))
    ready(tiny_pairs.recipe(place, {"name": "dpo", "variant": "simpo"}, method=full))


def test_a_start_with_other_settings_is_refused(place, start):
    other = LORA | {"r": 4}
    with pytest.raises(UsageError, match=r"init: .*sft has the method .*'r': 8"):
        ready(tiny_pairs.recipe(place, {"name": "dpo", "init": str(start)}, method=other))
    with pytest.raises(UsageError, match="neither a finished run nor an adapter folder"):
        ready(tiny_pairs.recipe(place, {"name": "dpo", "init": "runs/none"}, method=LORA))


def test_one_copy_of_the_base(place, start, tmp_path):
    """Live weights of PPO with a reference and a reward model: those of supervised tuning, adapters and heads."""
    reward = tmp_path / "reward"
    execute(tiny_pairs.recipe(place, "reward", method=LORA, training=SHORT), reward)
    pretend(reward, 0.8)
    before = held()
    plain = ready(tiny_chat.recipe(place, method=LORA))
    supervised = held() - before
    assert supervised >= 4 * plain[0].parameter_count()
    given = {"name": "ppo", "init": str(start), "rewards": [{"run": str(reward)}], "max_new_tokens": 6}
    before = held()
    base, objective, prompts = ready(tiny_chat.recipe(place, objective=given, method=LORA), 4)
    objective.collect(base, prompts, ADAPTER, 4, False)
    assert set(base.adapters) == {ADAPTER, "start", "reward_0"}
    objective._rollouts = []

    def adapter(name: str) -> int:
        named = adapter_of(base, name).named_tensors()
        return sum(tensor.untyped_storage().nbytes() for _, tensor in named)

    value_head = 4 * base.hidden_size
    more = held() - before - supervised
    assert more == value_head + adapter("start") + adapter("reward_0")
    second = copy.deepcopy(base.model)  # what the count is for: a copy that no name of the base leads to
    assert held() - before - supervised > more + 4 * plain[0].parameter_count()
    del second


def held() -> int:
    """Bytes of all storages that any living tensor has, each counted once, whatever holds it; a fake one has none."""
    gc.collect()
    live = [item for item in gc.get_objects() if issubclass(type(item), Tensor) and type(item) is not FakeTensor]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in live}.values())


def pretend(run: Path, quality: float) -> None:
    """Write into a report how good a reward model is."""
    report = json.loads((run / "report.json").read_text("utf-8"))
    report |= {"quality": quality, "quality_low": quality - 0.2, "quality_high": quality + 0.1}
    (run / "report.json").write_text(json.dumps(report), encoding="utf-8")


def test_a_reward_model_that_may_be_no_better_than_a_coin_is_refused(place, start, tmp_path):
    run = tmp_path / "reward"
    execute(tiny_pairs.recipe(place, "reward", method=LORA, training=SHORT | {"max_steps": 1}), run)
    pretend(run, 0.6)
    given = {"name": "ppo", "rewards": [{"run": str(run)}]}
    recipe = tiny_chat.recipe(place, objective=given, method=LORA)
    with pytest.raises(UsageError, match=r"right in 60.0% of the held-out pairs .* no better than a coin"):
        execute(recipe, tmp_path / "ppo")
    assert not (tmp_path / "ppo").exists()
    for other, words in ((start, "not a reward model"), (tmp_path, "neither a finished run")):
        given = {"name": "ppo", "rewards": [{"run": str(other)}]}
        with pytest.raises(UsageError, match=words):
            execute(tiny_chat.recipe(place, objective=given, method=LORA), tmp_path / "ppo")


def test_a_reward_model_reads_answers_as_it_has_learned_to(place, tmp_path):
    """Drawn answers end with the token that ends a turn; templates write more behind it, which pairs have."""
    run = tmp_path / "reward"
    execute(tiny_pairs.recipe(place, "reward", method=LORA, training=SHORT | {"max_steps": 1}), run)
    pretend(run, 0.9)
    given = {"name": "ppo", "rewards": [{"run": str(run)}], "max_new_tokens": 6}
    base, objective, prompts = ready(tiny_chat.recipe(place, objective=given, method=LORA), 6)
    whole = [Rollout([*prompt.ids], prompt.prompt, True, prompt) for prompt in prompts]
    drawn, cut = [], []
    for one in whole:
        last = max(place for place, trained in enumerate(one.asked.trained) if trained)
        assert last < len(one.ids) - 1
        drawn.append(Rollout(one.ids[: last + 1], one.prompt, True, one.asked))
        cut.append(Rollout(one.ids[:last], one.prompt, False, one.asked))
    base.model.eval()
    earned = objective.earned(base, drawn)
    figures = json.loads((run / "report.json").read_text("utf-8"))["figures"]
    with torch.no_grad():
        numbers = [rewards_of(base, [one], "reward_0").item() for one in whole]
    expected = [(number - figures["reward_mean"]) / figures["reward_std"] for number in numbers]
    assert len({round(value, 4) for value in expected}) > 3
    assert earned == pytest.approx(expected, abs=1e-4)
    assert objective.earned(base, cut) == pytest.approx(expected, abs=1e-4)


# Rewards --------------------------------------------------------------------------------------------


def said(text: str) -> Said:
    row = load_splits(DataConfig(train="task:family_relationships", max_train_samples=2), "dialogue").train[0]
    return Said([1, 2, 3], 2, text, row)


FAULTS = {
    "raise ValueError('no')": "it raised ValueError: no",
    "return float('nan')": "it gave nan, which is no finite number",
    "return [1.0, 2.0]": r"it gave \[1.0, 2.0\], which is no finite number",
    "return None": "it gave None",
    "import time; time.sleep(5)": "it took more than 0.2 s",
}


@pytest.mark.parametrize("body", FAULTS)
def test_a_function_that_fails_is_named_with_its_sample(tmp_path, body):
    (tmp_path / "mine.py").write_text(f"def reward(prompt, answer, row):\n    {body}\n")
    rewards = Rewards([RewardSource(file=str(tmp_path / "mine.py"))], 0.2)
    one, began = said("son"), time.perf_counter()
    with pytest.raises(GuardError, match=f"mine.py:reward: for the answer 'son' to task:family_.*{FAULTS[body]}"):
        rewards.of(None, [one])  # type: ignore[arg-type]
    assert time.perf_counter() - began < 3


def test_rewards_are_added_up_by_weight(tmp_path):
    (tmp_path / "mine.py").write_text("def score(prompt, answer, row):\n    return len(row['reference'])\n")
    sources = [
        RewardSource(scorer="length:2-3", weight=2),
        RewardSource(file=str(tmp_path / "mine.py"), function="score"),
    ]
    one = said("a b c d")
    total, means = Rewards(sources, 1).of(None, [one])  # type: ignore[arg-type]
    assert total == [pytest.approx(2 * (1 - 1 / 3) + len(one.row.answer))]
    assert means["length:2-3"] == pytest.approx(2 / 3)
    assert not Rewards(sources, 1).bounded
    assert Rewards(sources[:1], 1).share(1.0) == 0.5


BAD = {
    "nothing": "no scorer 'nothing'",
    "length:5-2": "give the fewest and the most words",
    "regex:(": "no regular expression",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_names_of_rewards(name):
    with pytest.raises(RecipeError, match=BAD[name]):
        read_objective({"name": "grpo", "rewards": [name]})


def test_bad_files_of_rewards(tmp_path):
    (tmp_path / "broken.py").write_text("def reward(:\n")
    (tmp_path / "empty.py").write_text("")
    for file, words in {"none.py": "no Python file", "broken.py": "cannot be run", "empty.py": "no function"}.items():
        with pytest.raises(UsageError, match=words):
            Rewards([RewardSource(file=str(tmp_path / file))], 1).check()
    with pytest.raises(RecipeError, match="a reward has one of scorer, run and file"):
        read_objective({"name": "grpo", "rewards": [{"scorer": "task", "run": "x"}]})


# Data -----------------------------------------------------------------------------------------------


def test_rated_texts_become_pairs_far_apart():
    splits = load_splits(DataConfig(train="rated:movie-reviews"), "preference")
    assert len(splits.train) > 10_000
    assert len(splits.test) > 600
    assert all(row.gap is not None and row.gap >= 1.5 for row in splits.train + splits.test)
    texts = [text for row in splits.test for text in row.id.split(">")]
    assert len(texts) == len(set(texts))  # each text once, so that pairs are independent
    assert load_splits(DataConfig(train="rated:movie-reviews"), "dialogue").train[0].fields["rating"] != 0


def test_tasks_become_right_and_wrong_answers():
    from graft.scorers import read_scorer

    rows = load_splits(DataConfig(train="task:family_relationships", max_train_samples=50), "preference").train
    scorer = read_scorer("task")
    assert len(rows) == 50
    for row in rows:
        assert row.dialogue is not None
        assert scorer.items([row.chosen[0].content, row.rejected[0].content], [row.dialogue] * 2) == [1.0, 0.0]


def test_equal_answers_and_wrong_formats_are_refused(place, tmp_path):
    path = tiny_chat.write_rows(tmp_path / "same.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 30)
    with pytest.raises(DataError, match="chosen and rejected are the same answer"):
        load_splits(DataConfig(train=str(path)), "preference")
    with pytest.raises(DataError, match="answers of which one is the better are needed"):
        load_splits(DataConfig(train=str(place / "train.jsonl")), "preference")
    graded = [{"prompt": f"ask {n}", "completion": f"say {n}", "label": bool(n % 2)} for n in range(40)]
    path = tiny_chat.write_rows(tmp_path / "graded.jsonl", graded)
    files = {"train": str(path), "max_length": 96}
    with pytest.raises(DataError, match="sigmoid needs a better and a worse answer"):
        execute(tiny_pairs.recipe(place, "dpo", data=files), tmp_path / "run")
    report = execute(
        tiny_pairs.recipe(place, {"name": "dpo", "variant": "kto"}, data=files, training=SHORT), tmp_path / "run"
    )
    assert report["steps"] == 4


# Whole runs -----------------------------------------------------------------------------------------


def test_dpo_learns_what_is_preferred(place, tmp_path):
    report = execute(tiny_pairs.recipe(place, "dpo"), tmp_path / "run")
    assert report["metric"] == "preference accuracy"
    assert report["quality"] >= 0.9
    points = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert points[0]["watched"] == {"margin": 0.0, "accuracy": 0.0}
    assert points[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert points[-1]["watched"]["margin"] > 0.1
    assert len(points[-1]["samples"]) == 3


def test_a_chain_of_runs_from_one_file(place, tmp_path, monkeypatch):
    files = {name: str(place / f"{name}.jsonl") for name in ("train", "validation", "test")}
    pairs = {name: str(place / f"pairs-{name}.jsonl") for name in ("train", "validation", "test")}
    ppo = {"name": "ppo", "init": "stage:sft", "rewards": [{"run": "stage:reward"}], "max_new_tokens": 6}
    chain = {
        "model": str(place / "model"), "method": LORA, "training": SHORT, "forgetting": [],
        "stages": {
            "sft": {"data": files | {"max_length": 96}, "objective": {"name": "instruct", "max_new_tokens": 8}},
            "reward": {"data": pairs | {"max_length": 96}, "objective": "reward"},
            "ppo": {"data": files | {"max_length": 96}, "objective": ppo},
        },
    }  # fmt: skip
    (tmp_path / "chain.yaml").write_text(json.dumps(chain), encoding="utf-8")
    folder = tmp_path / "runs"
    recipes = read_chain(str(tmp_path / "chain.yaml"), folder, ["ppo.num_ppo_epochs=2", "seed=3"])
    assert [recipe.seed for recipe in recipes.values()] == [3, 3, 3]
    assert recipes["ppo"].objective.updates == 2
    execute(recipes["reward"], folder / "reward")
    pretend(folder / "reward", 0.8)  # four steps teach it nothing
    reports = execute_chain(recipes, folder)
    assert set(reports) == {"sft", "reward", "ppo"}
    assert reports["ppo"]["steps"] == 4
    about = json.loads((folder / "ppo" / "adapter" / "graft.json").read_text("utf-8"))
    assert about["head"] is None
    began = time.perf_counter()
    assert execute_chain(recipes, folder) == reports  # finished stages are kept
    assert time.perf_counter() - began < 3
    with pytest.raises(RecipeError, match="no stage or section 'dpo'"):
        read_chain(str(tmp_path / "chain.yaml"), folder, ["dpo.beta=1"])
    chain["stages"] = {"ppo": chain["stages"]["ppo"]}  # type: ignore[index]
    (tmp_path / "chain.yaml").write_text(json.dumps(chain), encoding="utf-8")
    with pytest.raises(RecipeError, match="stage:sft is no earlier stage"):
        read_chain(str(tmp_path / "chain.yaml"), folder)


@pytest.mark.parametrize("name", ["reward", "dpo", "grpo", "ppo"])
def test_every_objective_can_be_planned(place, name):
    given: dict[str, Any] = {"name": name}
    if name in ("grpo", "ppo"):
        given |= {"rewards": "exact_match", "max_new_tokens": 6} | ({"num_generations": 2} if name == "grpo" else {})
    make = (
        tiny_pairs.settings
        if name in ("reward", "dpo")
        else lambda place, given: tiny_chat.settings(place, objective=given)
    )
    training = SHORT | {"per_device_train_batch_size": 2}
    planned = plan_recipe(Recipe.parse(make(place, given) | {"method": LORA, "training": training}), None)
    assert [one.error for one in planned.estimates] == [None]
    assert planned.estimates[0].peak > 0


def test_a_method_of_every_kind_can_be_the_policy(place):
    checked = 0
    for name in ("lora", "prefix", "prompt", "bottleneck", "ia3"):
        base, objective, examples = ready(
            tiny_pairs.recipe(place, "dpo", method=read_method(name).model_dump() | {"name": name})
        )
        assert objective.loss(base, examples, ADAPTER).total.item() > 0
        checked += 1
    assert checked == 5
