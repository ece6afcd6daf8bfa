"""From a request to rows of the batch, and from what is written back to OpenAI's shapes."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from graft.data.dialogue import Message, Role
from graft.errors import DataError, GraftError
from graft.model import Base
from graft.prompts import plain_ids
from graft.sampling import Sampling
from graft.serve.adapters import Version
from graft.serve.batch import Row, Token
from graft.serve.engine import Ended, Engine, Event, Failed, Job, Piece
from graft.serve.replies import Refusal
from graft.serve.schemas import ChatRequest, CompletionRequest, Sampled

CHAT_TOKENS = 512
"""Tokens of a chat's answer at most, where the request does not say."""
TEXT_TOKENS = 16
"""The same of a completion: OpenAI's own default."""
_CHARACTERS = 64
"""Characters of a token at most, in texts that are refused before they are read: long runs of one character are one."""


@dataclass(eq=False)
class Answering:
    """One request on its way: its job, and what comes back."""

    base: Base
    job: Job
    chat: bool
    prompts: int
    """Tokens of all prompts."""
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    events: "asyncio.Queue[Event]" = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)
        self.offsets = [0] * len(self.job.rows)

    async def pieces(self) -> AsyncIterator[Piece | Ended]:
        """What is written, until every row has ended. Raises what the engine failed with; cancels when left early."""
        open_rows = len(self.job.rows)
        try:
            while open_rows:
                event = await self.events.get()
                if isinstance(event, Failed):
                    raise event.error
                open_rows -= isinstance(event, Ended)
                yield event
        finally:
            if open_rows:
                self.job.cancel()

    def drop(self) -> None:
        """The client went away: end the rows, and whoever waits for `pieces`."""
        self.job.cancel()
        self.events.put_nowait(Failed(Refusal(499, "the client went away")))

    @property
    def usage(self) -> dict[str, int]:
        """Tokens counted."""
        written = self.job.written
        return {"prompt_tokens": self.prompts, "completion_tokens": written, "total_tokens": self.prompts + written}

    def head(self, kind: str) -> dict[str, Any]:
        """What every object of the answer begins with."""
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.job.version.name,
            "system_fingerprint": None,
        }  # fmt: skip

    def shares(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """The shares of tokens; None where they were not asked for."""
        if self.job.rows[index].top_logprobs is None:
            return None
        if self.chat:
            return {"content": [self._share(token) for token in tokens], "refusal": None}
        texts = [self._text(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self.offsets[index])
            self.offsets[index] += len(text)
        best = [{self._text(number): share for number, share in token.top} for token in tokens]
        return {
            "tokens": texts, "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": best if self.job.rows[index].top_logprobs else None, "text_offset": offsets,
        }  # fmt: skip

    def _text(self, token: int) -> str:
        return str(self.base.tokenizer.decode([token]))  # type: ignore[union-attr]

    def _share(self, token: Token) -> dict[str, Any]:
        def of(number: int, share: float) -> dict[str, Any]:
            text = self._text(number)
            return {"token": text, "logprob": share, "bytes": list(text.encode("utf-8", "replace"))}

        return of(token.id, token.logprob) | {"top_logprobs": [of(number, share) for number, share in token.top]}


def answering(engine: Engine, version: Version, request: ChatRequest | CompletionRequest) -> Answering:
    """The request read and taken in. Raises `Refusal` and errors of Graft for one that cannot be answered."""
    base = engine.adapters.base
    if version.renderer is None:
        name = repr(version.name)
        does = f"{name} is a classifier: ask it at /v1/classify" if version.labels else f"{name} writes no answers"
        raise Refusal(400, does, param="model", code="wrong_task")
    chat = isinstance(request, ChatRequest)
    room = room_of(base, version)
    prompts = (
        [_chat_ids(request, version, room)]
        if isinstance(request, ChatRequest)
        else _text_ids(request, version, base, room)
    )
    told = _told(request)
    seed = secrets.randbits(62) if request.seed is None else request.seed
    sampling = Sampling(_or(request.temperature, 1.0), _or(request.top_p, 1.0), seed=seed)
    rows = []
    for prompt in prompts:
        limit = _limit(request, len(prompt), room)
        for number in range(request.n or 1):
            row = Row(prompt, limit, version.renderer.stop_ids, sampling, number, told, virtual=version.virtual)
            if not engine.batch.fits(row):
                most = engine.batch.capacity
                said = f"prompt and answer of {len(prompt) + limit:,} tokens do not fit the memory for keys and values"
                raise Refusal(400, f"{said}, which holds {most:,} with their room to grow", param="max_tokens")
            rows.append(row)
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[Event] = asyncio.Queue()

    def tell(event: Event) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    def decode(ids: Sequence[int]) -> str:
        return str(base.tokenizer.decode(list(ids), skip_special_tokens=True))  # type: ignore[union-attr]

    job = Job(version, rows, tell, decode, request.stops)
    found = Answering(base, job, chat, sum(map(len, prompts)), events=events)
    engine.submit(job)
    engine.meter.asked(version.name, found.prompts)
    return found


def room_of(base: Base, version: Version) -> int | None:
    """The most tokens of a prompt with its answer, without the adapter's own; None where there is no limit."""
    stated = getattr(base.config, "max_position_embeddings", None)
    limits = [limit for limit in (base.max_positions, stated) if isinstance(limit, int)]
    return min(limits) - version.taken if limits and base.family.positions != "relative" else None


def _limit(request: ChatRequest | CompletionRequest, prompt: int, room: int | None) -> int:
    """Tokens of the answer at most. Raises `Refusal` where the positions do not reach."""
    asked = request.max_tokens
    if isinstance(request, ChatRequest):
        asked = asked or request.max_completion_tokens
    if room is not None and prompt >= room:
        raise Refusal(
            400, f"the prompt has {prompt:,} tokens, the model reads {room:,} with the answer: shorten it",
            code="context_length_exceeded",
        )  # fmt: skip
    if asked is None:
        default = CHAT_TOKENS if isinstance(request, ChatRequest) else TEXT_TOKENS
        return default if room is None else min(default, room - prompt)
    if asked > (2**20 if room is None else room - prompt):
        most = 2**20 if room is None else room - prompt
        said = f"max_tokens is {asked:,}, behind a prompt of {prompt:,} tokens at most {most:,} fit"
        raise Refusal(400, said, param="max_tokens", code="context_length_exceeded")
    return asked


def _told(request: ChatRequest | CompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    return (request.top_logprobs or 0) if request.logprobs else None


def _chat_ids(request: ChatRequest, version: Version, room: int | None) -> list[int]:
    """The ids of a dialogue, through the template that the adapter was trained with."""
    assert version.renderer is not None
    _check_size(sum(len(message.text) for message in request.messages), room)
    roles: dict[str, Role] = {"developer": "system"}
    messages = [
        Message(roles.get(one.role, one.role), one.text, name=one.name, tool_call_id=one.tool_call_id)  # type: ignore[arg-type]
        for one in request.messages
    ]
    try:
        return version.renderer.prompt(messages)
    except GraftError as error:
        raise Refusal(400, f"messages: {error}", param="messages") from None


def _text_ids(request: CompletionRequest, version: Version, base: Base, room: int | None) -> list[list[int]]:
    assert version.renderer is not None
    given: Any = request.prompt
    prompts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    found = []
    for prompt in prompts:
        if isinstance(prompt, str):
            _check_size(len(prompt), room)
            try:
                ids = plain_ids(version.renderer, prompt)
            except DataError as error:
                raise Refusal(400, f"prompt: {error}", param="prompt") from None
        else:
            ids = list(prompt)
            if max(ids) >= int(base.config.vocab_size):
                raise Refusal(400, f"prompt: no token {max(ids)}, there are {base.config.vocab_size:,}", param="prompt")
        if not ids:
            raise Refusal(400, "prompt: it has no tokens", param="prompt")
        found.append(ids)
    return found


def _check_size(characters: int, room: int | None) -> None:
    """Refuse what cannot fit before it is read."""
    if room is not None and characters > room * _CHARACTERS:
        said = f"{characters:,} characters are more than the {room:,} tokens that the model reads with the answer"
        raise Refusal(400, said, code="context_length_exceeded")


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def include_usage(request: Sampled) -> bool:
    """Whether a stream ends with the tokens counted. Raises `Refusal` for options of a stream without one."""
    if request.stream_options is not None and not request.stream:
        raise Refusal(400, "stream_options needs stream: true", param="stream_options")
    return bool(request.stream_options and request.stream_options.include_usage)
