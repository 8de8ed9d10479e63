"""Measures the nodes of an allocation: every rank writes what it met. Copied into run directories
with a preflight. Python >= 3.6, standard library, and what it finds.

  measure_nodes.py --out DIR [--mib 8]     by every task of an srun, in the environment that will train

Each rank keeps its own file up to date after every stage (`runtime/preflight.py` has their order and
judges them), so a rank that hangs or dies is known by the stage it never finished. Collectives go
through mpi4py, or torch.distributed where MPI is missing; without either they are not measured.
"""

import argparse
import json
import os
import socket
import struct
import sys
import time
from typing import Any, Dict, List, Optional

_DISK_MIB = 8


class Mpi:
    """Collectives by mpi4py."""

    name = "mpi4py"

    def __init__(self) -> None:
        from mpi4py import MPI

        self.comm = MPI.COMM_WORLD
        if self.comm.Get_size() != int(os.environ.get("WORLD_SIZE", "0")):
            raise ImportError(
                "MPI sees {} ranks, Slurm started {}".format(
                    self.comm.Get_size(), os.environ.get("WORLD_SIZE")
                )
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
            torch.cuda.set_device(
                int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
            )
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
    """Seconds by which this rank's clock is ahead of rank 0's, by the quickest of a few round trips
    (as NTP does)."""
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
            best, offset = (
                after - before,
                (before + after) / 2 - struct.unpack("<dd", bytes(data))[0],
            )
    return offset


def connect() -> "tuple[Any, str]":
    """The first way to talk to the other ranks that works, and why the others do not."""
    reasons = []
    for kind in (Mpi, Torch):
        try:
            return kind(), ""
        except (ImportError, RuntimeError, OSError) as error:
            # mpi4py without an MPI library raises RuntimeError.
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
    notes = Notes(
        folder,
        {
            "rank": rank,
            "local_rank": int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))),
            "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0],
            "pid": os.getpid(),
            "cpus": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [],
        },
    )
    notes.done("start")
    notes.done(
        "disk",
        scratch_mib_s=disk(folder, rank),
        tmp_mib_s=disk(os.environ.get("TMPDIR", "/tmp"), rank),
    )
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
    path = os.path.join(
        folder, ".preflight-{}-{}".format(os.environ.get("SLURM_JOB_ID", os.getpid()), rank)
    )
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
    """Seconds of a fixed piece of work: a matrix product on the GPU or CPU where torch is, else
    plain Python."""
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

        if torch.version.cuda or torch.version.hip:  # a build for CPUs sees none anywhere
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


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--mib", type=int, default=8)
    options = parser.parse_args(argv)
    return measure(options.out, options.mib)


if __name__ == "__main__":
    sys.exit(main())
