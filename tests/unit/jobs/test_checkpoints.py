"""`hpctrain checkpoint`: what it says, what it refuses, and that it changes nothing it was not
asked to."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import checkpoints
import pytest
from click.testing import CliRunner

from hpctrain.base import errors
from hpctrain.cli.checkpoint import command


@pytest.fixture
def cli():
    def run(*args):
        result = CliRunner().invoke(command, [str(arg) for arg in args])
        if isinstance(result.exception, errors.HpctrainError):
            return result.exception.exit_code, str(result.exception)
        assert result.exception is None or isinstance(result.exception, SystemExit), (
            result.exception
        )
        return result.exit_code, result.output

    return run


@pytest.fixture
def base(tmp_path):
    return checkpoints.save(
        str(tmp_path / "base v2"), 423858, 2, 2, name="_global_step423858_backup"
    )


def test_bootstrap_makes_the_folder_of_the_seed_and_says_what_it_read_from_the_name(
    cli, tmp_path, base
):
    parent = tmp_path / "project"
    parent.mkdir()
    os.chmod(parent, 0o2770)
    before = checkpoints.snapshot(base)
    old = os.umask(0o077)
    try:
        code, said = cli(
            "bootstrap", parent / "ck" / "new", "--start", base, "--layout", "deepspeed", "--tp", 2
        )
    finally:
        os.umask(old)
    folder = parent / "ck" / "new"
    assert (code, "iteration 423858" in said) == (0, True)
    assert os.readlink(folder / "global_step423858") == "../../../base v2/_global_step423858_backup"
    assert (folder / "latest").read_bytes() == b"global_step423858"
    assert [stat.S_IMODE(os.stat(path).st_mode) & 0o2070 for path in (parent / "ck", folder)] == [
        0o2070
    ] * 2
    assert stat.S_IMODE(os.stat(folder / "latest").st_mode) & 0o060 == 0o060
    again = checkpoints.snapshot(folder)
    assert cli("bootstrap", folder, "--start", base)[0] == 0
    assert checkpoints.snapshot(folder) == again
    assert checkpoints.snapshot(base) == before


def test_bootstrap_dry_run_writes_nothing(cli, tmp_path, base):
    assert (
        cli("bootstrap", tmp_path / "new", "--start", base, "--layout", "deepspeed", "--dry-run")[0]
        == 0
    )
    assert not (tmp_path / "new").exists()


def test_bootstrap_refuses_newer_work_another_start_and_a_half_copied_one(cli, tmp_path, base):
    checkpoints.save(str(tmp_path / "used"), 10, 2, 2)
    before = checkpoints.snapshot(tmp_path / "used")
    code, said = cli("bootstrap", tmp_path / "used", "--start", base, "--layout", "deepspeed")
    assert (code, "newer work" in said) == (errors.REFUSED, True)
    assert checkpoints.snapshot(tmp_path / "used") == before
    (tmp_path / "other").mkdir()
    os.symlink("../elsewhere", tmp_path / "other" / "global_step423858")
    code, said = cli("bootstrap", tmp_path / "other", "--start", base, "--layout", "deepspeed")
    assert (code, "elsewhere" in said) == (errors.USAGE, True)
    os.unlink(os.path.join(base, "zero_pp_rank_1_mp_rank_01_optim_states.pt"))
    code, said = cli("bootstrap", tmp_path / "new", "--start", base, "--layout", "deepspeed")
    assert (code, "zero_pp_rank_1_mp_rank_01_optim_states.pt" in said) == (errors.USAGE, True)
    assert not (tmp_path / "new").exists()


def test_bootstrap_never_writes_latest_through_a_link(cli, tmp_path, base):
    folder = tmp_path / "new"
    folder.mkdir()
    (tmp_path / "precious").write_text("global_step423858")
    os.symlink("../precious", folder / "latest")
    assert cli("bootstrap", folder, "--start", base, "--layout", "deepspeed")[0] == 0
    assert (tmp_path / "precious").read_text() == "global_step423858"
    assert not (folder / "latest").is_symlink()


def test_list_says_which_is_complete_which_is_named_and_which_comes_next(cli, tmp_path):
    for step in (10, 20, 30):
        checkpoints.save(str(tmp_path), step, 1, 2)
    os.unlink(tmp_path / "global_step30" / "mp_rank_00_model_states.pt")
    code, said = cli("list", tmp_path, "--json")
    found = {row["name"]: row for row in json.loads(said)["checkpoints"]}
    assert code == 0
    assert [
        found[name]["complete"] for name in ("global_step10", "global_step20", "global_step30")
    ] == [True, True, False]
    assert found["global_step30"]["named"] and found["global_step20"]["chosen"]
    assert [
        row["complete"]
        for row in json.loads(cli("list", tmp_path, "--names-only", "--json")[1])["checkpoints"]
    ] == [None] * 3


def test_ranks_that_a_checkpoint_must_have_and_has_not_are_no_success(cli, tmp_path):
    good = checkpoints.save(str(tmp_path / "ck"), 10, 2, 2)
    for ranks in (
        ("--tp", 4),
        ("--tp", 2, "--dp", 4),
        ("--tp", 2, "--pp", 2),
        ("--tp", 1, "--pp", 1),
        ("--zero", 3),
    ):
        code, said = cli("verify", good, *ranks)
        assert code == 1 and "the plan has" in said, ranks
        assert cli("bootstrap", tmp_path / "new", "--start", good, *ranks)[0] == 2, ranks
        assert not (tmp_path / "new").exists()
    assert cli("verify", good, "--tp", 2, "--pp", 0, "--dp", 2)[0] == 0


def test_verify_of_a_folder_of_checkpoints_looks_at_each(cli, tmp_path):
    for step in (10, 20):
        checkpoints.save(str(tmp_path / "ck"), step, 1, 2)
    assert cli("verify", tmp_path / "ck")[1].count("complete") == 2
    os.remove(tmp_path / "ck/global_step20/mp_rank_00_model_states.pt")
    code, said = cli("verify", tmp_path / "ck", "--layout", "deepspeed")
    assert code == 1 and "global_step10: complete" in said and "global_step20: torn" in said
    code, said = cli("verify", tmp_path)  # a folder of neither
    assert code == 1 and "there is no checkpoint in" in said and "complete" not in said


def test_odd_names_are_told_by_what_they_hold(cli, tmp_path):
    base = checkpoints.save(str(tmp_path / "odd"), 423858, 1, 2, name="_global_step423858_backup")
    os.unlink(tmp_path / "odd" / "latest")
    for target in (base, tmp_path / "odd"):
        code, said = cli("verify", target)
        assert code == 0 and "_global_step423858_backup: complete (DeepSpeed), 3 files" in said
    code, said = cli("list", tmp_path / "odd", "--json")
    assert [row["number"] for row in json.loads(said)["checkpoints"]] == [423858]
    assert cli("use", tmp_path / "odd", "--to", "423858", "--dry-run")[0] == 0


def test_verify_exits_1_when_one_is_not_complete(cli, tmp_path):
    good = checkpoints.save(str(tmp_path), 10, 2, 2)
    assert cli("verify", good)[0] == 0
    assert cli("verify", good, "--tp", 2, "--dp", 2, "--zero", 1)[0] == 0
    os.truncate(os.path.join(good, "mp_rank_01_model_states.pt"), 40)
    code, said = cli("verify", good, "--json")
    assert code == 1
    assert "mp_rank_01" in json.loads(said)["checkpoints"][0]["faults"][0]


def test_use_goes_back_and_keeps_the_newer_ones_aside(cli, tmp_path):
    for step in (10, 20, 30, 40):
        checkpoints.save(str(tmp_path), step, 1, 2)
    os.unlink(tmp_path / "global_step30" / "mp_rank_00_model_states.pt")
    before = checkpoints.snapshot(tmp_path)
    assert cli("use", tmp_path, "--back", 1, "--dry-run")[0] == 0
    assert checkpoints.snapshot(tmp_path) == before
    assert cli("use", tmp_path, "--back", 1)[0] == 0
    assert (tmp_path / "latest").read_text() == "global_step20"
    assert sorted(os.listdir(tmp_path)) == ["global_step10", "global_step20", "latest"]
    kept = sorted(os.listdir(f"{tmp_path}.hpctrain"))
    lock, *kept = kept  # held meanwhile, so that no link begins; and given back
    assert '"released": true' in Path(f"{tmp_path}.hpctrain", lock).read_text()
    assert kept == ["acts.jsonl", "aside-global_step40", "interrupted-global_step30"]
    assert cli("use", tmp_path, "--to", 10)[0] == 0
    code, said = cli("use", tmp_path, "--back", 1)
    assert (code, "before `global_step10`" in said) == (errors.USAGE, True)
    code, said = cli("use", tmp_path, "--to", "global_step20")
    assert (code, "there is no checkpoint" in said) == (errors.USAGE, True)


def test_use_start_goes_back_to_before_the_first_link(cli, tmp_path, base):
    folder = tmp_path / "new"
    cli("bootstrap", folder, "--start", base, "--layout", "deepspeed")
    checkpoints.save(str(folder), 423868, 2, 2)
    code, said = cli("use", folder, "--to", "start")
    assert (code, "optimizer" in said) == (0, True)
    assert (folder / "latest").read_text() == "global_step423858"
    assert (tmp_path / "new.hpctrain" / "aside-global_step423868").is_dir()


def test_use_refuses_while_a_link_works_there(cli, tmp_path, monkeypatch):
    checkpoints.save(str(tmp_path), 10, 1, 2)
    checkpoints.save(str(tmp_path), 20, 1, 2)
    held = {"job_id": "7", "restart": 0, "host": "nid1", "pid": 0, "run": "ft"}
    (tmp_path / ".hpctrain-lock.000001").write_text(json.dumps(held))
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text("#!/bin/sh\necho JobId=7 JobState=RUNNING Restarts=0\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    code, said = cli("use", tmp_path, "--back", 1)
    assert (code, "job 7 works" in said) == (errors.REFUSED, True)
    assert (tmp_path / "global_step20").is_dir()


@pytest.mark.parametrize(
    "args",
    [
        ("list", "nowhere"),
        ("list", "nowhere", "--layout", "deepspeed"),
        ("verify", "nowhere"),
        ("use", "nowhere", "--back", "1"),
        ("bootstrap", "nowhere"),
        ("bootstrap", "nowhere", "--start", "also nowhere", "--layout", "deepspeed"),
        ("list", "run.yaml"),
        ("use", "."),
        ("use", ".", "--to", "../x", "--layout", "deepspeed"),
        ("use", ".", "--back", "1", "--layout", "deepspeed"),
    ],
)
def test_what_is_not_there_is_said_and_not_made(cli, tmp_path, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    code, said = cli(*args)
    assert code in (errors.USAGE, errors.ENVIRONMENT), said
    assert os.listdir(tmp_path) == []
