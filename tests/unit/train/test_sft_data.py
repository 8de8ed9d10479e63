"""Packed rows: whole documents, every one once an epoch, the same row for the same sample for
ever."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.base import errors
from hpctrain.config.trainers.sft import SftConfig
from hpctrain.train.sft.data import DataError, PackedRows, describe_too_long, step_samples


def write(prefix: Path, documents: list[list[int]], dtype: str = "<u2", code: int = 8) -> str:
    sizes = np.array([len(document) for document in documents], dtype="<i4")
    flat = np.array([token for document in documents for token in document], dtype=dtype)
    flat.tofile(f"{prefix}.bin")
    pointers = (np.cumsum(sizes, dtype="<i8") - sizes) * flat.dtype.itemsize
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sizes), len(sizes) + 1)
    Path(f"{prefix}.idx").write_bytes(
        header
        + sizes.tobytes()
        + pointers.tobytes()
        + np.arange(len(sizes) + 1, dtype="<i8").tobytes()
    )
    return str(prefix)


def rows(*prefixes: str, **keys: Any) -> PackedRows:
    return PackedRows(SftConfig(train_data_paths=prefixes, **{"seq_length": 15, **keys}))


DOCUMENTS = [[7, *range(20, 20 + n % 9), 7, 8, *range(40, 40 + n % 5), 8, 2] for n in range(60)]


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write(tmp_path / "d", DOCUMENTS)


@pytest.mark.parametrize("pack_impl", ["k_bin_packed", "unpacked"])
def test_an_epoch_holds_every_document_once_and_whole(
    prefix: str, tmp_path: Path, pack_impl: str
) -> None:
    data = rows(
        prefix, write(tmp_path / "e", DOCUMENTS[:7], "<i4", 4), pack_impl=pack_impl, seq_length=30
    )
    seen = [document for sample in range(len(data)) for document in data.documents_of(sample)]

    assert sorted(seen) == list(range(67))
    batch = data.micro_batch(range(len(data)))
    for row, sample in enumerate(range(len(data))):
        tokens = [
            token
            for number in data.documents_of(sample)
            for token in [*DOCUMENTS, *DOCUMENTS[:7]][number]
        ]
        assert batch.input_ids[row].tolist() == (tokens + [0] * 31)[:30]
    assert pack_impl == "unpacked" or data.fill > 0.9


def test_positions_restart_and_labels_stay_inside_their_document(prefix: str) -> None:
    data = rows(prefix, seq_length=30)
    batch = data.micro_batch([3, 4])
    flat_document = np.concatenate([batch.document, np.zeros((2, 1), dtype=np.int64)], axis=1)

    for row in range(2):
        for document in range(1, batch.document[row].max() + 1):
            where = np.flatnonzero(batch.document[row] == document)
            assert batch.position_ids[row, where].tolist() == list(range(len(where)))
    rows_, columns = np.divmod(batch.trained, 30)
    inner = columns < 29
    assert (
        flat_document[rows_[inner], columns[inner]]
        == flat_document[rows_[inner], columns[inner] + 1]
    ).all()
    assert (batch.labels[inner] == batch.input_ids[rows_[inner], columns[inner] + 1]).all()
    assert 7 in batch.labels  # without rules everything but a document's first token is trained


def test_only_replies_are_trained_under_the_chat_rules(prefix: str) -> None:
    data = rows(
        prefix, seq_length=30, loss_mask_pairs=(7, 7), loss_mask_alternating_individual=(8,)
    )
    labels = data.micro_batch(range(len(data))).labels

    assert set(labels.tolist()) == {2, 8, *range(40, 44)}


def test_the_row_of_a_sample_depends_on_nothing_but_seed_and_number(prefix: str) -> None:
    one, two, other = rows(prefix), rows(prefix), rows(prefix, seed=1)
    far = 10 * len(one) + 3
    two.documents_of(far)

    assert [one.documents_of(n) for n in (0, far, 5)] == [two.documents_of(n) for n in (0, far, 5)]
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert [one.documents_of(n) for n in range(9)] != [other.documents_of(n) for n in range(9)]
    first, second = ([one.documents_of(n + e * len(one)) for n in range(len(one))] for e in (0, 1))
    assert first != second and sorted(first) == sorted(second)


def test_documents_that_fit_no_row_are_counted_and_named(prefix: str) -> None:
    data = rows(prefix, seq_length=12)
    text = describe_too_long(data)
    expected = [number for number, document in enumerate(DOCUMENTS) if len(document) > 13]

    assert data.too_long.tolist() == expected
    assert f"{len(expected)} of 60 documents are longer than seq_length + 1 = 13" in text
    assert f"{prefix}#{expected[0]} ({len(DOCUMENTS[expected[0]])} tokens)" in text
    assert describe_too_long(rows(prefix, seq_length=40)) == ""


def test_no_document_that_fits_is_an_error_that_names_the_shortest(prefix: str) -> None:
    with pytest.raises(
        errors.UsageError, match="the shortest has 5 tokens, a row seq_length \\+ 1 = 4"
    ):
        rows(prefix, seq_length=3)


def test_unclosed_documents_and_foreign_tokens_are_named(tmp_path: Path) -> None:
    data = rows(
        write(tmp_path / "d", [[7, 20, 7, 8, 8, 2], [7, 20, 8, 300, 8, 2]]), loss_mask_pairs=(7, 7)
    )

    assert [data.name(number) for number in data.look_through()[0]] == [f"{tmp_path}/d#1"]
    with pytest.raises(DataError, match="token 300 in .*d#1 is outside"):
        data.check_tokens(data.micro_batch([0]), [0], vocab_size=300)


def test_documents_without_a_reply_are_named_and_data_without_any_is_refused(
    tmp_path: Path,
) -> None:
    rules = {"loss_mask_pairs": (7, 7), "loss_mask_alternating_individual": (8,)}
    some = rows(write(tmp_path / "some", [[7, 20, 7], [7, 20, 7, 8, 30, 8], [5]]), **rules)
    none = rows(write(tmp_path / "none", [[7, 20, 7], [7, 20, 20, 7], [5]]), **rules)

    unclosed, silent = some.look_through()
    assert unclosed == [] and sorted(map(some.name, silent)) == [
        f"{tmp_path}/some#0",
        f"{tmp_path}/some#2",
    ]
    with pytest.raises(errors.UsageError, match="no token of the data is trained"):
        none.look_through()


def test_other_tokens_in_documents_of_the_same_lengths_are_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [[7, *range(20, 20 + size), 7] for size in range(3, 60)]
    one = rows(write(tmp_path / "one", documents))
    same = rows(write(tmp_path / "same", documents))
    last = rows(write(tmp_path / "last", [*documents[:-1], [*documents[-1][:-1], 8]]))

    assert one.fingerprint == same.fingerprint == last.fingerprint
    assert one.content() == same.content() != last.content()
    monkeypatch.setattr("hpctrain.train.sft.data._PIECE", 64)
    monkeypatch.setattr("hpctrain.train.sft.data._PIECES", 7)
    # the end is looked at whatever the size
    assert one.content() == same.content() != last.content()


def test_padding_has_no_position_that_no_document_has(tmp_path: Path) -> None:
    data = rows(write(tmp_path / "d", [[7, 20, 7, 8, 30]]), seq_length=40)

    assert data.micro_batch([0]).position_ids.max() == 4


@pytest.mark.parametrize("cut", [".bin", ".idx", "magic"])
def test_a_broken_dataset_is_refused(prefix: str, cut: str) -> None:
    path = Path(prefix + (".idx" if cut == "magic" else cut))
    raw = path.read_bytes()
    path.write_bytes(b"X" + raw[1:] if cut == "magic" else raw[:-40] if cut == ".bin" else raw[:60])

    with pytest.raises(errors.UsageError):
        rows(prefix)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 50))
@settings(max_examples=30)
def test_ranks_and_accumulation_share_a_step_without_gap_or_overlap(
    ranks: int, micro: int, gas: int, step: int
) -> None:
    size = ranks * micro * gas
    taken = [
        n
        for rank in range(ranks)
        for turn in step_samples(step * size, rank, ranks, micro, gas)
        for n in turn
    ]

    assert sorted(taken) == list(range(step * size, (step + 1) * size))
