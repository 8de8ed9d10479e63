"""Looks at the nodes of an allocation: every rank measures, then one process judges. Python >= 3.6, standard library, and what it finds.

  step.py measure --out DIR [--mib 8]     by every task of an srun, in the environment that will train
  step.py judge --out DIR --ranks N       by one process afterwards; prints JSON and exits 0, or 1 when nodes are bad

Each rank keeps its own file up to date after every stage, so a rank that hangs or dies is known by the stage it never
finished. Collectives go through mpi4py, or torch.distributed where MPI is missing; without either they are not measured.
"""

import argparse
import json
import os
import socket
import struct
import sys
import time
from typing import Any, Dict, List, Optional

STAGES = ("start", "disk", "compute", "connect", "clock", "ring", "allreduce", "done")
SLOW = 0.5  # a node below this fraction of the median is slow
SKEW_S = 1.0
_DISK_MIB = 8


class Mpi:
    """Collectives by mpi4py."""

    name = "mpi4py"

    def __init__(self) -> None:
        from mpi4py import MPI

        self.comm = MPI.COMM_WORLD
        if self.comm.Get_size() != int(os.environ.get("WORLD_SIZE", "0")):
            raise ImportError(
                "MPI sees {} ranks, Slurm started {}".format(self.comm.Get_size(), os.environ.get("WORLD_SIZE"))
            )
        self.rank, self.size, self.MPI = self.comm.Get_rank(), self.comm.Get_size(), MPI

    def barrier(self) -> None:
        self.comm.Barrier()

    def clock_offset(self, rounds: int = 5) -> float:
        return _offset(self, rounds)

    def send(self, data: bytearray, to: int) -> Any:
        return self.comm.Isend(data, dest=to, tag=1)

    def receive(self, data: bytearray, source: int) -> None:
        self.comm.Recv(data, source=source, tag=1)

    def wait(self, request: Any) -> None:
        request.Wait()

    def allreduce(self, data: bytearray) -> bytearray:
        out = bytearray(len(data))
        self.comm.Allreduce([data, self.MPI.FLOAT], [out, self.MPI.FLOAT], op=self.MPI.SUM)
        return out


class Torch:
    """Collectives by torch.distributed: nccl (RCCL) where there are GPUs, else gloo."""

    def __init__(self) -> None:
        import datetime

        import torch
        import torch.distributed as dist

        self.torch, self.dist = torch, dist
        self.gpu = torch.cuda.is_available()
        backend = "nccl" if self.gpu else "gloo"
        self.name = "torch.distributed, " + backend
        if self.gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=120))
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def _tensor(self, data: bytearray) -> Any:
        tensor = self.torch.frombuffer(data, dtype=self.torch.float32)
        return tensor.cuda() if self.gpu else tensor

    def barrier(self) -> None:
        self.dist.barrier()
        if self.gpu:
            self.torch.cuda.synchronize()

    def clock_offset(self, rounds: int = 5) -> float:
        return _offset(self, rounds)

    def send(self, data: bytearray, to: int) -> Any:
        return self.dist.isend(self._tensor(data), to)

    def receive(self, data: bytearray, source: int) -> None:
        tensor = self._tensor(data)
        self.dist.recv(tensor, source)
        if self.gpu:
            data[:] = tensor.cpu().numpy().tobytes()

    def wait(self, request: Any) -> None:
        request.wait()

    def allreduce(self, data: bytearray) -> bytearray:
        tensor = self._tensor(bytearray(data))
        self.dist.all_reduce(tensor)
        return bytearray(tensor.cpu().numpy().tobytes())


def _offset(comm: Any, rounds: int) -> float:
    """Seconds by which this rank's clock is ahead of rank 0's, by the quickest of a few round trips (as NTP does)."""
    if comm.rank == 0:
        for other in range(1, comm.size):
            for _ in range(rounds):
                data = bytearray(16)
                comm.receive(data, other)
                comm.wait(comm.send(bytearray(struct.pack("<dd", time.time(), 0.0)), other))
        return 0.0
    best, offset = float("inf"), 0.0
    for _ in range(rounds):
        data = bytearray(16)
        before = time.time()
        comm.wait(comm.send(bytearray(16), 0))
        comm.receive(data, 0)
        after = time.time()
        if after - before < best:
            best, offset = after - before, (before + after) / 2 - struct.unpack("<dd", bytes(data))[0]
    return offset


def connect() -> "tuple[Any, str]":
    """The first way to talk to the other ranks that works, and why the others do not."""
    reasons = []
    for kind in (Mpi, Torch):
        try:
            return kind(), ""
        except ImportError as error:
            reasons.append("{}: {}".format(kind.__name__.lower(), error))
    return None, "; ".join(reasons)


class Notes:
    """This rank's file: rewritten whole after every stage."""

    def __init__(self, folder: str, facts: Dict[str, Any]) -> None:
        self.path = os.path.join(folder, "rank-{:06d}.json".format(facts["rank"]))
        self.facts = facts

    def done(self, stage: str, **facts: Any) -> None:
        self.facts.update(facts)
        self.facts["stage"] = stage
        with open(self.path + ".tmp", "w", encoding="utf-8") as stream:
            json.dump(self.facts, stream)
        os.replace(self.path + ".tmp", self.path)


def measure(folder: str, mib: int) -> int:
    """Everything one rank can tell, stage by stage."""
    os.makedirs(folder, exist_ok=True)
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    notes = Notes(folder, {
        "rank": rank, "local_rank": int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))),
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0], "pid": os.getpid(),
        "cpus": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [],
    })  # fmt: skip
    notes.done("start")
    notes.done("disk", scratch_mib_s=disk(folder, rank), tmp_mib_s=disk(os.environ.get("TMPDIR", "/tmp"), rank))
    notes.done("compute", compute_s=compute(), gpus=gpus())
    comm, why = connect()
    if comm is None:
        notes.done("done", comm=None, comm_reason=why)
        return 0
    notes.done("connect", comm=comm.name)
    notes.done("clock", clock_offset_s=comm.clock_offset() if comm.size > 1 else 0.0)
    notes.done("ring", ring_mib_s=ring(comm, mib))
    speed, right = allreduce(comm, mib)
    notes.done("allreduce", allreduce_mib_s=speed, allreduce_right=right)
    comm.barrier()
    notes.done("done")
    return 0


def disk(folder: str, rank: int) -> Optional[float]:
    """MiB/s of writing, syncing and reading back a small file; None when it cannot be done."""
    path = os.path.join(folder, ".preflight-{}-{}".format(os.environ.get("SLURM_JOB_ID", os.getpid()), rank))
    data = os.urandom(1 << 20)
    try:
        start = time.perf_counter()
        with open(path, "wb") as stream:
            for _ in range(_DISK_MIB):
                stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        with open(path, "rb") as stream:
            same = all(stream.read(1 << 20) == data for _ in range(_DISK_MIB))
        return 2 * _DISK_MIB / max(time.perf_counter() - start, 1e-9) if same else None
    except OSError:
        return None
    finally:
        try:
            os.unlink(path)
        except OSError:
            pass


def compute() -> float:
    """Seconds of a fixed piece of work: a matrix product on the GPU or CPU where torch is, else plain Python."""
    try:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        size = 4096 if device == "cuda" else 256
        matrix = torch.ones(size, size, device=device)
        for _ in range(2):  # the first one warms up
            start = time.perf_counter()
            for _ in range(10):
                matrix = matrix @ matrix / size
            float(matrix.sum())
        return time.perf_counter() - start
    except (ImportError, RuntimeError):
        start = time.perf_counter()
        sum(number * number for number in range(300000))
        return time.perf_counter() - start


def gpus() -> Optional[int]:
    """GPUs this rank sees: torch's count, else the device files; None when neither can tell."""
    try:
        import torch

        return int(torch.cuda.device_count())
    except ImportError:
        pass
    visible = os.environ.get("ROCR_VISIBLE_DEVICES") or os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return len([name for name in visible.split(",") if name])
    try:
        names = os.listdir("/dev")
    except OSError:
        return None
    return len([name for name in names if name.startswith("nvidia") and name[6:].isdigit()]) or None


def ring(comm: Any, mib: int) -> Optional[float]:
    """MiB/s of passing a block to the next rank, slowest neighbour included."""
    if comm.size == 1:
        return None
    data, incoming = bytearray(mib << 20), bytearray(mib << 20)
    best = 0.0
    for _ in range(3):
        comm.barrier()
        start = time.perf_counter()
        request = comm.send(data, (comm.rank + 1) % comm.size)
        comm.receive(incoming, (comm.rank - 1) % comm.size)
        comm.wait(request)
        best = max(best, mib / max(time.perf_counter() - start, 1e-9))
    return best


def allreduce(comm: Any, mib: int) -> "tuple[float, bool]":
    """MiB/s of summing a block over all ranks, and whether the sum is right."""
    count = (mib << 20) // 4
    data = bytearray(struct.pack("<f", float(comm.rank + 1)) * count)
    wanted = float(comm.size * (comm.size + 1) // 2)
    best, right = 0.0, True
    for _ in range(3):
        comm.barrier()
        start = time.perf_counter()
        out = comm.allreduce(data)
        best = max(best, mib / max(time.perf_counter() - start, 1e-9))
        right = (
            right
            and struct.unpack("<f", bytes(out[:4]))[0] == wanted
            and struct.unpack("<f", bytes(out[-4:]))[0] == wanted
        )
    return best, right


def judge(folder: str, ranks: int, gpus_per_task: Optional[int] = None) -> Dict[str, Any]:
    """What the ranks' files say together: `bad` nodes with reasons, `slow` nodes, remarks, and the rank map."""
    found: List[Dict[str, Any]] = []
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        if name.startswith("rank-") and name.endswith(".json"):
            try:
                with open(os.path.join(folder, name), encoding="utf-8") as stream:
                    facts = json.load(stream)
                if isinstance(facts, dict) and isinstance(facts.get("rank"), int):
                    found.append(facts)
            except (OSError, ValueError):
                continue
    bad: Dict[str, List[str]] = {}
    slow: Dict[str, List[str]] = {}
    remarks: List[str] = []
    missing = sorted(set(range(ranks)) - {facts["rank"] for facts in found})
    if missing:
        remarks.append("ranks that never started: {}".format(" ".join(map(str, missing))))
    stuck = [facts for facts in found if facts.get("stage") != "done"]
    # Everyone waits for the slowest: of those that did not finish, the ones that are furthest behind are to blame.
    if stuck:
        behind = min(STAGES.index(str(facts.get("stage"))) for facts in stuck)
        for facts in stuck:
            if STAGES.index(str(facts.get("stage"))) == behind:
                _blame(
                    bad,
                    facts,
                    "rank {} never got past `{}`".format(facts["rank"], STAGES[min(behind + 1, len(STAGES) - 1)]),
                )
    for facts in found:
        if facts.get("scratch_mib_s") is None and STAGES.index(str(facts.get("stage"))) >= 1:
            _blame(bad, facts, "rank {} cannot write and read the run directory".format(facts["rank"]))
        if facts.get("allreduce_right") is False:
            _blame(bad, facts, "rank {} got a wrong sum from an all-reduce".format(facts["rank"]))
        if abs(facts.get("clock_offset_s") or 0.0) > SKEW_S:
            _blame(slow, facts, "its clock is {:+.1f} s off".format(facts["clock_offset_s"]))
        if gpus_per_task is not None and facts.get("gpus") is not None and facts["gpus"] < gpus_per_task:
            _blame(bad, facts, "rank {} sees {} GPUs, expected {}".format(facts["rank"], facts["gpus"], gpus_per_task))
    for key, what, better in (
        ("ring_mib_s", "ring", 1),
        ("compute_s", "compute", -1),
        ("scratch_mib_s", "run directory", 1),
    ):
        _slow(found, key, what, better, slow)
    if any(facts.get("comm", "") is None for facts in found):
        remarks.append(
            "collectives were not measured: {}".format(
                next(f["comm_reason"] for f in found if f.get("comm", "") is None)
            )
        )
    remarks += _masks(found)
    return {
        "ok": not bad and not missing, "ranks": ranks, "seen": len(found), "bad": bad, "slow": slow, "remarks": remarks,
        "comm": next((facts["comm"] for facts in found if facts.get("comm")), None), "map": found,
    }  # fmt: skip


def _blame(where: Dict[str, List[str]], facts: Dict[str, Any], why: str) -> None:
    reasons = where.setdefault(str(facts.get("node")), [])
    if why not in reasons:
        reasons.append(why)


def _slow(found: List[Dict[str, Any]], key: str, what: str, better: int, slow: Dict[str, List[str]]) -> None:
    """Nodes whose median of a figure is far from the median of all nodes."""
    nodes: Dict[str, List[float]] = {}
    for facts in found:
        if isinstance(facts.get(key), (int, float)) and facts[key] > 0:
            nodes.setdefault(str(facts["node"]), []).append(float(facts[key]))
    if len(nodes) < 3:
        return  # of two, nobody can say which one is slow
    middles = {node: sorted(values)[len(values) // 2] for node, values in nodes.items()}
    median = sorted(middles.values())[len(middles) // 2]
    for node, value in middles.items():
        ratio = value / median if better > 0 else median / value
        if ratio < SLOW:
            slow.setdefault(node, []).append("{} at {:.0f}% of the others".format(what, 100 * ratio))


def _masks(found: List[Dict[str, Any]]) -> List[str]:
    """CPU masks of one node's ranks that overlap: then two ranks share cores."""
    nodes: Dict[str, List[Dict[str, Any]]] = {}
    for facts in found:
        nodes.setdefault(str(facts["node"]), []).append(facts)
    shared = []
    for node, ranks in nodes.items():
        cpus: Dict[int, int] = {}
        for facts in ranks:
            for cpu in facts.get("cpus") or []:
                cpus[cpu] = cpus.get(cpu, 0) + 1
        if len(ranks) > 1 and any(count > 1 for count in cpus.values()):
            shared.append(node)
    return (
        ["on {} of {} nodes ranks share cores: check --cpus-per-task and --cpu-bind".format(len(shared), len(nodes))]
        if shared
        else []
    )


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["measure", "judge"])
    parser.add_argument("--out", required=True)
    parser.add_argument("--mib", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=0)
    parser.add_argument("--gpus-per-task", type=int, default=None)
    options = parser.parse_args(argv)
    if options.what == "measure":
        return measure(options.out, options.mib)
    answer = judge(options.out, options.ranks, options.gpus_per_task)
    print(json.dumps(answer, indent=1))
    return 0 if answer["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
