"""The server as its clients see it: the openai package against a real process."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import openai
import pytest
import served
from served import METHODS, alone, get, post, server

QUESTION = "abcdef the sea?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served.write_all(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def running(folder):
    adapters = [word for name in (*METHODS, "mood") for word in ("--adapter", f"{name}={folder / 'adapters' / name}")]
    root = ["--adapter-root", str(folder / "adapters"), "--state", str(folder / "state")]
    with server(folder, *adapters, *root, "--precision", "fp32") as (address, process):
        yield address, process


@pytest.fixture
def client(running):
    with openai.OpenAI(base_url=f"{running[0]}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


def ask(client, model, **more):
    options = {"temperature": 0, "max_tokens": 12} | more
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": QUESTION}], **options)


@pytest.mark.parametrize("method", [None, *METHODS])
def test_the_openai_package_gets_what_generate_gives(client, folder, method):
    text, ending = alone(folder, method, QUESTION)
    answer = ask(client, method or "model")
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == ending
    assert answer.object == "chat.completion"
    assert answer.model == (method or "model")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens <= 12


def test_streams_give_the_same_text_in_pieces(client, folder):
    text, ending = alone(folder, "lora", QUESTION)
    chunks = list(ask(client, "lora", stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    said = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(one.delta.content or "" for one in said) == text
    assert [one.finish_reason for one in said[:-1]] == [None] * (len(said) - 1)
    assert said[-1].finish_reason == ending
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    assert len(said) > 4


def test_events_end_with_done(running):
    body = {"model": "lora", "prompt": "abc", "max_tokens": 3, "temperature": 0, "stream": True}
    status, text = post(running[0], "/v1/completions", body)
    lines = [line for line in text.split("\n\n") if line]
    assert status == 200
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["object"] == "text_completion" for line in lines[:-1])


def test_completions_of_texts_and_ids(client):
    first = client.completions.create(model="lora", prompt="abc", max_tokens=6, temperature=0)
    both = client.completions.create(model="lora", prompt=["abc", "xyz"], max_tokens=6, temperature=0)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == first.choices[0].text
    ids = client.completions.create(model="lora", prompt=[5, 6, 7], max_tokens=6, temperature=0, logprobs=2)
    shares = ids.choices[0].logprobs
    assert len(shares.tokens) == len(shares.token_logprobs) == len(shares.top_logprobs) == len(shares.text_offset) == 6
    assert all(share < 0 for share in shares.token_logprobs)
    assert all(len(best) <= 2 for best in shares.top_logprobs)
    assert client.completions.create(model="lora", prompt="abc").usage.completion_tokens <= 16


def test_seed_n_and_stop(client, folder):
    options = {"temperature": 1.5, "n": 4, "seed": 7, "max_tokens": 8}
    one, two = ask(client, "ia3", **options), ask(client, "ia3", **options)
    said = [choice.message.content for choice in one.choices]
    assert said == [choice.message.content for choice in two.choices]
    assert len(set(said)) > 2
    assert said != [choice.message.content for choice in ask(client, "ia3", **(options | {"seed": 8})).choices]
    text, _ = alone(folder, "lora", QUESTION)
    stop = text[4:6]
    cut = ask(client, "lora", stop=["never there", stop]).choices[0]
    assert cut.message.content == text[: text.index(stop)]
    assert cut.finish_reason == "stop"
    pieces = [c.choices[0].delta.content or "" for c in ask(client, "lora", stop=stop, stream=True)]
    assert "".join(pieces) == cut.message.content


def test_shares_of_tokens(client):
    answer = ask(client, "prefix", logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob  # greedy
    chunks = list(ask(client, "prefix", logprobs=True, stream=True))
    told = [share for c in chunks for share in (c.choices[0].logprobs.content if c.choices[0].logprobs else [])]
    assert [share.token for share in told] == [share.token for share in content]


def test_models_are_listed_without_paths(client, running, folder):
    cards = {card.id: card for card in client.models.list()}
    assert {"model", *METHODS, "mood"} <= set(cards)
    assert cards["lora"].parent == "model"
    assert cards["model"].parent is None
    assert cards["mood"].task == "classify"
    assert cards["lora"].method == "lora"
    assert str(folder) not in json.dumps(get(running[0], "/v1/models")[1])
    assert client.models.retrieve("lora").id == "lora"


def test_texts_are_classified(running):
    status, answer = post(running[0], "/v1/classify", {"model": "mood", "input": ["abc the sea", "xyz"]})
    assert status == 200
    assert answer["labels"] == list(served.LABELS["mood"])
    for index, row in enumerate(answer["data"]):
        assert row["index"] == index
        assert sum(row["probs"]) == pytest.approx(1, abs=1e-5)
        assert row["label"] == answer["labels"][max(range(3), key=row["probs"].__getitem__)]
    assert post(running[0], "/v1/classify", {"model": "lora", "input": "a"})[0] == 400
    assert (
        post(running[0], "/v1/chat/completions", {"model": "mood", "messages": [{"role": "user", "content": "a"}]})[1][
            "error"
        ]["code"]
        == "wrong_task"
    )


def test_errors_are_those_the_package_knows(client):
    with pytest.raises(openai.NotFoundError) as found:
        ask(client, "lorra")
    assert found.value.code == "model_not_found"
    assert "did you mean 'lora'" in str(found.value)
    for wrong in (
        {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 10**9}, {"temperature": -1}, {"temperature": 1e9},
        {"top_p": 0}, {"n": 1000}, {"stop": ["a"] * 1000}, {"stop": ""}, {"seed": -1}, {"frequency_penalty": 1},
        {"logprobs": True, "top_logprobs": 10**6}, {"extra_body": {"max_tokens": "10"}},
        {"extra_body": {"chat_template": "{{ 1 }}"}},
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, "lora", **wrong)
        name = next(iter(wrong.get("extra_body", wrong)))
        assert name in str(refused.value) or "top_logprobs" in str(refused.value), str(refused.value)
    for messages in (
        [], [{"role": "system", "content": "a"}], [{"role": "robot", "content": "a"}],
        [{"role": "user", "content": None}], [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        [{"role": "user", "content": "x" * 300}],
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError, match=r"messages|prompt"):
            client.chat.completions.create(model="lora", messages=messages)
    parts = [{"type": "text", "text": "abcdef "}, {"type": "text", "text": "the sea?"}]
    joined = client.chat.completions.create(
        model="lora", messages=[{"role": "user", "content": parts}], temperature=0, max_tokens=12
    )
    assert joined.choices[0].message.content == ask(client, "lora").choices[0].message.content


def test_a_client_that_goes_away_frees_its_row(running):
    def value(name):
        text = get(running[0], "/metrics")[1]
        return float(next(line for line in text.splitlines() if line.startswith(name)).split()[-1])

    host, port = running[0].removeprefix("http://").split(":")
    for stream in (True, False):
        body = json.dumps({"model": "model", "prompt": "a", "max_tokens": 250, "temperature": 2, "stream": stream,
                           "n": 8}).encode()  # fmt: skip
        connection = socket.create_connection((host, int(port)))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: "
        connection.sendall(head.encode() + f"{len(body)}\r\n\r\n".encode() + body)
        limit = time.monotonic() + 10
        while value("graft_running_rows") < 1 and time.monotonic() < limit:
            pass
        connection.close()
        limit = time.monotonic() + 10
        while value("graft_running_rows") > 0 and time.monotonic() < limit:
            time.sleep(0.01)
        assert value("graft_running_rows") == 0
        assert value("graft_kv_columns") == 0
    cancelled = value('graft_requests_total{ending="cancelled",model="model"}')
    assert cancelled == 2


def test_adapters_come_and_go_while_it_serves(running, folder):
    address = running[0]
    text, _ = alone(folder, "other", QUESTION)
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 12}
    assert post(address, "/v1/load_lora_adapter", {"lora_name": "late", "lora_path": "other"})[0] == 200
    assert (
        post(address, "/v1/chat/completions", body | {"model": "late"})[1]["choices"][0]["message"]["content"] == text
    )
    again = {"lora_name": "late", "lora_path": str(folder / "adapters/lora")}
    assert post(address, "/v1/load_lora_adapter", again)[0] == 400
    assert post(address, "/v1/load_lora_adapter", again | {"load_inplace": True})[0] == 200
    other, _ = alone(folder, "lora", QUESTION)
    answered = post(address, "/v1/chat/completions", body | {"model": "late"})[1]
    assert answered["choices"][0]["message"]["content"] == other != text
    assert json.loads((folder / "state/adapters.json").read_text()) == {"late": "lora"}
    for name, path in (
        ("x", "../model"), ("x", "/etc"), ("x", "nothing"), ("x", "a\0b"), ("x", "y" * 900), ("model", "lora"),
        ("a/b", "lora"), ("..", "lora"), ("a\nb", "lora"), ("x" * 100, "lora"), ("", "lora"),
    ):  # fmt: skip
        status, told = post(address, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        assert status == 400, (name, path)
        assert str(folder) not in json.dumps(told), told
    assert post(address, "/v1/unload_lora_adapter", {"lora_name": "late"})[0] == 200
    assert post(address, "/v1/unload_lora_adapter", {"lora_name": "late"})[0] == 404
    assert post(address, "/v1/unload_lora_adapter", {"lora_name": "model"})[0] == 400
    assert post(address, "/v1/chat/completions", body | {"model": "late"})[0] == 404


@pytest.mark.slow
def test_what_was_loaded_is_listed_after_a_kill(folder, tmp_path):
    options = ["--adapter-root", str(folder / "adapters"), "--state", str(tmp_path / "state"), "--precision", "fp32"]
    with server(folder, *options) as (address, process):
        assert post(address, "/v1/load_lora_adapter", {"lora_name": "kept", "lora_path": "ia3"})[0] == 200
        process.kill()
        process.wait()
    (tmp_path / "state/adapters.json").write_text('{"kept": "ia3", "gone": "nothing"}')
    with server(folder, *options) as (address, process):
        assert [card["id"] for card in get(address, "/v1/models")[1]["data"]] == ["model", "kept"]
        taken = address.rsplit(":", 1)[1]
        command = [sys.executable, "-m", "graft", "serve", str(folder / "model"), "--port", taken]
        second = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert second.returncode == 3
        assert second.stderr.count("\n") == 1
        assert "--port" in second.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_stop_lets_requests_in_flight_end(folder, number, code):
    with server(folder, "--precision", "fp32", "--grace", "20") as (address, process):
        found = {}
        body = {"model": "model", "prompt": "a", "max_tokens": 240, "temperature": 2, "n": 8}
        thread = threading.Thread(target=lambda: found.update(reply=post(address, "/v1/completions", body)))
        thread.start()
        limit = time.monotonic() + 10
        while "graft_running_rows 0" in get(address, "/metrics")[1] and time.monotonic() < limit:
            pass
        process.send_signal(number)
        time.sleep(0.1)
        late = post(address, "/v1/completions", {"model": "model", "prompt": "a"})
        assert late[0] == 503
        assert get(address, "/health")[0] == 503
        thread.join(30)
        assert found["reply"][0] == 200
        assert process.wait(20) == code
        assert "Traceback" not in process.log.read_text()
