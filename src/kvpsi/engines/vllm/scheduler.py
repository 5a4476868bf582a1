"""vLLM's scheduler with a balloon in its block pool, and a governor that says how large the pool may be."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from kvpsi.admission.policies.adaptive import AdaptiveSettings
from kvpsi.engines.sensing import best_sensing
from kvpsi.engines.vllm.balloon import Balloon, BalloonSettings
from kvpsi.engines.vllm.channel import Workers, address_of
from kvpsi.engines.vllm.log import instrument_of, log
from kvpsi.engines.vllm.report import StatusServer, VllmStatus
from kvpsi.engines.vllm.settings import VllmSettings, settings_from
from kvpsi.engines.vllm.supported import refuse_cache, refuse_unsupported
from kvpsi.errors import EnvironmentProblem, LayoutError
from kvpsi.governor import Governor
from kvpsi.governor.sharing import open_sharing
from kvpsi.governor.status import status_of
from kvpsi.instrument import Instrument
from kvpsi.units import format_bytes


class ElasticScheduler(Scheduler):  # type: ignore[misc]
    """As vLLM's own, with fewer blocks and fewer sequences at once while memory is short.

    Raises:
        UsageError: this vLLM, or what it is asked for, is not supported.
        EnvironmentProblem: a worker does not listen.
        LayoutError: it has other blocks than the scheduler.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        refuse_unsupported(self.vllm_config)
        refuse_cache(self.kv_cache_config)
        self._most_active_reqs = int(vars(self)["max_num_active_reqs"])  # not there: another vLLM, which must not start
        self._veto_stall = AdaptiveSettings().memory_stall
        self.pauses = 0
        with contextlib.ExitStack() as stack:  # what was begun ends if the rest cannot begin
            self._begin(settings_from(), stack)
            self._closing = stack.pop_all()

    def _begin(self, settings: VllmSettings, stack: contextlib.ExitStack) -> None:
        parallel = self.vllm_config.parallel_config
        self.workers = Workers([address_of(self.vllm_config, rank) for rank in range(parallel.world_size)])
        stack.callback(self.workers.close)
        # among several data-parallel engines; their size and rank are those of a single one by now
        engine = parallel.data_parallel_index
        instrument = instrument_of(settings, engine, stack)
        if settings.unknown:
            log.warning("kvpsi does not know %s here; docs/vllm.md has the names", ", ".join(settings.unknown))
        self.balloon = self._make_balloon(settings, instrument)
        stack.callback(self.balloon.stop)
        self.balloon.start()
        self.governor = self.make_governor(self.balloon, settings, instrument)
        stack.callback(self.governor.stop)
        self.governor.start()
        if settings.status_port:
            stack.callback(StatusServer(settings.status_port + engine, self.status).close)

    def _make_balloon(self, settings: VllmSettings, instrument: Instrument) -> Balloon:
        pool = self.kv_cache_manager.block_pool
        if self.workers.n_blocks != pool.num_gpu_blocks:
            raise LayoutError("Scheduler and workers do not have the same KV blocks; start vLLM without kvpsi.")
        floor = -(-self.max_model_len // self.block_size) + 1
        most = round(settings.cache_limit * (pool.num_gpu_blocks - 1))
        sizes = BalloonSettings(self.workers.block_bytes, floor_blocks=floor, most_blocks=most)
        log.info(
            "kvpsi governs %d KV blocks of %s; %d of them may always be used, for one request",
            pool.num_gpu_blocks - 1,
            format_bytes(sizes.block_bytes),
            floor,
        )
        return Balloon(pool, sizes, self.workers.release, provide=self.workers.provide, instrument=instrument)

    def make_governor(self, balloon: Balloon, settings: VllmSettings, instrument: Instrument) -> Governor:
        """What says how large the pool may be: this machine's kernel, by the law, and other governed models."""
        source, trigger = best_sensing(0)  # vLLM holds weights in memory of its own
        return Governor(
            balloon,
            source,
            settings=settings.law,
            adapt=settings.adapt,
            trigger=trigger,
            instrument=instrument,
            sharing=open_sharing(settings.share),
        )

    @property
    def concurrency_limit(self) -> int:
        """Sequences that may run at once: while memory stalls no more than do already, but always one.

        vLLM counts sessions that wait for more input as running.
        """
        reading = self.governor.reading
        if reading is None or not self.balloon.is_heard or reading.memory.some.share < self._veto_stall:
            return self._most_active_reqs
        waiting = int(self.num_waiting_for_streaming_input)
        return min(self._most_active_reqs, max(1, len(self.running)) + waiting)

    def status(self) -> VllmStatus:
        """What it is doing; from any thread."""
        sizes, decision = self.balloon.status(), self.governor.decision
        resident_bytes = None
        with contextlib.suppress(EnvironmentProblem):
            resident_bytes = self.workers.resident_bytes()
        block_bytes = self.balloon.settings.block_bytes
        running, waiting = self.get_request_counts()
        names = self.vllm_config.model_config.served_model_name
        return VllmStatus(
            model=names if isinstance(names, str) else names[0],
            running=running,
            waiting=waiting,
            parallel=self._most_active_reqs,
            capacity_bytes=sizes.capacity_bytes,
            used_bytes=self.balloon.in_use_blocks * block_bytes,
            committed_bytes=sizes.used_bytes,
            resident_bytes=sizes.used_bytes if resident_bytes is None else resident_bytes,
            limit_bytes=self.balloon.allowed_blocks * block_bytes,
            concurrency_limit=self.concurrency_limit,
            releases=self.balloon.releases,
            returned_bytes=sizes.returned_bytes,
            pauses=self.pauses,
            governed=self.balloon.problem is None,
            reason=self.balloon.problem or (decision.reason if decision else ""),
            blocks=self.balloon.n_blocks,
            pool_blocks=self.balloon.pool_blocks,
            **dataclasses.asdict(status_of(self.governor, sizes.capacity_bytes)),
        )

    def schedule(self, *args: Any, **options: Any) -> Any:
        """A step: preempt what is beyond the limit first, and note the blocks that will be written to."""
        self.balloon.lift_if_silent()
        with self.balloon.lock:
            self.balloon.keep(len({i for request in self.kv_holding_waiting for i in self._blocks_of(request)} - {0}))
            self._preempt_beyond_limit()
            self.max_num_active_reqs = self.concurrency_limit
            output = super().schedule(*args, **options)
            self.balloon.written(_written_by(output))
        return output

    def _preempt_request(self, request: Any, *args: Any, **options: Any) -> Any:
        """As vLLM does, and count it.

        vLLM enters blocks into its cache of prefixes before they are computed. By priority, a request can be preempted
        in the step that it was scheduled in: what was not computed must not be found there.
        """
        self.pauses += 1
        not_computed = self._blocks_of(request)[request.num_computed_tokens // self.block_size :]
        self.kv_cache_manager.block_pool.evict_blocks(set(not_computed))
        return super()._preempt_request(request, *args, **options)

    def _blocks_of(self, request: Any) -> list[int]:
        """Ids of the blocks that it holds; 0 in the place of one that it needs no more."""
        (block_ids,) = self.kv_cache_manager.get_block_ids(request.request_id)
        return list(block_ids)

    def _preempt_beyond_limit(self) -> None:
        """As vLLM does where blocks are missing. Nothing runs between two steps, so nothing is in flight.

        What this frees is taken out at once, or those who were preempted would have it again in the same step.
        """
        while self.balloon.beyond_limit and len(self.running) > 1:
            victim = self.running[-1]
            if self.policy.value == "priority":
                victim = max(self.running, key=lambda request: (request.priority, request.arrival_time))
            self.running.remove(victim)
            self._preempt_request(victim, time.monotonic())
            self.prev_step_scheduled_req_ids.discard(victim.request_id)
            self.balloon.shrink()

    def update_from_output(self, *args: Any, **options: Any) -> Any:
        """As vLLM does, with the pool locked."""
        with self.balloon.lock:
            return super().update_from_output(*args, **options)

    def add_request(self, *args: Any, **options: Any) -> Any:
        """As vLLM does, with the pool locked."""
        with self.balloon.lock:
            return super().add_request(*args, **options)

    def finish_requests(self, *args: Any, **options: Any) -> Any:
        """As vLLM does, with the pool locked."""
        with self.balloon.lock:
            return super().finish_requests(*args, **options)

    def reset_prefix_cache(self, *args: Any, **options: Any) -> Any:
        """As vLLM does, with all blocks in the pool: it counts them."""
        with self.balloon.whole():
            return super().reset_prefix_cache(*args, **options)

    def get_kv_cache_usage(self) -> float:
        """Share of the whole cache (0 to 1) that requests use; what is out of the pool is not used."""
        return self.balloon.usage

    def make_stats(self, *args: Any, **options: Any) -> Any:
        """As vLLM does, with the same usage."""
        with self.balloon.lock:
            stats = super().make_stats(*args, **options)
            if stats is not None:
                stats.kv_cache_usage = self.balloon.usage
        return stats

    def shutdown(self) -> None:
        """Stop governing; the blocks are put back."""
        try:
            self._closing.close()
        finally:
            super().shutdown()


def _written_by(output: Any) -> Iterator[int]:
    """Blocks of a ``SchedulerOutput`` that the model runner may write to from now on."""
    groups: list[Iterable[int]] = []
    for request in output.scheduled_new_reqs:
        groups.extend(request.block_ids)
    for new_block_ids in output.scheduled_cached_reqs.new_block_ids:
        groups.extend(new_block_ids or ())
    for group in groups:
        yield from group
    yield from output.new_block_ids_to_zero or ()
    for copy in output.kv_cache_block_copies or ():
        yield copy.dst_block_id
