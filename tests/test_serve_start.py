"""Starting a server: its command line, its address, slow clients, and vLLM in its place."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import bases
import pytest
import served
import tiny

from graft.cli.serve import serve
from graft.errors import ResourceError, UsageError
from graft.model import load_base
from graft.serve.security import Access
from graft.serve.server import bind
from graft.serve.speech import Speech
from graft.serve.start import capacity_of, check_base, parse_adapters, public_name
from graft.serve.state import State
from graft.serve.vllm import start_vllm, unserved, vllm_command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served.write_all(tmp_path_factory.mktemp("start"))


def graft(*words, **more):
    command = [sys.executable, "-m", "graft", "serve", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **more)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"host": "0.0.0.0"}, "demands a key"), ({"adapter": ["a=x", "a=y"]}, "given twice"),
        ({"state": "."}, "--adapter-root"), ({"adapter_root": "none"}, "no such folder"), ({"dry_run": True}, "vllm"),
        ({"kv_memory": "much"}, "no amount of memory"), ({"adapter": ["a=none"]}, "neither a run nor an adapter"),
        ({"base": "none/at/all"}, "no such model"), ({"api_key": "short"}, "8 printable"),
    ],
)  # fmt: skip
def test_faulty_calls_are_refused(folder, monkeypatch, given, said):
    monkeypatch.delenv("GRAFT_API_KEY", raising=False)
    given = {key: Path(value) if key in ("state", "adapter_root") else value for key, value in given.items()}
    with pytest.raises(UsageError, match=said):
        serve(given.pop("base", str(folder / "model")), port=0, **given)


@pytest.mark.slow
def test_an_error_is_one_line(folder):
    done = graft(folder / "model", "--adapter", f"a={folder}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_addresses_that_are_taken_or_unknown():
    with bind("127.0.0.1", 0) as first:  # no second server, while the first one still loads its model
        port = first.getsockname()[1]
        with pytest.raises(ResourceError, match=f"port {port} of 127.0.0.1 cannot be used"):
            bind("127.0.0.1", port)
    with pytest.raises(UsageError, match="no such address"):
        bind("no such host", 0)


def test_words_of_the_command_line(folder):
    assert list(parse_adapters(["a=x/y", "runs/b", "runs/c/adapter"])) == ["a", "b", "c"]
    assert public_name(str(folder / "model")) == "model"
    assert public_name("org/name") == "org/name"
    base = load_base(str(folder / "model"))
    assert capacity_of(base, 2**20) == 2**20 // (2 * 2 * 2 * 16 * 4)
    with pytest.raises(UsageError, match="256 are needed"):
        capacity_of(base, 1000)
    check_base(str(folder / "model"), False)


def test_stop_strings_over_pieces():
    words = ["one ", "tw", "o th", "ree", " four", "\ufffd", "!"]
    for stops, expected in (
        ((), "one two three four\ufffd!"), (("two",), "one "), (("three", "o th"), "one tw"),
        (("never",), "one two three four\ufffd!"), (("four!",), "one two three four\ufffd!"), (("o", "one"), ""),
    ):  # fmt: skip
        speech = Speech(lambda ids: "".join(words[index] for index in ids), stops)
        given = [speech.add(index) for index in range(len(words))]
        given.append(speech.rest())
        assert "".join(given) == expected, stops
        assert speech.stopped == (expected != "".join(words))
        if not stops:
            assert given[1] == "tw"


def test_the_state_file(tmp_path):
    state = State(tmp_path / "made")
    assert state.read() == {}
    state.add("a", "x/a")
    state.add("b", "y")
    state.drop("a")
    state.drop("none")
    assert State(tmp_path / "made").read() == {"b": "y"}
    state.path.write_text('{"b": 1}')
    with pytest.raises(Exception, match="remove it"):
        state.read()


@pytest.mark.slow
def test_clients_that_send_nothing_are_left(folder):
    """A connection that never finishes its headers, or its body, is closed; others are answered meanwhile."""
    script = (
        "import sys, graft.serve.security as s; s.Limits.__init__.__defaults__ = (1000, 100, 0.5);"
        "from graft.__main__ import start; start()"
    )
    command = [sys.executable, "-c", script, "serve", str(folder / "model"), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        line = next(line for line in process.stdout if "listening" in line)
        port = int(line.rsplit(":", 1)[1])
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        slow[1].sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: ")
        slow[2].sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        started = time.monotonic()
        assert served.get(f"http://127.0.0.1:{port}", "/health")[0] == 200
        told = []
        for connection in slow:
            connection.settimeout(10)
            told.append(connection.recv(4096))
            connection.close()
        assert time.monotonic() - started < 8
        assert told[0] == told[1] == b""
        assert told[2].startswith(b"HTTP/1.1 408")
        many = socket.create_connection(("127.0.0.1", port))
        many.settimeout(10)
        many.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X-A: b\r\n" * 10_000 + b"\r\n")
        assert many.recv(4096).startswith(b"HTTP/1.1 4")
        many.close()
        assert served.get(f"http://127.0.0.1:{port}", "/health")[0] == 200
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def test_vllm_gets_the_adapters_that_it_reads(folder, tmp_path, capsys, monkeypatch):
    adapters = {name: folder / "adapters" / name for name in ("lora", "other", "ia3", "prefix", "mood")}
    said: list[str] = []
    start_vllm(str(folder / "model"), adapters, "base", Access(), 8001, dry_run=True, say=said.append)
    command = capsys.readouterr().out
    assert command.startswith("vllm serve ")
    assert "--enable-lora" in command
    assert "--max-lora-rank 8" in command
    assert f"lora={folder}" in command
    assert "ia3=" not in command
    assert [line.split(": ")[1] for line in said] == ["ia3", "prefix", "mood"]
    assert all(len(line.split(": ", 2)[2]) > 10 for line in said)
    with pytest.raises(UsageError, match="none of these"):
        start_vllm(str(folder / "model"), {"ia3": adapters["ia3"]}, "base", Access(), 8001, say=said.append)
    assert unserved(adapters["lora"]) is None
    assert "--enable-lora" not in vllm_command(str(folder / "model"), {}, "base", Access(), 8001)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match="not installed"):
        start_vllm(str(folder / "model"), {}, "base", Access(), 8001)


@pytest.mark.slow
def test_vllm_is_started_in_the_place_of_this_process(folder, tmp_path):
    fake = tmp_path / "vllm"
    fake.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([sys.argv[1:], os.environ.get('VLLM_API_KEY'), os.environ.get('GRAFT_API_KEY')]))\n"
    )
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GRAFT_API_KEY": "a-long-secret"}
    words = [folder / "model", "--adapter", f"a={folder / 'adapters/lora'}", "--engine", "vllm", "--host", "0.0.0.0"]
    done = graft(*words, env=environment)
    given, key, other = json.loads(done.stdout)
    assert done.returncode == 0
    assert given[:2] == ["serve", str(folder / "model")]
    assert "a-long-secret" not in given
    assert (key, other) == ("a-long-secret", None)


def test_encoder_decoders_without_a_classifier_are_refused_at_the_start(tmp_path):
    tiny.write_model(tmp_path / "t5")  # for its tokenizer
    bases.make("t5").model.save_pretrained(tmp_path / "t5")
    with pytest.raises(UsageError, match="an encoder-decoder: it serves classifiers, and none is given"):
        serve(str(tmp_path / "t5"), port=0)
