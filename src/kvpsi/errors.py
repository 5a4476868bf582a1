"""Everything that kvpsi raises on purpose.

::

    KvpsiError
    ├── UsageError             what the user asked for cannot be: exit status 2
    │   ├── ModelFileError     missing, truncated or not a GGUF file
    │   └── PromptTooLongError the prompt does not fit into the context
    ├── EnvironmentProblem     this machine does not allow it: exit status 1
    │   ├── DownloadError      a model could not be fetched
    │   ├── PressureUnavailableError
    │   ├── RebuildError       a context could not be made again, or would not take its saved state
    │   └── SpillError         a saved state could not be written to a file, or is not what was written
    ├── CacheRefusedError      the allocation gate said no and nothing could be evicted
    └── LayoutError            the KV tensors could not be found or did not verify

Each message is one sentence (or two short ones) that names what is wrong and what to do about it.
"""

from __future__ import annotations


class KvpsiError(Exception):
    """Base of all errors that kvpsi raises on purpose; the command line prints its text without a traceback."""

    exit_status = 1


class UsageError(KvpsiError):
    """A setting, size or argument that cannot be meant."""

    exit_status = 2


class ModelFileError(UsageError):
    """The model file is missing, truncated or not GGUF."""


class PromptTooLongError(UsageError):
    """The prompt needs more cells than the context has."""


class EnvironmentProblem(KvpsiError):  # noqa: N818 - a state of the machine, not a mistake
    """Something about the machine prevents the job."""


class DownloadError(EnvironmentProblem):
    """A model could not be fetched or stored."""


class PressureUnavailableError(EnvironmentProblem):
    """No source of memory readings works here, not even the fallback."""


class RebuildError(EnvironmentProblem):
    """A context that was freed to resize it could not be made again, or would not take its own state back."""


class SpillError(EnvironmentProblem):
    """A saved state could not be written to a file, or the file is not what was written."""


class CacheRefusedError(KvpsiError):
    """The allocation gate refused new cells and the policy had nothing left to evict."""


class LayoutError(KvpsiError):
    """The KV tensors of a context could not be found in memory or did not verify."""
