"""Strict sections: every fault in one message, other tools' spellings, YAML's safe subset, key=value."""

from typing import ClassVar

import pytest
from pydantic import Field, ValidationError

from graft.config import Config, override, parse_yaml, read_yaml
from graft.errors import RecipeError, nearest


class Oven(Config):
    """An oven."""

    aliases: ClassVar[dict[str, str]] = {"temp": "temperature", "t": "temperature", "fan_on": "fan"}

    temperature: float = Field(default=180, gt=0, le=300)
    """Degrees."""
    minutes: int | None = Field(default=None, ge=1)
    """Time."""
    fan: bool = False
    """Air."""
    racks: list[int] = Field(default_factory=list)
    """Where."""


class Dough(Config):
    """A dough."""

    flour: str
    """Which."""
    minutes: int = 30
    """Of rest."""
    water: float = 0.6
    """Share."""


class Bread(Config):
    """A bread."""

    aliases: ClassVar[dict[str, str]] = {"recipe_oven": "oven", "title": "name"}
    default_names: ClassVar[dict[str, str]] = {"dough": "plain"}

    name: str = "bread"
    """What it is called."""
    oven: Oven = Field(default_factory=Oven)
    """Where."""
    dough: Dough | None = None
    """From what."""

    @classmethod
    def sections(cls, values):
        return {"oven": Oven, "dough": Dough}


def faults(given, cls=Bread, source="bread.yaml") -> str:
    with pytest.raises(RecipeError) as caught:
        cls.parse(given, source)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert message.startswith(f"{source}: ")
    assert "\n" not in message
    return message


# Faults -------------------------------------------------------------------------------------------


def test_every_fault_is_in_one_message():
    message = faults(
        {
            "nmae": "rye",
            "oven": {"temperature": 1000, "minutes": "soon", "tempreature": 3},
            "dough": {"water": "wet"},
            "name": 3,
        }
    )
    for part in (
        "unknown key 'nmae', did you mean 'name'?",
        "oven.temperature: Input should be less than or equal to 300 (got 1000)",
        "oven.minutes: Input should be a valid integer, unable to parse string as an integer (got 'soon')",
        "unknown key 'oven.tempreature', did you mean 'temperature'?",
        "dough.water: Input should be a valid number, unable to parse string as a number (got 'wet')",
        "'dough.flour' is missing",
        "name: Input should be a valid string (got 3)",
    ):
        assert part in message
    assert message.count(";") == 6


def test_far_misspelling_lists_all_keys_but_no_alias():
    assert faults({"zzz": 1}, Oven).endswith("unknown key 'zzz', known: fan, minutes, racks, temperature")


def test_misspelled_alias_is_recognized():
    assert "unknown key 'fanon', did you mean 'fan_on'?" in faults({"fanon": 1}, Oven)


def test_two_letters_are_near_no_alias():
    assert nearest("r", ["learning_rate"], ["lr"]) == "known: learning_rate"
    assert nearest("lrr", ["learning_rate"], ["lr", "lrs"]) == "did you mean 'lrs'?"


@pytest.mark.parametrize("given", [[1], "oven", 3, None, True])
def test_something_else_than_keys_and_values(given):
    assert f"expected keys and values, got {type(given).__name__}" in faults(given)
    assert "oven: expected keys and values (got 'hot')" in faults({"oven": "hot"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "nan", "1e400", ".inf"])
def test_numbers_are_finite(value):
    assert "temperature: " in faults({"temperature": value}, Oven)
    assert "water: " in faults({"flour": "rye", "water": value}, Dough)


@pytest.mark.parametrize("value", [True, False])
def test_truth_values_are_no_numbers(value):
    """YAML reads `minutes: yes` as true, which pydantic would take for 1."""
    message = faults({"temperature": value, "minutes": value}, Oven)
    assert f"temperature: a number is needed, not true or false (got {value})" in message
    assert f"minutes: a number is needed, not true or false (got {value})" in message
    assert Oven.parse({"fan": value}).fan is value


def test_numbers_may_be_text():
    assert Oven.parse({"temperature": "1e-4"}).temperature == 1e-4
    assert Oven.parse({"temperature": 1, "minutes": 2.0}).minutes == 2
    assert "minutes: " in faults({"minutes": 2.5}, Oven)
    assert "racks: Input should be a valid list (got 3)" in faults({"racks": 3}, Oven)
    assert "temperature: Input should be a valid number (got [3])" in faults({"temperature": [3]}, Oven)


def test_defaults_are_checked_too():
    class Wrong(Config):
        size: int = Field(default=0, ge=1)

    assert "size: " in faults({}, Wrong)


def test_values_are_not_shown_when_long():
    message = faults({"name": ["x" * 100]})
    assert "name: Input should be a valid string" in message
    assert "xxx" not in message


# Aliases ------------------------------------------------------------------------------------------


def test_aliases_are_noted():
    bread, notes = Bread.parse_with_notes({"title": "rye", "recipe_oven": {"temp": 200, "fan_on": True}})
    assert (bread.name, bread.oven.temperature, bread.oven.fan) == ("rye", 200, True)
    assert sorted(notes) == [
        "'fan_on' read as 'fan'",
        "'recipe_oven' read as 'oven'",
        "'temp' read as 'temperature'",
        "'title' read as 'name'",
    ]
    assert Bread.parse_with_notes({"name": "rye", "oven": {"temperature": 200}})[1] == []


def test_notes_of_a_section_parsed_inside_reach_the_outer_one():
    class Outer(Config):
        oven: object = None

        def model_post_init(self, context) -> None:
            Oven.parse(self.oven)

    assert Outer.parse_with_notes({"oven": {"temp": 3}})[1] == ["'temp' read as 'temperature'"]
    assert Oven.parse_with_notes({})[1] == []


@pytest.mark.parametrize("given", [{"temp": 1, "temperature": 1}, {"temp": 1, "t": 1}])
def test_one_setting_given_twice(given):
    message = faults({"oven": given})
    assert "'temperature' are the same setting: give one" in message


def test_a_fault_names_the_settings_own_name():
    assert "temperature: Input should be greater than 0 (got -1)" in faults({"temp": -1}, Oven)


# YAML ---------------------------------------------------------------------------------------------


def test_yaml_of_a_recipe():
    text = "# a comment\nname: rye\noven:\n  temperature: 1e-4\n  racks: [1, 2]\ndough: {flour: rye}\n"
    values = parse_yaml(text, "x")
    assert values["oven"]["temperature"] == "1e-4"  # YAML 1.1 wants a dot in a float; the section reads the text
    assert Bread.parse(values).oven.temperature == 1e-4


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "the key 'a' stands twice"),
        ("a:\n  b: 1\n  b: 1\n", 3, "the key 'b' stands twice"),
        ("a: [{b: 1, b: 1}]\n", 1, "the key 'b' stands twice"),
        ("a: &x [1]\nb: *x\n", 2, "anchors and aliases are not allowed"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", 3, "anchors and aliases are not allowed"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", 2, "anchors and aliases are not allowed"),
        ("a: &a [*a]\n", 1, "anchors and aliases are not allowed"),
        ("a: !!python/object/apply:os.system [touch /tmp/x]\n", 1, "python/object/apply:os.system"),
        ("a: !!python/name:os.system\n", 1, "python/name:os.system"),
        ("a: 1\nb: !!python/object:graft.config.Config {}\n", 2, "python/object"),
        ("a: !mine 3\n", 1, "'!mine'"),
        ("a:\n\tb: 1\n", 2, "character '\\t'"),
        ("a: {b: 1\n", 2, "expected ',' or '}'"),
        ('a: "b\n', 2, "while scanning a quoted scalar|unexpected end of stream"),
        ("a: 1\n---\nb: 2\n", 2, "another document"),
        ("1: a\n", 1, "keys are words, got 1"),
        ("on: a\n", 1, "keys are words, got True"),
        ("? [a]\n: b\n", 1, "keys are words, got ['a']"),
    ],
)
def test_yaml_that_is_refused(text, line, what, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_yaml(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ")
    assert any(part in message for part in what.split("|"))
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "the file is empty"),
        ("# only this\n---\n", "the file is empty"),
        ("- a\n- b\n", "expected keys and values, got list"),
        ("hello\n", "expected keys and values, got str"),
        ("12\n", "expected keys and values, got int"),
        ("a: 2024-13-45\n", "not YAML: month must be in 1..12"),
        ("a: b\0c\n", "not YAML: "),
        ("a: " + "[" * 5000, "not YAML: maximum recursion depth"),
        ("{a: " * 5000, "not YAML: maximum recursion depth"),
        ("a: " + "9" * 5000, "not YAML: "),
    ],
)
def test_text_that_is_no_recipe(text, what):
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "standard input")
    assert str(caught.value).startswith(f"standard input: {what}")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_recipe(tmp_path):
    for path, what in (
        (tmp_path, "is a folder, a recipe is a YAML file"),
        (tmp_path / "missing.yaml", "no such recipe; see recipes/ for examples"),
        (tmp_path / "x" / "y.yaml", "no such recipe"),
        (tmp_path / ("n" * 300), "cannot be read as text"),
    ):
        with pytest.raises(RecipeError) as caught:
            read_yaml(path)
        assert what in str(caught.value)
    binary = tmp_path / "model.yaml"
    binary.write_bytes(b"a: \xff\xfe")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        read_yaml(binary)


# key=value ----------------------------------------------------------------------------------------

START = {"name": "rye", "oven": {"temperature": 100}}


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["name=wheat"], {"name": "wheat"}),
        (["title=wheat"], {"name": "wheat"}),
        (["temperature=150"], {"oven": {"temperature": 150.0}}),
        (["temp=150"], {"oven": {"temperature": 150.0}}),
        (["oven.temperature=1e-4"], {"oven": {"temperature": 1e-4}}),
        (["oven.t=150", "temp=160"], {"oven": {"temperature": 160.0}}),
        (["fan=true", "racks=[1, 2]"], {"oven": {"fan": True, "racks": [1, 2]}}),
        (["oven.minutes=5"], {"oven": {"minutes": 5}}),
        (["minutes=3", "oven.minutes="], None),
        (["flour=rye"], None),
        (["oven={fan: yes}"], {"oven": {"fan": True, "temperature": 180.0}}),
        (["name=a=b"], {"name": "a=b"}),
        (["name='1'"], {"name": "1"}),
    ],
)
def test_override(assignments, expected):
    if expected is None:
        with pytest.raises(RecipeError):
            Bread.parse(override(START, Bread, assignments))
        return
    result = Bread.parse(override(START, Bread, assignments)).model_dump()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert {inner: result[key][inner] for inner in value} == value
        else:
            assert result[key] == value
    assert START == {"name": "rye", "oven": {"temperature": 100}}


def test_override_replaces_any_spelling():
    values = override({"oven": {"t": 100}}, Bread, ["temperature=150"])
    assert values == {"oven": {"temperature": 150}}
    values = override({"recipe_oven": {"t": 100}, "title": "rye"}, Bread, ["oven.temp=150", "fan=true", "name=wheat"])
    assert Bread.parse(values).model_dump()["oven"] == {
        "temperature": 150.0,
        "fan": True,
        "minutes": None,
        "racks": [],
    }
    assert Bread.parse(values).name == "wheat"


def test_override_keeps_the_spelling_for_the_note():
    assert Bread.parse_with_notes(override(START, Bread, ["temp=1"]))[1] == ["'temp' read as 'temperature'"]
    assert Bread.parse_with_notes(override(START, Bread, ["title=x"]))[1] == ["'title' read as 'name'"]


@pytest.mark.parametrize(
    ("assignment", "what"),
    [
        ("temperature", "'temperature' is not key=value"),
        ("=3", "'=3' is not key=value"),
        ("--temperature=3", "unknown key '--temperature', did you mean 'temperature'?"),
        ("minutes=3", "'minutes' stands in oven and dough: write oven.minutes=…"),
        ("zzz=3", "unknown key 'zzz', known: dough, fan, flour, minutes, name, oven, racks, temperature, water"),
        ("tempp=3", "unknown key 'tempp', did you mean 'temp'?"),
        ("oven.zzz=3", "unknown key 'oven.zzz', known: fan, minutes, racks, temperature"),
        ("ovven.fan=3", "unknown key 'ovven', did you mean 'oven'?"),
        ("oven.fan.on=3", "oven.fan: "),
        ("name.x=3", "'name.x=3': name is 'rye', which has no keys"),
        ("temperature=[1", "'temperature=[1': the value is not YAML"),
        ("temperature=2024-13-45", "'temperature=2024-13-45': the value is not YAML"),
        ("temperature=!!python/name:os.system", "the value is not YAML"),
        ("name=&x rye", None),
        ("name=*x", "the value is not YAML"),
        ("oven=3", "oven: expected keys and values (got 3)"),
        ("temperature=", "temperature: Input should be a valid number (got None)"),
    ],
)
def test_override_that_is_refused(assignment, what):
    if what is None:
        assert Bread.parse(override(START, Bread, [assignment])).name == "rye"
        return
    with pytest.raises(RecipeError) as caught:
        Bread.parse(override(START, Bread, [assignment]))
    assert what in str(caught.value)


def test_short_form_of_a_section_takes_settings():
    assert override({"dough": "rye"}, Bread, ["water=0.5"]) == {"dough": {"name": "rye", "water": 0.5}}
    assert override({}, Bread, ["water=0.5"]) == {"dough": {"name": "plain", "water": 0.5}}
    with pytest.raises(RecipeError, match="oven is 'hot', which has no keys"):
        override({"oven": "hot"}, Bread, ["fan=true"])


def test_sections_stay_strict_when_built_in_code():
    with pytest.raises(ValidationError):
        Oven(temprature=3)
