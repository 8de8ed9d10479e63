"""The trained model as a Hugging Face directory with the policy's tokenizer: all of it appears, or
nothing."""

from __future__ import annotations

import os
from typing import Any

import accelerate
import torch
import transformers

from hpctrain.base.files import write_whole
from hpctrain.train.core.export import copy_tokenizer, publish_model, write_about


def write_model(
    target: str,
    weights: dict[str, torch.Tensor],
    model_config: Any,
    policy: str,
    precision: str,
    about: dict[str, Any],
) -> None:
    """Write `target`; `about` (with the run's id) goes to its hpctrain.json.

    What this run wrote there before is replaced; anything else of that name is set aside.
    """

    def fill(staged: str) -> None:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        plain = transformers.AutoModelForCausalLM._model_mapping[type(model_config)]
        with accelerate.init_empty_weights(include_buffers=False):
            model = plain(model_config)
        model.tie_weights()
        model.config.use_cache = True
        model = model.to(dtype)
        own = [
            *dict(model.named_parameters()),
            *model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)),
        ]
        model.save_pretrained(
            staged, state_dict={name: weights[name].to(dtype).contiguous() for name in own}
        )
        copy_tokenizer(policy, staged)
        write_about(staged, about)

    publish_model(target, fill, about["run_id"])


def copy_logs(run_dir: str, mount_dir: str) -> None:
    """Bring `logs/` and metrics.jsonl of the run directory to `mount_dir/logs`, file by file, each
    whole."""
    logs = os.path.join(run_dir, "logs", "margins")
    copies = [(os.path.join(run_dir, "metrics.jsonl"), "metrics.jsonl")]
    for folder, _, names in os.walk(logs):
        copies += [
            (
                os.path.join(folder, name),
                os.path.relpath(os.path.join(folder, name), os.path.dirname(logs)),
            )
            for name in names
            if not name.startswith(".")
        ]
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
