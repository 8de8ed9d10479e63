"""What a template may write, and where: each rule of the lint by itself. Whole templates:
tests/promises."""

from __future__ import annotations

import jinja2
import pytest

from hpctrain.plan.template_lint import lint_template


def found(text):
    comments = {"comment_start_string": "{##", "comment_end_string": "##}"}
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, **comments)
    return lint_template(environment.parse(text))


def words(text):
    return [what for _, what in found(text)]


NO_FILTER = "an expression that does not end in a quoting filter (q, qjoin, sbatch, comment)"


@pytest.mark.parametrize("name", ["q", "qjoin", "sbatch", "comment", "raw_shell", "upper"])
@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("echo {}", "word"),
        ("x=a{}b", "word"),
        ("x='a'{}", "word"),
        ('x="a"{}', "word"),
        ('x="$(echo {})"', "word"),
        ("x=$(echo {})", "word"),
        ("x=${{y:-{}}}", "word"),
        ("a() {{ echo {}; }}", "word"),
        ("case x in a) echo {} ;;", "word"),
        ("echo $# {}", "word"),
        ("echo ${{#x}} {}", "word"),
        ("echo a#b {}", "word"),
        ("echo \\\\# {}", "word"),
        ('echo "a\\\\" b" {}', "word"),
        ("echo 'a\\' {}", "word"),
        ('echo "a \'" {}', "word"),
        ("((x = {}))", "word"),
        ('"{}"', "quotes"),
        ("'{}'", "quotes"),
        ("\"a'{}'\"", "quotes"),
        ('"${{x:-{}}}"', "quotes"),
        ('"$(echo "{}")"', "quotes"),
        ('"\\\\"{}"', "quotes"),
        ("echo 'a' \"b\" '{}'", "quotes"),
        ("# {}", "comment"),
        ("echo a # {}", "comment"),
        ("echo a;# {}", "comment"),
        ("(# {}", "comment"),
        ("x=$( # {}", "comment"),
        ("  # it's \"{}", "comment"),
        ("#SBATCH --x={}", "directive"),
        ("#SBATCH {}", "directive"),
    ],
)
def test_each_filter_has_its_places(name, line, place):
    allowed = {
        "q": ["word"],
        "qjoin": ["word"],
        "sbatch": ["directive"],
        "comment": ["comment"],
        "upper": [],
    }
    good = place in allowed.get(name, ["word", "quotes", "directive", "comment"])
    text = line.replace("\\\\", "\\").format("{{ x|" + name + " }}")
    assert (words(text) == []) == good, words(text)


def test_a_misplaced_filter_is_told_with_its_line_and_what_it_is_for():
    assert found("a\nb {{ x|comment }}\n") == [
        (2, "the filter comment within a command; it quotes for a comment")
    ]
    assert words("# {{ x|q }}") == ["the filter q within a comment; it quotes for a command"]
    assert words("#SBATCH {{ x|qjoin }}") == [
        "the filter qjoin within an #SBATCH line; it quotes for a command"
    ]
    assert words("'{{ x|sbatch }}'") == [
        "the filter sbatch within quotes; it quotes for an #SBATCH line"
    ]


def test_a_line_break_begins_anew():
    assert words("echo 'a\n{{ x|q }}") == [] and words("# a\n{{ x|q }}") == []
    assert words("{{ y|q }} # {{ x|comment }}\n{{ x|q }}") == []
    assert words("{{ x|q }}\n#SBATCH {{ x|sbatch }}") == []


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("{% if a %}# {% endif %}{{ x|comment }}", False),
        ("{% if a %}# {% else %}# b {% endif %}{{ x|comment }}", True),
        ("{% if a %}# {% elif b %}c {% else %}# {% endif %}{{ x|comment }}", False),
        ("{% if a %}# {{ x|comment }}{% endif %}", True),
        ("# {% if a %}{{ x|comment }}{% else %}{{ y|comment }}{% endif %}{{ z|comment }}", True),
        ("{% if a %}'{% endif %}{{ x|q }}", False),
        ("# {% for a in b %}{{ x|comment }}{% endfor %}", True),
        ("# {% for a in b %}{{ x|comment }}\n{% endfor %}", False),
        ("{% for a in b %}{{ x|q }} # {% endfor %}", False),
        ("{% for a in b %}{{ x|q }} # y\n{% endfor %}", True),
        ("{% for a in b %}# {% else %}x {% endfor %}{{ x|comment }}", False),
        ("{% for a in b %}x {% else %}{{ x|comment }}{% endfor %}", False),
        ("# {% for a in b %}c{% else %}{{ x|comment }}{% endfor %}", True),
        ("# {% with a = b %}{{ x|comment }}{% endwith %}", True),
        ("{% with a = b %}# {% endwith %}{{ x|comment }}", True),
        ("{% macro m() %}{{ x|q }}{% endmacro %}{{ m()|q }}", True),
        ("# {% macro m() %}{{ x|q }}{% endmacro %}", True),
        ("{% macro m() %}{{ x }}{% endmacro %}", False),
        ("{% set y %}# {{ x|comment }}{% endset %}{{ y|q }}", True),
        ("echo {% block b %}{{ x|q }}{% endblock %}", True),
        ("# {% block b %}{{ x|comment }}{% endblock %}", False),
        ("'{% block b %}a{% endblock %}'", False),
        ("{% block b %}# {% endblock %}{{ x|comment }}", True),
        ("{% include 'a' %}", True),
        ("# {% include 'a' %}", False),
        ("{% block b %}{{ super() }}{% endblock %}", True),
        ("{{ super() }}{{ x|q }}", True),
        ("{{ super(1) }}", False),
        ("{{ super(a=1) }}", False),
        ("{{ super(*a) }}", False),
        ("{{ super(**a) }}", False),
        ("{{ caller() }}", False),
        ("{{ self.b() }}", False),
        ("{{ x }}", False),
        ("{{ 'x' }}", False),
        ("{% extends 'a' %}", True),
        ("{% extends a %}", False),
        ("{% import 'a' as b %}", True),
        ("{% from 'a' import b, c as d %}", True),
    ],
)
def test_every_way_to_a_place_counts(text, good):
    assert (found(text) == []) == good, found(text)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{% filter upper %}a{% endfilter %}", "`filter`, which can let a value out unquoted"),
        ("{% call m() %}a{% endcall %}", "`call`, which can let a value out unquoted"),
        (
            "{% autoescape true %}a{% endautoescape %}",
            "`autoescape`, which can let a value out unquoted",
        ),
        ("{% include a %}", "`include` of an expression: name the template itself"),
        ("{% import a as b %}", "`import` of an expression: name the template itself"),
        ("{% from a import b %}", "`import` of an expression: name the template itself"),
        ("{% extends a %}", "`extends` of an expression: name the template itself"),
        ("{% set super = 1 %}", "a variable called `super`, which is a name of Jinja's own"),
        ("{% set a, self = b %}", "a variable called `self`, which is a name of Jinja's own"),
        (
            "{% for caller in a %}{% endfor %}",
            "a variable called `caller`, which is a name of Jinja's own",
        ),
        (
            "{% with super = 1 %}{% endwith %}",
            "a variable called `super`, which is a name of Jinja's own",
        ),
        (
            "{% macro super() %}{% endmacro %}",
            "a variable called `super`, which is a name of Jinja's own",
        ),
        (
            "{% macro m(self) %}{% endmacro %}",
            "a variable called `self`, which is a name of Jinja's own",
        ),
        ("{% import 'a' as super %}", "a variable called `super`, which is a name of Jinja's own"),
        (
            "{% from 'a' import super %}",
            "a variable called `super`, which is a name of Jinja's own",
        ),
        (
            "{% from 'a' import b as super %}",
            "a variable called `super`, which is a name of Jinja's own",
        ),
        (
            "{% set super %}a{% endset %}",
            "a variable called `super`, which is a name of Jinja's own",
        ),
    ],
)
def test_what_no_template_may_hold_is_named_with_its_line(text, what):
    assert (2, what) in found("a\n" + text)


def test_everything_is_found_once_and_in_order():
    text = "{{ b }}\n{% filter upper %}\n{% endfilter %}\n{{ b }}{{ c }}\n{% set super = 1 %}"
    assert [line for line, _ in found(text)] == [1, 2, 4, 5]
    assert [what for _, what in found(text)][::2] == [NO_FILTER, NO_FILTER]
