"""For the tokenizer's tests: an oracle written from the reference's documented behaviour, small
models, hostile documents.

The oracle shares no code with hpctrain.data: it splits, encodes and lays out bytes on its own.
"""

from __future__ import annotations

import functools
import json
import random
import re
import struct
import tempfile
from pathlib import Path

import sentencepiece

U, A = "<<<|user|>>>", "<<<|assistant|>>>"
EOD = "<|endoftext|>"
# Control symbols take the ids after <unk>, <s>, </s>: user is 7, assistant 8, EOD 9.
CONTROL = ["<|r3|>", "<|r4|>", "<|r5|>", "<|r6|>", "<|user|>", "<|assistant|>", EOD]

KINDS = {
    "bpe_identity": dict(
        model_type="bpe",
        normalization_rule_name="identity",
        byte_fallback=True,
        remove_extra_whitespaces=False,
    ),
    "bpe_nmt_nfkc": dict(model_type="bpe", normalization_rule_name="nmt_nfkc", byte_fallback=True),
    "bpe_no_fallback": dict(
        model_type="bpe",
        normalization_rule_name="nmt_nfkc",
        byte_fallback=False,
        character_coverage=0.99,
    ),
    "bpe_no_prefix": dict(
        model_type="bpe",
        normalization_rule_name="identity",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
    ),
    "bpe_user_defined": dict(
        model_type="bpe",
        normalization_rule_name="identity",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        user_defined_symbols=["<sep>", "==>", "▁▁"],
    ),
    "unigram": dict(model_type="unigram", normalization_rule_name="nmt_nfkc", byte_fallback=True),
    "unigram_identity": dict(
        model_type="unigram", normalization_rule_name="identity", byte_fallback=False
    ),
}

SENTENCES = """The quick brown fox jumps over the lazy dog, and then it sleeps for 12 hours.
Jātulko šis teikums latviešu valodā: ātrā brūnā lapsa lec pāri slinkajam sunim.
Greita ruda lapė peršoka per tingų šunį, o paskui miegojo visą dieną.
Kiire pruun rebane hüppas üle laisa koera ja jäi siis magama.
Быстрая коричневая лиса перепрыгивает через ленивую собаку и засыпает.
Η γρήγορη καφέ αλεπού πηδάει πάνω από το τεμπέλικο σκυλί.
敏捷的棕色狐狸跳过懒狗,然后睡着了。 素早い茶色の狐がのろまな犬を飛び越える。
def encode(self, text):\n    return [self.ids.get(ch, 0) for ch in text if ch != '\\n']
--- ==== .... //// ____ 0000 1111 2222 https://example.org/a/b?c=d&e=f#g
aaa aaaa aaaaa abab ababab abcabcabc hahaha lalala    spaces    and\ttabs
"""


@functools.cache
def model_path(kind: str, vocab_size: int = 900, control: tuple[str, ...] = tuple(CONTROL)) -> str:
    """A small model of that kind, trained now."""
    folder = Path(tempfile.mkdtemp(prefix="hpctrain-models-"))
    rng = random.Random(3)
    words = re.findall(r"\S+\s*", SENTENCES)
    text = folder / "corpus.txt"
    with text.open("w", encoding="utf-8") as file:
        for _ in range(1500):
            file.write(rng.choice(SENTENCES.splitlines()) + "\n")
            file.write("".join(rng.choices(words, k=12)).replace("\n", " ") + "\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / kind),
        vocab_size=vocab_size,
        control_symbols=list(control),
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **KINDS[kind],
    )
    return str(folder / f"{kind}.model")


def oracle_ids(
    sp, text: str, append_eod: bool = True, markers: tuple[tuple[str, int], ...] = ((U, 7), (A, 8))
) -> list[int]:
    """What preprocess_sft.py makes of one document; ValueError where it raises one."""
    table = dict(markers)
    parts = [
        part for part in re.split("(" + "|".join(map(re.escape, table)) + ")", text) if part.strip()
    ]
    if len(parts) <= 1:
        raise ValueError(text)
    ids: list[int] = []
    for part in parts:
        ids += [table[part]] if part in table else sp.encode(part)
    if append_eod:
        ids.append(sp.piece_to_id(EOD))
    return ids


def oracle(texts: list[str], model: str, append_eod: bool = True) -> tuple[bytes, bytes]:
    """(.bin, .idx) that the reference writes for these documents; empty ones vanish, as its reader
    drops them."""
    sp = sentencepiece.SentencePieceProcessor(model_file=model)
    documents = [oracle_ids(sp, text, append_eod) for text in texts if text]
    code, width, letter = (8, 2, "H") if sp.get_piece_size() < 65500 else (4, 4, "i")
    data = b"".join(struct.pack(f"<{len(ids)}{letter}", *ids) for ids in documents)
    count = len(documents)
    pointers, at = [], 0
    for ids in documents:
        pointers.append(at)
        at += len(ids) * width
    index = (
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", code)
        + struct.pack("<QQ", count, count + 1)
    )
    index += struct.pack(f"<{count}i", *map(len, documents)) + struct.pack(f"<{count}q", *pointers)
    return data, index + struct.pack(f"<{count + 1}q", *range(count + 1))


def dialogues(count: int, seed: int = 0) -> list[str]:
    """Documents that both the reference and the strict grammar accept, odd spans included."""
    rng = random.Random(seed)
    words = re.findall(r"\S+\s*", SENTENCES)
    odd = [
        "",
        " ",
        "\n",
        "\u00a0",
        " leading",
        "trailing ",
        "a\nb\n\nc",
        "\t",
        "\u200b",
        "\ufeffbom inside",
        "e\u0301",
        "\u2028",
        "<|user|>",
        "<|assistant|>",
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
        "[INST]",
        "<<<user>>>",
        "<<<|",
        "x |>>",
        "▁▁",
        "😀👩‍👩‍👧",
        "\U0010ffff7\U0010ffff",
        "aaaa" * 50,
        " " * 30,
        "==>",
        "<sep>a <sep>",
        "\x01\x1f",
        "ﬁ ２ Å",
        "\u202eabc",
        "가 각",
        "=" * 99,
    ]
    out = []
    for _ in range(count):
        turns = []
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            for marker in (U, A):
                span = (
                    rng.choice(odd)
                    if rng.random() < 0.15
                    else "".join(rng.choices(words, k=rng.randint(1, 40)))
                )
                turns.append(marker + span + rng.choice(("", "", rng.choice(odd))) + marker)
        between = rng.choice(("", "", "", "\n", " "))
        out.append(between.join(turns))
    return out


def write_jsonl(path: Path, texts: list[str], ascii: bool = False) -> Path:
    path.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=ascii) + "\n" for text in texts),
        encoding="utf-8",
    )
    return path
