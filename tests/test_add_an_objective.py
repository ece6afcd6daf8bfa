"""docs/add_an_objective.md, executed: one new file is enough."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_pairs

import graft.objectives
from graft.objectives.base import objectives, read_objective
from graft.run import execute

PAGE = (Path(__file__).parents[1] / "docs" / "add_an_objective.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def slic(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The page's file as if it lay among the objectives."""
    folder = tmp_path_factory.mktemp("objectives")
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert "src/graft/objectives/slic.py" in PAGE
    (folder / "slic.py").write_text(block, encoding="utf-8")
    graft.objectives.__path__.append(str(folder))
    yield objectives()["slic"]
    graft.objectives.__path__.remove(str(folder))


def test_it_is_found_with_its_settings(slic):
    assert read_objective({"name": "slic", "delta": 2}).delta == 2  # type: ignore[attr-defined]
    assert all(field.description for field in slic.model_fields.values())


def test_it_trains_and_goes_on_where_it_was_stopped(slic, tmp_path, monkeypatch):
    monkeypatch.setattr("graft.run._forecast", lambda *_: None)
    place = tiny_pairs.write_all(tmp_path / "data")
    lora = {"name": "lora", "learning_rate": 3e-3, "r": 16, "target_modules": "all-linear"}
    given = tiny_pairs.recipe(place, {"name": "slic", "delta": 2}, method=lora)
    report = execute(given, tmp_path / "run")
    assert report["metric"] == "preference accuracy"
    assert report["quality"] > 0.6
    points = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert points[-1]["train_loss"] < points[0]["train_loss"]

    def stop(phase: str, fraction: float) -> None:
        if phase.startswith("training, step 30 of"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(given, tmp_path / "parts", stop)
    execute(given, tmp_path / "parts")
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
