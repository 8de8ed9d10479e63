"""What ended a step before it trained, where the same job would end so again: an error of Python or
of the shell as it starts, by the end of the job's log.

Failures of nodes, networks and file systems are left out: elsewhere, or later, they may not come
back.
"""

import os
import re
from typing import Dict, List

from .files import read_limited

# bytes of a log's end, and different lines of one start, that are looked at
TAIL, MOST = 512 * 1024, 20
_NOISE = re.compile(rb"\x1b\[[0-9;]*[A-Za-z]|\r")
# srun --label, torchrun's prefixes
_PREFIX = re.compile(rb"^(?:\[[a-z]*\d+\]:|\d+: |\[rank\d+\]: ?| )*")
_STARTING = b"hpctrain: starting: "
# Every framework prints its loss with each step.
_STEP = re.compile(rb"(?i)loss['\"]?[\s:=(]{1,8}[\d.]+")
_PYTHON = re.compile(
    rb"(?:[\w.]+\.)?(?:(?:Name|Syntax|Indentation|Import|ModuleNotFound|Attribute|Type|Value|Key"
    rb"|Index|Assertion|NotImplemented|FileNotFound)Error)\b.*"
)
_ANY = re.compile(rb"(?:[\w.]+\.)?\w+(?:Error|Exception|Interrupt|Exit)\b(?=:|\s*$)")
# What a launcher raises because a rank ended.
_OF_A_CHILD = (b"ChildFailedError", b"CalledProcessError", b"SystemExit")
_SHELL = re.compile(
    rb".*(?:error: (?:unrecognized arguments|the following arguments are required|argument )"
    rb"|: command not found$|can't open file .*No such file|: No such file or directory$).*"
)
_ELSEWHERE = re.compile(
    rb"(?i)NCCL|RCCL|CUDA error|HIP error|out of memory|Bus error|Stale file handle"
    rb"|Input/output error|No space left|quota exceeded|Connection (?:refused|reset|timed)"
    rb"|Transport endpoint|slurmstepd: error: (?!\*\*\*)|NODE FAIL|node failure|Killed$"
)


def repeatable(run_dir: str, run: str, job_id: str, exit_code: int) -> List[str]:
    """The lines that tell such an end of a job's newest start, numbers left out so that another
    node or rank writes the same; empty for any other end, and for a log that is not there."""
    if exit_code not in (1, 2, 126, 127) or not job_id.isdigit():
        return []
    try:
        path = os.path.join(run_dir, "logs", "{}-{}.out".format(run, job_id))
        text = read_limited(path, TAIL, tail=True)
    except (OSError, ValueError):
        return []
    return lines_of(text, exit_code)


def lines_of(text: bytes, exit_code: int) -> List[str]:
    """The same of the end of a log; pure. An exception of another kind, whose end nobody knows to
    come back, leaves nothing."""
    text = _NOISE.sub(b"", text[max(text.rfind(_STARTING), 0) :])
    if _STEP.search(text) or _ELSEWHERE.search(text):
        return []
    found: Dict[str, None] = {}
    traced = False
    for raw in text.split(b"\n"):
        line = _PREFIX.sub(b"", raw)
        if line.startswith(b"Traceback (most recent call last)") or line.startswith(b'File "'):
            traced = True
            continue
        ends = traced and _ANY.match(line)
        if ends and not _PYTHON.match(line) and not ends.group().endswith(_OF_A_CHILD):
            return []
        if ends and _PYTHON.match(line) or _SHELL.match(line):
            traced = False
            plain = re.sub(rb"0x[0-9a-f]+|\d+", b"#", line[:300]).decode("utf-8", "replace")
            found.setdefault(plain.strip(), None)
    if not found and exit_code != 1:
        return ["exit code {}".format(exit_code)]
    return list(found)[-MOST:]
