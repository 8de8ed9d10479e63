"""Stands for a program of your own: counts to --steps, saves as it likes, resumes by itself."""

import argparse
import json
import os
import time

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--save-every", type=int, default=10)
parser.add_argument("--seconds", type=float, default=0.2)
args = parser.parse_args()

folder = os.environ["HPCTRAIN_CHECKPOINT_DIR"]
checkpoint = os.environ["HPCTRAIN_CHECKPOINT"]
step = 0
if os.environ["HPCTRAIN_MODE"] == "resume":
    with open(os.path.join(checkpoint, "state.json")) as file:
        step = json.load(file)["step"]

while step < args.steps:
    time.sleep(args.seconds)
    step += 1
    print(f"step {step}/{args.steps} loss {2 / step:.4f}", flush=True)
    if os.environ.get("DIE_AT") == str(step):
        raise SystemExit("something is wrong with this program")
    if step % args.save_every == 0 or step == args.steps:
        path = os.path.join(folder, f"ckpt_{step}")
        os.makedirs(path, exist_ok=True)
        with open(os.path.join(path, "state.json"), "w") as file:
            json.dump({"step": step}, file)
        open(os.path.join(path, "DONE"), "w").close()  # last: now it is whole
