"""open-instruct's SFT and DPO as recipes: run.yaml -> one command line for every mode, one launcher
a node.

The programs take up their newest complete checkpoint by themselves, so the same command starts and
resumes; which one that is, the guard decides before (it moves incomplete ones away).
"""

from __future__ import annotations

import json
import os
import re

from hpctrain.base.paths import shipped_text
from hpctrain.recipes import launchers
from hpctrain.recipes.contract import Cadence, Context, Guard, HubRepo, Resolved
from hpctrain.recipes.facts import Copy, Fact, Model, Packages, Rows
from hpctrain.recipes.open_instruct import data, launch, training
from hpctrain.recipes.open_instruct import memory as gpu_memory
from hpctrain.recipes.open_instruct.arguments import (
    describe_unknown,
    flags,
    has_table,
    known_commits,
    value_problems,
)
from hpctrain.recipes.open_instruct.draft import DPO, SFT, Draft
from hpctrain.recipes.rules import Rule
from hpctrain.runtime import hubcache

CACHES_FILE = "caches.json"
PREPARE = "prepare_step.py"
_PROGRAMS = {"open-instruct-sft": SFT, "open-instruct-dpo": DPO}


def resolve(context: Context) -> Resolved:
    """Everything decided about an open-instruct run, and all problems at once."""
    spec, options = context.spec, context.options
    draft = Draft(context, _PROGRAMS.get(context.recipe.name, SFT))
    folder = draft.path_option("dir") or "/"
    _check_program(draft)
    _check_arguments(draft)
    _check_extra(draft)
    training.check_settings(draft)
    draft.check(
        Rule(
            not spec.checkpoint_dir,
            "open-instruct needs a folder for its checkpoints",
            spec.where("checkpoint"),
            hint="set `checkpoint: {dir: …}`",
        )
    )
    model = data.decide_model(draft)
    mixer = data.decide_mixer(draft)
    sharding = launch.decide_sharding(draft)
    launch.check_optimizer(draft, sharding)
    training.decide_batch(draft)
    target, steps, every = training.decide_cadence(draft)
    deepspeed = launch.deepspeed_text(draft, sharding)
    launch.check_deepspeed_file(draft, sharding)
    hf_home, cache_dir = draft.path_option("hf_home"), _cache_dir(draft)
    draft.check(
        Rule(
            options["offline"] and not hf_home,
            "`offline: true` needs to know where models and data sets are",
            draft.option_where("hf_home"),
            hint="recipe_options: {hf_home: /scratch/…/hf}, or {offline: false}",
        )
    )
    repos = data.hub_repos(draft, model, mixer, hf_home) if options["offline"] and hf_home else ()
    config_file = draft.path_option("deepspeed_config") or (
        os.path.join(context.run_dir, launch.DEEPSPEED_FILE) if deepspeed else None
    )
    values = {"model_name_or_path": model.name, "output_dir": spec.checkpoint_dir, **draft.values}
    words = launch.launch_words(draft, sharding, config_file)
    _decide_program(draft, folder)
    local = [mixer[index] for index in range(0, len(mixer), 2) if draft.local(mixer[index])]
    lies = _lies(draft, model)
    where = draft.option_where
    needed = (
        (True, "open-instruct working copy", folder, where("dir")),
        (True, "entrypoint", os.path.join(folder, options["entrypoint"]), where("entrypoint")),
        *((True, "training data", path, spec.where("data", "train")) for path in local),
        (options["offline"], "folder of models and data sets", hf_home, where("hf_home")),
        (lies, "model", os.path.join(lies, "config.json"), model.where),
        (
            options["deepspeed_config"],
            "DeepSpeed configuration",
            config_file,
            where("deepspeed_config"),
        ),
    )
    paths = tuple((what, path, at) for there, what, path, at in needed if there and path)
    gpu_memory.decide(draft, model, sharding, hf_home)
    failed = any(problem.level == "error" for problem in draft.problems)
    files = {CACHES_FILE: _caches(draft, model, mixer, cache_dir, values)}
    if deepspeed:
        files[launch.DEEPSPEED_FILE] = deepspeed
    return Resolved(
        argv=(options["python"], "-u", "-m", "accelerate.commands.launch"),
        on_node=launchers.ACCELERATE_ON_NODE,
        workdir=folder,
        files={} if failed else files,
        runtime={PREPARE: shipped_text("open-instruct", PREPARE)},
        env=launch.environment(draft, hf_home),
        guard=Guard(
            layout="open-instruct",
            target=target,
            data_parallel=draft.world_size,
            zero_stage={"none": 0, "zero2": 2, "zero3": 3}[sharding],
            exported=True,
            scratch_from=f"the model `{model.folder or model.name}`",
        ),
        cadence=Cadence(steps, every, saves_on_signal=False),
        template={
            "commit": str(options["commit"]),
            "dir": folder,
            "launch": words,
            "arguments": [
                *flags(values, draft.arguments),
                *([list(options["extra_arguments"])] if options["extra_arguments"] else []),
            ],
            "cache_flag": f"--{draft.names.cache_dir}",
            "hf_home": hf_home,
        },
        paths=paths,
        facts=_facts(draft, folder, model, mixer),
        hub=repos,
        model=spec.checkpoint_dir,
        binds=(("cache folder", cache_dir),),
        placeholders=_placeholders(folder, str(options["commit"]), model, repos),
        decisions=tuple(draft.decisions),
        problems=tuple(draft.problems),
    )


# Arguments that need a package which is no part of open-instruct's own needs.
_SWITCHES = {
    "use_8bit_optimizer": "bitsandbytes",
    "use_qlora": "bitsandbytes",
    "dpo_use_paged_optimizer": "bitsandbytes",
    "use_liger_kernel": "liger-kernel",
    "with_tracking": "wandb",
}


def _lies(draft: Draft, model: data.Model) -> str:
    """The folder where the model lies already: none on the hub, nor before an earlier stage hands
    it over."""
    handed = draft.spec.handed is not None and model.folder == draft.spec.handed.model
    return "" if handed else model.folder or ""


def _facts(draft: Draft, folder: str, model: data.Model, mixer: list[str]) -> tuple[Fact, ...]:
    """What `check` opens: rows, model, working copy, and what of the environment is asked."""
    spec, names = draft.spec, draft.names
    given = spec.data.get("train")
    files = tuple(
        (path, spec.where("data", "train", at) if given else draft.where(names.mixer, 2 * at))
        for at, path in enumerate(mixer[::2])
        if os.path.isabs(path)
    )
    shape = {"chosen": "messages", "rejected": "messages"}
    if draft.program == SFT:
        shape = {str(draft.get("sft_messages_key") or "messages"): "messages"}
    found: list[Fact] = []
    if draft.values.get(names.transform) is None:  # others read other columns
        found.append(Rows(files, (shape,)))
    commit = str(draft.options["commit"])
    copy_at, commit_at = draft.option_where("dir"), draft.option_where("commit")
    why = "the arguments are checked against that commit, and each job compares it"
    found.append(Copy(folder, copy_at, commit=commit, where_wanted=commit_at, why=why))
    if lies := _lies(draft, model):
        length, where_length = draft.count("max_seq_length"), draft.where("max_seq_length")
        found.append(
            Model(
                "model",
                lies,
                model.where,
                length=length,
                where_length=where_length,
                full_precision=True,
            )
        )
    wanted = {
        package: (f"`{name}`", draft.where(name))
        for name, package in _SWITCHES.items()
        if draft.values.get(name) is True
    }
    where_python = draft.option_where("python")
    return (*found, Packages(str(draft.options["python"]), where_python, wanted))


def _check_program(draft: Draft) -> None:
    """The entrypoint and the commit, which only together say what the arguments mean."""
    commit, entrypoint = str(draft.options["commit"]), str(draft.options["entrypoint"])
    if not re.fullmatch(r"[0-9a-f]{7,40}", commit):
        draft.error(
            f"`commit: {commit}` is no git commit",
            draft.option_where("commit"),
            why="7 to 40 hexadecimal digits in small letters",
            hint="git -C DIR rev-parse HEAD",
        )
    elif not draft.commit:
        newest, day = list(known_commits().items())[-1]
        draft.error(
            f"the arguments of open-instruct at {commit[:7]} are not known here",
            draft.option_where("commit"),
            level="note",
            why=f"they were checked against those of {newest[:7]} ({day}) and older ones",
        )
    if not re.fullmatch(r"[A-Za-z_]\w*(/[A-Za-z_]\w*)*\.py", entrypoint, re.ASCII):
        draft.error(
            f"`entrypoint: {entrypoint}` is no Python file below `dir`",
            draft.option_where("entrypoint"),
            hint=f"for example {draft.program}",
        )
    elif os.path.basename(entrypoint) == "dpo.py":
        draft.error(
            "open_instruct/dpo.py is started by torchrun and keeps checkpoints of OLMo-core",
            draft.option_where("entrypoint"),
            why="it takes neither accelerate's DeepSpeed nor the 8-bit and paged optimizers",
            hint=f"entrypoint: {DPO}",
        )
    elif entrypoint != draft.program and has_table(entrypoint):
        other = "open-instruct-dpo" if draft.program == SFT else "open-instruct-sft"
        draft.error(
            f"`entrypoint: {entrypoint}` belongs to the recipe {other}",
            draft.option_where("entrypoint"),
        )
    elif entrypoint != draft.program:
        draft.error(
            f"the arguments of {entrypoint} are not known here",
            draft.option_where("entrypoint"),
            level="note",
            why=f"they were checked against those of {draft.program}",
        )


def _check_arguments(draft: Draft) -> None:
    for name in list(draft.values):
        if name in draft.arguments:
            found = list(value_problems(draft.arguments[name], draft.values[name], draft.document))
            draft.problems += found
            if any(problem.level == "error" for problem in found):
                draft.values.pop(name)
            continue
        value = draft.values.pop(name)
        if draft.document.origins.get((name,)) is None or value is None:
            continue
        if draft.document.where(name).startswith("templates/"):
            continue  # a default of the recipe's that this commit does not have
        why, hint = describe_unknown(str(name), draft.program, draft.commit)
        draft.error(
            f"{os.path.basename(draft.program)} has no argument `{name}`",
            draft.document.where_key(name),
            why,
            hint,
        )


def _check_extra(draft: Draft) -> None:
    """Arguments beside `config:` that `config:` has: the program takes the last of two, and no
    check has seen it."""
    for word in draft.options["extra_arguments"] or ():
        name = str(word).partition("=")[0].removeprefix("--").replace("-", "_")
        draft.check(
            Rule(
                str(word).startswith("--")
                and name in {*draft.arguments, "dataset_local_cache_dir", "local_cache_dir"},
                f"`extra_arguments` has `--{name}`, which the program knows",
                draft.option_where("extra_arguments"),
                why="the last of two wins, and the checks would not see it",
                hint=f"config: {{{name}: …}}",
            )
        )


def _decide_program(draft: Draft, folder: str) -> None:
    options, context = draft.options, draft.context
    commit = str(options["commit"])
    draft.decide(
        "step.program",
        options["entrypoint"],
        "accelerate starts it as a module of the working copy",
        draft.option_where("entrypoint"),
    )
    draft.decide("open_instruct.dir", folder, "the working copy", draft.option_where("dir"))
    draft.decide(
        "open_instruct.commit",
        commit,
        "each job compares it with `git rev-parse HEAD`",
        draft.option_where("commit"),
    )
    draft.decide(
        "launch.processes",
        draft.world_size,
        f"{context.num_nodes} nodes x {draft.processes_per_node}, one launcher a node",
        draft.spec.where("nodes"),
    )


def _cache_dir(draft: Draft) -> str:
    """Where tokenized data and reference log-probabilities are kept: beside the checkpoint folder,
    for all runs there."""
    given = draft.path_option("cache_dir")
    beside = os.path.join(os.path.dirname(draft.spec.checkpoint_dir or "/"), "open-instruct-cache")
    found = given or beside
    reason = (
        "as the run says" if given else "beside `checkpoint.dir`, so that the runs there share it"
    )
    draft.decide(
        "open_instruct.cache_dir",
        found,
        reason + "; one folder per fingerprint of data, tokenizer and settings",
        draft.option_where("cache_dir") if given else "",
    )
    return found


def _caches(
    draft: Draft, model: data.Model, mixer: list[str], cache_dir: str, values: dict[str, object]
) -> str:
    """What `prepare_step.py` must know: what the tokenized data, and for DPO the reference, are
    made from."""
    names = draft.names
    made_from = (
        "max_seq_length",
        names.splits,
        names.transform,
        names.target,
        "chat_template_name",
        "get_tokenizer_fn",
        "add_bos",
        "use_fast",
        "tokenizer_name_or_path",
        "tokenizer_revision",
        "sft_messages_key",
        "model_revision",
    )
    reference_from = (
        "loss_type",
        "concatenated_forward",
        "packing",
        "max_train_samples",
        "use_lora",
        "use_qlora",
        "model_revision",
        "attn_implementation",
        "use_flash_attn",
    )
    needs_reference = draft.program == DPO and draft.get("loss_type") != "simpo"
    tokenizer = draft.values.get("tokenizer_name_or_path")
    content = {
        "schema_version": 1,
        "cache_dir": cache_dir,
        "program": {
            "commit": str(draft.options["commit"]),
            "entrypoint": str(draft.options["entrypoint"]),
        },
        "mixer": mixer,
        "dataset": {
            name: values[name] for name in sorted(made_from) if values.get(name) is not None
        },
        "tokenizer": tokenizer if isinstance(tokenizer, str) else model.folder or model.name,
        "model": {
            "name": model.name,
            "folder": model.folder,
            "alias": model.aliased,
            "revision": draft.get("model_revision") or "main",
        },
        "hf_home": draft.path_option("hf_home"),
        "offline": bool(draft.options["offline"]),
        "reference": (
            {name: draft.get(name) for name in sorted(reference_from) if draft.has(name)}
            if needs_reference
            else None
        ),
        "needed": [
            {"what": repo.what, "kind": repo.kind, "repo": repo.repo_id, "revision": repo.revision}
            for repo in (
                data.hub_repos(draft, model, mixer, draft.path_option("hf_home") or "/")
                if draft.options["offline"]
                else ()
            )
        ],
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _placeholders(
    folder: str, commit: str, model: data.Model, repos: tuple[HubRepo, ...]
) -> dict[str, str]:
    """What a rehearsal must show where an empty file would not do: a working copy at the commit,
    and a filled cache."""
    git, no_commit = os.path.join(folder, ".git"), "0" * 40
    found = {os.path.join(git, "HEAD"): commit.ljust(40, "0") + "\n"}
    found |= {os.path.join(git, name, "placeholder"): "\n" for name in ("objects", "refs")}
    models = [model.folder] if model.folder else []
    for repo in repos:
        known = hubcache.Repo(repo.kind, repo.repo_id, repo.revision)
        if repo.kind == "dataset":
            place = hubcache.prepared_folder(repo.home, repo.repo_id)
            found[os.path.join(place, "default", "0.0.0", no_commit, "dataset_info.json")] = "{}\n"
            continue
        place = hubcache.repo_folder(repo.home, known)
        found[os.path.join(place, "refs", repo.revision)] = no_commit
        models.append(os.path.join(place, "snapshots", no_commit))
    for place in models:
        found |= {
            os.path.join(place, name): "{}\n"
            for name in ("config.json", "model.safetensors", "tokenizer.json")
        }
    return found
