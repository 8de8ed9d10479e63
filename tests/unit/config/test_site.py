"""Site profiles: layers, what they become, and what contradicts itself."""

from __future__ import annotations

import copy

import pytest
import yaml

from hpctrain.base.errors import UsageError
from hpctrain.config.site import list_sites, load_site

PROFILE = {
    "name": "mine",
    "title": "a machine",
    "docs_url": "https://example.org",
    "maintainers": ["us"],
    "verified": {"date": "2026-01-01", "by": "us", "evidence": "none"},
    "slurm": {"gpu_request": "gres"},
    "node_types": {
        "g": {
            "cores": 64,
            "usable_cores": 56,
            "memory_gib": 480,
            "gpus": 8,
            "cpu_bind": {7: "mask"},
        },
        "c": {"cores": 128, "memory_gib": 224},
    },
    "partitions": {
        "small": {"node_type": "g", "max_time": "1d", "max_nodes": 4},
        "cpu": {"node_type": "c"},
    },
}


@pytest.fixture
def site_of(tmp_path):
    """The site of PROFILE after `change(profile)`."""

    def load(change=lambda profile: None):
        profile = copy.deepcopy(PROFILE)
        change(profile)
        path = tmp_path / "profile.yaml"
        path.write_text(yaml.safe_dump(profile))
        return load_site(str(path))

    return load


def test_a_profile_becomes_nodes_and_partitions(site_of):
    site = site_of()
    big, small = site.node_types["g"], site.node_types["c"]
    assert (big.cores, big.usable_cores, big.memory_gib, big.gpus, big.cpu_bind) == (
        64,
        56,
        480,
        8,
        {7: "mask"},
    )
    assert (small.usable_cores, small.gpus, small.gpu_vendor, small.sockets) == (128, 0, "", 1)
    partition = site.partitions["small"]
    assert (partition.node_type, partition.max_time_s, partition.max_nodes) == (big, 86400, 4)
    assert (partition.min_nodes, partition.whole_nodes, partition.debug, partition.billing) == (
        None,
        False,
        False,
        None,
    )
    assert site.partition("small") is partition and site.partition("other") is None


def test_a_site_without_partitions_takes_any_name(site_of):
    def bare(profile):
        del profile["partitions"]

    assert site_of(bare).partition("x").node_type.name == "c"  # the first by name
    assert (
        site_of(lambda p: (bare(p), p.update(default_node_type="g"))).partition("x").node_type.name
        == "g"
    )


def setting(*path, value):
    def change(profile):
        for key in path[:-1]:
            profile = profile.setdefault(key, {})
        profile[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            setting("partitions", "small", "node_type", value="gg"),
            "partition `small` names an unknown node type `gg`",
        ),
        (
            setting("partitions", "small", "billing", value={"unit": "h"}),
            "billing of `small` needs one of per_node_hour and per_slice_hour",
        ),
        (
            setting(
                "partitions",
                "small",
                "billing",
                value={"unit": "h", "per_node_hour": 1, "per_slice_hour": 1},
            ),
            "billing of `small` needs one of",
        ),
        (
            setting("node_types", "g", "usable_cores", value=65),
            "has more usable cores (65) than cores (64)",
        ),
        (
            setting("tools", "cpu_partition", value="cp"),
            "tools.cpu_partition names an unknown partition `cp`",
        ),
        (
            setting("tools", "debug_partition", value="x"),
            "tools.debug_partition names an unknown partition `x`",
        ),
        (setting("default_node_type", value="x"), "default_node_type `x` is unknown"),
        (setting("account", "pattern", value="("), "`(` is not a regular expression"),
        (setting("match", "hostnames", value=["ok", "["]), "`[` is not a regular expression"),
    ],
)
def test_a_profile_that_contradicts_itself_is_refused(site_of, change, words):
    with pytest.raises(UsageError) as caught:
        site_of(change)
    (problem,) = caught.value.problems
    assert words in problem.what and "profile.yaml:" in problem.where


@pytest.mark.parametrize(
    "change",
    [
        setting("node_types", "g", "usable_cores", value=64),
        setting("partitions", "small", "billing", value={"unit": "h", "per_node_hour": 0}),
        setting("tools", "cpu_partition", value="cpu"),
        setting("default_node_type", value="g"),
        setting("account", "pattern", value="p[0-9]+"),
    ],
)
def test_what_only_just_fits_is_fine(site_of, change):
    assert site_of(change).name == "mine"


def test_every_problem_is_told_at_once(site_of):
    with pytest.raises(UsageError) as caught:
        site_of(
            lambda p: (
                p.update(titel="x"),
                p["node_types"]["g"].update(cores="many"),
                p.pop("title"),
            )
        )
    assert len(caught.value.problems) == 3


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project's folder, and a way to put profiles beside its run.yaml."""
    monkeypatch.setenv("HPCTRAIN_NO_USER_CONFIG", "0")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))

    def write(name, **fields):
        path = tmp_path / ".hpctrain" / "site_profiles" / name / "profile.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump({"name": name, **fields}))
        return path

    write.base_dir = str(tmp_path)
    return write


def test_a_profile_is_laid_over_the_one_it_extends(project):
    project("base", **{key: value for key, value in PROFILE.items() if key != "name"})
    project("top", extends="base", node_types={"g": {"gpus": 4}})
    site = load_site("top", project.base_dir)
    assert (site.name, site.node_types["g"].gpus, site.node_types["g"].cores) == ("top", 4, 64)
    assert [file.rsplit("/", 2)[1] for file in site.files] == ["base", "top"]


def test_ones_own_lumi_may_extend_lumi_and_nothing_extends_itself(project):
    project("lumi", extends="lumi", title="ours")
    site = load_site("lumi", project.base_dir)
    assert site.title == "ours" and "standard-g" in site.partitions
    project("a", extends="b")
    project("b", extends="a")
    with pytest.raises(UsageError, match="extends itself"):
        load_site("b", project.base_dir)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lumo", "there is no site profile `lumo`"),
        ("./nowhere", "there is no site profile at `./nowhere`"),
    ],
)
def test_a_site_that_is_not_there(name, words):
    with pytest.raises(UsageError, match=words) as caught:
        load_site(name, where="run.yaml:2:7")
    assert caught.value.problems[0].where == "run.yaml:2:7"


def test_an_empty_profile_is_told(tmp_path):
    (tmp_path / "profile.yaml").write_text("")
    with pytest.raises(UsageError, match="the profile is empty"):
        load_site(str(tmp_path))


def test_the_strongest_layers_profile_counts(project, monkeypatch):
    assert {name: layer for name, layer, _ in list_sites(project.base_dir)}["lumi"] == "shipped"
    path = project("lumi", **{key: value for key, value in PROFILE.items() if key != "name"})
    found = [(layer, file) for name, layer, file in list_sites(project.base_dir) if name == "lumi"]
    assert found == [("project", str(path))]
    monkeypatch.setenv("HPCTRAIN_NO_USER_CONFIG", "1")
    assert {name: layer for name, layer, _ in list_sites(project.base_dir)}["lumi"] == "shipped"
