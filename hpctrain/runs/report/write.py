"""Makes a run's report and writes it beside the run: whole or not at all, and never over a file
that is no report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from hpctrain.base.errors import EnvironmentFault, Refused
from hpctrain.base.files import write_whole
from hpctrain.runs.report import figures
from hpctrain.runs.report.gather import Report
from hpctrain.runs.report.page import MARK, page, pipeline_page


def write_report(
    report: Report, path: str, png_path: str | None = None, force: bool = False
) -> list[str]:
    """Write the page, and the curves as PNG where asked; returns the paths.

    Raises Refused when `path` holds something that is not an earlier report and `force` is not set,
    EnvironmentFault when pandas or matplotlib is missing or the folder cannot be written.
    """
    if not force and os.path.lexists(path) and not _is_report(path):
        raise Refused(
            f"`{path}` is there and is no report of hpctrain",
            hint="name another file with -o, or use --force",
        )
    curves, times = figures.curves(report), figures.timeline(report)
    try:
        text = page(report, figures.svg(curves), figures.svg(times) if times is not None else None)
        picture = figures.png(curves) if png_path else b""
    finally:
        figures.close(curves, times)
    _write(path, text.encode("utf-8"))
    if png_path:
        _write(png_path, picture)
    return [path, *([png_path] if png_path else [])]


def write_index(
    name: str, rows: Sequence[Mapping[str, Any]], path: str, force: bool = False
) -> str:
    """Write the page of a pipeline: a row per stage, with a link to its own page. Raises as
    `write_report`."""
    if not force and os.path.lexists(path) and not _is_report(path):
        raise Refused(
            f"`{path}` is there and is no report of hpctrain",
            hint="name another file with -o, or use --force",
        )
    _write(path, pipeline_page(name, rows, os.path.dirname(os.path.abspath(path))).encode("utf-8"))
    return path


def _is_report(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return MARK.encode() in file.read(65536)
    except OSError:
        return False


def _write(path: str, content: bytes) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise EnvironmentFault(f"cannot write `{path}`: {error.strerror}") from error
