"""The job script templates there are, which layer wins, and a small child that overrides blocks of
one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
from jinja2 import nodes

from hpctrain.base.errors import Problem, UsageError
from hpctrain.base.paths import layer_dirs
from hpctrain.config.fields import nearest
from hpctrain.plan.render import make_environment

JOB = "job.sbatch.j2"
# Promised to stay empty in every shipped template: a place for lines of one's own before the step.
USER_BLOCK = "user_setup"


@dataclass(frozen=True)
class Template:
    """One template name: the layer that wins, those it shadows, the blocks one may override, and
    why it is not valid."""

    name: str
    layer: str
    path: str
    shadows: tuple[str, ...]
    blocks: tuple[str, ...]
    problem: str = ""


def list_templates() -> list[Template]:
    """Every template of every layer, by name."""
    places: dict[str, list[tuple[str, str]]] = {}
    for layer, folder in layer_dirs("templates"):
        for name in _files(folder):
            places.setdefault(name, []).append((layer, os.path.join(folder, name)))
    return [_template(name, places[name]) for name in sorted(places)]


def find_template(name: str) -> Template:
    """The template of that name; a recipe's name means its job script. Raises UsageError with the
    nearest name."""
    known = {template.name: template for template in list_templates()}
    for wanted in (name, f"{name}/{JOB}"):
        if wanted in known:
            return known[wanted]
    raise UsageError(f"there is no template `{name}`", hint=nearest(name, known))


def child_text(template: Template, blocks: Sequence[str]) -> str:
    """A template that extends the shipped one and repeats the named blocks unchanged, ready for
    lines of one's own.

    Raises UsageError for blocks that there are not, all at once.
    """
    # Those of the shipped one, which the child extends; what shadows it now may have others, or be
    # broken.
    known = _blocks(make_environment(), f"!builtin/{template.name}")
    unknown = [block for block in blocks if block not in known]
    if unknown:
        raise UsageError(
            [
                Problem(
                    f"template `{template.name}` has no block `{block}`", hint=nearest(block, known)
                )
                for block in unknown
            ]
        )
    lines = [
        (
            f"{{## Changes blocks of {template.name}; the rest stays as hpctrain ships it. Every"
            " expression ends in a"
        ),
        (
            "    quoting filter: q for shell words, qjoin for lists of them, sbatch for #SBATCH"
            " values. ##}"
        ),
        f'{{% extends "!builtin/{template.name}" %}}',
    ]
    for block in dict.fromkeys(blocks):
        lines += ["", f"{{% block {block} %}}"]
        if block != USER_BLOCK:
            lines.append("{{ super() }}")
        lines += ["# lines of your own go here", "{% endblock %}"]
    return "\n".join(lines) + "\n"


def shipped(template: Template) -> bool:
    """Whether hpctrain ships a template of that name, which a child can extend."""
    return "shipped" in (template.layer, *template.shadows)


def _template(name: str, places: Sequence[tuple[str, str]]) -> Template:
    layer, path = places[0]
    shadows = tuple(layer for layer, _ in places[1:])
    try:
        return Template(name, layer, path, shadows, tuple(_blocks(make_environment(), name)))
    except jinja2.TemplateSyntaxError as error:
        return Template(
            name,
            layer,
            path,
            shadows,
            (),
            f"{error.filename or path}:{error.lineno}: {error.message}",
        )
    except (jinja2.TemplateError, UnicodeDecodeError, OSError) as error:
        return Template(name, layer, path, shadows, (), f"{path}: {error}")


def _blocks(environment: jinja2.Environment, name: str) -> list[str]:
    """Block names of the template and of those it extends, in the order of the job script."""
    chain: list[list[str]] = []
    seen: set[str] = set()
    while name and name not in seen:
        seen.add(name)
        assert environment.loader
        source, path, _ = environment.loader.get_source(environment, name)
        # `_parse` of our environment also refuses unquoted expressions.
        tree = environment.parse(source, name, path)
        chain.append([block.name for block in tree.find_all(nodes.Block)])
        extends = tree.find(nodes.Extends)
        name = (
            extends.template.value if extends and isinstance(extends.template, nodes.Const) else ""
        )
    return list(dict.fromkeys(block for blocks in reversed(chain) for block in blocks))


def _files(folder: str) -> list[str]:
    found = []
    for top, folders, names in os.walk(folder):
        folders.sort()
        found += [
            os.path.relpath(os.path.join(top, name), folder)
            for name in names
            if name.endswith(".j2")
        ]
    return [name for name in sorted(found) if name.isprintable()]
