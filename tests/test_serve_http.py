"""What a server answers to requests that are wrong, too large, too slow, or not from here."""

import asyncio
import json
import warnings
from collections import Counter
from contextlib import contextmanager

import pytest
import served
import torch

from graft.errors import GraftError, UsageError
from graft.files import sha256_of
from graft.model import load_base
from graft.rendering import jinja
from graft.rendering.render import Renderer
from graft.serve.adapters import Adapters
from graft.serve.app import Service, make_app
from graft.serve.batch import Batch
from graft.serve.engine import Engine
from graft.serve.metrics import Meter
from graft.serve.replies import refusal_of
from graft.serve.security import Access, Guard, Limits
from graft.serve.start import Settings, load_service
from graft.serve.state import State

CHAT = {"model": "lora", "messages": [{"role": "user", "content": "abc"}], "max_tokens": 3, "temperature": 0}
KEY = "a-long-secret-key"


@contextmanager
def service(folder, access=None, limits=None, root=None, quiet=True, names=("lora", "prompt", "mood"), **options):
    base = load_base(str(folder / "model"))
    adapters = Adapters(base, "model", 4)
    for name in names:
        adapters.install(adapters.prepare(name, folder / "adapters" / name))
    meter = Meter()
    engine = Engine(adapters, Batch(base, 20_000), meter, **options)
    engine.start()
    found = Service(adapters, engine, meter, root, State(folder / "noted") if root else None)
    app = make_app(found)
    guard = Guard(app, access or Access(), limits or Limits(), meter, quiet)
    guard.app, guard.service = app, found
    try:
        yield guard
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served.write_all(tmp_path_factory.mktemp("http"))


@pytest.fixture(scope="module")
def guard(folder):
    with service(folder, root=(folder / "adapters").resolve()) as found:
        yield found


@pytest.fixture
def inside(guard):
    return served.Inside(guard)


def shaped(answer) -> bool:
    return set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("body", "type_"),
    [
        (b"", "application/json"), (b"{", "application/json"), (b"[]", "application/json"),
        (b"null", "application/json"),
        (json.dumps(CHAT).encode(), "text/plain"), (json.dumps(CHAT).encode(), None), (b"\xff\xfe", "application/json"),
        (b"[" * 100_000, "application/json"), (b'{"model":' * 5000 + b"1" + b"}" * 5000, "application/json"),
        (b'{"model": "lora", "messages": [], "max_tokens": ' + b"9" * 5000 + b"}", "application/json"),
        (json.dumps(CHAT).replace('"temperature": 0', '"temperature": NaN').encode(), "application/json"),
        (json.dumps(CHAT).replace('"temperature": 0', '"temperature": 1e999').encode(), "application/json"),
        (json.dumps(CHAT | {"messages": [{"role": "user", "content": "\ud800"}]}).encode(), "application/json"),
        (json.dumps(CHAT | {"\ud800": 1}).encode(), "application/json"),
        (json.dumps(CHAT | {"messages": [{"role": "user", "content": "\U0010fffd"}]}).encode(), "application/json"),
        (json.dumps(CHAT | {"stream": "yes"}).encode(), "application/json"),
        (json.dumps(CHAT | {"stream_options": {"include_usage": True}}).encode(), "application/json"),
        (json.dumps(CHAT | {"max_completion_tokens": 4}).encode(), "application/json"),
        (json.dumps(CHAT | {"tools": [{}]}).encode(), "application/json"),
    ],
)  # fmt: skip
def test_broken_bodies(inside, body, type_):
    status, answer = inside.post("/v1/chat/completions", body, {"content-type": type_})
    assert status == 400
    assert shaped(answer)
    assert len(answer["error"]["message"]) < 400


def test_the_same_body_unbroken(inside):
    status, answer = inside.post("/v1/chat/completions", CHAT)
    assert status == 200
    assert answer["usage"]["completion_tokens"] <= 3


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": []}), ("/v1/completions", {"prompt": ""}), ("/v1/completions", {"prompt": [-1]}),
        ("/v1/completions", {"prompt": [10**6]}), ("/v1/completions", {"prompt": [[]]}),
        ("/v1/completions", {"prompt": "a", "echo": True}), ("/v1/completions", {"prompt": "a" * 2000}),
        ("/v1/completions", {"prompt": "a" * 200_000}), ("/v1/completions", {"prompt": ["a"] * 100}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 256}), ("/v1/classify", {"input": "a"}),
        ("/v1/classify", {"model": "mood", "input": []}), ("/v1/classify", {"model": "mood", "input": ""}),
        ("/v1/classify", {"model": "mood", "input": "a" * 3000}),
        ("/v1/classify", {"model": "mood", "input": ["a"], "text_pair": ["a", "b"]}),
    ],
)  # fmt: skip
def test_wrong_prompts(inside, path, body):
    status, answer = inside.post(path, {"model": "lora"} | body)
    assert status == 400
    assert shaped(answer)


def test_addresses_and_methods(inside):
    for method, path, status in (
        ("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405), ("GET", "/docs", 404),
        ("GET", "/v1/models/none", 404), ("DELETE", "/v1/models", 405), ("GET", "/v1/models/../../etc/passwd", 404),
    ):  # fmt: skip
        found, _, text = inside.request(method, path)
        assert found == status
        assert shaped(json.loads(text))
    status, headers, text = inside.request("GET", "/metrics")
    assert status == 200
    assert headers[b"content-type"].startswith(b"text/plain")
    assert b"graft_refused_total" in text
    assert inside.request("GET", "/health")[0] == 200


def test_sizes_and_times(folder):
    limits = Limits(body_bytes=1000, headers=20, read_seconds=0.2)
    with service(folder, limits=limits) as guard:
        inside = served.Inside(guard)
        assert inside.post("/v1/chat/completions", b"x" * 1001)[0] == 413
        assert inside.post("/v1/chat/completions", b"{}", {"content-length": "99999999"})[0] == 413
        assert inside.post("/v1/chat/completions", b"{}", {"content-length": "-1"})[0] == 413
        many = {f"x-{number}": "1" for number in range(30)}
        assert inside.post("/v1/chat/completions", CHAT, many)[0] == 400

        async def silent(scope, receive, send):
            async def never():
                await asyncio.sleep(60)

            await guard(scope, never, send)

        status, answer = served.Inside(silent).post("/v1/chat/completions", b"")
        assert status == 408
        assert shaped(answer)


def test_the_key(folder):
    with service(folder, Access("0.0.0.0", KEY)) as guard:
        inside = served.Inside(guard)
        for given in ({}, {"authorization": KEY}, {"authorization": f"Bearer {KEY}x"}, {"authorization": "Bearer"},
                      {"authorization": f"Basic {KEY}"}, {"authorization": "Bearer é"}):  # fmt: skip
            for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/openapi.json")):
                status, _, text = inside.request(method, path, headers=given)
                assert status == 401
                assert shaped(json.loads(text))
                assert KEY not in text.decode()
        assert inside.request("GET", f"/v1/models?key={KEY}")[0] == 401
        right = {"authorization": f"Bearer {KEY}", "host": "example.org", "origin": "http://example.org"}
        assert inside.post("/v1/chat/completions", CHAT, right)[0] == 200
        assert inside.request("GET", "/health")[0] == 200
    for host in ("0.0.0.0", "192.168.1.4", "::", "example.org"):
        with pytest.raises(UsageError, match="demands a key"):
            Access(host)
    with pytest.raises(UsageError, match="8 printable"):
        Access("127.0.0.1", "short")
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.5"):
        Access(host)


def test_pages_of_other_origins_are_refused(inside):
    for headers in ({"host": "evil.example"}, {"host": "evil.example:8000"}, {"origin": "http://evil.example"},
                    {"origin": "null"}, {"host": "127.0.0.1.evil.example"}, {"host": ""}):  # fmt: skip
        assert inside.request("GET", "/v1/models", headers=headers)[0] == 403
    for headers in ({"host": "localhost:8000"}, {"host": "[::1]:80"}, {"origin": "http://localhost:3000"}):
        assert inside.request("GET", "/v1/models", headers=headers)[0] == 200


def test_the_log_has_no_texts_keys_or_paths(folder, capfd):
    with service(folder, Access("127.0.0.1", KEY), quiet=False) as guard:
        inside = served.Inside(guard)
        right = {"authorization": f"Bearer {KEY}"}
        secret = CHAT | {"messages": [{"role": "user", "content": "my secret words"}], "user": "somebody"}
        assert inside.post("/v1/chat/completions", secret, right)[0] == 200
        streamed = inside.request("POST", "/v1/chat/completions", json.dumps(secret | {"stream": True}).encode(), right)
        assert streamed[0] == 200
        assert inside.post("/v1/chat/completions", secret | {"model": "my secret words"}, right)[0] == 404
        assert inside.request("GET", "/my secret words")[0] == 401
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["status"] for line in lines] == [200, 200, 404, 401]
    assert all(line["completion_tokens"] == 3 and line["first_token"] > 0 for line in lines[:2])
    assert lines[0]["model"] == "lora"
    text = json.dumps(lines)
    for hidden in ("secret words", KEY, str(folder), "somebody"):
        assert hidden not in text


def test_failures_inside_are_told_without_their_words(guard, inside, monkeypatch):
    def broken(name):
        raise RuntimeError("a secret path")

    monkeypatch.setattr(guard.service.adapters, "find", broken)
    status, answer = inside.post("/v1/chat/completions", CHAT)
    assert status == 500
    assert shaped(answer)
    assert "secret" not in json.dumps(answer)


def test_adapters_are_refused_without_a_root(folder):
    with service(folder) as guard:
        inside = served.Inside(guard)
        assert inside.post("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "lora"})[0] == 403
        assert inside.post("/v1/unload_lora_adapter", {"lora_name": "lora"})[0] == 403


def test_links_do_not_lead_out_of_the_root(folder, inside):
    root = folder / "adapters"
    (root / "way-out").symlink_to(folder / "model")
    outside = folder / "outside"
    served.write_adapter(load_base(str(folder / "model")), outside, "lora")
    (root / "linked").symlink_to(outside)
    (root / "half").mkdir()
    for file in outside.iterdir():
        (root / "half" / file.name).symlink_to(file)
    try:
        for path in ("way-out", "linked", "half", "../outside", str(outside), "half/../../outside"):
            status, answer = inside.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": path})
            assert status == 400, path
            assert "inside the adapter root" in answer["error"]["message"]
    finally:
        (root / "way-out").unlink()
        (root / "linked").unlink()


def test_an_adapter_that_is_loading_is_told_so(guard, inside):
    with guard.service.adapters.loading("late"):
        status, headers, text = inside.request(
            "POST", "/v1/chat/completions", json.dumps(CHAT | {"model": "late"}).encode()
        )
        assert status == 503
        assert headers[b"retry-after"] == b"1"
        assert json.loads(text)["error"]["code"] == "model_loading"
        assert inside.post("/v1/load_lora_adapter", {"lora_name": "late", "lora_path": "lora"})[0] == 503


def test_a_full_queue_is_429(folder):
    with service(folder, queue_limit=0) as guard:
        inside = served.Inside(guard)
        guard.service.engine._open = 64
        status, answer = inside.post("/v1/chat/completions", CHAT)
        assert status == 429
        assert answer["error"]["code"] == "queue_full"
        guard.service.engine._open = 0


def test_the_description_is_true(guard):
    """Requests made from the description, valid and not: no 5xx, and every answer is as described."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import schemathesis
        from hypothesis import HealthCheck, Phase, given, settings
        from schemathesis.checks import content_type_conformance, response_schema_conformance, status_code_conformance
        from schemathesis.generation import GenerationMode

        schema = schemathesis.openapi.from_dict(guard.app.openapi())
        schema.app = guard
        found = Counter()
        operations = [result.ok() for result in schema.get_all_operations()]
        for operation in operations:
            for mode in GenerationMode:
                if mode is GenerationMode.NEGATIVE and not list(operation.body):
                    continue

                @settings(
                    max_examples=70, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )  # fmt: skip
                @given(case=operation.as_strategy(generation_mode=mode))
                def run(case):
                    known = isinstance(case.body, dict) and sum(found.values()) % 2
                    if known and "model" in case.body:
                        case.body["model"] = "mood" if case.path.endswith("classify") else "lora"
                    response = case.call(base_url="http://localhost")
                    found[response.status_code] += 1
                    assert response.status_code < 500, response.text
                    checks = [status_code_conformance, response_schema_conformance, content_type_conformance]
                    case.validate_response(response, checks=checks)

                run()
    assert len(operations) == 9
    assert found.total() > 500
    assert found[200] > 40
    assert found[400] > 100


ATTACKS = {
    "reaches": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('id') }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "grows": "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
}  # fmt: skip
LATER = "{% for m in messages %}{{ m.content }}{% if 'zz' in m.content %}%s{% endif %}{% endfor %}"


def test_templates_that_attack_are_refused(folder, monkeypatch):
    """By a server that starts with them, by one that is told to load them, and where only a request sets them off."""
    monkeypatch.setattr(jinja, "_SECONDS", 0.4)
    base = load_base(str(folder / "model"))
    root = (folder / "adapters").resolve()
    for name, template in ATTACKS.items():
        place = served.write_adapter(base, root / name, "lora")
        about = json.loads((place / "graft.json").read_text())
        (place / "chat_template.jinja").write_text(template)
        told = about | {"template": {"sha256": sha256_of(place / "chat_template.jinja")}}
        (place / "graft.json").write_text(json.dumps(told))
        with pytest.raises(GraftError, match=r"sandbox|more than|undefined|refuses"):
            load_service(str(folder / "model"), {"x": place}, Settings())
    with service(folder, root=root) as guard:
        inside = served.Inside(guard)
        for name in ATTACKS:
            status, answer = inside.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": name})
            assert status == 400, answer
            assert str(folder) not in json.dumps(answer)
        assert inside.post("/v1/chat/completions", CHAT)[0] == 200
        plain = guard.service.adapters.find("lora")
        for template in ATTACKS.values():
            plain.renderer = Renderer(base.tokenizer, LATER.replace("%s", template))
            assert inside.post("/v1/chat/completions", CHAT)[0] == 200
            body = CHAT | {"messages": [{"role": "user", "content": "zz"}]}
            status, answer = inside.post("/v1/chat/completions", body)
            assert status == 400, answer
            assert shaped(answer)


@pytest.mark.parametrize("stream", [False, True])
def test_scores_that_are_no_numbers_are_told(folder, stream):
    with service(folder) as guard:
        inside = served.Inside(guard)
        adapters = guard.service.adapters
        with torch.no_grad():
            for _, tensor in adapters.base.adapters[adapters.find("lora").key].trainable():
                tensor.fill_(float("nan"))
        body = json.dumps(CHAT | {"stream": stream}).encode()
        status, _, text = inside.request("POST", "/v1/chat/completions", body)
        answer = json.loads(text.split(b"data: ")[-1] if stream else text)
        assert status == (200 if stream else 500)
        assert shaped(answer)
        assert answer["error"]["code"] == "unsound_scores"
        assert answer["error"]["type"] == "server_error"
        assert inside.post("/v1/chat/completions", CHAT | {"model": "prompt"})[0] == 200
        metrics = inside.request("GET", "/metrics")[2].decode()
        assert 'graft_unsound_total{model="lora"} 1.0' in metrics
        assert guard.service.engine.stop(5)
        assert "graft_running_rows 0.0" in guard.service.meter.text().decode()


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_while_it_answers_tells_no_path(folder, tmp_path, stream):
    """An adapter that was taken out of memory, and whose folder is damaged when it is read again."""
    place = served.write_adapter(load_base(str(folder / "model")), tmp_path / "in a folder" / "late", "lora")
    with service(folder, names=("prompt",)) as guard:
        adapters = guard.service.adapters
        guard.service.engine.install(adapters.prepare("late", place)).result(30)
        guard.service.engine.call(lambda: adapters._take_out(adapters.find("late"))).result(30)
        (place / "adapter_config.json").write_text("{")
        body = json.dumps(CHAT | {"model": "late", "stream": stream}).encode()
        status, _, text = served.Inside(guard).request("POST", "/v1/chat/completions", body)
        assert status == (200 if stream else 400)
        assert b"not JSON" in text
        assert b"in a folder" not in text
        assert str(tmp_path).encode() not in text


def test_paths_in_errors_are_cut():
    for said, told in (
        ("/home/a/b.json: bad", "b.json: bad"), ("in '/srv/x y' and ~/k/l", "in 'x y' and l"),
        ("a/b of 3 and/or /v", "a/b of 3 and/or v"), ("made for ../../x/base, else", "made for base, else"),
    ):  # fmt: skip
        assert refusal_of(UsageError(said), (("/srv/x y", "x y"),)).message == told
