"""Modelfiles: what Ollama writes for a dialogue is what the chat template writes."""

import re

import pytest
from chat_tokenizers import ENDS, MARKERS, byte_level, chat_tokenizer

from graft.data.dialogue import Message
from graft.errors import UsageError
from graft.export.gotemplate import GoError, literal, render
from graft.export.modelfile import NotDecomposed, begins_with_bos, derive, modelfile
from graft.rendering.jinja import ChatTemplate, template_names
from graft.rendering.render import Renderer

DIALOGUES = [
    [("user", "Hi")],
    [("user", "What?"), ("assistant", "This: {{ .System }} and {% if %}."), ("user", 'Say """ twice.')],
    [("system", "Be brief."), ("user", "Hi")],
    [("system", "Be\nbrief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]


def made(template: str, kind: str = "bytes", **more) -> tuple:
    """A tokenizer with a template's special tokens, and the renderer."""
    tokenizer = chat_tokenizer(kind, template)
    return tokenizer, Renderer(tokenizer, template)


def written(tokenizer, renderer, dialogue) -> str:
    template = ChatTemplate("x", renderer.template, tokenizer.special_tokens_map)
    return template.write([{"role": role, "content": text} for role, text in dialogue], (), True, 1000)


def by_ollama(template: str, dialogue) -> str:
    system = "\n\n".join(text for role, text in dialogue if role == "system")
    return render(template, system, [{"role": role, "content": text} for role, text in dialogue])


@pytest.mark.parametrize("name", template_names())
@pytest.mark.parametrize("kind", ["bytes", "pieces first"])
def test_every_template_of_ours_is_given_again(name, kind):
    tokenizer, renderer = made(name, kind)
    derived = derive(tokenizer, renderer)
    assert derived.checked >= 5
    bos = tokenizer.bos_token if begins_with_bos(tokenizer, renderer) else ""
    for dialogue in DIALOGUES:
        wanted = written(tokenizer, renderer, dialogue)
        assert bos + by_ollama(derived.template, dialogue) == wanted
        assert not bos or not by_ollama(derived.template, dialogue).startswith(bos)  # counted once


@pytest.mark.parametrize("name", ["chatml", "qwen", "smollm", "zephyr"])
def test_ids_are_those_of_training(name):
    tokenizer, renderer = made(name)
    derived = derive(tokenizer, renderer)
    assert derived.same_ids == derived.checked
    for dialogue in DIALOGUES[:1] + DIALOGUES[2:]:
        text = by_ollama(derived.template, dialogue)
        bos = [tokenizer.bos_token_id] if begins_with_bos(tokenizer, renderer) else []
        messages = [Message(role, content) for role, content in dialogue]
        assert bos + tokenizer(text, add_special_tokens=False)["input_ids"] == renderer.prompt(messages)


def test_a_default_system_text_becomes_the_modelfiles_own():
    for name, words in (("smollm", "named SmolLM"), ("qwen", "created by Alibaba"), ("chatml", "")):
        tokenizer, renderer = made(name)
        derived = derive(tokenizer, renderer)
        assert words in derived.system
        assert bool(derived.system) == bool(words)
        if words:
            dialogue = [("user", "Hi")]
            told = by_ollama(derived.template, [("system", derived.system), *dialogue])
            assert told == by_ollama(derived.template, dialogue)


def test_the_file(tmp_path):
    tokenizer, renderer = made("smollm")
    end = tokenizer.convert_tokens_to_ids(ENDS["smollm"])
    text, checks, notes = modelfile("x-f16.gguf", tokenizer, renderer, [end], 100_000)
    lines = text.splitlines()
    assert lines[1] == "FROM ./x-f16.gguf"
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert "PARAMETER num_ctx 8192" in lines
    assert text.count('"""') == 4  # TEMPLATE and SYSTEM
    assert checks["template_dialogues"] == checks["template_same_ids"] == 10
    assert notes == []
    short, _, _ = modelfile("x.gguf", tokenizer, renderer, [end], 256)
    assert "PARAMETER num_ctx 256" in short


def test_trimmed_and_thinking_contents_are_noted():
    _, notes = (derived := derive(*made("llama3"))).template, derived.notes
    assert any("space around" in note for note in notes)
    assert any("thinking" in note for note in derive(*made("qwen3")).notes)
    assert derive(*made("chatml")).notes == ()


ODD = {
    "turns are numbered": "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}",
    "the last question alone": "{{ messages[-1].content }}!",
    "twice": "{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}",
    "capitals": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "by content": "{% for m in messages %}{{ m.role }}{{ ': paris' if '{{' in m.content else ': ' }}{{ m.content }}"
    "{% endfor %}",
    "system last": "{% for m in messages if m.role != 'system' %}{{ m.content }};{% endfor %}"
    "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}",
    "no dialogue": "{{ raise_exception('not me') }}",
}


@pytest.mark.parametrize("what", ODD)
def test_a_template_that_does_not_decompose_is_left_out(what):
    tokenizer = chat_tokenizer("bytes", "chatml")
    renderer = Renderer(tokenizer, ODD[what])
    with pytest.raises(NotDecomposed) as caught:
        derive(tokenizer, renderer)
    assert isinstance(caught.value, UsageError)
    text, checks, notes = modelfile("x.gguf", tokenizer, renderer, [], 64)
    assert not re.search("^TEMPLATE", text, flags=re.MULTILINE)
    assert checks == {}
    assert "TEMPLATE is left out" in notes[0]
    assert f"# {notes[0]}" in text.splitlines()


def test_without_a_template_prompts_stay_as_they_are():
    tokenizer = byte_level()
    text, _, notes = modelfile("x.gguf", tokenizer, Renderer(tokenizer), [], 64)
    assert 'TEMPLATE """{{ .Prompt }}"""' in text
    assert render("{{ .Prompt }}", "", [], "as is") == "as is"
    assert "no chat template" in notes[0]


# Nothing breaks out -------------------------------------------------------------------------------

NASTY = [
    '"""\nFROM /etc/passwd\nTEMPLATE """',
    "{{ end }}{{ .System }}",
    "}}",
    '"',
    "\\x22",
    "\x00\x1b[2J\r\n\u2028\u202e",
    "\ud7ff\U000e0001",
    "{{- /* comment */ -}}",
]


@pytest.mark.parametrize("text", NASTY)
def test_literals(text):
    said = literal(text)
    assert render(said, "", []) == text
    assert '"""' not in said
    assert all(char == "\n" or char.isprintable() for char in said)


@pytest.mark.parametrize("text", NASTY)
def test_a_template_cannot_break_out_of_the_modelfile(text):
    tokenizer = chat_tokenizer("bytes", "chatml")
    quoted = text.encode("unicode_escape").decode().replace("'", "\\'")
    jinja = (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<s>{{ '" + quoted + "' }}</s>{% endif %}"
        "{% if m.role == 'system' %}<s>{{ m.content }}</s>{% else %}[{{ m.role }}]{{ m.content }}[end]{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{{ '" + quoted + "' }}{% endif %}"
    )
    said, checks, _ = modelfile("x.gguf", tokenizer, Renderer(tokenizer, jinja), [], 64)
    # As Ollama reads it: a command is a line's first word, outside of triple quotes.
    outside = re.sub(r'"""(.*?)"""', "", said, flags=re.DOTALL)
    assert '"""' not in outside
    assert [line.split()[0] for line in outside.splitlines() if line.strip()] in (
        ["#", "FROM", "TEMPLATE", "SYSTEM", "PARAMETER"],
        ["#", "FROM", "TEMPLATE", "PARAMETER"],
        ["#", "FROM", "#", "PARAMETER"],
    )
    assert all(char == "\n" or char.isprintable() for char in said)
    template = re.search(r'TEMPLATE """(.*?)"""', said, flags=re.DOTALL)
    assert (template is None) == (checks == {})
    if template:
        assert text in by_ollama(template[1], [("user", "x")])


def test_a_stop_token_with_quotes_is_left_out():
    tokenizer = byte_level(['<|"""|>', "<|end of|>", "<|ok|>"])
    ids = tokenizer.convert_tokens_to_ids(['<|"""|>', "<|end of|>", "<|ok|>"])
    text, _, notes = modelfile("x.gguf", tokenizer, Renderer(tokenizer), ids, 64)
    assert re.findall("stop (.*)", text) == ['"<|ok|>"']
    assert sum("cannot be named" in note for note in notes) == 2


# The small renderer -------------------------------------------------------------------------------


def test_go_constructs():
    text = (
        "{{ if .System }}S{{ .System }}{{ else }}-{{ end }}{{ range $i, $_ := .Messages }}"
        '{{ $last := eq (len (slice $.Messages $i)) 1 }}{{ if eq .Role "user" }}u{{ .Content }}'
        '{{ else if eq .Role "assistant" }}a{{ .Content }}{{ if not $last }},{{ end }}{{ end }}'
        "{{ if $last }}!{{ end }}{{ end }}"
    )
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    assert render(text, "x", turns) == "Sxu1a2!"
    assert render(text, "", turns + turns[:1]) == "-u1a2,u1!"
    assert render(text, "", [*turns[:1], *turns[:1]]) == "-u1\n\n1!"  # as Ollama joins turns of one role


@pytest.mark.parametrize(
    "text",
    ["{{ .Nothing }}", "{{ if .System }}", "{{ end }}", "{{ .Content }}", "{{ if or .System .Prompt }}x{{ end }}",
     "{{ template", '{{ "a\\q" }}', "{{ $last }}", "{{- .System }}x{{ bad"],
)  # fmt: skip
def test_anything_else_is_an_error(text):
    with pytest.raises(GoError):
        render(text, "s", [{"role": "user", "content": "x"}])


def test_markers_are_those_of_every_template():
    assert set(MARKERS) == set(template_names())
