"""From a command line to a Plan: every check that can be made before hours are spent, and reuse of
what an earlier run did."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from hpctrain.base import files
from hpctrain.base.errors import EnvironmentFault, Problem, Refused, UsageError
from hpctrain.config.trust import require_trust
from hpctrain.data import sources
from hpctrain.data.control import DEFAULT_EOD, Control, resolve
from hpctrain.data.dataset.header import paths
from hpctrain.data.encoders.reference import processor
from hpctrain.data.markers import ALLOWABLE
from hpctrain.data.merge import in_the_way, up_to_date
from hpctrain.data.plan import Options, Plan, Shard, cut, differences, from_json, to_json
from hpctrain.data.sources import Segment
from hpctrain.data.spm import SpmModel, load_model
from hpctrain.data.worker import check_segment, finished

SHARD_BYTES = 4 << 30  # larger shards are cut, so that a killed task loses minutes
SCAN_BYTES = 64 << 20
_WINDOW = 1 << 20


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    inputs: tuple[str, ...]
    tokenizer: str
    output_prefix: str
    tasks: int = 1
    control_tokens: tuple[str, ...] = ()
    append_eod: bool = True
    eod_piece: str = DEFAULT_EOD
    allow_user_defined: bool = False
    options: Options = Options()
    force: bool = False


@dataclass(frozen=True)
class Prepared:
    """A plan, what is done of it already, and what the user should know. `finished` is the
    dataset's manifest if it is there."""

    plan: Plan
    done: int
    notes: tuple[Problem, ...]
    finished: dict[str, object] | None


def prepare(request: Request) -> Prepared:
    """Check everything and plan, writing nothing. Raises UsageError, EnvironmentFault, or Refused
    when a dataset is in the way."""
    found, model, control = _checked(request)
    prefix = os.path.abspath(request.output_prefix)
    inputs = tuple(sources.describe(path) for path in found)
    total = sum(source.weight for source in inputs)
    plan = Plan(
        prefix=prefix,
        work_dir=prefix + ".tokenize",
        model_path=os.path.abspath(request.tokenizer),
        model_sha256=model.sha256,
        vocab_size=model.vocab_size,
        control=control,
        options=replace(request.options, allow=tuple(sorted(set(request.options.allow)))),
        inputs=inputs,
        shards=cut(inputs, max(request.tasks, -(-total // SHARD_BYTES))),
    )
    notes = list(_model_notes(model))
    plan, more = _reuse(plan)
    notes += more
    whole = up_to_date(plan)
    if whole is None and not request.force:
        _refuse_another(plan)
    made = [shard for shard in plan.shards if whole is not None or finished(plan, shard)]
    return Prepared(plan, len(made), tuple(notes), whole)


def _refuse_another(plan: Plan) -> None:
    """Raises Refused where another dataset lies in the place of this one."""
    reason = in_the_way(plan)
    if not reason:
        return
    manifest = files.read_json(plan.dataset + ".json") or {}
    differs = "; ".join(differences(manifest, to_json(plan))) if manifest.get("inputs") else ""
    made_from = f"it was made from something else: {differs}"
    raise Refused(
        reason,
        where=plan.dataset,
        why=made_from if differs else "it was not made by this command",
        hint="give another --output-prefix, or --force to replace it",
    )


def _checked(request: Request) -> tuple[list[str], SpmModel, Control]:
    """The input files, the model and its control tokens. Raises UsageError with every problem."""
    problems: list[Problem] = []
    found: list[str] = []
    model = control = None
    try:
        found = sources.expand(request.inputs)
    except UsageError as error:
        problems += error.problems
    try:
        model = load_model(request.tokenizer)
        control = resolve(
            model,
            request.control_tokens,
            append_eod=request.append_eod,
            eod_piece=request.eod_piece,
            allow_user_defined=request.allow_user_defined,
        )
    except (UsageError, EnvironmentFault) as error:
        problems += error.problems
    problems += _option_problems(request)
    if problems or model is None or control is None:
        raise UsageError(problems)
    return found, model, control


def scan(plan: Plan, limit_bytes: int = SCAN_BYTES) -> None:
    """Read about `limit_bytes` of the inputs, heads and windows spread evenly, as a task would; 0
    means all of it.

    Raises UsageError with the bad records found, so that most mistakes in the data show before
    anything is queued.
    """
    problems: list[Problem] = []
    share = max(_WINDOW, limit_bytes // len(plan.inputs))
    for number, source in enumerate(plan.inputs):
        if limit_bytes == 0 or source.kind != "lines" or source.size <= share:
            problems += check_segment(
                plan, Segment(number, 0, source.units), share if limit_bytes else None
            )
        else:
            count = max(1, share // _WINDOW)
            for index in range(count):
                begin = source.size * index // count
                problems += check_segment(
                    plan, Segment(number, begin, min(begin + _WINDOW, source.size)), None
                )
        if len(problems) >= 20:
            break
    if problems and plan.options.on_error == "fail":
        raise UsageError(problems[:20])


def write_plan(plan: Plan) -> str:
    """Put the plan into its folder, where tasks read it; the path of its file."""
    files.make_folder(os.path.dirname(plan.prefix))
    files.make_folder(plan.work_dir)
    require_trust(plan.work_dir, "this folder of an earlier tokenization", above=False)
    path = os.path.join(plan.work_dir, f"{plan.key}.plan.json")
    files.write_json(path, to_json(plan))
    files.write_json(os.path.join(plan.work_dir, "plan.json"), to_json(plan))
    return path


def _reuse(plan: Plan) -> tuple[Plan, list[Problem]]:
    """Keep the cuts of an unfinished run of the same content, so that its shards count; name what
    changed otherwise."""
    old = files.read_json(os.path.join(plan.work_dir, "plan.json"))
    if old is None:
        return plan, []
    if old.get("content_key") != plan.content_key:
        changed = differences(old, to_json(plan))
        text = "this is not what the last run here did: " + "; ".join(
            changed or ["another version of hpctrain made it"]
        )
        return plan, [
            Problem(text, where=plan.work_dir, hint="all of it is done again", level="note")
        ]
    try:
        shards: tuple[Shard, ...] = from_json(old).shards
    except (KeyError, TypeError):
        return plan, []
    again = replace(plan, shards=shards)
    notes = [
        Problem(text, where=plan.work_dir, level="note")
        for text in differences(old, to_json(again))
    ]
    if len(shards) != len(plan.shards):
        text = f"going on with the {len(shards)} shards of the last run"
        notes.append(Problem(text, where=plan.work_dir, level="note"))
    return again, notes


def _option_problems(request: Request) -> list[Problem]:
    problems = []
    for kind in request.options.allow:
        if kind not in ALLOWABLE:
            problems.append(
                Problem(
                    f"`{kind}` cannot be allowed",
                    where="--allow",
                    hint="known: " + ", ".join(ALLOWABLE),
                )
            )
    if request.tasks < 1:
        problems.append(Problem(f"`{request.tasks}` tasks", where="--tasks", hint="at least 1"))
    if request.options.max_errors and request.options.on_error != "skip":
        problems.append(Problem("--max-errors needs --on-error skip", where="--max-errors"))
    if request.options.max_line_mib < 1:
        problems.append(
            Problem(
                f"`{request.options.max_line_mib}` MiB", where="--max-line-mib", hint="at least 1"
            )
        )
    name = os.path.basename(request.output_prefix)
    if not name or name in (".", ".."):
        problems.append(
            Problem(f"`{request.output_prefix}` names no file", where="--output-prefix")
        )
    elif name.endswith((".bin", ".idx")):
        problems.append(
            Problem(
                f"`{request.output_prefix}` ends in {name[-4:]}",
                where="--output-prefix",
                hint="give the prefix only",
            )
        )
    if any(ord(char) < 32 for char in request.output_prefix):
        problems.append(Problem("a control character in the path", where="--output-prefix"))
    bin_path = paths(os.path.abspath(request.output_prefix) + "_text_document")[0]
    if os.path.isdir(bin_path):
        problems.append(Problem("is a folder", where=bin_path))
    return problems


def _model_notes(model: SpmModel) -> list[Problem]:
    notes = []
    if "\n" not in processor(model).normalize("a\nb") and model.has_charsmap:
        notes.append(
            Problem(
                "this model turns newlines and runs of spaces into one space",
                where=model.path,
                why=f"its normalizer is `{model.normalizer}`: code and lists lose their layout",
                level="note",
            )
        )
    if not model.byte_fallback:
        notes.append(
            Problem(
                "this model has no byte fallback",
                where=model.path,
                why="characters it does not know become <unk>; the summary counts them",
                level="note",
            )
        )
    return notes
