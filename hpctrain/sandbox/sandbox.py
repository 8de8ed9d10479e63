"""Sandboxes: up, down, status, fault. Each call leaves a sandbox either running and recorded, or
gone."""

from __future__ import annotations

import contextlib
import os
import pwd
import py_compile
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpctrain.base import units
from hpctrain.base.errors import EnvironmentFault, Refused, UsageError
from hpctrain.base.paths import shipped_dir
from hpctrain.sandbox import leftovers, nodeview, packages, processes, shape, state
from hpctrain.sandbox.daemons import Daemons
from hpctrain.sandbox.packages import Toolbox
from hpctrain.sandbox.shape import ClusterShape, Place
from hpctrain.sandbox.standins import files as standins
from hpctrain.sandbox.state import Record

Report = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Status:
    """What a sandbox is now. `phase` is up, half-alive, starting, down, elsewhere (on another
    machine) or out of sight (in another namespace of this one)."""

    name: str
    state: Path
    phase: str
    record: Record | None = None
    nodes: Mapping[str, str] | None = None
    num_jobs: int = 0
    num_processes: int = 0
    # Slurm itself notices a dead slurmd only after SlurmdTimeout
    nodes_without_slurmd: tuple[str, ...] = ()

    @property
    def slurm_conf(self) -> str:
        return str(self.state / "etc" / "slurm.conf")

    @property
    def bin_dir(self) -> str:
        return str(self.state / "bin")


def up(
    wanted: ClusterShape,
    name: str,
    directory: Path,
    environ: Mapping[str, str],
    *,
    source: str = "auto",
    report: Report = lambda text: None,
    progress: Progress = lambda what, done, total: None,
) -> tuple[Status, bool]:
    """A running sandbox of this shape in `directory`, and whether it had to be started.

    Whatever an earlier, crashed `up` left there is ended first. Any failure, also Ctrl-C, SIGTERM
    and SIGHUP, ends every process that was started and removes the files but the logs. Raises
    Refused when a sandbox of another shape is running there.
    """
    shape.check(wanted)
    state.claim(directory)
    with state.locked(directory), signals_interrupt():
        before = _look(name, directory)
        if before.phase == "elsewhere" and before.record is not None:
            raise Refused(
                f"this sandbox belongs to the machine `{before.record.host}`",
                where=str(directory),
                hint="use another --name here",
            )
        if before.phase == "up" and before.record is not None:
            if before.record.shape == wanted:
                return status(name, directory, environ), False
            raise Refused(
                f"a sandbox of another shape is running: {describe(before.record.shape)}",
                where=str(directory),
                why=f"asked for: {describe(wanted)}",
                hint=(
                    f"hpctrain sandbox down --name {name}, or start this one beside it with --name"
                ),
            )
        run = state.run_dir(directory, environ)
        if before.phase in ("starting", "half-alive") or processes.of_sandbox(
            str(directory), str(run)
        ):
            report("clearing away what an earlier sandbox left here")
        _clear(directory, run, keep_logs=False)
        box = packages.find(environ, source=source, accounting=wanted.accounting, report=report)
        try:
            _start(wanted, name, directory, run, box, environ, progress)
            return status(name, directory, environ), True
        except BaseException as error:
            is_full = state.is_full(directory, error)  # now: what is cleared away makes room
            with signals_ignored():
                _clear(directory, run, keep_logs=True)
            if is_full:
                raise state.DiskFull(directory, error) from error
            raise


def down(
    name: str, directory: Path, environ: Mapping[str, str], *, keep_logs: bool = False
) -> bool:
    """End a sandbox: exactly its own processes and files; whether there was anything to end."""
    if not directory.is_dir():
        return False
    with state.locked(directory):
        found = _look(name, directory)
        if found.phase == "elsewhere" and found.record is not None:
            raise Refused(
                f"this sandbox runs on `{found.record.host}`",
                where=str(directory),
                hint="end it there",
            )
        run = Path(found.record.place.run) if found.record else state.run_dir(directory, environ)
        had = found.record is not None or bool(processes.of_sandbox(str(directory), str(run)))
        if not had and not (directory / "etc").is_dir():
            return False
        with signals_ignored():
            _clear(directory, run, keep_logs=keep_logs)
        return had


def status(name: str, directory: Path, environ: Mapping[str, str]) -> Status:
    """What the sandbox is now; asks its controller, starts nothing."""
    found = _look(name, directory)
    if found.record is None or found.phase != "up":
        return found
    daemons = Daemons(
        found.record.shape, found.record.place, _toolbox(found.record, environ), environ
    )
    jobs = daemons.run("squeue", "-h", "-o", "%A", timeout_s=20).stdout.split()
    count = len(processes.of_sandbox(str(directory), found.record.place.run))
    names = found.record.shape.node_names if found.record.shape.runs_nodes else []
    silent = tuple(node for node in names if not daemons.is_running(f"slurmd-{node}"))
    return Status(
        name, directory, found.phase, found.record, daemons.node_states(), len(jobs), count, silent
    )


def fault(
    names: str, action: str, name: str, directory: Path, environ: Mapping[str, str]
) -> list[str]:
    """Make nodes fail or come back; returns their names. Actions:

    `down`: the administrator sets the node down, its jobs are killed and requeued. `drain`: it
    takes no new jobs. `resume`: both ended. `kill-slurmd`: its daemon is gone, its tasks run on.
    `crash`: daemon and tasks are gone, as when a node loses power; the controller notices after
    SlurmdTimeout. `restart-slurmd`: its daemon is started again.
    """
    record = running(name, directory)
    try:
        nodes = units.expand_nodes(names)
    except ValueError as error:
        raise UsageError(str(error)) from error
    unknown = [node for node in nodes if node not in set(record.shape.node_names)]
    if unknown or not nodes:
        there = units.compress_nodes(record.shape.node_names)
        raise UsageError(
            f"there is no node {', '.join(map(repr, unknown))}", hint=f"the sandbox has {there}"
        )
    daemons = Daemons(record.shape, record.place, _toolbox(record, environ), environ)
    if action in ("down", "drain", "resume"):
        arguments = ["update", f"nodename={units.compress_nodes(nodes)}", f"state={action}"]
        arguments += [] if action == "resume" else ["reason=hpctrain sandbox fault"]
        result = daemons.run("scontrol", *arguments)
        if result.returncode:
            raise EnvironmentFault(
                f"scontrol could not {action} {names}", why=(result.stdout + result.stderr).strip()
            )
        return nodes
    with state.locked(directory):
        for node in nodes:
            role = processes.of_role(f"slurmd-{node}", state=str(directory), run=record.place.run)
            if action == "kill-slurmd" and role is not None:
                everything = processes.of_sandbox(str(directory), record.place.run)
                processes.kill([role, *(child for child in everything if child.parent == role.pid)])
            elif action == "crash":
                processes.kill(processes.of_node(node, str(directory), record.place.run))
        if action == "restart-slurmd":
            daemons.start_nodes(nodes)
    return nodes


def running(name: str, directory: Path) -> Record:
    """The record of a running sandbox. Raises EnvironmentFault when it is not up."""
    found = _look(name, directory)
    if found.record is None or found.phase != "up":
        word = {"down": "not running", "elsewhere": "running on another machine"}.get(
            found.phase, found.phase
        )
        raise EnvironmentFault(
            f"the sandbox `{name}` is {word}",
            where=str(directory),
            hint=f"hpctrain sandbox up --name {name}",
        )
    return found.record


def shell_environ(record: Record, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment in which plain sbatch, squeue, srun talk to the sandbox; options of other
    Slurms are dropped."""
    kept = {
        key: value
        for key, value in environ.items()
        if not key.startswith(("SLURM_", "SBATCH_", "SRUN_", "SALLOC_"))
    }
    bin_dir = f"{record.place.state}/bin"
    path = [entry for entry in kept.get("PATH", os.defpath).split(":") if entry != bin_dir]
    kept["PATH"] = ":".join([bin_dir, *path])
    kept["SLURM_CONF"] = f"{record.place.state}/etc/slurm.conf"
    kept["HPCTRAIN_SANDBOX"] = record.name
    return kept


def shell_argv(record: Record, words: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The command line that runs `words` as on the login node: where the site's paths are mounted,
    they are there."""
    if not record.shape.mounts:
        return list(words)
    box = _toolbox(record, environ)
    return [*nodeview.view_argv(box.argv("bwrap"), record.shape.mounts), *words]


def describe(what: ClusterShape) -> str:
    """One line about a shape, for people."""
    groups = ", ".join(f"{group.num_nodes} x {group.type_name}" for group in what.groups)
    return f"{what.name}, {groups}{', accounting' if what.accounting else ''}"


def _look(name: str, directory: Path) -> Status:
    try:
        record = state.load(directory) if directory.is_dir() else None
    except EnvironmentFault:
        return Status(name, directory, "starting")
    if record is None:
        return Status(name, directory, "down")
    host, boot_id = state.host_identity()
    if record.host != host:
        return Status(name, directory, "elsewhere", record)
    if record.boot_id != boot_id:
        return Status(name, directory, "half-alive", record)
    if record.phase != "up":
        return Status(name, directory, "starting", record)
    core = ["munged", "slurmctld", *(("mariadbd", "slurmdbd") if record.shape.accounting else ())]
    alive = all(
        processes.of_role(role, state=str(directory), run=record.place.run) for role in core
    )
    if not alive and processes.out_of_sight(str(directory), record.place.run):
        return Status(name, directory, "out of sight", record)
    return Status(name, directory, "up" if alive else "half-alive", record)


def _start(
    wanted: ClusterShape,
    name: str,
    directory: Path,
    run: Path,
    box: Toolbox,
    environ: Mapping[str, str],
    progress: Progress,
) -> None:
    no_views = nodeview.unavailable(box)
    nodeview.check_mounts(wanted.mounts, no_views)
    with state.reserve_ports(wanted.num_nodes) as (ports, block):
        place = Place(
            state=str(directory),
            run=str(run),
            user=_user_name(),
            ports=ports,
            plugin_dir=box.plugin_dir,
            # Rendezvous ports are made from job ids: those of two sandboxes must not meet.
            first_job_id=1000 + 100 * block,
            has_lua=box.has_lua,
            has_views=not no_views,
        )
        host, boot_id = state.host_identity()
        record = Record(name, "starting", host, boot_id, wanted, place, box.root, box.version)
        state.save(directory, record)
        _write_files(record, box, no_views)
        daemons = Daemons(wanted, place, box, environ)
        daemons.start_munge()
        if wanted.accounting:
            progress("starting the accounting database", 0, 0)
            daemons.start_accounting()
        daemons.start_controller()
        total = wanted.num_nodes
        if wanted.runs_nodes:
            daemons.start_nodes(
                wanted.node_names, lambda done: progress("starting nodes", done, total)
            )
            daemons.wait_idle(lambda done: progress("nodes idle", done, total))
        state.save(directory, record.in_phase("up"))


def _write_files(record: Record, box: Toolbox, no_views: str) -> None:
    place, wanted = record.place, record.shape
    directory, run = Path(place.state), Path(place.run)
    state.make_private(run)
    for folder in ("etc", "bin", "log", "ctld", "dev"):
        (directory / folder).mkdir(mode=0o700, exist_ok=True)
    for folder in ("here", "spool", "tmp", "hosts"):
        (run / folder).mkdir(mode=0o700, exist_ok=True)
    for node in wanted.node_names:
        (run / "here" / node).mkdir(mode=0o700, exist_ok=True)
        (run / "spool" / node).mkdir(mode=0o700, exist_ok=True)
    for index in range(max((group.node.gpus for group in wanted.groups), default=0)):
        (directory / "dev" / f"gpu{index}").symlink_to("/dev/null")
    for file_name, text in shape.config_files(wanted, place).items():
        state.write_text(directory / "etc" / file_name, text)
    key = directory / "etc" / "munge.key"
    with open(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(secrets.token_bytes(128))
    prolog = standins.task_prolog(
        str(directory / "bin"),
        {processes.MARK: place.state, "SLURM_CONF": f"{place.state}/etc/slurm.conf"},
        nss_wrapper=box.nss_wrapper if no_views else "",
        hosts_dir=str(run / "hosts"),
        hosts=(
            str(directory / "etc" / "hosts")
            if wanted.num_nodes <= nodeview.NSS_WRAPPER_NODES
            else ""
        ),
    )
    state.write_text(directory / "etc" / "task_prolog", prolog, 0o700)
    state.write_text(directory / "etc" / "slurmstepd", standins.stepd_script(box), 0o700)
    scripts = standins.client_scripts(box, f"{place.state}/etc/slurm.conf")
    scripts["module"] = scripts["ml"] = standins.module_script(f"{place.state}/log/modules.log")
    # Compiled once: every task that enters a container starts it.
    program = str(directory / "etc" / "singularity.pyc")
    py_compile.compile(
        os.path.join(shipped_dir("templates"), "sandbox", "singularity.py"),
        program,
        doraise=True,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    config = str(directory / "etc" / "container.conf")
    for runtime in ("singularity", "apptainer"):
        scripts[runtime] = standins.container_script(
            os.path.realpath(sys.executable), program, config, runtime
        )
    for command, text in scripts.items():
        state.write_text(directory / "bin" / command, text, 0o700)
    files = (
        [box.nss_wrapper, str(directory / "etc" / "hosts"), str(run / "hosts")] if no_views else []
    )
    state.write_text(Path(config), _container_config(box, files, no_views))


def _container_config(box: Toolbox, node_files: Sequence[str], unavailable: str) -> str:
    """Where the image's interpreter comes from, and why containers cannot be run here where they
    cannot."""
    prefixes = dict.fromkeys(os.path.realpath(path) for path in (sys.prefix, sys.base_prefix))
    outside = [path for path in prefixes if not path.startswith("/usr/") and path != "/usr"]
    bwrap = box.argv("bwrap") if "bwrap" in box.programs else []
    files = [path for path in node_files if path]
    return standins.container_config(
        bwrap, outside, os.path.join(sys.prefix, "bin"), files, unavailable
    )


def _clear(directory: Path, run: Path, *, keep_logs: bool) -> None:
    """End every process of the sandbox and delete its files. May be repeated, and may follow any
    crash."""
    for _ in range(20):
        found = processes.of_sandbox(str(directory), str(run))
        if not found:
            break
        stubborn = processes.end(found, str(run))
        if stubborn:
            raise EnvironmentFault(
                f"{len(stubborn)} processes of the sandbox cannot be ended",
                where=str(directory),
                why=", ".join(f"{process.name} ({process.pid})" for process in stubborn),
            )
    hidden = processes.out_of_sight(str(directory), str(run))
    if hidden:  # deleting the files of a living sandbox would leave it running for ever
        raise EnvironmentFault(
            "the sandbox runs and cannot be ended from here",
            where=str(directory),
            why=hidden,
            hint="end it where it was started, outside of this container or `unshare`",
        )
    leftovers.remove_node_dirs(directory)
    state.remove(directory, run, keep_logs=keep_logs)


def _toolbox(record: Record, environ: Mapping[str, str]) -> Toolbox:
    return packages.reopen(record.packages, environ)


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError as error:
        raise EnvironmentFault(
            f"the user id {os.geteuid()} has no name on this machine, and Slurm needs one",
            hint="add it to /etc/passwd",
        ) from error


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP end like Ctrl-C while it is being worked on."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    with _handlers({signal.SIGTERM: interrupt, signal.SIGHUP: interrupt}):
        yield


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """A second Ctrl-C must not stop the clearing away."""
    with _handlers(
        {number: signal.SIG_IGN for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    ):
        yield


@contextlib.contextmanager
def _handlers(wanted: Mapping[int, object]) -> Iterator[None]:
    before: dict[int, object] = {}
    try:
        for number, handler in wanted.items():
            with contextlib.suppress(ValueError):  # not the main thread: signals go elsewhere
                before[number] = signal.signal(number, handler)  # type: ignore[arg-type]
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
