"""Run by the Python that is examined, in a process of its own: prints one JSON object about it. Standard library only."""

import importlib
import json
import os
import platform
import sys
from typing import Any, Dict

WANTED = json.loads(sys.argv[1])
IMPORTS = {"flash-attn": "flash_attn", "pyyaml": "yaml", "scikit-learn": "sklearn", "mpi4py": "mpi4py"}
found: Dict[str, Any] = {
    "python": platform.python_version(),
    "executable": sys.executable,
    "prefix": sys.prefix,
    "packages": {},
    "imports": {},
}
try:
    from importlib import metadata
except ImportError:  # Python 3.7 and older
    metadata = None  # type: ignore[assignment]
for name in WANTED["packages"]:
    try:
        found["packages"][name] = metadata.version(name) if metadata else None
    except Exception:
        found["packages"][name] = None
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
