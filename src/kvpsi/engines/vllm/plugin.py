"""What vLLM finds as a platform plugin (entry point ``vllm.platform_plugins``)."""

from __future__ import annotations

from kvpsi.engines.vllm.settings import is_asked_for
from kvpsi.errors import UsageError


def platform() -> str | None:
    """The platform to use, by name; None unless ``KVPSI_VLLM=1`` asks for it. vLLM imports it in each process."""
    try:
        asked_for = is_asked_for()
    except UsageError:
        asked_for = True  # vLLM would hide the sentence here; the platform says it
    return "kvpsi.engines.vllm.platform.ElasticCpuPlatform" if asked_for else None
