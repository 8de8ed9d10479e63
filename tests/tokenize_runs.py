"""Runs of `hpctrain tokenize` for its promises' tests: in this process (`do(request(…))`) or as a
command (`cli`)."""

from __future__ import annotations

import subprocess
import sys

from tokenize_help import model_path

from hpctrain.data import run
from hpctrain.data.plan import Options
from hpctrain.data.prepare import Request, prepare, write_plan

PLAIN = Options()


def quiet(*numbers):
    pass


def request(tmp_path, *inputs, kind="bpe_identity", tasks=1, prefix="out", options=PLAIN, **kwargs):
    return Request(
        tuple(map(str, inputs)),
        model_path(kind),
        str(tmp_path / prefix),
        tasks,
        options=options,
        **kwargs,
    )


def do(asked, processes=1):
    prepared = prepare(asked)
    if prepared.finished:
        return prepared.finished
    write_plan(prepared.plan)
    return run.run_here(prepared.plan, processes, asked.force, False, quiet)


def pair(tmp_path, prefix="out"):
    return tuple(
        (tmp_path / f"{prefix}_text_document{end}").read_bytes() for end in (".bin", ".idx")
    )


def cli(*args, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "hpctrain", "tokenize", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **kwargs,
    )
