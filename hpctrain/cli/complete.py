"""What Tab offers: names of sites, recipes, templates and partitions, read with as few imports and
files as possible."""

from __future__ import annotations

import os

import click
from click.shell_completion import CompletionItem

from hpctrain.base.paths import layer_dirs


def sites(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of site profiles."""
    return _matching(_folders("site_profiles", "profile.yaml"), incomplete)


def recipes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of recipes."""
    return _matching(_folders("templates", "recipe.yaml"), incomplete)


def templates(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of templates, `<folder>/<file>`."""
    names = []
    for _, folder in layer_dirs("templates"):
        for recipe in _list(folder):
            inside = os.path.join(folder, recipe)
            names += [f"{recipe}/{name}" for name in _list(inside) if name.endswith(".j2")]
    return _matching(names, incomplete)


def partitions(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Partitions of the site named by --site, or by run.yaml; nothing where none can be read."""
    from hpctrain.base.errors import HpctrainError
    from hpctrain.config.document import load_yaml
    from hpctrain.config.site import load_site

    try:
        # While an option still lacks its value, click has not given the words before it their names
        # yet.
        named = [word for word in ctx.args if word.endswith((".yaml", ".yml"))]
        run_yaml = ctx.params.get("run_yaml") or (named[0] if named else "run.yaml")
        site = ctx.params.get("site_name")
        base = os.path.dirname(os.path.abspath(run_yaml))
        site = site or load_yaml(run_yaml).get("site")
        found = load_site(site, base).partitions if isinstance(site, str) else {}
    except HpctrainError:
        return []
    return _matching(list(found), incomplete)


def _folders(kind: str, marker: str) -> list[str]:
    return [
        name
        for _, folder in layer_dirs(kind)
        for name in _list(folder)
        if os.path.isfile(os.path.join(folder, name, marker))
    ]


def _list(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _matching(names: list[str], incomplete: str) -> list[CompletionItem]:
    return [
        CompletionItem(name)
        for name in sorted(set(names))
        if name.startswith(incomplete) and name.isprintable()
    ]
