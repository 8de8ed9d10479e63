"""The indexed dataset byte for byte, read back by independent readers; masks, packing, limits."""

import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenize_help import dialogues, model_path, write_jsonl
from tokenize_runs import PLAIN, request

from hpctrain.base.errors import EnvironmentFault, Refused, UsageError
from hpctrain.config.site import load_site
from hpctrain.data.dataset.count import summary
from hpctrain.data.dataset.indexed_dataset import open_dataset, verify
from hpctrain.data.dataset.inspect import default_rules, documents, printable
from hpctrain.data.dataset.loss_mask import MaskRules
from hpctrain.data.dataset.pack import pack, schedule
from hpctrain.data.limits import ArrayLimits, limits_of, shape_array
from hpctrain.data.merge import merge_datasets, publish
from hpctrain.data.prepare import prepare
from hpctrain.data.run import mem_gib
from hpctrain.data.spm import load_model

DOCUMENTS = [[7, 300, 7, 9], [1], [65000, 2, 3]]


def write(path, documents, dtype="uint16", **kwargs):
    data = b"".join(np.array(one, dtype=dtype).tobytes() for one in documents)
    (path.parent / "raw.bin").write_bytes(data)
    sizes = np.array([len(one) for one in documents], dtype="<i4")
    manifest = {"tokens": int(sizes.sum())}
    publish(
        str(path),
        dtype,
        [str(path.parent / "raw.bin")],
        iter([sizes[:1], sizes[1:]]),
        len(documents),
        manifest,
        **kwargs,
    )
    return open_dataset(str(path))


def neox_reader(prefix):
    """The steps of MMapIndexedDataset.Index, by hand."""
    index = prefix.with_name(prefix.name + ".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00" and struct.unpack_from("<Q", index, 9) == (1,)
    dtype = {8: np.uint16, 4: np.int32}[index[17]]
    count, docs = struct.unpack_from("<QQ", index, 18)
    sizes = np.frombuffer(index, np.int32, count, 34)
    pointers = np.frombuffer(index, np.int64, count, 34 + sizes.nbytes)
    doc_idx = np.frombuffer(index, np.int64, docs, 34 + sizes.nbytes + pointers.nbytes)
    assert len(index) == 34 + 12 * count + 8 * docs and doc_idx.tolist() == list(range(count + 1))
    data = prefix.with_name(prefix.name + ".bin").read_bytes()
    return [np.frombuffer(data, dtype, size, at).tolist() for size, at in zip(sizes, pointers)]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_written_datasets_are_read_by_neox_and_by_us(tmp_path, dtype):
    dataset = write(tmp_path / "d", DOCUMENTS, dtype)

    assert neox_reader(tmp_path / "d") == DOCUMENTS == [one.tolist() for one in dataset]
    assert verify(dataset, 65001) == [] and dataset.dtype == dtype


def test_an_empty_dataset_is_whole(tmp_path):
    dataset = write(tmp_path / "d", [])

    assert len(dataset) == 0 and neox_reader(tmp_path / "d") == [] and verify(dataset) == []


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda b, i: (b, i[:-1]), "truncated or damaged"),
        (lambda b, i: (b, b"X" + i[1:]), "first bytes are wrong"),
        (lambda b, i: (b, i[:17] + b"\x63" + i[18:]), "dtype code 99"),
        (lambda b, i: (b[:-1], i), "no whole number"),
        (lambda b, i: (b, i[:5]), "5 bytes are too few"),
        (lambda b, i: (b, i[:9] + b"\x02" + i[10:]), "version 2 of the format"),
        (lambda b, i: (b, i[:17] + b"\x06" + i[18:]), "float32: ids are whole numbers"),
    ],
)
def test_damaged_files_are_refused_with_their_name(tmp_path, damage, words):
    write(tmp_path / "d", DOCUMENTS)
    b, i = damage((tmp_path / "d.bin").read_bytes(), (tmp_path / "d.idx").read_bytes())
    (tmp_path / "d.bin").write_bytes(b)
    (tmp_path / "d.idx").write_bytes(i)
    with pytest.raises(UsageError, match=words):
        open_dataset(str(tmp_path / "d"))


def test_what_is_missing_says_what_is_there(tmp_path):
    write(tmp_path / "a_text_document", DOCUMENTS)
    (tmp_path / "b.bin").write_bytes(b"")
    write(tmp_path / "c", DOCUMENTS)
    (tmp_path / "c.bin").unlink()
    for name, hint in (
        ("a", "did you mean .*a_text_document"),
        ("b", "its .bin is there"),
        ("c", "only that copied"),
    ):
        with pytest.raises(EnvironmentFault, match=hint):
            open_dataset(str(tmp_path / name))


def test_summaries_of_next_to_nothing(tmp_path):
    one = summary(write(tmp_path / "one", DOCUMENTS[:1]))
    assert one["count"] == 1 and not any(number != number for number in one.values())
    with pytest.raises(UsageError, match="the dataset is empty"):
        pack(np.zeros(0, np.int32), 8)


def test_verify_finds_what_opening_cannot(tmp_path):
    assert "outside the vocabulary" in verify(write(tmp_path / "d", DOCUMENTS), 1000)[0].what
    index = bytearray((tmp_path / "d.idx").read_bytes())
    index[34:38] = struct.pack("<i", 5)
    (tmp_path / "d.idx").write_bytes(index)
    found = " ".join(problem.what for problem in verify(open_dataset(str(tmp_path / "d"))))
    assert "pointer of sequence 1" in found
    assert (
        "2 of 3 sequences do not end with id 9"
        in verify(write(tmp_path / "e", DOCUMENTS), None, 9)[0].what
    )
    with pytest.raises(EnvironmentFault, match="cannot be read"):
        open_dataset(str(tmp_path / "nothing"))


def test_merging_concatenates_and_refuses_to_mix(tmp_path):
    write(tmp_path / "a", DOCUMENTS)
    write(tmp_path / "b", DOCUMENTS[:1])
    write(tmp_path / "c", DOCUMENTS, "int32")
    names = [str(tmp_path / name) for name in "ab"]
    merge_datasets(names, str(tmp_path / "ab"))
    write(tmp_path / "whole", DOCUMENTS + DOCUMENTS[:1])

    for end in (".bin", ".idx"):
        assert (tmp_path / f"ab{end}").read_bytes() == (tmp_path / f"whole{end}").read_bytes()
    with pytest.raises(UsageError, match="different dtypes"):
        merge_datasets([names[0], str(tmp_path / "c")], str(tmp_path / "x"))
    with pytest.raises(UsageError, match="one of the inputs"):
        merge_datasets(names, names[0])
    with pytest.raises(Refused, match="is there already"):
        merge_datasets(names, str(tmp_path / "ab"))
    assert not list(tmp_path.glob("x*")) and not list(tmp_path.glob("*.tmp-*"))


def test_what_is_shown_as_masked_is_what_training_masks(tmp_path):
    write(tmp_path / "a", [[7, 5, 7, 8, 6, 6, 8, 9], [7, 5, 8, 6, 8, 9], []])
    model = load_model(model_path("bpe_identity"))
    rules = default_rules(None, model)
    whole, broken, empty = documents(open_dataset(str(tmp_path / "a")), model, rules, 0, 99)

    assert rules == MaskRules(pairs=((7, 7),), alternating=(8,))
    assert [(part.trained, part.ids) for part in whole.stretches] == [
        (False, (7, 5, 7, 8)),
        (True, (6, 6, 8, 9)),
    ]
    assert (whole.num_trained, whole.problems, empty.stretches) == (4, (), ())
    assert [problem.what for problem in broken.problems] == [
        "document 1 leaves loss_mask_pairs [7, 7] open"
    ]
    roles = {"tokens": [{"role": "human", "id": 3}, {"role": "assistant", "id": 4}]}
    assert default_rules(roles, model) == MaskRules(pairs=((3, 3),), alternating=(4,))


def test_nothing_printed_can_drive_a_terminal():
    assert printable("a\x1b[31m\u202e\n\x9b\u2028é😀") == "a\\x1b[31m\\u202e\\n\\x9b\\u2028é😀"


def naive_packing(lengths, capacity, k):
    """k_bin_packed of the fork, step by step, with bins as it keeps them."""
    samples, bins = [], []

    def flush(some):
        some.sort(reverse=True)
        used = 0
        for one in some:
            if used + one >= capacity:
                if used > 0:
                    samples.append(used)
                used = 0
            used += one
        if used > 0:
            samples.append(used)

    for length in lengths:
        if length > capacity:
            continue
        best, slack = None, capacity + 1
        for at, used in enumerate(bins):
            left = capacity - (used + length)
            if 0 <= left < slack:
                best, slack = at, left
        if best is not None:
            bins[best] += length
            continue
        if len(bins) == k:
            fullest = max(range(k), key=lambda at: bins[at])
            flush([bins.pop(fullest)])
        bins.append(length)
    flush(bins)
    return samples


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=200),
    st.integers(10, 50),
    st.sampled_from([1, 3, 16]),
    st.integers(0, 99),
)
def test_packing_is_what_training_does(sizes, seq_length, bins, seed):
    lengths = np.array(sizes, dtype=np.int32)
    if (lengths > seq_length + 1).all():
        with pytest.raises(UsageError, match="no document fits"):
            pack(lengths, seq_length, bins, seed)
        return
    order = np.arange(len(sizes), dtype=np.int32)
    rng = np.random.RandomState(seed)
    found = pack(lengths, seq_length, bins, seed, epochs=2)
    for one in found:
        rng.shuffle(order)
        want = naive_packing(lengths[order].tolist(), seq_length + 1, bins)

        assert (one.samples, one.tokens) == (len(want), sum(want))
        assert one.skipped_documents == sum(size > seq_length + 1 for size in sizes)
        assert one.tokens + one.skipped_tokens == sum(sizes)
    assert schedule(found, 2, 3, 4).train_iters == -(-sum(one.samples for one in found) // 24)


def test_lumi_arrays_fit_into_what_one_may_submit():
    limits = limits_of(load_site("lumi"), None)
    shape = shape_array(limits, 500, 500, megabytes=500_000, queued=3)

    assert limits.partition == "small" and limits.counts_as_jobs
    assert shape.num_tasks == limits.max_submitted - 3 - 1 and shape.parallel == min(
        shape.num_tasks, limits.max_running
    )
    assert shape_array(limits, 16, 16, 100, 0).num_tasks == 16
    with pytest.raises(Refused, match="of your jobs are queued"):
        shape_array(limits, 4, 4, 100, queued=limits.max_submitted - 1)
    with pytest.raises(UsageError, match="no partition `nope`"):
        limits_of(load_site("lumi"), "nope")


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 300), st.booleans())
def test_arrays_never_exceed_any_limit(tasks, shards, queued, counts):
    limits = ArrayLimits("p", 220, 200, 1001, counts, 3600 * 72)
    try:
        shape = shape_array(limits, tasks, shards, 1e6, queued)
    except Refused:
        assert queued >= 219
        return
    assert 1 <= shape.num_tasks <= min(tasks, shards, 1001) and shape.time_s <= limits.max_time_s
    if counts:
        assert shape.num_tasks + queued + 1 <= 220 and shape.parallel <= 200


def test_a_task_asks_for_the_memory_of_the_longest_line_it_may_meet(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", dialogues(2))
    asked = {
        limit: request(tmp_path, data, options=replace(PLAIN, max_line_mib=limit))
        for limit in (1, 64, 1024)
    }

    assert {limit: mem_gib(prepare(one).plan) for limit, one in asked.items()} == {
        1: 2,
        64: 2,
        1024: 30,
    }
