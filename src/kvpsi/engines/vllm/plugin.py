"""What vLLM finds as a platform plugin (entry point ``vllm.platform_plugins``)."""

from __future__ import annotations

import os

from kvpsi.engines.vllm.settings import is_yes


def platform() -> str | None:
    """The platform to use, by name; None unless ``KVPSI_VLLM=1`` asks for it. vLLM imports it in each process."""
    return "kvpsi.engines.vllm.platform.ElasticCpuPlatform" if is_yes(os.environ.get("KVPSI_VLLM", "")) else None
