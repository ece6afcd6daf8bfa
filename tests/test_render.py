"""Rendering: every template with every kind of tokenizer, exact masks, special tokens in contents, faulty templates."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
from chat_tokenizers import ENDS, MAKERS, MARKERS, byte_level, chat_tokenizer, sentence_piece, word_piece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from graft.data.dialogue import Message
from graft.errors import DataError, UsageError
from graft.rendering.jinja import ChatTemplate, find_template, template_names
from graft.rendering.render import Rendered, Renderer

ALL = [(kind, template) for kind in MAKERS for template in MARKERS]
TRIMMED = ("llama2", "llama3", "mistral", "gemma", "command-r")
SYSTEM = Message("system", "Be brief.")
DIALOGUE = (
    Message("user", "What is the capital of France?"),
    Message("assistant", "Paris."),
    Message("user", "Are you sure?\n\nWrite a poem."),
    Message("assistant", "The sea is wide,\n\n\n  the sea is deep."),
)
HARD = [
    "Paris",
    "  leading and trailing  ",
    "\n\nempty lines\n\n",
    " \n\t mixed \t\n ",
    "naïve café 😀👩‍👩‍👧 שלום עולם 日本語",
    "assistant\nuser: ASSISTANT: ### Response:\n",
    "{{ 7 * 7 }} {% raw %}",
    "a\r\nb\x0bc",
]
TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL_DIALOGUE = (
    Message("user", "Weather in Oslo?"),
    Message("assistant", "", tool_calls=(CALL,)),
    Message("tool", '{"rain": true}', name="weather", tool_call_id="c1"),
    Message("assistant", "Rain."),
)


def renderer_of(kind: str, template: str, cache: dict[tuple[str, str], Renderer] = {}) -> Renderer:  # noqa: B006
    if (kind, template) not in cache:
        cache[kind, template] = Renderer(chat_tokenizer(kind, template), template)
    return cache[kind, template]


def decoded(tokenizer: Any, ids: list[int]) -> str:
    """`ids` as text that follows other text: decoders drop a space at the beginning."""
    first = tokenizer.convert_tokens_to_ids("a")
    return tokenizer.decode([first, *ids])[1:]


def turns_of(tokenizer: Any, rendered: Rendered) -> list[str]:
    """The trained tokens as text, one for each run of them."""
    runs = itertools.groupby(zip(rendered.ids, rendered.trained, strict=True), key=lambda pair: pair[1])
    return [decoded(tokenizer, [number for number, _ in run]) for trained, run in runs if trained]


def written(tokenizer: Any, kind: str, template: str, answer: str, last: bool = True) -> str:
    """What a model has to write for an answer under one of Graft's templates, with its end of turn."""
    text = answer.strip() if template in TRIMMED else answer
    if template == "llama2":
        text = f" {text} "
    if template in ("mistral", "vicuna"):
        text = f" {text}"
    if template == "qwen3" and last:
        behind = " " if kind == "pieces prepend" else ""  # this normalizer puts a space behind every added token
        text = f"<think>{behind}\n\n</think>{behind}\n\n{text}"
    if kind == "pieces prepend" and template in ("command-r", "deepseek", "mistral"):
        text = f" {text}"
    return text + ENDS.get(template, tokenizer.eos_token)


def check_row(tokenizer: Any, renderer: Renderer, messages: tuple[Message, ...]) -> Rendered:
    """What holds of every row: the prompt is the beginning of the row, and every answer ends."""
    rendered = renderer.render(messages)
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    assert len(rendered.ids) == len(rendered.trained)
    assert rendered.turns == rendered.ended == len(rendered.starts) == len(answers)
    assert renderer.prompt(messages[: answers[-1]]) == rendered.ids[: rendered.starts[-1]]
    ends = [number for number, next_ in itertools.pairwise([*rendered.trained, False]) if number and not next_]
    assert len(ends) == len(answers)
    for first, behind in itertools.pairwise([*rendered.starts, len(rendered.ids)]):
        stop = max(token for token in range(first, behind) if rendered.trained[token])
        assert rendered.ids[stop] in renderer.stop_ids
    return rendered


def library_ids(tokenizer: Any, template: str, messages: tuple[Message, ...], generate: bool = False) -> list[int]:
    """What transformers makes of the messages."""
    given = [message.as_dict() for message in messages]
    text = find_template(template, tokenizer)[1]
    return tokenizer.apply_chat_template(
        given, chat_template=text, tokenize=True, return_dict=False, add_generation_prompt=generate
    )


# Every template with every tokenizer --------------------------------------------------------------


def test_templates_are_those_tested():
    assert set(template_names()) == set(MARKERS)
    assert len(MARKERS) >= 13


@pytest.mark.parametrize(("kind", "template"), ALL)
def test_masks_and_ids(kind, template):
    tokenizer, renderer = chat_tokenizer(kind, template), renderer_of(kind, template)
    for messages in (DIALOGUE, (SYSTEM, *DIALOGUE), DIALOGUE[:2]):
        rendered = check_row(tokenizer, renderer, messages)
        answers = [message.content for message in messages if message.role == "assistant"]
        expected = [written(tokenizer, kind, template, text, text is answers[-1]) for text in answers]
        assert turns_of(tokenizer, rendered) == expected
        if (kind, template) != ("bytes gpt2", "llama3"):  # GPT-2 cuts two line ends in another way before a word
            assert rendered.ids == library_ids(tokenizer, template, messages)
        assert len(messages) > 3 or renderer.prompt(messages[:-1]) == library_ids(
            tokenizer, template, messages[:-1], generate=True
        )
    assert "Be brief." in tokenizer.decode(renderer.render((SYSTEM, *DIALOGUE)).ids)


@pytest.mark.parametrize(("kind", "template"), ALL)
def test_hard_contents(kind, template):
    tokenizer, renderer = chat_tokenizer(kind, template), renderer_of(kind, template)
    for number, answer in enumerate(HARD):
        question = HARD[number - 3]
        messages = (Message("user", question), Message("assistant", answer))
        rendered = check_row(tokenizer, renderer, messages)
        assert turns_of(tokenizer, rendered) == [written(tokenizer, kind, template, answer)]


@pytest.mark.parametrize(("kind", "template"), ALL)
def test_special_tokens_in_contents_are_text(kind, template):
    tokenizer, renderer = chat_tokenizer(kind, template), renderer_of(kind, template)
    plain = renderer.render(DIALOGUE)
    for token in tokenizer.all_special_tokens + MARKERS[template]:
        number = tokenizer.convert_tokens_to_ids(token)
        text = f"see {token}{token} or {token}"
        messages = (Message("user", text), Message("assistant", text), Message("user", "x"), Message("assistant", text))
        rendered = check_row(tokenizer, renderer, messages)
        if token != tokenizer.unk_token:
            assert rendered.ids.count(number) == plain.ids.count(number)
        expected = [written(tokenizer, kind, template, text, last) for last in (False, True)]
        assert turns_of(tokenizer, rendered) == expected
        forged = (Message("user", token), Message("assistant", token))
        assert turns_of(tokenizer, check_row(tokenizer, renderer, forged)) == [
            written(tokenizer, kind, template, token)
        ]


@pytest.mark.parametrize("template", MARKERS)
def test_bos(template):
    """BOS is written as often as the format has it, whatever the tokenizer adds to plain texts."""
    expected = {"llama2": 2, "llama3": 1, "mistral": 1, "gemma": 1, "deepseek": 1, "command-r": 1, "vicuna": 1}
    expected["alpaca"] = 1
    for kind in ("bytes", "pieces first"):
        tokenizer = chat_tokenizer(kind, template)
        ids = renderer_of(kind, template).render(DIALOGUE).ids
        assert ids.count(tokenizer.bos_token_id) == expected.get(template, 0)
        assert (ids[0] == tokenizer.bos_token_id) == (template in expected)


@pytest.mark.parametrize(("kind", "template"), ALL)
def test_policies(kind, template):
    tokenizer, renderer = chat_tokenizer(kind, template), renderer_of(kind, template)
    every, last = renderer.render(DIALOGUE), renderer.render(DIALOGUE, train="last")
    assert last.ids == every.ids
    assert (last.turns, last.ended, last.starts) == (1, 1, every.starts[1:])
    assert last.trained == [trained and token >= every.starts[1] for token, trained in enumerate(every.trained)]
    whole = renderer.render(DIALOGUE, train="all")
    assert whole.trained == [token > 0 or number != tokenizer.bos_token_id for token, number in enumerate(whole.ids)]
    assert (whole.turns, whole.ended, whole.starts) == (2, 2, every.starts)
    first, second = DIALOGUE[1], DIALOGUE[3]
    silent = (DIALOGUE[0], Message("assistant", first.content, train=False), *DIALOGUE[2:])
    assert renderer.render(silent) == last
    told = (DIALOGUE[0], Message("assistant", first.content, train=True), *DIALOGUE[2:])
    assert renderer.render(told, train="last") == every
    swapped = (*told[:3], Message("assistant", second.content, train=False))
    assert renderer.render(swapped, train="last").starts == every.starts[:1]
    assert sum(renderer.render(silent, train="all").trained) == sum(whole.trained) - sum(every.trained) + sum(
        last.trained
    )


def test_stop_ids():
    for kind, template in ALL:
        tokenizer = chat_tokenizer(kind, template)
        tokens = {tokenizer.eos_token, ENDS.get(template, tokenizer.eos_token)}
        assert renderer_of(kind, template).stop_ids == set(tokenizer.convert_tokens_to_ids(list(tokens)))


def test_pad_equal_to_eos_changes_nothing():
    one, other = (
        byte_level(["<|im_end|>"], eos_token="<|im_end|>", pad_token=pad) for pad in ("<|im_end|>", "<|bos|>")
    )
    rows = [Renderer(tokenizer, "zephyr").render(DIALOGUE) for tokenizer in (one, other)]
    assert [turns_of(one, rows[0]), rows[0].ended] == [turns_of(other, rows[1]), rows[1].ended]
    assert rows[0].ended == 2


TEXT = st.text(st.sampled_from("ab Z.\n\té😀1<|>[]/"), max_size=12) | st.sampled_from([*HARD, "<|im_end|>", "</s>"])


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_dialogues(data):
    kind, template = data.draw(st.sampled_from(ALL))
    tokenizer, renderer = chat_tokenizer(kind, template), renderer_of(kind, template)
    turns = data.draw(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
    messages = tuple(m for user, answer in turns for m in (Message("user", user), Message("assistant", answer)))
    if data.draw(st.booleans()):
        messages = (Message("system", data.draw(TEXT)), *messages)
    rendered = check_row(tokenizer, renderer, messages)
    last = len(turns) - 1
    expected = [written(tokenizer, kind, template, answer, turn == last) for turn, (_, answer) in enumerate(turns)]
    assert turns_of(tokenizer, rendered) == expected
    for turn, start in enumerate(rendered.starts):
        before = len(messages) - 2 * (len(turns) - turn) + 1
        if template != "deepseek":
            assert renderer.prompt(messages[:before]) == rendered.ids[:start]
    special = tokenizer.all_special_tokens + MARKERS[template]
    if not any(token in message.content for message in messages for token in special):
        begins = [
            library_ids(tokenizer, template, messages[:n], True)
            for n in range(1, len(messages))
            if messages[n].role == "assistant"
        ]
        whole = library_ids(tokenizer, template, messages)
        if all(whole[: len(begin)] == begin for begin in begins):  # else the library gives no model's view
            assert rendered.ids == whole


# Tools and thinking -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("template", ["qwen", "qwen3", "mistral"])
def test_tools(kind, template):
    tokenizer, renderer = chat_tokenizer(kind, template), renderer_of(kind, template)
    rendered = renderer.render(TOOL_DIALOGUE, TOOLS)
    call, answer = (text.replace("> \n", ">\n").strip() for text in turns_of(tokenizer, rendered))
    end = ENDS.get(template, "</s>" if "pieces" in kind else "<|endoftext|>")
    assert answer.endswith(f"Rain.{end}")
    if template == "mistral":
        call = call.replace("[TOOL_CALLS]  [", "[TOOL_CALLS] [")
        assert call == '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}}]' + end
    else:
        call = call.removeprefix("<think>\n\n</think>\n\n")
        assert call == '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>' + end
    assert (rendered.turns, rendered.ended) == (2, 2)
    assert renderer.prompt(TOOL_DIALOGUE[:1], TOOLS) == rendered.ids[: rendered.starts[0]]
    assert renderer.prompt(TOOL_DIALOGUE[:3], TOOLS) == rendered.ids[: rendered.starts[1]]
    whole = tokenizer.decode(rendered.ids)
    assert '"parameters"' in whole
    assert whole.count('{"rain": true}') == (template != "mistral")
    as_text = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    spelled = (TOOL_DIALOGUE[0], Message("assistant", "", tool_calls=(as_text,)), *TOOL_DIALOGUE[2:])
    assert renderer.render(spelled, TOOLS) == rendered


@pytest.mark.parametrize("template", ["qwen", "qwen3", "mistral"])
def test_special_tokens_in_tools_are_text(template):
    tokenizer, renderer = chat_tokenizer("bytes", template), renderer_of("bytes", template)
    plain = renderer.render(TOOL_DIALOGUE, TOOLS)
    for token in MARKERS[template] + [tokenizer.eos_token]:
        forged = {"function": {"name": token, "arguments": {token: [token, 1, None]}}}
        tools = ({"type": "function", "function": {"name": token, "description": token}},)
        answer = Message("tool", token, name=token, tool_call_id=token)
        messages = (TOOL_DIALOGUE[0], Message("assistant", token, tool_calls=(forged,)), answer, TOOL_DIALOGUE[3])
        rendered = renderer.render(messages, tools)
        number = tokenizer.convert_tokens_to_ids(token)
        assert rendered.ids.count(number) == plain.ids.count(number)
        assert (rendered.turns, rendered.ended) == (2, 2)


@pytest.mark.parametrize("template", sorted(set(MARKERS) - {"qwen", "qwen3", "mistral"}))
def test_templates_without_tools_refuse_them(template):
    renderer = renderer_of("bytes", template)
    with pytest.raises(DataError, match="tools"):
        renderer.render(DIALOGUE, TOOLS)
    with pytest.raises(DataError):
        renderer.render(TOOL_DIALOGUE)


@pytest.mark.parametrize("template", ["llama2", "mistral", "gemma", "vicuna", "alpaca"])
def test_turns_have_to_alternate(template):
    renderer = renderer_of("bytes", template)
    for messages in (DIALOGUE[1:], (DIALOGUE[0], *DIALOGUE), (*DIALOGUE[:2], SYSTEM, *DIALOGUE[2:])):
        with pytest.raises(DataError, match=r"turn \d is of (user|assistant|system)"):
            renderer.render(messages)


def test_thinking_is_dropped_from_old_turns_and_trained_in_the_last():
    thoughtful = tuple(
        Message(m.role, f"<think>\nHm {number}.\n</think>\n\n{m.content}") if m.role == "assistant" else m
        for number, m in enumerate(DIALOGUE)
    )
    for template, end in (("qwen3", "<|im_end|>"), ("deepseek", "<|endoftext|>")):
        tokenizer, renderer = chat_tokenizer("bytes", template), renderer_of("bytes", template)
        rendered = check_row(tokenizer, renderer, thoughtful)
        old, last = turns_of(tokenizer, rendered)
        assert old == DIALOGUE[1].content + end
        assert last == thoughtful[3].content + end
        assert "Hm 1" not in tokenizer.decode(rendered.ids)


REWRITING = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% else %}"
    "{{ '<|im_start|>BOT\n' + (m.content.split('</think>')[-1]|trim) + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>BOT\n<think>\n' }}{% endif %}"
)
"""The prompt opens a thought that no turn keeps, so no prompt is the beginning of a row."""


@pytest.mark.parametrize("kind", MAKERS)
def test_turns_that_the_template_writes_anew(kind):
    tokenizer = chat_tokenizer(kind, "chatml")
    renderer = Renderer(tokenizer, REWRITING)
    for answer, kept in (("  plain ", "plain"), ("<think>a</think>\n b", "b"), ("<think>b</think>b", "b"), ("", "")):
        messages = (*DIALOGUE[:1], Message("assistant", answer), DIALOGUE[2], Message("assistant", answer))
        rendered = renderer.render(messages)
        assert turns_of(tokenizer, rendered) == [f"{kept}<|im_end|>"] * 2
        assert (rendered.turns, rendered.ended) == (2, 2)


@pytest.mark.parametrize("change", ["reverse", "list|join('.')", "length"])
def test_a_turn_that_cannot_be_found_is_named(change):
    text = f"{{% for m in messages %}}{{{{ m.content|{change} }}}}{{% endfor %}}{{{{ '?' if add_generation_prompt }}}}"
    with pytest.raises(DataError, match="turn 2: the recipe's chat template rewrites"):
        Renderer(chat_tokenizer("bytes", "chatml"), text).render(DIALOGUE)


# Tokenizers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["chatml", "vicuna", "alpaca"])
def test_tokenizers_that_change_text(template):
    lower = sentence_piece(MARKERS[template], kind="always", lower=True)
    for tokenizer in (lower, word_piece(MARKERS[template]), byte_level(MARKERS[template], add_prefix_space=True)):
        renderer = Renderer(tokenizer, template)
        for answer in ("ﬁne Ⅷ paris", "Hello THERE", "i am fine"):
            messages = (DIALOGUE[0], Message("assistant", answer), DIALOGUE[2], Message("assistant", answer))
            rendered = check_row(tokenizer, renderer, messages)
            assert rendered.ids == library_ids(tokenizer, template, messages)
            words = "".join(turns_of(tokenizer, rendered)[1].split())
            known = [
                answer,
                "fine VIII paris",
                answer.lower(),
                "fine viii paris",
                "[UNK] [UNK] paris",
                "fine [UNK] paris",
            ]
            end = ENDS.get(template, tokenizer.eos_token)
            assert words in ["".join(text.split()) + end for text in known]


def test_a_special_token_that_takes_the_space_behind_it():
    """Phi-3's tokens are of this kind: they take the line end that the template writes behind them."""
    tokenizer = byte_level()
    markers = [AddedToken(text, special=True, normalized=False, rstrip=True) for text in MARKERS["phi3"]]
    tokenizer.add_special_tokens({"extra_special_tokens": markers})
    renderer = Renderer(tokenizer, "phi3")
    for answer in ("Paris", "  Paris  ", "\n\nParis\n"):
        messages = (DIALOGUE[0], Message("assistant", answer))
        rendered = check_row(tokenizer, renderer, messages)
        assert rendered.ids == library_ids(tokenizer, "phi3", messages)
        assert turns_of(tokenizer, rendered) == [answer.lstrip() + "<|end|>"]


def test_vocabularies_that_spell_special_tokens():
    """Unigram models hold "</s>" as a piece, so even plain text would become the token."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<s>", 0.0)] + [(char, -2.0) for char in "▁abcdehinrstuwy<>/|?.:UERASITN"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    renderer = Renderer(tokenizer, "vicuna")
    rendered = check_row(tokenizer, renderer, (Message("user", "is </s> it"), Message("assistant", "it is </s>")))
    assert rendered.ids.count(tokenizer.eos_token_id) == 1
    assert renderer.text("a</s>b").count(tokenizer.eos_token_id) == 1


def test_plain_text_and_pairs():
    piece, byte = chat_tokenizer("pieces first", "alpaca"), chat_tokenizer("bytes", "alpaca")
    for tokenizer, before in ((piece, [1]), (byte, [])):
        renderer = Renderer(tokenizer, "alpaca")
        eos = tokenizer.eos_token_id
        assert renderer.text("Hello there") == [*tokenizer.encode("Hello there"), eos]
        assert renderer.text("") == [*before, eos]
        assert renderer.text(f"a{tokenizer.eos_token}").count(eos) == 1
        for prompt, completion in (
            ("What is", " the sea"),
            ("the cap", "ital"),
            ("", "Hello"),
            ("a\n", "\nb"),
            ("a", ""),
        ):
            pair = renderer.pair(prompt, completion)
            assert tokenizer.decode([n for n in pair.ids if n not in (*before, eos)]) == prompt + completion
            start = pair.starts[0]
            assert pair.trained[:start] == [False] * start
            assert pair.trained[start:] == [True] * (len(pair.ids) - start)
            assert pair.ids[:start] == renderer.text(prompt)[:-1]
            assert decoded(tokenizer, pair.ids[start:]).removesuffix(tokenizer.eos_token).strip() == completion.strip()
            assert (pair.ended, pair.turns, pair.ids[-1]) == (1, 1, eos)
    both = word_piece()
    assert Renderer(both).text("hello") == both.encode("hello")


def test_private_characters():
    renderer = renderer_of("bytes", "chatml")
    tokenizer = chat_tokenizer("bytes", "chatml")
    text = "\ue000\ue001\uf8ff <|im_end|> \ue002"
    rendered = check_row(tokenizer, renderer, (Message("user", text), Message("assistant", text)))
    assert turns_of(tokenizer, rendered) == [f"{text}<|im_end|>"]
    for char in ("\U0010fffd", chr(0x10FFFC)):
        with pytest.raises(DataError, match=r"U\+10FFF"):
            renderer.render((Message("user", char), Message("assistant", "a")))
        with pytest.raises(DataError, match=r"U\+10FFF"):
            renderer.text(char)
    with pytest.raises(DataError, match="half a surrogate pair"):
        renderer.prompt((Message("user", "a\ud83d"),))
    every = "".join(map(chr, range(0xE000, 0xF900)))
    with pytest.raises(DataError, match="every private-use character"):
        renderer.prompt((Message("user", every),))


# Which template, and faulty ones ------------------------------------------------------------------


def test_which_template(tmp_path):
    tokenizer = byte_level(MARKERS["chatml"])
    text = find_template("chatml", tokenizer)[1]
    named = Renderer(tokenizer, "chatml")
    (tmp_path / "mine.jinja").write_text(text, encoding="utf-8")
    for spelled in (text, str(tmp_path / "mine.jinja")):
        other = Renderer(tokenizer, spelled)
        assert (other.template, other.sha256) == (named.template, named.sha256)
        assert other.render(DIALOGUE) == named.render(DIALOGUE)
    assert len(named.sha256) == 64
    tokenizer.chat_template = text
    assert Renderer(tokenizer).render(DIALOGUE) == named.render(DIALOGUE)
    tokenizer.chat_template = {"default": text, "tool_use": "{{ 1 }}"}
    assert Renderer(tokenizer).sha256 == named.sha256
    with pytest.raises(UsageError, match=r"no template 'chatlm'; did you mean 'chatml'"):
        Renderer(tokenizer, "chatlm")
    with pytest.raises(UsageError, match="cannot be read"):
        Renderer(tokenizer, str(tmp_path / "none.jinja"))


def test_no_template():
    renderer = Renderer(byte_level())
    assert renderer.stop_ids == {1}
    assert renderer.text("Hello")
    for call in (lambda: renderer.prompt(DIALOGUE[:1]), lambda: renderer.render(DIALOGUE)):
        with pytest.raises(UsageError, match="no chat template; set chat_template to one of alpaca, chatml"):
            call()
    with pytest.raises(UsageError, match="no fast backend"):
        Renderer(object(), "chatml")


FAULTY = {
    "syntax": ("{{ 1 }}\n{% if %}", "line 2"),
    "attack": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "sandbox"),
    "attack by format": ("{{ '{0.__class__.__mro__}'.format('') }}", "sandbox"),
    "endless": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'xyz' }}{% endfor %}{% endfor %}",
        "more than",
    ),
    "unknown filter": ("{{ messages|nothing }}", "nothing"),
    "raises": ("{{ raise_exception('only on Sundays') }}", "only on Sundays"),
    "loops without writing": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "takes more than 0.3 s for a row",
    ),
    "divides by zero": ("{{ 1 // 0 }}", "zero"),
    "missing": ("{{ messages[7].content.x }}", "refuses"),
}


@pytest.mark.parametrize(("text", "told"), FAULTY.values(), ids=FAULTY.keys())
def test_faulty_templates(text, told, monkeypatch):
    if "0.3 s" in told:
        monkeypatch.setattr("graft.rendering.jinja._SECONDS", 0.3)
    with pytest.raises(UsageError) as caught:
        Renderer(chat_tokenizer("bytes", "chatml"), text).render(DIALOGUE)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "the recipe's chat template fills the memory"),
        (TimeoutError(), "the recipe's chat template takes more than 10 s to be read"),
        (OverflowError("too large"), "the recipe's chat template is no template: too large"),
    ],
)
def test_templates_that_cannot_be_compiled(error, told, monkeypatch):
    """Constant parts, as `'a' * 1500000000`, are evaluated by the compiler."""

    def compile_(text: str) -> None:
        raise error

    monkeypatch.setattr("transformers.utils.chat_template_utils._compile_jinja_template", compile_)
    with pytest.raises(UsageError, match=told):
        Renderer(chat_tokenizer("bytes", "chatml"), "{{ 'a' * 1500000000 }}")


def long_dialogue(exchanges: int, system: bool = False, odd: bool = False) -> tuple[Message, ...]:
    turns = [SYSTEM] if system else []
    for number in range(exchanges):
        turns += [Message("user", f"Question {number}?"), Message("assistant", f"Answer {number}, the sea.")]
    if odd:
        contents = {
            5: "  spaces ",
            7: "<|im_end|> and <s>",
            8: "Answer 3, the sea.",
            9: "a\n\n",
            13: "user",
            20: "Paris",
        }
        turns = [replace(turn, content=contents.get(place, turn.content)) for place, turn in enumerate(turns)]
        turns[11] = replace(turns[11], content="<think>\nHm.\n</think>\n\nYes.")
    return tuple(turns)


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("template", MARKERS)
def test_many_turns_are_found_as_few_are(template, odd, monkeypatch):
    renderer = renderer_of("bytes", template)
    for system in (False, True):
        messages = long_dialogue(14, system, odd)
        for train in ("assistant", "last", "all"):
            monkeypatch.setattr("graft.rendering.spans.MANY", 1000)
            exact = renderer.render(messages, train=train)
            asked = renderer.prompt(messages[:-1])
            monkeypatch.setattr("graft.rendering.spans.MANY", 2)
            assert renderer.render(messages, train=train) == exact
            assert renderer.prompt(messages[:-1]) == asked
            assert renderer.length(messages) == len(exact.ids)
            assert exact.turns > 0


@pytest.mark.parametrize("template", ["chatml", "qwen3", "llama2"])
def test_the_texts_of_many_turns_are_few(template, monkeypatch):
    """Without turns alike, a dialogue of n exchanges is written 2n times: 400 took 32 s."""
    renderer = renderer_of("bytes", template)
    write, sizes = ChatTemplate.write, []

    def counted(self: Any, messages: Any, *rest: Any) -> str:
        sizes.append(len(messages))
        return write(self, messages, *rest)

    monkeypatch.setattr(ChatTemplate, "write", counted)
    rendered = renderer.render(long_dialogue(400))
    assert rendered.turns == rendered.ended == 400
    assert 3 <= len(sizes) < 20
    assert sum(sizes) < 10_000


def test_templates_that_leave_out_tools():
    silent = "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"
    renderer = Renderer(chat_tokenizer("bytes", "chatml"), silent)
    with pytest.raises(DataError, match="does not write tools"):
        renderer.render(DIALOGUE, TOOLS)
    with pytest.raises(DataError, match="does not write tool calls"):
        renderer.render(TOOL_DIALOGUE)
    with pytest.raises(DataError, match="no messages"):
        renderer.render(())


def test_markers_that_are_no_tokens_end_nothing():
    """A base without ChatML's tokens reads them as text: nothing ends a turn, which `supervise` refuses."""
    rendered = Renderer(byte_level(), "chatml").render(DIALOGUE)
    assert (rendered.turns, rendered.ended) == (2, 0)
