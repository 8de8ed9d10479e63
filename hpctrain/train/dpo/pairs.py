"""Records to token ids, done once by rank 0 and kept beside the checkpoints; every rank maps the
same file.

    CHECKPOINT_DIR/pairs-<key>.npy    int32: number of pairs, their three lengths, then all tokens

The key hashes the data, the tokenizer and the settings that shape tokens, so nothing stale is ever
read.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hpctrain.base.errors import EnvironmentFault, UsageError, need
from hpctrain.base.files import sha256_of, write_whole
from hpctrain.config.trainers.dpo import DpoConfig
from hpctrain.train.core.data_files import find_files
from hpctrain.train.core.export import tokenizer_files
from hpctrain.train.dpo.batches import Pair
from hpctrain.train.dpo.records import Record, as_text, common_prefix, read_records

_FORM = 1  # raise it when the same input gives other tokens


class Pairs:
    """All pairs of a run, truncated to `max_len`. `fingerprint` names their tokens; `dropped` had
    no room for a reply."""

    def __init__(self, flat: np.ndarray, max_len: int):
        count = int(flat[0])
        sizes = flat[1 : 1 + 3 * count].reshape(count, 3).astype(np.int64)
        starts = 1 + 3 * count + np.concatenate([[0], np.cumsum(sizes.sum(1))])
        kept = sizes[:, 0] < max_len
        self._flat, self._starts, self._sizes = flat, starts[:-1][kept], sizes[kept]
        self.dropped = int(count - kept.sum())
        room = max_len - self._sizes[:, 0]
        cut = np.minimum(self._sizes[:, 1:], room[:, None])
        self.truncated = int((cut < self._sizes[:, 1:]).any(axis=1).sum())
        self._cut = cut
        self.max_len = max_len

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, number: int) -> Pair:
        prompt, chosen, _ = map(int, self._sizes[number])
        start = int(self._starts[number])
        keep_chosen, keep_rejected = map(int, self._cut[number])
        at = start + prompt
        return Pair(
            self._flat[start:at],
            self._flat[at : at + keep_chosen],
            self._flat[at + chosen : at + chosen + keep_rejected],
        )

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each pair: prompt once, and both replies."""
        return np.asarray(self._sizes[:, 0] + self._cut.sum(1))

    @property
    def saved_by_sharing(self) -> float:
        """The share of all tokens that is saved when a prompt is computed once for both replies."""
        prompts, total = int(self._sizes[:, 0].sum()), int(self.lengths.sum())
        return prompts / max(1, total + prompts)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def fingerprint(self) -> str:
        """A hash of every token that is trained on, in order."""
        digest = hashlib.sha256(f"{_FORM} {self.max_len} {len(self)}".encode())
        digest.update(np.ascontiguousarray(self._sizes).tobytes())
        digest.update(np.ascontiguousarray(self._flat).tobytes())
        return digest.hexdigest()

    @property
    def reply_lengths(self) -> np.ndarray:
        """Tokens of each prompt with its longer reply."""
        return np.asarray(self._sizes[:, 0] + self._cut.max(1))

    @property
    def largest_token(self) -> int:
        return int(self._flat[1 + 3 * int(self._flat[0]) :].max(initial=0))


def make_pairs(config: DpoConfig, folder: str, say: Callable[[str], None]) -> str:
    """The path of the tokens of a config in `folder`; they are made unless they lie there already.

    Raises UsageError for bad records and for a tokenizer that does not load.
    """
    files = find_files(config.dataset["dataset_name"], config.dataset["split"])
    path = os.path.join(folder, f"pairs-{_key(config, files)}.npy")
    if not os.path.isfile(path):
        records = read_records(files, config.dataset["subset"])
        say(f"tokenizing {len(records):,} pairs of {config.dataset['dataset_name']}")
        content = io.BytesIO()
        np.save(content, tokenize(records, load_tokenizer(config.policy_name)))
        write_whole(path, content.getvalue())
    return path


def load_pairs(path: str, config: DpoConfig) -> Pairs:
    """The pairs of a file of `make_pairs`. Raises UsageError when none is left after truncation."""
    try:
        pairs = Pairs(np.load(path, mmap_mode="r"), config.dataset["max_len"])
    except (OSError, ValueError) as error:
        raise EnvironmentFault(
            f"cannot read it: {error}", where=path, hint="delete it; it is made again"
        ) from error
    if not len(pairs):
        raise UsageError(
            f"no pair is left: all {pairs.dropped} prompts fill `max_len` {pairs.max_len} alone",
            where=config.dataset["dataset_name"],
            hint="raise dataset.max_len",
        )
    return pairs


def load_tokenizer(folder: str) -> Any:
    """The tokenizer of a model directory, from files only."""
    try:
        return need("transformers", "train").AutoTokenizer.from_pretrained(
            folder, local_files_only=True
        )
    except Exception as error:  # a tokenizer.json of a newer `tokenizers` is a plain Exception
        first = str(error).strip().splitlines()[:1]
        raise UsageError(f"the tokenizer does not load: {''.join(first)}", where=folder) from error


def tokenize(records: list[Record], tokenizer: Any) -> np.ndarray:
    """All records in the flat form of the file.

    As TRL 1.16 does it: prompt + reply are tokenized together, and a reply begins where they stop
    agreeing with the prompt alone; text replies end with the tokenizer's end-of-sequence token.
    """
    sizes: list[tuple[int, int, int]] = []
    tokens: list[np.ndarray] = []
    if not tokenizer.chat_template:
        records = [as_text(record) for record in records]
    for at in range(0, len(records), 1024):
        for prompt, chosen, rejected in _encode(records[at : at + 1024], tokenizer):
            same = min(common_prefix(prompt, chosen), common_prefix(prompt, rejected))
            parts = prompt[:same], chosen[same:], rejected[same:]
            if not parts[1] or not parts[2]:
                record = records[at + len(sizes) % 1024]
                raise UsageError("a reply has no tokens of its own", where=record.where)
            sizes.append((len(parts[0]), len(parts[1]), len(parts[2])))
            tokens.append(np.array([*parts[0], *parts[1], *parts[2]], dtype=np.int32))
    head = np.array([len(sizes), *np.array(sizes).reshape(-1)], dtype=np.int32)
    return np.concatenate([head, *tokens])


def _encode(
    records: list[Record], tokenizer: Any
) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Token ids of prompt, prompt + chosen and prompt + rejected of each record."""
    if isinstance(records[0].prompt, str) and all(
        isinstance(record.prompt, str) for record in records
    ):
        eos = tokenizer.eos_token or ""
        texts: list[Any] = [record.prompt for record in records]
        for name in ("chosen", "rejected"):
            for record in records:
                reply = getattr(record, name)
                texts.append(
                    record.prompt + (reply if eos and reply.endswith(eos) else reply + eos)
                )
        ids = tokenizer(texts)["input_ids"]
    else:
        ids = [
            _chat(tokenizer, record.prompt, record, add_generation_prompt=True)
            for record in records
        ]
        for name in ("chosen", "rejected"):
            ids += [_chat(tokenizer, _joined(record, name), record) for record in records]
    count = len(records)
    yield from zip(ids[:count], ids[count : 2 * count], ids[2 * count :])


def _joined(record: Record, name: str) -> Any:
    if isinstance(record.prompt, str):
        return [
            {"role": "user", "content": record.prompt},
            {"role": "assistant", "content": getattr(record, name)},
        ]
    return record.prompt + getattr(record, name)


def _chat(tokenizer: Any, messages: Any, record: Record, **options: Any) -> list[int]:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    try:
        found = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)[
            "input_ids"
        ]
    except Exception as error:
        # a template is a program of the model's authors and may raise anything
        raise UsageError(f"the chat template refuses it: {error}", where=record.where) from error
    return list(found)


def _key(config: DpoConfig, files: list[str]) -> str:
    """A name for the tokens that this data, tokenizer and settings give."""
    versions = tuple(need(name, "train").__version__ for name in ("tokenizers", "transformers"))
    digest = hashlib.sha256(repr((_FORM, config.dataset["subset"], *versions)).encode())
    own = [os.path.join(config.policy_name, name) for name in tokenizer_files(config.policy_name)]
    for path in files + own:
        name = os.path.basename(path).encode("utf-8", "surrogateescape")
        digest.update(name + f" {sha256_of(path)}".encode())
    return digest.hexdigest()[:16]
