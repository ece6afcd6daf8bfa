"""A tiny chat model with adapters of several methods on disk, and servers of it: in process, or as a program."""

import asyncio
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import bases
import tiny_chat
import torch

from graft.generate import answer_all
from graft.methods import store
from graft.methods.base import read_method
from graft.model import load_base
from graft.parts.attach import attach, detach
from graft.parts.head import TaskHead
from graft.rendering.render import Renderer

METHODS = ("lora", "bottleneck", "prefix", "ia3", "prompt")
LABELS = {"mood": ("good", "bad", "mixed"), "topic": ("sport", "law", "arts"), "spam": ("no", "yes")}


def write_adapter(base, folder: Path, method: str, seed: int = 1, labels=(), template=None, shake=0.3, **more) -> Path:
    """A random adapter of a method, saved as a run's adapter is."""
    torch.manual_seed(seed)
    settings = {"name": method} | bases.settings(method) | more
    adapter = read_method(settings).build(base, "made")
    if labels:
        adapter.head = TaskHead.for_base(base, tuple(labels), "mean" if base.family.kind == "encoder" else "last")
    attach(base, adapter)
    with torch.no_grad():
        for _, tensor in adapter.trainable():
            tensor.add_(torch.randn_like(tensor) * shake)
    adapter.eval()
    store.save(adapter, base, folder, template=template)
    detach(base, "made")
    return folder


def write_all(folder: Path) -> Path:
    """`model/`, and below `adapters/` one of each method, two of `lora`, and three classifiers."""
    tiny_chat.write_model(folder / "model")
    base = load_base(str(folder / "model"))
    for number, method in enumerate(METHODS):
        write_adapter(base, folder / "adapters" / method, method, seed=number + 1)
    write_adapter(base, folder / "adapters/other", "lora", seed=99)
    for number, (name, labels) in enumerate(LABELS.items()):
        write_adapter(base, folder / "adapters" / name, ("lora", "ia3", "prompt")[number], 50 + number, labels)
    return folder


def alone(folder: Path, adapter: str | None, text: str, tokens: int = 12) -> tuple[str, str]:
    """What `generate` answers a user's turn by itself, and what ended it."""
    base = load_base(str(folder / "model"))
    place = folder / "adapters" / adapter if adapter else None
    entry = store.load(base, place, "a").name if place else None
    renderer = Renderer(base.tokenizer)
    prompt = renderer.prompt([tiny_message(text)])
    answer = answer_all(base, [prompt], entry, max_new_tokens=tokens, stop_ids=renderer.stop_ids)[0]
    return base.tokenizer.decode(answer.ids, skip_special_tokens=True), "stop" if answer.ended else "length"


def tiny_message(text: str):
    from graft.data.dialogue import Message

    return Message("user", text)


@contextmanager
def server(folder: Path, *options: str, model: str | None = None, wait: float = 60.0, env=None):
    """`graft serve` as a program on a free port: its address and process."""
    command = [sys.executable, "-m", "graft", "serve", model or str(folder / "model"), "--port", "0", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | (env or {})
    errors = (folder / f"server-{os.getpid()}-{len(list(folder.glob('server-*')))}.txt").open("w+")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    try:
        address = None
        for line in process.stdout:
            found = re.search(r"listening on (http://\S+)", line)
            if found:
                address = found[1]
                break
        assert address, Path(errors.name).read_text()
        process.log = Path(errors.name)
        yield address, process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(wait)
        process.stdout.close()
        errors.close()


def post(address: str, path: str, body, headers=None, timeout=30):
    """Status and JSON of a request; `body` may be bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        address + path, data, {"Content-Type": "application/json"} | (headers or {}), method="POST"
    )
    return _asked(request, timeout)


def get(address: str, path: str, headers=None):
    """Status and JSON, or text."""
    return _asked(urllib.request.Request(address + path, headers=headers or {}), 30)


def _asked(request, timeout):
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            text = answer.read().decode()
            return answer.status, json.loads(text) if "json" in answer.headers["content-type"] else text
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read().decode() or "{}")


class Inside:
    """An ASGI application asked in this process."""

    def __init__(self, app) -> None:
        self.app = app

    def request(self, method: str, path: str, body: bytes | None = None, headers=None, leave_after: int | None = None):
        """Status, headers and body; with `leave_after` the client goes away behind so many pieces."""
        return asyncio.run(self._request(method, path, body or b"", headers or {}, leave_after))

    async def _request(self, method, path, body, headers, leave_after):
        given = {"host": "localhost", "content-type": "application/json"} | headers
        path, _, query = path.partition("?")
        scope = {
            "type": "http", "http_version": "1.1", "method": method, "path": path, "raw_path": path.encode(),
            "query_string": query.encode(), "root_path": "", "scheme": "http", "server": ("localhost", 80),
            "headers": [(key.lower().encode(), value.encode()) for key, value in given.items() if value is not None],
            "asgi": {"version": "3.0", "spec_version": "2.3"}, "client": ("127.0.0.1", 1), "state": {},
        }  # fmt: skip
        sent, gone = [], asyncio.Event()
        status, found = 0, {}
        first = True

        async def receive():
            nonlocal first
            if first:
                first = False
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            nonlocal status, found
            if message["type"] == "http.response.start":
                status, found = message["status"], dict(message["headers"])
            elif message.get("body"):
                sent.append(message["body"])
                if leave_after is not None and len(sent) >= leave_after:
                    gone.set()

        await self.app(scope, receive, send)
        gone.set()
        return status, found, b"".join(sent)

    def post(self, path: str, body, headers=None):
        """Status and JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, _, text = self.request("POST", path, data, headers)
        return status, json.loads(text)
