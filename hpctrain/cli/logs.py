from __future__ import annotations

import shlex
import time

import click

from hpctrain.base import terminal


@click.command()
@click.argument("target", metavar="[RUN]", required=False)
@click.option(
    "-f", "--follow", is_flag=True, help="Go on as the logs grow, also into the next links."
)
@click.option(
    "-n",
    "--lines",
    default=40,
    show_default=True,
    type=click.IntRange(0),
    help="Lines of each log's end.",
)
@click.option("--link", type=int, help="Only this link's log.")
def command(target: str | None, follow: bool, lines: int, link: int | None) -> None:
    """Show the logs of a run across links and requeues: the first failing rank's lines, then the
    end of each log.

    RUN is a run directory, a run.yaml, a run's name or a job id; without one, the run whose logs
    grew last.

    \b
    hpctrain logs runs/ft_latest_7
    hpctrain logs -f 1234567
    hpctrain logs ft_latest_7 --link 3 -n 200
    """
    from hpctrain.runs.diagnose import open_target
    from hpctrain.runs.diagnosis import diagnose
    from hpctrain.runs.logs import failing_lines, follow_run, sections
    from hpctrain.runs.records import find_one, read_run
    from hpctrain.runs.status import observe

    run = read_run(find_one(target))
    subject = open_target([run.run_dir])
    diagnosis = diagnose(subject) if run.logs else None
    if diagnosis and diagnosis.cause and link in (None, diagnosis.cause.attempt.link):
        first = failing_lines(diagnosis.cause)
        terminal.info(terminal.paint(first.heading, "red"))
        for line in first.lines:
            terminal.data(line)
    for section in sections(run, lines, link):
        terminal.info(terminal.paint(f"==> {section.heading}", "bold"))
        for line in section.lines:
            terminal.data(line)
    terminal.unseen(subject.unseen)
    if not run.logs:
        terminal.info(f"{run.name} has no log yet")
    if follow:
        asked = [0.0, True]

        def alive() -> bool:
            if time.monotonic() - asked[0] > 15:
                asked[:] = [time.monotonic(), observe([run.run_dir], read_logs=False)[0].live]
            return bool(asked[1])

        follow_run(run.run_dir, terminal.data, alive)
    elif diagnosis:
        terminal.next_step(f"hpctrain triage {shlex.quote(run.run_dir)}")
