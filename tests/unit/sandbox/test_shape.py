"""The pure part of sandboxes: shapes, configuration texts, package indexes, bind lists."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.base import errors, units
from hpctrain.base.paths import shipped_dir
from hpctrain.config.site import load_site
from hpctrain.sandbox import daemons, leftovers, packages, shape
from hpctrain.sandbox.from_site import shape_from_site

PLACE = shape.Place(
    "/s", "/r", "me", shape.Ports(11000, 11001, 11002), "/plugins", 1001, has_lua=True
)

_SPEC = importlib.util.spec_from_file_location(
    "singularity", Path(shipped_dir("templates"), "sandbox", "singularity.py")
)
singularity = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(singularity)


def settings(text: str) -> dict[str, str]:
    lines = [
        line
        for line in text.splitlines()
        if not line.startswith(("#", "NodeName", "PartitionName"))
    ]
    return dict(line.split("=", 1) for line in lines)


def test_a_lumi_shape_has_lumis_partitions_limits_and_nodes() -> None:
    lumi = shape_from_site(load_site("lumi"), 192, accounting=True, accounts=["project_465000000"])
    files = shape.config_files(lumi, PLACE)
    text = files["slurm.conf"]
    assert settings(text)["EnforcePartLimits"] == "ALL" and settings(text)["MaxArraySize"] == "1001"
    node = next(
        line
        for line in text.splitlines()
        if "nid[000001-000192]" in line and line.startswith("NodeName")
    )
    for word in ("Port=[11002-11193]", "ThreadsPerCore=2", "RealMemory=491520", "Gres=gpu:mi250:8"):
        assert word in node.split()
    # Core 0 of each group of 8, both threads: 56 of 64 cores are left.
    assert "CpuSpecList=0,1,16,17,32,33,48,49,64,65,80,81,96,97,112,113" in node.split()
    part = next(line for line in text.splitlines() if line.startswith("PartitionName=standard-g"))
    for word in (
        "MaxTime=2-00:00:00",
        "MaxNodes=1024",
        "OverSubscribe=EXCLUSIVE",
        "QOS=part-standard-g",
        "Default=YES",
    ):
        assert word in part.split()
    assert "Flags=amd_gpu_env" in files["gres.conf"]
    assert [
        "add",
        "qos",
        "part-dev-g",
        "MaxSubmitJobsPerUser=2",
        "MaxJobsPerUser=1",
        "Flags=DenyOnLimit",
    ] in (shape.accounting_commands(lumi, "me"))
    assert "127.77.0.192 nid000192" in files["hosts"].splitlines()


def test_only_folders_of_jobs_that_the_controller_names_are_left_overs() -> None:
    lumi = shape_from_site(load_site("lumi"), 1)
    assert "/tmp/{user}-{job}-miopen" in lumi.node_dirs
    folders = leftovers.node_dirs(lumi.node_dirs, {"7", "12"})
    assert (
        f"/tmp/{os.geteuid()}-7-miopen" in folders and f"/tmp/{os.geteuid()}-12-triton" in folders
    )
    assert all(re.search(r"-(7|12)-", folder) for folder in folders)


@pytest.mark.parametrize("site", ["lumi", "generic-cuda", "local"])
def test_every_shipped_site_becomes_a_shape(site: str) -> None:
    wanted = shape_from_site(load_site(site), 2)
    files = shape.config_files(wanted, PLACE)
    assert shape.config_files(wanted, PLACE) == files
    assert ("slurmdbd.conf" in files) is False
    assert shape.ClusterShape.from_json(json.loads(json.dumps(wanted.as_json()))) == wanted


def test_a_shape_survives_json_with_everything_set() -> None:
    wanted = shape_from_site(
        load_site("lumi"), {"lumi-g": 3, "lumi-c": 0}, accounting=True, mounts=[("/a", "/scratch")]
    )
    assert shape.ClusterShape.from_json(json.loads(json.dumps(wanted.as_json()))) == wanted
    assert {part.name for part in wanted.partitions} == {
        "standard-g",
        "small-g",
        "dev-g",
        "largemem",
    }


def test_everything_wrong_with_a_shape_is_said_at_once() -> None:
    bad = shape.ClusterShape(
        "a b",
        (
            shape.NodeGroup(
                "n", shape.NodeShape(1, 4, 1, 1.0, reserved_cores=(9,)), 1, prefix="x\ny"
            ),
        ),
        (shape.PartitionShape("p#", ("nope",)),),
        accounts=("$(x)",),
        mounts=(("rel", "/"),),
    )
    with pytest.raises(errors.UsageError) as caught:
        shape.config_files(bad, PLACE)
    assert len(caught.value.problems) == 7


@pytest.mark.parametrize(
    "path", ["/a b", "/a#b", "/a%n", "/a,b", "/a'b", "/a\nb", "relative", "/é"]
)
def test_paths_that_slurm_conf_cannot_hold_are_refused(path: str) -> None:
    with pytest.raises(errors.UsageError):
        shape.check_path(path, "the directory")


@given(st.integers(1, 64), st.integers(1, 4), st.data())
def test_reserved_cores_keep_their_threads_together(
    cores: int, threads: int, data: st.DataObject
) -> None:
    reserved = data.draw(st.sets(st.integers(0, cores - 1), max_size=cores - 1))
    node = shape.NodeShape(1, cores, threads, 1.0, reserved_cores=tuple(reserved))
    ids = shape.reserved_cpu_ids(node)
    assert {number // threads for number in ids} == reserved and len(ids) == len(reserved) * threads
    assert node.usable_cores == cores - len(reserved)


def test_node_addresses_are_distinct_for_the_largest_sandbox() -> None:
    group = shape.NodeGroup("n", shape.NodeShape(1, 1, 1, 1.0), shape.MAX_NODES)
    text = shape.hosts(shape.ClusterShape("c", (group,), (shape.PartitionShape("p", ("n",)),)))
    addresses = [line.split()[0] for line in text.splitlines()]
    assert len(set(addresses)) == shape.MAX_NODES + 1
    assert all(max(map(int, address.split("."))) < 256 for address in addresses)
    assert units.compress_nodes(group.names) == "nid[000001-004096]"


def test_libraries_are_found_and_maintainer_tools_are_not() -> None:
    text = (
        "Package: slurmd\nVersion: 1\nArchitecture: amd64\nSHA256: aa\nPre-Depends: libx1 (>="
        " 2)\nDepends: libc6 (>= 2.34), libhwloc15 (>= 2), ucf, munge (>= 0.5), libpam0g |"
        " libpam-x, adduser\nDescription: x\n Depends: libnot\n\nPackage: slurmd\nVersion:"
        " 0\nArchitecture: amd64\nSHA256: bb\n"
    )
    found = packages.parse_index(text)
    assert found["slurmd"]["Version"] == "1"
    assert packages.libraries_of(found["slurmd"]) == ["libx1", "libhwloc15", "libpam0g"]


@pytest.mark.parametrize(
    ("text", "binds"),
    [
        ("", []),
        ("/a,/b:/c", [("/a", "/a", "rw"), ("/b", "/c", "rw")]),
        ("/a:/b:ro", [("/a", "/b", "ro")]),
        ("/a:/b:ro,image-src=/,/c", [("/a", "/b", "ro,image-src=/"), ("/c", "/c", "rw")]),
    ],
)
def test_bind_lists_are_read_as_singularity_reads_them(
    text: str, binds: list[tuple[str, str, str]]
) -> None:
    assert singularity.split_binds(text) == binds


@pytest.mark.parametrize(
    ("lines", "why", "hint"),
    [
        ([], "", ""),
        (["just talk"], "just talk", ""),
        (
            [
                (
                    "[2026-11-21T10:30:13.237] error: Error binding slurm stream socket: Address"
                    " already in use"
                ),
                "slurmd: error: MPI: Cannot create context for mpi/pmix",
                (
                    "slurmd: error: Couldn't load specified plugin name for mpi/pmix_v4: Plugin"
                    " init() callback failed"
                ),
                "slurmctld: error: Error binding slurm stream socket: Address already in use",
            ],
            "error: Error binding slurm stream socket: Address already in use",
            "another program took a port of this sandbox meanwhile: run it again",
        ),
        (["2026-11-21 10:22:37 0 [ERROR] Aborting"], "[ERROR] Aborting", ""),
        (
            ["slurmd: fatal: write: No space left on device"],
            "fatal: write: No space left on device",
            "the disk is full",
        ),
    ],
)
def test_a_daemons_last_words_are_told_once_and_with_what_to_do(
    lines: list[str], why: str, hint: str
) -> None:
    told, advice = daemons.last_words(lines)
    assert told == why and advice.startswith(hint) and bool(advice) == bool(hint)


def test_every_missing_tool_is_named_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        errors.EnvironmentFault, match="`apt-get`, `apt-cache`, `dpkg-deb` are not here"
    ):
        packages.unpack(tmp_path / "cache", report=lambda text: None)


def test_slurmdbd_needs_no_tmp_that_can_be_written() -> None:
    lumi = shape_from_site(load_site("lumi"), 1, accounting=True)
    assert settings(shape.config_files(lumi, PLACE)["slurmdbd.conf"])["ArchiveDir"] == "/r/tmp"
