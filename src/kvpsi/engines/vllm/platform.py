"""vLLM's platform for processors, with an elastic scheduler and an elastic worker."""

from __future__ import annotations

import multiprocessing
import sys
from typing import Any

from vllm.platforms.cpu import CpuPlatform

from kvpsi.engines.vllm.settings import is_asked_for, refuse_taken_ports, refuse_vllms_port, settings_from
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
        status_port = settings_from().status_port  # what is wrong with a variable is said before minutes of loading
        scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
        if not cls._has_begun and multiprocessing.parent_process() is None:  # vLLM comes here again when all is up
            cls._refuse_ports(status_port, parallel)
        cls._has_begun = True
        if scheduler.scheduler_cls is None:
            scheduler.scheduler_cls = _SCHEDULER
        if parallel.worker_cls == _STOCK_WORKER:
            parallel.worker_cls = _WORKER

    @staticmethod
    def _refuse_ports(status_port: int, parallel: Any) -> None:
        """A command may start some of several data-parallel engines only."""
        first = status_port + parallel.data_parallel_rank
        ports = range(first, first + max(1, parallel.data_parallel_size_local)) if status_port else range(0)
        refuse_vllms_port(ports, sys.argv)
        refuse_taken_ports(ports)
