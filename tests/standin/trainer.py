"""A training program for tests: every rank is a task of a real srun; it saves as DeepSpeed does and
counts every step.

It behaves like GPT-NeoX where that matters (shared facts: a missing `latest` means random weights,
`finetune` begins at iteration 0 without optimizer, the final save always happens), and can be told
to die, hurt files or fill the disk at any write of a save. What really happened is kept outside the
checkpoint folder, in --truth, for the campaign to judge.

  trainer.py --truth DIR --steps 12 --save-every 3 [--tp 2] [--offset N] [--step-s 0.1] [--signal]
"""

import argparse
import json
import os
import signal
import sys
import time

import checkpoints

RANK = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
WORLD = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
ATTEMPT = (
    f"{os.environ.get('SLURM_JOB_ID', '0')}.{os.environ.get('SLURM_RESTART_COUNT', '0') or '0'}"
)
stopping = False


def truth(args, **fields):
    """One line of what really happened, in one write."""
    line = json.dumps({"attempt": ATTEMPT, "rank": RANK, **fields}) + "\n"
    fd = os.open(
        os.path.join(args.truth, "truth.jsonl"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666
    )
    os.write(fd, line.encode())
    os.close(fd)


def barrier(args, name):
    """Wait for every rank, as a collective does: for ever, when one is gone."""
    folder = os.path.join(args.truth, "barriers", ATTEMPT)
    os.makedirs(folder, exist_ok=True)
    open(os.path.join(folder, f"{name}.{RANK}"), "w").close()
    wanted = {f"{name}.{rank}" for rank in range(WORLD)}
    while not wanted <= set(os.listdir(folder)):
        time.sleep(0.01)


def load(args):
    """(iteration, optimizer steps) to go on from, as NeoX finds them; the whole checkpoint is read
    and must be of one piece."""
    folder, mode = os.environ["HPCTRAIN_CHECKPOINT_DIR"], os.environ["HPCTRAIN_MODE"]
    try:
        with open(os.path.join(folder, "latest")) as stream:
            tag = stream.read().strip()
    except FileNotFoundError:
        tag = None
    if mode == "scratch" or tag is None:
        if mode != "scratch":
            truth(args, event="random_weights", mode=mode)
        return 0, 0
    path = os.path.join(folder, tag)
    values = [
        checkpoints.load_file(os.path.join(path, name))
        for name in sorted(os.listdir(path))
        if name.endswith(".pt")
    ]
    pieces = {(value["step"], value["lineage"]) for value in values}
    if len(pieces) != 1:
        truth(args, event="mixed", tag=tag, pieces=sorted(map(str, pieces)))
        sys.exit(41)
    if mode == "finetune":
        return 0, 0
    step = values[0]["step"]
    if args.offset:  # the fork counts from the greatest folder's name, whatever `latest` says
        step = max(
            int(name[len("global_step") :])
            for name in os.listdir(folder)
            if name.startswith("global_step")
        )
    return step - args.offset, values[0]["optimizer_steps"]


def hurt(args, folder, how):
    """Damage the folder as crashes and people do."""
    newest = max(
        (
            name
            for name in os.listdir(folder)
            if name[11:].isdigit() and not os.path.islink(os.path.join(folder, name))
        ),
        key=lambda name: int(name[11:]),
        default=None,
    )
    latest = os.path.join(folder, "latest")
    if how == "latest_empty":
        open(latest, "w").close()
    elif how == "latest_gone":
        os.unlink(latest)
    elif how == "latest_garbage":
        with open(latest, "wb") as stream:
            stream.write(b"\0\xffglobal_step")
    elif newest and how == "shard_cut":
        name = sorted(os.listdir(os.path.join(folder, newest)))[-1]
        path = os.path.join(folder, newest, name)
        os.truncate(path, os.path.getsize(path) * 2 // 3)
    elif newest and how == "shard_gone":
        os.unlink(os.path.join(folder, newest, sorted(os.listdir(os.path.join(folder, newest)))[0]))
    elif newest and how == "folder_gone":
        for name in os.listdir(os.path.join(folder, newest)):
            os.unlink(os.path.join(folder, newest, name))
        os.rmdir(os.path.join(folder, newest))
    if newest and how in ("shard_cut", "shard_gone", "folder_gone"):
        truth(args, event="hurt", tag=newest)


def fault(args):
    """The file and content of the fault planned next, (None, {}) when none is left. Whoever removes
    the file plays it."""
    folder = os.path.join(args.truth, "faults")
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        path = os.path.join(folder, name)
        try:
            with open(path) as stream:
                return path, json.load(stream)
        except (FileNotFoundError, ValueError):
            continue
    return None, {}


def play(args, path, planned):
    """Note that a fault is played now, and that nobody plays it again."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    truth(args, event="fault", kind=planned["kind"], how=planned.get("how"))


def save(args, step, optimizer_steps):
    folder, tp = os.environ["HPCTRAIN_CHECKPOINT_DIR"], args.tp
    name = f"global_step{step + args.offset}"
    path, planned = fault(args)
    armed = planned.get("at_save") == step
    mine = armed and planned.get("rank") in (RANK, "all")
    writes = checkpoints.rank_writes(
        folder,
        step + args.offset,
        RANK,
        tp,
        WORLD // tp,
        1,
        ATTEMPT,
        optimizer_steps=optimizer_steps,
    )
    for number, _ in enumerate(writes, 1):
        if number == 3 * len(checkpoints.shard_names(RANK, tp, WORLD // tp)):
            # all of this rank's shards are whole; `latest` may follow
            truth(args, event="wrote", tag=name, step=step)
        if mine and number == planned.get("write", 1):
            if planned["kind"] == "kill_in_save":
                play(args, path, planned)
                os.kill(os.getpid(), signal.SIGKILL)
            if planned["kind"] == "disk_full":
                play(args, path, planned)
                raise OSError(28, "No space left on device")
    barrier(args, f"save{step}")
    if RANK == 0:
        truth(args, event="saved", tag=name, step=step)
        if armed and planned["kind"] == "hurt":
            play(args, path, planned)
            hurt(args, folder, planned["how"])
            os.kill(os.getpid(), signal.SIGKILL)
    barrier(args, f"saved{step}")


def on_signal(number, frame):
    global stopping
    stopping = True


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--truth", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save-every", type=int, required=True)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--offset", type=int, default=0)
    parser.add_argument("--step-s", type=float, default=0.1)
    parser.add_argument("--signal", action="store_true")
    args = parser.parse_args()
    os.makedirs(args.truth, exist_ok=True)
    signal.signal(signal.SIGUSR1, on_signal if args.signal else signal.SIG_IGN)
    iteration, optimizer_steps = load(args)
    if RANK == 0:
        truth(
            args,
            event="start",
            mode=os.environ["HPCTRAIN_MODE"],
            iteration=iteration,
            optimizer_steps=optimizer_steps,
            node=os.environ.get("SLURMD_NODENAME", ""),
            pid=os.getpid(),
        )
    barrier(args, "start")
    while iteration < args.steps:
        time.sleep(args.step_s)
        while os.path.exists(os.path.join(args.truth, "pause")):
            time.sleep(0.1)
        iteration, optimizer_steps = iteration + 1, optimizer_steps + 1
        if RANK == 0 and stopping:  # all ranks must stop at the same step
            open(os.path.join(args.truth, f"stop-{ATTEMPT}-{iteration}"), "w").close()
        barrier(args, f"step{iteration}")
        stop_now = os.path.exists(os.path.join(args.truth, f"stop-{ATTEMPT}-{iteration}"))
        if RANK == 0:
            truth(args, event="step", iteration=iteration)
            print(
                f"iteration {iteration}/ {args.steps} | lm_loss: {10 / iteration:.4f} |", flush=True
            )
        path, planned = fault(args)
        if (
            planned.get("kind") == "kill_rank"
            and planned["at_step"] == iteration
            and planned["rank"] == RANK
        ):
            play(args, path, planned)
            os.kill(os.getpid(), signal.SIGKILL)
        if iteration % args.save_every == 0 or iteration == args.steps or stop_now:
            save(args, iteration, optimizer_steps)
        if stop_now:
            break
    if RANK == 0:
        truth(args, event="end", iteration=iteration, optimizer_steps=optimizer_steps)


if __name__ == "__main__":
    main()
