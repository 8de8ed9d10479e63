"""What the cache of compiled templates promises: never needed, never trusted too far, never in the
way."""

from __future__ import annotations

import os

import pytest

from hpctrain.plan.template_cache import template_cache

RUN = (
    "name: r\nsite: local\nrecipe: command\ntime: 10m\nrecipe_options: {argv: [hostname], workdir:"
    " /}\n"
)


@pytest.fixture
def render(tmp_path, hpctrain, monkeypatch):
    """Render in a home of its own; gives the text of the job script."""
    home = tmp_path / "home"
    (home / ".cache").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "run.yaml").write_text(RUN)

    def run():
        done = hpctrain("render", "--force", cwd=tmp_path)
        assert (done.returncode, done.stderr.count("Traceback")) == (0, 0)
        return (tmp_path / "runs/r/job.sbatch").read_bytes()

    return run


def kept(tmp_path):
    return sorted((tmp_path / "home/.cache/hpctrain").rglob("*.cache"))


def test_a_second_render_takes_what_the_first_compiled_and_writes_the_same_bytes(render, tmp_path):
    first = render()
    files = {path: path.stat().st_mtime_ns for path in kept(tmp_path)}
    assert files

    assert render() == first
    assert {path: path.stat().st_mtime_ns for path in kept(tmp_path)} == files


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"\x00" * len(raw),
        lambda raw: b"\x80\x05" + raw,
        # Jinja's header stands, but what was compiled is of another text.
        lambda raw: raw.replace(raw[20:60], b"x" * 40, 1),
    ],
    ids=["empty", "half", "zeros", "shifted", "another checksum"],
)
def test_a_damaged_cache_is_passed_over(render, tmp_path, damage):
    first = render()
    for path in kept(tmp_path):
        path.write_bytes(damage(path.read_bytes()))

    assert render() == first


def test_a_home_without_a_cache_stays_as_it_is(render, tmp_path):
    (tmp_path / "home/.cache").rmdir()
    render()
    assert not (tmp_path / "home").exists() or not list((tmp_path / "home").iterdir())


def test_an_override_changed_between_two_renders_is_compiled_anew(render, tmp_path, monkeypatch):
    monkeypatch.delenv("HPCTRAIN_NO_USER_CONFIG", raising=False)
    own = tmp_path / ".hpctrain/templates/command/job.sbatch.j2"
    own.parent.mkdir(parents=True)
    for word in (b"one", b"two"):
        own.write_bytes(
            b'{% extends "!builtin/command/job.sbatch.j2" %}{% block user_setup %}: '
            + word
            + b"{% endblock %}\n"
        )
        assert b": " + word in render()


def test_what_others_could_write_is_not_run(tmp_path):
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    assert template_cache(environ) is not None
    (folder,) = (tmp_path / "hpctrain").iterdir()
    os.chmod(folder, 0o702)
    assert template_cache(environ) is None


def test_a_cache_that_cannot_be_made_is_none(tmp_path):
    (tmp_path / "hpctrain").write_text("a file where the folder would be")
    assert template_cache({"XDG_CACHE_HOME": str(tmp_path)}) is None
    assert template_cache({"XDG_CACHE_HOME": str(tmp_path / "missing")}) is None
