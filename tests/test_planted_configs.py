"""Recipes with a fault (C1 to C3), given to every command that reads one."""

import itertools
from pathlib import Path

import planted
import pytest
import tiny
import yaml
from planted import Planted

from graft.recipe import read_recipe

COMMANDS = ("train", "compare", "plan", "recommend")

SETTINGS = {  # the value as it stands behind key=, and what the line names
    "C1": [
        ("methdo=lora", "methdo"), ("training.epoch=1", "epoch"), ("method.rr=8", "rr"),
        ("data.trian=x.jsonl", "trian"),
        ("method.num_virtual_tokens=4", "num_virtual_tokens"), ("engine.compil=true", "compil"),
        ("objective.beta=0.1", "beta"), ("method=lroa", "lroa"), ("objective=clasify", "clasify"),
        ("quantization=int3", "quantization"), ("training.=1", "training."), ("nonsense", "nonsense"),
    ],
    "C2": [
        ("method.learning_rate=2e-4x", "learning_rate"), ("training.num_train_epochs=yes", "num_train_epochs"),
        ("training.max_steps=[1, 2]", "max_steps"), ("method.r=[8]", "lora: r:"), ("method.r=eight", "lora: r:"),
        ("seed=one", "seed"), ("seed=1.5", "seed"), ("seeds=[]", "seeds"), ("seeds=[1, 1]", "seeds"),
        ("data=[1]", "data"), ("training=7", "training"), ("engine=fast", "engine"), ("model=null", "model"),
        ("model=", "model"), ("training.precision=fp8", "precision"), ("probe_samples=many", "probe_samples"),
        ("forgetting=5", "forgetting"), ("methods=[]", "methods"),
    ],
    "C3": [
        ("method.learning_rate=0", "learning_rate"), ("method.learning_rate=-1e-3", "learning_rate"),
        ("method.learning_rate=.nan", "learning_rate"), ("method.learning_rate=.inf", "learning_rate"),
        ("method.r=0", "lora: r:"), ("method.r=-4", "lora: r:"),
        ("training.per_device_train_batch_size=0", "batch_size"),
        ("training.per_device_train_batch_size=-1", "batch_size"),
        ("training.gradient_accumulation_steps=0", "accumulation"),
        ("training.num_train_epochs=0", "num_train_epochs"), ("training.num_train_epochs=.nan", "num_train_epochs"),
        ("training.max_steps=-5", "max_steps"), ("training.weight_decay=-1", "weight_decay"), ("seed=-1", "seed"),
        ("seed=4294967296", "seed"), ("data.max_length=0", "max_length"), ("method.lora_dropout=1.0", "lora_dropout"),
        ("method.lora_dropout=-0.1", "lora_dropout"), ("method.lora_alpha=0", "lora_alpha"),
        ("training.warmup_ratio=2", "warmup_ratio"), ("training.max_grad_norm=-1", "max_grad_norm"),
        ("probe_samples=0", "probe_samples"),
    ],
}  # fmt: skip

TEXTS: list[tuple[str, bytes, str]] = [
    ("empty", b"", "r.yaml"),
    ("a list", b"- 1\n- 2\n", "r.yaml"),
    ("a word", b"lora\n", "r.yaml"),
    ("a tab", b"model: m\ndata:\n\ttrain: x\n", "r.yaml"),
    ("a key twice", b"model: m\nmodel: n\n", "model"),
    ("an object of Python", b"model: !!python/object/apply:os.system ['touch owned']\n", "r.yaml"),
    ("a name of Python", b"model: !!python/name:os.system\n", "r.yaml"),
    ("bytes that are no UTF-8", b"model: \xff\xfe\xfa\n", "r.yaml"),
    ("NUL", b"model: a\x00b\n", "r.yaml"),
    ("a bracket that stays open", b"model: [a\n", "r.yaml"),
    ("an alias of nothing", b"model: *nothing\n", "r.yaml"),
    ("aliases that multiply", b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (new, new, b", ".join([b"*%c" % old] * 9)) for old, new in itertools.pairwise(b"abcdefghi")
    ), "r.yaml"),
    ("nesting of 5,000", b"model: " + b"[" * 5000 + b"]" * 5000, "r.yaml"),
    ("an alias of itself", b"model: &a [*a]\n", "aliases are not allowed"),
    ("keys that are no text", b"1: 2\n", "1"),
    ("two documents", b"model: a\n---\nmodel: b\n", "r.yaml"),
]  # fmt: skip


def _write(content: bytes) -> "planted.Callable[[Path], None]":
    def plant(folder: Path) -> None:
        (folder / "r.yaml").write_bytes(content)

    return plant


def _command(verb: str, *more: str) -> tuple[str, ...]:
    return (verb, "{r}", *more, *(("-o", "{o}") if verb in ("train", "compare") else ()))


CASES = [
    Planted(fault, f"{verb} {given}", _command(verb, given), (named,))
    for fault, settings in SETTINGS.items()
    for number, (given, named) in enumerate(settings)
    for verb in ("train", ("compare", "plan")[number % 2])
] + [
    Planted("C2", f"{verb}: {name}", _command(verb), (named,), plant=_write(content))
    for name, content, named in TEXTS
    for verb in COMMANDS
]


def test_the_sound_recipe_is_taken(place, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(tiny.settings(place)))
    assert read_recipe(path).method.name == "lora"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_all(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.fault} {case.name}")
def test_recipe(case, place, tmp_path, monkeypatch, capsys):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tiny.settings(place)))
    planted.check(case, tmp_path, monkeypatch, capsys)


def test_how_many():
    assert len({case.name for case in CASES}) == len(CASES) == 168
