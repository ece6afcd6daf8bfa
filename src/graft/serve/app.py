"""The routes: requests in OpenAI's shapes, and adapters that come and go as vLLM spells it."""

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from graft import __version__
from graft.errors import GraftError, UsageError
from graft.serve.adapters import Adapters, Version, adapter_folder
from graft.serve.answers import Answering, answering, include_usage
from graft.serve.engine import Engine, Stopping
from graft.serve.metrics import Meter
from graft.serve.replies import (
    ChatReply,
    ClassifyReply,
    ErrorReply,
    Health,
    ModelCard,
    ModelList,
    Refusal,
    TextReply,
    json_reply,
    refusal_of,
)
from graft.serve.schemas import ChatRequest, ClassifyRequest, CompletionRequest, LoadRequest, UnloadRequest
from graft.serve.security import log_line, notes_of
from graft.serve.state import State
from graft.serve.streams import streamed, whole
from graft.serve.texts import Texts, read_texts

_ERRORS = {
    400: "the request cannot be answered as it is", 401: "no key, or a wrong one", 403: "not from here",
    404: "no such model", 408: "the body came too slowly", 413: "the body is too large", 429: "too many wait",
    500: "the server failed", 503: "stopping, loading, or no memory: try again",
}  # fmt: skip


@dataclass(eq=False)
class Service:
    """What the routes work with."""

    adapters: Adapters
    engine: Engine
    meter: Meter
    root: Path | None = None
    """Where adapters that come in by request must lie; None refuses them."""
    state: State | None = None

    @property
    def hidden(self) -> tuple[tuple[str, str], ...]:
        """Paths that no answer tells, and what it tells in their place."""
        folders = [version.folder for version in self.adapters.versions() if version.folder is not None]
        found = [(str(folder), folder.name) for folder in folders]
        roots = [] if self.root is None else [(f"{self.root}{os.sep}", ""), (str(self.root), "the adapter root")]
        return (*found, *roots)


def make_app(service: Service) -> FastAPI:
    """The application, without what stands before it: see `security.Guard`."""
    app = FastAPI(title="graft serve", version=__version__, docs_url=None, redoc_url=None)
    _errors(app, service)
    _answers(app, service)
    _models(app, service)
    _watching(app, service)
    _describe(app)
    return app


def _documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": ErrorReply, "description": _ERRORS[code]} for code in sorted({*statuses, 401, 403, 500})}


_BODY = (400, 408, 413, 503)
_STREAM = {"description": "the answer; with stream: true as events", "content": {"text/event-stream": {}}}


def _answers(app: FastAPI, service: Service) -> None:
    engine = service.engine
    errors = _documented(*_BODY, 404, 429)

    @app.post("/v1/chat/completions", response_model=ChatReply, responses={200: _STREAM, **errors})
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a dialogue."""
        return await _answered(body, request)

    @app.post("/v1/completions", response_model=TextReply, responses={200: _STREAM, **errors})
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Go on from a text."""
        return await _answered(body, request)

    async def _answered(body: ChatRequest | CompletionRequest, request: Request) -> Response:
        usage = include_usage(body)
        version = service.adapters.find(body.model)
        notes = notes_of(request.scope)
        notes |= {"model": version.name, "stream": bool(body.stream)}
        answer = answering(engine, version, body)
        notes["prompt_tokens"] = answer.prompts
        if body.stream:
            return streamed(
                answer, usage, lambda: _note(notes, answer), lambda error: refusal_of(error, service.hidden)
            )
        try:
            return await whole(answer, request)
        finally:
            _note(notes, answer)

    @app.post("/v1/classify", response_model=ClassifyReply, responses=errors)
    async def classify(body: ClassifyRequest, request: Request) -> Response:
        """Label texts, by the head of the adapter."""
        version = service.adapters.find(body.model)
        notes_of(request.scope).update(model=version.name, texts=len(body.texts))
        if not version.labels:
            raise Refusal(400, f"{version.name!r} is no classifier", param="model", code="wrong_task")
        texts = Texts(version, read_texts(service.adapters.base, version, body.texts, body.pairs))
        engine.classify(texts)
        shares = await asyncio.wrap_future(texts.future)
        return json_reply(_labelled(texts, shares))


def _note(notes: dict[str, Any], answer: Answering) -> None:
    notes["completion_tokens"] = answer.job.written
    if answer.job.first is not None:
        notes["first_token"] = round(answer.job.first - answer.job.started, 4)


def _labelled(texts: Texts, shares: list[list[float]]) -> dict[str, Any]:
    labels = texts.version.labels
    best = [max(range(len(labels)), key=row.__getitem__) for row in shares]
    data = [
        {"index": index, "label": labels[place], "probs": row, "num_classes": len(labels)}
        for index, (place, row) in enumerate(zip(best, shares, strict=True))
    ]
    read = sum(len(row) for row in texts.rows)
    usage = {"prompt_tokens": read, "completion_tokens": 0, "total_tokens": read}
    head = {"id": f"classify-{id(texts):x}", "object": "list", "created": int(time.time())}
    return head | {"model": texts.version.name, "labels": list(labels), "data": data, "usage": usage}


def _models(app: FastAPI, service: Service) -> None:
    adapters, engine = service.adapters, service.engine

    def card(version: Version) -> dict[str, Any]:
        renderer = version.renderer
        return {
            "id": version.name, "object": "model", "created": version.created, "owned_by": "graft",
            "root": version.name, "parent": None if version is adapters.plain else adapters.plain.name,
            "task": version.task, "method": version.method, "labels": list(version.labels), "note": version.note,
            "chat_template": renderer.sha256 if renderer is not None and renderer.template else None,
            "loaded": version.attached,
        }  # fmt: skip

    @app.get("/v1/models", response_model=ModelList, responses=_documented(408))
    async def models() -> Response:
        """Every name that can be asked for."""
        return json_reply({"object": "list", "data": [card(version) for version in adapters.versions()]})

    @app.get("/v1/models/{name:path}", response_model=ModelCard, responses=_documented(400, 404, 503))
    async def model(name: str) -> Response:
        """One of them."""
        return json_reply(card(adapters.find(name)))

    @app.post("/v1/load_lora_adapter", response_model=ModelCard, responses=_documented(*_BODY, 404))
    async def load(body: LoadRequest, request: Request) -> Response:
        """Serve an adapter of any method from a folder inside the adapter root."""
        root = service.root
        if root is None:
            raise Refusal(403, "adapters are not loaded by request: start the server with --adapter-root")
        if engine.draining:
            raise Stopping("the server is stopping", "ask again when it is back")
        folder = inside(root, body.lora_path)
        with adapters.loading(body.lora_name):
            version = adapters.prepare(body.lora_name, folder, body.load_inplace)
            await asyncio.wrap_future(engine.install(version))
        if service.state is not None:
            _noted(lambda state: state.add(version.name, str(folder.relative_to(root))), service.state)
        log_line("loaded", model=version.name, method=version.method, note=version.note)
        notes_of(request.scope)["model"] = version.name
        return json_reply(card(version))

    @app.post("/v1/unload_lora_adapter", response_model=ModelCard, responses=_documented(*_BODY, 404))
    async def unload(body: UnloadRequest, request: Request) -> Response:
        """Serve an adapter no more. Requests in flight end with it."""
        if service.root is None:
            raise Refusal(403, "adapters are not unloaded by request: start the server with --adapter-root")
        version = adapters.find(body.lora_name)
        if version is adapters.plain:
            raise UsageError(f"{version.name!r} is the base, which stays")
        await asyncio.wrap_future(engine.call(lambda: adapters.remove(body.lora_name)))
        if service.state is not None:
            _noted(lambda state: state.drop(version.name), service.state)
        log_line("unloaded", model=version.name)
        notes_of(request.scope)["model"] = version.name
        return json_reply(card(version))


def _noted(write: Callable[[State], None], state: State) -> None:
    """Write the state file. Raises `Refusal` where that fails, without the file's path."""
    try:
        write(state)
    except GraftError as error:
        log_line("state", why=type(error).__name__)
        raise Refusal(503, "it is done, but could not be noted for the server's next start") from None


def inside(root: Path, given: str) -> Path:
    """The folder that a request names, links followed. Raises `Refusal` for one that is not inside `root`, or whose
    files are not: no other path is looked at.
    """
    outside = Refusal(400, "lora_path: it must be a folder inside the adapter root", param="lora_path")
    try:
        path = Path(os.path.realpath(root / given))
        if not path.is_relative_to(root):
            raise outside
        folder = Path(os.path.realpath(adapter_folder(path)))
        files = [folder, *folder.iterdir(), path / "recipe.yaml", path / "status.json"]
        if not all(Path(os.path.realpath(file)).is_relative_to(root) for file in files):
            raise outside
    except (OSError, ValueError):
        raise outside from None
    return folder


def _watching(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=Health, responses={503: {"model": Health, "description": "no requests"}})
    async def health() -> Response:
        """Whether requests are taken; needs no key."""
        status = "failed" if not service.engine.alive else "stopping" if service.engine.draining else "ok"
        return json_reply({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **_documented()})
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.meter.text(), media_type="text/plain; version=0.0.4")


def _errors(app: FastAPI, service: Service) -> None:
    @app.exception_handler(Exception)
    @app.exception_handler(GraftError)
    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Exception) -> Response:
        return refusal_of(error, service.hidden).reply()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])[:200]
        said = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            said = "this field is not offered; leave it out"
        elif first["type"] == "json_invalid":
            said, place = f"the body is no JSON ({first.get('ctx', {}).get('error', '')})", ""
        elif not place:
            said = f"{said}: send a JSON object, with content-type application/json" if len(said) < 60 else said
        return Refusal(400, f"{place}: {said}" if place else said, param=place or None).reply()

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        said = {404: "no such address", 405: "this address takes another method"}.get(error.status_code, error.detail)
        return Refusal(error.status_code, said, headers=dict(error.headers or {})).reply()


def _describe(app: FastAPI) -> None:
    """Let the description say what is true: faults in a body are answered with 400, not with 422."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = described()
            for operations in schema["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                with suppress(KeyError):
                    del schema["components"]["schemas"][name]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
