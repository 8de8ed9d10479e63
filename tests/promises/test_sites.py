"""What `hpctrain site` says of profiles: layers, origins, contradictions and age; and what `site
new` leaves on disk."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path

import pytest

from hpctrain.base.errors import UsageError
from hpctrain.config.site import list_sites, load_site
from hpctrain.plan.load import load_plan
from hpctrain.sites.show import blame, find_problems

DATA = Path(__file__).parents[1] / "data" / "scontrol"
TODAY = datetime.date(2026, 11, 29)
GOOD = """\
name: mine
title: my machine
docs_url: https://example.org
maintainers: [me]
verified: {date: "2026-11-01", by: me}
slurm: {gpu_request: gres}
node_types:
  n: {sockets: 2, cores: 64, memory_gib: 100, gpus: 4}
partitions:
  p: {node_type: n, max_time: 1d}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with project, user layers switched on, and nothing of the developer's."""
    monkeypatch.setenv("HPCTRAIN_NO_USER_CONFIG", "0")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def profile(folder, text, name="mine"):
    path = folder / name / "profile.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def remarks(text, tmp_path, today=TODAY):
    path = profile(tmp_path, text)
    return [f"{p.level}: {p.what}" for p in find_problems(load_site(str(path)), str(path), today)]


def test_shipped_profiles_have_no_errors_and_someone_to_ask():
    for name, _, path in list_sites():
        found = find_problems(load_site(name), path, TODAY)

        assert [str(problem) for problem in found if problem.level != "note"] == []


def test_the_list_shows_the_layer_that_wins_and_survives_a_broken_profile(project, cli, tmp_path):
    profile(project / ".hpctrain" / "site_profiles", GOOD.replace("mine", "lumi"), "lumi")
    profile(tmp_path / "config/hpctrain/site_profiles", "name: [\n", "broken")
    code, out, _ = cli("site", "list", "--json")
    found = {item["name"]: item for item in json.loads(out)["sites"]}

    assert (
        code == 0 and found["lumi"]["layer"] == "project" and found["local"]["layer"] == "shipped"
    )
    assert found["broken"]["layer"] == "user" and "not valid YAML" in found["broken"]["problem"]
    assert found["lumi"]["verified"] == "2026-11-01" and found["lumi"]["maintainers"] == ["me"]


def test_blame_names_the_line_of_every_value_through_the_layers(project, cli):
    text = "name: lumi\nextends: lumi\npartitions:\n  dev-g: {max_nodes: 3}\n"
    profile(project / ".hpctrain" / "site_profiles", text, "lumi")
    code, out, _ = cli("site", "show", "lumi", "--blame")
    rows = {row[1]: row for row in (line.split("\t") for line in out.splitlines())}

    assert code == 0 and rows["partitions.dev-g.max_nodes"] == [
        ".hpctrain/site_profiles/lumi/profile.yaml:4:22",
        "partitions.dev-g.max_nodes",
        "3",
    ]
    assert rows["partitions.dev-g.max_time"][0].startswith("site_profiles/lumi/profile.yaml:")
    assert rows["partitions.dev-g.whole_nodes"] == [
        "default",
        "partitions.dev-g.whole_nodes",
        "false",
    ]


def test_blame_of_every_shipped_value_points_at_its_line():
    for name, _, path in list_sites():
        lines = Path(path).read_text().splitlines()
        for dotted, _, origin in blame(load_site(name)):
            if origin != "default":
                assert dotted.split(".")[-1] in lines[int(origin.split(":")[1]) - 1], (
                    dotted,
                    origin,
                )


def test_what_show_prints_is_a_profile_again(cli, tmp_path):
    code, out, _ = cli("site", "show", "lumi")
    path = profile(tmp_path, out, "lumi")

    assert code == 0 and load_site(str(path)).values == load_site("lumi").values


def test_a_stale_profile_is_a_warning_and_never_an_error(tmp_path, cli):
    found = remarks(GOOD, tmp_path, datetime.date(2028, 1, 1))

    assert found == ["warning: last verified on 2026-11-01, 426 days ago"]
    assert cli("site", "check", profile(tmp_path, GOOD.replace("2026", "2001")))[0] == 0


@pytest.mark.parametrize(
    "change, words",
    [
        (("maintainers: [me]\n", ""), "warning: nobody is named"),
        (('verified: {date: "2026-11-01", by: me}\n', ""), "warning: never verified"),
        (("2026-11-01", "2026-02-30"), "error: `verified.date: 2026-02-30` is no day"),
        (("2026-11-01", "2031-01-01"), "warning: `verified.date: 2031-01-01` lies in the future"),
        (("name: mine", "name: other"), "warning: `name: other` is not the name of its folder"),
        (("slurm:", "account: {required: true}\nslurm:"), "warning: `account.required` without"),
        (
            ("slurm:", "account: {pattern: 'p[0-9]+', example: x}\nslurm:"),
            "error: `account.example: x`",
        ),
        (
            ("gpus: 4", "gpus: 4, cpu_bind: {7: 'mask_cpu:0x1,0x2'}"),
            "error: `cpu_bind` for 7 cores names 2 places",
        ),
        (("gpu_request: gres", "gpu_request: none"), "warning: `n` has GPUs"),
        (("sockets: 2", "sockets: 3"), "warning: 64 cores cannot be spread"),
        (("sockets: 2", "sockets: 2, threads_per_core: 2"), "warning: `n` has 2 threads a core"),
        (("max_time: 1d", "min_nodes: 4, max_nodes: 2"), "error: partition `p` wants at least 4"),
        (("max_time: 1d", "max_running: 4, max_submitted: 2"), "warning: partition `p` lets more"),
        (
            ("slurm:", "network: {port_base: 60000, port_range: 20000}\nslurm:"),
            "error: the rendezvous ports",
        ),
        (
            ("slurm:", "network: {port_range: 20000}\nslurm:"),
            "warning: the rendezvous ports, up to 39999, may be taken",
        ),
        (
            ("slurm:", "env: {MASTER_PORT: {value: '1', why: x}}\nslurm:"),
            "error: `env.MASTER_PORT` is set by hpctrain",
        ),
        (
            ("gpu_request: gres", "always: {account: x}"),
            "error: `sbatch.account` cannot be set here",
        ),
        (
            ("gpu_request: gres", "always: {nosuch: x}"),
            "warning: `sbatch.nosuch` is passed on as it stands",
        ),
        (
            ("slurm:", "storage: {s: {path: '/{accont}'}}\nslurm:"),
            "error: `/{accont}` holds {accont}",
        ),
        (("slurm:", "container: {binds: [/x]}\nslurm:"), "warning: `container` has settings"),
        (("slurm:", "defaults: {nodez: 3}\nslurm:"), "error: unknown key `nodez`"),
        (
            ("gpus: 4", "gpus: 4, tmp: {kind: ram, size_gib: 200}"),
            "error: `n` has more /tmp in memory",
        ),
    ],
)
def test_contradictions_are_found(change, words, tmp_path):
    found = remarks(GOOD.replace(*change), tmp_path)

    assert any(line.startswith(words) for line in found), found


def test_a_good_profile_has_no_remarks(tmp_path):
    assert remarks(GOOD, tmp_path) == []


def test_check_reports_every_form_error_at_once_and_exits_2(tmp_path, cli):
    text = (
        GOOD.replace("title:", "titel:")
        .replace("cores: 64", "cores: many")
        .replace("max_time: 1d", "max_time: soon")
    )
    code, out, _ = cli("site", "check", profile(tmp_path, text), "--json")
    (found,) = json.loads(out)["sites"].values()

    assert code == 2 and not json.loads(out)["ok"]
    for words in (
        "unknown key `titel`",
        "`title` is missing",
        "cores: many",
        "`soon` is not a duration",
    ):
        assert any(words in problem["what"] for problem in found)
    assert {problem["where"].split(":", 1)[1] for problem in found} >= {
        "1:1",
        "2:1",
        "8:26",
        "10:31",
    }


@pytest.mark.parametrize("name", ["[", "*", "(?P<"])
def test_a_pattern_that_is_none_is_an_error_and_no_crash(name, tmp_path, cli):
    code, _, err = cli(
        "site", "check", profile(tmp_path, GOOD + f"match: {{hostnames: ['{name}']}}\n")
    )

    assert code == 2 and "is not a regular expression" in err


def test_checking_all_profiles_goes_on_after_a_broken_one(project, cli):
    profile(project / ".hpctrain" / "site_profiles", "- x\n", "broken")
    code, out, _ = cli("site", "check", "--json")

    shipped = {name for name, layer, _ in list_sites() if layer == "shipped"}
    assert code == 2 and set(json.loads(out)["sites"]) == {"broken", *shipped}


def test_a_draft_lands_in_the_project_loads_by_name_and_is_never_replaced(project, cli):
    files = [
        word
        for name in ("lumi-like.partitions", "lumi-like.nodes")
        for word in ("--from-scontrol", DATA / f"{name}.txt")
    ]
    first = cli("site", "new", "drafted", *files)
    path = project / ".hpctrain/site_profiles/drafted/profile.yaml"
    path.write_text(path.read_text() + "# mine\n")
    second = cli("site", "new", "drafted", *files)

    assert first[0] == 0 and load_site("drafted").partitions["standard-g"].max_nodes == 1024
    assert second[0] == 4 and path.read_text().endswith("# mine\n")
    assert cli("site", "check", "drafted")[0] == 0
    assert os.listdir(path.parent) == ["profile.yaml"]


def test_dry_run_prints_the_draft_and_writes_nothing(project, cli):
    code, out, _ = cli(
        "site", "new", "drafted", "--from-scontrol", DATA / "dgx-like.oneline.txt", "--dry-run"
    )

    assert code == 0 and out.startswith("# Drafted by") and os.listdir(project) == []


def test_without_slurm_and_without_files_it_says_what_to_do(project, cli, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    code, _, err = cli("site", "new", "drafted")

    assert code == 3 and "there is no `scontrol` here" in err and os.listdir(project) == []


def test_unreadable_files_are_exit_3(project, cli):
    assert cli("site", "new", "drafted", "--from-scontrol", "nosuch")[0] == 3
    assert cli("site", "new", "drafted", "--from-scontrol", project)[0] == 3
    assert cli("site", "new", "../evil", "--from-scontrol", DATA / "dgx-like.oneline.txt")[0] == 2
    assert os.listdir(project) == []


@pytest.mark.parametrize("loop", [["./a.yaml"], ["./b.yaml", "./a.yaml"], ["sub/../a.yaml"]])
def test_profiles_that_extend_each_other_are_one_clear_error(project, cli, loop):
    (project / "sub").mkdir()
    for name, parent in zip("ab", loop):
        (project / f"{name}.yaml").write_text(f"name: {name}\nextends: {parent}\n")
    code, _, err = cli("site", "check", "./a.yaml")

    assert code == 2 and "extends itself" in err and err.count("error:") == 1


SHARED = """\
name: mine
title: my machine
docs_url: https://example.org
maintainers: [me]
verified: {date: "2026-11-01", by: me}
slurm: {gpu_request: gres, mem: false}
node_types:
  n: {sockets: 2, cores: 64, memory_gib: 100, gpus: 4}
partitions:
  small: {partition: all, qos: small_q, node_type: n, max_time: 1d, max_nodes: 4, constraint: h100}
  large: {partition: all, qos: large_q, node_type: n, max_time: 6h, min_nodes: 5, max_nodes: 16}
  lent: {node_type: n, special: jobs there are ended at any time}
  sized: {node_type: n, special: by hand, max_time: 12h, max_time_by_nodes: {1: 2h, 8: 6h, 16: 12h}}
"""


def planned(tmp_path, **changes):
    profile(tmp_path, SHARED)
    run = {
        "name": "r",
        "site": str(tmp_path / "mine"),
        "recipe": "command",
        "gpus_per_node": 4,
        "recipe_options": {"argv": ["true"]},
        **changes,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    return load_plan(str(tmp_path / "run.yaml"), (), str(tmp_path / "runs")).plan


def directives(plan):
    return {one.option: one.value for one in plan.directives}


@pytest.mark.parametrize(
    ("nodes", "queue", "constraint"), [(4, "small", "h100"), (5, "large", None)]
)
def test_queues_of_one_partition_are_told_apart_by_their_qos(tmp_path, nodes, queue, constraint):
    plan = planned(tmp_path, nodes=nodes, time="6h")
    found = directives(plan)
    assert not plan.errors and plan.partition.name == queue
    assert (found["partition"], found["qos"]) == ("all", f"{queue}_q")
    assert found.get("constraint") == constraint
    assert "mem" not in found


def test_a_special_queue_is_taken_only_by_name(tmp_path):
    assert planned(tmp_path, nodes=20, time="1h").errors
    named = planned(tmp_path, nodes=20, time="1h", partition="lent")
    assert not named.errors and directives(named)["partition"] == "lent"


@pytest.mark.parametrize(
    ("nodes", "time", "fits"),
    [(7, "2:00:00", True), (7, "2:00:01", False), (8, "6h", True), (15, "6:00:01", False)]
    + [(16, "12h", True), (400, "12:00:01", False)],
)
def test_the_longest_time_follows_the_number_of_nodes(tmp_path, nodes, time, fits):
    plan = planned(tmp_path, nodes=nodes, time=time, partition="sized")
    assert bool(plan.errors) == (not fits), plan.errors
    if not fits:
        assert "longer than partition `sized` allows" in str(plan.errors[0])


@pytest.mark.parametrize(
    "extra",
    [
        "env: {X: {value: '$SCRATCH/x', why: y}}\n",
        "env: {X: {value: a, from_nodes: {2: $B}, why: y}}\n",
        "node_dirs: {X: {path: '$TMPDIR/x', why: y}}\n",
        "container: {runtime: apptainer, binds: ['$EBROOTNCCL:/opt/nccl']}\n",
        "storage: {s: {path: /scratch/$USER}}\n",
    ],
)
def test_a_dollar_sign_that_would_be_taken_literally_is_refused_with_its_line(tmp_path, extra):
    path = profile(tmp_path, SHARED + extra)
    with pytest.raises(UsageError) as caught:
        load_site(str(path))
    (problem,) = caught.value.problems
    assert "literally" in problem.what and problem.where.startswith(f"{path}:14:")
