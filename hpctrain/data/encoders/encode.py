"""Spans to ids. SentencePiece is the reference; the fast encoder (`fast.py`) is used only where it proved itself equal.

An encoder takes a list of spans and gives one array of all their ids and one of their lengths. It never sees a control token.
"""

from __future__ import annotations

from collections.abc import Sequence

from hpctrain.base.errors import missing_package
from hpctrain.data.encoders.reference import Encoder, EncoderDisagrees, SentencePieceEncoder
from hpctrain.data.spm import SpmModel

# What is compiled takes one second to compile (unigram) or three, and saves about one (or ten) in 40 MB.
WORTH_COMPILING = 40 << 20


def choose_encoder(model: SpmModel, wanted: str, samples: Sequence[str], num_bytes: int | None = None) -> Encoder:
    """The encoder for `model`: `wanted` is `auto`, `fast` or `sentencepiece`; `samples` are spans for the self-check.

    `auto` takes the fast one where it is installed, exact, and worth its start for `num_bytes` of data (None: much), and says
    in `notes` why not otherwise. Raises EnvironmentFault when `fast` is demanded and cannot be had.
    """
    if wanted == "sentencepiece":
        return SentencePieceEncoder(model, ("sentencepiece was asked for",))
    from hpctrain.data.encoders import fast

    if wanted == "auto" and num_bytes is not None and num_bytes < WORTH_COMPILING and fast.compiles(model):
        return SentencePieceEncoder(model, ("not the fast encoder: it pays for more data than this",))
    why_not = fast.unsuited(model)
    if not why_not:
        try:
            return fast.FastEncoder(model, samples)
        except ImportError as error:
            if wanted == "fast":
                raise missing_package(error.name or "gigatoken", "fast") from None
            why_not = "the extra `fast` is not installed"
        except EncoderDisagrees as error:
            why_not = str(error)
    if wanted == "fast":
        from hpctrain.base.errors import EnvironmentFault

        raise EnvironmentFault(
            f"the fast encoder is not exact for this model: {why_not}", where=model.path, hint="use --encoder auto"
        )
    return SentencePieceEncoder(model, (f"not the fast encoder: {why_not}",))
