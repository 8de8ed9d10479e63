"""The Megatron/NeoX indexed dataset: `.bin` holds tokens, `.idx` says where each sequence lies.

Layout as in megatron/data/indexed_dataset.py of GPT-NeoX (`MMapIndexedDataset`), little endian: 9
bytes `MMIDIDX\\0\\0`, u64 version 1, u8 dtype code, u64 number of sequences, u64 number of document
entries, int32 sizes, int64 byte pointers, int64 document index (0..n, as one document is one
sequence).
"""

from __future__ import annotations

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
DTYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float32",
    7: "float64",
    8: "uint16",
}


def dtype_for(vocab_size: int) -> str:
    """NeoX's rule (`__best_fitting_dtype`): uint16 below 65500 pieces, else int32."""
    return "uint16" if vocab_size < 65500 else "int32"


def paths(prefix: str) -> tuple[str, str]:
    """(`.bin`, `.idx`) of a dataset prefix; a path that ends in either is taken as its prefix."""
    if prefix.endswith((".bin", ".idx")):
        prefix = prefix[:-4]
    return prefix + ".bin", prefix + ".idx"
