"""The guard: what a link of a chain does before its step starts, and after it ends.

The decision is made when the link starts, from what lies in the checkpoint folder at that moment.
"""

import os
import subprocess
import time
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional

from . import history
from .bootstrap import StartProblem, do_bootstrap, plan_bootstrap, write_tracker
from .files import append_record, free_name, make_folder, read_records, sync_folder
from .handover import NotReady, receive
from .lock import Lock, this_holder
from .settings import GuardError, Settings, read_settings
from .survey import Choice, Survey, choose

Say = Callable[[str], None]


class Decision(NamedTuple):
    """`decision` is run, done, stopped or gave_up; `mode` scratch, finetune or resume when it is run, else the same word."""

    decision: str
    mode: str
    checkpoint: Optional[str]
    iteration: int
    reason: str


def decide(settings: Settings, choice: Choice, links: List[history.Record], link: int, stop: bool,
           queued: bool = True) -> Decision:  # fmt: skip
    """The rules of a chain, in their order; pure. `queued`: the link was queued by `hpctrain chain`, not by hand."""
    made = choice.kind == "made"
    number = choice.number or 0
    if made and settings.target is not None and number >= settings.target:
        return Decision("done", "done", choice.name, number,
                        "`{}` is complete and the target is {}".format(choice.name, settings.target))  # fmt: skip
    if settings.layout == "none" and queued and link > 1 and _ended_well(links):
        return Decision("done", "done", None, 0, "an earlier link ended with exit code 0")
    if stop:
        return Decision(
            "stopped", "stopped", choice.name if made else None, number if made else 0, "the file STOP is there"
        )
    if settings.layout == "none" and not queued:
        # Nothing tells its progress, and whoever submits it by hand wants it to run.
        return Decision("run", "scratch", None, 0, "no checkpoints to look at")
    still = history.standstill(links, link, choice.name)
    if history.gives_up(still, settings.give_up_after):
        since = "`{}`".format(choice.name) if choice.name else "the beginning"
        what = "the chain gave up before" if still.gave_up and not still.links else (
            "{} links in a row ({} starts) made no complete checkpoint newer than {}".format(still.links, still.starts, since))  # fmt: skip
        return Decision("gave_up", "gave_up", choice.name, number, what + "; a link submitted from now on tries again")
    if made:
        return Decision(
            "run", "resume", choice.name, number, "`{}` is the newest complete checkpoint".format(choice.name)
        )
    resumed = any(record.get("mode") == "resume" for record in history.attempts(links))
    if choice.kind == "start":
        why = "no complete checkpoint newer than the start's"
        gone = "; those that earlier links resumed from are gone" if resumed else ""
        return Decision("run", "finetune", choice.name, number, why + gone)
    if resumed:
        why = "earlier links resumed from checkpoints, and none is left; to begin again from random weights, move links.jsonl away"
        return Decision("gave_up", "gave_up", None, 0, why)
    return Decision("run", "scratch", None, 0, "no checkpoint, and no start given")


def _ended_well(links: List[history.Record]) -> bool:
    return any(record.get("event") == "end" and record.get("exit_code") == 0 for record in links)


def begin(run_dir: str, given: Optional[int], environ: Mapping[str, str], say: Say) -> Dict[str, str]:
    """Decide, repair and record; returns what the job script exports.

    Raises GuardError, and OSError when the file system does not answer: then the job must not start.
    """
    settings = read_settings(run_dir)
    me = this_holder(settings.run, environ)
    make_folder(settings.checkpoint_dir or run_dir)
    lock = Lock(settings.checkpoint_dir or run_dir, me, say=say, environ=environ)
    lock.acquire()
    try:
        links = read_records(os.path.join(run_dir, "links.jsonl"))
        ledger = read_records(os.path.join(run_dir, "ledger.jsonl"))
        link = history.link_number(given, me.job_id, links, ledger)
        not_ready = ""
        try:
            settings, handed = receive(run_dir, settings, now())
            for note in handed:
                say(note)
        except NotReady as error:
            not_ready = str(error)
        survey = Survey(settings)
        choice = choose(survey)
        for note in choice.notes:
            say(note)
        if settings.exported and choice.kind == "made" and choice.name:
            lacking = survey.layout.export_faults(survey.folder, choice.name, survey.listing)
            if lacking and settings.target is not None and (choice.number or 0) >= settings.target:
                # The framework exports once it has loaded its last checkpoint and finds nothing left to train.
                say(
                    "`{}` is the last checkpoint, and the model is not exported yet: {}".format(choice.name, lacking[0])
                )
                settings = settings._replace(target=None)
        decided = decide(settings, choice, links, link, os.path.lexists(os.path.join(run_dir, "STOP")),
                         queued=any(record.get("link") == link for record in ledger))  # fmt: skip
        if not_ready and decided.decision == "run" and choice.kind != "made":
            after = "; `hpctrain pipeline` goes on from there" if settings.source and settings.source.stage else ""
            decided = Decision("gave_up", "gave_up", None, 0, not_ready + after)
        if decided.decision in ("run", "done"):
            try:
                decided = prepare(settings, survey, choice, decided, say)
            except StartProblem as problem:
                decided = Decision("gave_up", "gave_up", None, 0, str(problem))
        known = history.last_link(links, ledger)
        record = {
            "event": "begin", "link": link, "job_id": me.job_id, "restart": me.restart, "mode": decided.mode,
            "checkpoint": decided.checkpoint, "iteration": decided.iteration, "exit_code": None,
            "nodes": environ.get("SLURM_JOB_NODELIST", ""),
            "reason": "; ".join([decided.reason, *choice.notes, *_mended(choice)]), "time": now(),
        }  # fmt: skip
        if decided.decision == "gave_up":
            record["known_links"] = max(known, link)
        append_record(os.path.join(run_dir, "links.jsonl"), record)
        say("link {}: {} ({})".format(link, _SPOKEN[decided.mode], decided.reason))
        if decided.decision != "run":
            cancel_successors(run_dir, link, me.job_id, ledger, say)
    except BaseException:
        lock.release()
        raise
    if decided.decision != "run":
        lock.release()
    in_folder = settings.checkpoint_dir and decided.checkpoint
    path = os.path.join(settings.checkpoint_dir or "", decided.checkpoint or "") if in_folder else ""
    if decided.mode == "finetune" and not path:
        path = settings.start or ""
    return {
        "HPCTRAIN_DECISION": decided.decision,
        "HPCTRAIN_MODE": decided.mode if decided.decision == "run" else "",
        "HPCTRAIN_CHECKPOINT": path,
        "HPCTRAIN_ITERATION": str(decided.iteration),
        "HPCTRAIN_LINK": str(link),
    }


def _mended(choice: Choice) -> List[str]:
    """The checkpoints that were found wanting; what only stood in the framework's way is said in the log alone."""
    wanting = ("is not complete", "is newer")
    return ["`{}` {}".format(aside.name, aside.why) for aside in choice.asides if aside.why.startswith(wanting)]


_SPOKEN = {
    "scratch": "starts from scratch",
    "finetune": "starts from the start checkpoint, without its optimizer",
    "resume": "resumes",
    "done": "nothing to do, the run is done",
    "stopped": "stops, as asked",
    "gave_up": "gives up",
}


def prepare(settings: Settings, survey: Survey, choice: Choice, decided: Decision, say: Say) -> Decision:
    """Make the folder such that the framework starts from exactly the chosen checkpoint; safe to repeat after a crash.

    In this order: move aside what is in the way, then name the chosen checkpoint. Raises StartProblem.
    """
    if decided.mode == "finetune" and settings.start:
        plan = plan_bootstrap(settings, survey)
        _move_aside(survey, choice, say)
        do_bootstrap(plan)
        for note in plan.notes:
            say(note)
        if plan.target is not None or plan.renamed_from:
            say("`{}` now links to the start checkpoint `{}`".format(survey.path(plan.link or ""), plan.start))
        return decided._replace(checkpoint=plan.link, iteration=plan.number or 0)
    if decided.mode == "finetune" and choice.name:
        faults = survey.verdict(choice.name).faults + survey.verdict(choice.name).mismatches
        if faults:
            raise StartProblem("the start checkpoint `{}` is not complete: {}".format(choice.name, faults[0]))
    _move_aside(survey, choice, say)
    if choice.name:
        for mismatch in survey.verdict(choice.name).mismatches:
            if survey.layout.same_ranks:
                raise StartProblem("`{}` {}: no other number can load it".format(choice.name, mismatch))
            say("warning: `{}` {}".format(choice.name, mismatch))
        if survey.layout.tracker and not (survey.layout.tracker_optional and survey.tracker_text is None):
            if write_tracker(survey.folder, survey.layout.tracker, survey.layout.tracker_text(choice.name)):
                say("`{}` now names `{}`".format(survey.layout.tracker, choice.name))
    elif survey.tracker_text is not None and survey.tracker_path:
        # It names nothing; the framework would fail on it, or take random weights for a checkpoint.
        aside = free_name(survey.folder, "aside-" + os.path.basename(survey.tracker_path))
        os.rename(survey.tracker_path, survey.path(aside))
        say("`{}` named no complete checkpoint and is now `{}`".format(survey.layout.tracker, aside))
    return decided


def _move_aside(survey: Survey, choice: Choice, say: Say) -> None:
    for aside in choice.asides:
        to = free_name(survey.folder, aside.to)
        try:
            os.rename(survey.path(aside.name), survey.path(to))
        except FileNotFoundError:
            continue
        say("`{}` {}; it is now `{}`".format(aside.name, aside.why, to))
    if choice.asides:
        sync_folder(survey.folder)


def end(run_dir: str, exit_code: int, environ: Mapping[str, str], say: Say) -> None:
    """Record how the step ended and release the lock; does nothing for a link whose step never began."""
    settings = read_settings(run_dir)
    me = this_holder(settings.run, environ)
    path = os.path.join(run_dir, "links.jsonl")
    began = history.open_attempt(read_records(path), me.job_id, me.restart)
    if began is None:
        return
    folder = settings.checkpoint_dir or run_dir
    try:
        newest = Survey(settings).newest_complete()
        append_record(path, {
            "event": "end", "link": began["link"], "job_id": me.job_id, "restart": me.restart, "mode": began["mode"],
            "checkpoint": newest.name if newest else None, "iteration": newest.number if newest else None,
            "exit_code": exit_code, "nodes": environ.get("SLURM_JOB_NODELIST", ""),
            "reason": "exit code {}".format(exit_code), "time": now(),
        })  # fmt: skip
        say("link {} ended with exit code {}; newest complete checkpoint: {}".format(
            began["link"], exit_code, newest.name if newest else "none"))  # fmt: skip
    finally:
        if os.path.isdir(folder):
            Lock(folder, me, say=say, environ=environ).release()


def cancel_successors(run_dir: str, link: int, job_id: str, ledger: List[history.Record], say: Say) -> None:
    """Cancel the queued jobs of later links, the last first. What Slurm does not take is said; those links will see for
    themselves that there is nothing to do."""
    queued = history.successors(link, job_id, ledger)
    if not queued:
        return
    ids = [str(record["job_id"]) for record in queued]
    for attempt in range(3):
        try:
            done = subprocess.run(["scancel", *ids], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, timeout=60)  # fmt: skip
            said = done.stderr.decode("utf-8", "replace").strip()
            # Jobs that have ended already are none of ours to cancel.
            wrong = [
                line for line in said.splitlines() if "Invalid job id" not in line and "already complet" not in line
            ]
            if done.returncode == 0 or not wrong:
                break
        except (OSError, subprocess.TimeoutExpired) as error:
            said = str(error)
        time.sleep(2 * attempt)
    else:
        say("warning: the links queued behind this one could not be cancelled: {}".format(said))
        return
    for record in queued:
        append_record(os.path.join(run_dir, "ledger.jsonl"), {
            "event": "cancelled", "link": record["link"], "job_id": str(record["job_id"]),
            "depends_on": record.get("depends_on"), "time": now(),
        })  # fmt: skip
    say("cancelled the links queued behind this one: {}".format(" ".join(ids)))


def made(run_dir: str, link: int) -> Optional[str]:
    """The path of the newest checkpoint that link `link` made, None when it made none."""
    settings = read_settings(run_dir)
    newest = Survey(settings).newest_complete()
    name = history.made_by(read_records(os.path.join(run_dir, "links.jsonl")), link, newest.name if newest else None)
    return os.path.join(settings.checkpoint_dir or "", name) if name else None


def watch(run_dir: str, every_s: float = 20.0) -> bool:
    """Return True once STOP is there and a complete checkpoint was made after it was seen; then the step may be ended.

    False at once for a program whose checkpoints are not known: it goes on to its own end.
    """
    settings = read_settings(run_dir)
    if settings.layout == "none":
        return False
    while not os.path.lexists(os.path.join(run_dir, "STOP")):
        time.sleep(every_s)
    before = Survey(settings).newest_complete()
    while True:
        time.sleep(every_s)
        newest = Survey(settings).newest_complete()
        if newest is not None and newest != before:
            return True


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


__all__ = ["Decision", "GuardError", "begin", "decide", "end", "made", "prepare", "watch"]
