"""A training program for tests: every rank is a task of a real srun; it saves as one of several
frameworks does (`saves`) and counts every step.

It behaves like GPT-NeoX where that matters (shared facts: a missing `latest` means random weights,
`finetune` begins at iteration 0 without optimizer, the final save always happens), and can be told
to die, hurt files or fill the disk at any write of a save. It goes on from what the framework would
find by itself, not from what it is told. What really happened is kept outside the checkpoint
folder, in --truth, for the campaign to judge.

  trainer.py --truth DIR --steps 12 --save-every 3 [--layout deepspeed] [--tp 2] [--offset N]
             [--step-s 0.1] [--signal]
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time

import saves

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
    """(iteration, optimizer steps) to go on from, as the framework finds them; the whole checkpoint
    is read and must be of one piece."""
    folder, mode = os.environ["HPCTRAIN_CHECKPOINT_DIR"], os.environ["HPCTRAIN_MODE"]
    if mode == "finetune" and not args.saves.by_link:
        path = os.environ["HPCTRAIN_CHECKPOINT"]
    else:
        tag = args.saves.next_one(folder) if mode != "scratch" else None
        path = os.path.join(folder, tag) if tag else ""
    if not path:
        if mode != "scratch":
            truth(args, event="random_weights", mode=mode)
        return 0, 0
    values = saves.values_of(path)
    pieces = {(value["step"], value["lineage"]) for value in values}
    if len(pieces) != 1:
        truth(args, event="mixed", tag=path, pieces=sorted(map(str, pieces)))
        sys.exit(41)
    if mode == "finetune":
        return 0, 0
    step = values[0]["step"]
    if args.offset:  # the fork counts from the greatest folder's name, whatever `latest` says
        numbers = [args.saves.number(name) for name in os.listdir(folder)]
        step = max(number for number in numbers if number is not None)
    return step - args.offset, values[0]["optimizer_steps"]


def hurt(args, folder, how):
    """Damage the folder as crashes and people do."""
    newest = args.saves.greatest(folder)
    if how.startswith("latest_"):
        tracker = os.path.join(folder, args.saves.tracker)
        if how == "latest_gone":
            os.unlink(tracker)
        else:
            with open(tracker, "wb") as stream:
                stream.write(b"\0\xffglobal_step" if how == "latest_garbage" else b"")
    elif newest:
        path = os.path.join(folder, newest)
        files = saves.files_of(path)
        if how == "shard_cut":
            last = os.path.join(path, files[-1])
            os.truncate(last, os.path.getsize(last) * 2 // 3)
        elif how == "shard_gone":
            os.unlink(os.path.join(path, files[0]))
        elif how == "folder_gone":
            shutil.rmtree(path)
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
    folder = os.environ["HPCTRAIN_CHECKPOINT_DIR"]
    number_in_name = step + args.offset
    name = args.saves.folder_of(number_in_name)
    path, planned = fault(args)
    armed = planned.get("at_save") == step
    mine = armed and planned.get("rank") in (RANK, "all")
    writes = args.saves.writes(folder, number_in_name, RANK, WORLD, ATTEMPT, optimizer_steps)
    for number, what in enumerate(writes, 1):
        if what == "barrier":
            barrier(args, f"shards{step}")
        if what == "whole":  # all that this rank gives is there; the tracker may follow
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
    parser.add_argument("--layout", choices=saves.ALL, default="deepspeed")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--offset", type=int, default=0)
    parser.add_argument("--step-s", type=float, default=0.1)
    parser.add_argument("--signal", action="store_true")
    args = parser.parse_args()
    args.saves = saves.named(args.layout, args.tp)
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
