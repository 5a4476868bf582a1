"""vLLM's worker for processors, which gives back the pages of blocks when the scheduler says so."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from kvpsi.engines.vllm.channel import ReleaseServer, address_of
from kvpsi.engines.vllm.layout import layout_of
from kvpsi.engines.vllm.supported import refuse_cache


class ElasticWorker(CPUWorker):  # type: ignore[misc]
    """As vLLM's own, except for a thread that waits for the scheduler."""

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
        self.releases = ReleaseServer(address_of(self.vllm_config, self.rank), layout)
        self.releases.start()
