"""`hpctrain upload` with the real rsync and a stand-in for ssh that runs the other side here."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpctrain.sites.upload import PARTIAL_DIR, plan_upload, rsh_words, transfer_argv

sys.path.insert(0, str(Path(__file__).parents[1]))
from hostile import HOSTILE  # noqa: E402

# What sshd does: the words after the host become one command line for the user's shell.
SSH = """#!/bin/bash
printf '%s\\0' "$@" >> "$SSH_LOG"; printf '\\n' >> "$SSH_LOG"
while [ $# -gt 0 ]; do case $1 in -i|-o|-l|-J|-p) shift 2;; -*) shift;; *) break;; esac; done
shift
cd "$SSH_HOME"
exec 3<&0
if [ -n "$SSH_CUT" ]; then sh -c "$*" < <(exec python3 -c "$PUMP" "$SSH_CUT" <&3); exit; fi
exec sh -c "$*"
"""
# Passes on so many bytes at once as they come, then hangs up.
PUMP = """
import os, sys
left = int(sys.argv[1])
while left > 0:
    chunk = os.read(0, min(left, 65536))
    if not chunk: break
    left -= len(chunk)
    os.write(1, chunk)
"""


@pytest.fixture
def there(tmp_path, monkeypatch):
    """The other machine: its home folder. Fails, rather than skips, without rsync: tools/test
    installs it."""
    assert shutil.which("rsync"), "rsync is not installed (Debian package rsync)"
    ssh = tmp_path / "a stand-in's ssh"
    ssh.write_text(SSH)
    ssh.chmod(0o755)
    home = tmp_path / "there"
    home.mkdir()
    (tmp_path / "here").mkdir()
    for name, value in (
        ("SSH_LOG", tmp_path / "ssh.log"),
        ("SSH_HOME", home),
        ("SSH_CUT", ""),
        ("PUMP", PUMP),
        ("HPCTRAIN_UPLOAD_SSH", shlex.quote(str(ssh))),
    ):
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path / "here")
    return home


def upload(hpctrain, *words, **options):
    return hpctrain("upload", "--site", "lumi", "--account", "project_465000001", *words, **options)


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def test_files_and_folders_arrive_and_are_compared(there, hpctrain):
    Path("a.jsonl").write_text("one\n")
    Path("set/deep").mkdir(parents=True)
    Path("set/deep/b").write_bytes(os.urandom(100_000))
    Path("set/link").symlink_to("deep/b")
    done = upload(hpctrain, "--to", there / "data", "a.jsonl", "set/")

    assert done.returncode == 0, done.stderr
    assert content(there / "data") == {
        "a.jsonl": b"one\n",
        "set/deep/b": Path("set/deep/b").read_bytes(),
        "set/link": Path("set/deep/b").read_bytes(),
    }
    assert "3 files there, compared by checksum" in done.stderr and done.stdout == ""


def test_a_link_out_of_what_was_given_sends_nothing(there, hpctrain):
    """Whoever shares a data folder could have put it there, to any file of mine."""
    Path("key").write_text("PRIVATE")
    Path("set/deep").mkdir(parents=True)
    Path("set/deep/b").symlink_to("../../key")
    Path("set/a").write_text("a")

    done = upload(hpctrain, "--to", there / "data", "set")

    assert (done.returncode, "is a link out of `set`" in done.stderr) == (2, True), done.stderr
    assert not (there / "data").exists()


def test_a_snapshot_of_a_hub_is_sent_with_its_blobs(there, hpctrain):
    Path("m/blobs").mkdir(parents=True)
    Path("m/blobs/1").write_text("weights")
    Path("m/snapshots/c").mkdir(parents=True)
    Path("m/snapshots/c/model").symlink_to("../../blobs/1")

    assert upload(hpctrain, "--to", there / "data", "m/snapshots/c").returncode == 0
    assert content(there / "data") == {"c/model": b"weights"}


def test_hostile_names_and_folders_arrive_as_they_are(there, hpctrain):
    names = sorted(
        {
            word
            for word in HOSTILE
            if "/" not in word
            and "\0" not in word
            and 0 < len(word) < 200
            and word not in ("~", ".", "..")
            and word.encode("utf-8", "ignore").decode() == word
        }
    )
    for name in names:
        Path(name).write_text(name)
    target = there / 'it\'s a "folder" $(touch canary); `id` : é'
    done = upload(hpctrain, "--to", target, "--", *names)

    assert done.returncode == 0, done.stderr
    assert content(target) == {name: name.encode() for name in names}
    assert not [path for path in there.rglob("canary")] and not Path("canary").exists()


def test_a_cut_off_upload_goes_on_where_it_was(there, hpctrain, monkeypatch):
    data = random.Random(1).randbytes(3_000_000)
    Path("big").write_bytes(data)
    (there / "data").mkdir()
    monkeypatch.setenv("SSH_CUT", "2000000")
    first = upload(hpctrain, "--to", there / "data", "big")

    assert first.returncode == 3 and "goes on where it was" in first.stderr
    assert not (there / "data/big").exists()  # nothing half under its name
    partial = there / "data" / PARTIAL_DIR / "big"
    assert partial.stat().st_size > 1_000_000 and data.startswith(partial.read_bytes())
    # less than the file: enough only for the rest of it and the comparison
    monkeypatch.setenv("SSH_CUT", "1500000")
    second = upload(hpctrain, "--to", there / "data", "big")

    assert second.returncode == 0, second.stderr
    assert content(there / "data") == {"big": data} and not partial.parent.exists()


def test_other_content_that_is_there_is_kept_unless_forced(there, hpctrain):
    Path("f").write_text("mine")
    (there / "d").mkdir()
    (there / "d/f").write_text("hers")  # the same size and, by chance, the same time
    os.utime(there / "d/f", (1, 1))
    os.utime("f", (1, 1))
    kept = upload(hpctrain, "--to", there / "d", "f")

    assert (
        kept.returncode == 4
        and "other content" in kept.stderr
        and (there / "d/f").read_text() == "hers"
    )
    forced = upload(hpctrain, "--to", there / "d", "f", "--force")
    assert forced.returncode == 0 and (there / "d/f").read_text() == "mine"


def test_a_second_upload_sends_nothing_and_says_done(there, hpctrain):
    Path("f").write_text("x")
    for _ in range(2):
        assert upload(hpctrain, "--to", there / "d", "f").returncode == 0


def test_a_folder_that_cannot_be_made_is_said(there, hpctrain):
    Path("f").write_text("x")
    done = upload(hpctrain, "--to", there / "no/such/folder", "f")

    assert done.returncode in (1, 3) and "rsync" in done.stderr and "Traceback" not in done.stderr


def test_user_key_and_host_reach_ssh_and_nothing_else(there, hpctrain, tmp_path):
    key = tmp_path / "it's a key"
    key.write_text("secret")
    Path("f").write_text("x")
    done = upload(
        hpctrain,
        "--to",
        there / "d",
        "--user",
        "me",
        "--host",
        "login.example.org",
        "--key",
        key,
        "f",
    )
    words = (tmp_path / "ssh.log").read_text().split("\n")[0].split("\0")

    assert done.returncode == 0, done.stderr
    assert (
        words[:6] == ["-i", str(key), "-o", "IdentitiesOnly=yes", "-l", "me"]
        and words[6] == "login.example.org"
    )
    assert "secret" not in done.stderr


def test_dry_run_connects_to_nobody_and_prints_what_a_shell_reads_back(there, hpctrain, tmp_path):
    Path("a b").write_text("x")
    done = upload(hpctrain, "--to", there / "d", "--dry-run", "a b")

    assert (
        done.returncode == 0 and not (tmp_path / "ssh.log").exists() and not (there / "d").exists()
    )
    send, compare = done.stdout.splitlines()
    assert (
        shlex.split(send)[-2:] == ["./a b", f"lumi.csc.fi:{there}/d/"] and "--checksum" in compare
    )
    assert subprocess.run(["bash", "-c", f"{send} >/dev/null"], check=False).returncode == 0
    assert (there / "d/a b").read_text() == "x"


def test_the_folder_comes_from_the_run_then_from_the_site(there, hpctrain):
    Path("f").write_text("x")
    assert "lumi.csc.fi:/scratch/project_465000001/ " in upload(hpctrain, "--dry-run", "f").stderr
    Path("run.yaml").write_text(
        "name: r\nsite: lumi\nrecipe: command\ntime: 1h\naccount: project_465000007\ndata: {train:"
        " [/flash/x/y/text_document]}\n"
    )
    done = hpctrain("upload", "--dry-run", "f")
    assert "lumi.csc.fi:/flash/x/y/ (the folder of the run's data, run.yaml:6:16)" in done.stderr, (
        done.stderr
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["nosuch"], "there is no such file"),
        (["f", "d/f"], "both would go to one place"),
        (["f", "--host", "-oProxyCommand=id"], "is not a host name"),
        (["f", "--host", "a b"], "is not a host name"),
        (["f", "--user", "-x"], "is not a user name"),
        (["f", "--user", "me;id"], "is not a user name"),
        (["f", "--key", "nosuch"], "there is no such key"),
        (["f", "--ssh", "'"], "No closing quotation"),
        (["f", "--to", "/x\ny"], "control character"),
        (["f", "--site", "local"], "names no login host"),
        (["/"], "has no name of its own"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_connecting(
    there, hpctrain, tmp_path, words, message
):
    Path("f").write_text("x")
    Path("d").mkdir()
    Path("d/f").write_text("y")
    done = upload(hpctrain, *words)

    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not (tmp_path / "ssh.log").exists()


def test_without_an_account_the_sites_path_asks_for_one(there, hpctrain):
    Path("f").write_text("x")
    done = hpctrain("upload", "--site", "lumi", "f")

    assert done.returncode == 2 and "needs an account" in done.stderr


def test_without_rsync_it_says_what_to_install(there, hpctrain, tmp_path):
    Path("f").write_text("x")
    done = upload(hpctrain, "f", env={**os.environ, "PATH": str(tmp_path)})

    assert done.returncode == 3 and "there is no `rsync` here" in done.stderr


@pytest.mark.parametrize(
    "words", [["ssh", "a b", "it's", "'", 'q"q', "", "x''y", "-o", "A=b"], ["/a b/ssh"]]
)
def test_rsync_splits_the_remote_shell_back_into_the_same_words(words, there, tmp_path):
    note = tmp_path / "argv"
    program = tmp_path / "note it"
    program.write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" > {shlex.quote(str(note))}\nexit 9\n")
    program.chmod(0o755)
    Path("f").write_text("x")
    planned = plan_upload(["f"], "host", "/d", "", [str(program), *words], False)
    subprocess.run(transfer_argv(planned), capture_output=True, check=False)

    assert note.read_text().split("\0")[: len(words)] == words, rsh_words(words)
