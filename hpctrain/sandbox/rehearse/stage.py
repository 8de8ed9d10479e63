"""The place of one rehearsal: its folder, its sandbox, and the stand-ins in it. Always taken down
again, unless asked not to."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpctrain.base import units
from hpctrain.base.errors import EnvironmentFault, Refused
from hpctrain.base.paths import shipped_text
from hpctrain.plan.make import Plan
from hpctrain.sandbox import processes, sandbox
from hpctrain.sandbox import state as sandbox_state
from hpctrain.sandbox.from_site import shape_from_site
from hpctrain.sandbox.rehearse import shims
from hpctrain.sandbox.shape import ClusterShape
from hpctrain.sandbox.state import Record

OTHER_NODES = 1  # of each other kind of node, so that all partitions of the site are there


@dataclass(frozen=True)
class Place:
    """Folders of one rehearsal. `mark` names its sandbox; only one rehearsal of a run directory
    goes on at a time."""

    base: Path
    mark: str

    @property
    def state(self) -> Path:
        return self.base / "sandbox"

    @property
    def files(self) -> Path:
        return self.base / "files"

    @property
    def shims(self) -> Path:
        return self.base / "standin"

    def shims_of(self, number: int) -> Path:
        """The stand-in of one of the runs; the pipes for records and slots are all runs' own."""
        return self.shims / f"{number:02d}"


@contextlib.contextmanager
def place_of(run_dir: str, given: str, environ: Mapping[str, str], keep: bool) -> Iterator[Place]:
    """An empty place for this run, held by a lock; what an earlier, crashed rehearsal left there is
    ended first."""
    mark = (
        "rehearse-"
        + hashlib.sha256(os.path.realpath(run_dir).encode("utf-8", "surrogateescape")).hexdigest()[
            :10
        ]
    )
    base = Path(given) if given else sandbox_state.state_dir(mark, "", environ)
    base = Path(os.path.realpath(base))
    sandbox_state.make_private(base)
    with open(base / "rehearsal.lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Refused(
                "another rehearsal of this run goes on", where=str(base), hint="wait for it to end"
            ) from error
        place = Place(base, mark)
        _strangers(base)
        clear(place, environ)
        kept = False
        try:
            with sandbox.signals_interrupt():
                yield place
            kept = keep
        finally:
            if not kept:
                with sandbox.signals_ignored():
                    clear(place, environ)
                    with contextlib.suppress(OSError):
                        os.unlink(base / "rehearsal.lock")
                        base.rmdir()


@contextlib.contextmanager
def enough_space(place: Place, num_nodes: int, accounting: bool) -> Iterator[None]:
    """Raise EnvironmentFault when the place's disk has not what a rehearsal takes, and for what
    fails within once it is full."""
    # measured: 0.8 MiB for 2 nodes, 109 with MariaDB
    needed_kib = 2048 + 128 * num_nodes + (160 << 10 if accounting else 0)
    free_kib = sandbox_state.free_kib(place.base)
    if free_kib < needed_kib:
        raise EnvironmentFault(
            f"only {units.format_size(free_kib << 10)} are free there, and a rehearsal of"
            f" {num_nodes} nodes writes up to {units.format_size(needed_kib << 10)}",
            where=str(place.base),
            hint="another disk: --dir"
            + (", or --no-accounting, which needs little" if accounting else ""),
        )
    try:
        yield
    except (EnvironmentFault, OSError) as error:
        if isinstance(error, sandbox_state.DiskFull) or not sandbox_state.is_full(
            place.base, error
        ):
            raise
        raise sandbox_state.DiskFull(place.base, error) from error
    if sandbox_state.free_kib(place.base) < sandbox_state.FULL_KIB:
        raise EnvironmentFault(
            "the disk became full, so the rehearsal tells nothing",
            where=str(place.base),
            hint="another one: --dir",
        )


def clear(place: Place, environ: Mapping[str, str]) -> None:
    """End the sandbox of this place and delete its files; may be repeated."""
    sandbox.down(place.mark, place.state, environ)
    for folder in (place.state, place.files, place.shims):
        shutil.rmtree(folder, ignore_errors=True)


def _strangers(base: Path) -> None:
    known = {"sandbox", "files", "standin", "rehearsal.lock"}
    other = sorted(entry.name for entry in base.iterdir() if entry.name not in known)
    if other:
        raise Refused(
            "this folder holds files that are not a rehearsal's",
            where=str(base),
            hint="choose an empty one with --dir",
        )


def shape_of(
    plans: Sequence[Plan],
    mounts: Sequence[tuple[str, str]],
    accounting: bool,
    accounts: Sequence[str],
    runs_nodes: bool = True,
) -> ClusterShape:
    """A sandbox shaped like the runs' site with as many nodes as the largest of them."""
    site = plans[0].site
    kinds = {part.node_type.name for part in site.partitions.values()} or {
        plan.node_type.name for plan in plans
    }
    counts = {kind: OTHER_NODES for kind in kinds}
    for plan in plans:
        counts[plan.node_type.name] = max(counts.get(plan.node_type.name, 0), plan.spec.num_nodes)
    partitions = dict.fromkeys(plan.partition.name for plan in plans if plan.partition.name)
    return shape_from_site(
        site,
        counts,
        accounting=accounting,
        accounts=accounts,
        mounts=mounts,
        kill_wait_s=5,
        slurmd_timeout_s=120,
        partitions=list(partitions),
        lean=True,
        runs_nodes=runs_nodes,
    )


def make_pipes(place: Place) -> None:
    """The pipes in which all tasks tell what they saw, and wait for their turn."""
    try:
        place.shims.mkdir()
        for name in ("records", "slots"):
            os.mkfifo(place.shims / name, 0o600)
    except OSError as error:
        raise EnvironmentFault(
            f"cannot build the rehearsal: {error.strerror}", where=str(place.shims)
        ) from error


def install(
    place: Place, number: int, plan: Plan, scenario: Mapping[str, Any], needed: Sequence[str]
) -> None:
    """Write the stand-ins of one run, their pipes and their orders, before the sandbox starts."""
    folder = place.shims_of(number)
    try:
        (folder / "bin").mkdir(parents=True)
        os.mkfifo(folder / "hold", 0o600)
        for name in ("records", "slots"):
            (folder / name).symlink_to(Path("..", name))
        (folder / "scenario.json").write_text(json.dumps(scenario))
        (folder / "standin.py").write_text(shipped_text("sandbox", "standin.py"))
        python = os.path.realpath(sys.executable)
        program = plan.resolved.argv[0]
        step = (plan.resolved.tasks_argv or plan.resolved.argv)[1:]
        rules = plan.recipe.values["rehearse"]
        for file in rules.get("instead", {}).values():
            shutil.copyfile(os.path.join(plan.recipe.folder, file), folder / file)
        saves_on = str(scenario["signal"]) if scenario["saves_on_signal"] else ""
        for name in {"python", "python3", os.path.basename(program)}:
            # A container shows hpctrain's interpreter, and not what else is on the PATH here.
            real = python if plan.container else shutil.which(name) or python
            own = step if name == os.path.basename(program) else None
            text = shims.script(str(folder), own, needed, {name: real}, python, saves_on, rules)
            _executable(folder / "bin" / name, text)
    except OSError as error:
        raise EnvironmentFault(
            f"cannot build the rehearsal: {error.strerror}", where=str(folder)
        ) from error


def connect(place: Place, plans: Sequence[Plan]) -> None:
    """Let the sandbox's jobs find the stand-ins: inside the container where there is one, else on
    the nodes.

    Of thousands of tasks that all start at once, Slurm itself would get no time: each waits for a
    slot before its program.
    """
    prolog = place.state / "etc" / "task_prolog"
    sandbox_state.write_text(
        prolog, prolog.read_text() + shims.wait_for_slot(str(place.shims)), 0o700
    )
    programs = place.shims_of(0) / "bin"
    if len(plans) > 1:
        programs = place.shims / "bin"
        _write_dispatch(place, plans, programs)
    if any(plan.container for plan in plans):
        config = place.state / "etc" / "container.conf"
        extra = f"image_dirs\t{place.shims}\nimage_path\t{programs}\n"
        sandbox_state.write_text(config, extra + config.read_text())
    if not all(plan.container for plan in plans):
        for name in sorted(os.listdir(programs)):
            sandbox_state.write_text(
                place.state / "bin" / name, (programs / name).read_text(), 0o700
            )
    # Named by its path, it is not looked for on PATH: srun's own bash is, and hands over another
    # word in its place.
    by_path = {
        plan.resolved.argv[0]: str(programs / os.path.basename(plan.resolved.argv[0]))
        for plan in plans
        if "/" in plan.resolved.argv[0]
    }
    if by_path:
        sandbox_state.write_text(place.state / "bin" / "bash", shims.bash(by_path), 0o700)


def _write_dispatch(place: Place, plans: Sequence[Plan], programs: Path) -> None:
    programs.mkdir()
    folders = {plan.run_dir: place.shims_of(number) for number, plan in enumerate(plans)}
    for name in {name for folder in folders.values() for name in os.listdir(folder / "bin")}:
        own = {
            run_dir: str(folder)
            for run_dir, folder in folders.items()
            if (folder / "bin" / name).exists()
        }
        _executable(
            programs / name,
            shims.dispatch(name, own, shutil.which(name) or os.path.realpath(sys.executable)),
        )


def _executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o700)


class Login:
    """The sandbox's login node: Slurm's commands, and commands that see the site's paths."""

    def __init__(self, record: Record, place: Place, home: str, environ: Mapping[str, str]) -> None:
        self.record, self.place = record, place
        self._environ = sandbox.shell_environ(record, environ)
        self._own = dict(environ)
        self._home = home

    def slurm(self, *argv: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """One Slurm command; a timeout counts as exit code 124."""
        return self._run(argv, self._environ, timeout_s)

    def seeing(self, *argv: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """A command as on the site's login node, with its paths and the made-up home."""
        words = sandbox.shell_argv(self.record, argv, self._own)
        return self._run(words, {**self._environ, "HOME": self._home}, timeout_s)

    def queue(self) -> dict[str, tuple[str, str]]:
        """{job id: (state, reason)} of all jobs, ended ones too; empty when the controller does not
        answer."""
        done = self.slurm("squeue", "-h", "-t", "all", "-o", "%A|%T|%r")
        rows = (line.split("|") for line in done.stdout.splitlines())
        return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}

    def tasks(self) -> dict[str, tuple[str, str]]:
        """The same with every array task by itself."""
        done = self.slurm("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%r")
        rows = (line.split("|") for line in done.stdout.splitlines())
        return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}

    def show(self, job_id: str) -> dict[str, str]:
        """`scontrol show job` of one job, by key."""
        text = self.slurm("scontrol", "show", "job", "-o", job_id).stdout
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def fail_node(self, name: str) -> None:
        """The administrator sets it down: its job is killed and requeued.

        Not its processes all at once, as when it loses power: the other nodes of a large step would
        wait for it for a minute and then be drained themselves ("Kill task failed").
        """
        sandbox.fault(name, "down", self.place.mark, self.place.state, self._own)

    def return_node(self, name: str) -> bool:
        """Bring it back, once nothing of its last job runs on it any more; whether it is back.

        Before that slurmd refuses a job that is requeued onto it ("already running, do not launch
        second copy").
        """
        if processes.steps_of_node(name, str(self.place.state), self.record.place.run):
            return False
        sandbox.fault(name, "resume", self.place.mark, self.place.state, self._own)
        return True

    def _run(
        self, argv: Sequence[str], environ: Mapping[str, str], timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        words, pipe = list(argv), subprocess.PIPE
        try:
            child = subprocess.Popen(
                words,
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=pipe,
                stderr=pipe,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise EnvironmentFault(f"cannot run `{words[0]}`: {error.strerror}") from error
        with child:
            try:
                out, err = child.communicate(timeout=timeout_s)
            except BaseException as error:  # an interrupt too: what bubblewrap started goes with it
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                told = f"no answer in {timeout_s:.0f} s"
                return subprocess.CompletedProcess(words, 124, "", told)
        return subprocess.CompletedProcess(words, child.returncode, out, err)


def start(
    place: Place,
    shape: ClusterShape,
    environ: Mapping[str, str],
    progress: Callable[[str, int, int], None],
) -> Record:
    """The running sandbox's record."""
    status, _ = sandbox.up(shape, place.mark, place.state, environ, progress=progress)
    assert status.record is not None
    return status.record


def sweep(plan: Plan, job_ids: Sequence[str]) -> None:
    """Delete the node folders that the jobs made in this machine's own /tmp; the simulated nodes
    have no other."""
    user = os.environ.get("USER") or str(os.getuid())
    for fields in plan.site.values["node_dirs"].values():
        for job_id in job_ids:
            path = (
                fields["path"]
                .replace("{tmp}", plan.node_type.tmp_path)
                .replace("{user}", user)
                .replace("{job}", job_id)
            )
            if "{job}" in fields["path"] and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
