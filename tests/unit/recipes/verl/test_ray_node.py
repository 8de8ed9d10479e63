"""templates/base/ray_node.py with a stand-in for Ray: all nodes or none, the program's exit
code, and nothing left over."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpctrain.base.paths import shipped_dir

SCRIPT = os.path.join(shipped_dir("templates"), "base", "ray_node.py")
STANDIN = Path(__file__).parents[3] / "standin" / "ray"


class Job:
    """Several nodes of one job on this machine, each a process of its own."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder, self.num_nodes, self.mark = folder, num_nodes, uuid.uuid4().hex
        self.nodes: list[subprocess.Popen[str]] = []
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        (folder / "tmp").mkdir()

    def start(
        self, index: int, program: str = "", timeout: float = 20, **environ: str
    ) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": str(STANDIN),
            "RAY_STANDIN_LOG": str(self.folder / "ray.jsonl"),
            "STRAY_MARK": self.mark,
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": str(self.num_nodes),
            "SLURM_NODEID": str(index),
            "SLURM_CPUS_PER_TASK": "3",
            "SLURMD_NODENAME": f"n{index}",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
            "RANK": str(index),
            "HPCTRAIN_RAY_TOKEN": "secret",
            "HPCTRAIN_RUN_DIR": str(self.folder),
            "ROCR_VISIBLE_DEVICES": "0,1",
            **environ,
        }
        argv = [
            sys.executable,
            SCRIPT,
            "--gpus",
            "2",
            "--timeout",
            str(timeout),
            "--tmp",
            str(self.folder / "tmp"),
            "--",
            sys.executable,
            "-c",
            program,
        ]
        node = subprocess.Popen(
            argv, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.nodes.append(node)
        return node

    def run(self, program: str, **environ: str) -> list[tuple[int, str]]:
        """All nodes at once; exit code and output of each, the head first."""
        started = [self.start(index, program, **environ) for index in range(self.num_nodes)]
        outputs = [node.communicate(timeout=60)[0] for node in started]
        return [(node.returncode, output) for node, output in zip(started, outputs)]

    def strays(self) -> list[str]:
        """Processes of this job that are alive, whoever their parent is by now."""
        found = []
        for name in os.listdir("/proc"):
            try:
                words = (
                    Path("/proc", name, "cmdline").read_bytes().split(b"\0")
                    if name.isdigit()
                    else []
                )
            except OSError:
                continue
            if f"stray-{self.mark}".encode() in words:
                found.append(name)
        return found

    def started(self) -> list[dict[str, str]]:
        path = self.folder / "ray.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path, 3)
    yield made
    for node in made.nodes:
        if node.poll() is None:
            node.kill()
        node.communicate()
    for pid in made.strays():
        os.kill(int(pid), signal.SIGKILL)


def until(condition, limit_s: float = 30) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


PROGRAM = """
import json, os, ray
ray.init()
alive = ray.nodes()
print("SEEN", len(alive), sum(node["Resources"]["GPU"] for node in alive), sum(node["Resources"]["CPU"] for node in alive))
print("LEFT", [name for name in ("RANK", "MASTER_PORT", "HPCTRAIN_RAY_TOKEN", "ROCR_VISIBLE_DEVICES") if name in os.environ], os.environ["HIP_VISIBLE_DEVICES"])
"""


def test_the_program_runs_once_with_every_node_and_gpu_and_nothing_is_left(job: Job) -> None:
    (head, output), *others = job.run(PROGRAM)

    assert (head, [code for code, _ in others]) == (0, [0, 0]), output
    assert "SEEN 3 6.0 9.0" in output and "LEFT [] 0,1" in output
    assert "SEEN" not in "".join(text for _, text in others)
    assert job.strays() == [] and list((job.folder / "tmp").iterdir()) == []
    started = job.started()
    assert [line["head"] for line in started].count(True) == 1 and len(started) == 3
    assert {line["rank"] for line in started} == {None}
    # No port that another job on the node would choose too.
    assert {(line["min_worker_port"], line["dashboard_agent_listen_port"]) for line in started} == {
        ("0", "0")
    }


def test_the_programs_exit_code_is_the_heads_and_the_other_nodes_end_well(job: Job) -> None:
    (head, output), *others = job.run("import sys; sys.exit(7)")

    assert (head, [code for code, _ in others]) == (7, [0, 0]), output
    assert (job.folder / "logs/ray-7.0/n0/raylet.err").read_text() == "why it failed\n"
    assert job.strays() == [] and list((job.folder / "tmp").iterdir()) == []


def test_a_node_that_never_comes_ends_the_job_with_its_number(job: Job) -> None:
    nodes = [job.start(index, "", timeout=2) for index in (0, 2)]
    outputs = [node.communicate(timeout=60)[0] for node in nodes]

    assert nodes[0].returncode == 1 and "2 of 3 nodes called within 2 s; missing: 1" in outputs[0]
    assert job.strays() == []


def test_a_node_that_dies_ends_the_program_on_the_first_node(job: Job) -> None:
    nodes = [
        job.start(index, "import time; print('up', flush=True); time.sleep(100)")
        for index in range(3)
    ]
    assert nodes[0].stdout
    until(lambda: "up" in nodes[0].stdout.readline())
    nodes[2].terminate()
    outputs = [node.communicate(timeout=60)[0] for node in nodes]

    assert nodes[0].returncode == 1 and "node 2 left while the program ran" in outputs[0]
    assert nodes[1].returncode == 0 and nodes[2].returncode == 128 + signal.SIGTERM
    assert job.strays() == []


def test_a_signal_ends_every_process_of_every_node_soon(job: Job) -> None:
    program = "import time; print('up', flush=True); time.sleep(100)"
    nodes = [job.start(index, program, STRAY_DEAF="1") for index in range(3)]
    assert nodes[0].stdout
    until(lambda: "up" in nodes[0].stdout.readline())
    assert len(job.strays()) == 3
    began = time.monotonic()
    for node in nodes:
        node.terminate()
    for node in nodes:
        node.communicate(timeout=60)

    # KillWait is 30 s on most sites; what is left then, Slurm would not find (Ray's processes have
    # sessions of their own).
    assert time.monotonic() - began < 15
    assert nodes[0].returncode == 128 + signal.SIGTERM and job.strays() == []


@pytest.mark.parametrize("node", ["0", "1"])
def test_ray_that_starts_on_a_node_only_the_third_time_is_enough(job: Job, node: str) -> None:
    (head, output), *others = job.run(PROGRAM, RAY_STANDIN_FAIL=f"{node}:2")

    assert (head, [code for code, _ in others]) == (0, [0, 0]), output
    assert "SEEN 3 6.0 9.0" in output and (output + others[0][1]).count("once more") == 2
    assert job.strays() == []


def test_ray_that_fails_on_a_node_ends_the_job(job: Job) -> None:
    (head, output), *others = job.run(PROGRAM, RAY_STANDIN_FAIL="1")

    assert head == 1 and "node 1 left" in output
    assert [code for code, _ in others] == [1, 0] and "ended with exit code 5" in others[0][1]
    assert job.strays() == []


def test_a_stranger_at_the_jobs_port_is_not_a_node(job: Job) -> None:
    head = job.start(0, PROGRAM)

    def knock() -> bool:
        try:
            with socket.create_connection(("127.0.0.1", job.port), 1) as link:
                link.sendall(b'{"token": "guess", "node": 1}\n')
                return link.recv(100) == b""
        except OSError:
            return False

    until(knock)
    others = [job.start(index) for index in (1, 2)]
    output = head.communicate(timeout=60)[0]

    assert head.returncode == 0 and "SEEN 3" in output
    assert [node.wait(30) for node in others] == [0, 0]


def test_a_temporary_folder_of_somebody_else_is_refused(job: Job) -> None:
    target = job.folder / "elsewhere"
    target.mkdir()
    (job.folder / "tmp" / f"ray-{os.getuid()}-7.0").symlink_to(target)
    job.num_nodes = 1
    ((code, output),) = job.run(PROGRAM)

    assert code == 1 and "not a folder of this user's" in output
    assert list(target.iterdir()) == []
