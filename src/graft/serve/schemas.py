"""What requests may say, field by field. A field that is not here is refused by name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_ANSWERS = 8
MOST_PROMPTS = 32
MOST_TEXTS = 256
MOST_STOPS = 4

Name = Annotated[str, Field(min_length=1, max_length=200)]
_Stop = Annotated[str, Field(min_length=1, max_length=200)]
_Id = Annotated[int, Field(ge=0, lt=2**31)]
_Tokens = Annotated[int, Field(ge=1, le=2**31)]
_Ids = Annotated[list[_Id], Field(min_length=1)]
_Zero = Annotated[float, Field(ge=0, le=0)]
_Text = Annotated[str, Field(min_length=1)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(_Body):
    """A piece of a message. Graft reads text only."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One turn of a dialogue."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: Annotated[str, Field(max_length=200)] | None = None
    tool_call_id: Annotated[str, Field(max_length=200)] | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def text(self) -> str:
        """Its text, parts joined."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Body):
    """How a stream ends."""

    include_usage: bool | None = False
    """Whether a last piece tells the tokens counted."""
    include_obfuscation: bool | None = False
    """Accepted; nothing is added to pieces."""


class TextFormat(_Body):
    """The only format of answers."""

    type: Literal["text"]


class Sampled(_Body):
    """What requests for answers have in common."""

    model: Name
    """The name of an adapter, or of the base."""
    max_tokens: _Tokens | None = None
    """Tokens of an answer at most."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    """0 takes the likeliest token, always."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    """The share of the probability that is drawn from."""
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = 1
    """Answers to a prompt."""
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MOST_STOPS)] | None = None
    """Strings that end an answer and are not part of it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Decides the draws: the same request is then answered alike."""
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    frequency_penalty: _Zero | None = 0
    presence_penalty: _Zero | None = 0
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        given = self.stop or []
        return (given,) if isinstance(given, str) else tuple(given)


class ChatRequest(Sampled):
    """A dialogue to answer."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: _Tokens | None = None
    """The same as `max_tokens`."""
    logprobs: bool | None = False
    """Whether to tell the share of each token."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """How many likeliest tokens to tell with each."""
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = False
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _agree(self) -> "ChatRequest":
        if not any(message.role == "user" for message in self.messages):
            raise ValueError("messages: none is the user's")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self


class CompletionRequest(Sampled):
    """Texts to go on from."""

    prompt: (
        _Text
        | _Ids
        | Annotated[list[_Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[_Ids], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    """A text, several, or token ids."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    """How many likeliest tokens to tell with each; null tells no shares."""
    echo: Literal[False] | None = False
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: None = None


class ClassifyRequest(_Body):
    """Texts to classify."""

    model: Name
    input: _Text | Annotated[list[_Text], Field(min_length=1, max_length=MOST_TEXTS)]
    text_pair: _Text | Annotated[list[_Text], Field(min_length=1, max_length=MOST_TEXTS)] | None = None
    """Second texts, for classifiers of pairs: as many as `input` has."""
    user: str | None = None

    @model_validator(mode="after")
    def _agree(self) -> "ClassifyRequest":
        if self.pairs is not None and len(self.pairs) != len(self.texts):
            raise ValueError("text_pair must hold as many texts as input")
        return self

    @property
    def texts(self) -> list[str]:
        """The first texts."""
        return [self.input] if isinstance(self.input, str) else self.input

    @property
    def pairs(self) -> list[str] | None:
        """The second texts."""
        return [self.text_pair] if isinstance(self.text_pair, str) else self.text_pair


class LoadRequest(_Body):
    """An adapter to serve."""

    lora_name: Name
    """What requests call it; it may be of any method."""
    lora_path: Annotated[str, Field(min_length=1, max_length=1000)]
    """Its folder, inside the adapter root."""
    load_inplace: bool = False
    """Whether it may take the place of one of the same name; requests in flight end with the old one."""


class UnloadRequest(_Body):
    """An adapter to serve no more."""

    lora_name: Name
    lora_int_id: int | None = None
