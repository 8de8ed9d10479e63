"""What an earlier stage, or another run's checkpoint folder, hands to this run: asked for when its first link starts."""

import json
import os
from typing import List, Optional, Tuple

from .bootstrap import StartProblem, verified
from .files import read_records, read_text, write_atomic
from .layouts import LAYOUTS
from .settings import HANDED, GuardError, Settings, Source, read_settings
from .survey import Survey, start_number


class NotReady(Exception):
    """The earlier stage has nothing to hand over."""


def receive(run_dir: str, settings: Settings, time: str) -> Tuple[Settings, List[str]]:
    """The settings with what the earlier stage hands over as their start, and what to say about it.

    Decided once and kept in hand_over.json, so that a later link starts from the same. Raises NotReady when the earlier
    stage did not reach its target, or left nothing complete.
    """
    source = settings.source
    if source is None or settings.start is not None:
        return settings, []
    if source.hand_over == "folder":
        path = _named(source, settings)
        _note(run_dir, source, path, start_number(path), time)
        return settings._replace(start=path), ["the run starts from `{}`".format(path)]
    try:
        earlier = read_settings(source.run_dir)
    except GuardError as error:
        raise NotReady("stage `{}` has no readable plan: {}".format(source.stage, error)) from error
    name, number = _reached(source, earlier)
    if source.hand_over == "model":
        _check_model(source)
        return settings, ["stage `{}` hands over the model `{}`".format(source.stage, source.model)]
    if name is None or earlier.checkpoint_dir is None:
        raise NotReady("stage `{}` keeps no checkpoints to hand over".format(source.stage))
    path = os.path.join(earlier.checkpoint_dir, name)
    planned = start_number(source.checkpoint) if source.checkpoint else None
    if settings.counter == "greatest_folder" and planned != number:
        raise NotReady("stage `{}` hands over `{}`, and this run was planned to count on from {}; render it again".format(
            source.stage, name, planned))  # fmt: skip
    _note(run_dir, source, path, number, time)
    return settings._replace(start=path), ["stage `{}` hands over `{}`".format(source.stage, path)]


def _note(run_dir: str, source: Source, path: str, number: Optional[int], time: str) -> None:
    record = {"schema_version": 1, "stage": source.stage, "checkpoint": path, "iteration": number, "time": time}
    write_atomic(os.path.join(run_dir, HANDED), json.dumps(record, indent=1) + "\n")


def _named(source: Source, settings: Settings) -> str:
    """The checkpoint that a folder's tracker names, verified; the plan's own choice in it where there is one.

    Only what is complete is ever noted: after the other run has gone on, the next try finds its newer one. Raises NotReady.
    """
    layout, folder = LAYOUTS[settings.layout], source.run_dir
    path = source.checkpoint
    if path is None:
        text = read_text(os.path.join(folder, layout.tracker or ""))
        name = layout.named_by(text) if text is not None else None
        if name is None:
            what = "has no `{}`" if text is None else "has a `{}` that names no checkpoint ({})"
            raise NotReady("the start `{}` {}; name one of its checkpoints, or let the run that saves there save".format(
                folder, what.format(layout.tracker, ascii((text or "")[:40]))))  # fmt: skip
        path = os.path.join(folder, name)
    try:
        if not os.path.isdir(path):
            raise StartProblem("the start checkpoint `{}` is not there".format(path))
        verified(settings, path)
    except StartProblem as problem:
        raise NotReady(str(problem)) from problem
    return path


def _reached(source: Source, earlier: Settings) -> Tuple[Optional[str], Optional[int]]:
    """Name and number of the newest complete checkpoint of a stage that reached its target. Raises NotReady.

    A stage that does not say how far it goes is through when its last link ended with exit code 0.
    """
    survey = Survey(earlier)
    newest = survey.newest_complete() if earlier.layout != "none" else None
    last = [record for record in read_records(os.path.join(source.run_dir, "links.jsonl")) if "mode" in record][-1:]
    if earlier.target is not None and earlier.layout != "none":
        if newest is not None and newest.number >= earlier.target:
            lacking = (
                survey.layout.export_faults(survey.folder, newest.name, survey.listing) if earlier.exported else []
            )
            if source.hand_over == "model" and lacking:
                raise NotReady("stage `{}` has not exported its model: {}".format(source.stage, lacking[0]))
            return newest.name, newest.number
        what = "has no complete checkpoint" if newest is None else "is at {}".format(newest.number)
        what += " and its target is {}".format(earlier.target)
    elif any(record.get("event") == "end" and record.get("exit_code") == 0 for record in last) or any(
        record.get("mode") == "done" for record in last
    ):
        if newest is not None or earlier.layout == "none":
            return (newest.name, newest.number) if newest is not None else (None, None)
        what = "has no complete checkpoint"
    else:
        what = "has not ended with exit code 0"
    why = "; its last link: {}".format(last[0].get("reason")) if last else "; none of its links has begun"
    raise NotReady("stage `{}` {}{}".format(source.stage, what, why))


def _check_model(source: Source) -> None:
    """A Hugging Face directory whose weights are all there. Raises NotReady."""
    path = source.model or ""
    where = "the model `{}` of stage `{}`".format(path, source.stage)
    if read_text(os.path.join(path, "config.json")) is None:
        raise NotReady("{} has no config.json".format(where))
    names = set(os.listdir(path))
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if index in names:
            try:
                wanted = set(json.loads(read_text(os.path.join(path, index), 1 << 28) or "")["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise NotReady("{}: `{}` is cut short".format(where, index)) from error
            if wanted - names:
                raise NotReady("{} lacks {}".format(where, ", ".join(sorted(wanted - names)[:3])))
            return
    if not names & {"model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin"}:
        raise NotReady("{} has no weights".format(where))
