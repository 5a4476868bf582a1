"""Fetches GGUF files from the Hugging Face hub, through the optional huggingface_hub and into its cache."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from kvpsi.errors import DownloadError, EnvironmentProblem, KvpsiError, UsageError
from kvpsi.models.gguf import GgufInfo, check_gguf, read_gguf

_REPO = r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
_SPECS = (
    re.compile(rf"hf:{_REPO}[/:](?P<file>.+)", re.ASCII),
    re.compile(rf"{_REPO}:(?P<file>.+)", re.ASCII),
)
_HUB = r"(?:www\.)?(?:huggingface\.co|hf\.co)/"
_PAGE = re.compile(
    rf"(?:https?://)?{_HUB}{_REPO}/(?:blob|resolve|raw)/(?P<revision>[^/?#]+)/"
    r"(?P<file>[^?#]+)(?:[?#].*)?",
    re.ASCII,
)
_ADDRESS = re.compile(rf"(?:https?://|{_HUB}).*", re.IGNORECASE | re.DOTALL)
_REACH_TIMEOUT_S = 5.0
_HEADER_BLOCK_BYTES = 1 << 20
_FIRST_OF_MANY = re.compile(r"(?P<stem>.+)-00001-of-(?P<n_files>[0-9]{5})\.gguf", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository on the hub; ``revision`` is a branch, tag or commit."""

    repo: str
    file_name: str
    revision: str = "main"

    def part_names(self) -> tuple[str, ...]:
        """The file itself, or all parts when it is the first part of a split model."""
        return part_names(self.file_name)


def part_names(file_name: str) -> tuple[str, ...]:
    """Names of the files of a model: the one itself, or all parts when it is the first one."""
    match = _FIRST_OF_MANY.fullmatch(file_name)
    if match is None:
        return (file_name,)
    n_files = int(match["n_files"])
    return tuple(f"{match['stem']}-{n:05}-of-{n_files:05}.gguf" for n in range(1, n_files + 1))


def parse_hub_spec(spec: str) -> HubFile | None:
    """``hf:owner/repo/file.gguf``, ``owner/repo:file.gguf`` or the address of a file's page; None when it is none."""
    if _ADDRESS.fullmatch(spec):
        return _parse_address(spec)
    for pattern in _SPECS:
        match = pattern.fullmatch(spec)
        if match is not None and match["file"].endswith(".gguf"):
            return HubFile(match["repo"], match["file"])
    if spec.startswith("hf:"):
        raise UsageError(f"{spec!r} does not name a file on the hub: write it as hf:owner/repo/file.gguf.")
    return None


def fetch_hub(file: HubFile) -> Path:
    """Path of the (first) file in the hub's own cache, downloaded if need be."""
    huggingface_hub = _hub()
    huggingface_hub.hf_hub_download  # noqa: B018 - imported on first use, which sets the level of its logger anew
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of each retry; one sentence is enough
    paths = [_fetch_part(huggingface_hub, file, name) for name in file.part_names()]
    return paths[0]


def read_hub_header(file: HubFile) -> GgufInfo:
    """What the header of a file says; its size is that of all parts.

    What was downloaded before is read where it lies, without asking the hub. Of anything else only the header is
    fetched, in blocks of 1 MiB: no more than its own size and one block.

    Raises:
        DownloadError: the hub cannot be reached, or does not have it.
        ModelFileError: it is not sound.
    """
    hub = _hub()
    name = file.file_name
    try:
        if paths := _downloaded(hub, file):
            return replace(check_gguf(paths[0]), size_bytes=sum(path.stat().st_size for path in paths))
        sizes = []
        for name in file.part_names():
            where = {"repo_id": file.repo, "filename": name, "revision": file.revision}
            metadata = hub.get_hf_file_metadata(hub.hf_hub_url(**where), timeout=_REACH_TIMEOUT_S)
            sizes.append(int(metadata.size))
        name = file.file_name
        where_from = {"revision": file.revision, "block_size": _HEADER_BLOCK_BYTES}
        with hub.HfFileSystem().open(f"{file.repo}/{name}", "rb", **where_from) as opened:
            return replace(read_gguf(opened, name, sizes[0]), size_bytes=sum(sizes))
    except KvpsiError:
        raise
    except Exception as error:  # which classes come here depends on the version of huggingface_hub
        raise DownloadError(_explained(file, name, error)) from error


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise EnvironmentProblem(
            "Models from the Hugging Face hub need an extra package: run `pip install 'kvpsi[hub]'`."
        ) from error
    return huggingface_hub


def _downloaded(hub: Any, file: HubFile) -> list[Path]:
    """Paths of all parts in the hub's own cache; none if one is missing there."""
    paths = []
    for name in file.part_names():
        found = hub.try_to_load_from_cache(file.repo, name, revision=file.revision)
        if not isinstance(found, str):  # nothing, or a mark that the hub has no such file
            return []
        paths.append(Path(found))
    return paths


def _fetch_part(hub: Any, file: HubFile, name: str) -> Path:
    """One file. The hub is asked once first: without a network, hf_hub_download itself would try for half a minute."""
    where = {"repo_id": file.repo, "filename": name, "revision": file.revision}
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(**where), timeout=_REACH_TIMEOUT_S)
        return Path(hub.hf_hub_download(**where))
    except Exception as error:  # which classes come here depends on the version of huggingface_hub
        try:
            return Path(hub.hf_hub_download(**where, local_files_only=True))
        except Exception:  # not fetched before either
            raise DownloadError(_explained(file, name, error)) from error


def _parse_address(address: str) -> HubFile:
    match = _PAGE.fullmatch(address)
    if match is not None and match["file"].endswith(".gguf"):
        return HubFile(match["repo"], unquote(match["file"]), unquote(match["revision"]))
    raise UsageError(
        f"{address!r} is not the address of a .gguf file on the Hugging Face hub: write it as hf:owner/repo/file.gguf, "
        "or download the file and name its path."
    )


def _explained(file: HubFile, name: str, error: Exception) -> str:
    kind = type(error).__name__
    if kind == "GatedRepoError":
        return f"{file.repo} is gated on the hub: accept its terms there and log in with `hf auth login`."
    if kind in ("RepositoryNotFoundError", "HFValidationError"):
        return f"{file.repo} was not found on the hub: check the name, or log in if it is private."
    if kind in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
        return f"{file.repo} has no file {name} on the hub: check the file name."
    return (
        f"{name} of {file.repo} could not be downloaded ({kind}): check the network connection, "
        "or name a local .gguf file."
    )
