"""What stands between srun and the program, and what it does with a signal meant for the program.
Pure.

Slurm sends a step's signal to every process in it. A launcher or a shell that does not handle the
signal ends with it, and srun then ends the step while the program still saves.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

_COMMAND = (  # where a shell expects a command
    r"(?:^|[;&|(\n]\s*|\s-[a-z]*c\s+|exec\s+|run\s+)(?:\S*/)?"
)
_LAUNCHER = re.compile(
    r"(?:^|[\s/;&|(])(torchrun|accelerate\s+launch|accelerate-launch|accelerate\.commands\.launch"
    r"|torch\.distributed\.(?:run|launch)|deepspeed\.launcher\.launch|ray_node\.py)(?=\s|$)"
    rf"|{_COMMAND}(deepspeed)(?=\s|$)"
)
_SHELLS = frozenset({"bash", "sh", "dash", "zsh", "ksh"})
# torch (elastic/multiprocessing/api.py) and DeepSpeed (launcher/launch.py) end their workers at
# these.
ENDING = frozenset({"TERM", "INT", "HUP"})


def launcher(argv: Sequence[str]) -> str | None:
    """The launcher that starts the program's processes, as the command names it, or None."""
    found = _LAUNCHER.search(" ".join(argv))
    return " ".join((found[1] or found[2]).split()) if found else None


def shell_between(argv: Sequence[str]) -> str | None:
    """What a shell runs as its child: the text after -c, or a script; None when no shell waits."""
    words = list(argv)
    while words and (os.path.basename(words[0]) == "env" or "=" in words[0]):
        words.pop(0)
    if not words:
        return None
    if os.path.basename(words[0]) not in _SHELLS:
        return words[0] if words[0].endswith(".sh") else None
    for index, word in enumerate(words[1:], 1):
        if re.fullmatch(r"-[a-z]*c", word):
            text = words[index + 1] if index + 1 < len(words) else ""
            # A shell becomes the command it is given, when that is the only one, or comes after
            # `exec`.
            waits = re.search(r"[;&|\n]", text) and not re.search(r"\bexec\s", text)
            return text if waits else None
        if not word.startswith("-"):
            return word
    return None


def traps(argv: Sequence[str]) -> bool:
    """Whether a shell in it says what it does with signals.

    It has no say over one that was ignored when it began (POSIX, `trap`).
    """
    return any(re.search(r"\btrap\s", word) for word in argv)
