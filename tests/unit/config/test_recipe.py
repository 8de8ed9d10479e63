"""A recipe's declaration: the options it takes, with their kinds, bounds and defaults."""

from __future__ import annotations

import pytest
import yaml

from hpctrain.base.errors import UsageError
from hpctrain.config.document import parse_yaml
from hpctrain.config.recipe import check_recipe_options, list_recipes, load_recipe

RECIPE = {
    "name": "toy",
    "title": "a toy",
    "module": "command",
    "options": {
        "argv": {"kind": "list", "doc": "the words", "required": True},
        "paths": {"kind": "list", "doc": "paths", "items": "path"},
        "size": {"kind": "int", "doc": "how big", "default": 3, "minimum": 1, "maximum": 5},
        "mode": {"kind": "text", "doc": "which", "choices": ["a", "b"]},
        "free": {"kind": "map", "doc": "anything"},
    },
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setenv("HPCTRAIN_NO_USER_CONFIG", "0")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))

    def load(**changes):
        folder = tmp_path / ".hpctrain" / "templates" / "toy"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, **changes}))
        return load_recipe("toy", "run.yaml:3:1", str(tmp_path))

    return load


def options(recipe, text):
    return check_recipe_options(recipe, parse_yaml(text, "run.yaml"))


def test_declared_options_are_checked_with_their_defaults(toy):
    recipe = toy()
    assert (recipe.tasks, recipe.values["needs_gpus"], recipe.values["layout"]) == (
        "per_gpu",
        True,
        "none",
    )
    values, problems = options(recipe, "recipe_options: {argv: [a, 'b\\n'], free: {x: [1]}}\n")
    assert problems == []
    assert values == {
        "argv": ["a", "b\\n"],
        "paths": [],
        "size": 3,
        "mode": None,
        "free": {"x": [1]},
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}\n", "`recipe_options.argv` is missing"),
        ("recipe_options: {}\n", "`recipe_options.argv` is missing"),
        ("recipe_options: {argv: [1]}\n", "`recipe_options.argv.0: 1` must be text"),
        ("recipe_options: {argv: [a], size: 0}\n", "is less than 1"),
        ("recipe_options: {argv: [a], size: 6}\n", "is more than 5"),
        ("recipe_options: {argv: [a], mode: c}\n", "is not one of them"),
        ("recipe_options: {argv: [a], paths: ['']}\n", "must be a path"),
        ("recipe_options: {argv: [a], siz: 1}\n", "unknown key `recipe_options.siz`"),
    ],
)
def test_what_an_option_cannot_be_is_told(toy, text, words):
    _, problems = options(toy(), text)
    assert len(problems) == 1 and words in problems[0].what


def test_several_lines_are_text_where_text_is_asked_for(toy):
    text = 'recipe_options: {argv: ["a\\nb"], mode: a}\n'
    assert options(toy(), text)[1] == []
    assert options(toy(), 'recipe_options: {argv: [a], paths: ["a\\nb"]}\n')[1] != []


def test_a_recipe_that_is_wrong_is_refused_with_every_problem(toy):
    with pytest.raises(UsageError) as caught:
        toy(module="Bad Module", titel="x", signal={"name": "KILL"})
    assert len(caught.value.problems) == 3
    assert all(
        problem.where.startswith("templates/toy/recipe.yaml:") for problem in caught.value.problems
    )


def test_a_recipe_that_is_not_there_names_the_nearest(toy, tmp_path):
    with pytest.raises(UsageError, match="there is no recipe `comand`") as caught:
        load_recipe("comand", "run.yaml:3:9")
    assert "did you mean `command`?" in caught.value.problems[0].hint
    assert caught.value.problems[0].where == "run.yaml:3:9"


def test_recipes_are_listed_once_the_strongest_layer_first(toy, tmp_path):
    toy()
    found = {name: layer for name, layer, _ in list_recipes(str(tmp_path))}
    assert found["toy"] == "project" and found["command"] == "shipped" and "base" not in found
