"""`hpctrain export` for a GPT-NeoX run: NeoX's own converter as a job, from the run directory's
export.sbatch.

Here, on the login node: which checkpoint, whether it fits memory and disk, and a tokenizer, which
the converter leaves out.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.base.errors import EnvironmentFault, Refused, UsageError
from hpctrain.base.files import read_json
from hpctrain.base.shell import quote_all
from hpctrain.base.units import format_mem_gib, format_size
from hpctrain.jobs import checkpoints as checkpoint
from hpctrain.recipes.neox.export import CONFIG, memory_gib
from hpctrain.runtime.survey import choose
from hpctrain.slurm import commands as slurm
from hpctrain.slurm.jobs import of_user

RECIPE = "neox-sft"
SCRIPT = "export.sbatch"
_WEIGHTS = re.compile(
    r"(?:layer_\d+-model_\d+-|(?:zero_pp_rank_\d+_)?mp_rank_\d+_)model_states\.pt\Z"
)
_POLL_S = 2.0
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class NeoxExport:
    """A conversion that can be submitted: sizes in bytes; `tokenizer` is a SentencePiece model, or
    None; `notes` for people."""

    run_dir: str
    checkpoint: str
    out: str
    precision: str
    weights_bytes: int
    disk_bytes: int
    mem_gib: float
    tokenizer: str | None
    options: tuple[str, ...]
    notes: tuple[str, ...]

    def argv(self, tokenizer_dir: str) -> list[str]:
        """The sbatch and its arguments."""
        script = os.path.join(self.run_dir, SCRIPT)
        return [
            "sbatch",
            *self.options,
            script,
            self.out,
            self.checkpoint,
            tokenizer_dir,
            self.precision,
        ]

    def command_line(self) -> str:
        """The same as one line for a terminal."""
        return str(
            quote_all(
                self.argv(
                    "" if self.tokenizer is None else os.path.join(self.run_dir, "exports", "…")
                )
            )
        )


def is_neox_run(path: str) -> bool:
    """Whether `path` is a run directory of GPT-NeoX."""
    return (read_json(os.path.join(path, "plan.json")) or {}).get("recipe") == RECIPE


def plan_export(
    run_dir: str,
    out: str,
    name: str | None = None,
    precision: str = "auto",
    tokenizer: str | None = None,
    options: Sequence[str] = (),
) -> NeoxExport:
    """Decide a conversion; writes nothing. `name`: a checkpoint of the run instead of the newest
    complete one.

    Raises UsageError where the model has no Hugging Face class or the checkpoint is not complete,
    Refused when `out` exists, EnvironmentFault when the disk has no room for the model.
    """
    run_dir, out = os.path.abspath(run_dir), os.path.abspath(out)
    script = os.path.join(run_dir, SCRIPT)
    if not os.path.isfile(script):
        raise UsageError(
            f"`{run_dir}` has no {SCRIPT}",
            why=_refusal(run_dir),
            hint="`hpctrain render --force` writes one where the model allows it",
        )
    if os.path.lexists(out):
        raise Refused(f"`{out}` exists", hint="name a directory that does not")
    found, notes = _find_checkpoint(run_dir, name)
    config = _read_config(run_dir)
    trained = {"bfloat16": "bf16", "fp16": "fp16"}.get(str(config.get("precision") or ""), "fp32")
    wanted = trained if precision == "auto" else precision
    weights = _weights_bytes(found)
    # The converter writes fp32; a cast then goes file by file, so that a second copy of one file is
    # all that it adds.
    disk = weights // _BYTES[trained] * 4 * 11 // 10
    _check_disk(out, disk)
    memory = memory_gib(weights, trained)
    model, tokenizer_notes = _find_tokenizer(config, tokenizer)
    given = (
        [f"--mem={format_mem_gib(memory)}"]
        if not any(option.startswith("--mem") for option in options)
        else []
    )
    return NeoxExport(
        run_dir,
        found,
        out,
        wanted,
        weights,
        disk,
        memory,
        model,
        (*given, *options),
        (*notes, *tokenizer_notes),
    )


def make_tokenizer(
    plan: NeoxExport, write: Callable[[str, Mapping[str, Any], str, str], None]
) -> str:
    """A new folder of the run directory for the tokenizer, filled by `write(model, config,
    checkpoint, folder)`; "" without one."""
    if plan.tokenizer is None:
        return ""
    parent = os.path.join(plan.run_dir, "exports")
    os.makedirs(parent, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=f"tokenizer-{os.path.basename(plan.checkpoint)}-", dir=parent)
    os.chmod(folder, 0o755)
    write(plan.tokenizer, _read_config(plan.run_dir), plan.checkpoint, folder)
    return folder


def submit(plan: NeoxExport, folder: str, wait: bool = False) -> tuple[str, str]:
    """Submit the job with the tokenizer in `folder` (may be ""): (its id, the path of its log).

    With `wait`, until it has ended. Raises EnvironmentFault when Slurm refuses it, or when it fails
    while waited for.
    """
    argv = plan.argv(folder)
    job = slurm.submit(argv[-5], argv[-4:], argv[1:-5])
    log = os.path.join(plan.run_dir, f"export-{job}.out")
    while wait and any(found.live for found in of_user([job])):
        time.sleep(_POLL_S)
    if wait and not os.path.isdir(plan.out):
        raise EnvironmentFault(
            f"job {job} made no `{plan.out}`", where=log, hint=f"its log says why: tail {log}"
        )
    return job, log


def _refusal(run_dir: str) -> str:
    for decision in checkpoint.read_plan(run_dir).get("decisions", ()):
        if decision.get("name") == "export.architecture" and decision.get("value") is None:
            return str(decision.get("reason"))
    return "it was rendered by an older hpctrain"


def _find_checkpoint(run_dir: str, name: str | None) -> tuple[str, list[str]]:
    """The checkpoint a link would resume from, or the one of that name or number."""
    settings = checkpoint.settings_of(run_dir)
    survey = checkpoint.survey_of(settings)
    if name is None:
        choice = choose(survey)
        if choice.kind != "made" or choice.name is None:
            raise UsageError(
                "the run has no complete checkpoint yet",
                where=survey.folder,
                hint=(
                    "see `hpctrain checkpoint list`; --checkpoint names another one, such as the"
                    " start's"
                ),
            )
        return survey.path(choice.name), list(choice.notes)
    for candidate in survey.candidates:
        if name in (candidate.name, str(candidate.number)):
            faults = survey.verdict(candidate.name).faults
            if faults:
                raise UsageError(
                    f"`{candidate.name}` is not complete: {faults[0]}", where=survey.folder
                )
            return survey.path(candidate.name), []
    raise UsageError(
        f"there is no checkpoint `{name}` in `{survey.folder}`",
        hint="`hpctrain checkpoint list` shows what there is",
    )


def _read_config(run_dir: str) -> dict[str, Any]:
    from hpctrain.config.document import load_yaml

    data = load_yaml(os.path.join(run_dir, CONFIG)).data
    return dict(data) if isinstance(data, dict) else {}


def _weights_bytes(path: str) -> int:
    """Bytes of the files that the converter reads: the layers where there are any, else the model
    states."""
    names = [name for name in os.listdir(path) if _WEIGHTS.match(name)]
    layers = [name for name in names if name.startswith("layer_")]
    return sum(os.path.getsize(os.path.join(path, name)) for name in layers or names)


def _check_disk(out: str, needed: int) -> None:
    folder = os.path.dirname(out)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    facts = os.statvfs(folder)
    free = facts.f_bavail * facts.f_frsize
    if free < needed:
        raise EnvironmentFault(
            f"`{folder}` has {format_size(free)} left and the model takes {format_size(needed)}",
            why="NeoX's converter writes fp32, whatever precision is asked for",
            hint="name another place with -o",
        )


def _find_tokenizer(config: dict[str, Any], given: str | None) -> tuple[str | None, list[str]]:
    """The SentencePiece model to put beside the weights, and what there is to say about it."""
    if given is not None:
        if not os.path.isfile(given):
            raise EnvironmentFault("there is no such tokenizer model", where=given)
        return os.path.abspath(given), []
    kind, path = config.get("tokenizer_type"), config.get("vocab_file")
    if kind != "SPMTokenizer":
        return None, [
            (
                f"the converter itself writes the tokenizer of {kind}"
                if kind == "HFTokenizer"
                else f"no tokenizer is written for {kind}: copy yours beside the weights"
            )
        ]
    if not isinstance(path, str) or not os.path.isfile(path):
        return None, [
            f"`vocab_file: {path}` cannot be read here, so no tokenizer is written: name it with"
            " --tokenizer"
        ]
    return path, []
