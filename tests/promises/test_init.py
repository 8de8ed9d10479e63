"""`hpctrain init` writes a run.yaml that is valid as it is, for every recipe at every site, and
replaces nothing."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from hpctrain.base.files import write_new
from hpctrain.base.text import text_problem
from hpctrain.config.document import parse_yaml
from hpctrain.config.new_run import Place, run_name, run_yaml_text
from hpctrain.config.recipe import list_recipes, load_recipe
from hpctrain.config.site import list_sites, load_site
from hpctrain.config.text import block, scalar
from hpctrain.plan.load import load_plan

sys.path.insert(0, str(Path(__file__).parents[1]))
from hostile import HOSTILE  # noqa: E402

RECIPES = [name for name, layer, _ in list_recipes() if layer == "shipped"]
SITES = [name for name, layer, _ in list_sites() if layer == "shipped"]


@pytest.fixture
def no_slurm(monkeypatch):
    """A laptop: no Slurm command on PATH, and no name that a site knows."""
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr("socket.gethostname", lambda: "laptop")


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_fresh_run_yaml_is_valid(recipe, site, tmp_path, cli, no_slurm):
    folder = tmp_path / "my run"
    assert cli("init", folder, "--recipe", recipe, "--site", site)[0] == 0
    code, _, err = cli("check", folder / "run.yaml")
    errors = [line for line in err.splitlines() if line.startswith("error:")]

    if site == "local" and recipe != "command":
        # `local` is this machine, so data that a newcomer does not have yet is missing here and
        # now; nothing else is.
        assert all(line.endswith("is not there") for line in errors), err
    else:
        assert (code, errors) == (0, [])


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_example_in_it_is_valid_too(recipe, site, tmp_path, no_slurm):
    text = run_yaml_text(load_recipe(recipe), load_site(site), site, Place("my-run"))
    (tmp_path / "run.yaml").write_text(re.sub(r"(?m)^( *)#(?=[^# ])|^#(?=  \S)", r"\1", text))
    plan = load_plan(str(tmp_path / "run.yaml")).plan

    assert plan.errors == []
    assert (
        plan.spec.give_up_after == 3
        and plan.spec.checkpoint_start
        and plan.spec.env == {"EXAMPLE": "1"}
    )


def test_an_account_left_as_the_example_is_noticed(tmp_path, cli, no_slurm):
    cli("init", tmp_path / "r", "--recipe", "command", "--site", "lumi")
    code, _, err = cli("check", tmp_path / "r/run.yaml")

    assert code == 0 and "warning: " in err and "is only the profile's example" in err


def test_nothing_that_is_there_is_replaced(tmp_path, cli):
    for make in (
        lambda path: path.write_text("mine\n"),
        lambda path: path.symlink_to(tmp_path / "nowhere"),
    ):
        path = tmp_path / "run.yaml"
        make(path)
        before = os.readlink(path) if path.is_symlink() else path.read_text()
        code, out, err = cli(
            "init", tmp_path, "--recipe", "command", "--site", "local", "--name", "x"
        )

        assert code == 4 and "is left as it is" in err and out == ""
        assert (os.readlink(path) if path.is_symlink() else path.read_text()) == before
        assert sorted(os.listdir(tmp_path)) == ["run.yaml"]
        path.unlink()


def test_dry_run_writes_nothing(tmp_path, cli):
    code, out, _ = cli(
        "init", tmp_path / "new", "--recipe", "command", "--site", "lumi", "--dry-run"
    )

    assert code == 0 and "account: project_465000000" in out and os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, cli):
    monkeypatch.setattr(
        os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    code, _, err = cli("init", tmp_path, "--recipe", "command", "--site", "local", "--name", "x")

    assert code == 3 and "No space left" in err and os.listdir(tmp_path) == []


def test_without_hard_links_the_file_is_still_written_once(tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported"))
    )
    write_new(str(tmp_path / "a" / "f"), "one\n")

    assert (tmp_path / "a" / "f").read_text() == "one\n" and os.listdir(tmp_path / "a") == ["f"]


def test_unknown_names_are_reported_together(tmp_path, cli):
    code, _, err = cli(
        "init",
        tmp_path,
        "--recipe",
        "comand",
        "--site",
        "lumy",
        "--name",
        "-x",
        "--account",
        "$(id)",
    )

    assert code == 2 and os.listdir(tmp_path) == []
    for words in (
        "did you mean `lumi`",
        "did you mean `command`",
        "`name: -x`",
        "`account: $(id)`",
    ):
        assert words in err


def test_an_account_that_the_site_does_not_know_is_refused(tmp_path, cli):
    code, _, err = cli(
        "init", tmp_path / "a", "--recipe", "command", "--site", "lumi", "--account", "mine"
    )

    assert code == 2 and "not an account of `lumi`" in err


def test_a_profile_by_path_is_named_from_the_new_file(tmp_path, cli, monkeypatch):
    (tmp_path / "mine.yaml").write_text(
        "name: mine\ntitle: t\nnode_types: {n: {cores: 4, memory_gib: 8}}\n"
    )
    monkeypatch.chdir(tmp_path)
    cli("init", "deep/er", "--recipe", "command", "--site", "mine.yaml")

    assert "site: ../../mine.yaml" in (tmp_path / "deep/er/run.yaml").read_text()
    assert cli("plan", "deep/er/run.yaml")[0] == 0


@pytest.mark.parametrize(
    "folder, name",
    [("/a/ft 7", "ft-7"), ("/a/-x-", "x"), ("/a/é.b", "b"), ("/a/" + "y" * 99, "y" * 64)],
)
def test_the_name_comes_from_the_folder(folder, name):
    assert run_name(folder) == name


@pytest.mark.parametrize(
    "value", [*HOSTILE, True, None, 8e-6, 1e16, 0.5, "1:30", "2026-01-01", "no", "08"]
)
def test_yaml_that_is_written_reads_back_as_the_same_value(value):
    if isinstance(value, str) and text_problem(value, multiline=True):
        with pytest.raises(ValueError):
            scalar(value)
        return
    lines = block("key", {"a": value, "b": [value, {"c": value}]})

    assert parse_yaml("\n".join(lines), "f").data == {
        "key": {"a": value, "b": [value, {"c": value}]}
    }
