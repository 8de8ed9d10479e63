"""Who starts the ranks: hpctrain's own srun, or NeoX's deepy.py; and the keys and variables that go
with each."""

from __future__ import annotations

import os

from hpctrain.config.run import RunSpec
from hpctrain.recipes.contract import EnvVar
from hpctrain.recipes.neox.draft import Draft
from hpctrain.recipes.rules import Rule

SRUN, DEEPY = "srun", "deepy"
# Places and ranks: decided by the job, and stale in any base config.
_JOBS_OWN = (
    "hostfile",
    "include",
    "exclude",
    "num_nodes",
    "num_gpus",
    "master_addr",
    "master_port",
    "force_multi",
    "comment",
    "account",
    "deepspeed_mpi",
    "world_size",
    "rank",
    "local_rank",
    "user_script",
    "config_files",
    "git_hash",
    "do_train",
    "do_valid",
    "do_test",
    "autotuning_run",
    "padded_vocab_size",
    "lazy_mpu_init",
    "comet_experiment",
)
_GPU_SPLITTING = ("gpus-per-task", "gpu-bind", "tres-per-task", "tres-bind")
_VISIBLE = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


def decide_launcher(draft: Draft, launch: str) -> None:
    """The launcher keys of NeoX for `launch`.

    srun: every task runs train.py with RANK, LOCAL_RANK and WORLD_SIZE set, so deepspeed_slurm,
    which reads SLURM_LOCALID where the configuration is read (arguments.py:800-810), must be off.
    deepy: DeeperSpeed's SlurmRunner issues the srun.
    """
    draft.own("launcher", "slurm", "the run is a Slurm job")
    if launch == SRUN:
        draft.own(
            "deepspeed_slurm",
            False,
            "`launch: srun`: the job script starts the ranks and sets RANK, LOCAL_RANK and"
            " WORLD_SIZE",
            hint="delete it, or set `recipe_options: {launch: deepy}`",
        )
        draft.own("no_ssh_check", None, "only NeoX's own launcher reads it", same=True)
    else:
        draft.own(
            "deepspeed_slurm",
            True,
            "`launch: deepy`: NeoX's own launcher issues the srun",
            hint="delete it",
        )
        draft.own("no_ssh_check", True, "nodes are reached by srun, not by ssh", hint="delete it")
    for key in _JOBS_OWN:
        draft.own(key, None, "the job decides it when it starts", hint="delete it")
    draft.check(
        Rule(
            not draft.get("deepspeed"),
            "`deepspeed: false` does not train: NeoX works with DeepSpeed only",
            "deepspeed",
            hint="delete it",
        ),
        Rule(
            draft.given("autotuning"),
            "`autotuning` rewrites the configuration while it runs, and a run's is fixed",
            "autotuning",
            hint="delete it",
        ),
    )


def decide_tracking(draft: Draft, launch: str, spec: RunSpec) -> None:
    """Weights & Biases is on by itself in NeoX wherever a key lies about (utils.py:144-166), so it
    is off unless asked for."""
    for key in ("use_wandb", "use_comet"):
        if draft.missing(key):
            draft.put(
                key,
                False,
                "nobody asked for it"
                + (
                    "; NeoX turns it on by itself where it finds a key in ~/.netrc"
                    if key == "use_wandb"
                    else ""
                ),
            )
    if draft.get("use_wandb"):
        draft.check(
            (
                Rule(
                    launch == DEEPY,
                    "`use_wandb: true` with `launch: deepy` shows the key to everyone on the nodes",
                    "use_wandb",
                    why="deepy.py puts WANDB_API_KEY on srun's command line (DS"
                    " launcher/multinode_runner.py)",
                    hint="recipe_options: {launch: srun} with the key in the `secrets:` file",
                ),
                Rule(
                    not spec.secrets,
                    "`use_wandb: true` and no `secrets:` file",
                    "use_wandb",
                    why="without WANDB_API_KEY or a ~/.netrc visible in the job NeoX goes on"
                    " without it",
                    hint="put WANDB_API_KEY=… into a file of mode 0600 and name it under"
                    " `secrets:`",
                    level="warning",
                ),
            )
        )


def check_devices(draft: Draft, spec: RunSpec) -> None:
    """Every task must see all GPUs of its node: NeoX asserts local_rank == rank % device_count
    (initialize.py:141-149)."""
    why = "NeoX asserts that the local rank is the rank modulo the number of GPUs a task sees"
    for option in _GPU_SPLITTING:
        draft.check(
            Rule(
                option in spec.sbatch,
                f"`{option}` gives each task GPUs of its own, and NeoX needs all of the node in"
                " every task",
                where=spec.where("sbatch", option),
                why=why,
                hint="delete it",
            )
        )
    for name in _VISIBLE:
        draft.check(
            Rule(
                name in spec.env,
                f"`env.{name}` hides GPUs from the tasks",
                where=spec.where("env", name),
                why=why,
                hint="delete it, or set `gpus_per_node`",
            )
        )


def environment(draft: Draft, spec: RunSpec) -> tuple[EnvVar, ...]:
    """The fork's switches, and warnings about those that do nothing."""
    draft.check(
        Rule(
            "SFT_ENABLED" in spec.env,
            "`env.SFT_ENABLED` has no effect",
            where=spec.where("env", "SFT_ENABLED"),
            why="the fork only prints it since its commit ab1c506; upstream never knew it",
            hint="delete it; the `loss_mask_*` keys mask the prompts",
            level="warning",
        )
    )
    if draft.flavor == "upstream":
        for name in ("CURSE_ATTENTION", "SAMPLE_ENDS"):
            draft.check(
                Rule(
                    name in spec.env,
                    f"`env.{name}` has no effect upstream",
                    where=spec.where("env", name),
                    why="only the Tilde fork reads it",
                    hint="delete it, or set `recipe_options: {flavor: tilde}`",
                    level="warning",
                )
            )
        return ()
    draft.check(
        Rule(
            spec.env.get("CURSE_ATTENTION", "1") != "1",
            f"`env.CURSE_ATTENTION: {spec.env.get('CURSE_ATTENTION')}` lets packed conversations"
            " see"
            " each other",
            where=spec.where("env", "CURSE_ATTENTION"),
            why="only 1 turns the fork's attention mask per document on",
            hint="delete it",
            level="warning",
        ),
        Rule(
            spec.env.get("SAMPLE_ENDS") == "1",
            "`env.SAMPLE_ENDS: 1` is an experimental variant of the attention mask",
            where=spec.where("env", "SAMPLE_ENDS"),
            hint="delete it",
            level="warning",
        ),
    )
    why = (
        "packed conversations do not attend to each other; cut at end-of-document tokens, so"
        " tokenize with them appended"
    )
    return (EnvVar("CURSE_ATTENTION", "1", why),)


def needed_paths(
    draft: Draft, spec: RunSpec, folder: str, train_script: str, launch: str
) -> tuple[tuple[str, str, str], ...]:
    """(what, path, where) of everything that must exist at the site; relative ones are relative to
    NeoX's folder."""
    where_dir = spec.where("recipe_options", "dir")
    out = [("NeoX working copy", folder, where_dir), ("training script", train_script, where_dir)]
    if launch == DEEPY:
        out.append(("NeoX launcher", os.path.join(folder, "deepy.py"), where_dir))
    for key in ("vocab_file", "merge_file"):
        if draft.given(key):
            out.append(
                (
                    key.replace("_", " "),
                    os.path.join(folder, str(draft.values[key])),
                    draft.where(key),
                )
            )
    # The data sets that run.yaml names are looked for wherever it is checked; these are the
    # configuration's own.
    seen = {prefix for prefixes in spec.data.values() for prefix in prefixes}
    for key, value in draft.values.items():
        if not key.endswith("_data_paths") or not isinstance(value, list):
            continue
        what = f"{key.partition('_')[0]} {'labels' if 'label' in key else 'data'}"
        for index, prefix in enumerate(value):
            if isinstance(prefix, str) and prefix and prefix not in seen:
                seen.add(prefix)
                path = os.path.join(folder, prefix)
                out += [
                    (what, path + suffix, draft.where(key, index)) for suffix in (".bin", ".idx")
                ]
    return tuple(out)
