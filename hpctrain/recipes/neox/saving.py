"""Loading, saving, counting and leaving: the part of NeoX where a wrong number destroys
checkpoints."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from hpctrain.config.run import RunSpec
from hpctrain.recipes.neox.draft import RUN, Draft, slashed
from hpctrain.recipes.rules import Rule

# A start checkpoint's folder: global_step423858, _global_step423858, _global_step_423858_backup.
_STEP = re.compile(r"_*global_step_?(\d{1,18})(?:_.*)?\Z", re.ASCII)


@dataclass(frozen=True)
class Start:
    """The checkpoint that the run starts from: its path and the iteration in its folder's name."""

    path: str
    iteration: int

    @property
    def link(self) -> str:
        """The name under which NeoX knows it; the runtime links it under another one where this
        does harm."""
        return f"global_step{self.iteration}"


@dataclass(frozen=True)
class Saves:
    """When NeoX saves (training.py:1408-1430): at multiples (or powers) of `factor`, at `extra`,
    and at the end."""

    factor: float | None
    log: bool
    extra: tuple[int, ...]
    train_iters: int | None

    def at(self, iteration: int) -> bool:
        """Whether a checkpoint is written in the training loop after this iteration (the final save
        not counted)."""
        if iteration in self.extra:
            return True
        if not self.factor:
            return False
        if not self.log:
            return iteration % self.factor == 0
        power = 1.0
        while power < iteration + 1 and self.factor > 1:
            if int(power) == iteration:
                return True
            power *= self.factor
        return False

    def count(self) -> int | None:
        """Checkpoints of the whole run, the final one included; None when its length is unknown."""
        if not self.train_iters:
            return None
        total = {self.train_iters, *(i for i in self.extra if 0 <= i <= self.train_iters)}
        if self.factor and self.log and self.factor > 1:
            power = 1.0
            while power <= self.train_iters:
                total.add(int(power))
                power *= self.factor
            return len(total)
        if self.factor:
            regular = int(self.train_iters // self.factor)
            return regular + sum(1 for i in total if i == 0 or i % self.factor)
        return len(total)


def find_start(draft: Draft, spec: RunSpec) -> Start | None:
    """The start checkpoint and the iteration that its folder's name carries; an error when it
    carries none."""
    if spec.handed and spec.has_start and not spec.checkpoint_start and draft.flavor == "tilde":
        draft.error(
            f"at which iteration stage `{spec.handed.stage}` ends is not known",
            where=spec.where("checkpoint"),
            why=(
                "the fork counts on from that number, so it must be in the config before the job"
                " starts"
            ),
            hint="give that stage a number of iterations",
        )
    if not spec.checkpoint_start:
        return None
    where = spec.where("checkpoint", "start")
    name = os.path.basename(spec.checkpoint_start)
    match = _STEP.match(name)
    if not match:
        draft.error(
            f"`{name}` carries no iteration, and NeoX checkpoints are folders called"
            " global_step<N>",
            where=where,
            why="the number becomes the link's name"
            + (" and `iteration_offset`" if draft.flavor == "tilde" else ""),
            hint=(
                "name the folder of one checkpoint (…/global_step423858), or make a link with such"
                " a name to it"
            ),
        )
        return None
    return Start(spec.checkpoint_start, int(match.group(1)))


def decide_folder(draft: Draft, spec: RunSpec) -> None:
    """`save` and `load` are the run's checkpoint folder; nothing else may choose what is loaded."""
    folder = spec.checkpoint_dir
    if not folder and spec.has_start:
        pass  # the plan says that `start` needs `dir`
    elif not folder:
        found = next(
            (draft.values[key] for key in ("save", "load") if draft.given(key)),
            "/scratch/…/checkpoints/my_run",
        )
        draft.error(
            "NeoX needs a folder for its checkpoints",
            where=spec.where("checkpoint"),
            hint=f"checkpoint: {{dir: {found}}}",
        )
    else:
        where = spec.where("checkpoint", "dir")
        for key in ("save", "load"):
            value = draft.values.get(key)
            same = isinstance(value, str) and slashed(value) == folder
            draft.own(
                key,
                folder,
                f"`checkpoint.dir` at {where}; links save where the next one loads",
                hint="set `checkpoint: {dir: …}` only",
                same=same,
            )
        draft.check(
            (
                Rule(
                    re.match(r"_*global_step_?\d+", os.path.basename(folder)),
                    f"`checkpoint.dir: {folder}` is named like one checkpoint",
                    where=where,
                    why="it is the folder that holds the checkpoints",
                    hint=os.path.dirname(folder),
                ),
                Rule(
                    "global_step" in folder and draft.given("keep_last_n_checkpoints"),
                    "`checkpoint.dir` has `global_step` in its path, and NeoX would delete"
                    " everything"
                    " in it",
                    where=where,
                    why="its retention takes every folder whose whole path matches for a checkpoint"
                    " (checkpointing.py:160-181)",
                    hint="choose another folder, or delete `keep_last_n_checkpoints`",
                ),
            )
        )
    if draft.given("iteration") or "iteration" in draft.broken:
        draft.error(
            f"`iteration: {draft.values.get('iteration')}` makes every link load that checkpoint"
            " again",
            "iteration",
            why=(
                "it overrides `latest` (checkpointing.py:386-389), so that the chain never gets"
                " further"
            ),
            hint="`hpctrain checkpoint use` goes back to a checkpoint",
        )
        draft.values.pop("iteration", None)
    for key in ("no_load_optim", "no_save_optim"):
        draft.check(
            Rule(
                draft.get(key),
                f"`{key}: true` throws the optimizer's state away at every link",
                key,
                hint="delete it: the first link of a finetune leaves it out by itself",
            )
        )
    draft.check(
        Rule(
            draft.given("s3_path"),
            "`s3_path` saves where the links cannot see checkpoints",
            "s3_path",
            hint="delete it, and copy them after the run",
        ),
        Rule(
            draft.get("adlr_autoresume"),
            "`adlr_autoresume` has no effect: NeoX never starts it",
            "adlr_autoresume",
            hint="delete it; `chain:` resumes",
            level="warning",
        ),
    )


def decide_finetune(draft: Draft, spec: RunSpec) -> None:
    """`finetune` is set for each mode by hpctrain; in run.yaml it is a misunderstanding."""
    if "finetune" not in draft.values:
        return
    value = draft.values["finetune"]
    if draft.layer("finetune") == RUN and value is not None:
        shown = str(value).lower()
        rule = (
            "hpctrain writes `finetune: true` for the first link of a run with `checkpoint.start`,"
            " false for all others"
        )
        draft.check(
            (
                Rule(
                    value and not spec.has_start,
                    "`finetune: true` without a `checkpoint.start` to start from",
                    "finetune",
                    why=rule,
                    hint="set `checkpoint: {start: …}`",
                ),
                Rule(
                    value and spec.num_links > 1,
                    f"`finetune: true` with a chain of {spec.num_links} jobs",
                    "finetune",
                    why="kept in every link it would throw the optimizer's state away each time;"
                    f" {rule}",
                    hint="delete it",
                ),
                Rule(
                    not value and spec.has_start,
                    "`finetune: false` with a `checkpoint.start`",
                    "finetune",
                    why=f"{rule}; a resume with fewer `train_iters` than the start's iteration"
                    " would"
                    " write into the start itself",
                    hint="delete it; to go on with a run and its optimizer, set `checkpoint.dir`"
                    " to its"
                    " folder and leave `start` out",
                ),
                Rule(
                    True,
                    f"`finetune: {shown}` has no effect",
                    "finetune",
                    why=rule,
                    hint="delete it",
                    level="warning",
                ),
            )
        )
    draft.drop(
        "finetune",
        "written for each mode: true for the first link from a start checkpoint, else false",
    )


def decide_offset(draft: Draft, start: Start | None, spec: RunSpec) -> int:
    """The fork's iteration_offset: what is added to the counter in the names of new checkpoints. 0
    when unused.

    Saved as offset + iteration, and a resume takes the greatest folder name minus the offset (FORK
    checkpointing.py:357-360, 433-444), so it must stay the same for the whole run.
    """
    if draft.flavor != "tilde" or "iteration_offset" in draft.broken:
        return 0
    given = draft.number("iteration_offset")
    if start:
        origin = spec.where("checkpoint", "start")
        draft.check(
            Rule(
                draft.layer("iteration_offset") == RUN
                and draft.given("iteration_offset")
                and given != start.iteration,
                f"`iteration_offset: {given}` contradicts the start checkpoint's iteration"
                f" {start.iteration}",
                "iteration_offset",
                why=f"`checkpoint.start` at {origin} is `{os.path.basename(start.path)}`; the fork"
                " resumes from the greatest folder name minus this number",
                hint="delete it",
            )
        )
        draft.put(
            "iteration_offset",
            start.iteration,
            f"the start checkpoint is `{os.path.basename(start.path)}`; new ones are named"
            " after it",
            origin,
        )
        return start.iteration
    draft.check(
        Rule(
            given is not None and given < 0,
            f"`iteration_offset: {given}` is negative",
            "iteration_offset",
        )
    )
    return max(given or 0, 0)


def decide_length(draft: Draft) -> int | None:
    """train_iters xor train_epochs. Returns the iterations, None where unknown."""
    iters, epochs = draft.number("train_iters"), draft.number("train_epochs")
    for key, number in (("train_iters", iters), ("train_epochs", epochs)):
        draft.check(
            Rule(number is not None and number < 1, f"`{key}: {number}` must be at least 1", key)
        )
    draft.check(
        Rule(
            draft.missing("train_iters") and draft.missing("train_epochs"),
            "`train_iters` is missing",
            "train_iters",
            why="NeoX needs it or `train_epochs`",
            hint="`hpctrain data count` says how many rows there are: train_iters = rows /"
            " train_batch_size",
        )
    )
    if iters and epochs:
        if draft.layer("train_iters") == RUN and draft.layer("train_epochs") != RUN:
            draft.drop(
                "train_epochs", f"the run sets `train_iters` at {draft.where('train_iters')}"
            )
        else:
            draft.error(
                "`train_iters` and `train_epochs` exclude each other",
                "train_epochs",
                hint="delete one of them",
            )
    return iters if iters and iters > 0 else None


def decide_saves(draft: Draft, train_iters: int | None, spec: RunSpec) -> Saves:
    """checkpoint_factor, checkpoint_scale and extra_save_iters."""
    extra = tuple(i for i in draft.values.get("extra_save_iters") or () if isinstance(i, int))
    factor = draft.values.get("checkpoint_factor")
    log = draft.get("checkpoint_scale") == "log"
    if draft.missing("checkpoint_factor") and not extra:
        draft.error(
            "`checkpoint_factor` is missing",
            "checkpoint_factor",
            why="NeoX saves nothing without it, and stops at once (arguments.py:1278-1290)",
            hint="config: {checkpoint_factor: 100}, iterations between two checkpoints",
        )
    elif factor is not None and (
        factor <= 1 if log else factor < 1 or not float(factor).is_integer()
    ):
        draft.error(
            f"`checkpoint_factor: {factor}` must be"
            f" {'more than 1' if log else 'a whole number of at least 1'}",
            "checkpoint_factor",
            why=f"with `checkpoint_scale: {'log' if log else 'linear'}`",
        )
        factor = None
    saves = Saves(factor, log, extra, train_iters)
    if (
        train_iters
        and factor
        and not log
        and factor >= train_iters
        and not any(i < train_iters for i in extra)
        and spec.num_links > 1
    ):
        draft.warn(
            f"`checkpoint_factor: {factor:g}` never comes before the end at {train_iters}"
            " iterations",
            "checkpoint_factor",
            why=(
                f"so the {spec.num_links} links of the chain have nothing to hand on: each would"
                " start again"
            ),
            hint=f"checkpoint_factor: {max(train_iters // 10, 1)}",
        )
    return saves


def check_exit(draft: Draft, saves: Saves, spec: RunSpec) -> None:
    """exit_interval leaves at its multiples WITHOUT saving, with exit code 0
    (training.py:1554-1563)."""
    interval = draft.number("exit_interval")
    if not interval:
        return
    interval = abs(interval)
    if saves.train_iters is None:
        last = interval * 1000
    elif interval > saves.train_iters:
        return
    else:
        last = saves.train_iters
    lost = next(
        (i for i in range(interval, min(last, interval * 1000) + 1, interval) if not saves.at(i)),
        None,
    )
    if lost is not None:
        hint = "delete it; the time limit ends a link"
        if saves.factor and not saves.log:
            step = int(saves.factor)
            hint = (
                f"a multiple of `checkpoint_factor: {step}`, such as"
                f" {max(round(interval / step), 1) * step}, or more than `train_iters`, or"
                " delete it"
            )
        draft.error(
            f"`exit_interval: {interval}` leaves at iteration {lost} without a checkpoint",
            "exit_interval",
            why=(
                "NeoX exits there with code 0 and saves nothing, so the work since the last"
                " checkpoint is lost"
            ),
            hint=hint,
        )
    elif saves.train_iters:
        links = -(-saves.train_iters // interval)
        draft.check(
            Rule(
                links > spec.num_links,
                f"`exit_interval: {interval}` ends every link after {interval} iterations, and"
                f" {saves.train_iters} need {links} links",
                "exit_interval",
                hint=f"chain: {{jobs: {links}}}, or delete it",
                level="warning",
            )
        )


def retention(draft: Draft, saves: Saves, start: Start | None) -> int | None:
    """`keep_last_n_checkpoints` where it deletes anything in this run, else None."""
    keep = draft.number("keep_last_n_checkpoints")
    if keep is None or "keep_last_n_checkpoints" not in draft.values:
        return None
    total = saves.count()
    enough = keep > 0 and total is not None and total + bool(start) <= keep
    return None if enough else keep


def check_retention(draft: Draft, saves: Saves, start: Start | None) -> None:
    """keep_last_n_checkpoints must leave two complete checkpoints and never meet the start's link.

    NeoX sorts every folder whose path contains global_step and removes all but the last n with
    shutil.rmtree right after a save (checkpointing.py:160-181): a link among the old ones stops the
    job. (For upstream the runtime gives the link a name that is not counted; the fork needs it.)
    """
    key = "keep_last_n_checkpoints"
    keep = retention(draft, saves, start)
    if keep is None:
        return
    hint = f"delete it: nothing is removed then; or `{key}: 100000`"
    if keep < 1:
        draft.error(
            f"`{key}: {keep}` deletes every checkpoint as soon as it is saved", key, hint=hint
        )
        return
    if start and draft.flavor != "upstream":
        draft.error(
            f"`{key}: {keep}` stops the job when the link `{start.link}` becomes the oldest"
            " checkpoint",
            key,
            why=(
                "NeoX removes old checkpoints with rmtree, which fails on a link, right after a"
                " save"
            ),
            hint=hint,
        )
    elif keep < 2:
        draft.error(
            f"`{key}: {keep}` deletes the last complete checkpoint while the next may be"
            " incomplete",
            key,
            why="`latest` is written before all ranks have saved (DS runtime/engine.py:3315-3321)",
            hint=f"at least 2; {hint}",
        )


def check_collision(draft: Draft, saves: Saves, start: Start | None, spec: RunSpec) -> None:
    """Upstream counts from 0 after a finetune: a save at the start's own number would go through a
    link of that name.

    The runtime gives the link another name then (runtime/survey.py `link_hazard`); two checkpoints
    of one name are said.
    """
    if not start or draft.flavor != "upstream":
        return
    at_end = saves.train_iters == start.iteration
    within = saves.train_iters is None or start.iteration <= saves.train_iters
    if at_end or (within and saves.at(start.iteration)):
        draft.warn(
            f"the run saves a `{start.link}` of its own, as the checkpoint it starts from is"
            " called",
            where=spec.where("checkpoint", "start"),
            why=(
                "upstream NeoX counts from 0 after a finetune; so the start is linked as "
                f"`start-{start.iteration}`, and nothing is saved through the link"
            ),
        )


def decide_resume_schedule(draft: Draft) -> bool:
    """Whether a resume takes the learning-rate schedule from the configuration. Says why; refuses a
    contradiction.

    A resume asserts that rate, warm-up, end and decay equal the checkpoint's
    (learning_rates.py:114-147) unless one of override_lr_scheduler and use_checkpoint_lr_scheduler
    says which wins.
    """
    override, use_checkpoint = (
        draft.values.get("override_lr_scheduler"),
        draft.get("use_checkpoint_lr_scheduler"),
    )
    if override and use_checkpoint:
        draft.error(
            "`override_lr_scheduler` and `use_checkpoint_lr_scheduler` exclude each other",
            "use_checkpoint_lr_scheduler",
            why="NeoX asserts it in every mode",
            hint="delete one of them",
        )
        return False
    if use_checkpoint:
        draft.drop("override_lr_scheduler", "`use_checkpoint_lr_scheduler` is set")
        return False
    if override is False and draft.layer("override_lr_scheduler") == RUN:
        draft.warn(
            "with `override_lr_scheduler: false` a resume stops when anything of the schedule was"
            " changed",
            "override_lr_scheduler",
            hint="delete it",
        )
        return False
    return True


def check_fork_schedule(draft: Draft, offset: int, start: Start | None) -> None:
    """The fork's schedule subtracts the offset during warm-up, and its `sqrt` decay needs five keys
    (FORK learning_rates.py:69-136)."""
    if draft.flavor != "tilde":
        return
    if str(draft.get("lr_decay_style")).lower() == "sqrt":
        lacking = [
            key
            for key in ("cd_start_iter", "cd_end_iter", "start_cd_lr", "decay_pp")
            if draft.missing(key)
        ]
        if not offset:
            lacking.append("iteration_offset")
        draft.check(
            Rule(
                lacking,
                f"`lr_decay_style: sqrt` needs {', '.join(f'`{key}`' for key in lacking)}",
                "lr_decay_style",
                why="the fork stops in the first step without",
            )
        )
    if offset and start and "warmup" not in draft.broken:
        why = (
            "after a finetune the fork's schedule counts from 0 and subtracts `iteration_offset`"
            " while warm-up is on, which its own assertion refuses in the first step"
        )
        if not draft.given("warmup"):
            draft.put("warmup", 0.0, f"NeoX's default is {draft.keys['warmup'].default}; {why}")
        elif draft.values["warmup"] and draft.layer("warmup") != RUN:
            # Nearly every base config has a warm-up; the run's own file does not ask for one, so
            # the working value is meant.
            draft.warn(
                f"`warmup: {draft.values['warmup']:g}` of the base config is left out: it does not"
                f" work with `iteration_offset: {offset}`",
                "warmup",
                why=why,
                hint="warmup: 0.0",
            )
            draft.put("warmup", 0.0, why)
        elif draft.values["warmup"]:
            draft.error(
                f"`warmup: {draft.values['warmup']:g}` does not work with `iteration_offset:"
                f" {offset}`",
                "warmup",
                why=why,
                hint="warmup: 0.0",
            )
