"""A profile drafted from what Slurm prints: right values, honest doubts, and always one that
loads."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import pytest

from hpctrain.base.errors import UsageError
from hpctrain.config.document import parse_yaml
from hpctrain.config.site import site_from_document
from hpctrain.sites.draft import draft_profile
from hpctrain.slurm.facts import NodeShape, parse_gres, read_facts

sys.path.insert(0, str(Path(__file__).parents[2]))
from hostile import HOSTILE  # noqa: E402

DATA = Path(__file__).parents[2] / "data" / "scontrol"


def drafted(*texts, name="drafted"):
    text = draft_profile(name, read_facts(texts))
    return site_from_document(parse_yaml(text, "draft")), text


def recorded(*names):
    return [(DATA / f"{name}.txt").read_text() for name in names]


def test_a_site_like_lumi_is_drafted_with_its_limits_and_reserved_cores():
    site, text = drafted(*recorded("lumi-like.nodes", "lumi-like.config", "lumi-like.partitions"))

    assert set(site.node_types) == {"gpu-mi250-8", "cpu-128-224g", "cpu-128-480g"}
    node = site.node_types["gpu-mi250-8"]
    assert (node.cores, node.usable_cores, node.threads_per_core, node.memory_gib) == (
        64,
        56,
        2,
        480,
    )
    assert (node.gpus, node.gpu_type, node.gpu_vendor) == (8, "mi250", "amd")
    standard = site.partitions["standard-g"]
    assert (standard.max_time_s, standard.max_nodes, standard.whole_nodes, standard.debug) == (
        172800,
        1024,
        True,
        False,
    )
    assert site.partitions["dev-g"].debug and site.partitions["dev-g"].max_time_s == 10800
    assert (
        site.partitions["small"].node_type.name == "cpu-128-224g"
        and "also cpu-128-480g (1)" in text
    )
    bench = site.partitions["bench"]
    assert (bench.max_time_s, bench.max_nodes, bench.min_nodes, bench.qos) == (
        None,
        None,
        2,
        "bench",
    )
    assert site.values["slurm"]["max_array_size"] == 100000 and site.values["account"]["required"]
    assert site.values["match"]["cluster_name"] == "lumi"
    assert site.values["tools"]["cpu_partition"] == "small"
    assert site.values["tools"]["debug_partition"] == "dev-g"


def test_a_task_gets_its_cores_where_slurm_counts_threads():
    with_threads, _ = drafted(*recorded("lumi-like.nodes", "lumi-like.partitions"))
    text = (DATA / "lumi-like.nodes.txt").read_text()
    without, _ = drafted(
        text.replace("ThreadsPerCore=2", "ThreadsPerCore=1"), *recorded("lumi-like.partitions")
    )

    assert with_threads.values["slurm"]["hint"] == "nomultithread"
    assert without.values["slurm"]["hint"] is None


def test_nothing_in_a_draft_is_called_verified():
    site, text = drafted(*recorded("lumi-like.partitions"))

    assert (
        site.values["verified"]["date"] is None
        and "verified: never" in text
        and text.count("TODO: check") > 5
    )


def test_one_line_records_mig_slices_and_infinite_times():
    site, text = drafted(*recorded("dgx-like.oneline"))

    assert set(site.node_types) == {"gpu-h100-8", "gpu-8", "gpu-18"}
    assert site.partitions["batch"].node_type.name == "gpu-h100-8"
    assert (
        site.partitions["interactive"].max_time_s is None
        and site.partitions["interactive"].qos == "interactive"
    )
    assert site.node_types["gpu-18"].sockets == 2  # not the 99 of its Reason=
    assert "Slurm's default" in text


def test_sinfo_alone_is_enough():
    for order in (("sinfo-long", "sinfo-short"), ("sinfo-short", "sinfo-long")):
        site, _ = drafted(*recorded(*order))

        assert site.partitions["debug"].max_time_s == 1800 and site.partitions["debug"].debug
        assert site.partitions["long"].max_time_s is None
        assert sorted((node.cores, node.threads_per_core) for node in site.node_types.values()) == [
            (32, 1),
            (32, 2),
        ]


def test_partitions_alone_give_guesses_that_say_so():
    site, text = drafted(*recorded("lumi-like.partitions"))

    assert site.partitions["standard-g"].node_type.gpus == 8 and "no node was shown" in text


def test_free_text_of_a_node_never_becomes_a_fact():
    site, text = drafted(*recorded("lumi-like.nodes", "lumi-like.partitions"))

    assert "evil" not in text and "canary" not in text and "99" not in re.sub("0999|#.*", "", text)
    assert {node.gpus for node in site.node_types.values()} == {0, 8}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "\x00" * 50,
        "slurm_load_partitions error: Unable to contact slurm controller\n",
        "NodeName=x\n",
    ],
)
def test_text_without_facts_is_an_error(text):
    with pytest.raises(UsageError):
        drafted(text)


@pytest.mark.parametrize("name", ["../x", "", "a b", "-x", "$(id)", "a/b", "é"])
def test_a_site_name_that_is_no_name_is_refused(name):
    with pytest.raises(UsageError):
        drafted(*recorded("lumi-like.partitions"), name=name)


@pytest.mark.parametrize("value", [value for value in HOSTILE if len(value) < 200])
def test_hostile_names_and_values_never_break_the_draft(value):
    value = value.encode("utf-8", "replace").decode()
    texts = recorded("lumi-like.partitions", "lumi-like.nodes", "lumi-like.config")
    for old in ("dev-g", "mi250", "lumi\n", "2-00:00:00", "admins"):
        site, text = drafted(*(t.replace(old, value) for t in texts))

        assert site.partitions and not re.search(r"(?m)^touch canary", text)


def test_files_cut_off_anywhere_give_a_profile_that_loads_or_a_clear_error():
    chance = random.Random(7)
    whole = "\n".join(
        recorded("lumi-like.partitions", "lumi-like.nodes", "dgx-like.oneline", "sinfo-long")
    )
    for _ in range(150):
        cut = whole[: chance.randrange(len(whole))]
        try:
            drafted(cut)
        except UsageError as error:
            assert "no partition and no node" in str(error)  # noqa: PT017


def test_noise_never_raises_anything_else():
    chance = random.Random(11)
    words = re.findall(
        r"\S+|\s+", "\n".join(recorded("lumi-like.partitions", "lumi-like.nodes", "sinfo-short"))
    )
    for _ in range(100):
        text = "".join(chance.choice(words) for _ in range(300))
        try:
            drafted(text, "NodeName=n1 CPUTot=4 RealMemory=9999 Gres=gpu:2\n")
        except UsageError as error:
            raise AssertionError(f"{error}\n{text}") from error


def test_the_draft_does_not_depend_on_the_order_of_nodes():
    text = (DATA / "lumi-like.nodes.txt").read_text().split("\n\n")
    first, second = drafted("\n\n".join(text))[1], drafted("\n\n".join(reversed(text)))[1]

    assert first == second


def test_three_thousand_nodes_are_one_kind():
    nodes = "".join(
        f"NodeName=n{i} CoresPerSocket=64 CPUTot=128 Gres=gpu:8 RealMemory=480000 Sockets=2"
        " Partitions=p\n"
        for i in range(3000)
    )
    site, text = drafted(nodes, "PartitionName=p MaxTime=1-00:00:00\n")

    assert list(site.node_types) == ["gpu-8"] and "# 3000 nodes" in text


@pytest.mark.parametrize(
    "text, expected",
    [
        ("(null)", (0, "")),
        ("gpu:8", (8, "")),
        ("gpu:mi250:8(S:0-3)", (8, "mi250")),
        ("gpu", (1, "")),
        ("gpu:a100", (1, "a100")),
        ("gpu:a100:2,gpu:h100:2", (4, "")),
        ("craynetwork:4,gpu:gh200:4", (4, "gh200")),
        ("gpu:nvidia_a100_1g.5gb:7(S:0)", (7, "nvidia_a100_1g.5gb")),
        ("shard:32,gpu:2(no_consume)", (2, "")),
        ("gpu:$(id):3", (0, "")),
        ("gpu:2,gpu:x", (3, "")),
    ],
)
def test_gres_are_counted(text, expected):
    assert parse_gres(text) == expected


def test_numbers_that_no_node_has_are_left_out():
    facts = read_facts(
        [
            (
                "NodeName=a CPUTot=99999999 RealMemory=1\nNodeName=b CoresPerSocket=8 Sockets=2"
                " CPUTot=16 RealMemory=65536 Gres=gpu:65\n"
            ),
            "NodeName=c CoresPerSocket=8 Sockets=2 CPUTot=16 RealMemory=65536\n",
        ]
    )

    assert facts.nodes == {"c": NodeShape(2, 16, 1, 16, 65536, 0, "")} and len(facts.skipped) == 2
