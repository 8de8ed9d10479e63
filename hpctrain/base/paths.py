"""Where the shipped templates and site profiles lie: inside the wheel, or beside the package in a
checkout."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Mapping
from typing import Any

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROJECT_DIR = ".hpctrain"


def shipped_dir(name: str) -> str:
    """The folder `name` (`templates` or `site_profiles`) that this hpctrain came with."""
    in_wheel = os.path.join(_PACKAGE, "_shipped", name)
    return in_wheel if os.path.isdir(in_wheel) else os.path.join(os.path.dirname(_PACKAGE), name)


@functools.cache
def shipped_text(recipe: str, name: str) -> str:
    """The text of a file that a recipe's run directories get a copy of."""
    path = os.path.join(shipped_dir("templates"), recipe, name)
    with open(path, encoding="utf-8") as file:
        return file.read()


@functools.cache
def shipped_module(folder: str, name: str) -> Any:
    """A program of templates/<folder> that runs elsewhere by itself, as a module of this
    process."""
    path = os.path.join(shipped_dir("templates"), folder, f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def filled(folder: str, file: str, /, **values: Any) -> str:
    """The text of templates/<folder>/<file>.jinja with these values,
    functions among them. A name that is used there and not given is a mistake of ours.

    Statements of the template take whole lines; in a picture (.svg), values are escaped.
    """
    import jinja2  # of no use to most verbs

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        autoescape=file.endswith(".svg"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(shipped_text(folder, f"{file}.jinja")).render(values)


def no_user_config() -> bool:
    """Whether HPCTRAIN_NO_USER_CONFIG asks for the bare tool: shipped profiles and templates, no
    user defaults."""
    return os.environ.get("HPCTRAIN_NO_USER_CONFIG", "0") not in ("", "0")


def user_dir() -> str:
    """The folder of the user's own defaults, profiles and templates."""
    return os.path.join(
        os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"), "hpctrain"
    )


def cache_home(environ: Mapping[str, str]) -> str:
    """Where hpctrain keeps what can be made again: `$XDG_CACHE_HOME/hpctrain`, else
    `~/.cache/hpctrain`."""
    base = environ.get("XDG_CACHE_HOME", "")
    if not base.startswith("/"):  # the XDG specification: a relative path is to be ignored
        base = os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".cache")
    return os.path.join(base, "hpctrain")


def project_dir(base_dir: str = "") -> str:
    """The `.hpctrain` that holds for files in `base_dir` (empty: here): the nearest one there or
    above.

    It is sought upwards to the root of the git repository, and only in folders of one owner: a
    template is code, and nobody else's folder above may slip one in. Where there is none, the place
    for one in `base_dir`.
    """
    folder = first = os.path.abspath(base_dir)
    while not os.path.isdir(os.path.join(folder, PROJECT_DIR)):
        above = os.path.dirname(folder)
        if (
            above == folder
            or os.path.exists(os.path.join(folder, ".git"))
            or _owner(above) != _owner(first)
        ):
            return os.path.join(base_dir, PROJECT_DIR)
        folder = above
    return os.path.join(base_dir if folder == first else folder, PROJECT_DIR)


def own_dir(kind: str, for_user: bool) -> str:
    """Where a new template or profile goes: this project's folder, or the user's."""
    return os.path.join(user_dir() if for_user else project_dir(), kind)


def layer_dirs(kind: str, base_dir: str = "") -> list[tuple[str, str]]:
    """(label, folder) of the layers of `templates` or `site_profiles`, the strongest first; folders
    may not exist.

    The project's layer is that of `base_dir`, the folder of the run.yaml (empty: here), so that a
    run is rendered alike from wherever it is rendered.
    """
    layers = []
    if not no_user_config():
        layers = [
            ("project", project_dir(base_dir)),
            ("user", user_dir()),
            ("system", "/etc/hpctrain"),
        ]
    return [
        *((label, os.path.join(folder, kind)) for label, folder in layers),
        ("shipped", shipped_dir(kind)),
    ]


def _owner(folder: str) -> int:
    try:
        return os.stat(folder).st_uid
    except OSError:
        return -1


def hub_cache_dir() -> str:
    """Where Hugging Face libraries keep downloaded models and data (huggingface_hub, HF_HOME and
    HF_HUB_CACHE)."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.path.expanduser("~"), ".cache", "huggingface"
    )
    return os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
