"""The architecture as the README and the decisions state it."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LONGEST

import graft

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "graft"
ORDER_WITHIN = {
    "engine": ["settings", "runtime", "dropout", "attention", "loss", "fewrows", "compiled"],
    "reading": ["faults", "lines", "jsonrows", "tables", "parquet", "files"],
    "data": ["dialogue", "rows", "turns", "readers", "writers", "formats", "tasks", "pairs", "load", "batch"],
    "rendering": ["jinja", "encoder", "spans", "render", "supervise"],
    "curation": [
        *("signs", "private", "findings", "copies", "source", "survey", "labels", "writing", "tokens"),
        *("check", "clean", "convert", "preview"),
    ],
    "parts": [
        "base",
        "stacked",
        "attention",
        "tokens",
        "attach",
        "own",
        "lowrank",
        "bypass",
        "prefix",
        "experts",
        "head",
    ],
    "methods": ["folder", "base", "linears", "lowrank", "mixture", "attended", "virtual", "*", "store", "table"],
    "alignment": ["losses", "logprobs", "pairs", "reference", "rewards", "rollouts", "shared"],
    "diagnosis": [
        *("curve", "rates", "broken", "fit", "outcome", "aligned", "diagnose", "advice", "runs", "trainer"),
        *("comparison", "guard"),
    ],
    "objectives": ["base", "templated", "causal", "answers", "online", "*"],
    "planning": ["fake", "live", "step", "catalogue", "machine", "simulate", "smaller", "plan", "preflight"],
    "advice": ["rules", "choice", "case", "evidence", "ruled", "measured", "fit", "recommend"],
    "cli": [
        *("shared", "runs", "export", "look", "hardware", "plan", "recommend", "data", "chat", "serve", "doctor"),
        "commands",
    ],
    "train": ["precision", "optim", "settings", "points", "guards", "checkpoint", "resume", "loop"],
    "export": [
        *("origin", "probes", "layouts", "vocabulary", "gguffile", "gotemplate", "modelfile", "llamacpp", "folders"),
        "export",
    ],
    "serve": [
        *("batch", "speech", "adapters", "metrics", "texts", "engine", "schemas", "replies", "security", "state"),
        *("answers", "streams", "app", "server", "start", "vllm"),
    ],
}
"""Reading order inside the folders; * stands for the methods and objectives, which know nothing of each other."""


def readme_map() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("<!-- map:")[1].split("<!-- end of map -->")[0]
    return re.findall(r"^\| `([^`]+)` \|", table, flags=re.MULTILINE)


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }


def reading_order() -> dict[str, tuple[int, int]]:
    places = [Path(entry).relative_to("src/graft") for entry in readme_map() if entry.startswith("src/graft/")]
    order = {}
    for name, path in modules().items():
        inside = path.relative_to(PACKAGE)
        if len(inside.parts) == 1:
            order[name] = (places.index(inside), 0)
        else:
            folder = inside.parts[0]
            known = ORDER_WITHIN[folder]
            stem = inside.stem
            order[name] = (places.index(Path(folder)), known.index(stem if stem in known else "*"))
    return order


def test_the_readme_has_the_map_of_the_tree():
    listed = readme_map()
    assert len(listed) > 20
    for entry in listed:
        assert (ROOT / entry).exists(), entry
    top = {f"src/graft/{path.name}" for path in PACKAGE.glob("*.py") if not path.name.startswith("__")}
    top |= {f"src/graft/{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert top == {entry for entry in listed if entry.startswith("src/graft/")}


def test_files_import_only_from_above():
    order = reading_order()
    checked = 0
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("graft")):
                continue
            targets = [node.module] if node.module in order else [f"{node.module}.{a.name}" for a in node.names]
            for target in targets:
                if target in order:
                    assert order[target] < order[name], f"{name} imports {target}, which is not above it"
                    checked += 1
    assert checked > 100


def test_public_names():
    expected = {
        "Adapter", "Base", "GraftError", "Method", "Objective", "Part", "Recipe", "Route", "__version__", "attach",
        "compare_methods", "decode", "detach", "execute", "export_run", "hidden_states", "known_methods",
        "load_adapter", "load_base", "merge_into", "merge_run", "read_method", "read_recipe", "save_adapter", "scores",
    }  # fmt: skip
    assert set(dir(graft)) == expected
    for name in expected:
        assert getattr(graft, name) is not None
        if name != "__version__":
            with pytest.raises(ModuleNotFoundError):  # a module of this name would take its place
                importlib.import_module(f"graft.{name}")
    with pytest.raises(AttributeError):
        _ = graft.nothing


def test_every_test_file_of_a_method_or_objective_is_found_on_disk():
    files = {path.stem for path in (PACKAGE / "methods").glob("*.py")}
    files -= {"__init__", "base", "folder", "linears", "lowrank", "mixture", "attended", "virtual", "store", "table"}
    assert set(graft.known_methods()) == files


def test_the_generated_pages_are_current():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        generate = importlib.import_module("generate")
    finally:
        sys.path.remove(str(ROOT / "docs"))
    assert len(generate.PAGES) >= 3
    for name, page in generate.PAGES.items():
        assert (ROOT / name).read_text(encoding="utf-8") == page(), f"{name} is old: run `make docs`"


def test_the_readme_example_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(snippets) == 1
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", snippets[0]], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch.Size([3, ")


def test_the_readme_names_every_command_and_no_other():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`graft ([a-z]+)", text))
    commands = {
        command.name or command.callback.__name__
        for command in importlib.import_module("graft.cli").app.registered_commands
    }
    groups = {group.name for group in importlib.import_module("graft.cli").app.registered_groups}
    assert named == commands | groups


def test_the_readme_recipe_parses():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    recipe = re.search(r"```yaml\n(.*?)```", text, flags=re.DOTALL)[1]
    read = graft.read_recipe(None, text=recipe)
    assert [method.name for method in read.methods] == ["full", "lora", "lora", "prefix"]


def test_nothing_private_is_in_the_project():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert len(files) > 40
    for name in files:
        assert (ROOT / name).stat().st_size < 600_000, name


def test_the_files_that_begin_first_are_there():
    assert len(set(LONGEST)) == len(LONGEST) > 5
    for name in LONGEST:
        assert (ROOT / "tests" / f"{name}.py").is_file(), name


def test_tests_that_the_documentation_names_exist():
    named = {
        (path.name, *found)
        for path in (ROOT / "docs").rglob("*.md")
        for found in re.findall(r"`tests/(\w+\.py)(?:::(\w+))?`", path.read_text(encoding="utf-8"))
    }
    assert len([test for page, _, test in named if page == "reliability.md" and test]) > 40
    for page, file, test in sorted(named):
        held = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not test or f"\ndef {test}(" in held, f"{page}: {file}::{test}"
