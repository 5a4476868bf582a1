"""What is measured, in the names that dashboards for llama.cpp and vLLM know, and kvpsi's own."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvpsi.engines.metrics import memory_counters, memory_gauges
from kvpsi.serving.status import Status, StatusSource

_TIME_TO_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_INTER_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_WHOLE_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Latencies:
    """Histograms that the service fills.

    Args:
        registry: where they are registered.
        model: what the model is called.
    """

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ["model_name"], registry=registry, buckets=buckets).labels(model)

        self.first_token = histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", _TIME_TO_FIRST_TOKEN_S
        )
        self.inter_token = histogram("vllm:inter_token_latency_seconds", "From token to token.", _INTER_TOKEN_S)
        self.whole = histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", _WHOLE_S)
        self.queued = histogram("vllm:request_queue_time_seconds", "From arrival to the beginning.", _WHOLE_S)


class StatusCollector(Collector):
    """Everything else, as it is when it is asked for."""

    def __init__(self, source: StatusSource) -> None:
        self._source = source

    @staticmethod
    def _labelled(family: Metric, s: Status, value: float) -> Metric:
        """vLLM's dashboards choose by the model's name, llama.cpp's know no labels."""
        named = {"model_name": s.model} if family.name.startswith("vllm:") else {}
        family.add_sample(family.name + ("_total" if family.type == "counter" else ""), named, value)
        return family

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        s = self._source()
        for name, text, value in (*_counters(s), *memory_counters(s)):
            yield self._labelled(CounterMetricFamily(name, text), s, value)
        finished = CounterMetricFamily(
            "vllm:request_success", "Answers by how they ended.", labels=["model_name", "finished_reason"]
        )
        for reason, n_answers in s.finished_by.items():
            finished.add_metric([s.model, reason], n_answers)
        yield finished
        given = CounterMetricFamily(
            "kvpsi_given_bytes", "Memory that was given back, by what was given up.", labels=["rung"]
        )
        for rung, n_bytes in s.given_bytes.items():
            given.add_metric([rung], n_bytes)
        yield given
        rejected = CounterMetricFamily(
            "kvpsi_requests_rejected", "Requests whose client was told to come again, by why.", labels=["reason"]
        )
        for reason, n_requests in s.rejected.items():
            rejected.add_metric([reason], n_requests)
        yield rejected
        for name, text, value in (*_gauges(s), *memory_gauges(s)):
            yield self._labelled(GaugeMetricFamily(name, text), s, value)


def _counters(s: Status) -> Iterator[tuple[str, str, float]]:
    yield "llamacpp:prompt_tokens", "Tokens of prompts that were read.", s.prompt_tokens
    yield "llamacpp:tokens_predicted", "Tokens that were generated.", s.generated_tokens
    yield "llamacpp:prompt_seconds", "Time in decodes that read prompts only.", s.prompt_s
    yield "llamacpp:tokens_predicted_seconds", "Time in all other decodes.", s.busy_s - s.prompt_s
    yield "vllm:prompt_tokens", "Tokens of prompts.", s.prompt_tokens + s.cached_tokens
    yield "vllm:generation_tokens", "Tokens that were generated.", s.generated_tokens
    yield "llamacpp:n_decode", "Calls of llama_decode.", s.decodes
    yield "vllm:num_preemptions", "Answers that were paused for want of memory.", s.pauses
    yield "vllm:prefix_cache_hits", "Tokens of prompts that did not have to be read again.", s.cached_tokens
    yield "vllm:prefix_cache_queries", "Tokens of prompts.", s.prompt_tokens + s.cached_tokens
    yield "kvpsi_requests_finished", "Answers that came to their end.", s.finished
    yield "kvpsi_requests_failed", "Requests that ended with an error after they were taken.", s.failed
    yield "kvpsi_requests_cancelled", "Requests whose client went away.", s.cancelled
    yield "kvpsi_trims", "How often tokens of live conversations were forgotten.", s.trims
    yield "kvpsi_interrupts", "How often a running decode was stopped to make room.", s.interrupts
    yield "kvpsi_forgotten_tokens", "Tokens that were forgotten.", s.forgotten_tokens
    yield "kvpsi_healed_tokens", "Forgotten tokens that were read again while nobody waited.", s.healed_tokens
    yield "kvpsi_healing_seconds", "Time that this took.", s.healing_s
    yield "kvpsi_sessions_dropped", "Saved conversations that were dropped.", s.sessions_dropped
    yield "kvpsi_sessions_parked", "Conversations that were written to a file.", s.parked
    yield "kvpsi_sessions_restored", "Parked conversations that were read from their file again.", s.restored
    yield (
        "kvpsi_parking_failures",
        "Files of parked conversations that could not be written or read.",
        s.parking_failures,
    )
    yield "kvpsi_thread_changes", "How often more or fewer threads began to compute.", s.thread_changes


def _gauges(s: Status) -> Iterator[tuple[str, str, float]]:
    yield "llamacpp:requests_processing", "Answers that are being generated.", s.running
    yield "llamacpp:requests_deferred", "Requests that wait.", s.waiting
    yield "llamacpp:prompt_tokens_seconds", "Tokens of prompts read in a second.", s.prompt_tokens_per_second
    yield "llamacpp:predicted_tokens_seconds", "Tokens a second just now.", s.tokens_per_second
    yield "vllm:num_requests_running", "Answers that are being generated.", s.running
    yield "vllm:num_requests_waiting", "Requests that wait.", s.waiting
    yield "vllm:kv_cache_usage_perc", "Share (0 to 1) of the cache in use.", s.used_bytes / max(1, s.capacity_bytes)
    yield "kvpsi_sessions", "Saved conversations.", s.sessions
    yield "kvpsi_sessions_bytes", "Memory of saved conversations.", s.sessions_bytes
    yield "kvpsi_parked_sessions", "Conversations that are in a file only.", s.sessions_parked
    yield "kvpsi_parked_bytes", "Files of these.", s.parked_bytes
    yield "kvpsi_spilled_bytes", "All files, also of conversations that are in memory as well.", s.spilled_bytes
    yield "kvpsi_cpu_pressure", "Share of the last tick in which something waited for a processor.", s.cpu_pressure
    yield "kvpsi_io_pressure", "Share of the last tick in which something waited for a disk.", s.io_pressure
    yield "kvpsi_threads", "Threads that compute.", s.threads
    yield "kvpsi_promised_requests", "Requests that were told when to come again, and have not come yet.", s.promises
    yield "kvpsi_lookahead_seconds", "How far ahead the slope of the headroom is followed.", s.lookahead_s
    yield "kvpsi_largest_step_share", "Share of the cells in use that is given at once at most.", s.step_share
    yield "kvpsi_stall_threshold", "Share of a tick in which something waited, from which on it counts.", s.stall_share
    yield "kvpsi_regrow_hold_seconds", "Calm that must have lasted before the cache grows back.", s.calm_hold_s
    yield "kvpsi_regrow_share", "Share of the whole cache that it then grows by in a second.", s.grow_share
    yield "kvpsi_adapts", "Whether these follow what the machine shows.", float(s.adapts)
