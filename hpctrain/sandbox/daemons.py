"""Starts the daemons of a sandbox in their order and waits until each one answers."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hpctrain.base.errors import EnvironmentFault
from hpctrain.sandbox import processes
from hpctrain.sandbox.nodeview import view_argv
from hpctrain.sandbox.packages import Toolbox
from hpctrain.sandbox.shape import ClusterShape, Place, accounting_commands

# Variables of an enclosing Slurm job or of the user's shell would otherwise reach daemons and jobs.
_SCRUBBED = (
    "SLURM",
    "SBATCH_",
    "SRUN_",
    "SALLOC_",
    "SCANCEL_",
    "SQUEUE_",
    "SINFO_",
    "SACCT_",
    "PMI",
    "LD_PRELOAD",
    "NSS_WRAPPER",
)

# Complaints that say nothing of a daemon's end: the unpacked Slurm has no PMIx, and its database is
# small on purpose.
_HARMLESS = ("MPI", "mpi/", "plugin name for", "Database settings not recommended")
_HINTS = (
    (
        "Address already in use",
        "another program took a port of this sandbox meanwhile: run it again",
    ),
    (
        "setgroups: Operation not permitted",
        "Slurm's daemons cannot start in a user namespace of one user (`unshare -r`): leave it",
    ),
    ("No space left on device", "the disk is full: choose another one with --dir"),
)


class Daemons:
    """The daemons of one sandbox. Every method may be called again: what already runs is left
    alone."""

    def __init__(
        self, shape: ClusterShape, place: Place, box: Toolbox, environ: Mapping[str, str]
    ) -> None:
        self.shape, self.place, self.box = shape, place, box
        self._environ = {
            key: value for key, value in environ.items() if not key.startswith(_SCRUBBED)
        }
        self._conf = f"{place.state}/etc/slurm.conf"

    def start_munge(self) -> None:
        """Our own munged, with our own key and socket."""
        run = self.place.run
        self._start(
            "munged",
            self.box.argv(
                "munged",
                "--foreground",
                "--force",
                "--num-threads=4",
                f"--key-file={self.place.state}/etc/munge.key",
                f"--socket={run}/munge.socket",
                f"--pid-file={run}/munge.own.pid",
                f"--log-file={self.place.state}/log/munged.log",
                f"--seed-file={run}/munge.seed",
            ),
        )
        self._wait("munged", lambda: os.path.exists(f"{run}/munge.socket"), limit_s=20)

    def start_accounting(self) -> None:
        """MariaDB on a socket of its own (it opens no port), slurmdbd, and the accounts and limits
        of the shape."""
        state, run = self.place.state, self.place.run
        data = f"{state}/mysql"
        socket = f"{run}/mysql.socket"
        common = [
            "--no-defaults",
            f"--datadir={data}",
            f"--socket={socket}",
            "--skip-networking",
            "--skip-log-bin",
            f"--pid-file={run}/mysql.own.pid",
            f"--tmpdir={run}/tmp",
            *self._mariadb_share(),
            "--innodb-buffer-pool-size=64M",
            "--innodb-log-file-size=16M",
            "--innodb-flush-log-at-trx-commit=0",
            "--performance-schema=OFF",
            "--innodb-lock-wait-timeout=900",
        ]
        if os.geteuid() == 0:
            common.append("--user=root")
        if not os.path.isdir(f"{data}/mysql"):
            self._bootstrap(data, common)
        self._start("mariadbd", self.box.argv("mariadbd", *common))
        self._wait("mariadbd", lambda: os.path.exists(socket), limit_s=60)
        self._start(
            "slurmdbd",
            self.box.argv("slurmdbd", "-D"),
            SLURM_CONF=self._conf,
            MYSQL_UNIX_PORT=socket,
        )
        self._wait("slurmdbd", lambda: self._try("sacctmgr", "-n", "show", "cluster"), limit_s=60)
        for arguments in accounting_commands(self.shape, self.place.user):
            self._sacctmgr(arguments)

    def start_controller(self) -> None:
        """slurmctld, until it answers."""
        self._start("slurmctld", self.box.argv("slurmctld", "-D", "-f", self._conf))
        self._wait("slurmctld", lambda: self._try("scontrol", "ping"), limit_s=60)

    def start_nodes(
        self, names: Sequence[str], progress: Callable[[int], None] = lambda done: None
    ) -> None:
        """One slurmd per simulated node; each in a working directory that bears its name."""
        stepd = f"{self.place.state}/etc/slurmstepd"
        for done, name in enumerate(names, start=1):
            argv = self.box.argv("slurmd", "-D", "-N", name, "-d", stepd, "-f", self._conf)
            if self.place.has_views:
                hosts = f"{self.place.state}/etc/hosts"
                argv = [
                    *view_argv(
                        self.box.argv("bwrap"), self.shape.mounts, hosts=hosts, hostname=name
                    ),
                    *argv,
                ]
            self._start(f"slurmd-{name}", argv, folder=name)
            progress(done)

    def wait_idle(self, progress: Callable[[int], None] = lambda done: None) -> None:
        """Until every node has registered and is idle. Raises EnvironmentFault with a dead daemon's
        last words."""
        total = self.shape.num_nodes
        # a node registers in 50 ms; a busy machine gets twenty times that
        deadline = time.monotonic() + 60 + total
        while True:
            idle = sum(1 for state in self.node_states().values() if state == "idle")
            progress(idle)
            if idle == total:
                return
            for role in ["slurmctld", *(f"slurmd-{name}" for name in self.shape.node_names)]:
                if self._is_gone(role):
                    raise self._fault(role, "ended right after its start")
            if time.monotonic() > deadline:
                raise self._fault("slurmctld", f"has only {idle} of {total} nodes idle")
            time.sleep(0.1 + 0.002 * total)

    def node_states(self) -> dict[str, str]:
        """{node: state as sinfo prints it}, without the flag character; empty when the controller
        does not answer."""
        result = self.run("sinfo", "-h", "-N", "-o", "%N %t")
        pairs = (line.split() for line in result.stdout.splitlines())
        return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}

    def is_running(self, role: str) -> bool:
        return processes.of_role(role, state=self.place.state, run=self.place.run) is not None

    def _is_gone(self, role: str) -> bool:
        """Not running on two looks: one alone could fall on the instant between a shell and what it
        becomes."""
        if self.is_running(role):
            return False
        time.sleep(0.2)
        return not self.is_running(role)

    def run(
        self, program: str, *arguments: str, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """A Slurm command against this sandbox, its output captured; a timeout counts as exit code
        124."""
        argv = self.box.argv(program, *arguments)
        environ = {**self._environ, "SLURM_CONF": self._conf, "LC_ALL": "C.UTF-8"}
        try:
            return subprocess.run(
                argv,
                env=environ,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(argv, 124, "", f"no answer in {timeout_s:.0f} s")

    def _start(self, role: str, argv: Sequence[str], folder: str = "", **variables: str) -> None:
        if self.is_running(role):
            return
        processes.start(
            role,
            argv,
            state=self.place.state,
            run=self.place.run,
            environ={**self._environ, **variables},
            log=Path(self.place.state, "log", f"{role}.out"),
            folder=folder,
        )

    def _wait(self, role: str, ready: Callable[[], bool], limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while not ready():
            if self._is_gone(role):
                raise self._fault(role, "ended right after its start")
            if time.monotonic() > deadline:
                raise self._fault(role, f"does not answer after {limit_s:.0f} s")
            time.sleep(0.05)

    def _try(self, program: str, *arguments: str) -> bool:
        return self.run(program, *arguments, timeout_s=10).returncode == 0

    def _sacctmgr(self, arguments: Sequence[str]) -> None:
        result = self.run("sacctmgr", "-i", *arguments)
        text = result.stdout + result.stderr
        if result.returncode and "Nothing new added" not in text and "already exists" not in text:
            raise EnvironmentFault(f"sacctmgr could not {' '.join(arguments)}", why=text.strip())

    def _bootstrap(self, data: str, common: Sequence[str]) -> None:
        """The system tables and our user, as mariadb-install-db makes them, without its need for a
        system user."""
        os.makedirs(data, mode=0o700, exist_ok=True)
        share = self._share_dir()
        statements = [
            "CREATE DATABASE IF NOT EXISTS mysql;",
            "USE mysql;",
            "SET @auth_root_socket=NULL;",
        ]
        for name in (
            "mysql_system_tables.sql",
            "mysql_performance_tables.sql",
            "mysql_system_tables_data.sql",
            "fill_help_tables.sql",
        ):
            path = share / name
            if path.is_file() and name != "fill_help_tables.sql":
                statements.append(path.read_text(errors="replace"))
        user = self.place.user.replace("'", "''")
        statements += [
            "FLUSH PRIVILEGES;",
            f"CREATE USER IF NOT EXISTS '{user}'@'localhost';",
            f"GRANT ALL PRIVILEGES ON *.* TO '{user}'@'localhost';",
            "CREATE DATABASE IF NOT EXISTS slurm;",
        ]
        argv = self.box.argv("mariadbd", *common, "--bootstrap", "--silent-startup")
        with open(f"{self.place.state}/log/mariadb-bootstrap.out", "w") as log:
            environ = {**self._environ, processes.MARK: self.place.state}
            result = subprocess.run(
                argv,
                input="\n".join(statements) + "\n",
                text=True,
                env=environ,
                stdout=log,
                stderr=log,
                check=False,
            )
        if result.returncode:
            raise self._fault("mariadb-bootstrap", "failed")

    def _share_dir(self) -> Path:
        return Path(self.box.root or "/", "usr/share/mysql")

    def _mariadb_share(self) -> list[str]:
        if not self.box.root:
            return []
        root = self.box.root
        plugins = [str(path) for path in Path(root, "usr/lib").glob("mysql/plugin")]
        return [
            f"--basedir={root}/usr",
            f"--lc-messages-dir={self._share_dir()}",
            *(f"--plugin-dir={p}" for p in plugins),
        ]

    def _fault(self, role: str, what: str) -> EnvironmentFault:
        log = Path(self.place.state, "log")
        texts = [path for path in (log / f"{role}.log", log / f"{role}.out") if path.is_file()]
        lines = [
            line for path in texts for line in path.read_text(errors="replace").splitlines()[-16:]
        ]
        why, hint = last_words(lines)
        return EnvironmentFault(
            f"{role} {what}",
            where=str(log),
            why=why or "it said nothing: was it killed?",
            hint=hint,
        )


def last_words(lines: Sequence[str]) -> tuple[str, str]:
    """What a daemon's last lines tell of its end, each once and without its time, and what to do
    about it, "" if unknown.

    Pure. The same line stands in a daemon's log and in its output, there without the time and with
    its name.
    """
    plain = [
        re.sub(r"^(\[[^]]*\]|[0-9-]+ +[0-9:]+ +[0-9]+|[a-z]+:) +", "", line).strip()
        for line in lines
    ]
    plain = [
        line
        for line in dict.fromkeys(plain)
        if line and not any(word in line for word in _HARMLESS)
    ]
    telling = [
        line for line in plain if "error" in line.lower() or "fatal" in line.lower()
    ] or plain
    why = "\n".join(telling[-6:])
    return why, next((hint for word, hint in _HINTS if word in why), "")
