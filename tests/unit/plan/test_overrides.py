"""The templates there are, which layer wins, and the child that overrides blocks of one."""

from __future__ import annotations

import pytest

from hpctrain.base.errors import UsageError
from hpctrain.plan.overrides import USER_BLOCK, child_text, find_template, list_templates, shipped

NAME = "command/job.sbatch.j2"


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("HPCTRAIN_NO_USER_CONFIG", "0")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)

    def write(text, name=NAME, for_user=False):
        root = tmp_path / "config" / "hpctrain" if for_user else tmp_path / ".hpctrain"
        path = root / "templates" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path if for_user else path.relative_to(tmp_path)

    return write


def test_templates_are_found_by_name_and_by_recipe(project):
    template = find_template("command")
    assert template == find_template(NAME)
    assert (template.layer, template.shadows, template.problem) == ("shipped", (), "") and shipped(
        template
    )
    # Those of the template and of the one it extends, in the order of the job script.
    assert (
        template.blocks.index("directives")
        < template.blocks.index(USER_BLOCK)
        < template.blocks.index("step")
    )
    assert len(set(template.blocks)) == len(template.blocks)
    with pytest.raises(UsageError, match="there is no template `comand`"):
        find_template("comand")


def test_the_strongest_layer_wins_and_names_what_it_shadows(project):
    user = project('{% extends "!builtin/command/job.sbatch.j2" %}\n', for_user=True)
    found = find_template(NAME)
    assert (found.layer, found.path, found.shadows) == (
        "user",
        str(user),
        ("shipped",),
    ) and shipped(found)
    own = project("#!/bin/bash\n{% block mine %}{% endblock %}\n")
    found = find_template(NAME)
    assert (found.layer, found.path, found.shadows) == ("project", str(own), ("user", "shipped"))
    assert found.blocks == ("mine",)


def test_a_template_of_ones_own_is_none_of_the_shipped(project):
    project("#!/bin/bash\n", "own/job.sbatch.j2")
    project("#!/bin/bash\n", "own/notes.txt")
    found = {template.name for template in list_templates()}
    assert "own/job.sbatch.j2" in found and "own/notes.txt" not in found
    assert not shipped(find_template("own"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\n{{ x }}\n", ":2: an expression that does not end"),
        ("{% block a %}", ":1: "),
        ('{% extends "nosuch" %}', "nosuch"),
    ],
)
def test_a_template_that_is_not_valid_says_why(project, text, words):
    path = project(text)
    found = find_template(NAME)
    assert found.problem.startswith(str(path)) and words in found.problem and found.blocks == ()


def test_a_template_that_is_no_text_says_so(project):
    path = project("")
    path.write_bytes(b"\xff\xfe")
    assert find_template(NAME).problem.startswith(f"{path}: ")


def test_a_child_repeats_its_blocks_and_leaves_room(project):
    template = find_template("command")
    lines = child_text(template, ["step", USER_BLOCK, "step"]).splitlines()
    assert '{% extends "!builtin/command/job.sbatch.j2" %}' in lines
    assert [line for line in lines if line.startswith("{% block")] == [
        "{% block step %}",
        "{% block user_setup %}",
    ]
    # The user's block is empty: there is nothing to repeat.
    assert lines.count("{{ super() }}") == 1 and lines.count("# lines of your own go here") == 2
    with pytest.raises(UsageError) as caught:
        child_text(template, ["step", "stp", "userset"])
    assert [problem.what.split("`")[3] for problem in caught.value.problems] == ["stp", "userset"]
    assert "did you mean `step`?" in caught.value.problems[0].hint
