"""From dialogues to examples: what is cut, what is lost, and how it is told."""

import sys
from array import array

import pytest
from chat_tokenizers import byte_level, chat_tokenizer

from graft.data.dialogue import Dialogue, Message
from graft.errors import DataError
from graft.rendering.render import Renderer
from graft.rendering.supervise import quantile, supervise

TOKENIZER = chat_tokenizer("bytes", "chatml")
RENDERER = Renderer(TOKENIZER, "chatml")
BARE = Renderer(TOKENIZER)
"""Of a base without a chat template."""
SYSTEM = Message("system", "Be brief.")


def dialogue(*contents: str, number: int = 1, system: bool = False, plain: bool = False) -> Dialogue:
    turns = tuple(Message(("user", "assistant")[turn % 2], content) for turn, content in enumerate(contents))
    return Dialogue(((SYSTEM,) if system else ()) + turns, str(number), f"rows.jsonl:{number}", plain=plain)


def numbers(count: int, first: int = 0) -> str:
    return " ".join(str(number) for number in range(first, first + count))


def text_of(example) -> str:
    return TOKENIZER.decode(list(example.ids))


def trained_text(example) -> str:
    return TOKENIZER.decode([number for number, trained in zip(example.ids, example.trained, strict=True) if trained])


def test_rows_that_fit_are_as_rendered():
    rows = [dialogue("Hi", "Hello there", number=n, system=n % 2 == 0) for n in range(1, 6)]
    done: list[int] = []
    examples, report = supervise(RENDERER, iter(rows), 64, progress=done.append)
    assert done == [1, 2, 3, 4, 5]
    for row, example in zip(rows, examples, strict=True):
        rendered = RENDERER.render(row.messages)
        assert (list(example.ids), list(example.trained)) == (rendered.ids, rendered.trained)
        assert (example.place, example.id, example.cut, example.ended) == (row.place, row.id, 0, True)
        assert list(example.ids[: example.prompt]) == RENDERER.prompt(row.prompt)
    assert (report.rows, report.kept, report.lost, report.cut, report.ended_share) == (5, 5, {}, [], 1.0)
    assert report.tokens == sum(sum(example.trained) for example in examples) > 0
    report.check()
    assert len(report.lines()) == 2


def test_old_exchanges_go_first():
    turns = [text for n in range(6) for text in (f"question {n}", f"answer {n}")]
    row = dialogue(*turns, system=True)
    whole = len(RENDERER.render(row.messages).ids)
    seen = set()
    for limit in range(whole, 40, -7):
        (example,), report = supervise(RENDERER, [row], limit)
        left = sum(f"answer {n}" in text_of(example) for n in range(6))
        expected = (SYSTEM, *row.messages[1 + 2 * (6 - left) :])
        assert list(example.ids) == RENDERER.render(expected).ids
        longer = (SYSTEM, *row.messages[1 + 2 * (5 - left) :])
        assert left == 6 or len(RENDERER.render(longer).ids) > limit >= len(example.ids)
        assert example.cut == whole - len(example.ids)
        assert (report.cut, report.cut_tokens) == ([row.place] if example.cut else [], example.cut)
        seen.add(left)
    assert len(seen) > 3


def test_cutting_takes_few_short_renderings(monkeypatch):
    """400 exchanges: the whole is measured once, then from the last exchange upwards."""
    row = dialogue(*(text for n in range(400) for text in (f"question {n}", f"answer {n}")), system=True)
    rendered, measured = [], []
    render, length = Renderer.render, Renderer.length
    monkeypatch.setattr(Renderer, "render", lambda *given: (rendered.append(len(given[1])), render(*given))[1])
    monkeypatch.setattr(Renderer, "length", lambda *given: (measured.append(len(given[1])), length(*given))[1])
    (example,), report = supervise(RENDERER, [row], 700)
    assert len(rendered) == 1
    assert measured[0] == 801
    assert len(measured) < 14
    assert sum(measured[1:]) < 801
    longer = (SYSTEM, *row.messages[1 - rendered[0] - 2 :])
    assert length(RENDERER, longer) > 700 >= len(example.ids) > 600
    assert text_of(example).startswith(
        TOKENIZER.decode(RENDERER.render((SYSTEM, *row.messages[1 - rendered[0] :])).ids)
    )
    assert report.lengths[0] == length(RENDERER, row.messages) == example.cut + len(example.ids)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("size", [60, 300, 20_000])
def test_long_prompt(plain, size):
    """D12: the beginning of the question goes, as little as need be; the answer stays whole."""
    row = dialogue(numbers(size), "\n4 5 6", plain=plain, system=not plain)
    whole = (RENDERER.pair(numbers(size), "\n4 5 6") if plain else RENDERER.render(row.messages)).ids
    for limit in (40, 77):
        (example,), report = supervise(BARE if plain else RENDERER, [row], limit)
        assert limit - 3 <= len(example.ids) <= limit
        assert trained_text(example) == "\n4 5 6" + ("<|endoftext|>" if plain else "<|im_end|>")
        assert example.ended
        assert example.cut == len(whole) - len(example.ids)
        left = text_of(example).partition("user\n")[2].partition("<|im_end|>")[0]
        left = text_of(example).partition("\n4 5 6")[0] if plain else left
        assert left
        assert numbers(size).endswith(left)
        assert plain or "Be brief." in text_of(example)
        assert report.lines()[2].startswith(f"1 of 1 rows cut to max_length={limit}: {example.cut:,} tokens")


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("prompt", ["Hi", numbers(100)])
def test_long_answer(plain, prompt):
    """D12: an answer that does not fit is never cut: the row is lost, and the report says what would fit."""
    row = dialogue(prompt, numbers(100), plain=plain)
    examples, report = supervise(BARE if plain else RENDERER, [row], 50)
    assert examples == []
    assert report.lost == {"answer longer than max_length": [row.place]}
    with pytest.raises(DataError, match=r"raise max_length to 384") as caught:
        report.check(allow_dropped=True)
    assert "1 of 1 rows have 0 trained tokens: 1 answer longer than max_length=50 (p95 " in str(caught.value)
    assert "rows.jsonl:1" in str(caught.value)
    assert supervise(RENDERER, [row], report.advice())[1].kept == 1


def test_losses_are_told_and_refused():
    rows = [dialogue("Hi", "Hello", number=n) for n in range(1, 91)]
    rows += [dialogue("Hi", numbers(100), number=n) for n in range(91, 95)]
    rows += [dialogue("Hi", " \n", number=95)]
    examples, report = supervise(RENDERER, rows, 60)
    assert (len(examples), report.rows) == (90, 95)
    with pytest.raises(DataError, match="or set allow_dropped: true") as caught:
        report.check()
    assert caught.value.exit_code == 2
    assert "5 of 95 rows have 0 trained tokens: 4 answer longer" in str(caught.value)
    assert "1 empty answer, first rows.jsonl:95" in str(caught.value)
    report.check(allow_dropped=True)
    rows += [dialogue("Hi", "Hello", number=n) for n in range(96, 101)]
    supervise(RENDERER, rows, 60)[1].check()
    with pytest.raises(DataError, match="no rows"):
        supervise(RENDERER, [], 60)[1].check()


def test_rows_that_the_template_refuses_are_lost_by_name():
    good = dialogue("Hi", "Hello")
    bad = Dialogue((Message("user", "a"), Message("user", "b"), Message("assistant", "c")), "2", "rows.jsonl:2")
    untrained = Dialogue((Message("user", "a"), Message("assistant", "c", train=False)), "3", "rows.jsonl:3")
    renderer = Renderer(TOKENIZER, "vicuna")
    examples, report = supervise(renderer, [good, bad, untrained], 60)
    assert [example.id for example in examples] == ["1"]
    assert report.lost == {
        "refused by the template": ["rows.jsonl:2"],
        "every turn marked as not to be trained": ["rows.jsonl:3"],
    }
    assert "turn 2 is of user" in report.lines()[-1]


def test_ends_have_to_be_learned():
    report = supervise(Renderer(byte_level(), "chatml"), [dialogue("Hi", "Hello")], 60)[1]
    with pytest.raises(DataError, match=r"chat template chatml ends 1 of 1 rows without a special token.*alpaca"):
        report.check(allow_dropped=True)


def test_policies():
    row = dialogue("a", "b", "c", "d")
    counts = {train: sum(supervise(RENDERER, [row], 60, train)[0][0].trained) for train in ("assistant", "last", "all")}
    assert counts["last"] * 2 == counts["assistant"] < counts["all"]
    empty_last = dialogue("a", "b", "c", "")
    assert supervise(RENDERER, [empty_last], 60, "last")[1].lost == {"empty answer": [row.place]}
    assert supervise(RENDERER, [empty_last], 60, "assistant")[1].kept == 1


def test_storage_is_compact():
    (example,), _ = supervise(RENDERER, [dialogue(numbers(300), "ok")], 4096)
    assert isinstance(example.ids, array)
    assert isinstance(example.trained, bytearray)
    size = sys.getsizeof(example.ids) + sys.getsizeof(example.trained)
    assert size < 7 * len(example.ids) + 300


def test_quantile():
    assert quantile([], 0.5) == 0
    assert [quantile([3, 1, 2], share) for share in (0.05, 0.5, 1.0)] == [1, 2, 3]
    assert quantile(range(1, 101), 0.95) == 95


def test_two_texts_go_through_a_template_where_there_is_one():
    row = dialogue("Hi", "Hello", plain=True)
    (through,), _ = supervise(RENDERER, [row], 100)
    (bare,), _ = supervise(BARE, [row], 100)
    assert trained_text(through) == "Hello<|im_end|>"
    assert text_of(bare) == "HiHello<|endoftext|>"
