"""Rehearsals measured: time and memory per node, and beside a bare srun of as many tasks in the
same sandbox.

    tools/bench rehearse [--nodes 16,48,96,192] [--no-bare] [--out .bench/rehearse.json]

CPU seconds of all processes, daemons and tasks included, since this process adopts and waits for
every one that is orphaned (PR_SET_CHILD_SUBREAPER). Memory is what the whole machine had less of at
the worst moment (MemAvailable), so kernel memory counts too, and so does what anybody else does
meanwhile. Wall times depend on the load of the machine; CPU seconds hardly do.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", default="16,48,96,192")
    parser.add_argument("--no-bare", action="store_true", help="measure the rehearsals only")
    parser.add_argument("--out", default=".bench/rehearse.json")
    args = parser.parse_args()
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        sys.exit("this kernel has no child subreapers (Linux 3.4)")
    sizes = sorted(int(word) for word in args.nodes.split(","))
    rows = []
    for num_nodes in sizes:
        found = rehearse(num_nodes)
        row = {"nodes": num_nodes, "tasks": 8 * num_nodes, "rehearse": found}
        text = (
            f"{num_nodes:4} nodes: rehearse {found['cpu_s']:7.1f} CPU s, {found['wall_s']:6.1f} s,"
            f" {found['mem_gib']:.2f} GiB"
        )
        if not args.no_bare:
            row["bare"] = plain = bare(num_nodes)
            row["ratio"] = round(found["cpu_s"] / plain["cpu_s"], 2)
            text += (
                f"; bare srun {plain['cpu_s']:6.1f} CPU s, {plain['wall_s']:6.1f} s; ratio"
                f" {row['ratio']}"
            )
        rows.append(row)
        print(text, flush=True)
    per_node = [row["rehearse"]["cpu_s"] / row["nodes"] for row in rows]
    growth = (rows[-1]["rehearse"]["cpu_s"] - rows[0]["rehearse"]["cpu_s"]) / max(
        sizes[-1] - sizes[0], 1
    )
    print(
        f"CPU s per node: {', '.join(f'{value:.2f}' for value in per_node)}; each further node"
        f" {growth:.2f}"
    )
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": rows, "cpu_s_per_further_node": growth}, indent=2) + "\n")
    return 0


def rehearse(num_nodes: int) -> dict[str, float]:
    run = str(TOP / "examples" / "lumi-neox-sft" / "run.yaml")
    return measured([["rehearse", run, "--nodes", str(num_nodes), "--no-accounting", "--json"]])


def bare(num_nodes: int) -> dict[str, float]:
    """The same sandbox and `srun true` with as many tasks: what a person could do by hand."""
    name = f"bench{os.getpid()}"
    up = [
        "sandbox",
        "up",
        "--name",
        name,
        "--nodes",
        str(num_nodes),
        "--nodes",
        "lumi-c=1",
        "--nodes",
        "lumi-d=1",
    ]
    with tempfile.TemporaryDirectory() as folder:
        job = [
            "sbatch",
            "--wait",
            "-o",
            f"{folder}/out",
            "-p",
            "standard-g",
            "-N",
            str(num_nodes),
            "--ntasks-per-node=8",
            "--gpus-per-node=8",
            "-c7",
            "-t",
            "10",
            "--wrap",
            "srun true",
        ]
        return measured(
            [
                up,
                ["sandbox", "shell", "--name", name, "--", *job],
                ["sandbox", "down", "--name", name],
            ]
        )


def measured(commands: list[list[str]]) -> dict[str, float]:
    """CPU and wall seconds of `hpctrain` commands, run one after the other, and of everything they
    started."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    watch = Memory()
    for words in commands:
        child = os.fork()
        if child == 0:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1)
            os.execv(sys.executable, [sys.executable, "-m", "hpctrain", *words])
        code = None
        while code is None:  # others that end meanwhile are ours too: their CPU time counts
            pid, status = os.wait()
            code = os.waitstatus_to_exitcode(status) if pid == child else None
        if code:
            sys.exit(f"hpctrain {' '.join(words)}: exit code {code}")
    wall_s = time.monotonic() - begun
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "cpu_s": round(used, 2),
        "wall_s": round(wall_s, 1),
        "mem_gib": round(watch.most_gib(), 2),
    }


class Memory:
    """Looks every 0.2 s at what the machine could still give."""

    def __init__(self) -> None:
        self._first = self._least = available_kib()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(0.2):
            self._least = min(self._least, available_kib())

    def most_gib(self) -> float:
        """What it gave at most since the start; ends the looking."""
        self._done.set()
        self._thread.join()
        return (self._first - self._least) / (1 << 20)


def available_kib() -> int:
    text = Path("/proc/meminfo").read_text()
    return int(text.split("MemAvailable:")[1].split()[0])


if __name__ == "__main__":
    sys.exit(main())
