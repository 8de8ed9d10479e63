"""The start checkpoint's student and critic as whole models in Hugging Face form, made once, beside
the checkpoints.

    merge_start.py MODEL_FOLDER -- MERGE ARG…

GAD's adversarial stage builds its student, its critic and the reference of its KL term from these
folders; the shards are loaded over the first two. MERGE is the program that makes one model of
shards; `@SHARDS` in its arguments becomes the folder with the shards, `@MODEL` the one for the
model, which is `huggingface` below it. Both are folders of this program's own, with links to the
shards, since GAD's merge program writes beside them: nothing is written into the start checkpoint,
which may be a link into another run's folder.

A crash leaves no MODEL_FOLDER/<role> or a whole one; running it again does what is missing. The
start is HPCTRAIN_CHECKPOINT for the run's first link, and what hand_over.json of the run directory
notes for those that resume. Standard library.
"""

import json
import os
import re
import shutil
import subprocess
import sys

ROLES = ("actor", "critic")
SHARD = re.compile(r"(?:model|optim|extra_state)_world_size_\d+_rank_\d+\.pt\Z")
MODEL_SHARD = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt\Z")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
NOTE = "start.json"


class Wrong(Exception):
    """The models cannot be made, and why."""


def main(folder, merge):
    """0 when both models are there, 1 with the reason on stderr when not."""
    start = start_checkpoint(os.environ)
    try:
        for role in ROLES:
            make(os.path.join(folder, role), role, start, merge)
        return 0
    except (Wrong, OSError) as error:
        sys.stderr.write(f"hpctrain: error: the start's models: {error}\n")
        return 1


def start_checkpoint(environ):
    """The path of the run's start; None where nothing tells, which matters only if a model is
    missing."""
    if environ.get("HPCTRAIN_MODE") == "finetune":
        return environ.get("HPCTRAIN_CHECKPOINT")
    note = read_json(os.path.join(environ.get("HPCTRAIN_RUN_DIR", ""), "hand_over.json")) or {}
    path = note.get("checkpoint")
    own = os.path.join(environ.get("HPCTRAIN_CHECKPOINT_DIR", ""), os.path.basename(path or "-"))
    return own if os.path.isdir(own) else path


def make(model, role, start, merge):
    """Make the model of one role, unless it is there."""
    if os.path.islink(model):
        raise Wrong(f"{model} is a link; it must be a folder of the run's own")
    step = os.path.basename(os.path.realpath(start)) if start else ""
    if os.path.isdir(model):
        wrong = model_fault(model)
        if wrong:
            raise Wrong(f"{model} {wrong}; move it away, and it is made again")
        made_of = (read_json(os.path.join(model, NOTE)) or {}).get("checkpoint")
        if step and made_of and made_of != step:
            raise Wrong(
                f"{model} was made of {made_of}, and the run starts from {step}; move it away, and"
                " it is made again"
            )
        return
    shards = os.path.join(start, role) if start else ""
    found = sorted(
        int(match.group(2)) for match in map(MODEL_SHARD.match, list_folder(shards)) if match
    )
    if not found or found != list(range(len(found))):
        raise Wrong("{} does not hold the {}'s shards".format(shards or "no checkpoint", role))
    say(f"making one model of the {role}'s {len(found)} shards in {shards}")
    work = model + ".hpctrain-work"
    if os.path.lexists(work):
        remove_own(work)
    os.makedirs(os.path.dirname(model), exist_ok=True)
    os.mkdir(work)
    target = os.path.join(work, "huggingface")
    os.mkdir(target)
    lay_out(shards, work, target)
    argv = [word.replace("@SHARDS", work).replace("@MODEL", target) for word in merge]
    done = subprocess.call(argv, stdin=subprocess.DEVNULL)
    if done:
        raise Wrong("`{}` ended with exit code {}".format(" ".join(argv), done))
    wrong = model_fault(target)
    if wrong:
        raise Wrong("`{}` ended with 0, but its model {}".format(" ".join(argv), wrong))
    with open(os.path.join(target, NOTE), "w") as stream:
        json.dump({"checkpoint": step, "role": role}, stream)
    sync(target)
    os.rename(target, model)
    sync_folder(os.path.dirname(model))
    remove_own(work)


def lay_out(shards, work, target):
    """Links to the shards in `work`; configuration and tokenizer, wherever this verl puts them,
    copied into `target`."""
    for name in list_folder(shards):
        path = os.path.join(shards, name)
        if SHARD.match(name):
            if name.startswith("model"):
                os.symlink(os.path.realpath(path), os.path.join(work, name))
        elif os.path.isfile(path):
            shutil.copyfile(path, os.path.join(target, name))
            shutil.copyfile(path, os.path.join(work, name))
    inside = os.path.join(shards, "huggingface")
    for name in list_folder(inside):
        if os.path.isfile(os.path.join(inside, name)):
            shutil.copyfile(os.path.join(inside, name), os.path.join(target, name))


def model_fault(folder):
    """Why a folder is no whole model, or an empty string."""
    if read_json(os.path.join(folder, "config.json")) is None:
        return "has no config.json"
    names = set(list_folder(folder))
    for index in INDEXES:
        if index in names:
            parts = (read_json(os.path.join(folder, index)) or {}).get("weight_map")
            if not isinstance(parts, dict):
                return f"has a damaged {index}"
            lacking = sorted(set(parts.values()) - names)
            return "lacks {}".format(", ".join(lacking[:3])) if lacking else ""
    if not any(
        name in names and os.path.getsize(os.path.join(folder, name)) > 8 for name in WEIGHTS
    ):
        return "has no weights"
    return ""


def list_folder(path):
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def read_json(path):
    try:
        with open(path, encoding="utf-8") as stream:
            found = json.load(stream)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def sync(folder):
    """Make every file of a folder last before its name does."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
    sync_folder(folder)


def sync_folder(folder):
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:
        pass  # a file system that cannot
    finally:
        os.close(fd)


def remove_own(work):
    """Remove the folder that an earlier, interrupted run of this program left; links in it are
    removed, never followed."""
    if os.path.islink(work):
        raise Wrong(f"{work} is a link; it must be a folder of the run's own")
    shutil.rmtree(work)


def say(text):
    print("hpctrain: " + text, flush=True)


if __name__ == "__main__":
    split = sys.argv.index("--")
    sys.exit(main(sys.argv[1], sys.argv[split + 1 :]))
