"""What open-instruct would do on its own and must not, how often it saves, when the run is done,
and the batch."""

from __future__ import annotations

import re

from hpctrain.recipes.open_instruct.draft import DPO, SFT, Draft
from hpctrain.recipes.rules import Rule

# Arguments that run.yaml says elsewhere, or that the job sets.
_ELSEWHERE = {
    "model_name_or_path": "recipe_options.model",
    "output_dir": "checkpoint.dir",
    "dataset_local_cache_dir": "recipe_options.cache_dir",
    "local_cache_dir": "recipe_options.cache_dir",
}
# What is said even where run.yaml says null: left out, the program's own default would do the
# opposite.
_ALWAYS = {
    "do_not_randomize_output_dir": True,
    "push_to_hub": False,
    "try_launch_beaker_eval_jobs": False,
    "try_auto_save_to_beaker": False,
    "clean_checkpoints_at_end": False,
}
_WHY_NOT = {
    "push_to_hub": (
        "asks the Hugging Face hub who you are before it trains, and publishes the model afterwards"
    ),
    "try_launch_beaker_eval_jobs": (
        "is for AllenAI's own cluster, and refuses to start without `push_to_hub`"
    ),
    "clean_checkpoints_at_end": (
        "deletes every step_N and epoch_N at the end, and the next link would begin anew"
    ),
}


def check_settings(draft: Draft) -> None:
    """Refuse what would publish, hide or delete the run's results; say what has no effect."""
    for name, place in _ELSEWHERE.items():
        if name in draft.values:
            draft.error(
                f"`config.{name}` is set as `{place}`",
                draft.document.where_key(name),
                hint="move it there",
            )
            draft.values.pop(name)
    for name, value in _ALWAYS.items():
        if draft.has(name) and draft.values.get(name) is None:
            draft.values[name] = value
    for name, why in _WHY_NOT.items():
        draft.check(
            Rule(
                draft.values.get(name) is True,
                f"`{name}: true` {why}",
                draft.where(name),
                hint="delete it",
            )
        )
    draft.check(
        Rule(
            draft.values.get("do_not_randomize_output_dir") is False,
            "`do_not_randomize_output_dir: false` saves below a folder named after `exp_name`",
            draft.where("do_not_randomize_output_dir"),
            why="the next link looks for checkpoints in `checkpoint.dir`",
            hint="delete it",
        ),
        Rule(
            draft.values.get("save_to_hub") is not None,
            "`save_to_hub` publishes the model",
            draft.where("save_to_hub"),
            hint="delete it",
        ),
    )
    if draft.values.get("resume_from_checkpoint") is not None:
        draft.error(
            "`resume_from_checkpoint` has no effect",
            draft.where("resume_from_checkpoint"),
            why=(
                "open-instruct looks at it only when its output folder does not exist, and makes"
                " the folder before"
            ),
            hint="name a model to start from with `checkpoint: {start: …}`",
        )
        draft.values.pop("resume_from_checkpoint")
    keep = draft.get("keep_last_n_checkpoints")
    draft.check(
        Rule(
            isinstance(keep, int) and 0 <= keep < 2,
            f"`keep_last_n_checkpoints: {keep}` can leave no complete checkpoint",
            draft.where("keep_last_n_checkpoints"),
            why="the older ones are deleted when the first process has saved, while others may"
            " still write",
            hint="at least 2, or -1 to delete none",
        )
    )
    if draft.values.get("dataset_cache_mode", draft.values.get("cache_mode")) == "hf":
        name = draft.names.cache_mode
        draft.error(
            f"`{name}: hf` uploads the tokenized data to the Hugging Face hub",
            draft.where(name),
            hint="delete it",
        )
    if draft.values.get("with_tracking") and draft.options["offline"]:
        draft.decide(
            "tracking",
            "offline",
            "W&B writes beside the run; `wandb sync` sends it later",
            draft.where("with_tracking"),
        )
    draft.check(
        Rule(
            draft.program == SFT and not draft.values.get("chat_template_name"),
            "`chat_template_name` is not set",
            draft.spec.where("config"),
            level="note",
            why="then the tokenizer must bring a chat template, and those of base models do not",
            hint="config: {chat_template_name: tulu}",
        ),
        Rule(
            draft.program == DPO and draft.values.get("cache_logprobs_only") is True,
            "`cache_logprobs_only` ends before training",
            draft.where("cache_logprobs_only"),
            level="warning",
        ),
    )


def decide_batch(draft: Draft) -> None:
    """The batch arithmetic, said rather than asked: open-instruct takes no global batch."""
    micro, gas = (
        draft.count("per_device_train_batch_size"),
        draft.count("gradient_accumulation_steps"),
    )
    for name, value in (
        ("per_device_train_batch_size", micro),
        ("gradient_accumulation_steps", gas),
    ):
        draft.check(
            Rule(
                value is None and draft.has(name), f"`{name}` must be at least 1", draft.where(name)
            )
        )
    if not micro or not gas:
        return
    parallel = draft.count("sequence_parallel_size") or 1
    if draft.world_size % parallel:
        draft.error(
            f"`sequence_parallel_size: {parallel}` does not divide {draft.world_size} processes",
            draft.where("sequence_parallel_size"),
        )
        return
    data = draft.world_size // parallel
    product = f"{micro} x {gas} accumulation x {data} data-parallel processes"
    draft.decide(
        "batch.train_batch_size",
        micro * gas * data,
        product,
        draft.where("per_device_train_batch_size"),
    )
    draft.decide("batch.data_parallel_size", data, "one process per GPU", draft.spec.where("nodes"))
    draft.decide(
        "config.gradient_accumulation_steps",
        gas,
        "as the run says",
        draft.where("gradient_accumulation_steps"),
    )


def decide_cadence(draft: Draft) -> tuple[int | None, int | None, int | None]:
    """(number of the last checkpoint's folder, training steps, steps between checkpoints); None
    where unknown."""
    spec, names = draft.spec, draft.names
    every, steps, epochs = (
        draft.get("checkpointing_steps"),
        draft.count("max_train_steps"),
        draft.count(names.epochs),
    )
    where = draft.where("checkpointing_steps")
    chained = spec.num_links > 1
    draft.check(
        Rule(
            draft.values.get("max_train_steps") is not None and not steps,
            "`max_train_steps` must be at least 1",
            draft.where("max_train_steps"),
        )
    )
    if every is None:
        draft.error(
            "no checkpoint would ever be saved",
            where,
            level="error" if chained else "warning",
            hint="config: {checkpointing_steps: 500}, or epoch",
        )
        return None, steps, None
    if str(every).lower() == "epoch":
        draft.check(
            Rule(
                every != "epoch",
                f"`checkpointing_steps: {every}` saves nothing",
                where,
                why="open-instruct compares with `epoch`",
                hint="checkpointing_steps: epoch",
            )
        )
        draft.decide("checkpoint.every", "epoch", "`checkpointing_steps`", where)
        draft.check(
            Rule(
                steps and chained,
                "`checkpointing_steps: epoch` with `max_train_steps` does not tell a chain when it"
                " is done",
                draft.where("max_train_steps"),
                why="how many epochs that makes depends on the data",
                hint=f"give `{names.epochs}` instead, or save by steps",
            )
        )
        return (None if steps else (epochs or 1) - 1), steps, None
    if not re.fullmatch(r"[1-9]\d{0,8}", str(every)):
        draft.error(
            f"`checkpointing_steps: {every}` is neither a number of steps nor `epoch`", where
        )
        return None, steps, None
    interval = int(every)
    draft.decide("checkpoint.every", interval, "`checkpointing_steps`", where)
    if not steps:
        draft.check(
            Rule(
                chained,
                f"a chain of {spec.num_links} jobs must know when the run is done, and"
                f" `{names.epochs}` does not tell",
                draft.where(names.epochs)
                if names.epochs in draft.values
                else spec.where("chain", "jobs"),
                why="how many steps an epoch has depends on the data",
                hint="give `max_train_steps`, or `checkpointing_steps: epoch`",
            )
        )
        return None, None, interval
    draft.check(
        Rule(
            steps % interval,
            f"the last checkpoint would be step_{steps // interval * interval}, and the run ends at"
            f" {steps}",
            draft.where("max_train_steps"),
            level="error" if chained else "warning",
            why="open-instruct saves no checkpoint at its end, only the model: later links would"
            " train the rest again",
            hint=f"max_train_steps: {-(-steps // interval) * interval}, a multiple of"
            " `checkpointing_steps`",
        )
    )
    _check_resume_in_epochs(draft, epochs, chained)
    draft.decide(
        "checkpoint.last",
        f"step_{steps}",
        "`max_train_steps`: the run is done when it and the model are complete",
        draft.where("max_train_steps"),
    )
    return steps, steps, interval


def _check_resume_in_epochs(draft: Draft, epochs: int | None, chained: bool) -> None:
    """dpo_tune_cache.py never forgets how many batches a resume skipped (lines 556-558 at e6c3044):
    each later epoch skips as many again, and the run ends before its last step."""
    draft.check(
        Rule(
            draft.program == DPO and chained and (epochs or 1) > 1,
            "a resume inside an epoch skips data of every later epoch",
            draft.where(draft.names.epochs),
            level="warning",
            why="dpo_tune_cache.py leaves out as many batches of each epoch as it had trained of"
            " the first",
            hint=f"{draft.names.epochs}: 1, or one job that needs no resume",
        )
    )
