"""Rehearsals measured: CPU seconds per node, and beside a bare srun of as many tasks in the same sandbox.

    tools/bench rehearse [--nodes 8,16,32,64] [--out .bench/rehearse.json]

CPU seconds of all processes, daemons and tasks included, since this process adopts and waits for every one that is orphaned
(PR_SET_CHILD_SUBREAPER). Wall times depend on what else the machine does; the ratios do not. 192 nodes: --nodes 192.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", default="8,16,32,64")
    parser.add_argument("--out", default=".bench/rehearse.json")
    args = parser.parse_args()
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        sys.exit("this kernel has no child subreapers (Linux 3.4)")
    sizes = sorted(int(word) for word in args.nodes.split(","))
    rows = []
    for num_nodes in sizes:
        row = {"nodes": num_nodes, "tasks": 8 * num_nodes, "rehearse": rehearse(num_nodes), "bare": bare(num_nodes)}
        row["ratio"] = round(row["rehearse"]["cpu_s"] / row["bare"]["cpu_s"], 2)
        rows.append(row)
        print(f"{num_nodes:4} nodes: rehearse {row['rehearse']['cpu_s']:7.1f} CPU s, {row['rehearse']['wall_s']:6.1f} s; "
              f"bare srun {row['bare']['cpu_s']:6.1f} CPU s, {row['bare']['wall_s']:6.1f} s; ratio {row['ratio']}", flush=True)  # fmt: skip
    per_node = [row["rehearse"]["cpu_s"] / row["nodes"] for row in rows]
    growth = (rows[-1]["rehearse"]["cpu_s"] - rows[0]["rehearse"]["cpu_s"]) / max(sizes[-1] - sizes[0], 1)
    print(f"CPU s per node: {', '.join(f'{value:.2f}' for value in per_node)}; each further node {growth:.2f}")
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
    up = ["sandbox", "up", "--name", name, "--nodes", str(num_nodes), "--nodes", "lumi-c=1", "--nodes", "lumi-d=1"]
    with tempfile.TemporaryDirectory() as folder:
        job = ["sbatch", "--wait", "-o", f"{folder}/out", "-p", "standard-g", "-N", str(num_nodes), "--ntasks-per-node=8",
               "--gpus-per-node=8", "-c7", "-t", "10", "--wrap", "srun true"]  # fmt: skip
        return measured([up, ["sandbox", "shell", "--name", name, "--", *job], ["sandbox", "down", "--name", name]])


def measured(commands: list[list[str]]) -> dict[str, float]:
    """CPU and wall seconds of `hpctrain` commands, run one after the other, and of everything they started."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
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
    return {"cpu_s": round(used, 2), "wall_s": round(wall_s, 1)}


if __name__ == "__main__":
    sys.exit(main())
