"""A chain: all links queued at once, each deciding for itself when it starts; stopping, cancelling
and extending it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpctrain.base.errors import EnvironmentFault, Problem, Refused, UsageError
from hpctrain.jobs import bad_nodes as badnodes
from hpctrain.jobs import checkpoints
from hpctrain.jobs import side as sidejobs
from hpctrain.jobs.ledger import (
    MAIN,
    SIDE,
    Ledger,
    Submission,
    only_one,
    read_ledger,
    record_cancelled,
    record_waived,
    submit_all,
)
from hpctrain.plan.load import Loaded
from hpctrain.plan.run_dir import run_files, write_run_dir
from hpctrain.runs.live import link_in_tag, live_jobs
from hpctrain.runs.records import RunRecords, find_pipeline, find_runs, offset_of, read_run
from hpctrain.runs.starts import links_of, measured_step_time_s, starts_of
from hpctrain.runs.status import links_needed, observe
from hpctrain.runtime import history
from hpctrain.runtime.files import write_atomic
from hpctrain.runtime.handover import expected
from hpctrain.runtime.link import Decision, decide_now, until_exported
from hpctrain.runtime.settings import Settings, handed_over, parse_settings
from hpctrain.runtime.survey import Choice, Survey, choose
from hpctrain.slurm import commands as slurm
from hpctrain.slurm.jobs import Job, in_queue, of_user

# Above this much of the machine a person should look once more: a day of one 8-GPU node is 192.
ASK_ABOVE_HOURS = 200.0


@dataclass(frozen=True)
class Expectation:
    """What a link is expected to do: its mode, and between which iterations where that can be
    told."""

    link: int
    job_id: str | None
    mode: str
    first: int | None
    last: int | None


@dataclass(frozen=True)
class ChainPlan:
    """What `chain` would submit, and what that costs. `new` are the link numbers that are not
    queued yet, `live` the jobs that wait or run. `done`: why there is nothing left to do, where
    that is so; `behind`: a live job that the ledger does not have, which new links wait for."""

    run_dir: str
    run: str
    new: tuple[int, ...]
    links: tuple[Expectation, ...]
    side_script: str | None
    gpu_hours: float
    node_hours: float
    billed: float | None
    unit: str
    bad_nodes: tuple[badnodes.BadNode, ...]
    live: tuple[str, ...] = ()
    done: str = ""
    behind: str | None = None

    @property
    def total(self) -> int:
        """How many links follow each other from now on: those that wait or run, and the new."""
        return len(self.live) + len(self.new)

    @property
    def hours(self) -> tuple[float, str]:
        """The cost to ask about: GPU-hours, or node-hours where there are no GPUs."""
        return (self.gpu_hours, "GPU-hours") if self.gpu_hours else (self.node_hours, "node-hours")


@dataclass(frozen=True)
class _Look:
    """What a run directory and its checkpoint folder show now, each read once."""

    settings: Settings
    choice: Choice
    decided: Decision
    refusals: Sequence[str]
    run: RunRecords
    links: list[dict[str, Any]]
    ledger: Ledger

    @property
    def live(self) -> dict[str, int | None]:
        """The jobs of links that wait or run, and can still work, with their numbers where they
        have one."""
        if not self.run.job_ids() and not slurm.have("squeue"):
            return {}
        numbers: dict[str, int | None] = dict(links_of(self.run))
        side = {job_id for (_, kind), job_id in self.ledger.submitted().items() if kind == SIDE}
        gone = self.ledger.cancelled() | side
        out = {}
        for job in live_jobs(self.run):
            link, kind = link_in_tag(job)
            if job.job_id not in gone and kind != SIDE and job.state != "COMPLETING":
                out[job.job_id] = numbers.get(job.job_id, link)
        return out

    def got_on(self, live: Collection[int | None]) -> int:
        """How many of the links that are not `live` made a checkpoint: they did their share."""
        newest = self.choice.name if self.choice.kind == "made" else None
        ended = {record["link"] for record in self.links if record.get("link")} - {*live}
        return sum(history.made_by(self.links, link, newest) is not None for link in ended)


def _look(run_dir: str, plan: Mapping[str, Any]) -> _Look:
    """Raises EnvironmentFault when the checkpoint folder cannot be read, OSError for the ledger."""
    settings = _settings(run_dir, plan)
    ledger = read_ledger(run_dir)
    run = read_run(run_dir) if os.path.isdir(run_dir) else RunRecords(run_dir, str(plan["run"]))
    survey, choice = _survey(settings)
    if survey:
        settings = until_exported(settings, survey, choice, lambda _: None)
    links = [dict(record) for record in run.links]
    decided = decide_now(settings, choice, links)
    goes_on = survey and choice.kind == "made" and choice.name
    refusals = survey.verdict(choice.name).refusals if survey and goes_on and choice.name else ()
    return _Look(settings, choice, decided, refusals, run, links, ledger)


def plan_chain(
    run_dir: str,
    plan: Mapping[str, Any],
    num_links: int | None = None,
    extend: int | None = None,
    auto: bool = False,
    force: bool = False,
    no_check: bool = False,
) -> ChainPlan:
    """Decide which links to submit. `plan` is plan.json's content; reads the run directory and the
    checkpoint folder, and asks Slurm what of the run is live.

    `num_links` is the whole number of links: those that wait or run and those that made a
    checkpoint count, others are made up for; where nothing is live, and the run not done, it gets
    some in any case. `extend` is a number of links more, `auto` as many as the remaining iterations
    need; `force` gives links to a run that is done. Raises UsageError, Refused while a STOP file
    would end every link at once or the guard would refuse the checkpoints (but for `no_check`),
    EnvironmentFault when they cannot be read or Slurm does not answer.
    """
    look = _look(run_dir, plan)
    done = look.decided.reason if look.decided.decision == "done" and not force else ""
    if not done:
        _require_clear(look, no_check)
    step_time_s = measured_step_time_s(starts_of(look.run)) or plan["job"]["step_time_s"]
    unsure = {link for link, kind in look.ledger.open() if kind == MAIN}
    live = look.live
    jobs = num_links or plan["job"]["num_links"]
    more = extend or 0
    at_work = len(live) + len(unsure - {*live.values()})
    if done:
        more, unsure = 0, set()
    elif auto:
        more = _links_needed(plan, look, step_time_s) - at_work
    elif not extend:
        more = jobs - at_work - look.got_on(live.values())
        more = more if more > 0 or at_work else jobs
    known = max([0, *look.ledger.links(), *links_of(look.run).values()])
    new = tuple(sorted({*unsure, *range(known + 1, known + max(more, 0) + 1)}))
    cost, count = plan["cost"], len(new)
    on_record = set(look.ledger.submitted().values())
    others = sorted(set(live) - on_record, key=int)
    return ChainPlan(
        run_dir,
        str(plan["run"]),
        new,
        _expectations(plan, look, live, new, step_time_s),
        look.settings.after_each,
        cost["gpu_hours"] * count,
        cost["node_hours"] * count,
        None if cost["billed"] is None else cost["billed"] * count,
        cost["unit"],
        tuple(badnodes.find(look.run)),
        tuple(sorted(live, key=int)),
        done,
        others[-1] if others and not set(live) & on_record else None,
    )


def _settings(run_dir: str, plan: Mapping[str, Any]) -> Settings:
    """The guard's settings; the start is what an earlier stage handed over, or is expected to."""
    settings = parse_settings(dict(plan["guard"]))._replace(run_dir=run_dir)
    if settings.source is None or settings.start is not None:
        return settings
    return settings._replace(start=handed_over(run_dir) or expected(settings))


def _survey(settings: Settings) -> tuple[Survey | None, Choice]:
    """What a link would start from now. Raises EnvironmentFault when the folder cannot be read."""
    if not settings.checkpoint_dir:
        return None, Choice("nothing", None, None, (), ())
    try:
        survey = Survey(settings)
        return survey, choose(survey)
    except OSError as error:
        raise _unreadable(f"`{error.filename}` cannot be read: {error.strerror}") from error


def _unreadable(what: str) -> EnvironmentFault:
    hint = "nothing was changed or queued; try again when it can be read"
    return EnvironmentFault(what, hint=hint)


def _require_clear(look: _Look, no_check: bool) -> None:
    """Refuse to queue links that the guard would not start."""
    if look.run.stop:
        raise Refused(
            f"`{look.run.run_dir}/STOP` is there, so every link would end as it starts",
            hint="remove that file, then try again",
        )
    decided = look.decided
    if decided.decision == "run" and look.choice.unreadable:
        raise _unreadable(look.choice.unreadable)
    why = decided.reason if decided.decision == "gave_up" else ""
    if decided.decision == "run" and look.refusals:
        why = f"`{look.choice.name}` {look.refusals[0]}"
    if why and not no_check:
        hint = "`hpctrain checkpoint list` shows the folder; --no-check queues all the same"
        raise Refused(Problem(why, why="every link would end as it starts", hint=hint))


def prepare(
    loaded: Loaded, force: bool = False, dry_run: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Render and bootstrap a run: what `chain` does before it submits. Returns plan.json's content
    and what to tell.

    Raises UsageError when the start checkpoint cannot be used, Refused when the run directory holds
    another rendering.
    """
    plan, said = loaded.plan, []
    files = run_files(loaded)
    if not dry_run and write_run_dir(plan.run_dir, files, force):
        said.append(f"wrote {plan.run_dir}")
    settings = parse_settings(plan.guard())._replace(run_dir=plan.run_dir)
    survey, choice = _survey(settings)
    settled = choice.refusal or choice.unreadable or choice.kind == "made"
    if settings.start and not settled and not (survey and survey.made):
        done = checkpoints.bootstrap(settings, dry_run)
        said += [
            *done.notes,
            f"the start checkpoint `{done.start}` is complete: {done.num_files} files",
        ]
        if done.target:
            said.append(
                f"{'would link' if dry_run else 'linked'}"
                f" `{os.path.join(done.folder, done.link or '')}` to it"
            )
    content: dict[str, Any] = json.loads(files["plan.json"])
    return content, said


@contextlib.contextmanager
def readable(run_dir: str) -> Iterator[None]:
    """File errors within become an EnvironmentFault that says where."""
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(
            f"cannot use `{error.filename or run_dir}`: {error.strerror}"
        ) from error


def ask_needed(hours: float) -> bool:
    """Whether so many GPU- or node-hours are above what is submitted without a question; a sandbox
    costs nothing."""
    return hours > ASK_ABOVE_HOURS and not os.environ.get("HPCTRAIN_SANDBOX")


def submit_chain(
    chain: ChainPlan, exclude: str = "", after: str | None = None, waived: Sequence[Problem] = ()
) -> dict[tuple[int, str], str]:
    """Queue the new links, each after the one before it, with their side jobs; returns all job ids
    by (link, kind).

    Where no link of the run waits or runs, the first new one waits for the job `after`, another
    run's, or for the run's own that was submitted by hand. The ledger keeps the errors of `check`
    that were `waived`.
    """
    script = os.path.join(chain.run_dir, "job.sbatch")
    options = (f"--exclude={exclude}",) if exclude else ()
    with only_one(chain.run_dir):
        record_waived(chain.run_dir, waived)
        ledger = read_ledger(chain.run_dir)
        live = live_links(ledger)
        wanted: list[Submission] = []
        # Live links too: their side jobs may be what a crash left out. What is on record is not
        # submitted again.
        for link in sorted({*chain.new, *live}):
            wanted.append(Submission(link, MAIN, script, (str(link),), options))
            if chain.side_script:
                side = sidejobs.submission(chain.run_dir, chain.run, link, chain.side_script)
                wanted.append(Submission(link, SIDE, side.script, (), side.options))
        return submit_all(chain.run_dir, wanted, chain.behind or after)


def live_links(ledger: Ledger) -> dict[int, str]:
    """The links that wait or run now, with their jobs. Asks Slurm only when something was
    submitted."""
    submitted = {
        link: job_id for (link, kind), job_id in ledger.submitted().items() if kind == MAIN
    }
    if not submitted:
        return {}
    live = {job.job_id for job in of_user(submitted.values()) if job.live} - ledger.cancelled()
    return {link: job_id for link, job_id in submitted.items() if job_id in live}


def _remaining(look: _Look, plan: Mapping[str, Any]) -> int | None:
    settings, choice = look.settings, look.choice
    if settings.target is None:
        return None
    made = choice.kind == "made" or settings.counter == "greatest_folder"
    whole = plan["job"]["iterations"] or settings.target
    return max(settings.target - (choice.number or 0), 0) if made and choice.number else whole


def _links_needed(plan: Mapping[str, Any], look: _Look, step_time_s: float | None) -> int:
    remaining = _remaining(look, plan)
    if remaining is None or not step_time_s:
        what = "the step time" if remaining is not None else "the target"
        raise UsageError(
            f"`--jobs auto` needs {what}, which is not known yet",
            hint="set `estimate: {step_time_s: …}` in run.yaml, or give a number of jobs",
        )
    job = plan["job"]
    needed = links_needed(job, remaining, step_time_s)
    if needed is None:
        raise UsageError(
            f"no link of {job['time_s']} s would reach a checkpoint: saving every"
            f" {job['save_every']} iterations of {step_time_s:.1f} s",
            hint="save more often, or ask for more time",
        )
    return max(needed, 1)


def _expectations(
    plan: Mapping[str, Any],
    look: _Look,
    live: Mapping[str, int | None],
    new: Sequence[int],
    step_time_s: float | None,
) -> tuple[Expectation, ...]:
    """What each link that is live or new will do, if all goes well: the first from what lies there,
    the next on from it. Iterations are the run's own."""
    settings, choice = look.settings, look.choice
    waiting = {link: job_id for job_id, link in live.items() if link is not None}
    job = plan["job"]
    per_link = int(job["time_s"] / step_time_s) if step_time_s else None
    if per_link and job["save_every"] and not job["saves_on_signal"]:
        per_link = per_link // job["save_every"] * job["save_every"]
    out: list[Expectation] = []
    base = offset_of(plan)
    mode = look.decided.mode
    counts_on = (
        choice.kind == "made" or settings.counter == "greatest_folder" or settings.start_counts
    )
    at: int | None = (choice.number or 0) if counts_on else 0
    if mode == "scratch" and settings.source and settings.source.hand_over != "model":
        # Which checkpoint is handed over will be seen when the first link begins; without one it
        # does not start.
        mode, at = "finetune", None if settings.start_counts else 0
    for link in sorted({*waiting, *new}):
        last = None
        if settings.target is not None and at is not None and per_link:
            last = min(at + per_link, settings.target)
        out.append(
            Expectation(
                link,
                waiting.get(link),
                mode,
                _own(at, base) if mode != "done" else None,
                _own(last, base) if mode != "done" else None,
            )
        )
        if mode in ("done", "gave_up"):
            continue
        done = last is not None and settings.target is not None and last >= settings.target
        following = mode if settings.layout == "none" else "resume"
        mode = "done" if done else following
        at = last
    return tuple(out)


def _own(number: int | None, base: int) -> int | None:
    return None if number is None else max(number - base, 0)


def stop(run_dir: str, dry_run: bool = False) -> list[Job]:
    """End the chain after the next checkpoint: queued links end as they start, and a step that
    saves on its signal gets it.

    Returns the running jobs. Never cancels anything.
    """
    if not dry_run:
        try:
            write_atomic(os.path.join(run_dir, "STOP"), "")
        except OSError as error:
            hint = f"`hpctrain cancel {run_dir}` ends its jobs now"
            what = f"cannot write `{run_dir}/STOP`: {error.strerror}"
            raise EnvironmentFault(what, hint=hint) from error
    try:
        run = read_run(run_dir)
        running = [job for job in live_jobs(run) if job.state == "RUNNING"]
    except EnvironmentFault as error:
        first = replace(error.problems[0], why=f"`{run_dir}/STOP` is there for every link to see")
        raise EnvironmentFault(first) from error
    signal = run.section("job").get("signal") or {}
    if not dry_run and signal.get("forward"):
        for job in running:
            slurm.signal_batch(job.job_id, signal["name"])
    return running


@dataclass(frozen=True)
class Cancelled:
    """The jobs that were cancelled, what that loses in words, and why the run directory does not
    have it on record, where it does not."""

    jobs: tuple[Job, ...]
    lost: str
    unrecorded: str = ""


def cancel(run_dir: str, dry_run: bool = False, job_id: str | None = None) -> Cancelled:
    """Cancel every waiting and running job of the run now, the last link first, and `job_id` in any
    case. Raises EnvironmentFault when Slurm does not answer.

    Nothing but Slurm is needed for it: a folder that cannot be written loses the record alone.
    """
    with contextlib.ExitStack() as held:
        unrecorded = ""
        try:
            held.enter_context(only_one(run_dir))
        except OSError as error:
            unrecorded = f"`{error.filename}`: {error.strerror}"
        run = read_run(run_dir)
        order = {str(record.get("job_id")): record.get("link") or 0 for record in run.ledger}
        found = live_jobs(run)
        if job_id and job_id not in {job.job_id for job in found}:
            found += [job for job in in_queue([job_id]) if job.live]
        found.sort(key=lambda job: (order.get(job.job_id, 0), int(job.job_id)), reverse=True)
        if not dry_run and found:
            slurm.cancel([job.job_id for job in found])
            try:
                record_cancelled(run_dir, [job.job_id for job in found])
            except (EnvironmentFault, OSError) as error:
                unrecorded = str(error)
    lost = _lost(run_dir) if any(job.running for job in found) else ""
    return Cancelled(tuple(found), lost, unrecorded)


def _lost(run_dir: str) -> str:
    """What its end now costs a run, in words; empty where nothing of it runs."""
    status = observe([run_dir], ask_slurm=False)[0]
    progress, newest = status.progress, status.progress.checkpoint
    if progress.unsaved is None:
        return "what was trained since the newest checkpoint, if any; how much is not known"
    since = f"the newest complete checkpoint, `{newest}`" if newest else "the beginning"
    return f"{progress.unsaved} iterations since {since}"


def exclude_bad(run_dir: str, bad: Sequence[badnodes.BadNode]) -> list[str]:
    """Keep the waiting links off the bad nodes, beside those they avoid already; returns the jobs
    that were changed."""
    changed = []
    for job in live_jobs(read_run(run_dir)):
        if job.state == "PENDING":
            try:
                slurm.exclude_nodes(
                    job.job_id, badnodes.merged(slurm.excluded_nodes(job.job_id), bad)
                )
            except EnvironmentFault:
                if any(now.state == "PENDING" for now in of_user([job.job_id])):
                    raise
                continue  # it began, or ended, in between
            changed.append(job.job_id)
    return changed


def find_chains(target: str) -> list[str]:
    """The run directories whose chains `target` names: one run's, or all of a pipeline's in their
    order. Raises UsageError."""
    return find_runs(target) if find_pipeline(target) else [find_run(target)]


def find_run(target: str) -> str:
    """The one run directory that `target` names (see `records.find_runs`). Raises UsageError when
    it names several, or none."""
    found = find_runs(target)
    if len(found) > 1:
        names = ", ".join(os.path.relpath(path) for path in found[:5])
        raise UsageError(f"`{target}` holds {len(found)} runs: {names}", hint="name one of them")
    return found[0]
