"""Templates: every expression quotes, a user's child changes blocks without copying the rest, and nothing is replaced."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from jinja2 import nodes

from hpctrain.base.paths import shipped_dir
from hpctrain.render import lint_template, make_environment
from hpctrain.templates import JOB, USER_BLOCK, child_text, list_templates

RUN = "name: r\nsite: local\nrecipe: command\ntime: 10m\nrecipe_options: {argv: [hostname]}\n"
SHIPPED = sorted(
    str(path.relative_to(shipped_dir("templates"))) for path in Path(shipped_dir("templates")).rglob("*.j2")
)


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("HPCTRAIN_NO_USER_CONFIG", "0")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "run.yaml").write_text(RUN)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", SHIPPED)
def test_every_expression_of_a_shipped_template_ends_in_a_quoting_filter(name):
    source = Path(shipped_dir("templates"), name).read_text()

    assert lint_template(make_environment().parse(source)) == []


def test_every_shipped_template_is_listed_with_its_blocks():
    found = {template.name: template for template in list_templates()}

    assert sorted(found) == SHIPPED
    for template in found.values():
        assert USER_BLOCK in template.blocks and template.problem == "" and template.layer == "shipped"


def test_the_user_block_is_empty_in_every_shipped_template():
    environment = make_environment()
    for name in SHIPPED:
        for block in environment.parse(Path(shipped_dir("templates"), name).read_text()).find_all(nodes.Block):
            if block.name == USER_BLOCK:
                assert "".join(node.data for output in block.body for node in output.nodes).strip() == ""


@pytest.mark.parametrize("for_user", [False, True])
def test_an_override_works_end_to_end(project, tmp_path, cli, for_user):
    before = render(cli)
    assert cli("template", "override", "command", *(["--user"] if for_user else []))[0] == 0
    root = tmp_path / "config/hpctrain/templates" if for_user else project / ".hpctrain/templates"
    child = root / "command" / JOB
    child.write_text(
        child.read_text().replace("# lines of your own go here", "ulimit -n 4096 # {{ plan.spec.name|comment }}")
    )
    after = render(cli)

    assert "\nulimit -n 4096 # r\n" in after and "ulimit" not in before
    assert [line for line in after.splitlines() if "ulimit" not in line and "templates" not in line] == [
        line for line in before.splitlines() if "templates" not in line
    ]
    found = {item["name"]: item for item in json.loads(cli("template", "list", "--json")[1])["templates"]}
    assert found[f"command/{JOB}"]["layer"] == ("user" if for_user else "project") and found[f"command/{JOB}"][
        "shadows"
    ] == ["shipped"]


def test_a_fresh_override_of_any_block_adds_only_its_comment(project, cli):
    before = render(cli)
    template = next(template for template in list_templates() if template.name == f"command/{JOB}")
    for block in template.blocks:
        path = project / ".hpctrain/templates/command" / JOB
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(child_text(template, [block]))
        added = [line for line in render(cli).splitlines() if line.strip() and line not in before.splitlines()]

        assert [line for line in added if "templates" not in line] == ["# lines of your own go here"], block


def test_an_unquoted_value_is_refused_with_its_file_and_line(project, cli):
    cli("template", "override", "command")
    path = project / ".hpctrain/templates/command" / JOB
    path.write_text(path.read_text().replace("# lines of your own go here", "\necho {{ plan.spec.name }}\n"))
    line = path.read_text().split("\n").index("echo {{ plan.spec.name }}") + 1
    code, out, err = cli("render")

    assert code == 2 and out == "" and f".hpctrain/templates/command/{JOB}:{line}: " in err and "quoting filter" in err
    assert not (project / "runs").exists()
    code, out, err = cli("template", "list")
    assert code == 1 and "not valid" in out and f"{JOB}:{line}: " in err


@pytest.mark.parametrize(
    "text",
    [
        "{% block user_setup %}",
        "{{ nosuch|q }}",
        "{% extends 'nosuch' %}",
        "{% include '/etc/passwd' %}",
        "{{ x|nofilter }}",
        "{{",
        "{{ (1/0)|q }}",
        "{{ [].pop()|q }}",
        "{{ ''|sbatch }}",
        "{{ '%d'|format('x')|q }}",
        "{% macro m() %}{{ m()|raw_shell }}{% endmacro %}{{ m()|raw_shell }}",
        "{% include 'command/job.sbatch.j2' %}",
    ],
)
def test_a_broken_template_is_an_error_of_the_users_and_never_a_bug(project, cli, text):
    path = project / ".hpctrain/templates/command" / JOB
    path.parent.mkdir(parents=True)
    path.write_text('{% extends "!builtin/command/job.sbatch.j2" %}\n{% block header %}' + text + "{% endblock %}\n")
    code, _, err = cli("render")

    assert code == 2 and "template" in err, err
    assert cli("template", "list")[0] in (0, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{% extends "command/job.sbatch.j2" %}', "extends or includes itself"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"", "the first line is not `#!`"),
        (b"echo hi\n", "the first line is not `#!`"),
        (b'{% extends "nosuch" %}', "there is no template `nosuch`"),
    ],
)
def test_an_override_that_gives_no_script_is_refused_and_nothing_is_written(project, cli, text, words):
    path = project / ".hpctrain/templates/command" / JOB
    path.parent.mkdir(parents=True)
    path.write_bytes(text)
    for verb, expected in (("render", 2), ("check", 1)):
        code, _, err = cli(verb)
        assert code == expected and words in err, err
    assert not (project / "runs").exists()


def test_an_override_that_is_there_is_left_as_it_is(project, cli):
    cli("template", "override", "command")
    path = project / ".hpctrain/templates/command" / JOB
    path.write_text("mine")
    code, _, err = cli("template", "override", "command", "--block", "step")

    assert code == 4 and path.read_text() == "mine" and os.listdir(path.parent) == [JOB]


def test_unknown_templates_and_blocks_name_the_nearest(project, cli):
    assert "did you mean `command/job.sbatch.j2`" in cli("template", "override", "comand/job.sbatch.j2")[2]
    code, _, err = cli("template", "override", "command", "--block", "user_set", "--block", "stp")

    assert code == 2 and "did you mean `user_setup`" in err and "did you mean `step`" in err
    assert not (project / ".hpctrain").exists()


def test_dry_run_writes_nothing(project, cli):
    code, out, _ = cli("template", "override", "command", "--dry-run")

    assert code == 0 and '{% extends "!builtin/command/job.sbatch.j2" %}' in out and os.listdir(project) == ["run.yaml"]


def test_a_template_of_ones_own_is_not_overridden(project, cli):
    path = project / ".hpctrain/templates/own" / JOB
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/bash\n")

    assert cli("template", "override", "own")[0] == 4
    assert cli("template", "show", "own")[1] == "#!/bin/bash\n"


def render(cli):
    code, out, err = cli("render", "--force")
    assert code == 0, err
    return Path(out.strip()).read_text()
