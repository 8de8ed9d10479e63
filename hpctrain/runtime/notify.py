"""Tells a person, from the batch host, that a link started, ended, failed, gave up or found the run
done: a command with the message on its stdin, or a POST of it as JSON.

Nothing of it can hurt the job: it works in a process of its own, for ten seconds at most.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import time
from typing import Any, Dict, Mapping

from .history import RUN_MODES

_LIMIT_S, _PATIENCE_S = 10, 5.0
_SECRET = re.compile(r"(?i)TOKEN|KEY|SECRET|PASSW|CREDENTIAL")


def tell(to: str, run: str, record: Mapping[str, Any], environ: Mapping[str, str]) -> None:
    """Send what a record of links.jsonl says to `to`: an http(s) URL, `$NAME` of a variable that
    holds one, or a command. Where the job ends now it is waited for, for some seconds."""
    if to.startswith("$"):
        to = environ.get(to[1:], "")
    if not to:
        return
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(_LIMIT_S)
            os.setsid()
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):  # the job script reads the guard's output to its end
                os.dup2(nowhere, stream)
            _send(to, json.dumps(message(run, record, environ)).encode())
        finally:
            os._exit(0)
    until = time.monotonic() + (0 if _event(record) == "start" else _PATIENCE_S)
    while os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < until:
        time.sleep(0.05)


def message(run: str, record: Mapping[str, Any], environ: Mapping[str, str]) -> Dict[str, Any]:
    """What is sent; the values of variables that hold secrets by their names are left out."""
    names = ("link", "job_id", "restart", "mode", "checkpoint", "iteration", "exit_code", "time")
    reason = str(record.get("reason") or "")
    for name, value in environ.items():
        if _SECRET.search(name) and len(value) >= 6:
            reason = reason.replace(value, "***")
    event = _event(record)
    text = "{}: link {} {}: {}".format(run, record.get("link"), event.replace("_", " "), reason)
    found = {name: record.get(name) for name in names}
    return {"run": run, "event": event, "reason": reason, "text": text, **found}


def _event(record: Mapping[str, Any]) -> str:
    """start, done, stopped, gave_up, ended or failed."""
    if record.get("event") == "end":
        return "failed" if record.get("exit_code") else "ended"
    return "start" if record.get("mode") in RUN_MODES else str(record.get("mode"))


def _send(to: str, content: bytes) -> None:
    if to.startswith(("http://", "https://")):
        kind = {"Content-Type": "application/json"}
        import urllib.request  # a hundred files to open, for those few who are told by a URL

        urllib.request.urlopen(urllib.request.Request(to, content, kind), timeout=_LIMIT_S).close()
        return
    with subprocess.Popen(shlex.split(to), stdin=subprocess.PIPE) as program:
        program.communicate(content)
