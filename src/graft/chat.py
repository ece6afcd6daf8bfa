"""Talking to a run: its base and adapter with the chat template they were trained through, and dialogues."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from graft.data.dialogue import Message
from graft.errors import RecipeError, UsageError
from graft.generate import positions_taken, stream
from graft.methods import store
from graft.methods.base import read_method
from graft.model import Base, family_of, load_base
from graft.parts.head import adapter_head
from graft.quantize import quantize
from graft.recipe import Recipe
from graft.rendering.render import Renderer
from graft.routing import Route
from graft.runfolder import find_run
from graft.sampling import GREEDY, Sampling
from graft.train.precision import choose

_ADAPTER = "adapter"


@dataclass(eq=False)
class Served:
    """A base with at most one adapter, and how it is spoken to."""

    base: Base
    adapter: str | None
    """What rows are routed through; None for the untouched base."""
    renderer: Renderer
    name: str
    """What the user called it."""
    note: str = ""
    """What the user should know, in one line."""

    @property
    def max_positions(self) -> int | None:
        """The most tokens of a dialogue with its answer, virtual ones included."""
        stated = getattr(self.base.config, "max_position_embeddings", None)
        return stated if isinstance(stated, int) and self.base.family.positions != "relative" else None

    @property
    def room(self) -> int | None:
        """The most tokens of a dialogue with its answer, without the adapter's own."""
        limit = self.max_positions
        return None if limit is None else limit - positions_taken(self.base, [self.adapter] if self.adapter else [])

    def text(self, ids: Sequence[int]) -> str:
        """What an answer says, without control tokens."""
        return str(self.base.tokenizer.decode(list(ids), skip_special_tokens=True))  # type: ignore[union-attr]

    def need_untouched(self) -> None:
        """Raise `UsageError` where the untouched base cannot answer beside the adapter."""
        if self.adapter is None:
            raise UsageError(f"{self.name} is a base, so there is nothing to compare it with", "leave --base out")
        if self.base.exclusive is not None:
            raise UsageError(
                f"{self.name} changed the base's own weights, so the untouched base cannot answer beside it",
                f"ask it by itself: `graft chat {self.base.name}`",
            )


def load_served(run: str, model: str | None = None, watch: Callable[[str, float], None] | None = None) -> Served:
    """What `run` names: a run folder, an adapter folder with its base `model`, or a base.

    Raises `UsageError` for classifiers and encoders, and what `find_run`, `load_base` and `store.load` raise.
    """
    tell = watch or (lambda phase, share: None)
    name, folder, in_place, template = _parts_of(run, model)
    if family_of(name).kind == "encoder":
        raise UsageError(f"{name} is an encoder, which does not generate", "`graft eval` measures classifiers")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose("auto", device).dtype
    tell("loading the base", 0.1)
    base = load_base(name, dtype=torch.float32 if in_place else dtype)
    if folder is not None and (source := store.quantized_from(folder)) is not None:
        quantize(base, source)
    base.model.to(device)  # type: ignore[arg-type]
    if base.tokenizer is None:
        raise UsageError(f"{name} has no tokenizer")
    if folder is None:
        return _spoken(Served(base, None, Renderer(base.tokenizer, template), run), template)
    tell("loading the adapter", 0.7)
    if adapter_head(store.load(base, folder, _ADAPTER)) is not None:
        raise UsageError(f"{run} has a task head, so it does not generate", "`graft eval` measures it")
    for parameter in base.model.parameters() if in_place else ():
        parameter.data = parameter.data.to(dtype)  # buffers, such as rotary frequencies, stay fp32
    template = store.template_file(folder)
    return _spoken(Served(base, _ADAPTER, Renderer(base.tokenizer, template), run), template)


def _spoken(served: Served, template: str | None) -> Served:
    """`served` with a note where `template`, if not the base's own, differs from it."""
    if template is not None and served.renderer.sha256 != Renderer(served.base.tokenizer).sha256:
        done = "measured" if served.adapter is None else "trained"
        served.note = f"{served.name} was {done} through another chat template than its base's own; it is used here"
    return served


def _parts_of(run: str, model: str | None) -> tuple[str, Path | None, bool, str | None]:
    """The base's name, the adapter's folder, whether the adapter is the base's own weights, and the template that a
    run without an adapter was measured through.
    """
    path = Path(run)
    if (path / "adapter_config.json").is_file():
        if model is None:
            raise UsageError(f"{run} is an adapter folder, which has no base in it", "give its base with --model")
        method = store.about_of(path).get("method")
        return model, path, method is not None and read_method(method, f"{path}/graft.json").in_place, None
    if (path / "trials").is_dir():
        trials = sorted(str(entry) for entry in (path / "trials").iterdir() if entry.is_dir())
        raise RecipeError(f"{run} is a comparison", f"give one of its trials: {', '.join(trials)}")
    if (path / "recipe.yaml").is_file():
        found = find_run(path)
        recipe = Recipe.parse(found.recipe(), str(found.path / "recipe.yaml"))
        if not recipe.objective.speaks:
            what = "a classifier" if recipe.objective.unit == "labelled" else "a reward model"
            raise UsageError(f"{run} is {what}, which does not generate", f"`graft eval {run}` measures it")
        name = model or recipe.model
        if recipe.method is None:
            return name, None, False, getattr(recipe.objective, "chat_template", None)
        return name, found.path / "adapter", recipe.method.in_place, None
    # A hub would be asked for "runs/mine" for half a minute.
    beside = path.parent != Path(".") and (path.parts[0] == "runs" or path.parent.is_dir())
    if model is not None or (beside and not path.exists()):
        raise UsageError(f"{run} is neither a run nor an adapter folder", "`graft runs` lists the runs")
    return run, None, False, None


class Pieces:
    """Text from tokens as they come. No piece ends within a character of several tokens."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self.ids: list[int] = []
        """The tokens so far."""
        self._begin = 0  # some tokens before those not shown yet: a token's text depends on the one before it
        self._shown = 0

    def add(self, token: int) -> str:
        """The text that one more token completes."""
        self.ids.append(token)
        return self._more(whole=False)

    def rest(self) -> str:
        """What was held back."""
        return self._more(whole=True)

    @property
    def text(self) -> str:
        """Everything."""
        return self._decode(self.ids)

    def _more(self, whole: bool) -> str:
        before = self._decode(self.ids[self._begin : self._shown])
        now = self._decode(self.ids[self._begin :])
        if not whole and (now.endswith("\ufffd") or len(now) <= len(before)):
            return ""
        self._begin, self._shown = self._shown, len(self.ids)
        return now[len(before) :]


@dataclass(eq=False)
class Chat:
    """A dialogue with a served model. The history is the adapter's own answers."""

    served: Served
    sampling: Sampling = GREEDY
    max_new_tokens: int = 256
    system: str = ""
    compare: bool = False
    """Whether the untouched base answers beside, in the same batch."""
    history: list[Message] = field(default_factory=list)
    """User's and assistant's turns."""
    cut: bool = False
    """Whether a limit ended the last answer; with `compare`, the adapter's."""
    base_cut: bool = False
    """The same of the untouched base's."""
    dropped: int = 0
    """Old turns that the last question left out, since the dialogue exceeded the positions."""

    def messages(self) -> tuple[Message, ...]:
        """The turns that the model reads next."""
        return (*((Message("system", self.system),) if self.system else ()), *self.history)

    def ask(self, text: str) -> Generator[tuple[int, str], None, None]:
        """Pieces of the answer as they come: (0, text), and (1, text) of the untouched base's with `compare`.

        What was said when the caller stops early stays in the history. After an error it is as it was before.
        """
        before = list(self.history)
        self.history.append(Message("user", text))
        try:
            prompt = self._fitting()
            route = self._route()
        except Exception:
            self.history = before
            raise
        said = [Pieces(self.served.text) for _ in range(1 + self.compare)]
        open_rows = set(range(len(said)))
        stop = self.served.renderer.stop_ids
        try:
            for tokens in stream(
                self.served.base,
                [prompt] * len(said),
                route,
                max_new_tokens=self.max_new_tokens,
                stop_ids=stop,
                sampling=self.sampling,
                max_positions=self.served.max_positions,
                numbers=[0] * len(said),
            ):
                for row, token in tokens:
                    if token in stop:
                        open_rows.discard(row)
                    elif piece := said[row].add(token):
                        yield row, piece
            for row, pieces in enumerate(said):
                if piece := pieces.rest():
                    yield row, piece
        finally:
            self.cut, self.base_cut = 0 in open_rows, 1 in open_rows
            answer = said[0].text
            self.history = [*self.history, Message("assistant", answer)] if answer.strip() else before

    def _route(self) -> Route:
        if not self.compare:
            return Route.all(self.served.adapter)
        self.served.need_untouched()
        return Route.of([self.served.adapter, None], self.served.base.device)

    def _fitting(self) -> list[int]:
        """Ids of the dialogue, without its oldest exchanges when it would leave no room for an answer."""
        self.dropped = 0
        room = self.served.room
        ids = self.served.renderer.prompt(self.messages())
        while room is not None and len(ids) > room - min(self.max_new_tokens, room // 2) and len(self.history) > 2:
            self.history = self.history[2:]
            self.dropped += 2
            ids = self.served.renderer.prompt(self.messages())
        return ids
