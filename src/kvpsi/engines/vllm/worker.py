"""vLLM's worker for processors, which gives back the pages of blocks when the scheduler says so."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from kvpsi.engines.vllm.channel import ReleaseServer, address_of
from kvpsi.engines.vllm.layout import layout_of
from kvpsi.engines.vllm.supported import refuse_cache
from kvpsi.errors import UsageError


class ElasticWorker(CPUWorker):  # type: ignore[misc]
    """As vLLM's own, except for a thread that waits for the scheduler.

    Raises:
        UsageError: it is vLLM's own scheduler, which never says anything.
    """

    def __init__(self, vllm_config: Any, *args: Any, **options: Any) -> None:
        if vllm_config.scheduler_config.scheduler_cls is None:
            raise UsageError(
                "Without kvpsi's scheduler nothing would be governed: start vLLM with --scheduler-cls "
                "kvpsi.engines.vllm.scheduler.ElasticScheduler as well, or with KVPSI_VLLM=1."
            )
        self.release_server: ReleaseServer | None = None
        super().__init__(vllm_config, *args, **options)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Have the KV tensors made, find the blocks in them, and wait for what is to be released.

        Raises:
            LayoutError: the blocks lie in a way that is not known.
            UsageError: they are not all alike.
        """
        super().initialize_from_config(kv_cache_config)
        refuse_cache(kv_cache_config)
        layout = layout_of(self.model_runner.kv_caches, kv_cache_config.num_blocks)
        layout.set_apart()
        self.release_server = ReleaseServer(address_of(self.vllm_config, self.rank), layout)
        self.release_server.start()

    def shutdown(self) -> None:
        """Give nothing back any more, as the KV tensors end here; they may be in the process of vLLM's user."""
        if self.release_server is not None:
            self.release_server.close()
        super().shutdown()
