"""Whose files may be run: mine, root's and those that my own config names, where nobody else
writes."""

from __future__ import annotations

import os

import pytest

from hpctrain.base.errors import UsageError
from hpctrain.config.trust import find_doubt, trusted

STRANGER, GROUP = 61002, 61100
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


@pytest.fixture
def mine(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    file = folder / "job.sbatch.j2"
    file.write_text("")
    return file


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Write the user's own config."""
    monkeypatch.delenv("HPCTRAIN_NO_USER_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def write(text):
        (tmp_path / "config/hpctrain").mkdir(parents=True, exist_ok=True)
        (tmp_path / "config/hpctrain/config.yaml").write_text(text)

    return write


def test_what_is_mine_alone_is_trusted_below_a_sticky_folder_too(mine):
    assert find_doubt(str(mine)) is None


def test_what_is_not_there_is_judged_by_the_folders_that_are(mine):
    assert trusted(str(mine.parent / "not/there"))
    mine.parent.chmod(0o777)
    assert not trusted(str(mine.parent / "not/there"))


@pytest.mark.parametrize("part", ["file", "folder", "above"])
def test_where_anybody_may_write_nothing_is_trusted(mine, part):
    place = {"file": mine, "folder": mine.parent, "above": mine.parent.parent}[part]
    place.chmod(0o777)

    doubt = find_doubt(str(mine))

    assert doubt.why == f"anybody may write in `{place}`"
    assert doubt.remedy == f"chmod o-w {place}"


def test_a_sticky_folder_is_safe_above_and_not_as_what_is_asked_about(mine):
    mine.parent.chmod(0o1777)

    assert trusted(str(mine))
    assert not trusted(str(mine.parent))


def test_a_link_counts_as_itself_and_as_what_it_leads_to(mine, tmp_path):
    safe = tmp_path / "safe"
    safe.symlink_to("a/b")
    assert trusted(str(safe / mine.name))
    assert trusted(str(tmp_path / "a/../safe" / mine.name))

    mine.parent.chmod(0o777)
    assert not trusted(str(safe / mine.name))


def test_a_link_to_itself_is_no_hang_and_not_trusted(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert "leads to itself" in find_doubt(str(tmp_path / "loop")).why


@needs_root
@pytest.mark.parametrize("part", ["file", "folder", "above"])
def test_what_is_another_users_is_not_trusted(mine, part):
    place = {"file": mine, "folder": mine.parent, "above": mine.parent.parent}[part]
    os.chown(place, STRANGER, -1)

    doubt = find_doubt(str(mine))

    assert doubt.why == f"`{place}` belongs to {STRANGER}"
    assert f"trusted: [{STRANGER}]" in doubt.remedy


@needs_root
def test_a_link_that_another_made_is_not_followed(mine, tmp_path):
    (tmp_path / "shared").mkdir()
    link = tmp_path / "shared" / "templates"
    link.symlink_to(mine.parent)
    os.chown(link, STRANGER, -1, follow_symlinks=False)

    assert find_doubt(str(link / mine.name)).why == f"`{link}` belongs to {STRANGER}"


@needs_root
def test_where_a_group_writes_it_must_be_named(mine, config):
    os.chown(mine.parent, -1, GROUP)
    mine.parent.chmod(0o2775)
    assert find_doubt(str(mine)).why == f"the group {GROUP} may write in `{mine.parent}`"

    config(f"trusted: [somebody, 'group:{GROUP}']\naccount: p\n")
    assert trusted(str(mine))


@needs_root
def test_an_owner_whom_my_config_names_is_trusted_and_nobody_else(mine, config):
    os.chown(mine, STRANGER, -1)
    config(f"trusted: [{STRANGER}]\n")
    assert trusted(str(mine))

    os.chown(mine, STRANGER + 1, -1)
    assert not trusted(str(mine))


@needs_root
def test_a_config_that_others_write_names_nobody(mine, config, tmp_path):
    os.chown(mine, STRANGER, -1)
    config(f"trusted: [{STRANGER}]\n")
    (tmp_path / "config/hpctrain/config.yaml").chmod(0o666)

    assert not trusted(str(mine))


def test_the_names_are_a_list(mine, config):
    config("trusted: everybody\n")
    mine.chmod(0o666)

    with pytest.raises(UsageError, match="a list of users"):
        find_doubt(str(mine))
