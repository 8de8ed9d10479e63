"""The Python that trains: its version, its packages against every source of pins, and whether they really import."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from hpctrain.sites.doctor.findings import NOT_SEEN, OK, PROBLEM, WARNING, Finding

# Compiled against each other, so that only an import tells whether they fit.
REALLY_IMPORTED = ("numpy", "torch", "flash-attn", "deepspeed", "bitsandbytes", "xformers", "mpi4py")
# Maker of GPUs -> the attribute of torch.version that a build for them sets; what people call that.
_PLATFORMS = {"nvidia": "cuda", "amd": "hip", "intel": "xpu"}
_PLATFORM_NAMES = {"cuda": "CUDA", "hip": "ROCm", "xpu": "XPU"}
_LOCAL_TORCH = re.compile(r"torch(\d+\.\d+)", re.IGNORECASE)
_LOCAL_ABI = re.compile(r"cxx11abi(true|false)", re.IGNORECASE)
_LOCAL_CUDA = re.compile(r"cu(\d{2,3})", re.IGNORECASE)


@dataclass(frozen=True)
class Pin:
    """One wish about a package: by whom (`source`), which versions (empty: any), and why."""

    package: str
    versions: str
    source: str
    why: str = ""
    required: bool = True


def probe(python: Sequence[str], pins: Sequence[Pin], timeout_s: float = 300) -> tuple[dict[str, Any] | None, str]:
    """Ask the Python that `python` starts (an argv, e.g. inside a container). (facts or None, what it said on stderr)."""
    names = sorted({canonicalize_name(pin.package) for pin in pins} | {"numpy", "torch", "flash-attn"})
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "probe.py")
    with open(script, encoding="utf-8") as file:
        source = file.read()
    wanted = json.dumps({"packages": names, "imports": [name for name in names if name in REALLY_IMPORTED]})
    try:
        done = subprocess.run([*python, "-B", "-c", source, wanted], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              errors="replace", timeout=timeout_s, check=False)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    start = done.stdout.rfind('{"python"')
    try:
        facts = json.loads(done.stdout[start:]) if start >= 0 else None
    except ValueError:
        facts = None
    return (facts if isinstance(facts, dict) else None), done.stderr.strip() or f"exit code {done.returncode}"


def judge_python(
    facts: Mapping[str, Any] | None,
    said: str,
    wanted: str,
    pins: Sequence[Pin],
    gpu_vendor: str | None,
) -> Iterator[Finding]:
    """Everything about the probed Python.

    `gpu_vendor` is the maker of the GPUs that the job gets, as the site profile names it (a key of
    _PLATFORMS), empty where the profile does not, None for a job without GPUs.
    """
    if facts is None:
        yield Finding(
            "python",
            "starts",
            PROBLEM,
            f"it does not start: {said.splitlines()[-1] if said else 'no answer'}",
            "name another one with --python",
        )
        yield from contradictions(pins)
        return
    version = str(facts.get("python"))
    if wanted and not _allows(wanted, version):
        yield Finding(
            "python", "version", PROBLEM, f"Python {version} at {facts.get('executable')}; the recipe needs {wanted}"
        )
    else:
        yield Finding(
            "python",
            "version",
            OK,
            f"Python {version} at {facts.get('executable')}" + (f", needs {wanted}" if wanted else ""),
        )
    yield from contradictions(pins)
    yield from _packages(facts.get("packages") or {}, pins)
    yield from _imports(facts.get("packages") or {}, facts.get("imports") or {}, pins, said, gpu_vendor)


def contradictions(pins: Sequence[Pin]) -> Iterator[Finding]:
    """Packages about which two sources cannot both be right: an exact version that the other excludes."""
    by_package: dict[str, list[Pin]] = {}
    for pin in pins:
        if pin.versions:
            by_package.setdefault(canonicalize_name(pin.package), []).append(pin)
    for package, wishes in sorted(by_package.items()):
        for index, one in enumerate(wishes):
            for other in wishes[index + 1 :]:
                if _exclude_each_other(one.versions, other.versions):
                    yield Finding("packages", package, PROBLEM, f"{one.source} wants {one.versions}, {other.source} wants {other.versions}: no version is both",
                                  "decide on one and change the other")  # fmt: skip


def _exclude_each_other(one: str, other: str) -> bool:
    """Whether no version that either names (or one next to it) satisfies both."""
    try:
        both = SpecifierSet(one) & SpecifierSet(other)
    except InvalidSpecifier:
        return False
    named = [Version(spec.version.rstrip(".*")) for spec in both if _is_version(spec.version.rstrip(".*"))]
    nearby = [near for version in named for near in _near(version)]
    return bool(nearby) and not any(both.contains(version, prereleases=True) for version in nearby)


def _near(version: Version) -> list[Version]:
    """The version itself, a little below and a little above: enough to fall into any interval that it bounds."""
    release = list(version.release) + [0, 0]
    out = [version, Version(".".join(map(str, [*release[:-1], release[-1] + 1])))]
    for index in range(len(version.release)):
        bumped = [*version.release[:index], version.release[index] + 1]
        out.append(Version(".".join(map(str, bumped))))
        if version.release[index]:
            out.append(Version(".".join(map(str, [*version.release[:index], version.release[index] - 1, 999]))))
    return out


def _is_version(text: str) -> bool:
    try:
        Version(text)
    except InvalidVersion:
        return False
    return True


def _allows(versions: str, version: str) -> bool:
    try:
        return SpecifierSet(versions).contains(Version(version).base_version, prereleases=True)
    except (InvalidSpecifier, InvalidVersion):
        return False


def _packages(installed: Mapping[str, Any], pins: Sequence[Pin]) -> Iterator[Finding]:
    for pin in pins:
        name = canonicalize_name(pin.package)
        version = installed.get(name)
        why = f" ({pin.why})" if pin.why else ""
        if version is None:
            if pin.required:
                yield Finding(
                    "packages",
                    name,
                    PROBLEM,
                    f"not installed; {pin.source} needs it{why}",
                    f"pip install '{name}{pin.versions}'",
                )
            else:
                yield Finding("packages", name, NOT_SEEN, f"not installed; only needed for {pin.why or 'some options'}")
        elif pin.versions and not _allows(pin.versions, str(version)):
            yield Finding(
                "packages",
                name,
                PROBLEM,
                f"{version} is installed; {pin.source} needs {pin.versions}{why}",
                f"pip install '{name}{pin.versions}'",
            )
        else:
            yield Finding(
                "packages",
                name,
                OK,
                str(version) + (f", within {pin.versions} of {pin.source}" if pin.versions else ""),
            )


def _imports(
    installed: Mapping[str, Any],
    imports: Mapping[str, Any],
    pins: Sequence[Pin],
    said: str,
    gpu_vendor: str | None,
) -> Iterator[Finding]:
    needed = {canonicalize_name(pin.package) for pin in pins if pin.required}
    for name, facts in imports.items():
        if facts.get("ok"):
            yield Finding("imports", name, OK, f"{installed.get(name)} imports")
        else:
            error = str(facts.get("error"))
            level = PROBLEM if name in needed or name in ("torch", "numpy") else WARNING
            hint = (
                "it was compiled for another torch: install the build for the installed one"
                if "undefined symbol" in error
                else ""
            )
            yield Finding(
                "imports", name, level, f"{installed.get(name)} is installed and does not import: {error}", hint
            )
    if "compiled using NumPy 1.x" in said:
        yield Finding(
            "imports",
            "numpy",
            PROBLEM,
            "a package was compiled for NumPy 1 and NumPy 2 is installed",
            "pip install 'numpy<2', or newer builds of the others",
        )
    torch = imports.get("torch") or {}
    if torch.get("ok"):
        yield _build(torch, gpu_vendor)
        yield from pairing(str(installed.get("flash-attn") or ""), str(installed.get("torch") or ""), torch)


def _build(torch: Mapping[str, Any], gpu_vendor: str | None) -> Finding:
    """Whether torch was built for the GPUs that the job gets."""
    name, version = next(((name, torch[name]) for name in _PLATFORMS.values() if torch.get(name)), ("", None))
    build = f"{_PLATFORM_NAMES[name]} {version}" if name else "CPU only"
    fits = name == _PLATFORMS[gpu_vendor] if gpu_vendor else bool(name)
    if gpu_vendor is not None and not fits:
        whose = f"the site's GPUs are {gpu_vendor.upper()}'s" if gpu_vendor else "the job gets GPUs"
        return Finding(
            "imports",
            "torch build",
            PROBLEM,
            f"torch is built for {build}, and {whose}",
            "install torch from the matching wheel index, or use the site's container",
        )
    gpus = f", sees {torch.get('gpus')} GPUs here" if name else ""
    return Finding("imports", "torch build", OK, f"torch is built for {build}{gpus}")


def pairing(flash: str, torch: str, build: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether flash-attn's wheel was made for this torch, where its version says for which (`+cu12torch2.3cxx11abiFALSE`)."""
    if not flash or "+" not in flash:
        return
    local = flash.split("+", 1)[1]
    wrong = []
    made_for, abi, cuda = _LOCAL_TORCH.search(local), _LOCAL_ABI.search(local), _LOCAL_CUDA.search(local)
    if made_for and not torch.startswith(made_for[1] + "."):
        wrong.append(f"torch {made_for[1]}, and {torch} is installed")
    if abi and build.get("cxx11abi") is not None and (abi[1].lower() == "true") != build["cxx11abi"]:
        wrong.append(f"cxx11abi {abi[1]}, and torch has {str(build['cxx11abi']).upper()}")
    if cuda and build.get("cuda") and not str(build["cuda"]).startswith(cuda[1][:2]):
        wrong.append(f"CUDA {cuda[1]}, and torch has {build['cuda']}")
    if wrong:
        yield Finding(
            "imports",
            "flash-attn",
            PROBLEM,
            f"flash-attn {flash} was built for {'; '.join(wrong)}",
            "take the wheel for the installed torch",
        )
    else:
        yield Finding("imports", "flash-attn", OK, f"flash-attn {flash} fits torch {torch}")


def read_requirements(path: str) -> tuple[list[Pin], list[str]]:
    """The pins of a requirements file, and the lines that are none (options, URLs, nonsense)."""
    pins, other = [], []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            text = re.sub(r"(^|\s)#.*", "", line).strip()
            if not text:
                continue
            try:
                wish = Requirement(text)
            except InvalidRequirement:
                other.append(f"{path}:{number}")
                continue
            if wish.marker is None or wish.marker.evaluate():
                pins.append(Pin(wish.name, str(wish.specifier), f"{path}:{number}"))
    return pins, other
