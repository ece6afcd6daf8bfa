"""What objectives over answers share: a decoder, and the chat template that its prompts go through."""

from pydantic import PrivateAttr, field_validator
from transformers import PreTrainedTokenizerBase

from graft.families import Family
from graft.objectives.base import Objective
from graft.rendering.jinja import find_template
from graft.rendering.render import Renderer


class Templated(Objective):
    """An objective of a decoder whose rows go through a chat template."""

    chat_template: str | None = None
    """The model's own when left out; else one of chatml, llama3, alpaca, … or a .jinja file. It is kept with the
    adapter. A policy needs the same one as the reward model that it learns from."""

    _renderer: tuple[PreTrainedTokenizerBase, Renderer] | None = PrivateAttr(default=None)

    @field_validator("chat_template")
    @classmethod
    def _known_template(cls, given: str | None) -> str | None:
        if given is not None:
            find_template(given, None)
        return given

    def refuses(self, family: Family) -> str | None:
        """Answers continue their prompt, which only decoders do."""
        return None if family.kind == "decoder" else f"{self.name} needs a decoder, this is an {family.kind}"

    def renderer(self, tokenizer: PreTrainedTokenizerBase) -> Renderer:
        """The tokenizer with this recipe's chat template."""
        if self._renderer is None or self._renderer[0] is not tokenizer:
            self._renderer = (tokenizer, Renderer(tokenizer, self.chat_template))
        return self._renderer[1]

    def template(self, tokenizer: PreTrainedTokenizerBase | None) -> str | None:
        """The chat template in use."""
        return None if tokenizer is None else self.renderer(tokenizer).template or None
