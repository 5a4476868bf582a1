"""Is there a llama.cpp that works, a vLLM that is known, and a model?"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from kvpsi.doctor.finding import Finding
from kvpsi.engines.vllm.supported import installed_version, refuse_version
from kvpsi.errors import KvpsiError, UsageError
from kvpsi.models import DEFAULT_MODEL, cache_dir, cached_model_path
from kvpsi.units import format_bytes

TESTED_FROM, TESTED_BELOW = (0, 3, 36), (0, 3, 37)
_REQUIREMENT = "llama-cpp-python>=0.3.36,<0.3.37"
_IMPORT_LIMIT_S = 60.0


def engines() -> list[Finding]:
    """llama.cpp, and vLLM where it is installed; with a vLLM that can be governed llama.cpp may be missing."""
    llama, others = llama_cpp(), vllm()
    if llama.status == "fail" and any(other.status == "ok" for other in others):
        llama = replace(llama, status="warn")
    return [llama, *others]


def llama_cpp(timeout_s: float = _IMPORT_LIMIT_S) -> Finding:
    """Import llama_cpp in a process of its own: a build for another CPU would kill this one."""
    name = "llama.cpp"
    fix = f"Run `{sys.executable} -m pip install --force-reinstall '{_REQUIREMENT}'`."
    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "fail", "llama-cpp-python is not installed", fix)
    try:
        probe = subprocess.run(
            [sys.executable, "-c", "import llama_cpp; llama_cpp.llama_backend_init()"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return Finding(name, "fail", f"llama-cpp-python {version} did not load within {timeout_s:.0f} s", fix)
    if probe.returncode != 0:
        last_line = (probe.stderr.decode("utf-8", "replace").strip().splitlines() or [""])[-1]
        why = last_line or f"exit status {probe.returncode}"
        return Finding(name, "fail", f"llama-cpp-python {version} does not load ({why})", fix)
    if not TESTED_FROM <= _numbers(version) < TESTED_BELOW:
        return Finding(name, "warn", f"llama-cpp-python {version} was not tested with this kvpsi", fix)
    return Finding(name, "ok", f"llama-cpp-python {version}")


def vllm() -> list[Finding]:
    """Whether the installed vLLM is one that the plugin knows; nothing where there is none."""
    version = installed_version()
    if not version:
        return []
    try:
        refuse_version(version)
    except UsageError as why:
        return [Finding("vLLM", "warn", f"vLLM {version} cannot be governed", str(why))]
    return [Finding("vLLM", "ok", f"vLLM {version}")]


def model_cache() -> Finding:
    """Whether models can be stored; really tried, in the nearest folder that is there, and nothing is left."""
    name = "model cache"
    fix = "Set KVPSI_CACHE_DIR to a folder for models that can be written."
    try:
        folder = cache_dir() / "models"
    except KvpsiError as error:
        return Finding(name, "warn", str(error), fix)
    try:
        with tempfile.TemporaryFile(dir=_nearest_there(folder)) as probe:
            probe.write(b"\xff")
    except OSError as error:
        return Finding(name, "warn", f"{folder} cannot be written ({error.strerror or error})", fix)
    return Finding(name, "ok", str(folder))


def _nearest_there(folder: Path) -> Path:
    """The folder itself, or the one above it in which it would be made."""
    return next((each for each in (folder, *folder.parents) if os.path.lexists(each)), folder)


def default_model() -> Finding:
    """Whether the default model is there already."""
    try:
        path = cached_model_path()
        where = cache_dir()
    except KvpsiError as error:
        return Finding("default model", "warn", str(error), "Set KVPSI_CACHE_DIR to a folder for models.")
    if path is not None:
        return Finding("default model", "ok", str(path))
    size = format_bytes(DEFAULT_MODEL.size_bytes)
    return Finding("default model", "warn", f"not in {where} yet ({size})", "Run `kvpsi pull`.")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"[0-9]+", version)[:3])
