"""A causal language model whose forward pass gives the log-probabilities of whole replies. Files
only, no network."""

from __future__ import annotations

import glob
import os
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpctrain.base.errors import UsageError
from hpctrain.config.trainers.dpo import FAMILIES
from hpctrain.train.dpo.batches import Rows
from hpctrain.train.sft import model as whole
from hpctrain.train.sft.model import has_weights, read_model_config

# Fp32 numbers that exist at once (256 MiB); more are computed in parts, and again in the backward
# pass
MAX_LOGITS = 2**26


class DpoForward:
    """Mixed in before a `…ForCausalLM` class: `forward` gives the summed log-probability of each
    reply, fp64.

    Logits are computed only where a reply's token is predicted. Of a reply with a sum near -100 an
    fp32 sum keeps 1e-5, and a margin is beta times the difference of four such sums: so tokens are
    added in fp64, which costs nothing here.
    """

    def forward(
        self: Any,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        select: torch.Tensor,
        labels: torch.Tensor,
        sequence: torch.Tensor,
        offset: torch.Tensor,
        shape: tuple[int, int],
    ) -> torch.Tensor:
        hidden = self.base_model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=False,
        ).last_hidden_state
        hidden = hidden.reshape(-1, hidden.shape[-1])[select]
        head = self.get_output_embeddings()
        per_part = max(1, MAX_LOGITS // self.config.vocab_size)
        if len(labels) <= per_part or not torch.is_grad_enabled():
            parts = [
                _token_logps(head, *part)
                for part in zip(hidden.split(per_part), labels.split(per_part))
            ]
        else:
            parts = [
                checkpoint(_token_logps, head, *part, use_reentrant=False)
                for part in zip(hidden.split(per_part), labels.split(per_part))
            ]
        # A table and one sum, since index_add would add in any order on a GPU.
        table = torch.zeros(shape, dtype=torch.float64, device=hidden.device)
        return table.index_put((sequence, offset), torch.cat(parts).double()).sum(1)


def _token_logps(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    # In fp32: log-probabilities of bf16 logits would be mostly noise, and a margin is their
    # difference.
    return -nn.functional.cross_entropy(head(hidden).float(), labels, reduction="none")


def dpo_model_config(folder: str, attention: str) -> Any:
    """The `transformers` config of a model, with every dropout at zero: both sides of a ratio must
    see the same model.

    Raises UsageError for a family whose logits are not known to be right, and for a quantised
    model.
    """
    found = read_model_config(folder, FAMILIES)
    for name in list(vars(found)):
        if name.endswith(("dropout", "_pdrop")) and isinstance(getattr(found, name), float):
            setattr(found, name, 0.0)
    found._attn_implementation = attention
    found.use_cache = False
    return found


def model_class(model_config: Any) -> Any:
    """The class of `transformers` for a config, with the forward pass of this module."""
    plain = transformers.AutoModelForCausalLM._model_mapping[type(model_config)]
    return type("Dpo" + plain.__name__, (DpoForward, plain), {})


def read_pretrained(folder: str, model_config: Any) -> Any:
    """The model in fp32 on the CPU with the weights of a Hugging Face directory. Raises UsageError
    without weights."""
    if not has_weights(folder):
        raise UsageError(
            "the model has no weights", where=folder, hint="DPO starts from a trained model"
        )
    model = whole.read_pretrained(folder, torch.float32, config=model_config)
    model.__class__ = model_class(model_config)
    return model.float().train()


def weight_files(folder: str) -> list[str]:
    """The files that decide what a model computes: its config and its weights."""
    patterns = (
        "config.json",
        "*.safetensors",
        "pytorch_model*.bin",
        "*.distcp",
        "*model_states.pt",
        "*optim_states.pt",
    )
    return sorted(
        path
        for pattern in patterns
        for path in glob.glob(os.path.join(glob.escape(folder), pattern))
    )


def can_share_prompt(model_config: Any, attention: str) -> bool:
    """Whether rows of prompt, chosen, rejected can be computed: the mask must be ours, and no layer
    have its own."""
    windows = getattr(model_config, "sliding_window", None) and getattr(
        model_config, "use_sliding_window", True
    )
    return attention != "flash_attention_2" and not windows


def to_tensors(rows: Rows, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The arguments of `DpoForward.forward`. Rows of one reply need no mask; shared ones hide the
    replies from each other."""
    names = ("input_ids", "select", "labels", "sequence", "offset")
    arrays = {
        name: torch.from_numpy(getattr(rows, name)).to(device, non_blocking=True) for name in names
    }
    arguments: dict[str, Any] = {**arrays, "shape": (2 * rows.num_pairs, max(1, rows.longest))}
    if not rows.shared:
        return {**arguments, "position_ids": None, "attention_mask": None}
    position_ids = torch.from_numpy(rows.position_ids).to(device, non_blocking=True)
    segment = torch.from_numpy(rows.segment).to(device, non_blocking=True)
    key, query = segment[:, None, None, :], segment[:, None, :, None]
    allowed = ((key == 0) | (key == query)).tril_()
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
    mask.masked_fill_(~allowed, torch.finfo(dtype).min)
    return {**arguments, "position_ids": position_ids, "attention_mask": mask}
