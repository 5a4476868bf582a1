"""Fetches GGUF files from the Hugging Face hub, through the optional huggingface_hub and into its cache."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from kvpsi.errors import DownloadError, EnvironmentProblem, UsageError

_REPO = r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
_SPECS = (
    re.compile(rf"hf:{_REPO}[/:](?P<file>.+)", re.ASCII),
    re.compile(rf"{_REPO}:(?P<file>.+)", re.ASCII),
)
_FIRST_OF_MANY = re.compile(r"(?P<stem>.+)-00001-of-(?P<n_files>[0-9]{5})\.gguf", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository on the hub."""

    repo: str
    file_name: str

    def part_names(self) -> tuple[str, ...]:
        """The file itself, or all parts when it is the first part of a split model."""
        match = _FIRST_OF_MANY.fullmatch(self.file_name)
        if match is None:
            return (self.file_name,)
        n_files = int(match["n_files"])
        return tuple(f"{match['stem']}-{n:05}-of-{n_files:05}.gguf" for n in range(1, n_files + 1))


def parse_hub_spec(spec: str) -> HubFile | None:
    """``hf:owner/repo/file.gguf`` or ``owner/repo:file.gguf``; None when it is neither."""
    for pattern in _SPECS:
        match = pattern.fullmatch(spec)
        if match is not None and match["file"].endswith(".gguf"):
            return HubFile(match["repo"], match["file"])
    if spec.startswith("hf:"):
        raise UsageError(f"{spec!r} does not name a file on the hub: write it as hf:owner/repo/file.gguf.")
    return None


def fetch_hub(file: HubFile) -> Path:
    """Path of the (first) file in the hub's own cache, downloaded if need be."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise EnvironmentProblem(
            "Models from the Hugging Face hub need an extra package: run `pip install 'kvpsi[hub]'`."
        ) from error
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of each retry; one sentence is enough
    paths = []
    for name in file.part_names():
        try:
            paths.append(Path(huggingface_hub.hf_hub_download(repo_id=file.repo, filename=name)))
        except Exception as error:  # which classes come here depends on the version of huggingface_hub
            raise DownloadError(_explained(file, name, error)) from error
    return paths[0]


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
