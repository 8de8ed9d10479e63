"""Trains a SentencePiece model on dialogues, with `<|user|>` and `<|assistant|>` as control symbols
7 and 8.

python tools/demo_steps/train_spm.py DIALOGUES.jsonl OUT.model [--vocab-size 2048]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Iterator

# Ids 0, 1 and 2 are SentencePiece's own <unk>, <s> and </s>.
CONTROL = [
    "<|endoftext|>",
    "<|reserved_4|>",
    "<|reserved_5|>",
    "<|reserved_6|>",
    "<|user|>",
    "<|assistant|>",
]
MARKER = re.compile(r"<<<\|[^|<>]*\|>>>")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dialogues")
    parser.add_argument("model")
    parser.add_argument("--vocab-size", type=int, default=2048)
    args = parser.parse_args()
    import sentencepiece

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=spans(args.dialogues),
        model_writer=trained,
        model_type="bpe",
        vocab_size=args.vocab_size,
        control_symbols=CONTROL,
        # What goes in comes out: no Unicode folding, every space kept, unknown characters as bytes.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        byte_fallback=True,
        num_threads=2,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    if [model.id_to_piece(7), model.id_to_piece(8)] != ["<|user|>", "<|assistant|>"]:
        print("error: the control symbols are not at 7 and 8", file=sys.stderr)
        return 1
    os.makedirs(os.path.dirname(os.path.abspath(args.model)), exist_ok=True)
    temporary = f"{args.model}.{os.getpid()}"
    with open(temporary, "wb") as file:
        file.write(trained.getvalue())
    os.replace(temporary, args.model)
    shown = "Translate to Latvian: First Image"
    print(
        f"{args.model}: {model.get_piece_size()} pieces; 7 is {model.id_to_piece(7)}, 8 is"
        f" {model.id_to_piece(8)}"
    )
    print(f"  {shown!r} -> {' '.join(model.encode_as_pieces(shown))}")
    return 0


def spans(path: str) -> Iterator[str]:
    """What stands between the markers."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield from (span for span in MARKER.split(json.loads(line)["text"]) if span.strip())


if __name__ == "__main__":
    sys.exit(main())
