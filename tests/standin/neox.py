"""GPT-NeoX's loading, saving, retention and exits, as far as they can hurt: one link in one
process, no weights.

Each rule is one that was seen in upstream at ea7aefd (or read in the fork): a missing `latest`
means random weights, `finetune` resets the counter and the optimizer, retention counts links,
exit_interval does not save, the end always saves.
"""

import os
import re
import shutil

import checkpoints


def train(
    folder,
    finetune,
    train_iters,
    save_every,
    budget,
    lineage,
    offset=0,
    keep_last_n=None,
    exit_interval=None,
):
    """Run a link of at most `budget` iterations (then it is killed). Returns what happened."""
    seen = {"random_weights": False, "iterations": 0, "rc": 0, "optimizer_steps": 0, "iteration": 0}
    try:
        with open(os.path.join(folder, "latest")) as stream:
            tag = stream.read().strip()
    except FileNotFoundError:
        tag = None
    if not tag:
        seen["random_weights"] = True
        iteration = optimizer = 0
    else:
        path = os.path.join(folder, tag)
        if not os.path.isdir(path):
            return {**seen, "rc": 1}
        values = checkpoints.load_file(os.path.join(path, "mp_rank_00_model_states.pt"))
        iteration, optimizer = (
            (0, 0) if finetune else (values["iteration"], values["optimizer_steps"])
        )
    saved_at = None
    while iteration < train_iters:
        if seen["iterations"] == budget:
            return {**seen, "rc": 137}
        iteration, optimizer = iteration + 1, optimizer + 1
        seen.update(
            iterations=seen["iterations"] + 1, iteration=iteration, optimizer_steps=optimizer
        )
        if iteration % save_every == 0:
            _save(folder, iteration, offset, optimizer, lineage, keep_last_n)
            saved_at = iteration
        if exit_interval and iteration % exit_interval == 0:
            return seen
    if saved_at != iteration:
        _save(folder, iteration, offset, optimizer, lineage, keep_last_n)
    return seen


def _save(folder, iteration, offset, optimizer, lineage, keep_last_n):
    name = f"global_step{iteration + offset}"
    path = os.path.join(folder, name)
    os.makedirs(path, exist_ok=True)
    values = {
        "step": iteration,
        "iteration": iteration,
        "lineage": lineage,
        "optimizer_steps": optimizer,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": 0}},
    }
    with open(os.path.join(path, "mp_rank_00_model_states.pt"), "wb") as stream:
        stream.write(checkpoints.torch_file(values))
    with open(os.path.join(folder, "latest"), "w") as stream:
        stream.write(name)
    if keep_last_n is not None:
        counted = [
            name
            for name in os.listdir(folder)
            if re.search(r"global_step[\d]*", os.path.join(folder, name))
        ]
        counted.sort(
            key=lambda name: [
                int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)
            ]
        )
        for name in counted[: max(len(counted) - keep_last_n, 0)]:
            shutil.rmtree(os.path.join(folder, name))


def start(folder, number):
    """A finished pre-training checkpoint to start from."""
    _save(folder, number, 0, number, "base", None)
    return os.path.join(folder, f"global_step{number}")
