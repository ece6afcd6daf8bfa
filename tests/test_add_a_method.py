"""docs/add_a_method.md, executed: one new file is enough."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "add_a_method.md").read_text(encoding="utf-8")
NAME = "lora_fa"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A copy of the package with the page's file in it, and nothing else changed."""
    source = tmp_path_factory.mktemp("copy") / "src"
    shutil.copytree(ROOT / "src" / "graft", source / "graft", ignore=shutil.ignore_patterns("__pycache__"))
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert f"src/graft/methods/{NAME}.py" in PAGE
    assert f'name: ClassVar[str] = "{NAME}"' in block
    (source / "graft" / "methods" / f"{NAME}.py").write_text(block, encoding="utf-8")
    return {**os.environ, "PYTHONPATH": str(source)}


def run(environment, *command):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_method_is_listed_with_its_settings(environment):
    (row,) = [row for row in json.loads(run(environment, "-m", "graft", "methods", "--json")) if row["method"] == NAME]
    assert row["function"] == "x A Wu"
    assert row["merges"] is True
    schema = json.loads(run(environment, "-m", "graft", "schema"))
    assert NAME in json.dumps(schema["properties"]["method"])
    forms = schema["properties"]["methods"]["items"]["anyOf"]
    (mine,) = [form for form in forms if form.get("properties", {}).get("name") == {"const": NAME}]
    assert mine["properties"]["r"]["default"] == 8


def test_it_trains_saves_and_merges(environment, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny.settings(tiny.write_all(tmp_path / "tiny"))), encoding="utf-8")
    out = tmp_path / "run"
    report = json.loads(
        run(environment, "-m", "graft", "train", str(recipe), f"method={NAME}", "r=2", "-o", str(out), "--json")
    )
    assert report["method"] == NAME
    assert report["merged_difference"] < 1e-2
    config = json.loads((out / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "GRAFT_LORA_FA"


def test_the_tests_of_all_methods_find_it(environment):
    said = run(
        environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_methods.py",
        "-k", f"{NAME} and gpt2",
    )  # fmt: skip
    assert int(re.search(r"(\d+) passed", said)[1]) >= 6
