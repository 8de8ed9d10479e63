"""Side jobs: a script of the user's after every link that made a new checkpoint. Its failure never
stops the chain."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass

from hpctrain.base.errors import EnvironmentFault, UsageError
from hpctrain.base.shell import output_pattern, quote
from hpctrain.runtime.files import make_folder, write_atomic

_DIRECTIVE = re.compile(r"^#SBATCH(?:\s.*)?$")


@dataclass(frozen=True)
class SideJob:
    """The script to submit and the options it does not bring itself."""

    script: str
    options: tuple[str, ...]


def submission(run_dir: str, run: str, link: int, script: str) -> SideJob:
    """Write the side job of a link, `side/after-N.sbatch`, and return it.

    It has the `#SBATCH` lines of the user's script, asks whether the link made a checkpoint, ends
    well if it did not, and otherwise runs the script, in the run directory, with
    HPCTRAIN_CHECKPOINT, HPCTRAIN_LINK and HPCTRAIN_RUN_DIR set. Raises UsageError when the script
    is not there or no script.
    """
    text = side_text(run_dir, link, script)
    folder = os.path.join(run_dir, "side")
    path = os.path.join(folder, f"after-{link}.sbatch")
    try:
        make_folder(folder)
        write_atomic(path, text)
    except OSError as error:
        raise EnvironmentFault(f"cannot write `{path}`: {error.strerror}") from error
    given = _options(text)
    account = "" if given & {"account", "A"} else _account(run_dir)
    name = f"{run}-after-{link}"
    ours = (
        ("job-name", "J", name),
        ("output", "o", f"{output_pattern(run_dir)}/logs/{name}-%j.out"),
        ("chdir", "D", run_dir),
        ("account", "A", account),
    )
    options = (
        f"--{long}={value}" for long, short, value in ours if value and not given & {long, short}
    )
    return SideJob(path, tuple(options))


def side_text(run_dir: str, link: int, script: str) -> str:
    """The side job's script; the same bytes for the same user's script."""
    try:
        with open(script, encoding="utf-8") as file:
            lines = file.read().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read the script of `chain.after_each`, `{script}`: {error}"
        ) from error
    if not lines[0].startswith("#!"):
        raise UsageError(
            f"`{script}` does not begin with `#!`",
            hint="its first line names what runs it, such as #!/bin/bash",
        )
    directives = []
    for line in lines[1:]:
        if line.strip() and not line.startswith("#"):
            break  # sbatch reads no directive after the first command
        if _DIRECTIVE.match(line):
            directives.append(line)
    runtime, interpreter = (
        os.path.join(run_dir, "runtime", "__main__.py"),
        shlex.split(lines[0][2:]),
    )
    program = " ".join(map(quote, [*interpreter, script]))
    return "\n".join(
        [
            "#!/bin/bash",
            *directives,
            (
                "# Made by `hpctrain chain`: runs a script after a link that made a new checkpoint,"
                " and only then."
            ),
            f"export HPCTRAIN_RUN_DIR={quote(run_dir)} HPCTRAIN_LINK={link}",
            (
                f"if ! HPCTRAIN_CHECKPOINT=$(python3 -B {quote(runtime)} made --run-dir"
                f' "$HPCTRAIN_RUN_DIR" --link {link}); then'
            ),
            f"  echo 'hpctrain: link {link} made no new checkpoint: nothing to do after it'",
            "  exit 0",
            "fi",
            "export HPCTRAIN_CHECKPOINT",
            f"exec {program}",
            "",
        ]
    )


def _options(text: str) -> set[str]:
    found = set()
    for line in text.split("\n"):
        if line.startswith("#SBATCH"):
            found.update(re.findall(r"(?:^|\s)--?([A-Za-z][\w-]*)", line[len("#SBATCH") :]))
    return found


def _account(run_dir: str) -> str:
    from hpctrain.jobs.checkpoints import read_plan

    account = read_plan(run_dir)["job"]["account"]
    return str(account) if account else ""
