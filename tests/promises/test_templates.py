"""Templates: every expression quotes, a user's child changes blocks without copying the rest, and
nothing is replaced."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from jinja2 import nodes

from hpctrain.base.paths import shipped_dir
from hpctrain.plan.overrides import JOB, USER_BLOCK, child_text, list_templates
from hpctrain.plan.render import make_environment
from hpctrain.plan.template_lint import lint_template

RUN = "name: r\nsite: local\nrecipe: command\ntime: 10m\nrecipe_options: {argv: [hostname]}\n"
SHIPPED = sorted(
    str(path.relative_to(shipped_dir("templates")))
    for path in Path(shipped_dir("templates")).rglob("*.j2")
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
        assert (
            USER_BLOCK in template.blocks and template.problem == "" and template.layer == "shipped"
        )


def test_the_user_block_is_empty_in_every_shipped_template():
    environment = make_environment()
    for name in SHIPPED:
        for block in environment.parse(Path(shipped_dir("templates"), name).read_text()).find_all(
            nodes.Block
        ):
            if block.name == USER_BLOCK:
                assert (
                    "".join(node.data for output in block.body for node in output.nodes).strip()
                    == ""
                )


@pytest.mark.parametrize("for_user", [False, True])
def test_an_override_works_end_to_end(project, tmp_path, cli, for_user):
    before = render(cli)
    assert cli("template", "override", "command", *(["--user"] if for_user else []))[0] == 0
    root = tmp_path / "config/hpctrain/templates" if for_user else project / ".hpctrain/templates"
    child = root / "command" / JOB
    child.write_text(
        child.read_text().replace(
            "# lines of your own go here", "ulimit -n 4096 # {{ plan.spec.name|comment }}"
        )
    )
    after = render(cli)

    assert "\nulimit -n 4096 # r\n" in after and "ulimit" not in before
    # a setup of one's own runs outside strict mode
    changed = ("ulimit", "templates", "euo pipefail")
    assert [line for line in after.splitlines() if not any(word in line for word in changed)] == [
        line for line in before.splitlines() if not any(word in line for word in changed)
    ]
    found = {
        item["name"]: item for item in json.loads(cli("template", "list", "--json")[1])["templates"]
    }
    assert found[f"command/{JOB}"]["layer"] == ("user" if for_user else "project") and found[
        f"command/{JOB}"
    ]["shadows"] == ["shipped"]


def test_a_fresh_override_of_any_block_adds_only_its_comment(project, cli):
    before = render(cli)
    template = next(template for template in list_templates() if template.name == f"command/{JOB}")
    for block in template.blocks:
        path = project / ".hpctrain/templates/command" / JOB
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(child_text(template, [block]))
        added = [
            line
            for line in render(cli).splitlines()
            if line.strip() and line not in before.splitlines()
        ]
        expected = ["# lines of your own go here"]
        if block == USER_BLOCK:
            expected.insert(
                0, next(line for line in added if line.startswith("set +euo pipefail #"))
            )

        assert [line for line in added if "templates" not in line] == expected, block


def test_an_unquoted_value_is_refused_with_its_file_and_line(project, cli):
    cli("template", "override", "command")
    path = project / ".hpctrain/templates/command" / JOB
    path.write_text(
        path.read_text().replace("# lines of your own go here", "\necho {{ plan.spec.name }}\n")
    )
    line = path.read_text().split("\n").index("echo {{ plan.spec.name }}") + 1
    code, out, err = cli("render")

    assert (
        code == 2
        and out == ""
        and f".hpctrain/templates/command/{JOB}:{line}: " in err
        and "quoting filter" in err
    )
    assert not (project / "runs").exists()
    code, out, err = cli("template", "list")
    assert code == 1 and "not valid" in out and f"{JOB}:{line}: " in err


VALUE = "$(touch PWN)'\"`touch PWN`\ntouch PWN\n# '\\"
X = "plan.spec.env.X"
REFUSALS = (
    "can let a value out|quoting filter|name the template itself|Jinja's own|the filter .* within|a"
    " block or include|is no plain word|is unsafe|cannot be the value of an #SBATCH line"
)


@pytest.mark.parametrize(
    "text",
    [
        # Statements that write, or change what writing does.
        "{% filter replace('a', X) %}echo a{% endfilter %}",
        "{% filter upper %}echo {{ X|q }}{% endfilter %}",
        "{% call '{0}'.format(X) %}{% endcall %}",
        "{% macro m() %}{{ caller() }}{% endmacro %}{% call m() %}{{ X|q }}{% endcall %}",
        "{% autoescape true %}echo {{ X|q }}{% endautoescape %}",
        "{% include X %}",
        "{% import X as other %}",
        "{% from X import other %}",
        # The last filter does not quote, or there is none.
        "echo {{ X }}",
        "echo {{ X|upper }}",
        "echo {{ X|q|upper }}",
        "echo {{ X|q|trim }}",
        "echo {{ X|q|safe }}",
        "echo {{ X|safe }}",
        "echo {{ X|e }}",
        "echo {{ X|default('a') }}",
        "echo {{ 'a' ~ X }}",
        "echo {{ 'a' ~ X|q }}",
        "echo {{ X|q + X }}",
        "echo {{ X if X else X|q }}",
        "echo {{ X|q if X else X }}",
        "{% for c in X %}{{ c }}{% endfor %}",
        "{% for c in X|q %}{{ c }}{% endfor %}",
        "{% set x = X %}echo {{ x }}",
        "{% set x %}echo {{ X|q }}{% endset %}{{ x }}",
        "{% set x | upper %}{{ X|q }}{% endset %}{{ x }}",
        "{% with x = X %}echo {{ x }}{% endwith %}",
        "{% macro m(x) %}{{ x }}{% endmacro %}{{ m(X) }}",
        "{% macro m(x) %}{{ x|q }}{% endmacro %}{{ m(X) }}",
        "{{ X.__str__() }}",
        "{{ self.user_setup() }}",
        # Jinja's own names, given another meaning.
        "{% set super = X.upper %}{{ super() }}",
        "{% for super in [X.upper] %}{{ super() }}{% endfor %}",
        "{% with super = X.upper %}{{ super() }}{% endwith %}",
        "{% macro super() %}{{ X|q }}{% endmacro %}{{ super() }}",
        "{% macro m(super) %}{{ super() }}{% endmacro %}",
        "{% import 'command/job.sbatch.j2' as super %}",
        "{% from 'command/job.sbatch.j2' import x as super %}",
        "{% set caller = X.upper %}{{ caller() }}",
        "{{ caller() }}",
        "{{ super(X) }}",
        # Quoted, and not shell text any more, or not for this place.
        "echo {{ X|q|upper|raw_shell }}",
        "echo {{ X|comment|raw_shell }}",
        "echo {{ X|sbatch|raw_shell }}",
        "echo {{ (X|q)[1:]|raw_shell }}",
        "echo {{ X|raw_shell }}",
        "echo {{ (X|q).__class__(X)|q }}",
        "echo {{ (X|q|attr('__class__'))(X)|q }}",
        "echo {{ ''.__class__.__mro__[1].__subclasses__()|q }}",
        "echo {{ cycler.__init__.__globals__.os.popen('touch PWN').read()|q }}",
        "echo {{ X|comment }}",
        "echo {{ X|sbatch }}",
        "echo $# {{ X|comment }}",
        'echo "# {{ X|comment }}"',
        "echo '# {{ X|comment }}'",
        "echo a#{{ X|comment }}",
        "echo \\# {{ X|comment }}",
        "{% if X %}# {% endif %}{{ X|comment }}",
        "{% if X %}: {% elif X %}# {% else %}# {% endif %}{{ X|comment }}",
        (
            "{% for c in [1, 2] %}{% if loop.first %}# {% else %}\n{% endif %}{{ X|comment }}{%"
            " endfor %}"
        ),
        "# {% for c in [1, 2] %}{{ X|comment }}\n{% endfor %}",
        "# {{ X|q }}",
        "# {{ X|q|raw_shell }}",
        "#SBATCH --comment={{ X|q }}",
        "#SBATCH --comment={{ X|comment }}",
        'echo "{{ X|q }}"',
        "echo '{{ X|q }}'",
        'echo "${A:-{{ X|q }}}"',
        'echo "$(echo "{{ X|q }}")"',
        "echo 'a' \"b\" 'it'\\''s {{ X|q }}'",
        'echo "{{ [X]|qjoin }}"',
        'echo "{% block more %}{{ X|q }}{% endblock %}"',
        "# {% include 'command/job.sbatch.j2' %}",
    ],
)
def test_no_template_lets_a_value_out_unquoted(project, cli, text):
    (project / "run.yaml").write_text(RUN + f"env: {{X: {json.dumps(VALUE)}}}\n")
    path = project / ".hpctrain/templates/command" / JOB
    path.parent.mkdir(parents=True)
    header = '{% extends "!builtin/command/job.sbatch.j2" %}\n{% block user_setup %}\n'
    path.write_text(header + text.replace("X", X) + "\n{% endblock %}\n")
    code, _, err = cli("render")

    assert code == 2 and not (project / "runs").exists(), err
    assert re.search(REFUSALS, err), err


@pytest.mark.parametrize(
    "text",
    [
        "printf %s {{ X|q }}",
        "printf %s '-'{{ X|q }} # {{ X|comment }}",
        'printf %s "a b"{{ X|q }}"c"',
        "printf %s {{ [X, 'b']|qjoin }}",
        "printf %s {{ (X ~ 'a')|q }}",
        "printf %s {{ (X if X else 'a')|q }}",
        'printf %s "$(printf %s {{ X|q }})"',
        "printf %s ${A:-{{ X|q }}}",
        "{% for c in X %}printf %s {{ c|q }}\n{% endfor %}",
        "{% set x = X|q %}printf %s {{ x|q }}",
        "{% set x %}# {{ X|comment }}{% endset %}printf %s {{ x|q }}",
        "{% macro m(x) %}{{ x|q }}{% endmacro %}printf %s {{ m(X)|q }}",
        "{% with x = X %}printf %s {{ x|q }}{% endwith %}",
        "{% if X %}# {{ X|comment }}\n{% else %}printf a {{ X|q }}{% endif %}printf %s {{ X|q }}",
        "printf %s {% block more %}{{ X|q }}{% endblock %}",
        "{{ super() }}printf %s a$# {{ X|q }}",
        'printf %s "{{ plan.spec.num_nodes|raw_shell }}" "${HOME#x}" {{ X|safe|q }}',
        "printf %s $(( {{ plan.spec.num_nodes|q }} + 1 )) {{ X|e|q }}",
    ],
)
def test_what_is_quoted_for_its_place_loads_and_carries_the_value_exactly(project, cli, text):
    (project / "run.yaml").write_text(RUN + f"env: {{X: {json.dumps(VALUE)}}}\n")
    path = project / ".hpctrain/templates/command" / JOB
    path.parent.mkdir(parents=True)
    header = '{% extends "!builtin/command/job.sbatch.j2" %}\n{% block user_setup %}\n: begin\n'
    path.write_text(header + text.replace("X", X) + " \n: end\n{% endblock %}\n")
    script = render(cli).split("\n: begin\n")[1].split(" \n: end\n")[0]
    done = subprocess.run(["bash", "-euc", script], cwd=project, capture_output=True, text=True)

    assert not (project / "PWN").exists() and done.stderr == ""
    quoted = (
        VALUE
        if "X|e|q" not in text
        else html.escape(VALUE).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")
    )
    assert "m(X)" in text or "endset" in text or quoted in done.stdout, done.stdout


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
    path.write_text(
        '{% extends "!builtin/command/job.sbatch.j2" %}\n{% block header %}'
        + text
        + "{% endblock %}\n"
    )
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
def test_an_override_that_gives_no_script_is_refused_and_nothing_is_written(
    project, cli, text, words
):
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
    assert (
        "did you mean `command/job.sbatch.j2`"
        in cli("template", "override", "comand/job.sbatch.j2")[2]
    )
    code, _, err = cli("template", "override", "command", "--block", "user_set", "--block", "stp")

    assert code == 2 and "did you mean `user_setup`" in err and "did you mean `step`" in err
    assert not (project / ".hpctrain").exists()


def test_dry_run_writes_nothing(project, cli):
    code, out, _ = cli("template", "override", "command", "--dry-run")

    assert (
        code == 0
        and '{% extends "!builtin/command/job.sbatch.j2" %}' in out
        and os.listdir(project) == ["run.yaml"]
    )


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
