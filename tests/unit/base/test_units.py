import pytest

from hpctrain.base.units import (
    compress_nodes,
    expand_nodes,
    format_duration,
    format_mem_gib,
    format_time,
    parse_mem_gib,
    parse_time_s,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("20:00:00", 72000),
        ("1-00:00:00", 86400),
        ("2-12", 216000),
        ("1-1:30", 91800),
        ("90", 5400),
        (30, 1800),
        ("15:30", 930),
        ("20h", 72000),
        ("1d12h", 129600),
        ("1.5h", 5400),
        ("90s", 90),
    ],
)
def test_durations_are_read_as_slurm_reads_them(text, seconds):
    assert parse_time_s(text) == seconds
    assert parse_time_s(format_time(seconds)) == seconds


@pytest.mark.parametrize(
    "text", ["", "h", "20 hours ago", "1:2:3:4", "-5", "0", "٣", "1e3h", "99999-00", "$(id)"]
)
def test_other_durations_are_refused(text):
    with pytest.raises(ValueError):
        parse_time_s(text)


def test_memory_is_gib_and_goes_back_to_slurm_form():
    assert parse_mem_gib("480G") == 480
    assert parse_mem_gib("1T") == 1024
    assert parse_mem_gib(2048) == 2
    assert format_mem_gib(480) == "480G"
    assert format_mem_gib(1.5) == "1536M"
    with pytest.raises(ValueError):
        parse_mem_gib("lots")


def test_node_lists_round_trip():
    text = "nid[000001-000003,000007],login1"
    names = expand_nodes(text)

    assert names == ["nid000001", "nid000002", "nid000003", "nid000007", "login1"]
    assert set(expand_nodes(compress_nodes(names))) == set(names)
    assert compress_nodes(["a9", "a10", "b"]) == "a9,a10,b"


@pytest.mark.parametrize(
    "text", ["nid[1-", "nid[3-1]", "n[1-999999999]", "a,,b", "n[x]", "n[1][2]"]
)
def test_malformed_node_lists_are_refused(text):
    with pytest.raises(ValueError):
        expand_nodes(text)


def test_durations_for_people():
    assert [format_duration(s) for s in (42, 425, 12000, 187200)] == [
        "42s",
        "7m05s",
        "3h20m",
        "2d04h",
    ]
