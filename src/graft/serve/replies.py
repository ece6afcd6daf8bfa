"""What answers look like: OpenAI's shapes, and the errors in them."""

import json
import re
from typing import Any, Literal

from pydantic import BaseModel
from starlette.responses import Response

from graft.errors import GraftError, ResourceError, UsageError
from graft.serve.adapters import Loading, UnknownModel
from graft.serve.batch import Unsound
from graft.serve.engine import Full, Stopping

_PATH = re.compile(r"(?<![\w.:/])(?:~|\.{0,2})(?:/[^\s:;,'\"()/]+)+/?")
"""Paths in a text, of which no answer tells more than the last part."""


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Every error."""

    error: ErrorBody


class Usage(BaseModel):
    """Tokens counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopToken(BaseModel):
    """One of the likeliest tokens."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenShare(TopToken):
    """A token of an answer."""

    top_logprobs: list[TopToken]


class ChatShares(BaseModel):
    """The shares of an answer's tokens."""

    content: list[TokenShare]
    refusal: None = None


class AnswerMessage(BaseModel):
    """An answer."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One of n answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatShares | None
    finish_reason: Literal["stop", "length"]


class ChatReply(BaseModel):
    """Answers to a dialogue."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None


class TextShares(BaseModel):
    """The shares of a completion's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: TextShares | None
    finish_reason: Literal["stop", "length"]


class TextReply(BaseModel):
    """Completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    system_fingerprint: str | None = None


class Label(BaseModel):
    """The label of one text."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyReply(BaseModel):
    """The labels of texts; `labels` says what each of `probs` is the share of."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    labels: list[str]
    data: list[Label]
    usage: Usage


class ModelCard(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    task: Literal["generate", "classify", "none"]
    method: str | None
    labels: list[str]
    chat_template: str | None
    note: str
    loaded: bool


class ModelList(BaseModel):
    """Every model that can be asked."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    """Whether requests are taken."""

    status: Literal["ok", "stopping", "failed"]


class Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    def reply(self) -> Response:
        """It as HTTP has it."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        body = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json_reply({"error": body}, self.status, self.headers)


def refusal_of(error: Exception, hide: tuple[tuple[str, str], ...] = ()) -> Refusal:
    """An error as the client sees it: those of Graft in their words, with paths of `hide` replaced and of any other the
    last part alone; of errors that are not Graft's only that there was one.
    """
    if isinstance(error, Refusal):
        return error
    if not isinstance(error, GraftError):
        return Refusal(500, "the server failed at this request", code="internal_error")
    said = str(error)
    for path, instead in hide:
        said = said.replace(path, instead)
    said = _PATH.sub(lambda found: found[0].rstrip("/").rpartition("/")[2], said)
    if isinstance(error, Unsound):
        return Refusal(500, said, code="unsound_scores")
    if isinstance(error, UnknownModel):
        return Refusal(404, said, param="model", code="model_not_found")
    if isinstance(error, Loading):
        return Refusal(503, said, param="model", code="model_loading", headers={"Retry-After": "1"})
    if isinstance(error, Full):
        return Refusal(429, said, code="queue_full", headers={"Retry-After": "1"})
    if isinstance(error, Stopping):
        return Refusal(503, said, code="stopping", headers={"Retry-After": "5"})
    if isinstance(error, ResourceError):
        return Refusal(503, said, code="no_resources", headers={"Retry-After": "1"})
    status = 400 if isinstance(error, UsageError) or error.exit_code == 5 else 500
    return Refusal(status, said)


def json_reply(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON in ASCII: half a surrogate pair in a message has no UTF-8."""
    return Response(json.dumps(body), status, headers, media_type="application/json")
