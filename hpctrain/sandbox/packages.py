"""Finds Slurm on this machine, or unpacks Debian's packages of it into a cache of our own, without
root.

The packages come from apt's own configured sources (so from the distribution this machine already
trusts), are checked against the SHA256 of apt's signed index, unpacked into a temporary directory
and published by one rename. Unpacked programs are started through the dynamic loader with
`--library-path`: an LD_LIBRARY_PATH would be inherited by the user's jobs, because sbatch and srun
hand their environment on.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpctrain.base.errors import EnvironmentFault, Refused
from hpctrain.base.files import sha256_of
from hpctrain.base.paths import cache_home
from hpctrain.config.trust import require_trust

# What has to be unpacked; the shared libraries these need are found from their Depends fields.
SLURM_PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge")
HELPER_PACKAGES = ("bubblewrap", "libnss-wrapper")
ACCOUNTING_PACKAGES = (
    "slurmdbd",
    "slurm-wlm-mysql-plugin",
    "mariadb-server-core",
    "mariadb-client-core",
)
# Every Debian and Ubuntu has these, and mixing another libc with the running loader cannot work.
BASE_PACKAGES = frozenset({"libc6", "libgcc-s1", "libc-bin"})

CLIENTS = (
    "sbatch srun salloc squeue sacct scancel scontrol sinfo sacctmgr sprio sshare sstat sattach"
    " sbcast sreport strigger"
).split()
DAEMONS = ("slurmctld", "slurmd", "slurmstepd", "munged")
ACCOUNTING_PROGRAMS = ("slurmdbd", "mariadbd")
_PROGRAMS = (
    *CLIENTS,
    *DAEMONS,
    *ACCOUNTING_PROGRAMS,
    "mariadb",
    "bwrap",
    "mungekey",
    "mysql_install_db",
)
_NEEDED = (*DAEMONS, "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
_PREFIXES = ("usr/sbin", "usr/bin", "sbin", "bin")
_NOT_HERE = "it can be unpacked only on Debian, Ubuntu and their kin, with apt-get and dpkg-deb"

Report = Callable[[str], None]


@dataclass(frozen=True)
class Program:
    """One executable: its path, and for an unpacked one the argv that must stand before it."""

    path: str
    loader: tuple[str, ...] = ()

    def argv(self, *arguments: str, name: str = "") -> list[str]:
        """The command line that starts it; `name` is what it sees as argv[0] where the loader can
        say so."""
        if not self.loader:
            return [self.path, *arguments]
        shown = ("--argv0", name or os.path.basename(self.path)) if "--argv0" in self.loader else ()
        return [*(word for word in self.loader if word != "--argv0"), *shown, self.path, *arguments]


@dataclass(frozen=True)
class Toolbox:
    """Everything a sandbox starts. `root` is empty when the system's Slurm is used."""

    version: str
    programs: Mapping[str, Program]
    plugin_dir: str
    root: str = ""
    nss_wrapper: str = ""

    def argv(self, program: str, *arguments: str) -> list[str]:
        """The command line of one of the programs. Raises EnvironmentFault when it is not there."""
        if program not in self.programs:
            raise EnvironmentFault(f"`{program}` is missing", where=self.root or "PATH")
        return self.programs[program].argv(*arguments, name=program)

    @property
    def has_lua(self) -> bool:
        """Whether its job_submit/lua plugin is there; the system's plugins lie in one of the usual
        places."""
        folders = (
            [self.plugin_dir]
            if self.plugin_dir
            else glob.glob("/usr/lib*/slurm*") + glob.glob("/usr/lib/*/slurm*")
        )
        return any(os.path.isfile(os.path.join(folder, "job_submit_lua.so")) for folder in folders)


def find(
    environ: Mapping[str, str],
    *,
    source: str = "auto",
    accounting: bool = False,
    report: Report = lambda text: None,
) -> Toolbox:
    """A complete Slurm: the system's where its daemons are installed, else an unpacked one
    (unpacked now if needed).

    `source` is `auto`, `system` or `unpacked`. Raises EnvironmentFault that names what is missing.
    """
    if source != "unpacked":
        box = _system()
        missing = [name for name in _NEEDED if name not in box.programs]
        if accounting:
            missing += [name for name in ACCOUNTING_PROGRAMS if name not in box.programs]
        if not missing:
            return _with_helpers(box, environ, report)
        if source == "system":
            raise EnvironmentFault(
                f"this machine's Slurm is not complete: no {', '.join(missing)}",
                hint="apt-get install slurm-wlm munge, or let hpctrain unpack it: --slurm unpacked",
            )
    cache = Path(cache_home(environ))
    box_or_none = _newest_unpacked(cache, accounting)
    return (
        box_or_none
        if box_or_none is not None
        else unpack(cache, accounting=accounting, report=report)
    )


def reopen(root: str, environ: Mapping[str, str]) -> Toolbox:
    """The toolbox a running sandbox was started with: the unpacked one in `root`, or the system's
    where it is empty."""
    box = _unpacked(Path(root)) if root else _system()
    if box is None:
        raise EnvironmentFault(
            "the unpacked Slurm of this sandbox is gone", where=root, hint="hpctrain sandbox down"
        )
    return box


def unpack(
    cache: Path, *, accounting: bool = False, helpers_only: bool = False, report: Report
) -> Toolbox:
    """Download, check and unpack the packages into `cache`; the directory appears complete or not
    at all.

    Raises EnvironmentFault where there is no apt or dpkg-deb, no network, a wrong hash, or a full
    disk.
    """
    tools = [f"`{tool}`" for tool in ("apt-get", "apt-cache", "dpkg-deb") if not shutil.which(tool)]
    if tools:
        raise EnvironmentFault(
            f"Slurm is not installed, and {', '.join(tools)} {'are' if len(tools) > 1 else 'is'}"
            " not here to fetch it",
            why=_NOT_HERE,
            hint=(
                "install Slurm's daemons and munge (slurmctld, slurmd, munged), then run this again"
            ),
        )
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(
            f"cannot make the cache: {error.strerror}", where=str(cache)
        ) from error
    require_trust(str(cache), "this cache of programs")
    roots = list(HELPER_PACKAGES)
    if not helpers_only:
        roots += [*SLURM_PACKAGES, *(ACCOUNTING_PACKAGES if accounting else ())]
    apt = _Apt(cache, report)
    wanted = apt.closure(roots)
    key = "bubblewrap" if helpers_only else "slurmctld"
    final = cache / _directory_name(
        wanted[key]["Version"], wanted[key]["Architecture"], accounting, helpers_only
    )
    size = sum(int(fields.get("Size", 0)) for fields in wanted.values())
    report(f"unpacking {len(wanted)} Debian packages ({size / 1e6:.0f} MB) into {final}")
    work = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=cache))
    try:
        debs = apt.download(wanted, work / "debs")
        root = work / "root"
        root.mkdir()
        for name, deb in sorted(debs.items()):
            _run(["dpkg-deb", "-x", str(deb), str(root)], f"cannot unpack {name}")
        packages = {
            name: {"version": fields["Version"], "sha256": fields["SHA256"]}
            for name, fields in wanted.items()
        }
        _write_manifest(root, packages)
        _publish(root, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    box = _unpacked(final)
    if box is None:
        raise EnvironmentFault(
            "the unpacked Slurm is not complete", where=str(final), hint="delete it and try again"
        )
    return box


def _directory_name(version: str, arch: str, accounting: bool, helpers_only: bool) -> str:
    kind = "sandbox-helpers" if helpers_only else "slurm"
    return f"{kind}-{re.sub(r'[^A-Za-z0-9.+~-]', '_', version)}-{arch}{'-accounting' if accounting else ''}"


def _with_helpers(box: Toolbox, environ: Mapping[str, str], report: Report) -> Toolbox:
    """The system's Slurm, completed with an unpacked bubblewrap and libnss_wrapper where those are
    not installed.

    Neither is needed to run jobs, so a machine where they cannot be had still gets its sandbox.
    """
    if "bwrap" in box.programs and box.nss_wrapper:
        return box
    cache = Path(cache_home(environ))
    try:
        found = (_unpacked(path, ("bwrap",)) for path in _candidates(cache, "sandbox-helpers-*"))
        helpers = next(filter(None, found), None)
        helpers = helpers or unpack(cache, helpers_only=True, report=report)
    except (EnvironmentFault, Refused) as error:
        report(f"without bubblewrap and libnss_wrapper: {error.problems[0].what}")
        return box
    programs = {**helpers.programs, **box.programs}
    return Toolbox(
        box.version, programs, box.plugin_dir, "", box.nss_wrapper or helpers.nss_wrapper
    )


class _Apt:
    """apt's view of the packages: its own lists, or, where it has none yet, lists of ours fetched
    without root."""

    def __init__(self, cache: Path, report: Report) -> None:
        self._options: list[str] = []
        self._cache = cache
        self._report = report

    def closure(self, roots: Sequence[str]) -> dict[str, dict[str, str]]:
        """The index fields of `roots` and of every library they need, by package name."""
        found: dict[str, dict[str, str]] = {}
        wanted = list(roots)
        while wanted:
            fields = self._show(wanted)
            missing = [name for name in wanted if name not in fields and name in roots]
            if missing and not self._options:
                self._update_private_lists()
                continue
            if missing:
                raise EnvironmentFault(
                    f"apt knows no package {', '.join(f'`{name}`' for name in missing)}",
                    why="Slurm comes from Debian's main or Ubuntu's universe archive",
                    hint="enable that archive in /etc/apt/sources.list and run apt-get update",
                )
            found.update(fields)
            wanted = sorted(
                {name for entry in fields.values() for name in libraries_of(entry)} - set(found)
            )
        return found

    def download(self, wanted: Mapping[str, Mapping[str, str]], folder: Path) -> dict[str, Path]:
        """The .deb files, each checked against the SHA256 of the signed index."""
        folder.mkdir()
        names = [f"{name}={fields['Version']}" for name, fields in wanted.items()]
        # As root apt would download as the user _apt, who may not write here.
        command = [
            "apt-get",
            "-q",
            *self._options,
            "-o",
            "APT::Sandbox::User=root",
            "download",
            *names,
        ]
        _run(
            command,
            "cannot download Slurm's packages",
            cwd=folder,
            hint="is there a network? try apt-get update",
        )
        debs: dict[str, Path] = {}
        by_hash = {sha256_of(str(path)): path for path in folder.glob("*.deb")}
        for name, fields in wanted.items():
            if fields["SHA256"] not in by_hash:
                raise EnvironmentFault(
                    f"the downloaded package `{name}` is not the one of apt's signed index",
                    why=f"no file with SHA256 {fields['SHA256']}",
                    hint="run apt-get update and try again",
                )
            debs[name] = by_hash[fields["SHA256"]]
        return debs

    def _show(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        command = ["apt-cache", *self._options, "show", "--no-all-versions", *names]
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
        )
        return parse_index(result.stdout)

    def _update_private_lists(self) -> None:
        """Fetch lists into our cache: on a fresh container apt has none, and an ordinary user may
        not update them."""
        self._report(
            "apt has no lists of packages yet: fetching them into the cache (signatures are"
            " checked)"
        )
        state = self._cache / "apt"
        for folder in (state / "lists" / "partial", state / "cache" / "archives" / "partial"):
            folder.mkdir(parents=True, exist_ok=True)
        self._options = [
            *("-o", f"Dir::State::Lists={state}/lists"),
            *("-o", f"Dir::Cache={state}/cache"),
            *("-o", "APT::Sandbox::User=root"),
            *("-o", "APT::Update::Post-Invoke-Success::="),
            *("-o", "APT::Update::Post-Invoke::="),
        ]
        _run(
            ["apt-get", "-q", *self._options, "update"],
            "cannot fetch apt's lists",
            hint="is there a network?",
        )


def parse_index(text: str) -> dict[str, dict[str, str]]:
    """`apt-cache show`'s stanzas by package name; the first stanza of a name (the candidate)
    wins."""
    found: dict[str, dict[str, str]] = {}
    for stanza in text.split("\n\n"):
        fields: dict[str, str] = {}
        for line in stanza.splitlines():
            if not line.startswith(" ") and ": " in line:
                key, value = line.split(": ", 1)
                fields.setdefault(key, value)
        if {"Package", "Version", "SHA256", "Architecture"} <= set(fields):
            found.setdefault(fields["Package"], fields)
    return found


def libraries_of(fields: Mapping[str, str]) -> list[str]:
    """The library packages an index entry depends on (first alternatives); data and maintainer
    tools are not needed."""
    names = []
    for key in ("Pre-Depends", "Depends"):
        for item in filter(None, fields.get(key, "").split(",")):
            name = re.split(r"[\s(:|]", item.strip(), maxsplit=1)[0]
            if name.startswith("lib") and name not in BASE_PACKAGES:
                names.append(name)
    return names


def interpreter_of(path: Path) -> str:
    """The dynamic loader an ELF64 little-endian executable asks for (its PT_INTERP), "" for
    anything else.

    The layout is that of elf(5): e_phoff at byte 32, e_phentsize and e_phnum at 54, p_type 3 is
    PT_INTERP.
    """
    try:
        with open(path, "rb") as stream:
            head = stream.read(64)
            if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
                return ""
            (table,) = struct.unpack_from("<Q", head, 32)
            entry_size, entries = struct.unpack_from("<HH", head, 54)
            for index in range(entries):
                stream.seek(table + index * entry_size)
                entry = stream.read(entry_size)
                if struct.unpack_from("<I", entry)[0] == 3:
                    offset, _, _, size = struct.unpack_from("<QQQQ", entry, 8)
                    stream.seek(offset)
                    return stream.read(size).rstrip(b"\0").decode()
    except (OSError, struct.error, UnicodeDecodeError):
        return ""
    return ""


def _write_manifest(root: Path, packages: Mapping[str, Mapping[str, str]]) -> None:
    files = {
        str(path.relative_to(root)): path.stat().st_size
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }
    with open(root / "hpctrain-manifest.json", "w") as stream:
        json.dump({"packages": packages, "files": files}, stream, indent=1, sort_keys=True)
        stream.flush()
        os.fsync(stream.fileno())


def _publish(root: Path, final: Path) -> None:
    """Rename into place; a broken older one is moved aside first, a complete one made meanwhile is
    kept."""
    for _ in range(3):
        try:
            os.rename(root, final)
            return
        except OSError:
            if _is_whole(final):
                return
            aside = Path(tempfile.mkdtemp(prefix=".broken-", dir=final.parent))
            os.rename(final, aside / final.name)
            shutil.rmtree(aside, ignore_errors=True)
    raise EnvironmentFault("cannot publish the unpacked packages", where=str(final))


def _is_whole(root: Path) -> bool:
    """Whether a published directory still has every file it had, by size (its content was checked
    when unpacked)."""
    try:
        files = json.loads((root / "hpctrain-manifest.json").read_text())["files"]
        return all(os.stat(root / name).st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _candidates(cache: Path, pattern: str) -> list[Path]:
    try:
        return sorted((path for path in cache.glob(pattern) if path.is_dir()), reverse=True)
    except OSError:
        return []


def _newest_unpacked(cache: Path, accounting: bool) -> Toolbox | None:
    for path in _candidates(cache, "slurm-*"):
        box = _unpacked(
            path, needed=(*_NEEDED, "bwrap", *(ACCOUNTING_PROGRAMS if accounting else ()))
        )
        if box is not None:
            return box
    return None


def _unpacked(root: Path, needed: Sequence[str] = ()) -> Toolbox | None:
    if not root.exists():
        return None
    require_trust(str(root), "this unpacked Slurm")
    if not _is_whole(root):
        return None
    lib_dirs = [root / "usr/lib", root / "lib"]
    folders = [path for base in lib_dirs if base.is_dir() for path in [*base.glob("*-linux-gnu*")]]
    plugin_dirs = [path for folder in folders for path in folder.glob("slurm-wlm") if path.is_dir()]
    library_path = ":".join(map(str, [*folders, *plugin_dirs]))
    probe = next((path for path in (root / "usr/bin").iterdir() if interpreter_of(path)), None)
    loader_path = interpreter_of(probe) if probe else ""
    if not loader_path or not os.path.exists(loader_path):
        return None
    loader: tuple[str, ...] = (loader_path, "--library-path", library_path)
    if _loader_knows_argv0(loader_path):
        loader = (*loader, "--argv0")
    programs = {}
    for name in _PROGRAMS:
        # Debian's alternatives make `sbatch` of `sbatch-wlm` at installation; in an unpacked tree
        # only -wlm exists.
        places = (root / prefix / (name + end) for prefix in _PREFIXES for end in ("-wlm", ""))
        place = next(filter(Path.is_file, places), None)
        if place:
            programs[name] = Program(str(place), loader if interpreter_of(place) else ())
    if any(name not in programs for name in needed):
        return None
    wrapper = next((path for folder in folders for path in folder.glob("libnss_wrapper.so*")), None)
    packages = json.loads((root / "hpctrain-manifest.json").read_text())["packages"]
    version = packages.get("slurmctld", {}).get("version", "")
    plugins = str(plugin_dirs[0]) if plugin_dirs else ""
    return Toolbox(version, programs, plugins, str(root), str(wrapper) if wrapper else "")


def _loader_knows_argv0(loader: str) -> bool:
    """glibc's loader has `--argv0` since 2.33; without it a program sees its whole path as its
    name."""
    result = subprocess.run(
        [loader, "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    return "--argv0" in result.stdout


def _system() -> Toolbox:
    """The programs that are installed; `sbin` is searched too because ordinary users do not have it
    on PATH."""
    path = os.pathsep.join(
        [os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin", "/usr/local/sbin"]
    )
    found = {name: shutil.which(name, path=path) for name in _PROGRAMS}
    programs = {name: Program(place) for name, place in found.items() if place}
    wrapper = next(iter(sorted(Path("/usr/lib").glob("*-linux-gnu*/libnss_wrapper.so*"))), None)
    version = ""
    if "slurmctld" in programs:
        shown = subprocess.run(
            [programs["slurmctld"].path, "-V"], stdout=subprocess.PIPE, text=True, check=False
        )
        version = shown.stdout.strip().rpartition(" ")[2]
    return Toolbox(version, programs, "", "", str(wrapper) if wrapper else "")


def _run(command: Sequence[str], what: str, *, cwd: Path | None = None, hint: str = "") -> None:
    environ = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    result = subprocess.run(
        command,
        cwd=cwd,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode:
        tail = "\n".join(line for line in result.stdout.splitlines()[-6:] if line.strip())
        if os.strerror(errno.ENOSPC) in tail:
            what, hint = f"{what}: the disk is full", "a cache on another disk: set XDG_CACHE_HOME"
        raise EnvironmentFault(what, where=str(cwd or ""), why=tail, hint=hint)
