"""Data to the site with rsync over ssh: resumable, never replacing what is there unasked, compared
by checksum afterwards.

A file appears under its name only when it is complete: until then rsync keeps it in a folder of its
own beside it, and the next upload goes on from there. Facts of rsync: man rsync, 3.0 and later on
both sides.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hpctrain.base import units
from hpctrain.base.errors import EnvironmentFault, HpctrainError, Problem, Refused, UsageError
from hpctrain.base.shell import quote_all
from hpctrain.base.text import text_problem
from hpctrain.config.document import merge
from hpctrain.config.run import RunSpec, absolute, read_layers, spec_from_layers, user_layers
from hpctrain.config.site import HOST, Site, load_site

PARTIAL_DIR = ".hpctrain-partial"
_ACCOUNT = "{account}"  # filled in by hpctrain, as profiles write it
_USER = r"[A-Za-z_][A-Za-z0-9_.@-]{0,63}"
# man rsync, EXIT VALUES: the connection or the other side failed, as opposed to single files (23,
# 24).
_CONNECTION = frozenset({1, 2, 3, 4, 5, 6, 10, 12, 13, 14, 30, 35, 124, 125, 126, 127, 255})


@dataclass(frozen=True)
class Upload:
    """What goes where. `sources` as rsync gets them; `folder` on `host`; `why` says who chose the
    folder."""

    sources: tuple[str, ...]
    num_files: int
    num_bytes: int
    host: str
    folder: str
    why: str
    ssh: tuple[str, ...]
    force: bool

    @property
    def target(self) -> str:
        return f"{self.host}:{self.folder.rstrip('/')}/"


def find_target(
    run_yaml: str | None,
    site_name: str | None,
    account: str | None,
    to: str | None,
    host: str | None,
    user: str | None,
) -> tuple[str, str, str]:
    """(host, folder, why that folder) from the options, the run's data, or the site's profile, in
    this order.

    Raises UsageError naming what is missing.
    """
    layers = read_layers(run_yaml) if run_yaml else []
    where = merge(layers).where("site")
    site_name = site_name or merge(layers or user_layers(None)).get("site")
    site: Site | None = None
    if isinstance(site_name, str):
        site = load_site(
            site_name, os.path.dirname(os.path.abspath(run_yaml)) if run_yaml else "", where
        )
    account = account or merge(layers or user_layers(site_name)).get("account")
    host = host or (site.values["login"]["host"] if site else None)
    problems = []
    if not host:
        problems.append(
            Problem(
                f"the profile of `{site.name}` names no login host",
                where=site.document.where("login"),
                hint="say --host H",
            )
            if site
            else Problem("which site?", hint="say --site S, or --host H and --to PATH")
        )
    elif not re.fullmatch(HOST, host, re.ASCII):
        problems.append(Problem(f"`{host}` is not a host name", why=f"allowed: {HOST}"))
    if user and not re.fullmatch(_USER, user, re.ASCII):
        problems.append(Problem(f"`{user}` is not a user name", why=f"allowed: {_USER}"))
    folder, why = (to, "--to") if to else _default_folder(site, run_yaml, layers, account)
    bad = text_problem(folder) if folder else ""
    if bad:
        problems.append(Problem(f"the folder {folder[:60]!r} {bad}"))
    if not folder:
        problems.append(
            Problem(
                "where to? neither the run nor the profile says where data belongs",
                hint="say --to PATH",
            )
        )
    if problems or not host:
        raise UsageError(problems)
    return (f"{user}@{host}" if user else host), folder, why


def ssh_words(ssh: str, key: str | None) -> list[str]:
    """The words of the ssh command, with the key. Raises UsageError for quotes that do not close
    and a key that is not there."""
    try:
        words = shlex.split(ssh)
    except ValueError as error:
        raise UsageError(f"--ssh `{_shown(ssh)}`: {error}") from error
    if not words or text_problem(ssh):
        raise UsageError(
            f"--ssh `{_shown(ssh)}` is not a command",
            hint="for example --ssh 'ssh -J jump.example.org'",
        )
    if key:
        path = os.path.expanduser(key)
        if not os.path.isfile(path):
            raise UsageError("there is no such key", where=_shown(key))
        # Only this key: an agent with many of them runs into the server's limit of attempts.
        words += ["-i", os.path.abspath(path), "-o", "IdentitiesOnly=yes"]
    return words


def plan_upload(
    files: Sequence[str], host: str, folder: str, why: str, ssh: Sequence[str], force: bool
) -> Upload:
    """Check the files and count them. Raises UsageError with every file that is missing or would
    collide."""
    problems: list[Problem] = []
    names: dict[str, str] = {}
    num_files = num_bytes = 0
    sources = []
    for path in files:
        if "\0" in path or not os.path.exists(path):
            problems.append(Problem("there is no such file", where=_shown(path)))
            continue
        source = _source(path)
        name = os.path.basename(os.path.normpath(source))
        if name in names:
            problems.append(
                Problem(
                    f"has the same name as `{_shown(names[name])}`, and both would go to one place",
                    where=_shown(path),
                )
            )
            continue
        if name in ("", ".", ".."):
            problems.append(
                Problem(
                    "has no name of its own",
                    where=_shown(path),
                    hint="name the folder or its files",
                )
            )
            continue
        names[name] = path
        sources.append(source)
        problems += [
            Problem(
                f"is a link out of `{_shown(path)}`, to `{_shown(os.path.realpath(link))}`",
                where=_shown(link),
                hint="name that file itself if it is to be sent, or take the link away",
            )
            for link in _links_out(path)
        ]
        count, size = _measure(path)
        num_files, num_bytes = num_files + count, num_bytes + size
    if problems:
        raise UsageError(problems)
    return Upload(tuple(sources), num_files, num_bytes, host, folder, why, tuple(ssh), force)


def transfer_argv(upload: Upload) -> list[str]:
    """The rsync that sends. A destination path never meets a shell (`--protect-args`), nor a name
    an option (`--`)."""
    return [
        "rsync",
        "--recursive",
        "--copy-links",
        "--times",
        "--protect-args",
        "--partial",
        f"--partial-dir={PARTIAL_DIR}",
        # Without --force what is there stays; the comparison afterwards tells whether it is the
        # same.
        "--checksum" if upload.force else "--ignore-existing",
        "--info=progress2",
        "--no-human-readable",
        "--outbuf=N",
        f"--rsh={rsh_words(upload.ssh)}",
        "--",
        *upload.sources,
        upload.target,
    ]


def compare_argv(upload: Upload) -> list[str]:
    """The rsync that only compares, by checksum: it names every file that is missing there or
    differs."""
    return [
        "rsync",
        "--recursive",
        "--copy-links",
        "--protect-args",
        "--dry-run",
        "--checksum",
        "--8-bit-output",
        "--out-format=%i %n",
        f"--exclude={PARTIAL_DIR}/",
        f"--rsh={rsh_words(upload.ssh)}",
        "--",
        *upload.sources,
        upload.target,
    ]


def command_lines(upload: Upload) -> list[str]:
    """Both commands as one would type them."""
    return [str(quote_all(argv)) for argv in (transfer_argv(upload), compare_argv(upload))]


def rsh_words(words: Sequence[str]) -> str:
    """One text that rsync's own splitting of --rsh reads back as exactly these words (man rsync,
    --rsh)."""
    return " ".join(
        (
            word
            if re.fullmatch(r"[A-Za-z0-9_./=@:,+%-]+", word)
            else "'" + word.replace("'", "''") + "'"
        )
        for word in words
    )


def run_upload(upload: Upload, progress: Callable[[float], None]) -> None:
    """Send, then compare every file by checksum. `progress` gets the bytes that are there.

    Raises EnvironmentFault when rsync or the connection fails (run it again to go on),
    HpctrainError when files could not be sent, Refused when files of other content are there
    already and `force` is not set.
    """
    if not shutil.which("rsync"):
        raise EnvironmentFault(
            "there is no `rsync` here", hint="install it, for example: apt-get install rsync"
        )
    _send(upload, progress)
    different = _compare(upload)
    if not different:
        return
    shown = "\n".join(
        different[:20] + ([f"… and {len(different) - 20} more"] if len(different) > 20 else [])
    )
    if upload.force:
        raise HpctrainError(
            f"other content than what was sent: {count_files(len(different))}",
            why=shown,
            hint="did they change meanwhile? run it again",
        )
    raise Refused(
        f"{count_files(len(different))} of other content at {_shown(upload.target)} already, left"
        " as found",
        why=shown,
        hint="send to another folder with --to, or replace them with --force",
    )


def _send(upload: Upload, progress: Callable[[float], None]) -> None:
    with subprocess.Popen(
        transfer_argv(upload), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        rest = b""
        while True:
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                break
            lines = re.split(rb"[\r\n]", rest + chunk)
            rest = lines.pop()[-200:]
            for line in lines:
                match = re.match(rb"\s*(\d+)\s+\d+%", line)
                if match:
                    progress(float(match[1]))
    _judge(process.returncode)


def _compare(upload: Upload) -> list[str]:
    done = subprocess.run(
        compare_argv(upload), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False
    )
    _judge(done.returncode)
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    # `<f` is a file that would be sent; folders and times do not matter here.
    return [_shown(line.partition(" ")[2]) for line in lines if line[:2] in ("<f", ">f")]


def _judge(code: int) -> None:
    if code == 0:
        return
    if code in (20, -2, -15):
        raise EnvironmentFault(
            "the upload was interrupted", hint="run the same command again: it goes on where it was"
        )
    if code in _CONNECTION or code < 0:
        raise EnvironmentFault(
            f"rsync failed with {code}, see above",
            hint="run the same command again: it goes on where it was",
        )
    hint = (
        "does the folder above it exist there, and may you write to it? then run the same command"
        " again"
    )
    raise HpctrainError(f"rsync could not send everything (exit code {code}), see above", hint=hint)


def _default_folder(
    site: Site | None, run_yaml: str | None, layers: Sequence[object], account: object
) -> tuple[str, str]:
    if run_yaml and layers:
        spec: RunSpec = spec_from_layers(list(layers), run_yaml)[0]  # type: ignore[arg-type]
        given = merge(list(layers)).get("data", "train")  # type: ignore[arg-type]
        first = given[0] if isinstance(given, list) and given and isinstance(given[0], str) else ""
        if os.path.isabs(first):
            return (
                os.path.dirname(absolute(first, "/")),
                f"the folder of the run's data, {spec.where('data', 'train', 0)}",
            )
    for name, storage in (site.values["storage"] if site else {}).items():
        path = storage["path"]
        if "data" in storage["holds"] and "{user}" not in path:
            assert site
            if _ACCOUNT in path and not isinstance(account, str):
                raise UsageError(
                    f"`{path}` of `{site.name}` needs an account",
                    hint="say --account A, or --to PATH",
                )
            return (
                path.replace(_ACCOUNT, str(account)),
                f"storage.{name} of the site, {site.document.where('storage', name)}",
            )
    return "", ""


def _source(path: str) -> str:
    """The path as rsync takes it: no option, no HOST:PATH, and the folder itself rather than what
    is in it."""
    path = path.rstrip("/") or "/"
    return path if path.startswith("/") else f"./{path}"


def _links_out(path: str) -> Iterator[str]:
    """The links below a folder that lead out of it: whoever may write there could send any file of
    mine. Those of a snapshot in a hub's cache lead to its blobs."""
    root = os.path.realpath(path)
    kind, repo = os.path.basename(os.path.dirname(root)), os.path.dirname(os.path.dirname(root))
    inside = (root + os.sep, os.path.join(repo if kind == "snapshots" else root, "blobs") + os.sep)
    for top, folders, names in os.walk(path, followlinks=False):
        for name in sorted([*folders, *names]):
            link = os.path.join(top, name)
            if os.path.islink(link) and not os.path.realpath(link).startswith(inside):
                yield link


def _measure(path: str) -> tuple[int, int]:
    """(files, bytes) under a path, links followed as rsync will."""
    if not os.path.isdir(path):
        return 1, os.stat(path).st_size
    count = size = 0
    for top, _, names in os.walk(path, followlinks=False):
        for name in names:
            try:
                size += os.stat(os.path.join(top, name)).st_size
            except OSError:
                continue  # rsync will say what is wrong with it
            count += 1
    return count, size


def _shown(text: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)[:300]


def describe(upload: Upload) -> str:
    """One line for a person."""
    return (
        f"{count_files(upload.num_files)}, {units.format_size(upload.num_bytes)}, to"
        f" {_shown(upload.target)} ({upload.why})"
    )


def count_files(number: int) -> str:
    """`1 file`, `2 files`."""
    return f"{number} file{'' if number == 1 else 's'}"
