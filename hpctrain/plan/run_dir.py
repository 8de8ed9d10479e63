"""Writes and reads a run directory: all of it or nothing, never over something else without being
told.

A new run directory appears by one rename. A changed one is staged whole in `.render-new`, which one
rename commits as `.render-commit`; then its files move into place. Whoever finds a commit that was
cut off moves the rest first.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Mapping

from hpctrain.base.errors import EnvironmentFault, Problem, Refused
from hpctrain.base.files import umask
from hpctrain.plan.load import Loaded
from hpctrain.plan.render import render, runtime_files
from hpctrain.plan.template_cache import template_cache
from hpctrain.runtime.files import COMMIT, finish_commit, open_state, sync_folder

STAGED = ".render-new"


def rendered(loaded: Loaded) -> Mapping[str, str]:
    """The files of the run directory without `runtime/`, made once: `check` looks at them before
    they are written. Raises as `render.render`."""
    if not loaded.rendered:
        files = render(loaded.plan, loaded.inputs, template_cache(os.environ))
        loaded.rendered.update(files)
    return loaded.rendered


def run_files(loaded: Loaded) -> dict[str, bytes]:
    """Every file of the plan's run directory by relative path, `runtime/` included."""
    files = {name: text.encode("utf-8") for name, text in rendered(loaded).items()}
    files["run.yaml"] = loaded.inputs["run.yaml"]
    files["site.yaml"] = loaded.inputs["site.yaml"]
    runtime = runtime_files(loaded.plan)
    files.update({f"runtime/{name}": content for name, content in runtime.items()})
    return files


def write_run_dir(run_dir: str, files: Mapping[str, bytes], force: bool = False) -> bool:
    """Make `run_dir` hold exactly these files (beside logs, ledgers and whatever else is there).
    True when it changed.

    Raises Refused when it holds other content of the same names and `force` is not set, with the
    differences. Whatever the umask, nobody else may write there: a job runs it later.
    """
    before = umask()
    os.umask(before | 0o022)
    try:
        return _write(run_dir, files, force)
    finally:
        os.umask(before)


def _write(run_dir: str, files: Mapping[str, bytes], force: bool) -> bool:
    try:
        finish_commit(run_dir)
    except PermissionError as error:
        raise Refused(f"is not used: {error.strerror}", where=str(error.filename)) from error
    if not os.path.lexists(run_dir):
        _create(run_dir, files)
        return True
    if not os.path.isdir(run_dir):
        raise Refused(f"`{run_dir}` is there and is no folder", hint="name another one with -o")
    present = {name: _read_if_there(os.path.join(run_dir, name)) for name in files}
    changed = [name for name in files if present[name] != files[name]]
    if not changed:
        _make_logs(run_dir)
        return False
    others = [name for name in os.listdir(run_dir) if name not in ("logs", STAGED)]
    is_run_dir = present.get("plan.json") is not None or not others
    if not is_run_dir:
        raise Refused(
            f"`{run_dir}` holds files that are not a run's", hint="name another folder with -o"
        )
    if not force and others:
        raise Refused(
            Problem(
                f"`{run_dir}` was rendered from something else",
                why="\n".join(_difference(name, present[name], files[name]) for name in changed),
                hint=(
                    "render with --force to replace these files, or give the run another name; "
                    "jobs that are already queued read the configs as they are when they start"
                ),
            )
        )
    _replace(run_dir, files)
    return True


def _create(run_dir: str, files: Mapping[str, bytes]) -> None:
    parent = os.path.dirname(run_dir)
    os.makedirs(parent, exist_ok=True)
    staged = tempfile.mkdtemp(prefix=f".{os.path.basename(run_dir)[:60]}.", dir=parent)
    try:
        os.chmod(staged, os.stat(staged).st_mode & stat.S_ISGID | 0o777 & ~umask())
        _write_all(staged, files)
        _make_logs(staged)
        try:
            os.rename(staged, run_dir)
        except OSError as error:
            raise Refused(
                f"`{run_dir}` was made by someone else at this moment: {error.strerror}",
                hint="render again",
            ) from error
        sync_folder(parent)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _replace(run_dir: str, files: Mapping[str, bytes]) -> None:
    staged = os.path.join(run_dir, STAGED)
    shutil.rmtree(staged, ignore_errors=True)  # left by a render that was cut off before its commit
    os.mkdir(staged)
    _write_all(staged, files)
    os.rename(staged, os.path.join(run_dir, COMMIT))
    sync_folder(run_dir)
    finish_commit(run_dir)
    _make_logs(run_dir)


def _write_all(folder: str, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with open(path, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if name == "job.sbatch":
                os.chmod(path, 0o777 & ~umask())
        except OSError as error:
            raise EnvironmentFault(f"cannot write `{path}`: {error.strerror}") from error


def _make_logs(run_dir: str) -> None:
    os.makedirs(os.path.join(run_dir, "logs"), exist_ok=True)


def _read_if_there(path: str) -> bytes | None:
    try:
        with open(path, "rb", opener=open_state) as file:
            return file.read()
    except FileNotFoundError:
        return None


def _difference(name: str, old: bytes | None, new: bytes) -> str:
    if old is None:
        return f"{name}: would be added"
    import difflib  # only needed for a refusal

    lines = difflib.unified_diff(
        old.decode("utf-8", "replace").splitlines(),
        new.decode("utf-8", "replace").splitlines(),
        name,
        name,
        lineterm="",
        n=0,
    )
    shown = [line for line in lines if not line.startswith(("---", "+++"))]
    more = [f"… {len(shown) - 12} more lines"] if len(shown) > 12 else []
    return "\n".join([f"{name}:", *("  " + line for line in shown[:12] + more)])
