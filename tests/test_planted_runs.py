"""Settings, models, adapters and words of the command line with a fault, one row each."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import planted
import pytest
import tiny
import tiny_chat
import torch
import yaml
from planted import Planted
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from graft.methods import store
from graft.model import load_base
from graft.rendering import jinja
from graft.run import execute

Plant = Callable[[Path], None]
TRAIN = ("train", "{r}", "-o", "{o}")
EVAL = ("eval", "{f}/run")
EXPORT = ("export", "{f}/run", "--to", "hf", "-o", "{o}")
MERGE = ("merge", "{f}/run", "-o", "{o}")


def _recipe(**more: Any) -> Plant:
    def plant(folder: Path) -> None:
        (folder / "r.yaml").write_text(yaml.safe_dump(tiny.settings(folder, **more)))

    return plant


def _json(name: str, **changed: Any) -> Plant:
    """Change keys of a JSON file; None takes a key away."""

    def plant(folder: Path) -> None:
        path = folder / name
        values = json.loads(path.read_text()) | changed
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return plant


def _without(*names: str) -> Plant:
    def plant(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return plant


def _bytes(name: str, content: bytes) -> Plant:
    def plant(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return plant


def _names(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Plant:
    def plant(folder: Path) -> None:
        path = folder / "run/adapter/adapter_model.safetensors"
        save_file(change(load_file(path)), path)
        about = folder / "run/adapter/graft.json"
        values = json.loads(about.read_text())
        values.pop("sha256")
        about.write_text(json.dumps(values))

    return plant


def _peft(**changed: Any) -> Plant:
    """As if peft had written the folder: without graft.json."""

    def plant(folder: Path) -> None:
        _json("run/adapter/adapter_config.json", **{"peft_type": "LORA"} | changed)(folder)
        (folder / "run/adapter/graft.json").unlink()

    return plant


def _base(**changed: Any) -> Plant:
    return _json("run/adapter/graft.json", base=changed)


def _quantized(folder: Path) -> None:
    path = folder / "run/adapter/graft.json"
    about = json.loads(path.read_text())
    about["base"] |= {"quantization": "int3", "quantized_from": "float32"}
    path.write_text(json.dumps(about))


CONFIG = "model/config.json"
TOKENIZER = "model/tokenizer_config.json"
SETTINGS = "run/adapter/adapter_config.json"
ABOUT = "run/adapter/graft.json"

RUNS = [
    Planted("C4", "targets that match nothing", (*TRAIN, "method.target_modules=[nothing]"), ("nothing",)),
    Planted("C4", "a layer that the model lacks", (*TRAIN, "method.layers_to_transform=[7]"),
            ("layers_to_transform", "7")),
    Planted("C4", "a layer below zero", (*TRAIN, "method.layers_to_transform=[-1]"), ("layers_to_transform", "-1")),
    Planted("C4", "layers that are words", (*TRAIN, "method.layers_to_transform=[all]"),
            ("layers_to_transform", "all")),
    Planted("C4", "the output layer of a classifier", (*TRAIN, "method.target_modules=[lm_head]"), ("lm_head",)),
    Planted("C5", "max_length above the context", (*TRAIN, "data.max_length=4096"), ("max_length", "48")),
    Planted("C5", "a prompt that fills the context",
            (*TRAIN, "method=prompt", "method.num_virtual_tokens=40"), ("40 virtual tokens exceed the 48",)),
    Planted("C5", "a prompt above the context",
            (*TRAIN, "method=prompt", "method.num_virtual_tokens=500"), ("500 of 48",)),
    Planted("C5", "P-tuning that fills the context",
            (*TRAIN, "method=ptuning", "method.num_virtual_tokens=40"), ("40 virtual tokens exceed the 48",)),
    Planted("C6", "fp16 on a CPU", (*TRAIN, "training.precision=fp16"), ("training.precision", "fp16")),
    Planted("C6", "full tuning of a quantized base",
            (*TRAIN, "quantization=nf4", "method=full"), ("nf4",)),
    Planted("C7", "an output that is a file", TRAIN, ("is a file, a run needs",), 2, _bytes("out", b"mine")),
    Planted("C7", "an output with other files", TRAIN, ("thesis.txt",), 2, _bytes("out/thesis.txt", b"mine")),
    Planted("C7", "an output that is the model", ("train", "{r}", "-o", "{m}"), ("holds other files",)),
    Planted("C7", "an output below a file", ("train", "{r}", "-o", "{f}/train.jsonl/out"), ("Not a directory",)),
    Planted("C7", "a merge onto the model", ("merge", "{f}/run", "-o", "{m}"), ("is not empty",)),
    Planted("C7", "a merge onto a file", ("merge", "{f}/run", "-o", "{f}/train.jsonl"), ("is a file",)),
    Planted("C7", "an export onto other files",
            ("export", "{f}/run", "--to", "hf", "-o", "{f}/model"), ("is not empty",)),
    Planted("C8", "no model at the path", (*TRAIN, "model=./nowhere"), ("no such model folder",)),
    Planted("C8", "a file as the model", (*TRAIN, "model={f}/train.jsonl"), ("is a file, a base model is",)),
    Planted("C8", "a config.json that is a list", TRAIN, ("in config.json is not known",), 2, _bytes(CONFIG, b"[]")),
    Planted("C8", "a width that is a word", TRAIN, ("hidden_size",), 2, _json(CONFIG, hidden_size="wide")),
    Planted("C8", "no layers", TRAIN, ("matches no site",), 2, _json(CONFIG, num_hidden_layers=0)),
    Planted("C8", "a vocabulary above the embedding rows", TRAIN, ("not those of config.json",), 5,
            _json(CONFIG, vocab_size=9999)),
    Planted("K3", "a base of another fingerprint", EVAL, ("differ", "trained on"), 5,
            _base(name="other", fingerprint="0" * 64)),
    Planted("K3", "a base without fingerprint", EVAL, ("differ", "trained on"), 5, _base(name="other")),
    Planted("K3", "a base quantized in an unknown way", EVAL, ("int3", "altered"), 5, _quantized),
    Planted("K4", "a tensor that is missing", EVAL, ("of 8 tensors 1 missing",), 5,
            _names(lambda t: dict(list(t.items())[1:]))),
    Planted("K4", "a tensor too many", EVAL, ("unexpected", "extra.lora_A"), 5,
            _names(lambda t: t | {"extra.lora_A.weight": next(iter(t.values())).clone()})),
    Planted("K4", "names with another prefix", EVAL, ("missing",), 5,
            _names(lambda t: {f"module.{name}": value for name, value in t.items()})),
    Planted("K4", "half of a pair", EVAL, ("missing", "lora_B"), 5,
            _names(lambda t: {name: value for name, value in t.items() if "lora_B" not in name})),
    Planted("K4", "matrices that are vectors", EVAL, ("another shape",), 5,
            _names(lambda t: {name: value.flatten() if "lora_" in name else value for name, value in t.items()})),
    Planted("K2", "an unknown method", EVAL, ("graft.json", "lroa"), 5, _json(ABOUT, method={"name": "lroa"})),
    Planted("K2", "a method without name", EVAL, ("graft.json: method: give a name",), 5, _json(ABOUT, method={})),
    Planted("K2", "a method with an unknown setting", EVAL, ("graft.json", "power"), 5,
            _json(ABOUT, method={"name": "lora", "power": 9})),
    Planted("K2", "a rank that is a word", EVAL, ("graft.json", "r:"), 5,
            _json(ABOUT, method={"name": "lora", "r": "eight"})),
    Planted("K2", "tensors that are not those of the digest", EVAL, ("not what was saved",), 5,
            _json(ABOUT, sha256="0" * 64)),
    Planted("K2", "a probe of another outcome", EVAL, ("outputs on fixed ids",), 5,
            _json(ABOUT, probe=[[9.0, 9.0], [9.0, 9.0]])),
    Planted("K2", "an unknown peft_type", EVAL, ("peft_type 'QUUX'",), 5, _peft(peft_type="QUUX")),
    Planted("K2", "no peft_type", EVAL, ("peft_type None",), 5, _peft(peft_type=None)),
    Planted("K2", "a rank of peft that is a word", EVAL, ("r: Input", "'eight'"), 5, _peft(r="eight")),
    Planted("K2", "a rank of peft that disagrees", EVAL, ("of another shape",), 5, _peft(r=3)),
    Planted("K2", "an option of peft that is not read here", EVAL, ("quux = 1", "with peft"), 5, _peft(quux=1)),
    Planted("X3", "a tokenizer's options", EVAL, ("tokenizer_kwargs",), 5,
            _peft(tokenizer_kwargs={"trust_remote_code": True})),
    Planted("X3", "classes to import", EVAL, ("custom_modules",), 5, _peft(custom_modules={"a": "os.system"})),
    Planted("X2", "code of the model's own", TRAIN, ("model_type 'quux'",), 2,
            _json(CONFIG, model_type="quux", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})),
    Planted("K8", "a rank above the adapter's", (*MERGE, "--rank", "99"), ("rank 99",)),
    Planted("K8", "a number format that is none", (*MERGE, "--dtype", "fp7"), ("fp7",)),
    Planted("K8", "the original of a base that was not quantized", (*MERGE, "--original"),
            ("not trained on a quantized base",)),
]  # fmt: skip

USAGE = [
    Planted("usage", name, words, says, code)
    for name, words, says, code in [
        ("chat: nothing there", ("chat", "{f}/none", "--once", "x"), ("neither a run nor an adapter",), 2),
        ("chat: a classifier", ("chat", "{f}/run", "--once", "x"), ("is a classifier",), 2),
        ("chat: an encoder", ("chat", "{m}", "--once", "x"), ("is an encoder",), 2),
        ("chat: no tokens", ("chat", "{m}", "--max-new-tokens", "0"), ("max-new-tokens",), 2),
        ("chat: below zero degrees", ("chat", "{m}", "--once", "x", "--temperature", "-1"),
         ("temperature is -1.0",), 2),
        ("chat: no share", ("chat", "{m}", "--once", "x", "--top-p", "0"), ("top_p is 0.0",), 2),
        ("generate: no file", ("generate", "{m}"), ("--file",), 2),
        ("generate: no such file", ("generate", "{m}", "-f", "{f}/none.jsonl"), ("none.jsonl",), 2),
        ("generate: rows of labels", ("generate", "{m}", "-f", "{f}/train.jsonl"), ("dialogue is needed",), 2),
        ("generate: no rows at once", ("generate", "{m}", "-f", "x", "--batch-size", "0"), ("batch-size",), 2),
        ("doctor: nothing there", ("doctor", "{f}/none"), ("no such run",), 2),
        ("doctor: a model", ("doctor", "{m}"), ("neither a run of Graft nor a log",), 2),
        ("serve: nothing there", ("serve", "./none"), ("no such model folder",), 2),
        ("serve: a port too high", ("serve", "{m}", "--port", "65536"), ("port",), 2),
        ("serve: a port that is a word", ("serve", "{m}", "--port", "http"), ("port",), 2),
        ("serve: an adapter that is not there", ("serve", "{m}", "--adapter", "a={f}/none"),
         ("neither a run nor an adapter",), 2),
        ("serve: a name that is a path", ("serve", "{m}", "--adapter", "../a={f}/run"), ("../a",), 2),
        ("serve: every address without key", ("serve", "{m}", "--host", "0.0.0.0"), ("GRAFT_API_KEY",), 2),
        ("serve: memory without unit", ("serve", "{m}", "--adapter", "a={f}/run", "--kv-memory", "lots"), ("lots",), 2),
        ("serve: an unknown engine", ("serve", "{m}", "--engine", "tgi"), ("'tgi'",), 2),
        ("serve: no adapters", ("serve", "{m}", "--max-loaded", "0"), ("max-loaded",), 2),
        ("serve: an unknown number format", ("serve", "{m}", "--precision", "fp8"), ("'fp8'",), 2),
        ("serve: a root that is not there", ("serve", "{m}", "--adapter-root", "{f}/none"),
         ("no such folder; make it first",), 2),
        ("runs: nothing there", ("runs", "{f}/none"), ("no such folder",), 2),
        ("runs: a file", ("runs", "{f}/train.jsonl"), ("no such folder",), 2),
        ("plan: nothing to plan", ("plan",), ("give one of a recipe",), 2),
        ("plan: memory without unit", ("plan", "{r}", "--memory", "16"), ("has no unit",), 2),
        ("plan: memory that is a word", ("plan", "{r}", "--memory", "much"), ("much",), 2),
        ("plan: no memory", ("plan", "{r}", "--memory", "0GB"), ("0GB",), 2),
        ("plan: memory below zero", ("plan", "{r}", "--memory=-4GB"), ("-4GB",), 2),
        ("plan: an unknown card", ("plan", "{r}", "--device", "a1000"), ("a1000",), 2),
        ("plan: an unknown model", ("plan", "--model", "llama-9-7b"), ("llama-9-7b",), 2),
        ("plan: an unknown method", ("plan", "{r}", "--methods", "lora,lroa"), ("lroa",), 2),
        ("plan: a recipe and a model", ("plan", "{r}", "--model", "llama-2-7b"), ("give one of",), 2),
        ("plan: fits without unit", ("plan", "--fits", "sixteen"), ("sixteen",), 2),
        ("recommend: nothing given", ("recommend",), ("give one of",), 2),
        ("recommend: an unknown goal", ("recommend", "{r}", "--goal", "fame"), ("fame",), 2),
        ("recommend: rows below zero", ("recommend", "--model", "llama-2-7b", "--rows=-1"),
         ("--rows is 1 at least",), 2),
        ("recommend: memory without unit", ("recommend", "{r}", "--memory", "12"), ("has no unit",), 2),
        ("recommend: no runs", ("recommend", "{r}", "--runs", "{f}/none"), ("is no folder",), 2),
        ("recommend: onto a file that is there", ("recommend", "{r}", "--write", "{r}"), ("r.yaml exists",), 2),
        ("hardware: an unknown card", ("hardware", "--device", "a1000"), ("a1000",), 2),
        ("schema: a word too many", ("schema", "yaml"), ("yaml",), 2),
        ("assets: an unknown name", ("assets", "pull", "no-such-model"), ("no-such-model",), 2),
        ("assets: an unknown verb", ("assets", "push"), ("push",), 2),
        ("export: no kind", ("export", "{f}/run"), ("--to",), 2),
        ("export: an unknown kind", ("export", "{f}/run", "--to", "onnx", "-o", "{o}"), ("onnx",), 2),
        ("export: an unknown quant", ("export", "{f}/run", "--to", "gguf", "--quant", "q3", "-o", "{o}"), ("q3",), 2),
        ("merge: no output", ("merge", "{f}/run"), ("--output",), 2),
        ("merge: another model", (*MERGE, "--model", "{f}/none"), ("no such model folder",), 2),
        ("methods: no such model", ("methods", "--model", "./none"), ("no such model folder",), 2),
        ("data check: nothing there", ("data", "check", "{f}/none.jsonl"), ("none.jsonl",), 2),
        ("data check: a folder", ("data", "check", "{m}"), ("is a folder; give one file",), 2),
        ("data clean: nothing there", ("data", "clean", "{f}/none.jsonl", "-o", "{o}.jsonl"), ("none.jsonl",), 2),
        ("data convert: nothing there", ("data", "convert", "{f}/none.jsonl", "-o", "{o}.jsonl"), ("none.jsonl",), 2),
        ("data split: nothing there", ("data", "split", "{f}/none.jsonl", "-o", "{o}"), ("none.jsonl",), 2),
        ("data preview: nothing there", ("data", "preview", "{f}/none.jsonl", "--model", "{m}"), ("none.jsonl",), 2),
        ("data: an unknown verb", ("data", "wash", "{f}/train.jsonl"), ("wash",), 2),
        ("no such command", ("trian", "{r}"), ("trian",), 2),
        ("an unknown option", ("train", "{r}", "--fast"), ("--fast",), 2),
        ("eval: no run", ("eval",), ("Missing argument",), 2),
    ]
]  # fmt: skip


def _second(folder: Path, **config: Any) -> None:
    """A second base, `other/`: the model's architecture and tokenizer with other settings and random weights."""
    shutil.copytree(folder / "model", folder / "other")
    with torch.random.fork_rng():
        settings = AutoConfig.from_pretrained(folder / "model", **config)
        AutoModelForCausalLM.from_config(settings).save_pretrained(folder / "other")


def _other(*, peft: bool = False, **config: Any) -> Plant:
    """A second base; with `peft` the adapter is as peft would have written it, without its base's fingerprint."""

    def plant(folder: Path) -> None:
        _second(folder, **config)
        if peft:
            _peft()(folder)

    return plant


def _template(text: str) -> Plant:
    """A chat template of the base's author; that of the run is taken away, so that the base's holds."""

    def plant(folder: Path) -> None:
        (folder / "model/chat_template.jinja").write_text(text)
        shutil.rmtree(folder / "run")

    return plant


LONG = "{f}/" + "n" * 300
GLOBALS = "{{ lipsum.__globals__['os'].popen('touch ran').read() }}"
CLASSES = "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{{ c }}{% endfor %}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GROWS = "{{ 'x' * 9999999999 }}"
WRITES = "{{ messages.append({'role': 'user', 'content': 'more'}) }}"
ONCE = ("chat", "{m}", "--once", "x")
PREVIEW = ("data", "preview", "{f}/train.jsonl", "--model", "{m}")
SPOKEN = [
    *(
        Planted("K3", f"{words[0]}: {name}", (*words, "--model", "{f}/other"), says, 5, plant)
        for words in (MERGE, EXPORT, ("chat", "{f}/run", "--once", "x"))
        for name, plant, says in [
            ("a base of other values", _other(), ("differ", "trained on")),
            ("a wider base", _other(hidden_size=96, head_dim=16), ("differ", "trained on")),
            ("a base of another vocabulary", _other(vocab_size=640), ("differ", "trained on")),
            ("a wider base for peft's adapter", _other(peft=True, hidden_size=96, head_dim=16), ("another shape",)),
            ("a flatter base for peft's adapter", _other(peft=True, num_hidden_layers=1), ("are not in",)),
            ("a deeper base for peft's adapter", _other(peft=True, num_hidden_layers=3), ("have no tensors",)),
        ]
    ),
    Planted("K3", "serve: a wider base", ("serve", "{f}/other", "--adapter", "a={f}/run"), ("differ", "trained on"), 5,
            _other(hidden_size=96, head_dim=16)),
    Planted("C8", "chat without a template", ONCE, ("chat template",), 2, _template("")),
    *(
        Planted("X4", f"{words[0]}: {name}", words, says, 2, _template(text))
        for words in (ONCE, PREVIEW, TRAIN)
        for name, text, says in [
            ("a template that reaches for modules", GLOBALS, ("chat template", "__globals__")),
            ("a template that reaches for classes", CLASSES, ("chat template", "__class__")),
            ("a template that loops", LOOPS, ("chat template", "s")),
            ("a template that grows", GROWS, ("chat template",)),
            ("a template that writes to its rows", WRITES, ("chat template", "append")),
        ]
    ),
    *(
        Planted("R9", f"{' '.join(words[:places])}: a name of 300 characters", words, ("n" * 300,))
        for places, words in [
            (2, ("data", "check", LONG)),
            (2, ("data", "clean", "{f}/train.jsonl", "-o", LONG + ".jsonl")),
            (1, ("chat", LONG, "--once", "x")),
            (1, ("eval", LONG)),
            (1, ("merge", LONG, "-o", "{o}")),
            (1, ("generate", "{m}", "-f", LONG)),
            (1, ("serve", LONG)),
            (1, ("doctor", LONG)),
            (1, ("runs", LONG)),
            (1, ("plan", LONG)),
            (3, ("merge", "{f}/run", "-o", LONG)),
            (3, ("export", "{f}/run", "-o", LONG, "--to", "peft")),
        ]
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_all(tmp_path_factory.mktemp("tiny"))
    execute(tiny.recipe(folder, training={"max_steps": 2, "precision": "fp32"}), folder / "run")
    return folder


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_chat.write_all(tmp_path_factory.mktemp("chat"))
    method = {"name": "lora", "r": 2, "learning_rate": 1e-3}
    execute(tiny_chat.recipe(folder, method=method, training={"max_steps": 1, "precision": "fp32"}), folder / "run")
    return folder


@pytest.mark.parametrize("case", [*RUNS, *USAGE], ids=lambda case: f"{case.fault} {case.name}")
def test_run(case, place, tmp_path_factory, monkeypatch, capsys):
    folder = tmp_path_factory.mktemp("p")  # tmp_path is named after the case, whose words are looked for
    shutil.copytree(place, folder, dirs_exist_ok=True)
    _recipe()(folder)
    planted.check(case, folder, monkeypatch, capsys)


@pytest.mark.parametrize("case", SPOKEN, ids=lambda case: f"{case.fault} {case.name}")
def test_run_of_chat(case, spoken, tmp_path_factory, monkeypatch, capsys):
    folder = tmp_path_factory.mktemp("p")
    shutil.copytree(spoken, folder, dirs_exist_ok=True)
    (folder / "r.yaml").write_text(yaml.safe_dump(tiny_chat.settings(folder, method="lora")))
    monkeypatch.setattr(jinja, "_SECONDS", 0.5)  # what a template may take
    planted.check(case, folder, monkeypatch, capsys)


@pytest.mark.parametrize("fault", ["no text", "another one", "missing"])
@pytest.mark.parametrize("words", [MERGE, ("chat", "{f}/run", "--once", "x"), EXPORT], ids=["merge", "chat", "export"])
def test_a_damaged_template(spoken, tmp_path, monkeypatch, capsys, words, fault):
    shutil.copytree(spoken / "run", tmp_path / "run")
    path = tmp_path / "run/adapter/chat_template.jinja"
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(b"\xff\xfe\xfa")
    if fault == "no text":  # without its digest, which would tell first
        _json("run/adapter/graft.json", template=None)(tmp_path)
    told = {"no text": "not text", "another one": "not what was saved", "missing": "is missing"}[fault]
    says = (f"chat_template.jinja{':' if fault == 'no text' else ''}", told, "copy the folder again")
    planted.check(Planted("K2", fault, words, says, 5), tmp_path, monkeypatch, capsys)


def test_a_module_that_settings_name_is_not_imported(place, tmp_path, monkeypatch):
    shutil.copytree(place / "run", tmp_path / "run")
    (tmp_path / "planted_module.py").write_text("raise SystemExit('it was run')")
    monkeypatch.syspath_prepend(tmp_path)
    _peft(megatron_core="planted_module", base_model_name_or_path="../planted_module")(tmp_path)
    base = load_base(str(place / "model"))
    assert store.load(base, tmp_path / "run/adapter", "a").name == "a"
    assert "planted_module" not in sys.modules


def test_code_that_comes_with_a_model_is_not_run(place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model" / "planted_code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    classes = {"AutoConfig": "planted_code.C", "AutoModel": "planted_code.M", "AutoTokenizer": ["planted_code.T", None]}
    for name in (CONFIG, TOKENIZER):
        _json(name, auto_map=classes)(tmp_path)
    assert load_base(str(tmp_path / "model")).parameter_count() > 0
    assert not (tmp_path / "ran").exists()


def test_how_many():
    assert len({case.name for case in RUNS}) == len(RUNS) == 49
    assert len({case.name for case in USAGE}) == len(USAGE) == 61
    assert len({case.name for case in SPOKEN}) == len(SPOKEN) == 47
