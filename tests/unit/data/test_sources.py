"""Ranges: whatever the cuts, every line is read exactly once, in order, and the ends meet."""

import gzip
import hashlib
import os

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hpctrain.base.errors import EnvironmentFault, UsageError
from hpctrain.data import sources
from hpctrain.data.plan import cut
from hpctrain.data.sources import Segment, SegmentReader, describe


def read(path, segment, **limits):
    source = describe(str(path))
    reader = SegmentReader(source, segment, hashlib.sha256(), **limits)
    lines = []
    for block in reader.blocks():
        at = block.offset
        for record in block.records:
            if source.kind == "lines":
                assert path.read_bytes()[at : at + len(record)] == record
                at += len(record) + 1
            lines.append(record)
    return lines, reader.first, reader.last


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.binary(max_size=30).map(lambda raw: raw.replace(b"\n", b"")), max_size=12),
    st.booleans(),
    st.lists(st.integers(0, 400), max_size=6),
    st.sampled_from([1, 7, 64, 1 << 20]),
)
def test_any_cuts_give_every_line_once(tmp_path_factory, lines, newline_at_end, cuts, block):
    # Text never begins as another format does; hypothesis finds such bytes in the code.
    assume(not lines or not lines[0].startswith(tuple(sources._MAGIC)))
    path = tmp_path_factory.mktemp("s") / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + (b"\n" if newline_at_end and lines else b""))
    size = path.stat().st_size
    edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
    want = path.read_bytes().split(b"\n")
    if want[-1] == b"":
        want.pop()
    found, end = [], 0
    saved, sources.BLOCK_BYTES = sources.BLOCK_BYTES, block
    try:
        for begin, stop in zip(edges, edges[1:]):
            some, first, last = read(path, Segment(0, begin, stop))
            assert first == end
            found, end = found + some, last
    finally:
        sources.BLOCK_BYTES = saved

    assert found == want and end == size


def test_compressed_files_read_the_same_and_damage_is_an_error(tmp_path):
    import zstandard

    lines = [f"line {n} ".encode() * (n % 50) for n in range(5000)]
    plain = b"\n".join(lines) + b"\n"
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress(plain[:10_000]) + gzip.compress(plain[10_000:])
    )
    frames = zstandard.compress(plain[:10_000]) + zstandard.compress(plain[10_000:])
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        path = tmp_path / name
        size = path.stat().st_size
        assert read(path, Segment(0, 0, size)) == (lines, 0, size)
        for damaged in (
            path.read_bytes()[:-5],
            path.read_bytes()[: size // 2],
            path.read_bytes()[:-9] + b"x" * 9,
        ):
            path.write_bytes(damaged)
            with pytest.raises(UsageError, match="broken"):
                read(path, Segment(0, 0, len(damaged)))


def test_parquet_row_groups(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"t{n}" for n in range(100)], "n": list(range(100))})
    pyarrow.parquet.write_table(table, path, row_group_size=30)
    assert describe(str(path)).units == 4
    found = [
        row["text"]
        for begin, end in ((0, 1), (1, 3), (3, 4))
        for row in read(path, Segment(0, begin, end))[0]
    ]
    assert found == [f"t{n}" for n in range(100)]
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(EnvironmentFault, match="not a parquet file"):
        describe(str(path))


def test_other_columns_of_parquet_are_not_looked_at(tmp_path):
    """Some hold what Python has no value for, and some are larger than all text."""
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    far = pyarrow.array([2**62, 1], pyarrow.timestamp("us", tz="Europe/Nowhere"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "when": far}), path)

    assert read(path, Segment(0, 0, 1), columns=["text", "messages"])[0] == [
        {"text": "a"},
        {"text": "b"},
    ]
    assert read(path, Segment(0, 0, 1), columns=["messages"])[0] == [{}, {}]


def test_a_few_bytes_of_zstd_do_not_become_all_their_text_at_once(tmp_path):
    import zstandard

    line = b"x" * 999 + b"\n"
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(line * 64_000, 19))
    assert path.stat().st_size < 1 << 14
    reader = SegmentReader(
        describe(str(path)), Segment(0, 0, path.stat().st_size), hashlib.sha256()
    )
    sizes = [block.num_bytes for block in reader.blocks()]

    assert sum(sizes) == 64_000_000
    assert max(sizes) < 16 << 20


def test_names_that_lie_are_errors(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(b"{}\n"))
    with pytest.raises(UsageError, match="this is a gz file, but its name ends in `.jsonl`"):
        describe(str(path))


def test_what_can_be_read_only_once_is_an_error_and_no_endless_wait(tmp_path):
    from hpctrain.data.spm import load_model

    os.mkfifo(tmp_path / "a.jsonl")
    for path in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(UsageError, match="not a regular file"):
            sources.expand([str(path)])
    with pytest.raises(EnvironmentFault, match="not a regular file"):
        load_model(str(tmp_path / "a.jsonl"))


def test_an_endless_line_is_an_error_and_not_an_endless_buffer(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * (4 << 20))
    for begin in (0, 5):
        with pytest.raises(UsageError, match="a line of more than 1 MiB"):
            read(path, Segment(0, begin, 4 << 20), max_line_mib=1)


def test_all_bad_inputs_are_named_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.csv").write_text("")
    good = tmp_path / "good.jsonl"
    good.write_text("")
    os.symlink(good, tmp_path / "same.jsonl")
    names = ["empty", "x.csv", "missing.jsonl", "good.jsonl", "same.jsonl"]
    with pytest.raises(UsageError) as caught:
        sources.expand([str(tmp_path / name) for name in names])
    assert len(caught.value.problems) == 4


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["lines", "gz", "parquet"]), st.integers(0, 500), st.integers(0, 9)
        ),
        max_size=6,
    ),
    st.integers(1, 20),
)
def test_cuts_cover_every_input_once_and_in_order(kinds, num_shards):
    inputs = [
        sources.Input(f"{n}", kind, size, 0, groups if kind == "parquet" else size, "")
        for n, (kind, size, groups) in enumerate(kinds)
    ]
    shards = cut(inputs, num_shards)
    flat = [segment for shard in shards for segment in shard.segments]

    assert len(shards) == num_shards
    for number, source in enumerate(inputs):
        mine = [segment for segment in flat if segment.input == number]
        assert mine[0].begin == 0 and mine[-1].end == source.units
        assert all(a.end == b.begin for a, b in zip(mine, mine[1:]))
        assert len(mine) == 1 or source.kind != "gz"
    assert [segment.input for segment in flat] == sorted(segment.input for segment in flat)
