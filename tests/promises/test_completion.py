"""Tab completes verbs, sites, recipes, templates and partitions in real shells, quickly, and never
with an error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

HEAVY = ("numpy", "pandas", "torch", "submitit", "jinja2", "sentencepiece")


@pytest.fixture
def complete(tmp_path):
    def run(*words, kind="bash", cwd=None, probe=""):
        environment = {
            **os.environ,
            "_HPCTRAIN_COMPLETE": f"{kind}_complete",
            "COMP_WORDS": " ".join(["hpctrain", *words]),
            "COMP_CWORD": words[-1] if kind == "fish" else str(len(words)),
        }
        code = "import sys, atexit\n" + probe + "\nfrom hpctrain.cli import main\nmain([])"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            cwd=cwd or tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == "", done.stderr
        return [line.partition(",")[2] for line in done.stdout.splitlines() if line]

    return run


def test_verbs_and_options(complete):
    assert complete("ini") == ["init"]
    assert "render" in complete("") and "site" in complete("")
    assert "--dry-run" in complete("shell", "--d")


def test_sites_recipes_and_templates(complete):
    assert complete("init", "--site", "l") == ["leonardo", "local", "lumi"]
    assert complete("site", "show", "ge") == ["generic-cuda"]
    assert complete("recipe", "show", "com") == ["command"]
    assert "command/job.sbatch.j2" in complete("template", "override", "comm")


def test_partitions_of_the_site_on_the_line_or_in_run_yaml(complete, tmp_path):
    assert complete("shell", "--site", "lumi", "--partition", "st") == ["standard", "standard-g"]
    assert complete("shell", "--partition", "st") == []
    (tmp_path / "run.yaml").write_text("site: local\n")
    assert complete("shell", "--partition", "") == ["debug", "main"]
    (tmp_path / "other.yaml").write_text("site: lumi\n")
    assert complete("shell", "other.yaml", "--partition", "dev") == ["dev-g"]
    (tmp_path / "run.yaml").write_text("site: [\n")
    assert complete("shell", "--partition", "") == []


def test_sites_of_ones_own_are_offered(complete, tmp_path, monkeypatch):
    monkeypatch.setenv("HPCTRAIN_NO_USER_CONFIG", "0")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    for name in ("mine", "bad\nname", "$(touch canary)"):
        folder = tmp_path / ".hpctrain/site_profiles" / name
        folder.mkdir(parents=True)
        (folder / "profile.yaml").write_text("name: mine\n")

    assert "mine" in complete("site", "show", "") and "name" not in complete("site", "show", "")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("nosuch", ""),
        ("site", "nosuch", ""),
        ("--nosuch", ""),
        ("shell", "--site", "$(id)", "--partition", ""),
    ],
)
def test_a_line_that_makes_no_sense_prints_no_error_into_the_prompt(complete, words):
    assert isinstance(complete(*words), list)  # the fixture has checked that nothing went to stderr


@pytest.mark.parametrize(
    "words", [("ini",), ("init", "--site", ""), ("shell", "--site", "lumi", "--partition", "")]
)
def test_completion_imports_nothing_heavy(complete, words):
    probe = f"atexit.register(lambda: print(',HEAVY', [m for m in {HEAVY} if m in sys.modules]))"

    assert complete(*words, probe=probe)[-1] == "HEAVY []"


def test_verbs_and_sites_do_not_even_read_yaml(complete):
    probe = "atexit.register(lambda: print(',YAML', 'yaml' in sys.modules))"

    assert complete("init", "--site", "", probe=probe)[-1] == "YAML False"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_printed_script_is_valid_for_its_shell(shell, cli, tmp_path):
    code, out, _ = cli("completion", shell)
    script = tmp_path / "script"
    script.write_text(out)

    assert code == 0 and "_HPCTRAIN_COMPLETE" in out
    if shutil.which(shell):  # zsh and fish are not on every machine; bash is
        done = subprocess.run(
            [shell, "-n", str(script)], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_bash_completes_for_real(cli, tmp_path):
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/hpctrain"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m hpctrain "$@"\n')
    program.chmod(0o755)
    (tmp_path / "script").write_text(cli("completion", "bash")[1])
    asks = (
        "COMP_WORDS=(hpctrain init --site lu); COMP_CWORD=3; _hpctrain_completion hpctrain lu"
        " --site; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", f"PATH={tmp_path}/bin:$PATH; . {tmp_path}/script; {asks}"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.stdout, done.stderr) == ("lumi\n", "")


def test_an_unknown_shell_is_refused(cli):
    assert cli("completion", "tcsh")[0] == 2
