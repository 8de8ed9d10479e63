"""The DPO loss as a pure function of log-probabilities."""

from __future__ import annotations

import torch
from torch.nn import functional


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    num_tokens: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per pair: the loss, and the rewards of chosen and rejected (no gradient). All arguments have
    shape (pairs,).

    Arguments are log-probabilities of whole replies, policy first. With `num_tokens` (of chosen and
    rejected) they are taken per token in the loss (`sigmoid_norm`). Equation 7 of arXiv 2305.18290;
    smoothing as in its authors' code.
    """
    chosen_ratio, rejected_ratio = chosen - ref_chosen, rejected - ref_rejected
    rewards = beta * chosen_ratio.detach(), beta * rejected_ratio.detach()
    if num_tokens is not None:
        chosen_ratio = chosen_ratio / num_tokens[0].clamp(min=1)
        rejected_ratio = rejected_ratio / num_tokens[1].clamp(min=1)
    logits = beta * (chosen_ratio - rejected_ratio)
    loss = (
        -functional.logsigmoid(logits) * (1 - label_smoothing)
        - functional.logsigmoid(-logits) * label_smoothing
    )
    return loss, *rewards
