"""What `check` reads of large data, how long it waits for a file system, and what it cannot see."""

from __future__ import annotations

import os
import struct
import time

import numpy as np
import pytest
from promises.look.worlds import World

from hpctrain.base.errors import Problem
from hpctrain.base.parquet import NoParquet, read_footer
from hpctrain.data.dataset.indexed_dataset import write_index
from hpctrain.plan.look import indexed
from hpctrain.plan.look.reading import MAX_BYTES, Reader, waited
from hpctrain.recipes.facts import Indexed


def sparse(folder, name, documents, length, last=None):
    """An indexed dataset of `documents` of the same length whose .bin takes no space."""
    sizes = np.full(documents, length, "<i4")
    sizes[-1] = last or length
    prefix = folder / name
    with open(f"{prefix}.idx", "wb") as file:
        total = write_index(file, "uint16", iter([sizes]), documents)
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * total)
    return str(prefix)


def test_a_hundred_data_sets_are_read_in_a_blink_and_8_mib(tmp_path):
    prefixes = tuple((sparse(tmp_path, f"d{n}", 20_000, 500), "run.yaml:1:1") for n in range(100))
    reader, start = Reader(), time.process_time()
    found = list(indexed.problems(Indexed(prefixes, 1024, rows=10), reader))

    assert time.process_time() - start < 0.3 * 3  # a machine that others share
    assert MAX_BYTES - reader.left <= 8 << 20
    assert [problem.level for problem in found] == ["note"]
    # 100 x 20,000 x 500 tokens are 975,610 rows of 1,025
    assert "an epoch is about 975,610 rows" in found[0].why


def test_of_a_long_index_the_first_and_the_last_are_among_those_looked_at(tmp_path):
    prefix = sparse(tmp_path, "long", 2_000_000, 100, last=9000)
    data = Indexed(((prefix, "run.yaml:1:1"),), 512, "run.yaml:2:1")
    (problem,) = indexed.problems(data, Reader())

    assert "looked at of 2,000,000 documents" in problem.what and "9,000 tokens" in problem.why


def test_without_a_sidecar_the_documents_themselves_tell_masks_and_ends(tmp_path):
    documents = [[7, 20, 7, 8, 30, 8], [7, 21, 7, 8, 31, 8]]
    prefix = str(tmp_path / "bare")
    ids = [number for one in documents for number in one]
    with open(f"{prefix}.bin", "wb") as file:
        file.write(struct.pack(f"<{len(ids)}H", *ids))
    with open(f"{prefix}.idx", "wb") as file:
        write_index(file, "uint16", iter([np.array([6, 6], "<i4")]), 2)
    from hpctrain.recipes.facts import Masks

    right, wrong = Masks((7, 7), (8,)), Masks((3, 3), (8,))
    whose = ((prefix, "w"),)

    assert list(indexed.problems(Indexed(whose, 64, masks=right), Reader())) == []
    (problem,) = indexed.problems(Indexed(whose, 64, masks=wrong), Reader())
    assert "names 3" in problem.what


def test_a_file_system_that_hangs_is_named_and_waited_for_only_so_long(tmp_path):
    fifo = tmp_path / "hangs"
    os.mkfifo(fifo)
    reader = Reader()

    def look():
        yield Problem("seen before")
        reader.read(str(fifo), 0, 10)  # nobody ever writes: as a dead file server
        yield Problem("never")

    start = time.monotonic()
    found = waited(reader, look, limit_s=0.3)

    assert time.monotonic() - start < 3
    assert [one.what for one in found][0] == "seen before"
    assert f"`{fifo}` does not answer within 0.3 s" in found[-1].what
    assert found[-1].level == "warning" and len(found) == 2


def test_what_goes_wrong_while_looking_is_not_swallowed():
    def look():
        raise ValueError("a bug")
        yield

    with pytest.raises(ValueError, match="a bug"):
        waited(Reader(), look)


def test_the_budget_holds_for_any_wish(tmp_path):
    (tmp_path / "big").write_bytes(b"x" * 1000)
    reader = Reader(100)

    assert len(reader.read(str(tmp_path / "big"), 0, 1000)) == 100
    assert reader.read(str(tmp_path / "big"), 0, 1000) == b"" and reader.left == 0


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\xff" * 40 + b"PAR1", b"x" * 5000])
def test_what_is_no_parquet_is_said(content, tmp_path):
    (tmp_path / "x.parquet").write_bytes(content)

    with pytest.raises(NoParquet):
        read_footer(str(tmp_path / "x.parquet"))


def test_parquet_is_told_by_its_footer(tmp_path):
    world = World(tmp_path, "verl-gad")
    footer = read_footer(str(world.folder / "train.parquet"))

    assert footer == (1000, {"content": "list", "teacher_response": "text"})
