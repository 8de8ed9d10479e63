"""Run by the Python that is examined, in a process of its own: prints one JSON object about it.
Standard library only."""

import importlib
import importlib.util
import json
import os
import platform
import sys
from typing import Any, Dict

WANTED = json.loads(sys.argv[1])
IMPORTS = {
    "flash-attn": "flash_attn",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "mpi4py": "mpi4py",
}
found: Dict[str, Any] = {
    "python": platform.python_version(),
    "executable": sys.executable,
    "prefix": sys.prefix,
    "packages": {},
    "requires": {},
    "places": {},
    "urls": {},
    "environment": {
        "implementation_name": sys.implementation.name,
        "implementation_version": platform.python_version(),
        "os_name": os.name,
        "platform_machine": platform.machine(),
        "platform_python_implementation": platform.python_implementation(),
        "platform_release": platform.release(),
        "platform_system": platform.system(),
        "platform_version": platform.version(),
        "python_full_version": platform.python_version(),
        "python_version": ".".join(platform.python_version_tuple()[:2]),
        "sys_platform": sys.platform,
    },
    "imports": {},
}
try:
    from importlib import metadata
except ImportError:  # Python 3.7 and older
    metadata = None  # type: ignore[assignment]


def about(name: str) -> None:
    """Version, own requirements, origin and place of one package, as far as they can be told."""
    found["packages"][name] = None
    try:
        package = metadata.distribution(name)
        found["packages"][name] = package.version
        found["requires"][name] = list(package.requires or [])
        url = json.loads(package.read_text("direct_url.json") or "{}").get("url")
        if url:
            found["urls"][name] = url
    except Exception:  # not there, or its files are damaged
        pass
    try:
        spec = importlib.util.find_spec(IMPORTS.get(name, name.replace("-", "_")))
        if spec and spec.origin and os.path.basename(spec.origin).startswith("__init__."):
            found["places"][name] = os.path.dirname(os.path.dirname(os.path.realpath(spec.origin)))
    except Exception:
        pass


for name in WANTED["packages"]:
    about(name)
sys.stdout.flush()
real = os.dup(1)  # what a package prints while it is imported must not get between
os.dup2(2, 1)
for name in WANTED["imports"]:
    if found["packages"].get(name) is None:
        continue
    module = IMPORTS.get(name, name.replace("-", "_"))
    try:
        loaded = importlib.import_module(module)
        facts: Dict[str, Any] = {"ok": True}
        if name == "torch":
            facts["cuda"] = loaded.version.cuda
            facts["hip"] = getattr(loaded.version, "hip", None)
            facts["xpu"] = getattr(loaded.version, "xpu", None)
            facts["cxx11abi"] = bool(loaded._C._GLIBCXX_USE_CXX11_ABI)
            devices = loaded.xpu if facts["xpu"] else loaded.cuda
            facts["gpus"] = devices.device_count() if devices.is_available() else 0
        if name == "numpy":
            facts["version"] = loaded.__version__
    except BaseException as error:  # also SystemExit of a package that gives up
        facts = {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
    found["imports"][name] = facts
os.write(real, json.dumps(found).encode())
