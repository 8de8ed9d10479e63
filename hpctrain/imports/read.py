"""Reads a script from a file."""

from __future__ import annotations

from hpctrain.base.errors import EnvironmentFault, UsageError
from hpctrain.runtime.files import read_limited

MAX_BYTES = 1 << 20  # a job script of more is none


def read_script(path: str) -> str:
    """The text of a script. Raises EnvironmentFault where it cannot be read, UsageError where it is
    no text."""
    try:
        raw = read_limited(path, MAX_BYTES + 1)
    except OSError as error:
        raise EnvironmentFault(f"cannot read `{path}`: {error.strerror}") from error
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"`{path}` is no text: {error}") from error
    if len(raw) > MAX_BYTES or "\0" in text:
        raise UsageError(f"`{path}` is no job script")
    return text.replace("\r\n", "\n")
