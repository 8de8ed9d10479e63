"""Where the shipped templates and site profiles lie: inside the wheel, or beside the package in a checkout."""

from __future__ import annotations

import os

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
PROJECT_DIR = ".hpctrain"


def shipped_dir(name: str) -> str:
    """The folder `name` (`templates` or `site_profiles`) that this hpctrain came with."""
    in_wheel = os.path.join(_PACKAGE, "_shipped", name)
    return in_wheel if os.path.isdir(in_wheel) else os.path.join(os.path.dirname(_PACKAGE), name)


def no_user_config() -> bool:
    """Whether HPCTRAIN_NO_USER_CONFIG asks for the bare tool: shipped profiles and templates, no user defaults."""
    return os.environ.get("HPCTRAIN_NO_USER_CONFIG", "0") not in ("", "0")


def user_dir() -> str:
    """The folder of the user's own defaults, profiles and templates."""
    return os.path.join(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"), "hpctrain")


def own_dir(kind: str, for_user: bool) -> str:
    """Where a new template or profile goes: this project's folder, or the user's."""
    return os.path.join(user_dir() if for_user else PROJECT_DIR, kind)


def layer_dirs(kind: str) -> list[tuple[str, str]]:
    """(label, folder) of the layers of `templates` or `site_profiles`, the strongest first; folders may not exist."""
    layers = [] if no_user_config() else [("project", PROJECT_DIR), ("user", user_dir()), ("system", "/etc/hpctrain")]
    return [*((label, os.path.join(folder, kind)) for label, folder in layers), ("shipped", shipped_dir(kind))]


def hub_cache_dir() -> str:
    """Where Hugging Face libraries keep downloaded models and data (huggingface_hub, HF_HOME and HF_HUB_CACHE)."""
    home = os.environ.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "huggingface")
    return os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
