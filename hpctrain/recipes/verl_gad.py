"""Generative adversarial distillation on verl: run.yaml -> one command line of hydra overrides, run
on a Ray of the job's own.

The rules are in `hpctrain/recipes/verl/`; here they are put in order. What runs in the job:
`templates/verl-gad/*.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpctrain.base.parquet import NoParquet, read_footer
from hpctrain.base.paths import shipped_text
from hpctrain.base.text import text_problem
from hpctrain.config.decision import Decision
from hpctrain.config.run import RunSpec, absolute
from hpctrain.recipes.contract import Cadence, Context, Guard, Resolved
from hpctrain.recipes.facts import Copy, Fact, Model, Packages, Rows
from hpctrain.recipes.launchers import RAY_FILE
from hpctrain.recipes.rules import Judge, Rule
from hpctrain.recipes.trainer_config import positions_of, read_model
from hpctrain.recipes.verl import checks, hydra, keys
from hpctrain.recipes.verl.checks import Where
from hpctrain.recipes.verl.presets import BRANCHES, SHAPE_KEYS, SIZES, ModelShape, overrides_of
from hpctrain.runtime.layouts import LAYOUTS
from hpctrain.runtime.survey import start_number

WARMUP, ADVERSARIAL = "warmup", "adversarial"
LENGTHS = ("trainer.total_training_steps", "trainer.total_epochs")
OVERRIDES, RESUME = "overrides.txt", "overrides.resume.txt"
SCRIPTS = ("check_verl.py", "merge_start.py")
MODELS = ("actor_rollout_ref.model.path", "critic.model.path")
LAYOUT = LAYOUTS["verl"]
START_MODEL = (  # the folder in checkpoint.dir with the start's student and critic as whole models
    "start-model"
)
# The ranks of one node where a site has no GPUs: then only a rehearsal runs, in the shape of GAD's
# own scripts.
_RANKS_WITHOUT_GPUS = 8
# Keys that the job decides, and where the run says them instead.
_ELSEWHERE = {
    "trainer.default_local_dir": "`checkpoint: {dir: …}` says it",
    "trainer.resume_mode": "each link finds its checkpoint itself",
    "trainer.resume_from_path": "`checkpoint: {start: …}` says where the first link starts",
    "trainer.nnodes": "`nodes` says it",
    "trainer.n_gpus_per_node": "`gpus_per_node` says it",
    "data.train_files": "`data: {train: […]}` says it",
    "data.val_files": "`data: {valid: […]}` says it",
    "actor_rollout_ref.model.path": "`recipe_options: {model: …}` says it",
    "critic.model.path": "`recipe_options: {reward_model: …}` says it",
    "ray_kwargs.ray_init.num_cpus": (
        "the job starts Ray with all of its nodes' cores, and Ray refuses the key then"
    ),
    "ray_init.num_cpus": (
        "the job starts Ray with all of its nodes' cores, and Ray refuses the key then"
    ),
    "ray_kwargs.ray_init.address": "the job starts a Ray of its own",
    "hydra.run.dir": "hydra writes into the run directory",
}


def resolve(context: Context) -> Resolved:
    """Everything decided about a GAD run, and all problems at once. `template` is what
    templates/verl-gad needs."""
    spec, options = context.spec, context.options
    stage, size = options["stage"], SIZES[options["size"]]
    judge = Judge()
    _check_models(context, judge)
    _check_places(spec, stage, judge)
    values, own = _values(context, judge)
    where = _locator(spec, own)
    shape = _shape(context, size.shape, judge)
    per_node = context.gpus_per_node or _RANKS_WITHOUT_GPUS
    ranks = context.num_nodes * per_node
    judge.check(
        Rule(
            not context.gpus_per_node,
            f"site `{context.site.name}` has no GPUs here, and verl trains on nothing else",
            spec.where("site"),
            hint=f"`hpctrain rehearse` runs it as with {per_node} a node",
            level="warning",
        )
    )
    checker = checks.Checker(values, where, ranks, per_node, shape)
    memory: tuple[Decision, ...] = ()
    if checker.counts_are_numbers():
        checker.batches()
        checker.micro_batches()
        checker.parallelism()
        checker.token_budgets()
        checker.context_length(*_positions(context, shape, values))
        checker.saving()
        memory = checks.check_memory(checker, context)
    judge.problems += checker.problems
    begin = _start(context, judge)
    start = begin.step
    records = options["records"] or _rows_there(spec.data.get("train", ()))
    target, steps = _target(values, records)
    _check_length(judge, context, values, where, target, start, own, records)
    branch = options["branch"] or BRANCHES[stage]
    verl = absolute(options["verl"], spec.base_dir)
    validates = "trainer.val_before_train" in own
    configs = _configs(judge, values, where, spec.name, validates)
    python = options["python"]
    failed = any(problem.level == "error" for problem in judge.problems)
    return Resolved(
        argv=(
            python,
            "-u",
            os.path.join(context.run_dir, RAY_FILE),
            "--gpus",
            str(context.gpus_per_node),
            "--timeout",
            str(options["ray_timeout_s"]),
            "--tmp",
            context.node_type.tmp_path,
            "--",
            python,
            "-u",
            "-m",
            "verl.trainer.main_ppo",
        ),
        workdir=context.run_dir,
        configs={} if failed else configs,
        config_for={"scratch": OVERRIDES, "finetune": OVERRIDES, "resume": RESUME},
        files={RAY_FILE: shipped_text("base", RAY_FILE)}
        | {name: shipped_text("verl-gad", name) for name in SCRIPTS},
        guard=Guard(
            layout=LAYOUT.name,
            target=target,
            data_parallel=ranks,
            start_needs=("actor", "critic", "data.pt"),
            start_as=options["handover"],
            start_folder=begin.folder,
            start_checkpoint=begin.checkpoint,
            start_takes=checks.start_takes(values),
            start_counts=True,
            scratch_from=" and ".join(
                dict.fromkeys(f"the model `{values[key]}`" for key in MODELS)
            ),
        ),
        cadence=Cadence(target - (start or 0) if target else None, values.get("trainer.save_freq")),
        template={
            "verl": verl,
            "branch": branch,
            "python": python,
            "stage": stage,
            "merge": _merge(options, python, spec) if stage == ADVERSARIAL else (),
            "start_model": os.path.join(spec.checkpoint_dir or "", START_MODEL),
        },
        paths=_paths(context, verl),
        facts=_facts(context, values, where, verl, branch),
        decisions=(
            *_decisions(context, values, where, target, steps, start, branch, per_node, own),
            *memory,
        ),
        problems=tuple(judge.problems),
    )


def _values(context: Context, judge: Judge) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    """(overrides by key, the path in run.yaml of those that it sets): preset, then the job's, then
    the run's."""
    spec, options = context.spec, context.options
    stage = options["stage"]
    values = overrides_of(stage, SIZES[options["size"]])
    folder = spec.checkpoint_dir or ""
    if stage == ADVERSARIAL:
        student, critic = (os.path.join(folder, START_MODEL, role) for role in ("actor", "critic"))
    else:
        student = absolute(options["model"], spec.base_dir) if options["model"] else ""
        critic = (
            absolute(options["reward_model"], spec.base_dir) if options["reward_model"] else student
        )
    online = bool(spec.secrets) or "WANDB_MODE" in spec.env
    values.update(
        {
            "data.train_files": list(spec.data.get("train", ())),
            "data.val_files": list(spec.data.get("valid", ())),
            "actor_rollout_ref.model.path": student,
            "critic.model.path": critic,
            "trainer.logger": ["console", "wandb"] if online else ["console"],
            "trainer.experiment_name": spec.name,
            "trainer.nnodes": context.num_nodes,
            "trainer.n_gpus_per_node": context.gpus_per_node or _RANKS_WITHOUT_GPUS,
            "trainer.default_local_dir": folder,
            "trainer.resume_mode": "auto",
            "hydra.run.dir": "logs/hydra",
        }
    )
    own: dict[str, tuple[Any, ...]] = {}
    given = spec.document.get("config", default={})
    if not isinstance(given, dict):
        given = {}
    for key, path, value in hydra.flatten(given):
        where = spec.where("config", *path)
        bare = key.lstrip("+~")
        bad = hydra.key_problem(key)
        if bad:
            hint = "for example `trainer: {save_freq: 50}`"
            judge.error(f"`config.{key}` {bad}", where, hint=hint)
        elif bare in _ELSEWHERE:
            what = f"`config.{bare}` is not the run's to set"
            judge.error(what, where, why=_ELSEWHERE[bare], hint="delete it")
        else:
            judge.problems += keys.key_problems(key, where)
            own[bare] = path
            for old in [known for known in values if known.lstrip("+~") == bare]:
                del values[old]
            values[key] = value
    return values, own


def _configs(
    judge: Judge, values: Mapping[str, Any], where: Where, name: str, validates: bool
) -> dict[str, str]:
    """The overrides as text, one a line, for the first link and for those that resume. Notes values
    that cannot be said."""
    lines = []
    for key, value in values.items():
        try:
            word = hydra.override(key, value)
        except ValueError as error:
            judge.error(f"`config.{key}`: {error}", where(key))
            continue
        bad = text_problem(word) or (
            "holds `${`, which verl takes for a reference" if "${" in word else ""
        )
        judge.check(Rule(bad, f"`config.{key}` {bad}", where(key)))
        lines.append(word)
    head = [
        (
            f"# What verl's configuration is changed to in run {name}: one override of hydra's a"
            " line, handed over word by word."
        ),
        "# Made by hpctrain render: edit run.yaml instead. `hpctrain plan` says why.",
    ]
    first = "\n".join([*head, *lines]) + "\n"
    again = (
        ""
        if validates
        else (
            "# A link that resumes does not validate first: the one before it"
            " has.\ntrainer.val_before_train=false\n"
        )
    )
    return {OVERRIDES: first, RESUME: first + again}


def _locator(spec: RunSpec, own: Mapping[str, tuple[Any, ...]]) -> Where:
    """Where a key's value was said: in `config`, else the option whose preset it is; run.yaml's own
    keys as they are."""

    def where(key: str) -> str:
        bare = key.lstrip("+~")
        if bare in own:
            return spec.where("config", *own[bare])
        if key.startswith("recipe_options."):
            return spec.where(*key.split("."))
        return spec.where("recipe_options", "size")

    return where


def _check_models(context: Context, judge: Judge) -> None:
    spec, options = context.spec, context.options
    stage = options["stage"]
    for name in ("model", "reward_model"):
        given, where = options[name], spec.where("recipe_options", name)
        judge.check(
            (
                Rule(
                    stage == ADVERSARIAL and given,
                    f"`{name}` with `stage: adversarial`: it takes the warmup's own",
                    where,
                    why="student and critic come out of `checkpoint.start`",
                    hint="delete it",
                ),
                checks.misnamed(given or "", where),
            )
        )
    judge.check(
        Rule(
            stage == WARMUP and not options["model"],
            "`recipe_options.model` is missing",
            spec.where("recipe_options"),
            why="the warmup needs a student to begin with",
            hint="name its folder",
        ),
        Rule(
            stage == WARMUP and options["merge_script"],
            "`merge_script` with `stage: warmup` does nothing",
            spec.where("recipe_options", "merge_script"),
            level="warning",
            hint="delete it",
        ),
    )


def _check_places(spec: RunSpec, stage: str, judge: Judge) -> None:
    judge.check(
        Rule(
            not spec.checkpoint_dir,
            "verl needs a folder for its checkpoints",
            spec.where("checkpoint"),
            hint="set `checkpoint: {dir: …}`, on a file system that every node sees",
        ),
        Rule(
            stage == ADVERSARIAL and not spec.has_start,
            "`stage: adversarial` needs the warmup's checkpoint",
            spec.where("checkpoint"),
            hint="`checkpoint: {start: <the warmup's checkpoint.dir>}`; its newest step is taken",
        ),
        Rule(
            spec.checkpoint_start and spec.checkpoint_start == spec.checkpoint_dir,
            "`checkpoint.start` and `checkpoint.dir` are the same folder",
            spec.where("checkpoint", "start"),
            why="the stages would write over each other's steps",
            hint="give this stage a folder of its own",
        ),
    )
    for kind, what in (("train", "training"), ("valid", "validation")):
        judge.check(
            Rule(
                not spec.data.get(kind),
                f"no {what} data",
                spec.where("data"),
                why="verl reads both before it starts",
                hint=f"data: {{{kind}: [/path/to/{kind}.parquet]}}",
            )
        )
        for index, path in enumerate(spec.data.get(kind, ())):
            judge.check(
                Rule(
                    not path.endswith(".parquet"),
                    f"`{path}` does not look like a parquet file",
                    spec.where("data", kind, index),
                    why="verl reads parquet only",
                    hint="name a .parquet whose columns are `content`, the messages, and"
                    " `teacher_response`",
                    level="warning",
                )
            )


def _shape(context: Context, preset: ModelShape, judge: Judge) -> ModelShape:
    given, spec = context.options["model_shape"] or {}, context.spec
    for key, value in given.items():
        where = spec.where("recipe_options", "model_shape", key)
        whole = isinstance(value, int) or (key == "parameters" and isinstance(value, float))
        if key not in SHAPE_KEYS:
            hint = f"known: {', '.join(SHAPE_KEYS)}"
            judge.error(f"unknown key `model_shape.{key}`", where, hint=hint)
        elif isinstance(value, bool) or not whole or not 0 < value < 1e15:
            judge.error(f"`model_shape.{key}: {value}` is not a number above 0", where)
        else:
            preset = replace(preset, **{key: value})
    return preset


def _positions(context: Context, shape: ModelShape, values: Mapping[str, Any]) -> tuple[int, str]:
    """The longest sequence that the student knows, and where that is said: the run, the student's
    own config, or its size."""
    spec, given = context.spec, context.options["model_shape"] or {}
    if "positions" in given:
        return (
            shape.positions,
            (
                "`model_shape.positions` at"
                f" {spec.where('recipe_options', 'model_shape', 'positions')}"
            ),
        )
    student = str(values[MODELS[0]])
    own = positions_of(read_model(student)) if os.path.isabs(student) else None
    if own is not None:
        return own, f"`max_position_embeddings` of {student}/config.json"
    size = context.options["size"]
    return (
        shape.positions,
        (
            f"as Qwen's model of size {size} has it; `recipe_options.model_shape: {{positions: …}}`"
            " says another"
        ),
    )


@dataclass(frozen=True)
class Start:
    """Where the first link starts: a checkpoint folder of another run's, and the checkpoint in it
    where the run names one."""

    folder: str | None = None
    checkpoint: str | None = None

    @property
    def step(self) -> int | None:
        return start_number(self.checkpoint) if self.checkpoint else None


def _start(context: Context, judge: Judge) -> Start:
    """`checkpoint.start` names one checkpoint, or the folder whose tracker will; `resume_step`
    chooses one of the folder's."""
    spec, step = context.spec, context.options["resume_step"]
    where = spec.where("recipe_options", "resume_step")
    path = spec.checkpoint_start
    if spec.handed or not path:
        why = "there is no `checkpoint.start`"
        if spec.handed:
            why = f"stage `{spec.handed.stage}` hands over its newest"
        what = f"`resume_step: {step}` chooses nothing"
        judge.check(Rule(step, what, where, why=why, hint="delete it"))
        return Start() if step else Start(checkpoint=path)
    name = os.path.basename(path)
    if LAYOUT.number(name) is None and not re.search(r"global_?step", name):
        return Start(path, os.path.join(path, LAYOUT.folder_name(step)) if step else None)
    named = start_number(path)
    judge.check(
        (
            Rule(
                named is None,
                f"the start checkpoint's name `{name}` has no step",
                spec.where("checkpoint", "start"),
                hint="global_step_N",
            ),
            Rule(
                step and step != named,
                f"`resume_step: {step}` is not the step of `{name}`",
                where,
                hint="delete it",
            ),
        )
    )
    return Start(os.path.dirname(path), path)


def _target(values: Mapping[str, Any], records: int | None) -> tuple[int | None, int | None]:
    """(the step at which the run is done, steps an epoch), None where the run does not tell.

    verl drops the last short batch and counts steps over all epochs, those of the start included
    (trainer/ppo/ray_trainer.py `_create_dataloader`: len(dataloader) x total_epochs).
    """
    batch, epochs = values.get(checks.TRAIN_BATCH), values.get("trainer.total_epochs")
    steps = records // batch if records and isinstance(batch, int) and batch > 0 else None
    total = values.get("trainer.total_training_steps")
    if isinstance(total, int) and not isinstance(total, bool):
        return total, steps
    return (steps * epochs if steps and isinstance(epochs, int) else None), steps


def _check_length(
    judge: Judge,
    context: Context,
    values: Mapping[str, Any],
    where: Where,
    target: int | None,
    start: int | None,
    own: Mapping[str, Any],
    records: int | None,
) -> None:
    spec, batch = context.spec, values.get(checks.TRAIN_BATCH)
    at = where(LENGTHS[0]) if LENGTHS[0] in own else where(LENGTHS[1])
    if not isinstance(values.get(LENGTHS[1]), int) or not isinstance(batch, int):
        return  # said already, and nothing follows from it
    judge.check(
        (
            Rule(
                records and records < batch,
                f"{records} rows of training data are less than one batch of {batch}",
                spec.where("recipe_options", "records"),
                why="verl leaves out the last short batch, so there is no step to make",
                hint=f"more data, or a smaller `config.{checks.TRAIN_BATCH}`",
            ),
            Rule(
                target is None and spec.num_links > 1,
                f"a chain of {spec.num_links} jobs must know when the run is done, and"
                " `total_epochs` does not tell",
                where("trainer.total_epochs"),
                hint="give `recipe_options: {records: …}`, the rows of the training data, which are"
                " not here to be counted",
            ),
            Rule(target is not None and target < 1, f"the run would end at step {target}", at),
            Rule(
                target is not None and start is not None and start >= target,
                f"nothing to train: the start is at step {start}, and the run ends at step"
                f" {target}",
                at,
                why="verl counts steps on from the start: epochs and steps are totals of both"
                " stages",
                hint="more `trainer.total_epochs`, or more `trainer.total_training_steps`",
            ),
        )
    )


def _merge(options: Mapping[str, Any], python: str, spec: RunSpec) -> tuple[str, ...]:
    """The argv that merges shards; `merge_start.py` replaces @SHARDS and @MODEL by folders."""
    if options["merge_script"]:
        return (python, absolute(options["merge_script"], spec.base_dir), "--local_dir", "@SHARDS")
    return (
        python,
        "-m",
        "verl.model_merger",
        "merge",
        "--backend",
        "fsdp",
        "--local_dir",
        "@SHARDS",
        "--target_dir",
        "@MODEL",
    )


def _paths(context: Context, verl: str) -> tuple[tuple[str, str, str], ...]:
    """(what, path, where) of everything that must exist at the site."""
    spec, options = context.spec, context.options
    out = [("verl working copy", verl, spec.where("recipe_options", "verl"))]
    for name, what in (
        ("model", "student"),
        ("reward_model", "critic's model"),
        ("merge_script", "merge script"),
    ):
        if options[name]:
            out.append(
                (what, absolute(options[name], spec.base_dir), spec.where("recipe_options", name))
            )
    for kind, what in (("train", "training data"), ("valid", "validation data")):
        out += [
            (what, path, spec.where("data", kind, index))
            for index, path in enumerate(spec.data.get(kind, ()))
        ]
    return tuple(out)


def _rows_there(files: Sequence[str]) -> int | None:
    """Rows of the training data by the files' footers, None where one cannot be read from here."""
    try:
        footers = [read_footer(path) for path in files if os.path.isfile(path)]
    except (OSError, NoParquet):
        return None
    seen = [footer.rows for footer in footers if footer]
    return sum(seen) if seen and len(seen) == len(files) else None


def _facts(
    context: Context, values: Mapping[str, Any], where: Where, verl: str, branch: str
) -> tuple[Fact, ...]:
    """What `check` opens: rows, models, the working copy, and what of the environment is asked."""
    spec, options = context.spec, context.options
    stage_at = spec.where("recipe_options", "stage")
    prompt = str(values.get("data.prompt_key"))
    columns = {prompt: "messages", "teacher_response": "text"}
    found: list[Fact] = [
        Rows(
            tuple((path, spec.where("data", kind, at)) for at, path in enumerate(spec.data[kind])),
            (columns if kind == "train" else {prompt: "messages"},),
            stated=options["records"] if kind == "train" else None,
            where_stated=spec.where("recipe_options", "records"),
        )
        for kind in ("train", "valid")
        if spec.data.get(kind)
    ]
    found += [
        Model(
            what,
            absolute(options[name], spec.base_dir),
            spec.where("recipe_options", name),
            full_precision=True,
        )
        for name, what in (("model", "student"), ("reward_model", "critic's model"))
        if options[name]
    ]
    where_branch = spec.where("recipe_options", "branch") if options["branch"] else stage_at
    why = f"stage {options['stage']} trains with the branch `{branch}` of GAD's verl"
    copy_at = spec.where("recipe_options", "verl")
    found.append(Copy(verl, copy_at, branch, where_wanted=where_branch, why=why))
    wanted = {}
    if "wandb" in (values.get("trainer.logger") or ()):
        wanted["wandb"] = ("`trainer.logger` has it", where("trainer.logger"))
    if values.get("actor_rollout_ref.model.use_remove_padding"):
        key = "actor_rollout_ref.model.use_remove_padding"
        wanted["flash-attn"] = ("`use_remove_padding` needs it", where(key))
    where_python = spec.where("recipe_options", "python")
    found.append(Packages(str(options["python"]), where_python, wanted))
    return tuple(found)


def _decisions(
    context: Context,
    values: Mapping[str, Any],
    where: Where,
    target: int | None,
    steps: int | None,
    start: int | None,
    branch: str,
    per_node: int,
    own: Mapping[str, Any],
) -> tuple[Decision, ...]:
    spec, options = context.spec, context.options
    ranks = context.num_nodes * per_node
    train, samples = values.get(checks.TRAIN_BATCH), values.get(checks.SAMPLES)
    size_at, stage_at = spec.where("recipe_options", "size"), spec.where("recipe_options", "stage")
    out = [
        Decision(
            "step.program", "verl.trainer.main_ppo", f"GAD's stage {options['stage']}", stage_at
        ),
        Decision(
            "code.branch",
            branch,
            "the stage's branch; the job compares it with the package it imports",
            stage_at,
        ),
        Decision(
            "ranks",
            ranks,
            f"{context.num_nodes} nodes x {per_node} GPUs; a checkpoint needs as many again",
            spec.where("nodes"),
        ),
        Decision(
            "batch.train_batch_size",
            train,
            f"prompts a step, {samples} answers each",
            where(checks.TRAIN_BATCH),
        ),
        Decision(
            "checkpoint.every",
            values.get("trainer.save_freq"),
            "`trainer.save_freq`",
            where("trainer.save_freq"),
        ),
        Decision(
            "trainer.logger",
            values["trainer.logger"],
            (
                "as the run says"
                if "trainer.logger" in own
                else "wandb where the run has `secrets` or WANDB_MODE"
            ),
            where("trainer.logger"),
        ),
    ]
    if spec.has_start:
        step = (
            f"step {start}"
            if start
            else f"the step that {LAYOUT.tracker} names when the first link begins"
        )
        way = spec.handed.way if spec.handed else options["handover"]
        out.append(
            Decision(
                "checkpoint.handover",
                way,
                f"{step}; actor, critic and data of {ranks} ranks",
                spec.where("checkpoint", "start"),
            )
        )
    if target is not None:
        epochs = (
            f"{steps} steps an epoch x {values.get('trainer.total_epochs')} epochs"
            if steps and "trainer.total_training_steps" not in values
            else "as the run says"
        )
        new = "; those of the warmup count" if spec.has_start else ""
        if start:
            new = f"; {target - start} of them new"
        out.append(Decision("steps.target", target, epochs + new, where("trainer.total_epochs")))
    out += [
        Decision(
            key,
            values[key],
            "as the run says" if key in own else f"size {options['size']}",
            where(key) if key in own else size_at,
        )
        for key in (
            checks.TENSOR,
            checks.MINI_BATCH,
            "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
            "critic.ppo_max_token_len_per_gpu",
            checks.KEEP_GPU,
        )
        if key in values
    ]
    return tuple(out)
