"""A causal language model from a Hugging Face config or directory, whose forward pass is the SFT
loss.

Nothing here looks at a network: files only.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
from typing import Any

import torch
import transformers
from torch import nn

from hpctrain.base.errors import Problem, UsageError
from hpctrain.config.trainers.sft import FAMILIES, SftConfig
from hpctrain.train.sft.data import MicroBatch


class SftForward:
    """Mixed in before a `…ForCausalLM` class: `forward` gives the summed loss of the trained
    tokens.

    Logits are computed only where a token is trained, which for SFT is the smaller part of a row.
    """

    def forward(
        self: Any,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        trained: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        hidden = self.base_model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=False,
        ).last_hidden_state
        logits = self.get_output_embeddings()(hidden.reshape(-1, hidden.shape[-1])[trained])
        return nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def read_model_config(path: str, families: tuple[str, ...] = FAMILIES) -> Any:
    """The `transformers` config of a directory or a JSON file.

    Raises UsageError when it is not one, of none of `families`, those that are known to be trained
    right, or quantised.
    """
    file = os.path.join(path, "config.json") if os.path.isdir(path) else path
    try:
        with open(file, encoding="utf-8") as stream:
            values = json.load(stream)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"cannot read it: {error}", where=file) from error
    family = values.get("model_type") if isinstance(values, dict) else None
    if family not in families:
        raise UsageError(f"`model_type: {family}` is none of {', '.join(families)}", where=file)
    if values.get("quantization_config"):
        raise UsageError(
            "the model is quantised, and its weights cannot be trained",
            where=file,
            hint="name the full-precision model",
        )
    try:
        found = transformers.AutoConfig.for_model(**values)
    except Exception as error:
        # transformers 5 has exceptions of its own for a value of the wrong type
        raise UsageError(
            f"not a valid {family} config: {' '.join(str(error).split())}", where=file
        ) from error
    heads, groups = found.num_attention_heads, getattr(found, "num_key_value_heads", None)
    if groups and heads % groups:
        what = f"`num_key_value_heads: {groups}` does not divide `num_attention_heads: {heads}`"
        raise UsageError(f"not a valid {family} config: {what}", where=file)
    return found


def has_weights(path: str) -> bool:
    """Whether a model directory holds weights."""
    return any(
        glob.glob(os.path.join(glob.escape(path), pattern))
        for pattern in ("*.safetensors", "pytorch_model*.bin")
    )


def longest_document(model_config: Any) -> int | None:
    """The tokens of a document whose positions a model knows; None where its config does not say.

    Linear and dynamic scaling stretch `max_position_embeddings`, the others have it in there
    already (transformers' modeling_rope_utils).
    """
    limit = getattr(model_config, "max_position_embeddings", None)
    scaling = (
        getattr(model_config, "rope_parameters", None)
        or getattr(model_config, "rope_scaling", None)
        or {}
    )
    stretched = scaling.get("rope_type", scaling.get("type")) in ("linear", "dynamic")
    return int(limit * float(scaling.get("factor") or 1.0)) if limit and stretched else limit


def read_pretrained(folder: str, dtype: torch.dtype, **how: Any) -> Any:
    """The plain `transformers` model of a directory, from files only, with all its weights from
    there.

    Of a class of our own transformers 5 would not rename the tensors of older files (it goes by the
    class's name), and what it does not find it draws at random and only prints. Raises UsageError
    with what is missing or does not fit.
    """
    how["dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"] = dtype
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **how,
        )
    except Exception as error:  # a SafetensorError is a plain Exception
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"the model does not load: {first}", where=folder, hint="copy or download it again"
        ) from error
    missing = sorted(info["missing_keys"])
    shapes = sorted(str(name[0]) for name in info["mismatched_keys"])
    found = [
        Problem(
            f"the weights do not fit config.json: {len(names)} tensors {what}, such as"
            f" {', '.join(names[:3])}",
            where=folder,
            hint="the files are not all there, or of another model",
        )
        for names, what in ((missing, "are missing"), (shapes, "have another shape"))
        if names
    ]
    if found:
        raise UsageError(found)
    return model


def build_model(config: SftConfig, model_config: Any, weights_from: str | None, seed: int) -> Any:
    """The model in fp32 on the CPU: random from `seed`, or with the weights of the directory
    `weights_from`."""
    model_config._attn_implementation = choose_attention(config.attention)
    model_config.use_cache = False
    plain = transformers.AutoModelForCausalLM._model_mapping[type(model_config)]
    trained_class: Any = type("Sft" + plain.__name__, (SftForward, plain), {})
    torch.manual_seed(seed)
    if weights_from is None:
        model = trained_class(model_config)
    else:
        model = read_pretrained(weights_from, torch.float32, config=model_config)
        model.__class__ = trained_class
    model = model.float()
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def choose_attention(wanted: str) -> str:
    """The attention implementation that `auto` stands for here."""
    if wanted != "auto":
        return wanted
    flash = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"


def to_tensors(
    batch: MicroBatch, attention: str, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """The arguments of `SftForward.forward` for a micro batch, such that no position sees another
    document.

    flash_attention_2 gets one long row, whose restarting position ids delimit the documents for its
    variable-length kernel; the others get an additive block-diagonal mask.
    """
    arrays = {
        name: torch.from_numpy(getattr(batch, name)).to(device, non_blocking=True)
        for name in ("input_ids", "position_ids", "trained", "labels")
    }
    if attention == "flash_attention_2":
        rows = {name: arrays[name].reshape(1, -1) for name in ("input_ids", "position_ids")}
        return {**arrays, **rows, "attention_mask": None}
    document = torch.from_numpy(batch.document).to(device, non_blocking=True)
    length = document.shape[1]
    allowed = (document[:, None, :, None] == document[:, None, None, :]).tril_()
    mask = torch.zeros((len(document), 1, length, length), dtype=dtype, device=device)
    return {**arrays, "attention_mask": mask.masked_fill_(~allowed, torch.finfo(dtype).min)}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """All parameters in two groups: matrices with weight decay, vectors (norms and biases)
    without."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
