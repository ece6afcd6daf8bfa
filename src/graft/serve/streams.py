"""Answers as they are sent: whole, or as server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from graft.serve.answers import Answering
from graft.serve.batch import Token
from graft.serve.engine import Ended
from graft.serve.replies import Refusal, json_reply, refusal_of


async def whole(answer: Answering, request: Request) -> Response:
    """Every answer in one object, when all are written. The rows end when the client goes away."""
    texts = [""] * len(answer.job.rows)
    tokens: list[list[Token]] = [[] for _ in texts]
    endings: list[str] = [""] * len(texts)
    watcher = asyncio.create_task(_watch(request, answer))
    try:
        async for event in answer.pieces():
            if isinstance(event, Ended):
                endings[event.index] = event.ending
            else:
                texts[event.index] += event.text
                tokens[event.index] += event.tokens
    finally:
        watcher.cancel()
    choices = []
    for index, (text, ending) in enumerate(zip(texts, endings, strict=True)):
        said: dict[str, Any] = {"text": text}
        if answer.chat:
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        shares = answer.shares(index, tokens[index])
        choices.append({"index": index, **said, "logprobs": shares, "finish_reason": ending})
    kind = "chat.completion" if answer.chat else "text_completion"
    return json_reply(answer.head(kind) | {"choices": choices, "usage": answer.usage})


async def _watch(request: Request, answer: Answering) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    answer.drop()


def streamed(
    answer: Answering,
    include_usage: bool,
    done: Callable[[], None],
    refuse: Callable[[Exception], Refusal] = refusal_of,
) -> Response:
    """Server-sent events: the role, pieces, what ended each answer, the usage if asked for, and [DONE]. `done` is
    called behind the last, or when the client went away; `refuse` says what the client is told of an error.
    """
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(
        _events(answer, include_usage, done, refuse), media_type="text/event-stream", headers=headers
    )


async def _events(
    answer: Answering, include_usage: bool, done: Callable[[], None], refuse: Callable[[Exception], Refusal]
) -> AsyncIterator[str]:
    kind = "chat.completion.chunk" if answer.chat else "text_completion"
    more = {"usage": None} if include_usage else {}

    def event(index: int, text: str | None, tokens: tuple[Token, ...] = (), ending: str | None = None) -> str:
        said: dict[str, Any] = {"text": text or ""}
        if answer.chat:
            said = {"delta": {} if text is None else {"content": text}}
        shares = answer.shares(index, tokens) if tokens else None
        choice = {"index": index, **said, "logprobs": shares, "finish_reason": ending}
        return _line(answer.head(kind) | {"choices": [choice]} | more)

    try:
        for index in range(len(answer.job.rows) if answer.chat else 0):
            delta = {"role": "assistant", "content": "", "refusal": None}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            yield _line(answer.head(kind) | {"choices": [choice]} | more)
        async for one in answer.pieces():
            if isinstance(one, Ended):
                yield event(one.index, None, ending=one.ending)
            else:
                yield event(one.index, one.text, one.tokens)
    except Exception as error:
        yield f"data: {bytes(refuse(error).reply().body).decode()}\n\n"
        return
    finally:
        answer.job.cancel()
        done()
    if include_usage:
        yield _line(answer.head(kind) | {"choices": [], "usage": answer.usage})
    yield "data: [DONE]\n\n"


def _line(told: dict[str, Any]) -> str:
    return f"data: {json.dumps(told)}\n\n"
