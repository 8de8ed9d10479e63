"""From JSONL dialogues to a Megatron/NeoX indexed dataset: control tokens, encoding, shards, merge,
and looking at it.

The promise: for input that GPT-NeoX's `preprocess_sft.py` accepts, `.bin` and `.idx` are the same
bytes as its own, for any number of shards, after any crash, with any engine.
"""
