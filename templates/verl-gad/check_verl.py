"""Whether the verl that this Python imports is the wanted branch of the wanted working copy; takes
a second, needs no GPU.

    check_verl.py FOLDER BRANCH

Every node runs it before the step. Nothing of verl is executed: the package is only looked for, and
git's own files tell the branch, so that no git is needed in the container. Standard library.
"""

import importlib.util
import os
import sys


def main(folder, branch):
    """0 when all is as it must be, 1 with the reason on stderr when not."""
    wrong = check_package(folder) or check_branch(folder, branch)
    if wrong:
        node = os.environ.get("SLURMD_NODENAME", "this machine")
        sys.stderr.write(f"hpctrain: error: on {node}: {wrong}\n")
        return 1
    if os.environ.get("SLURM_PROCID", "0") == "0":
        print(f"hpctrain: verl is {folder} at branch {branch}", flush=True)
    return 0


def check_package(folder):
    """Why `import verl` would not give the working copy's package, or an empty string."""
    try:
        spec = importlib.util.find_spec("verl")
    except (ImportError, ValueError) as error:
        return f"looking for the package verl failed: {error}"
    install = f"install it: pip install --no-deps -e {folder}"
    if spec is None:
        return f"{sys.executable} has no package verl; {install}"
    if not spec.origin or not os.path.basename(spec.origin).startswith("__init__."):
        places = ", ".join(spec.submodule_search_locations or ())
        return f"`import verl` finds a folder ({places}) and no package; {install}"
    package = os.path.dirname(os.path.realpath(spec.origin))
    if os.path.dirname(package) != os.path.realpath(folder):
        return "`import verl` takes {}, not {}; {}".format(
            package, os.path.join(folder, "verl"), install
        )
    return ""


def check_branch(folder, branch):
    """Why the working copy is not on the branch (or at its newest commit), or an empty string."""
    git = git_folder(folder)
    if git is None:
        return f"{folder} is no git working copy, so nothing tells its branch"
    head = read(os.path.join(git, "HEAD"))
    if head is None:
        return "{} cannot be read".format(os.path.join(git, "HEAD"))
    if head == "ref: refs/heads/" + branch:
        return ""
    if head.startswith("ref: refs/heads/"):
        name = head[len("ref: refs/heads/") :]
    else:
        wanted = branch_commits(git, branch)
        if head in wanted:
            return ""
        name = f"commit {head[:12]}"
    return (
        f"{folder} is at {name}, and the stage needs branch {branch}; run: git -C {folder} checkout"
        f" {branch}"
    )


def git_folder(folder):
    """The git folder of a working copy; for a worktree the one with its own HEAD. None where there
    is none."""
    path = os.path.join(folder, ".git")
    if os.path.isdir(path):
        return path
    text = read(path)
    if text and text.startswith("gitdir:"):
        return os.path.normpath(os.path.join(folder, text[len("gitdir:") :].strip()))
    return None


def branch_commits(git, branch):
    """The commits that the branch names, here and at the remotes as last fetched."""
    common = read(os.path.join(git, "commondir"))
    top = os.path.normpath(os.path.join(git, common)) if common else git
    found = set()
    remotes = os.path.join(top, "refs", "remotes")
    names = ["refs/heads/" + branch]
    names += [
        f"refs/remotes/{remote}/{branch}"
        for remote in (os.listdir(remotes) if os.path.isdir(remotes) else ())
    ]
    for name in names:
        found.add(read(os.path.join(top, *name.split("/"))))
    for line in (read(os.path.join(top, "packed-refs")) or "").splitlines():
        commit, _, name = line.partition(" ")
        if name == "refs/heads/" + branch or (
            name.startswith("refs/remotes/") and name.split("/", 3)[-1] == branch
        ):
            found.add(commit)
    found.discard(None)
    return found


def read(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read().strip()
    except (OSError, ValueError):
        return None


if __name__ == "__main__":
    sys.path[:] = [
        path
        for path in sys.path
        if os.path.abspath(path or ".") != os.path.dirname(os.path.abspath(__file__))
    ]
    sys.exit(main(sys.argv[1], sys.argv[2]))
