"""The Python that trains: its version, its packages against every source of pins, and whether they
really import."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from packaging.utils import canonicalize_name

from hpctrain.base.paths import shipped_dir
from hpctrain.sites.doctor import versions
from hpctrain.sites.doctor.findings import OK, PROBLEM, WARNING, Finding
from hpctrain.sites.doctor.versions import Pin

# Compiled against each other, so that only an import tells whether they fit.
REALLY_IMPORTED = (
    "numpy",
    "torch",
    "flash-attn",
    "deepspeed",
    "bitsandbytes",
    "xformers",
    "mpi4py",
)
# Maker of GPUs -> the attribute of torch.version that a build for them sets; what people call that.
_PLATFORMS = {"nvidia": "cuda", "amd": "hip", "intel": "xpu"}
_PLATFORM_NAMES = {"cuda": "CUDA", "hip": "ROCm", "xpu": "XPU"}
_LOCAL_TORCH = re.compile(r"torch(\d+\.\d+)", re.IGNORECASE)
_LOCAL_ABI = re.compile(r"cxx11abi(true|false)", re.IGNORECASE)
_LOCAL_CUDA = re.compile(r"cu(\d{2,3})", re.IGNORECASE)


def probe(
    python: Sequence[str], pins: Sequence[Pin], timeout_s: float = 300
) -> tuple[dict[str, Any] | None, str]:
    """Ask the Python that `python` starts (an argv, e.g. inside a container). (facts or None, what
    it said on stderr)."""
    names = sorted(
        {canonicalize_name(pin.package) for pin in pins} | {"numpy", "torch", "flash-attn"}
    )
    script = os.path.join(shipped_dir("templates"), "base", "probe_python.py")
    with open(script, encoding="utf-8") as file:
        source = file.read()
    wanted = json.dumps(
        {"packages": names, "imports": [name for name in names if name in REALLY_IMPORTED]}
    )
    try:
        done = subprocess.run(
            [*python, "-B", "-c", source, wanted],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    start = done.stdout.rfind('{"python"')
    try:
        facts = json.loads(done.stdout[start:]) if start >= 0 else None
    except ValueError:
        facts = None
    return (
        facts if isinstance(facts, dict) else None
    ), done.stderr.strip() or f"exit code {done.returncode}"


def judge_python(
    facts: Mapping[str, Any] | None,
    said: str,
    pythons: Sequence[Pin],
    pins: Sequence[Pin],
    gpu_vendor: str | None,
) -> Iterator[Finding]:
    """Everything about the probed Python; `pythons` are the wishes about its own version.

    `gpu_vendor` is the maker of the GPUs that the job gets, as the site profile names it (a key of
    _PLATFORMS), empty where the profile does not, None for a job without GPUs.
    """
    if facts is None:
        what = f"it does not start: {said.splitlines()[-1] if said else 'no answer'}"
        yield Finding("python", "starts", PROBLEM, what, "name another one with --python")
        yield from versions.contradictions(pins)
        return
    version, where = str(facts.get("python")), f"at {facts.get('executable')}"
    wrong = [wish for wish in pythons if versions.fits(wish.versions, version) == versions.MISSES]
    needs = "; ".join(f"{wish.source} needs {wish.versions}" for wish in wrong or pythons)
    what = f"Python {version} {where}" + (f"; {needs}" if needs else "")
    yield Finding("python", "version", PROBLEM if wrong else OK, what)
    installed = versions.Installed.of(facts)
    yield from versions.contradictions([pin for pin in pins if installed.applies(pin.marker)])
    yield from versions.judge(installed, pins)
    yield from _imports(installed.versions, facts.get("imports") or {}, pins, said, gpu_vendor)


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
                "imports",
                name,
                level,
                f"{installed.get(name)} is installed and does not import: {error}",
                hint,
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
        yield from pairing(
            str(installed.get("flash-attn") or ""), str(installed.get("torch") or ""), torch
        )


def _build(torch: Mapping[str, Any], gpu_vendor: str | None) -> Finding:
    """Whether torch was built for the GPUs that the job gets."""
    name, version = next(
        ((name, torch[name]) for name in _PLATFORMS.values() if torch.get(name)), ("", None)
    )
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
    """Whether flash-attn's wheel was made for this torch, where its version says for which
    (`+cu12torch2.3cxx11abiFALSE`)."""
    if not flash or "+" not in flash:
        return
    local = flash.split("+", 1)[1]
    wrong = []
    made_for, abi, cuda = (
        _LOCAL_TORCH.search(local),
        _LOCAL_ABI.search(local),
        _LOCAL_CUDA.search(local),
    )
    if made_for and not torch.startswith(made_for[1] + "."):
        wrong.append(f"torch {made_for[1]}, and {torch} is installed")
    if (
        abi
        and build.get("cxx11abi") is not None
        and (abi[1].lower() == "true") != build["cxx11abi"]
    ):
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
