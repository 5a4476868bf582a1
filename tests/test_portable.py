"""Elsewhere than on Linux the package must at least come up, and govern by rebuilding."""

from __future__ import annotations

import subprocess
import sys

# What the standard library has on Unix only is taken away before anything of kvpsi is loaded.
_AS_ON_WINDOWS = """
import ctypes, os, select, sys
import numpy, psutil, llama_cpp, filelock, typer, rich, fastapi, uvicorn, prometheus_client
for name in ("fcntl", "resource", "pwd", "grp"):
    sys.modules[name] = None
sys.platform = "win32"
for module, name in ((os, "sched_getaffinity"), (select, "poll")):
    delattr(module, name)
load = ctypes.CDLL
def load_by_name(name, *args, **kwargs):
    assert name is not None, "the program itself is no library on Windows"
    return load(None, *args, **kwargs)
ctypes.CDLL = load_by_name
import pkgutil, importlib, kvpsi
for module in pkgutil.walk_packages(kvpsi.__path__, "kvpsi."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as missing:
            assert missing.name == "vllm" and module.name.startswith("kvpsi.engines.vllm."), missing
from kvpsi.pressure import open_source
assert open_source().read().headroom.available_bytes > 0
"""


def test_every_module_comes_up_without_what_only_unix_has() -> None:
    done = subprocess.run([sys.executable, "-c", _AS_ON_WINDOWS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
