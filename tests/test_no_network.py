"""No network: every command works on what is on disk without a try to reach anything; what needs a network says so."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import served
import tiny_chat
import yaml

BLOCKED = """
import os, sys

def refuse(event, given):
    if event == "socket.getaddrinfo" and given[0] not in (None, "127.0.0.1", "localhost", "::1"):
        told = f"{given[0]}"
    elif event in ("socket.connect", "socket.sendto") and isinstance(given[1], tuple) and given[1][0] != "127.0.0.1":
        told = f"{given[1][0]}"
    else:
        return
    with open(os.environ["TRIES"], "a") as file:
        file.write(told + "\\n")
    raise OSError(101, "Network is unreachable")

sys.addaudithook(refuse)
"""
"""A sitecustomize.py: every Python below it, libraries and child processes too, notes a try to leave this machine."""

EACH = """
import contextlib, io, json, sys
from graft import cli

codes = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["graft", *words]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as ended:
        codes.append((words[0], ended.code or 0, err.getvalue()))
print(json.dumps(codes))
"""
"""Commands one after another in one process, which imports torch once: their names, exit codes and standard errors."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tiny_chat.write_all(tmp_path_factory.mktemp("alone"))
    (folder / "sitecustomize.py").write_text(BLOCKED)
    given = tiny_chat.settings(folder, method="lora", training={"max_steps": 2, "precision": "fp32"}, transfer=[])
    (folder / "r.yaml").write_text(yaml.safe_dump(given))
    return folder


@pytest.fixture
def blocked(place, tmp_path):
    """The environment of a process that can reach nothing but this machine; its tries are in the second."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    paths = os.pathsep.join([str(place), *filter(None, [environment.get("PYTHONPATH")])])
    mine = {"PYTHONPATH": paths, "TRIES": str(tmp_path / "tries"), "HF_HOME": str(tmp_path / "hub")}
    return environment | mine | {"OMP_NUM_THREADS": "1"}, tmp_path / "tries"


def ended(environment: dict[str, str], folder: Path, *commands: tuple[str, ...]) -> list[tuple[str, int, str]]:
    """Name, exit code and standard error of each command; without the 23 s that the hub's library waits."""
    hasty = "import time; time.sleep = lambda seconds: None\n"
    code = [sys.executable, "-W", "ignore", "-c", hasty + EACH, json.dumps(commands)]
    done = subprocess.run(code, env=environment, cwd=folder, capture_output=True, text=True, timeout=200, check=True)
    return [tuple(one) for one in json.loads(done.stdout)]


@pytest.mark.faults
def test_every_command_works(place, blocked, tmp_path):
    run, model = str(tmp_path / "run"), str(place / "model")
    train, test = (str(place / f"{name}.jsonl") for name in ("train", "test"))
    recipe = str(place / "r.yaml")
    commands = [
        ("train", recipe, "-o", run),
        ("compare", recipe, "-o", str(tmp_path / "compared"), "seeds=[1]", "preflight=false"),
        ("eval", run, "--data", test),
        ("chat", run, "--once", "the sea?", "--max-new-tokens", "2"),
        ("generate", run, "-f", test, "-o", str(tmp_path / "answers.jsonl"), "--max-new-tokens", "2"),
        ("merge", run, "-o", str(tmp_path / "merged")),
        ("export", run, "--to", "peft", "-o", str(tmp_path / "peft")),
        ("doctor", run),
        ("doctor",),
        ("runs", str(tmp_path)),
        ("plan", recipe, "--memory", "8GB"),
        ("recommend", recipe, "--memory", "8GB"),
        ("plan", "--model", "llama-2-7b", "--device", "a100-80gb"),
        ("methods",),
        ("schema",),
        ("hardware", "--device", "a100-80gb"),
        ("data", "check", train),
        ("data", "convert", "task:chain_sum", "-o", str(tmp_path / "sums.jsonl")),
        ("data", "preview", train, "--model", model),
        ("assets", "list"),
    ]
    environment, tries = blocked
    codes = ended(environment, place, *commands)
    assert [(name, code, said) for name, code, said in codes if code] == []
    assert [name for name, _, _ in codes] == [words[0] for words in commands]
    assert not tries.exists(), tries.read_text()


@pytest.mark.slow
def test_a_server_answers(place, blocked):
    environment, tries = blocked
    with served.server(place, env=environment) as (address, _):
        turn = {"role": "user", "content": "the sea?"}
        told = served.post(address, "/v1/chat/completions", {"messages": [turn], "max_tokens": 2, "model": "model"})
        assert told[0] == 200
    assert not tries.exists(), tries.read_text()


def test_hub_ids_and_assets_say_that_there_is_no_network(place, blocked, tmp_path):
    environment, tries = blocked
    recipe, output = str(place / "r.yaml"), str(tmp_path / "out")
    codes = ended(
        environment | {"GRAFT_CACHE": str(tmp_path / "cache")},
        place,
        ("train", recipe, "-o", output, "model=someone/a-model"),
        ("train", recipe, "-o", output, "data.train=someone/some-rows"),
        ("assets", "pull", "tweets"),
    )
    assert [code for _, code, _ in codes] == [3, 2, 3], codes
    for (_, _, said), named in zip(codes, ("someone/a-model", "someone/some-rows", "vaderSentiment"), strict=True):
        lines = [line for line in said.splitlines() if line.startswith("graft: ")]
        assert len(lines) == 1, said
        assert named in lines[0]
    assert tries.exists()
    assert not (tmp_path / "out").exists()


@pytest.fixture
def silent():
    """The address of a server that takes connections and never says anything."""
    held = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def take() -> None:
            while True:
                try:
                    held.append(listening.accept()[0])
                except OSError:  # closed
                    return

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    for connection in held:
        connection.close()


@pytest.mark.faults
def test_a_network_that_hangs_is_left(place, blocked, silent, tmp_path):
    """A hub is asked nine times, for ten seconds each; here for one, as HF_HUB_ETAG_TIMEOUT and PIP_TIMEOUT have it."""
    environment, tries = blocked
    codes = ended(
        environment
        | {"HF_ENDPOINT": silent, "HF_HUB_ETAG_TIMEOUT": "1", "PIP_INDEX_URL": silent, "PIP_TIMEOUT": "1"}
        | {"GRAFT_CACHE": str(tmp_path / "cache"), "PIP_CONFIG_FILE": os.devnull},
        place,
        ("plan", "--model", "someone/a-model"),
        ("assets", "pull", "tweets"),
    )
    assert [code for _, code, _ in codes] == [3, 3], codes
    for (_, _, said), words in zip(codes, ("a-model: the model hub cannot be reached", "vaderSentiment"), strict=True):
        lines = [line for line in said.splitlines() if line.startswith("graft: ")]
        assert len(lines) == 1, said
        assert words in lines[0]
    assert not tries.exists(), tries.read_text()
