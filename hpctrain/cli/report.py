from __future__ import annotations

import os

import click

from hpctrain.base import errors, terminal


@click.command()
@click.argument("target", metavar="RUN")
@click.option(
    "-o", "--out", type=click.Path(), help="The page [default: report.html in the run directory]."
)
@click.option("--png", "png_path", type=click.Path(), help="Also the curves as a picture.")
@click.option(
    "--csv", "csv_dir", type=click.Path(), help="Also the tables as CSV, into this folder."
)
@click.option(
    "--parquet",
    "parquet_dir",
    type=click.Path(),
    help="Also the tables as Parquet, into this folder.",
)
@click.option("--no-slurm", is_flag=True, help="From the run directory alone.")
@click.option("--force", is_flag=True, help="Replace a file that is no report.")
def command(
    target: str,
    out: str | None,
    png_path: str | None,
    csv_dir: str | None,
    parquet_dir: str | None,
    no_slurm: bool,
    force: bool,
) -> None:
    """Write one self-contained HTML page of a run: curves, links, cost, lost work, what triage
    says; stdout is its path.

    RUN is a run directory, a run.yaml, a run's name or a job id, or a pipeline: then one page for
    each stage and one that links them, printed first. Needs the extra `report`.

    \b
    hpctrain report runs/ft_latest_7
    hpctrain report ft_latest_7 -o /tmp/ft.html --png /tmp/ft.png --csv /tmp/ft
    """
    from hpctrain.runs.records import find_pipeline, find_runs
    from hpctrain.runs.report.gather import gather
    from hpctrain.runs.report.tables import export, need_parquet
    from hpctrain.runs.report.write import write_report

    folder = find_pipeline(target)
    if folder:
        if png_path or csv_dir or parquet_dir:
            raise errors.UsageError(
                "a pipeline has no curves of its own",
                hint="name one of its stages' run directories",
            )
        _pipeline(folder, out or os.path.join(folder, "report.html"), no_slurm, force)
        return
    if parquet_dir:
        need_parquet()
    run_dir = find_runs(target)[0]
    report = gather(run_dir, not no_slurm)
    paths = write_report(report, out or os.path.join(run_dir, "report.html"), png_path, force)
    paths += export(report, csv_dir, "csv") if csv_dir else []
    paths += export(report, parquet_dir, "parquet") if parquet_dir else []
    terminal.unseen(report.unseen)
    for path in paths:
        terminal.data(path)


def _pipeline(folder: str, out: str, no_slurm: bool, force: bool) -> None:
    from hpctrain.runs.records import stage_dirs
    from hpctrain.runs.report.gather import gather
    from hpctrain.runs.report.write import write_index, write_report
    from hpctrain.runs.status_table import of_pipeline

    reports = {run_dir: gather(run_dir, not no_slurm) for run_dir in stage_dirs(folder)}
    paths = {
        run_dir: write_report(report, os.path.join(run_dir, "report.html"), None, force)[0]
        for run_dir, report in reports.items()
    }
    pipeline = of_pipeline(folder, [report.status for report in reports.values()])
    rows = []
    for stage in pipeline["stages"]:
        report = reports.get(stage["run_dir"])
        progress = report.status.progress if report else None
        rows.append(
            {
                **stage,
                "page": paths.get(stage["run_dir"]),
                "iteration": progress.iteration if progress else None,
                "target": progress.target if progress else None,
            }
        )
    terminal.unseen(what for report in reports.values() for what in report.unseen)
    for path in (write_index(pipeline["name"], rows, out, force), *paths.values()):
        terminal.data(path)
