"""What all tests with real vLLM ask, and what stock vLLM makes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvpsi.bench.vllm.server import Setting

N_TOKENS = 100
STORIES = ["a keeper of a lighthouse", "a lost dog", "three bakers", "the last bus", "an old radio", "snow in May"]
PROMPTS = [
    f"Story {i}. This is a long and careful story about {STORIES[i % len(STORIES)]}, told on evening {i}. "
    + f"On that evening number {i}, the people of the town came together and listened to the wind. " * (4 + i % 7)
    for i in range(24)
]
STEERED = ("--scheduler-cls", "steered.SteeredScheduler")


@dataclass(frozen=True)
class Stock:
    """What stock vLLM answers, and its memory when it has just started."""

    texts: dict[str, str]
    idle_rss_bytes: int


def with_options(setting: Setting, *options: str) -> Setting:
    """The same with more of vLLM's options."""
    return replace(setting, options=(*setting.options, *options))
