"""Recipes: precedence, strictness, one clear line for every mistake, and dump -> load."""

import dataclasses
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.errors import RecipeError
from fathom.recipe import dump, load


@dataclass(frozen=True)
class Rates:
    peak: float = 1.0
    final: float = 0.1

    def __post_init__(self):
        if self.final > self.peak:
            raise ValueError(f"final {self.final} is above peak {self.peak}")


@dataclass(frozen=True)
class Source:
    path: str
    share: float | None = None


@dataclass(frozen=True)
class Recipe:
    steps: int
    name: str = "run"
    fast: bool = False
    kind: Literal["dense", "sparse"] = "dense"
    limit: int | None = None
    lengths: tuple[int, ...] = (4096,)
    grid: tuple[tuple[float, ...], ...] = ()
    sources: tuple[Source, ...] = ()
    rates: Rates = field(default_factory=Rates)
    warm: Rates | None = None


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def message(path: Path | None, *overrides: str, cls: type = Recipe) -> str:
    with pytest.raises(RecipeError) as caught:
        load(cls, path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_overrides_beat_the_file_which_beats_the_defaults(tmp_path):
    path = written(tmp_path, 'steps = 10\nname = "file"\n[rates]\npeak = 2\nfinal = 0.5\n')
    recipe = load(Recipe, path, ["rates.peak=3.5", "steps = 20", "steps=30"])
    assert recipe == Recipe(steps=30, name="file", rates=Rates(peak=3.5, final=0.5))
    assert isinstance(load(Recipe, path).rates.peak, float)


def test_defaults_alone_are_enough_where_nothing_is_required():
    assert load(Rates) == Rates()


def test_overrides_hold_toml_and_bare_words():
    recipe = load(Recipe, None, ["steps=1", "name=runs/first", "fast=true", "kind=sparse", "limit=3", "lengths=[1, 2]",
                                 "sources=[{path = 'a.jsonl', share = 1}]", "warm.peak=1e-1"])
    assert recipe == Recipe(1, "runs/first", True, "sparse", 3, (1, 2), (), (Source("a.jsonl", 1.0),), Rates(),
                            Rates(peak=0.1))
    assert load(Recipe, None, ["steps=1", 'name="7"']).name == "7"
    assert load(Recipe, None, ["steps=1", "name=a = b"]).name == "a = b"
    assert load(Recipe, None, ["steps=1", "name="]).name == ""


@pytest.mark.parametrize("text, expected", [
    ("steps = 1\nstep = 2", "unknown key 'step'; did you mean steps?"),
    ("steps = 1\n[rates]\npaek = 2", "unknown key 'rates.paek'; did you mean rates.peak?"),
    ("steps = 1\nxyzzy = 2", "unknown key 'xyzzy'; allowed: steps, name, fast, kind"),
    ("name = 'a'", "steps is missing; give it an integer"),
    ("steps = 1\nsources = [{share = 0.5}]", "sources.path is missing; give it a text"),
    ("steps = 'many'", "steps is 'many'; allowed: an integer"),
    ("steps = 1.0", "steps is 1.0; allowed: an integer"),
    ("steps = true", "steps is True; allowed: an integer"),
    ("steps = 1\nfast = 1", "fast is 1; allowed: true or false"),
    ("steps = 1\nname = 2024-01-01", "allowed: a text"),
    ("steps = 1\nkind = 'thin'", "kind is 'thin'; allowed: \"dense\" or \"sparse\""),
    ("steps = 1\nlimit = 'x'", "limit is 'x'; allowed: an integer"),
    ("steps = 1\nlengths = 4096", "lengths is 4096; allowed: a list, each an integer"),
    ("steps = 1\nlengths = [1, 'x']", "lengths is 'x'; allowed: an integer"),
    ("steps = 1\nrates = 3", "rates is 3; allowed: a section with peak, final"),
    ("steps = 1\nrates.peak = true", "rates.peak is True; allowed: a number"),
    (f"steps = 1\nrates.peak = {10**400}", "allowed: a number"),
    ("steps = 1\nrates.final = 2", "in rates: final 2.0 is above peak 1.0"),
    ("steps = 1\nwarm = {peak = 0}", "in warm: final 0.1 is above peak 0.0"),
    ("steps =", "is not valid TOML"),
    ("steps = 1\n'a\\nb' = 1", "unknown key"),
])
def test_a_mistake_in_the_file_is_one_line_naming_file_and_key(tmp_path, text, expected):
    path = written(tmp_path, text)
    line = message(path)
    assert line.startswith(str(path)) and expected in line


@pytest.mark.parametrize("override, expected", [
    ("stpes=2", "--set stpes=2: unknown key 'stpes'; did you mean steps?"),
    ("steps=ten", "--set steps=ten: steps is 'ten'; allowed: an integer"),
    ("lengths=[1,", "--set lengths=[1,: lengths is '[1,'; allowed: a list, each an integer"),
    ("rates={peak=0}", "--set rates={peak=0}: in rates: final 0.1 is above peak 0.0"),
    ("rates={paek=0}", "--set rates={paek=0}: unknown key 'rates.paek'; did you mean rates.peak?"),
    ("steps", "--set steps: write it as KEY=VALUE"),
    ("=3", "--set =3: write it as KEY=VALUE"),
    ("rates..peak=3", "--set rates..peak=3: write it as KEY=VALUE"),
    ("steps.x=3", "--set steps.x=3: steps is 1, not a section"),
])
def test_a_mistake_in_an_override_names_the_override(tmp_path, override, expected):
    assert message(written(tmp_path, "steps = 1"), override).startswith(expected)


def test_a_mistake_in_the_file_is_not_blamed_on_an_innocent_override(tmp_path):
    path = written(tmp_path, "steps = 'many'")
    assert message(path, "name=x", "step=3", cls=Recipe).startswith("--set step=3")
    assert message(path, "name=x").startswith(str(path))


def test_a_root_rule_and_a_missing_key_need_no_file():
    assert message(None) == "steps is missing; give it an integer"
    assert message(None, "peak=0", cls=Rates) == "final 0.1 is above peak 0.0"


def test_unreadable_files_are_recipe_errors(tmp_path):
    assert "No such file" in message(tmp_path / "absent.toml")
    assert "directory" in message(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "is not valid TOML" in message(binary)


def test_dump_is_readable_toml_without_none():
    recipe = Recipe(3, "a", sources=(Source("x"), Source("y", 0.5)), warm=Rates())
    assert dump(recipe) == """\
steps = 3
name = "a"
fast = false
kind = "dense"
lengths = [4096]
grid = []
sources = [{path = "x"}, {path = "y", share = 0.5}]

[rates]
peak = 1.0
final = 0.1

[warm]
peak = 1.0
final = 0.1
"""


numbers = st.floats(allow_nan=False)
sources = st.builds(Source, st.text(), st.none() | numbers)
rates = st.tuples(numbers, numbers).map(lambda pair: Rates(max(pair), min(pair)))
recipes = st.builds(
    Recipe, st.integers(), st.text(), st.booleans(), st.sampled_from(["dense", "sparse"]), st.none() | st.integers(),
    st.lists(st.integers()).map(tuple), st.lists(st.lists(numbers).map(tuple)).map(tuple),
    st.lists(sources, max_size=3).map(tuple), rates, st.none() | rates)


@given(recipes)
def test_what_is_dumped_loads_back_equal(recipe):
    with tempfile.TemporaryDirectory() as folder:
        assert load(Recipe, written(Path(folder), dump(recipe))) == recipe


@given(recipes)
def test_each_dumped_scalar_is_also_a_valid_override(recipe):
    lines = [line for line in dump(dataclasses.replace(recipe, rates=Rates(), warm=None)).split("\n\n[")[0].split("\n")]
    assert load(Recipe, None, [line for line in lines if line]) == dataclasses.replace(recipe, rates=Rates(), warm=None)


json_like = st.recursive(st.integers() | st.booleans() | st.text() | numbers,
                         lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["peak", "path", "x"]), inner))


@given(st.sampled_from(["steps", "name", "kind", "lengths", "grid", "sources", "rates", "warm", "rates.peak", "other"]),
       st.text() | json_like.map(repr))
def test_any_override_gives_a_recipe_or_one_line(key, text):
    try:
        load(Recipe, None, ["steps=1", f"{key}={text}"])
    except RecipeError as error:
        assert str(error)
