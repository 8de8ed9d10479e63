"""The report's tables as pandas frames, for export to CSV and Parquet. pandas is imported when they
are asked for."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

from hpctrain.base.errors import EnvironmentFault, missing_package
from hpctrain.base.files import write_whole
from hpctrain.runs.report.gather import Report
from hpctrain.triage.records import utc


def frames(report: Report) -> dict[str, Any]:
    """`steps`: one row a step line that was kept; `attempts`: one row a start of a job; `rules`:
    the verdicts."""
    try:
        pd: Any = importlib.import_module("pandas")
    except ImportError as error:
        raise missing_package("pandas", "report") from error
    steps = [
        {
            "job_id": attempt.job_id,
            "restart": attempt.restart,
            "link": attempt.link,
            "iteration": step.iteration,
            "loss": step.loss,
            "lr": step.lr,
            "grad_norm": step.grad_norm,
            "step_time_s": step.step_time_s,
            "tokens_per_s": step.tokens_per_s,
            "samples_per_s": step.samples_per_s,
            "skipped": step.skipped,
            "nan": step.nan,
            "time": utc(time_s),
        }
        for attempt, step, time_s in report.points.rows
    ]
    attempts = [
        {
            "link": row.link,
            "job_id": row.job_id,
            "restart": row.restart,
            "mode": row.mode,
            "state": row.state,
            "start": utc(row.start_s),
            "end": utc(row.end_s),
            "elapsed_s": row.elapsed_s,
            "first_iteration": row.first_iteration,
            "last_iteration": row.last_iteration,
            "kept_iterations": row.kept_iterations,
            "lost_iterations": row.lost_iterations,
            "step_time_s": row.step_time_s,
            "productive_s": row.productive_s,
            "lost_s": row.lost_s,
            "cause": row.cause,
            "where": row.where,
            "node": row.node,
            "node_hours": row.bill.node_hours if row.bill else None,
            "gpu_hours": row.bill.gpu_hours if row.bill else None,
            "billed": row.bill.billed if row.bill else None,
            "unit": row.bill.unit if row.bill else "",
        }
        for row in report.rows
    ]
    rules = [verdict.as_json() for verdict in report.diagnosis.verdicts]
    made = {
        "steps": pd.DataFrame(steps, columns=list(steps[0]) if steps else ["iteration", "loss"]),
        "attempts": pd.DataFrame(
            attempts, columns=list(attempts[0]) if attempts else ["link", "job_id"]
        ),
        "rules": pd.DataFrame(rules),
    }
    return {name: _typed(frame) for name, frame in made.items()}


_WHOLE = {
    "restart",
    "link",
    "iteration",
    "skipped",
    "nan",
    "first_iteration",
    "last_iteration",
    "kept_iterations",
    "lost_iterations",
    "line",
}
_REAL = {
    "loss",
    "lr",
    "grad_norm",
    "step_time_s",
    "tokens_per_s",
    "samples_per_s",
    "elapsed_s",
    "productive_s",
    "lost_s",
    "node_hours",
    "gpu_hours",
    "billed",
}


def _typed(frame: Any) -> Any:
    """The same types whatever a run tells: files of several runs can then be read as one."""
    types = {**dict.fromkeys(_REAL, "float64"), **dict.fromkeys(_WHOLE, "Int64")}
    return frame.astype({name: types.get(name, "string") for name in frame.columns})


def _harmless(frame: Any) -> Any:
    """Texts that a spreadsheet would take for a formula begin with a quote (OWASP, CSV
    injection)."""
    texts = frame.select_dtypes("string")
    return frame.assign(
        **{name: texts[name].str.replace(r"^(?=[=+@\t\r]|-.)", "'", regex=True) for name in texts}
    )


def need_parquet() -> None:
    """Raises EnvironmentFault when no Parquet can be written here, before anything else is."""
    if importlib.util.find_spec("pyarrow") is None:
        raise missing_package("pyarrow", "parquet")


def export(report: Report, folder: str, kind: str) -> list[str]:
    """Write every frame as `<folder>/<name>.csv` or `.parquet`, each whole or not at all; returns
    the paths.

    Raises EnvironmentFault when a Parquet engine (pyarrow) is missing or the folder cannot be
    written.
    """
    paths = []
    try:
        for name, frame in frames(report).items():
            if kind == "csv":
                content = _harmless(frame).to_csv(index=False).encode()
            else:
                content = frame.to_parquet(index=False)
            paths.append(os.path.join(folder, f"{name}.{kind}"))
            write_whole(paths[-1], content)
    except ImportError as error:
        raise missing_package("pyarrow", "parquet") from error
    except OSError as error:
        raise EnvironmentFault(f"cannot write `{folder}`: {error.strerror}") from error
    return paths
