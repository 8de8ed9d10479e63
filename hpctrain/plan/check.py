"""What only the machine at hand can tell about a plan: files, the shell's environment, and Slurm's
own opinion."""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Iterator, Mapping, Sequence

from hpctrain.base.errors import Problem, Refused, UsageError
from hpctrain.config.run import RunSpec
from hpctrain.config.sbatch import overriding_inputs
from hpctrain.config.site import Site
from hpctrain.config.trust import find_doubt
from hpctrain.plan.load import Loaded
from hpctrain.plan.look.looks import look
from hpctrain.plan.look.program import shared_copies
from hpctrain.plan.look.reading import Reader, waited
from hpctrain.plan.make import Plan
from hpctrain.plan.run_dir import rendered
from hpctrain.recipes.contract import HubRepo
from hpctrain.recipes.facts import Copy
from hpctrain.slurm import answers
from hpctrain.slurm import commands as slurm

# Files that are no prefix of a .bin and .idx.
NOT_INDEXED = (".parquet", ".json", ".jsonl", ".arrow", ".csv")


def find_problems(loaded: Loaded) -> list[Problem]:
    """Every problem of the plan and of this machine, errors first. Nothing is written or submitted.

    Away from the site, what cannot be seen from here is a note; at the site it is an error.
    """
    plan = loaded.plan
    here = at_site(plan.site)
    reader = Reader()
    found = [
        *plan.problems,
        *_placeholders(plan),
        *waited(reader, lambda: _seen(plan, here, reader)),
        *secret_problems(plan),
        *_neighbours(plan),
        *shell_problems(os.environ, {one.option: one.value for one in plan.directives}),
    ]
    if not plan.errors:
        try:
            job = rendered(loaded)["job.sbatch"]
        except (UsageError, Refused) as error:  # a template of the user's own, or of another's
            found += error.problems
        else:
            found += _ask_slurm(plan, job, here)
    order = {"error": 0, "warning": 1, "note": 2}
    return sorted(dict.fromkeys(found), key=lambda problem: order[problem.level])


def problems_between(loaded: Sequence[Loaded]) -> list[Problem]:
    """What the stages of a pipeline cannot all have: one working copy at two versions."""
    copies = [
        (one.plan.spec.name, fact)
        for one in loaded
        for fact in one.plan.resolved.facts
        if isinstance(fact, Copy)
    ]
    return list(shared_copies(copies))


def _seen(plan: Plan, here: bool, reader: Reader) -> Iterator[Problem]:
    """What the file system says: what is missing, what is damaged, what does not fit the run."""
    yield from _files(plan, here, reader)
    yield from look(plan, here, reader)
    reader.turn_to(plan.spec.checkpoint_dir or plan.run_dir)
    yield from _checkpoints(plan)


def at_site(site: Site) -> bool:
    """Whether this machine is the site: by its Slurm's name, a login host's name, or, for a profile
    that names neither, any Slurm."""
    match = site.values["match"]
    host = os.uname().nodename  # as socket.gethostname, without loading sockets
    names = {host, host.split(".")[0]}
    if any(re.fullmatch(pattern, name) for pattern in match["hostnames"] for name in names):
        return True
    if match["cluster_name"]:
        # A sandbox takes the site's name but has none of its file systems.
        return "HPCTRAIN_SANDBOX" not in os.environ and bool(
            slurm.cluster_name() == match["cluster_name"]
        )
    return not match["hostnames"] and slurm.have("sbatch")


def _checkpoints(plan: Plan) -> Iterator[Problem]:
    """What the guard would say; it is loaded where something lies there for it to judge."""
    spec, facts = plan.spec, plan.resolved.guard
    places = (spec.checkpoint_dir, spec.checkpoint_start, os.path.join(plan.run_dir, "links.jsonl"))
    there = any(place and os.path.lexists(place) for place in places)
    if there or spec.handed or facts.start_folder:
        from hpctrain.plan.checkpoints import checkpoint_problems

        yield from checkpoint_problems(plan)


def _files(plan: Plan, here: bool, reader: Reader) -> Iterator[Problem]:
    """What the job needs and is not there: an error at the site, a note away from it."""
    suffix = "" if here else f", which is no surprise away from {plan.site.name}"
    told: set[str] = set()
    for what, path, where, hint in _wanted(plan):
        reader.turn_to(path)
        if path in told or os.path.exists(path):
            continue
        told.add(path)
        level = "error" if here else "note"
        yield Problem(
            f"the {what} `{path.rstrip('/')}` is not there{suffix}", where, "", hint, level
        )
    yield from _checkpoint_folder(plan, here, reader)


def _wanted(plan: Plan) -> Iterator[tuple[str, str, str, str]]:
    """(what, path, where, hint) of everything that must be there; a folder ends in a slash."""
    spec = plan.spec
    if spec.container:
        yield "container", spec.container, spec.where("container"), ""
    handed = spec.handed is not None and spec.handed.hand_over == "checkpoint"
    if spec.checkpoint_start and not handed:
        start = os.path.join(spec.checkpoint_start, "")
        yield "start checkpoint", start, spec.where("checkpoint", "start"), ""
    if spec.after_each:
        where = spec.where("chain", "after_each")
        yield "script of `chain.after_each`", spec.after_each, where, ""
    yield from _wanted_data(plan)
    for what, path, where in plan.resolved.paths:
        if not _yet_to_be_made(spec, path):
            yield what, path, where, ""
    for repo in plan.resolved.hub:
        from hpctrain.runtime import hubcache

        known = hubcache.Repo(repo.kind, repo.repo_id, repo.revision)
        for path in hubcache.missing(repo.home, known):
            yield f"{repo.what} `{repo.repo_id}`:", path, repo.where, _download_hint(repo)


def _wanted_data(plan: Plan) -> Iterator[tuple[str, str, str, str]]:
    named = {path for _, path, _ in plan.resolved.paths}  # the recipe reads these as they are
    hint = "`hpctrain tokenize` makes such a pair; name it without .bin"
    for kind, paths in plan.spec.data.items():
        for index, path in enumerate(paths):
            where = plan.spec.where("data", kind, index)
            if path in named or os.path.exists(path):
                continue
            if path.endswith(NOT_INDEXED):  # named by a recipe that could not be worked out
                yield f"{kind} data", path, where, ""
                continue
            for ending in (".bin", ".idx"):
                yield f"{kind} data file", path + ending, where, hint


def _checkpoint_folder(plan: Plan, here: bool, reader: Reader) -> Iterator[Problem]:
    """A checkpoint folder that can never be made, or not by this user."""
    spec = plan.spec
    path, where = spec.checkpoint_dir, spec.where("checkpoint", "dir")
    if not path:
        return
    reader.turn_to(path)
    parent = _nearest_existing(path)
    if not os.path.isdir(parent):
        what = "is a file" if parent == path else f"would lie inside the file `{parent}`"
        yield Problem(f"the checkpoint folder `{path}` {what}", where, hint="name a folder")
    elif path.split(os.sep)[1:2][0] in ("proc", "sys", "dev"):
        why = "the kernel makes what is there; nothing can be kept in it"
        yield Problem(f"the checkpoint folder `{path}` is on no disk", where, why)
    elif not os.access(parent, os.W_OK):
        gone = "" if parent == path else " is not there and"
        away = "" if here else f", which is no surprise away from {plan.site.name}"
        yield Problem(
            f"the checkpoint folder `{path}`{gone} cannot be written{away}",
            where,
            why=f"`{parent}` is not yours to write",
            level="error" if here else "note",
        )


def _yet_to_be_made(spec: RunSpec, path: str) -> bool:
    model = spec.handed.model if spec.handed else None
    return model is not None and (path + "/").startswith(model + "/")


def _placeholders(plan: Plan) -> Iterator[Problem]:
    """What `hpctrain init` wrote as an example and nobody has changed."""
    example = plan.site.values["account"]["example"]
    if example and plan.spec.account == example:
        where = plan.spec.where("account")
        yield Problem(
            f"`account: {example}` is only the profile's example",
            where,
            level="warning",
            hint="name your own",
        )


def secret_problems(plan: Plan) -> Iterator[Problem]:
    """What is wrong with the run's secrets file: missing, no plain file, readable by others, not
    KEY=VALUE."""
    spec = plan.spec
    if not spec.secrets:
        return
    path = os.path.join(spec.base_dir, os.path.expanduser(spec.secrets))
    where = spec.where("secrets")
    try:
        status = os.lstat(path)
    except OSError as error:
        level = "error" if at_site(plan.site) else "note"
        yield Problem(
            f"the secrets file `{spec.secrets}` cannot be read: {error.strerror}",
            where,
            level=level,
        )
        return
    if not stat.S_ISREG(status.st_mode):
        yield Problem(
            f"the secrets file `{spec.secrets}` is not a plain file",
            where,
            hint="no symlinks: name the file itself",
        )
    elif status.st_mode & 0o077:
        yield Problem(
            f"others can read the secrets file `{spec.secrets}` (mode"
            f" {stat.S_IMODE(status.st_mode):04o})",
            where,
            hint=f"chmod 600 {spec.secrets}",
        )
    elif status.st_uid != os.getuid():
        yield Problem(f"the secrets file `{spec.secrets}` belongs to someone else", where)
    else:
        yield from _secret_lines(path, where)


def _neighbours(plan: Plan) -> Iterator[Problem]:
    """Who else could change what the jobs run."""
    doubt = find_doubt(plan.run_dir)
    if doubt:
        yield Problem(
            f"somebody else could change what the jobs run: {doubt.why}",
            where=plan.run_dir,
            why="with `secrets:` whoever can do that can read them" if plan.spec.secrets else "",
            hint=doubt.remedy,
            level="error" if plan.spec.secrets else "warning",
        )


def _secret_lines(path: str, where: str) -> Iterator[Problem]:
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            # Never show the line: it may hold half of a secret.
            if not re.match(r"(export[ \t])?[A-Za-z_][A-Za-z0-9_]*=", text):
                yield Problem(f"line {number} of the secrets file is not KEY=VALUE", where)
            elif re.search(r"""=(["']).*\1$""", text):
                what = f"line {number} of the secrets file has quotes around its value"
                why = "values are read as they stand, so the quotes are part of it"
                yield Problem(what, where, why, hint="delete them", level="warning")


def shell_problems(environment: Mapping[str, str], asked: Mapping[str, str]) -> Iterator[Problem]:
    """Variables of this shell that would change a job with the options `asked`, submitted with
    plain sbatch."""
    names = overriding_inputs(environment, asked)
    if names:
        yield Problem(
            f"this shell sets {', '.join(names)}, which sbatch takes before the job script's own"
            " options",
            level="warning",
            why="`hpctrain chain` submits without them; a plain sbatch does not (man sbatch)",
            hint=f"unset {' '.join(names)}",
        )


def _ask_slurm(plan: Plan, job: str, here: bool) -> Iterator[Problem]:
    if not slurm.have("sbatch"):
        yield Problem("there is no Slurm here, so its own opinion was not asked", level="note")
        return
    import tempfile  # only here: where there is no Slurm, nothing is asked

    with tempfile.NamedTemporaryFile("w", suffix=".sbatch", encoding="utf-8") as script:
        script.write(job)
        script.flush()
        try:
            accepted, words = slurm.test_only(script.name)
        except slurm.NoAnswer as error:
            silent = error.problems[0]
            level = "warning" if here else "note"
            yield Problem(
                f"{silent.what}; its own opinion is not known", hint=silent.hint, level=level
            )
            return
    where = next((one.value for one in plan.directives if one.option == "partition"), None)
    if not accepted and answers.says_not_now(words):
        if slurm.may_be_down(where, plan.spec.num_nodes):
            yield Problem(
                f"Slurm cannot say when it could start: {words}",
                level="warning",
                why="nodes that it may need are down, drained or reserved now; a job would wait",
                hint="`sinfo -R` shows why",
            )
            return
    if accepted:
        yield Problem(f"Slurm would take it: {words.split('; ')[-1]}", level="note")
    elif here or slurm.cluster_name() == plan.site.values["match"]["cluster_name"]:
        yield Problem(f"Slurm would refuse it: {words}", hint=answers.shown_by(words))
    else:
        yield Problem(
            f"the Slurm here is not {plan.site.name}'s, and would refuse it: {words}", level="note"
        )


def _download_hint(repo: HubRepo) -> str:
    """How to fill the cache, on a machine that may ask the hub."""
    if repo.kind == "dataset":
        load = f"import datasets; datasets.load_dataset({repo.repo_id!r})"
        return f'where the hub can be reached: HF_HOME={shlex.quote(repo.home)} python -c "{load}"'
    revision = "" if repo.revision == "main" else f" --revision {shlex.quote(repo.revision)}"
    return (
        f"where the hub can be reached: HF_HOME={shlex.quote(repo.home)} hf download"
        f" {repo.repo_id}{revision}"
    )


def _nearest_existing(path: str) -> str:
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path
