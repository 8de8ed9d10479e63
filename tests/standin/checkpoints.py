"""Writes checkpoints as DeepSpeed writes them, one write at a time, so that a test can stop between
any two. Stdlib only.

Files are zip archives with a `data.pkl`, as `torch.save` makes them. Each holds the step and the
*lineage*: which start of which job wrote it. A checkpoint whose files disagree on these is a mix of
two trajectories.
"""

import io
import os
import pickle
import zipfile


def torch_file(values, payload_bytes=64):
    """The bytes of a file like `torch.save`'s."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(values, protocol=2))
        archive.writestr("archive/data/0", b"\1" * payload_bytes)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def load_file(path):
    with zipfile.ZipFile(path) as archive:
        return pickle.loads(archive.read("archive/data.pkl"))


def shard_names(rank, tp, dp, zero=1, bf16=False):
    """The files that one rank writes, in its order. Rank = dp_rank * tp + tp_rank, as Megatron
    numbers them."""
    dp_rank, tp_rank = divmod(rank, tp)
    names = []
    if zero == 3:
        names.append(f"zero_pp_rank_{dp_rank}_mp_rank_{tp_rank:02d}_model_states.pt")
    elif dp_rank == 0:
        names.append(f"mp_rank_{tp_rank:02d}_model_states.pt")
    if zero:
        prefix = "bf16_" if bf16 else ""
        names.append(f"{prefix}zero_pp_rank_{dp_rank}_mp_rank_{tp_rank:02d}_optim_states.pt")
    return names


def all_names(tp, dp, zero=1, bf16=False):
    return [name for rank in range(tp * dp) for name in shard_names(rank, tp, dp, zero, bf16)]


def rank_writes(
    folder, step, rank, tp, dp, zero=1, lineage="a", name=None, told=True, optimizer_steps=None
):
    """A generator that does one write of one rank's part of a save each time it is advanced.

    Rank 0 names the checkpoint in `latest` after its own shards, without waiting for the others, by
    truncating the file and then writing it (DeeperSpeed engine.py:3316-3319).
    """
    name = name or f"global_step{step}"
    path = os.path.join(folder, name)
    values = {
        "step": step,
        "lineage": lineage,
        "optimizer_steps": step if optimizer_steps is None else optimizer_steps,
    }
    if told:
        values.update(
            dp_world_size=dp, mp_world_size=tp, ds_config={"zero_optimization": {"stage": zero}}
        )
    for shard in shard_names(rank, tp, dp, zero):
        os.makedirs(path, exist_ok=True)
        content = torch_file(values)
        with open(os.path.join(path, shard), "wb", buffering=0) as stream:
            yield "open " + shard
            stream.write(content[: len(content) // 2])
            yield "half " + shard
            stream.write(content[len(content) // 2 :])
        yield "whole " + shard
    if rank == 0:
        with open(os.path.join(folder, "latest"), "w") as stream:
            yield "truncate latest"
            stream.write(name)
        yield "latest"


def num_writes(rank, tp, dp, zero=1):
    return 3 * len(shard_names(rank, tp, dp, zero)) + (2 if rank == 0 else 0)


def save(folder, step, tp=1, dp=1, zero=1, lineage="a", name=None, told=True):
    """A whole save, `latest` last."""
    for rank in reversed(range(tp * dp)):
        for _ in rank_writes(folder, step, rank, tp, dp, zero, lineage, name, told):
            pass
    return os.path.join(folder, name or f"global_step{step}")


def partial_save(folder, step, progress, tp=1, dp=1, zero=1, lineage="a", told=True):
    """A save that was killed: rank r did its first `progress[r]` writes."""
    for rank in reversed(range(tp * dp)):
        writes = rank_writes(folder, step, rank, tp, dp, zero, lineage, told=told)
        for _ in range(progress[rank]):
            next(writes)
        writes.close()


def lineages(path):
    """The (step, lineage) pairs found in a checkpoint's files; one pair when it is of one piece."""
    found = set()
    for name in sorted(os.listdir(path)):
        if name.endswith(".pt"):
            values = load_file(os.path.join(path, name))
            found.add((values["step"], values["lineage"]))
    return found


def snapshot(folder):
    """What would change if anything in `folder` were written: inode, size and time of every entry,
    by path."""
    found = {}
    for top, folders, names in os.walk(folder):
        for name in folders + names:
            info = os.lstat(os.path.join(top, name))
            found[os.path.join(top, name)] = (info.st_ino, info.st_size, info.st_mtime_ns)
    return found
