"""How the processes are started: accelerate's command line, DeepSpeed's configuration, and what the
two do not allow."""

from __future__ import annotations

import json
import re
from typing import Any

from hpctrain.recipes.contract import EnvVar
from hpctrain.recipes.open_instruct.arguments import as_number
from hpctrain.recipes.open_instruct.draft import DPO, Draft
from hpctrain.recipes.rules import Rule

DEEPSPEED_FILE = "deepspeed.json"
_ZERO = {"zero2": 2, "zero3": 3}


def decide_sharding(draft: Draft) -> str:
    """`zero3`, `zero2` or `none`; by itself ZeRO-3 for several processes and nothing for one."""
    asked = str(draft.options["deepspeed"])
    where = draft.option_where("deepspeed")
    chosen, reason = asked, "as the run says"
    if asked == "auto" and draft.world_size > 1:
        chosen = "zero3"
        reason = "several processes: weights, gradients and optimizer are sharded over them"
    elif asked == "auto":
        chosen, reason = "none", "one process has nothing to shard with"
    draft.decide("launch.deepspeed", chosen, reason, where)
    draft.check(
        Rule(
            chosen == "none" and draft.world_size > 1,
            f"{draft.world_size} processes without DeepSpeed each hold the whole model and"
            " optimizer",
            where,
            level="warning",
            hint="recipe_options: {deepspeed: zero3}",
        )
    )
    for name in ("zero_stage", "offload_optimizer", "offload_param"):
        if draft.values.get(name) not in (None, False):
            draft.error(
                f"`config.{name}` makes a second DeepSpeed configuration",
                draft.where(name),
                why="the job hands one to accelerate",
                hint="use `recipe_options.deepspeed` and `deepspeed_config`",
            )
            draft.values.pop(name)
    draft.check(
        Rule(
            (draft.count("sequence_parallel_size") or 1) > 1 and chosen != "zero3",
            "`sequence_parallel_size` needs ZeRO-3",
            draft.where("sequence_parallel_size"),
            why="open-instruct's sequence parallelism is DeepSpeed's",
            hint="recipe_options: {deepspeed: zero3}",
        )
    )
    return chosen


def check_optimizer(draft: Draft, sharding: str) -> None:
    """The 8-bit optimizer is for one process without DeepSpeed, and upstream uses it only with
    another switch."""
    where = draft.where("use_8bit_optimizer")
    if draft.values.get("use_8bit_optimizer") is True:
        switch = "dpo_use_paged_optimizer" if draft.program == DPO else "use_qlora"
        draft.check(
            (
                Rule(
                    sharding != "none",
                    "`use_8bit_optimizer: true` does not work with DeepSpeed",
                    where,
                    why="open-instruct: not compatible with deepspeed; its state cannot be sharded",
                    hint="delete it for several GPUs, or `recipe_options: {deepspeed: none}` on"
                    " one",
                ),
                Rule(
                    draft.world_size > 1,
                    f"`use_8bit_optimizer: true` on {draft.world_size} processes",
                    where,
                    why="it is for one GPU: without DeepSpeed each process holds the whole model",
                    hint="delete it, and let ZeRO-3 shard the optimizer",
                ),
            ),
            Rule(
                not draft.values.get(switch) and not draft.values.get("use_qlora"),
                "`use_8bit_optimizer` alone has no effect",
                where,
                level="warning",
                why=f"upstream {draft.program} looks at it only with `{switch}`: the optimizer's"
                " state stays in 32 bits",
                hint=f"add `{switch}: true`"
                if draft.program == DPO
                else "fine where your copy of open-instruct changed that",
            ),
        )
    draft.check(
        Rule(
            draft.values.get("use_qlora") is True and sharding != "none",
            "`use_qlora: true` does not work with DeepSpeed",
            draft.where("use_qlora"),
            why="open-instruct's own words",
            hint="recipe_options: {deepspeed: none}",
        ),
        Rule(
            draft.values.get("dpo_use_paged_optimizer") is True and sharding != "none",
            "`dpo_use_paged_optimizer: true` does not work with DeepSpeed",
            draft.where("dpo_use_paged_optimizer"),
            why="it replaces the optimizer that DeepSpeed shards",
            hint="delete it for several GPUs",
        ),
    )


def deepspeed_text(draft: Draft, sharding: str) -> str | None:
    """DeepSpeed's configuration as JSON; `auto` is what accelerate fills in from the program's
    arguments.

    None without DeepSpeed, or with a file of the user's. Clipping stands here, since with DeepSpeed
    the programs' own argument for it does nothing (accelerate's default for `auto` is 1.0).
    """
    if sharding == "none" or draft.options["deepspeed_config"]:
        return None
    zero: dict[str, Any] = {
        "stage": _ZERO[sharding],
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
    }
    if sharding == "zero3":
        zero |= {
            "sub_group_size": 1e9,
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            # Without it the model cannot be exported at the end.
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    config = {
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": _clipping(draft),
        "steps_per_print": 1e5,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    }
    if draft.options["mixed_precision"] == "fp16":
        config["fp16"] = {"enabled": "auto"}
    return json.dumps(config, indent=2) + "\n"


def check_deepspeed_file(draft: Draft, sharding: str) -> None:
    """The user's own DeepSpeed configuration, where it can be read from here: what accelerate or
    DeepSpeed refuses, or what contradicts the run (accelerate src/accelerate/utils/dataclasses.py,
    accelerator.py `_prepare_deepspeed`).
    """
    path, where = draft.path_option("deepspeed_config"), draft.option_where("deepspeed_config")
    if not path:
        return
    if sharding == "none":
        draft.error(
            "`deepspeed_config` without DeepSpeed has no effect",
            where,
            level="warning",
            hint="delete it, or recipe_options: {deepspeed: zero3}",
        )
        return
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except OSError:
        return  # it may be at the site only
    except ValueError as error:
        draft.error(f"`deepspeed_config: {path}` is not JSON: {error}", where)
        return
    zero = found.get("zero_optimization") if isinstance(found, dict) else None
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    draft.check(
        Rule(
            stage != _ZERO[sharding],
            f"`deepspeed_config` has ZeRO stage {stage}, and the run is planned with {sharding}",
            where,
            why=f"zero_optimization.stage in {path}; the checkpoints of the two have other files",
            hint=f"stage {_ZERO[sharding]} there, or another `recipe_options.deepspeed`",
        )
    )
    for name in ("optimizer", "scheduler"):
        draft.check(
            Rule(
                isinstance(found, dict) and name in found,
                f"`deepspeed_config` has an `{name}`, and open-instruct makes its own",
                where,
                why=f"accelerate refuses two ({path})",
                hint="delete it there",
            )
        )
    micro, gas = (
        draft.count("per_device_train_batch_size"),
        draft.count("gradient_accumulation_steps"),
    )
    for name, wanted in (
        ("train_micro_batch_size_per_gpu", micro),
        ("gradient_accumulation_steps", gas),
    ):
        given = found.get(name, "auto") if isinstance(found, dict) else "auto"
        draft.check(
            Rule(
                given != "auto" and wanted and given != wanted,
                f"`deepspeed_config` has `{name}: {given}`, and the run {wanted}",
                where,
                why=f"in {path}",
                hint='"auto" takes the run\'s',
            )
        )


def _clipping(draft: Draft) -> float:
    name = draft.names.clip
    given = as_number(draft.values.get(name))
    if draft.values.get(name) is None or given is None:
        draft.decide(
            "launch.gradient_clipping", 1.0, "accelerate's default with DeepSpeed", "recipe"
        )
        return 1.0
    value = max(given, 0.0)
    draft.decide(
        "launch.gradient_clipping",
        value,
        f"`{name}`: with DeepSpeed it counts only in {DEEPSPEED_FILE}",
        draft.where(name),
    )
    return value


def launch_words(draft: Draft, sharding: str, config_file: str | None) -> list[list[str]]:
    """accelerate's options for every node, one list a flag; the node's number and the rendezvous
    are added on the node."""
    words = [
        ["--num_machines", str(draft.context.num_nodes)],
        ["--num_processes", str(draft.world_size)],
    ]
    words += [
        ["--rdzv_backend", "static"],
        ["--mixed_precision", str(draft.options["mixed_precision"])],
        ["--dynamo_backend", "no"],
    ]
    if sharding != "none":
        # `standard` is torchrun's way; accelerate's default for several nodes is pdsh with a host
        # file.
        words += [
            ["--use_deepspeed"],
            ["--deepspeed_config_file", config_file or ""],
            ["--deepspeed_multinode_launcher", "standard"],
        ]
    elif draft.world_size > 1:
        words.append(["--multi_gpu"])
    return [*words, ["--module", module_name(str(draft.options["entrypoint"]))]]


def module_name(entrypoint: str) -> str:
    """`open_instruct/finetune.py` as `open_instruct.finetune`, so that Python takes the package
    from the working copy."""
    return re.sub(r"\.py\Z", "", entrypoint).replace("/", ".")


def environment(draft: Draft, hf_home: str | None) -> tuple[EnvVar, ...]:
    """What the libraries must find in the job's environment."""
    offline, tracked = draft.options["offline"], draft.values.get("with_tracking")
    nobody = "nobody is asked: what is missing from the cache is found before the GPUs wait"
    laid_out = "models and data sets, laid out as the Hugging Face libraries do"
    wanted = (
        (hf_home, EnvVar("HF_HOME", hf_home or "", laid_out)),
        (offline, EnvVar("HF_HUB_OFFLINE", "1", nobody)),
        (offline, EnvVar("HF_DATASETS_OFFLINE", "1", "the same for data sets")),
        (offline and tracked, EnvVar("WANDB_MODE", "offline", "`wandb sync` sends it later")),
        (tracked, EnvVar("WANDB_DIR", draft.context.run_dir, "not into the working copy")),
        (True, EnvVar("TOKENIZERS_PARALLELISM", "false", "no threads that survive a fork")),
    )
    return tuple(variable for there, variable in wanted if there)
