"""The trained model as a Hugging Face directory with the policy's tokenizer: all of it appears, or nothing."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from typing import Any

import torch
import transformers

from hpctrain.train import checkpoint as whole
from hpctrain.train.dpo.model import parameters_on_meta
from hpctrain.train.files import open_to_readers

_COPIED = ("token", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "spiece", "generation_config")


def write_model(
    target: str, weights: dict[str, torch.Tensor], model_config: Any, policy: str, precision: str, about: dict[str, Any]
) -> None:
    """Write `target`; `about` (with the run's id) goes to its hpctrain.json.

    What this run wrote there before is replaced; anything else of that name is set aside. Raises OSError.
    """
    parent = os.path.dirname(target)
    os.makedirs(parent, exist_ok=True)
    staged = tempfile.mkdtemp(prefix=f".{os.path.basename(target)}.", dir=parent)
    try:
        os.chmod(staged, 0o755)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        plain = transformers.AutoModelForCausalLM._model_mapping[type(model_config)]
        with parameters_on_meta():
            model = plain(model_config)
        model.tie_weights()
        model.config.use_cache = True
        model = model.to(dtype)
        own = [
            *dict(model.named_parameters()),
            *model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)),
        ]
        model.save_pretrained(staged, state_dict={name: weights[name].to(dtype).contiguous() for name in own})
        for name in sorted(os.listdir(policy)):
            path = os.path.join(policy, name)
            if name.startswith(_COPIED) and os.path.isfile(path):
                shutil.copyfile(path, os.path.join(staged, name))
        with open(os.path.join(staged, whole.META), "w", encoding="utf-8") as file:
            json.dump(about, file, indent=1)
        open_to_readers(staged)
        for name in os.listdir(staged):
            whole.sync(os.path.join(staged, name))
        whole.sync(staged)
        ours = whole.read_meta(target).get("run_id") == about["run_id"] and not os.path.islink(target)
        aside = whole.set_aside(target)
        os.rename(staged, target)
        whole.sync(parent)
        if ours and aside:
            whole.remove_own(aside)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def copy_logs(run_dir: str, mount_dir: str) -> None:
    """Bring `logs/` and metrics.jsonl of the run directory to `mount_dir/logs`, file by file, each whole."""
    from hpctrain.train.files import write_whole

    logs = os.path.join(run_dir, "logs", "margins")
    copies = [(os.path.join(run_dir, "metrics.jsonl"), "metrics.jsonl")]
    for folder, _, names in os.walk(logs):
        copies += [(os.path.join(folder, name), os.path.relpath(os.path.join(folder, name), os.path.dirname(logs)))
                   for name in names if not name.startswith(".")]  # fmt: skip
    for source, name in copies:
        target = os.path.join(mount_dir, "logs", name)
        if os.path.isfile(source) and os.path.realpath(source) != os.path.realpath(target):
            if (
                os.path.isfile(target)
                and name.endswith(".npy")
                and os.path.getmtime(target) >= os.path.getmtime(source)
            ):
                continue
            with open(source, "rb") as file:
                write_whole(target, file.read())
