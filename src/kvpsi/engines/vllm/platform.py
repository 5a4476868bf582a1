"""vLLM's platform for processors, with an elastic scheduler and an elastic worker."""

from __future__ import annotations

import multiprocessing
import sys
from typing import Any

from vllm.platforms.cpu import CpuPlatform

from kvpsi.engines.vllm.settings import is_asked_for, refuse_port, refuse_taken_port, settings_from
from kvpsi.engines.vllm.supported import refuse_unsupported

_SCHEDULER = "kvpsi.engines.vllm.scheduler.ElasticScheduler"
_WORKER = "kvpsi.engines.vllm.worker.ElasticWorker"
_STOCK_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"


class ElasticCpuPlatform(CpuPlatform):  # type: ignore[misc]
    """Chooses the two classes, so that ``vllm serve`` needs no options."""

    _has_begun = False

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """As vLLM does, then the two classes unless ``--scheduler-cls`` and ``--worker-cls`` name others.

        Raises:
            UsageError: this vLLM, or what it is asked for, is not supported, or a variable is not what it must be.
        """
        is_asked_for()
        super().check_and_update_config(vllm_config)
        refuse_unsupported(vllm_config)
        scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
        # before minutes of loading
        status_port, n_engines = settings_from().status_port, parallel.data_parallel_size
        refuse_port(status_port, sys.argv, n_engines)
        if not cls._has_begun and multiprocessing.parent_process() is None:  # vLLM comes here again when all is up
            refuse_taken_port(status_port, n_engines)
        cls._has_begun = True
        if scheduler.scheduler_cls is None:
            scheduler.scheduler_cls = _SCHEDULER
        if parallel.worker_cls == _STOCK_WORKER:
            parallel.worker_cls = _WORKER
