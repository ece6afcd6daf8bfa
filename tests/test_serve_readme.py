"""The README's way from training to two adapters that answer, executed with a tiny model and short runs."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import served
import tiny_chat

ROOT = Path(__file__).parents[1]


def section() -> tuple[list[str], str]:
    """The commands, and the Python program."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- serve:")
    commands = re.findall(r"^\$ (.*)$", text[1], flags=re.MULTILINE)
    program = re.search(r"```\n(.*?)```", text[2], flags=re.DOTALL)[1]
    return commands, program


@pytest.mark.slow
def test_train_serve_and_ask_both(tmp_path):
    commands, program = section()
    assert [command.split()[:2] for command in commands[:3]] == [
        ["graft", "train"],
        ["graft", "train"],
        ["graft", "serve"],
    ]
    tiny_chat.write_all(tmp_path)
    more = [
        f"model={tmp_path}/model", f"data.train={tmp_path}/train.jsonl", f"data.validation={tmp_path}/validation.jsonl",
        f"data.test={tmp_path}/test.jsonl", "data.max_length=96", "transfer=[]", "forgetting=[]", "precision=fp32",
        "objective.max_new_tokens=4", "training.max_steps=3", "preflight=false",
    ]  # fmt: skip
    for command in commands[:2]:
        words = shlex.split(command)[1:]
        words[1] = str(ROOT / words[1])
        done = subprocess.run(
            [sys.executable, "-m", "graft", *words, *more], cwd=tmp_path, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
    words = shlex.split(commands[2])
    assert words[2] == "smollm2-135m"
    options = [word.replace("runs/", f"{tmp_path}/runs/") for word in words[3:]]
    with served.server(tmp_path, *options, "--name", words[2]) as (address, _):
        asked = [word.replace("http://127.0.0.1:8000", address) for word in shlex.split(commands[3])]
        told = json.loads(subprocess.run([*asked, "-s"], capture_output=True, text=True, timeout=30, check=True).stdout)
        assert told["model"] == "family"
        assert told["choices"][0]["message"]["role"] == "assistant"
        program = program.replace("http://127.0.0.1:8000", address)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        for name in ("family", "calendar", "smollm2-135m"):
            assert f"{name} " in done.stdout
