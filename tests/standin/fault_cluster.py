"""The cluster of a fault campaign: a sandbox, and how to hurt it and heal it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

from hpctrain.config.site import load_site
from hpctrain.sandbox import processes
from hpctrain.sandbox import sandbox as sandboxes
from hpctrain.sandbox.daemons import Daemons
from hpctrain.sandbox.from_site import shape_from_site


class Cluster:
    """A sandbox of simulated nodes, and how to hurt it."""

    def __init__(self, directory: Path, num_nodes: int, name: str):
        self.name, self.directory = name, directory
        shape = shape_from_site(
            load_site("lumi"),
            {"lumi-g": num_nodes, "lumi-c": 0, "lumi-d": 0},
            kill_wait_s=2,
            slurmd_timeout_s=15,
        )
        status, _ = sandboxes.up(shape, name, directory, os.environ, source="unpacked")
        self.record = status.record
        assert self.record is not None
        self.environ = {
            **sandboxes.shell_environ(self.record, os.environ),
            "HPCTRAIN_LOCK_WAIT_S": "20",
        }
        self.controller = threading.Lock()

    def run(self, *argv, cwd=None):
        return subprocess.run(
            argv,
            cwd=cwd,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    def fault(self, node, action):
        sandboxes.fault(node, action, self.name, self.directory, os.environ)

    def heal(self, ended):
        """The administrator: Slurm drains a node that met a requeued job's leftovers, or was silent
        while this host was busy."""
        while not ended.wait(5):
            with contextlib.suppress(subprocess.TimeoutExpired):
                said = self.run("sinfo", "-h", "-N", "-o", "%N %T").stdout
                down = {
                    line.split()[0]
                    for line in said.splitlines()
                    if line.split()[1].startswith(("drained", "down"))
                }
                if down:
                    self.run(
                        "scontrol", "update", f"nodename={','.join(sorted(down))}", "state=resume"
                    )

    def controller_down(self, seconds):
        with self.controller:
            daemons = Daemons(
                self.record.shape,
                self.record.place,
                sandboxes._toolbox(self.record, os.environ),
                os.environ,
            )
            running = processes.of_role(
                "slurmctld", state=str(self.directory), run=self.record.place.run
            )
            os.kill(running.pid, signal.SIGTERM)
            time.sleep(seconds)
            while processes.of_role(
                "slurmctld", state=str(self.directory), run=self.record.place.run
            ):
                time.sleep(0.2)
            daemons.start_controller()

    def down(self):
        sandboxes.down(self.name, self.directory, os.environ)
