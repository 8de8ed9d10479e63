"""Spans to ids. SentencePiece is the reference; the fast encoder (`fast.py`) is used only where it
proved itself equal.

An encoder takes a list of spans and gives one array of all their ids and one of their lengths. It
never sees a control token.
"""

from __future__ import annotations

from collections.abc import Sequence

from hpctrain.base.errors import EnvironmentFault, missing_package
from hpctrain.data.encoders.reference import Encoder, EncoderDisagrees, SentencePieceEncoder
from hpctrain.data.spm import SpmModel


def choose_encoder(model: SpmModel, wanted: str, samples: Sequence[str]) -> Encoder:
    """The encoder for `model`: `wanted` is `auto`, `fast` or `sentencepiece`; `samples` are spans
    for the self-check.

    `auto` takes the fast one where it is installed, works, and is exact; `notes` say why it was not
    taken. Raises EnvironmentFault when `fast` is demanded and cannot be had.
    """
    if wanted == "sentencepiece":
        return SentencePieceEncoder(model, ("sentencepiece was asked for",))
    from hpctrain.data.encoders import fast

    why_not = fast.unsuited(model)
    if not why_not:
        try:
            return fast.FastEncoder(model, samples)
        except ModuleNotFoundError:
            if wanted == "fast":
                raise missing_package("gigatoken", "fast") from None
            why_not = "the extra `fast` is not installed"
        except EncoderDisagrees as error:
            why_not = str(error)
    if wanted == "fast":
        raise EnvironmentFault(
            f"the fast encoder cannot be used for this model: {why_not}",
            where=model.path,
            hint="use --encoder auto",
        )
    return SentencePieceEncoder(model, (f"not the fast encoder: {why_not}",))
