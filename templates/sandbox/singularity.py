"""A stand-in for singularity and apptainer that performs the binds for real, with bubblewrap.

Run as a script, by the `singularity` and `apptainer` of a sandbox: CONFIG NAME ARGUMENTS…. Standard
library only. Any file stands for an image. Inside, this machine's /usr, /bin, /lib, /etc and the
interpreter of hpctrain play the image, read-only; the default mounts of singularity ($HOME, /tmp,
/var/tmp, $PWD, /proc, /sys, /dev) and the binds that were asked for are there; nothing else of the
host is. So a bind that was forgotten fails here and not at the site.
"""

from __future__ import annotations

import os
import sys

# A 1,536-task step starts this 1,536 times: json, typing and signal would triple its start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

Mount = tuple[str, str, str]
Bind = tuple[str, str, str]

# Options of exec, run and shell that take a value; those that are accepted and change nothing here;
# the rest below.
VALUED = {
    "--apply-cgroups",
    "--dns",
    "--fusemount",
    "--hostname",
    "--network",
    "--network-args",
    "--pem-path",
    "--scratch",
    "-S",
    "--security",
    "--overlay",
    "-o",
    "--add-caps",
    "--drop-caps",
    "--nvccli",
    "--no-mount",
    "--workdir",
    "-W",
    "--shell",
    "-s",
}
IGNORED = {
    "--nv",
    "--rocm",
    "--writable",
    "-w",
    "--userns",
    "-u",
    "--ipc",
    "-i",
    "--net",
    "-n",
    "--uts",
    "--fakeroot",
    "-f",
    "--no-privs",
    "--keep-privs",
    "--no-eval",
    "--no-init",
    "--no-umask",
    "--allow-setuid",
    "--compat",
    "--disable-cache",
    "--vm",
    "--underlay",
    "--sif-fuse",
    "--unsquash",
    "--no-https",
}
GLOBAL_FLAGS = {"-d", "--debug", "-q", "--quiet", "-s", "--silent", "-v", "--verbose", "--nocolor"}
IMAGE_DIRS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc")
IMAGE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What --cleanenv leaves, besides what makes the simulated node a node.
CLEAN_KEEPS = (
    "HOME",
    "TERM",
    "LANG",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
)
NODE_KEEPS = ("LD_PRELOAD", "NSS_WRAPPER_HOSTS", "NSS_WRAPPER_HOSTNAME", "HPCTRAIN_SANDBOX_PROCESS")


class Fatal(Exception):
    """Ends with singularity's `FATAL:` line and exit code 255."""


def main(argv: list[str]) -> int:
    config_path, name, arguments = argv[1], argv[2], argv[3:]
    config = read_config(config_path)
    quiet = False
    while arguments and arguments[0] in GLOBAL_FLAGS:
        quiet = quiet or arguments[0] in ("-q", "--quiet", "-s", "--silent")
        arguments = arguments[1:]
    verb = arguments[0] if arguments else ""
    if verb in ("--version", "version"):
        print(f"{name} version 0-hpctrain-sandbox-stand-in")
        return 0
    if verb not in ("exec", "run", "shell"):
        sys.stderr.write(
            f"FATAL:   `{name} {verb}` is not something hpctrain's stand-in does: it knows exec,"
            " run and shell\n"
        )
        return 255
    try:
        request = parse(arguments[1:], verb, os.environ)
        command, environ, notes = build(request, config, os.environ, os.getcwd())
    except Fatal as error:
        sys.stderr.write(f"FATAL:   {error}\n")
        return 255
    for note in () if quiet else notes:
        sys.stderr.write(f"WARNING: {note}\n")
    sys.stderr.flush()
    os.execve(command[0], command, environ)


def read_config(path: str) -> dict[str, list[str]]:
    """{key: values} of lines `key<TAB>value`, in order."""
    config: dict[str, list[str]] = {
        "bwrap": [],
        "image_dirs": [],
        "image_path": [],
        "node_files": [],
        "unavailable": [],
        "signals": [],
    }
    with open(path) as stream:
        for line in stream:
            key, _, value = line.rstrip("\n").partition("\t")
            config[key].append(value)
    return config


def parse(arguments: list[str], verb: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """The options before the image, the image, and the program. Later options win; binds add up."""
    request: dict[str, Any] = {
        "verb": verb,
        "binds": [],
        "env": {},
        "pwd": "",
        "home": None,
        "clean": False,
        "contain": False,
        "pid": False,
        "tmpfs": False,
        "shell": "/bin/bash",
        "gpu": [],
    }
    for variable in (
        "APPTAINER_BIND",
        "SINGULARITY_BIND",
        "APPTAINER_BINDPATH",
        "SINGULARITY_BINDPATH",
    ):
        request["binds"] += split_binds(environ.get(variable, ""))
    queue = list(arguments)
    while queue and queue[0].startswith("-") and queue[0] != "-":
        word = queue.pop(0)
        if word == "--":
            break
        option, equals, value = word.partition("=")
        if not option.startswith("--") and len(option) > 2:  # -Bpath
            option, equals, value = option[:2], "=", word[2:]
        if (
            option
            in ("-B", "--bind", "--env", "--env-file", "--pwd", "--cwd", "-H", "--home", "--mount")
            or option in VALUED
        ):
            if not equals:
                if not queue:
                    raise Fatal(f"flag needs an argument: {option}")
                value = queue.pop(0)
            _valued(request, option, value)
        elif option in ("-e", "--cleanenv"):
            request["clean"] = True
        elif option in ("-c", "--contain"):
            request["contain"] = True
        elif option in ("-C", "--containall"):
            request["contain"] = request["clean"] = request["pid"] = True
        elif option in ("-p", "--pid"):
            request["pid"] = True
        elif option == "--no-home":
            request["home"] = ""
        elif option == "--writable-tmpfs":
            request["tmpfs"] = True
        elif option in ("--nv", "--rocm"):
            request["gpu"].append(option[2:])
        elif option not in IGNORED:
            raise Fatal(f"unknown flag: {option}")
    if not queue:
        raise Fatal(f"no image given to `{verb}`")
    request["image"], request["program"] = queue[0], queue[1:]
    if verb == "exec" and not request["program"]:
        raise Fatal("no program given to `exec`")
    return request


def _valued(request: dict[str, Any], option: str, value: str) -> None:
    if option in ("-B", "--bind"):
        request["binds"] += split_binds(value)
    elif option == "--mount":
        fields = dict(item.partition("=")[::2] for item in value.split(","))
        source = fields.get("source", fields.get("src", ""))
        target = fields.get("destination", fields.get("dst", fields.get("target", source)))
        request["binds"].append(
            (source, target, "ro" if "ro" in fields or "readonly" in fields else "rw")
        )
    elif option == "--env":
        for item in value.split(","):
            key, equals, text = item.partition("=")
            if not equals:
                raise Fatal(f"invalid environment variable `{item}`: KEY=value is wanted")
            request["env"][key] = text
    elif option == "--env-file":
        try:
            with open(value) as stream:
                lines = [line.strip() for line in stream]
        except OSError as error:
            raise Fatal(f"could not read the environment file {value}: {error.strerror}") from error
        pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
        request["env"].update(
            {key.replace("export ", "").strip(): text.strip("\"'") for key, _, text in pairs}
        )
    elif option in ("--pwd", "--cwd"):
        request["pwd"] = value
    elif option in ("-H", "--home"):
        request["home"] = value
    elif option in ("-s", "--shell"):
        request["shell"] = value


def split_binds(text: str) -> list[Bind]:
    """[(source, destination, options)] of a bind list, `src[:dst[:opts]]` separated by commas."""
    binds: list[Bind] = []
    for item in text.split(","):
        parts = item.split(":")
        if not parts[0]:
            continue
        if (
            len(parts) == 1
            and ("=" in item or item in ("ro", "rw"))
            and binds
            and not item.startswith("/")
        ):
            # `a:b:ro,image-src=/`: a further option of the bind before it
            source, target, options = binds[-1]
            binds[-1] = (source, target, options + "," + item)
            continue
        target = parts[1] if len(parts) > 1 and parts[1] else parts[0]
        binds.append((parts[0], target, parts[2] if len(parts) > 2 else "rw"))
    return binds


def build(
    request: dict[str, Any], config: dict[str, list[str]], host_environ: Mapping[str, str], cwd: str
) -> tuple[list[str], dict[str, str], list[str]]:
    """(argv of bubblewrap, environment, warnings) of a request. Raises Fatal as singularity would
    at its start."""
    image, notes = request["image"], []
    if "://" in image:
        raise Fatal(f"hpctrain's stand-in does not fetch images: `{image}` must be a file")
    if not os.path.exists(image):
        raise Fatal(
            f"could not open image {image}: failed to retrieve path for {image}: lstat"
            f" {os.path.abspath(image)}: no such file or directory"
        )
    if config["unavailable"]:
        raise Fatal("containers cannot be run in this sandbox: {}".format(config["unavailable"][0]))
    for kind in request["gpu"]:
        notes.append(f"Could not find any {kind} files on this host!")
    home = host_environ.get("HOME", "/")
    mounts = image_mounts(config)
    mounts += [
        ("--dev-bind", "/dev", "/dev"),
        ("--proc" if request["pid"] else "--bind", "/proc", "/proc"),
    ]
    mounts += [("--ro-bind", "/sys", "/sys")]
    if request["contain"]:
        mounts += [("--tmpfs", "", path) for path in ("/tmp", "/var/tmp", home)]
    else:
        mounts += [("--bind", path, path) for path in ("/tmp", "/var/tmp") if os.path.isdir(path)]
        mounts += home_mount(request["home"], home)
        if os.path.realpath(cwd) != "/" and not _is_inside(cwd, IMAGE_DIRS):
            mounts.append(("--bind", cwd, cwd))
    for source, target, options in request["binds"]:
        mounts.append(bind_mount(source, target, options, cwd))
    mounts += [("--ro-bind", path, path) for path in config["node_files"]]
    inside = environment(request, config, host_environ)
    # Where singularity's own order would leave the program: --pwd, else here, else the home, else
    # the root.
    argv = list(config["bwrap"])
    if request["pid"]:
        argv.append("--unshare-pid")
    argv += mount_options(mounts)
    if not request["tmpfs"]:
        argv += ["--remount-ro", "/"]
    argv += [
        "--chdir",
        first_visible([request["pwd"] or cwd, home, "/"], mounts, bool(request["pwd"])),
    ]
    program = {
        "exec": request["program"],
        "run": request["program"] or [request["shell"], "--norc"],
        "shell": [request["shell"], "--norc"] + request["program"],
    }[request["verb"]]
    reset = ["/usr/bin/env"] + ["--default-signal=" + name for name in config["signals"]]
    return argv + ["--"] + reset + program_words(program), inside, notes


def program_words(program: list[str]) -> list[str]:
    """`env` would take a first word with `=` for an assignment: put a shell in front of such a
    program."""
    return (
        ["/bin/sh", "-c", 'exec "$0" "$@"'] + program
        if "=" in program[0] or program[0].startswith("-")
        else program
    )


def image_mounts(config: dict[str, list[str]]) -> list[Mount]:
    """This machine's system directories and hpctrain's interpreter, read-only: what an image would
    hold."""
    mounts: list[Mount] = []
    for path in IMAGE_DIRS:
        if os.path.islink(path):
            mounts.append(("--symlink", os.readlink(path), path))
        elif os.path.isdir(path):
            mounts.append(("--ro-bind", path, path))
    mounts += [("--dir", "", path) for path in ("/var/tmp", "/run", "/opt", "/srv", "/mnt")]
    return mounts + [
        ("--ro-bind", path, path) for path in config["image_dirs"] if os.path.isdir(path)
    ]


def home_mount(asked: str | None, home: str) -> list[Mount]:
    if asked == "":
        return []
    source, _, target = (asked or home).partition(":")
    return [("--bind", source, target or source)] if os.path.isdir(source) and source != "/" else []


def bind_mount(source: str, target: str, options: str, cwd: str) -> Mount:
    if not os.path.isabs(target):
        target = os.path.join(cwd, target)
    full = os.path.join(cwd, source)
    if not os.path.exists(full):
        raise Fatal(
            f"container creation failed: mount hook function failure: mount {source}->{target}"
            f" error: while mounting {source}: mount source {source} doesn't exist"
        )
    words = options.split(",")
    if any(word.startswith("image-src=") for word in words):
        # the inside of a squashfs image is not known here: an empty directory
        return ("--dir", "", target)
    return ("--ro-bind" if "ro" in words else "--bind", os.path.realpath(full), target)


def mount_options(mounts: list[Mount]) -> list[str]:
    """bubblewrap's options, parents first made writable where a bind falls into the read-only
    image."""
    options: list[str] = []
    opened: set[str] = set()
    for kind, source, target in mounts:
        if (
            kind in ("--bind", "--ro-bind", "--dir", "--tmpfs")
            and _is_inside(target, IMAGE_DIRS)
            and target not in IMAGE_DIRS
        ):
            options += underlay(os.path.realpath(target), opened)
        options += (
            [kind, target]
            if kind in ("--tmpfs", "--dir") or kind == "--proc"
            else [kind, source, target]
        )
    return options


def underlay(target: str, opened: set[str]) -> list[str]:
    """Make a mount point that the image does not have, as singularity's underlay does: its parent
    becomes a directory in memory with everything of the parent mounted into it."""
    parent = os.path.dirname(target)
    if os.path.lexists(target):
        return []
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    if parent in opened:
        return []
    opened.add(parent)
    options = ["--tmpfs", parent]
    for entry in sorted(os.listdir(parent)):
        path = os.path.join(parent, entry)
        if os.path.islink(path):
            options += ["--symlink", os.readlink(path), path]
        else:
            options += ["--ro-bind-try", path, path]
    return options


def environment(
    request: dict[str, Any], config: dict[str, list[str]], host_environ: Mapping[str, str]
) -> dict[str, str]:
    """The environment inside: the host's (or nearly none), the image's PATH, then what was asked
    for by name."""
    kept = CLEAN_KEEPS + NODE_KEEPS if request["clean"] else tuple(host_environ)
    inside = {key: host_environ[key] for key in kept if key in host_environ}
    prepend = append = ""
    asked: dict[str, str] = {}
    for prefix in ("APPTAINERENV_", "SINGULARITYENV_"):
        for key in list(host_environ):
            if key.startswith(prefix):
                inside.pop(key, None)
                asked[key[len(prefix) :]] = host_environ[key]
    asked.update(request["env"])
    prepend, append = asked.pop("PREPEND_PATH", ""), asked.pop("APPEND_PATH", "")
    inside["PATH"] = ":".join([*config["image_path"], IMAGE_PATH])
    inside["LD_LIBRARY_PATH"] = "/.singularity.d/libs"
    inside.update(asked)
    inside["PATH"] = ":".join(filter(None, [prepend, inside["PATH"], append]))
    image = os.path.abspath(request["image"])
    inside.update(
        SINGULARITY_CONTAINER=image,
        APPTAINER_CONTAINER=image,
        SINGULARITY_NAME=os.path.basename(image),
    )
    inside.update(APPTAINER_NAME=os.path.basename(image), PS1="Singularity> ")
    return inside


def first_visible(paths: list[str], mounts: list[Mount], must: bool) -> str:
    """The first directory that exists inside; a --pwd that does not is an error of singularity's
    start."""
    for index, path in enumerate(paths):
        if os.path.normpath(path) == "/":
            return "/"
        for kind, source, target in reversed(mounts):
            if target == path or path.startswith(target.rstrip("/") + "/"):
                below = os.path.join(source, os.path.relpath(path, target)) if source else ""
                if (
                    kind in ("--dir", "--tmpfs")
                    and target == path
                    or below
                    and os.path.isdir(below)
                ):
                    return path
                break
        if index == 0 and must:
            raise Fatal(f"failed to set working directory: chdir {path}: no such file or directory")
    return "/"


def _is_inside(path: str, folders: tuple[str, ...]) -> bool:
    real = os.path.realpath(path)
    return any(real == folder or real.startswith(folder + "/") for folder in folders)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
