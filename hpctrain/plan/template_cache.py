"""Compiled templates kept in the user's cache, as Python keeps its modules: half of what `render`
computes otherwise."""

from __future__ import annotations

import os
from collections.abc import Mapping

import jinja2
from jinja2.bccache import Bucket

from hpctrain import __version__
from hpctrain.base.paths import cache_home
from hpctrain.config.trust import trusted


def template_cache(environ: Mapping[str, str]) -> jinja2.BytecodeCache | None:
    """The cache of compiled templates, or None where there is no safe place for one.

    It is never needed: a damaged, foreign or unwritable one is passed over in silence. A template
    is compiled anew when its text, hpctrain's version, Jinja's format or Python's version differs
    (jinja2.bccache compares the last two).
    """
    home = cache_home(environ)
    folder = os.path.join(home, f"templates-{__version__}")
    try:
        if not os.path.isdir(folder):
            os.stat(os.path.dirname(home))  # a home without any cache stays as it is
            os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError:
        return None
    # What is loaded from here is run.
    return _Cache(folder, "%s.cache") if trusted(folder) else None


class _Cache(jinja2.FileSystemBytecodeCache):
    def get_bucket(
        self, environment: jinja2.Environment, name: str, filename: str | None, source: str
    ) -> Bucket:
        # What is compiled for a sandbox asks it before every call; others cannot be asked.
        kind = "sandboxed " if environment.sandboxed else ""
        return super().get_bucket(environment, kind + name, filename, source)

    def load_bytecode(self, bucket: Bucket) -> None:
        try:
            super().load_bytecode(bucket)
        except Exception:  # whatever unpickling says of a damaged file
            bucket.reset()

    def dump_bytecode(self, bucket: Bucket) -> None:
        try:
            super().dump_bytecode(bucket)
        except OSError:  # full, over quota, read-only: it will be compiled again next time
            pass
