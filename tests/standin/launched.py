"""A tiny training on CPUs with DDP or accelerate, killed on request; the same bits at the end,
however often it was begun.

    launched.py FRAMEWORK --dir D --steps N --save-every K [--die-at STEP --die-rank R --how CODE]

Dies once: a file beside the checkpoints remembers it. `how`: an exit code, or -9 for SIGKILL.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def wrapped(framework, model, optimizer):
    """(model, optimizer, backward, step) as the framework wants them."""
    if framework == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, optimizer)
        return model, accelerator.backward, optimizer.step
    dist.init_process_group("gloo")
    return torch.nn.parallel.DistributedDataParallel(model), torch.Tensor.backward, optimizer.step


def newest(folder):
    done = [path.parent for path in folder.glob("ckpt_*/DONE")]
    return max(done, key=lambda path: int(path.name[5:]), default=None)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("framework")
    parser.add_argument("--local_rank", type=int)  # deepspeed passes it
    parser.add_argument("--dir", type=Path, required=True)
    for name in ("steps", "save-every"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("die-at", "die-rank", "how"):
        parser.add_argument(f"--{name}", type=int, default=0)
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(7)
    torch.set_num_threads(1)
    # One tensor: DDP lays several out anew after its first step, and the bits would depend on it.
    inner = torch.nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1, momentum=0.9)
    model, backward, step = wrapped(args.framework, inner, optimizer)
    rank, first = dist.get_rank(), 0
    found = newest(args.dir)
    if found:
        state = torch.load(found / "state.pt")
        inner.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    with open(args.dir / f"starts-{rank}", "a") as file:
        seen = {key: os.environ.get(key) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        file.write(
            json.dumps({**seen, "node": os.environ["SLURMD_NODENAME"], "first": first}) + "\n"
        )
    for number in range(first + 1, args.steps + 1):
        died = args.dir / "died"
        if number == args.die_at and rank == args.die_rank and not died.exists():
            died.touch()
            if args.how < 0:
                os.kill(os.getpid(), -args.how)
            os._exit(args.how)
        data = torch.randn(4, 8, generator=torch.Generator().manual_seed(1000 * number + rank))
        optimizer.zero_grad()
        backward(model(data).pow(2).mean())
        step()
        dist.barrier()
        if rank == 0:
            print(f"step {number}", flush=True)
            if number % args.save_every == 0:
                save(args.dir / f"ckpt_{number}", inner, optimizer, number)
    dist.barrier()
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in inner.parameters()))
    (args.dir / f"end-{rank}").write_text(digest.hexdigest())
    dist.destroy_process_group()


def save(folder, model, optimizer, step):
    folder.mkdir()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, folder / "state.pt")
    (folder / "DONE").touch()


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    sys.exit(main())
