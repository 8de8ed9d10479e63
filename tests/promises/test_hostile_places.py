"""Folders whose names no script can carry, and terminals that know few letters: one clear error, or
the answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

RUN = (
    "name: r\nsite: local\nrecipe: command\ntime: 10m\nrecipe_options: {argv: [hostname], workdir:"
    " /}\n"
)


def hpctrain(*argv, cwd, **environ):
    command = [sys.executable, "-m", "hpctrain", *argv]
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environ},
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "name", [b"\xff", "\u2028".encode(), "\x85".encode(), b"a\nb", b"a\\b", b"\x1b[31m", b"\x7f"]
)
@pytest.mark.parametrize("place", ["here", "out"])
def test_a_folder_that_no_script_can_carry_is_refused_in_one_error(tmp_path, name, place):
    folder = os.path.join(os.fsencode(tmp_path), name)
    os.mkdir(folder)
    home = folder if place == "here" else os.fsencode(tmp_path)
    with open(os.path.join(home, b"run.yaml"), "w") as file:
        file.write(RUN)
    options = [] if place == "here" else ["-o", os.path.join(folder, b"run")]
    done = hpctrain("render", *options, cwd=home)

    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.count(b"error: ") == 1 and b"hint: name another one with -o" in done.stderr
    assert b"\x1b" not in done.stderr
    assert sorted(os.listdir(folder)) == ([b"run.yaml"] if place == "here" else [])


def test_a_run_directory_may_have_the_longest_name_there_is(tmp_path):
    (tmp_path / "run.yaml").write_text(RUN)
    for name in ("x" * 255, "\u3042" * 85):
        done = hpctrain("render", "-o", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert os.fsdecode(done.stdout).endswith(f"{name}/job.sbatch\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_answer_is_printed_in_an_encoding_that_lacks_its_letters(tmp_path, encoding):
    (tmp_path / "run.yaml").write_text(
        RUN.replace("hostname", "\u0161\u010d\u2026"), encoding="utf-8"
    )
    done = hpctrain("plan", cwd=tmp_path, PYTHONIOENCODING=encoding)

    assert done.returncode == 0, done.stderr
    assert b"\\u0161\\u010d\\u2026" in done.stdout


def test_a_path_of_any_bytes_is_printed_as_it_is_and_json_stays_json(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.makedirs(os.path.join(folder, b"global_step5"))
    done = hpctrain("checkpoint", "verify", os.path.join(folder, b"global_step5"), cwd=tmp_path)
    assert (done.returncode, done.stdout.startswith(folder + b"/global_step5: torn")) == (
        1,
        True,
    ), done.stderr

    for encoding in ("utf-8", "ascii"):
        done = hpctrain(
            "checkpoint", "list", folder, "--json", cwd=tmp_path, PYTHONIOENCODING=encoding
        )
        assert json.loads(done.stdout)["folder"] == os.fsdecode(folder)
