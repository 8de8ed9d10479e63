"""Numbers that have the right type and cannot be meant: NeoX trains with them, or stops hours
later."""

from __future__ import annotations

import math
from typing import Any

from hpctrain.recipes.neox.draft import Draft
from hpctrain.recipes.rules import Rule, is_number

_COUNTS = (
    "lr_decay_iters",
    "log_interval",
    "make_vocab_size_divisible_by",
    "checkpoint_num_layers",
)
# (lowest, highest) that make sense; both included.
_FRACTIONS = {
    "warmup": (0.0, 1.0),
    "rotary_pct": (0.0, 1.0),
    "lr_decay_fraction": (0.0, 1.0),
    "attention_dropout": (0.0, 0.99),
    "hidden_dropout": (0.0, 0.99),
    "min_lr": (0.0, math.inf),
    "weight_decay": (0.0, math.inf),
    "eval_iters": (0, math.inf),
    "num_workers": (0, math.inf),
}
# Above this no language model is trained with Adam; the sign of an exponent is easily lost (8e6 for
# 8e-6).
_HIGHEST_RATE = 0.1


def check_ranges(draft: Draft) -> None:
    """Counts are at least 1, fractions are fractions, and the learning rate and Adam's betas are
    ones that learn."""
    for name in _COUNTS:
        value = draft.number(name) if draft.given(name) else None
        if value is not None and value < 1:
            draft.error(f"`{name}: {value:g}` must be at least 1", name)
    for name, (lowest, highest) in _FRACTIONS.items():
        value = draft.get(name) if draft.given(name) and name not in draft.broken else None
        if not is_number(value) or lowest <= value <= highest:
            continue
        limit = f"{lowest:g} to {highest:g}" if highest < math.inf else f"at least {lowest:g}"
        draft.error(f"`{name}: {value:g}` must be {limit}", name)
    optimizer = draft.values.get("optimizer")
    params = optimizer.get("params") if isinstance(optimizer, dict) else None
    if isinstance(params, dict):
        _check_params(draft, params)


def _check_params(draft: Draft, params: dict[str, Any]) -> None:
    rate = params.get("lr")
    if is_number(rate) and rate < 0:
        draft.error(f"`optimizer.params.lr: {rate:g}` is negative", ("optimizer", "params", "lr"))
    elif is_number(rate) and rate == 0:
        draft.warn("`optimizer.params.lr: 0` learns nothing", ("optimizer", "params", "lr"))
    elif is_number(rate) and rate > _HIGHEST_RATE:
        draft.warn(
            f"`optimizer.params.lr: {rate:g}` is far above what language models are trained with",
            ("optimizer", "params", "lr"),
            why="a finetuning takes about 1.0e-6 to 1.0e-4",
            hint="is the sign of the exponent lost?",
        )
    betas = params.get("betas")
    draft.check(
        Rule(
            isinstance(betas, list)
            and any(is_number(beta) and not 0 <= beta < 1 for beta in betas),
            f"`optimizer.params.betas: {betas}` must be at least 0 and less than 1",
            ("optimizer", "params", "betas"),
        )
    )
    decay = params.get("weight_decay")
    if is_number(decay) and decay < 0:
        draft.error(
            f"`optimizer.params.weight_decay: {decay:g}` is negative",
            ("optimizer", "params", "weight_decay"),
        )
