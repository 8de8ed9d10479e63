"""run.yaml: the one file a person edits, read with its layers into a frozen RunSpec, all problems
at once."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.base.errors import EnvironmentFault, Problem, UsageError
from hpctrain.config.document import Document, load_yaml, merge, parse_set
from hpctrain.config.fields import Field, check
from hpctrain.config.sbatch import check_options, check_srun_options
from hpctrain.config.site import ENV_NAME, NAME
from hpctrain.config.trust import user_config

_SLURM_WORD = r"[A-Za-z0-9_][A-Za-z0-9_@.+-]{0,127}"
# Set by hpctrain or by Slurm in every job; a value of the user's would break the rendezvous or the
# guard.
RESERVED_ENV = re.compile(
    r"(SLURM|SBATCH|SRUN|HPCTRAIN|PMIX?)_.*|RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE"
    r"|MASTER_ADDR|MASTER_PORT"
    r"|NODE_RANK|BASH_ENV|ENV|SHELLOPTS|BASHOPTS|IFS|PATH_SEPARATOR"
)
SECRET_ENV = re.compile(
    r".*(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE_KEY).*|.*_(PAT|PASS)",
    re.IGNORECASE,
)
NOT_SECRET_ENV = re.compile(
    r"TOKENIZERS?_.*|.*_TOKENS?_PER_.*|.*MAX_TOKENS?.*|HF_TOKEN_PATH|.*_(FILE|PATH)", re.IGNORECASE
)

# What tokens look like, by those who give them out; of a URL the password.
SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}"
    r"|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16})|://[^/\s:@]*:[^/\s@$][^/\s@]*@"
)
# Such as a key of wandb, which only what stands before it tells from a commit.
_HEX = re.compile(r"(?:.*[=:\s])?[0-9a-fA-F]{32,}")
_KEY_WORD = re.compile(r"key|token(?!i)|secret|passw|credential|auth(?!or)", re.IGNORECASE)

FIELDS: dict[str, Field] = {
    "name": Field(
        "text",
        "the run's name: its folder, its job name",
        required=True,
        pattern=NAME,
        shape="a name",
    ),
    "site": Field("text", "a site profile's name, or a path to one", required=True),
    "recipe": Field(
        "text",
        "what trains: see `hpctrain recipe list`",
        required=True,
        pattern=NAME,
        shape="a recipe's name",
    ),
    "account": Field(
        "text", "the Slurm account that pays", pattern=_SLURM_WORD, shape="a Slurm account"
    ),
    "partition": Field(
        "text",
        "the Slurm partition, or several with commas; omitted: hpctrain picks one",
        pattern=f"{_SLURM_WORD}(,{_SLURM_WORD})*",
        shape="a partition",
    ),
    "nodes": Field("int", "number of nodes", default=1, minimum=1, maximum=100_000),
    "time": Field("time", "wall time of one job: 20:00:00, 20h, 1-00:00:00", required=True),
    "gpus_per_node": Field(
        "int", "GPUs a node, when fewer than all (as Slurm counts them)", minimum=0, maximum=64
    ),
    "tasks_per_node": Field(
        "int", "tasks a node, where the recipe leaves it open", minimum=1, maximum=4096
    ),
    "container": Field("path", "the container image"),
    "container_binds": Field(
        "list",
        "more paths bound into it",
        items=Field("path", "src[:dst[:opts]]", pattern=r"[^,]+", shape="one path"),
    ),
    "checkpoint": Field(
        "table",
        "where the run begins and saves",
        fields={
            "start": Field("path", "the checkpoint to start from; omitted: from scratch"),
            "dir": Field("path", "the folder it loads from and saves to"),
        },
    ),
    "data": Field(
        "table",
        "the input data",
        fields={
            key: Field(
                "list",
                f"{what} data: prefixes of .bin/.idx pairs, or files",
                items=Field("path", "a prefix or file"),
            )
            for key, what in (("train", "training"), ("valid", "validation"), ("test", "test"))
        },
    ),
    "chain": Field(
        "table",
        "the chain of jobs",
        fields={
            "jobs": Field("int", "links queued at once", default=1, minimum=1, maximum=1000),
            "give_up_after": Field(
                "int",
                "links without a new checkpoint until it gives up",
                default=3,
                minimum=1,
                maximum=1000,
            ),
            "after_each": Field(
                "path", "a job script to run after each link that made a new checkpoint"
            ),
        },
    ),
    "preflight": Field(
        "table",
        "look at the nodes as the job's first step: true, or a mapping",
        switch=True,
        fields={
            "policy": Field(
                "text",
                "what to do about bad nodes: warn, exclude (and requeue), stop; omitted: exclude"
                " where the job may be requeued, else warn",
                choices=("warn", "exclude", "stop"),
            ),
            "slow_is_bad": Field(
                "bool", "nodes at less than half of the others' speed count as bad", default=False
            ),
            "requeues": Field(
                "int",
                "how often one job may put itself back for the sake of its nodes",
                default=3,
                minimum=1,
                maximum=20,
            ),
            "limit_s": Field(
                "int",
                "seconds after which the look is ended, and ranks that are not done count as bad",
                default=300,
                minimum=10,
                maximum=7200,
            ),
            "mib": Field(
                "int",
                "size of the blocks that ranks send each other",
                default=8,
                minimum=1,
                maximum=1024,
            ),
            "python": Field("text", "the Python that measures [default: the recipe's]"),
        },
    ),
    "estimate": Field(
        "table",
        "what was measured, for cadence, cost and memory",
        fields={
            "step_time_s": Field("number", "seconds a training iteration takes", minimum=0.001),
            "save_time_s": Field("number", "seconds a checkpoint takes", minimum=0),
            "memory_gib": Field(
                "number",
                "peak memory of the fullest GPU, in GiB; stands in for hpctrain's own estimate",
                minimum=0.1,
            ),
        },
    ),
    "config": Field(
        "map", "overlaid on the recipe's training configuration", items=Field("any", "any value")
    ),
    "recipe_options": Field(
        "map",
        "what the recipe declares: see `hpctrain recipe show`",
        items=Field("any", "any value", multiline=True),
    ),
    "env": Field(
        "map",
        "environment variables of the job",
        keys=ENV_NAME,
        items=Field("scalar", "the value", multiline=True),
    ),
    "modules": Field(
        "list", "environment modules of the job, after the site's", items=Field("text", "a module")
    ),
    "setup": Field(
        "text",
        "lines of bash that the job runs before its step, on its first node, in the working"
        " directory,"
        " outside strict mode; where they `cd` to, the step starts",
        multiline=True,
    ),
    "task_setup": Field(
        "text",
        "lines of bash that every task runs on its node before the program, outside strict mode",
        multiline=True,
    ),
    "srun": Field(
        "map",
        "more options of the step's srun, by long name",
        keys="[a-z][a-z0-9-]*",
        items=Field("scalar", "the value"),
    ),
    "sbatch": Field(
        "map",
        "more sbatch options, by long name",
        keys="[a-z][a-z0-9-]*",
        items=Field("scalar", "the value"),
    ),
    "watch": Field(
        "text",
        "beside the step: end it when it is stuck (its output is silent for more than five of its"
        " steps and half an hour), after the stacks of all ranks were kept; and when the"
        " loss is NaN: tell, save_and_stop after the next checkpoint, or hold (end the step, start"
        " no other); off: none of it",
        choices=("off", "tell", "save_and_stop", "hold"),
        default="tell",
    ),
    "notify": Field(
        "text",
        "told from the batch host on start, end, failure, give-up and done: an http(s) URL that gets"
        " JSON, $NAME of a variable of `secrets:` that holds one, or a command that gets it on stdin",
    ),
    "secrets": Field(
        "path", "file of KEY=VALUE lines, mode 0600, read as it stands inside the job, never copied"
    ),
}


@dataclass(frozen=True)
class Handed:
    """What an earlier stage of a pipeline hands to a run when it starts; paths absolute.

    `hand_over` is `checkpoint` or `model`; `way`: symlink, copy or hardlink. `checkpoint` is what
    is expected, None where the earlier stage does not say at which iteration it ends;
    `checkpoint_dir` holds it. `model`: a model's folder.
    """

    stage: str
    run_dir: str
    hand_over: str
    way: str
    checkpoint: str | None
    checkpoint_dir: str | None
    model: str | None


@dataclass(frozen=True)
class RunSpec:
    """A checked run.yaml. Times in seconds; paths absolute (relative ones were relative to
    run.yaml)."""

    name: str
    site: str
    recipe: str
    account: str | None
    partition: str | None
    num_nodes: int
    time_s: int
    gpus_per_node: int | None
    tasks_per_node: int | None
    container: str | None
    container_binds: tuple[str, ...]
    checkpoint_start: str | None
    checkpoint_dir: str | None
    data: Mapping[str, tuple[str, ...]]
    num_links: int
    give_up_after: int
    after_each: str | None
    preflight: Mapping[str, Any] | None
    step_time_s: float | None
    save_time_s: float | None
    memory_gib: float | None
    config: Mapping[str, Any]
    recipe_options: Mapping[str, Any]
    env: Mapping[str, str]
    sbatch: Mapping[str, Any]
    srun: Mapping[str, Any]
    modules: tuple[str, ...]
    setup: str
    task_setup: str
    secrets: str | None
    notify: str | None
    watch: str
    document: Document
    base_dir: str
    source: str
    handed: Handed | None = None

    @property
    def has_start(self) -> bool:
        """Whether the first link starts from a checkpoint, one that an earlier stage is yet to make
        included.

        `checkpoint_start` is None where that one's iteration is not known before the link starts.
        """
        handed = self.handed is not None and self.handed.hand_over == "checkpoint"
        return self.checkpoint_start is not None or handed

    def where(self, *path: Any) -> str:
        """`file:line:column` of a value of run.yaml or of the layer it came from."""
        return self.document.where(*path)


def read_layers(
    path: str, assignments: Sequence[str] = (), overlay: Document | None = None
) -> list[Document]:
    """The layers above the recipe and the site, weakest first: user config, run.yaml, a pipeline's
    overlay, `--set`. Keys given twice and the like are in run.yaml's `problems`."""
    try:
        run = load_yaml(path, tolerate=True)
    except EnvironmentFault as error:
        if not os.path.exists(path):
            raise EnvironmentFault(
                f"there is no `{path}`",
                hint="name the file, or write one with `hpctrain init --recipe R --site S`",
            ) from error
        raise
    except UsageError:
        refuse_script(path)
        raise
    if not isinstance(run.data, dict):
        refuse_script(path)
    if run.data is None:
        raise UsageError(
            "the file is empty", where=path, hint="`hpctrain init` writes one to start from"
        )
    if not isinstance(run.data, dict):
        raise UsageError("a run.yaml is a mapping of keys to values", where=run.where())
    if isinstance(run.data.get("stages"), dict) and "recipe" not in run.data:
        raise UsageError(
            f"`{path}` is a pipeline, and this needs a run",
            where=run.where_key("stages"),
            hint=(
                "`hpctrain pipeline --dry-run` plans all its stages; name one stage's run.yaml here"
            ),
        )
    above = [*([overlay] if overlay else []), parse_set(assignments)]
    user = user_layers(merge([run, *above]).get("site"))
    return [*user, run, *above]


def looks_like_script(text: str) -> bool:
    """Whether a text is a job script rather than a run.yaml."""
    return text.startswith("#!") or re.search(r"^#SBATCH\s", text, re.M) is not None


def refuse_script(path: str) -> None:
    """Raises UsageError where the file is a job script; what is no plain file is not opened."""
    if not os.path.isfile(path):
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        if looks_like_script(file.read(1 << 16)):
            raise UsageError(
                f"`{path}` is a job script, and this needs a run.yaml",
                hint=f"`hpctrain import {shlex.quote(path)}` makes one of it",
            )


def spec_from_layers(
    layers: Sequence[Document], source: str, handed: Handed | None = None
) -> tuple[RunSpec, list[Problem]]:
    """The RunSpec of merged layers and every problem. With problems it is a best guess, good for
    finding more of them. Raises UsageError for a token in it, before any value is shown."""
    document = merge(layers)
    check_secrets(document)
    values, problems = check(document, FIELDS)
    problems = [*document.problems, *problems]
    problems += list(_env_problems(document, values["env"]))
    problems += check_options(values["sbatch"], lambda key: document.where_key("sbatch", key))
    problems += check_srun_options(values["srun"], lambda key: document.where_key("srun", key))
    base_dir = os.path.dirname(os.path.abspath(source))

    checkpoint, chain = values["checkpoint"], values["chain"]
    data = {key: values["data"].get(key) or [] for key in ("train", "valid", "test")}

    def path(value: str | None) -> str | None:
        return absolute(value, base_dir) if isinstance(value, str) and value else None

    start = path(checkpoint.get("start"))
    if handed and handed.hand_over == "checkpoint":
        # A start in the earlier stage's own folder says the same, for when the run is queued
        # without the pipeline.
        if start and not (start + "/").startswith((handed.checkpoint_dir or "\0") + "/"):
            problems.append(
                Problem(
                    f"`checkpoint.start` is given, and stage `{handed.stage}` hands over a"
                    " checkpoint",
                    where=document.where("checkpoint", "start"),
                    hint="delete one of them",
                )
            )
        start = handed.checkpoint
    spec = RunSpec(
        name=values["name"] or "unnamed",
        site=values["site"] or "",
        recipe=values["recipe"] or "",
        account=values["account"],
        partition=values["partition"],
        num_nodes=values["nodes"] or 1,
        time_s=values["time"] or 3600,
        gpus_per_node=values["gpus_per_node"],
        tasks_per_node=values["tasks_per_node"],
        container=path(values["container"]),
        container_binds=tuple(filter(None, values["container_binds"])),
        checkpoint_start=start,
        checkpoint_dir=path(checkpoint.get("dir")),
        data={
            key: tuple(absolute(item, base_dir) for item in items if item)
            for key, items in data.items()
        },
        num_links=chain.get("jobs") or 1,
        give_up_after=chain.get("give_up_after") or 3,
        after_each=path(chain.get("after_each")),
        preflight=values["preflight"],
        step_time_s=values["estimate"].get("step_time_s"),
        save_time_s=values["estimate"].get("save_time_s"),
        memory_gib=values["estimate"].get("memory_gib"),
        config=values["config"],
        recipe_options=values["recipe_options"],
        env={name: _env_text(value) for name, value in values["env"].items()},
        sbatch=values["sbatch"],
        srun=values["srun"],
        modules=tuple(filter(None, values["modules"])),
        setup=values["setup"] or "",
        task_setup=values["task_setup"] or "",
        secrets=values["secrets"],
        notify=values["notify"],
        watch=values["watch"],
        document=document,
        base_dir=base_dir,
        source=source,
        handed=handed,
    )
    return spec, problems


def absolute(path: str, base_dir: str) -> str:
    """`path` made absolute against the folder of run.yaml, `~` expanded, slashes and dots tidied;
    links not resolved."""
    return os.path.normpath(os.path.join(base_dir, os.path.expanduser(path)))


def user_layers(site: Any) -> list[Document]:
    """The user's config: run.yaml keys for every run, and under `sites: {NAME: …}` for one site."""
    document = user_config()
    if document is None:
        return []
    everywhere = Document(
        {key: value for key, value in document.data.items() if key not in ("sites", "trusted")},
        document.origins,
        document.key_origins,
        document.name,
    )
    mine = document.section("sites", site) if isinstance(site, str) else Document({})
    return [everywhere, mine] if mine.data else [everywhere]


def _env_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _env_problems(document: Document, env: Mapping[str, Any]) -> Iterator[Problem]:
    for name in env:
        where = document.where_key("env", name)
        if RESERVED_ENV.fullmatch(name):
            yield Problem(
                f"`env.{name}` is set by hpctrain or Slurm in every job",
                where=where,
                hint="delete it",
            )
        elif (
            SECRET_ENV.fullmatch(name)
            and not NOT_SECRET_ENV.fullmatch(name)
            and not str(env[name]).startswith(("/", "~"))
        ):
            yield Problem(
                f"`env.{name}` looks like a secret, and what is in run.yaml ends up in the job"
                " script",
                where=where,
                hint=f"put the line {name}=… into a file of mode 0600 and name it under `secrets:`",
            )
        elif re.search(r"\$\{?[A-Za-z_]", str(env[name])):
            yield Problem(
                f"`env.{name}` is exported as it stands, `$` and all",
                where=document.where("env", name),
                hint=f"a line of `setup:` fills it in: export {name}=…",
                level="warning",
            )


def check_secrets(document: Document) -> None:
    """Raises UsageError for every value that is a token or holds a password; none is shown."""
    problems = []
    for path, before, value in _texts(document.data, (), ""):
        word = f"{before} {value.partition('=')[0] if '=' in value else ''}"
        if SECRET_VALUE.search(value) or (_HEX.fullmatch(value) and _KEY_WORD.search(word)):
            problems.append(
                Problem(
                    f"`{'.'.join(map(str, path))}` holds what looks like a token or a password",
                    where=document.where(*path),
                    why="what stands here ends up in scripts, in lists of processes and in logs",
                    hint=(
                        "put it as a line NAME=… into a file of mode 0600, name that under"
                        " `secrets:`, and let the program read $NAME"
                    ),
                )
            )
    if problems:
        raise UsageError(problems)


def _texts(node: Any, path: tuple[Any, ...], before: str) -> Iterator[tuple[Any, str, str]]:
    """(path, its key or the word of a list before it, text) of every text below `node`."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _texts(value, (*path, key), str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _texts(value, (*path, index), str(node[index - 1]) if index else before)
    elif isinstance(node, str):
        yield path, before, node
