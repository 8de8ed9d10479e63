"""What a simulated node sees: its own host name, the names of the other nodes, and the site's file
systems.

With user namespaces every slurmd runs in a view of its own (bubblewrap: mount and UTS namespace):
hostname(1) and getaddrinfo answer as on the node, with no trace in the job's environment, and
directories of this machine can stand at the site's paths (/scratch, /project …). Without them
libnss_wrapper, preloaded into every task, answers for the names; its table holds about 100 entries,
so beyond 40 nodes it knows the first node of a job and the node itself.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from hpctrain.base.errors import EnvironmentFault
from hpctrain.sandbox.packages import Toolbox

NSS_WRAPPER_NODES = 40
_ALLOW = (
    "an administrator can allow it: `sysctl kernel.unprivileged_userns_clone=1` on Debian, `sysctl"
    " kernel.apparmor_restrict_unprivileged_userns=0` on Ubuntu; or use another machine, such as"
    " your own"
)


def unavailable(box: Toolbox) -> str:
    """Why no view can be made here; "" when it can."""
    if "bwrap" not in box.programs:
        return "bubblewrap is not installed and could not be unpacked"
    argv = [
        *box.argv("bwrap"),
        "--dev-bind",
        "/",
        "/",
        "--unshare-uts",
        "--hostname",
        "probe",
        "--",
        "/bin/true",
    ]
    try:
        probe = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bubblewrap does not run here ({error})"
    last = (probe.stderr.strip().splitlines() or ["it says nothing"])[-1]
    return (
        f"this machine does not let bubblewrap make namespaces ({last})" if probe.returncode else ""
    )


def view_argv(
    bwrap: Sequence[str], mounts: Sequence[tuple[str, str]], *, hosts: str = "", hostname: str = ""
) -> list[str]:
    """The words before a command that give it the view; `mounts` are (directory of this machine,
    path of the site)."""
    # Not --die-with-parent: bubblewrap then also dies with its own parent, which for daemons ends
    # right away.
    argv = [*bwrap]
    if mounts:
        # A new root in memory, so that /scratch can appear where / may not be written.
        argv += ["--tmpfs", "/"]
        for entry in sorted(os.listdir("/")):
            path = f"/{entry}"
            if os.path.islink(path):
                argv += ["--symlink", os.readlink(path), path]
            elif not any(target == path for _, target in mounts):
                argv += ["--dev-bind-try", path, path]
    else:
        argv += ["--dev-bind", "/", "/"]
    argv += _mount_points([target for _, target in mounts])
    for source, target in sorted(mounts, key=lambda mount: mount[1]):
        argv += ["--bind", source, target]
    if hosts and os.path.isfile("/etc/hosts"):
        argv += ["--ro-bind", hosts, "/etc/hosts"]
    if hostname:
        argv += ["--unshare-uts", "--hostname", hostname]
    return [*argv, "--"]


def _mount_points(targets: Sequence[str]) -> list[str]:
    """What makes places for mounts below folders of this machine that do not have them, without
    writing to those folders.

    bubblewrap would make such a folder for real; instead its nearest parent becomes one in memory
    with the same entries.
    """
    parents = set()
    for target in targets:
        if any(target.startswith(other.rstrip("/") + "/") for other in targets):
            continue  # made below the other mount's own directory
        while not os.path.isdir(target):
            target = os.path.dirname(target)
            if os.path.isdir(target) and target != "/":
                parents.add(target)
    argv = []
    for parent in sorted(parents):
        argv += ["--tmpfs", parent]
        for entry in sorted(os.listdir(parent)):
            path = os.path.join(parent, entry)
            if os.path.islink(path):
                argv += ["--symlink", os.readlink(path), path]
            else:
                argv += ["--dev-bind-try", path, path]
    return argv


def check_mounts(mounts: Sequence[tuple[str, str]], problem: str) -> None:
    """Raise EnvironmentFault when mounts were asked for and cannot be had, or their directories are
    not there."""
    if mounts and problem:
        raise EnvironmentFault(
            "the site's paths cannot be mounted into the sandbox", why=problem, hint=_ALLOW
        )
    for source, _ in mounts:
        if not os.path.isdir(source):
            raise EnvironmentFault("there is no such directory to mount", where=source)
