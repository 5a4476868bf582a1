"""What earlier prototypes did about memory pressure: watch avg10, drop the oldest tokens, return nothing."""

from __future__ import annotations

from pathlib import Path

import llama_cpp

from kvpsi.pressure.psi import parse_pressure

SHARE = 0.10


class Pruner:
    """Looks at the board's avg10 before every token; positions close up, as llama.cpp's own context shift does."""

    def __init__(
        self, llm: llama_cpp.Llama, pressure_file: Path, *, threshold: float, keep: int, tail: int, min_prune: int
    ) -> None:
        self.llm = llm
        self.pressure_file = pressure_file
        self.threshold = threshold
        self.keep, self.tail, self.min_prune = keep, tail, min_prune
        self.prunes = 0

    def look(self) -> int:
        """Drop tokens if the average is over the threshold; how many were dropped."""
        avg10 = parse_pressure(self.pressure_file.read_text()).some.avg10
        llm = self.llm
        spare = llm.n_tokens - self.keep - self.tail
        if avg10 < self.threshold or spare < self.min_prune:
            return 0
        count = min(spare, max(self.min_prune, int(SHARE * llm.n_tokens)))
        memory = llama_cpp.llama_get_memory(llm.ctx)
        end = self.keep + count
        llama_cpp.llama_memory_seq_rm(memory, 0, self.keep, end)
        llama_cpp.llama_memory_seq_add(memory, 0, end, llm.n_tokens, -count)
        llm.input_ids[self.keep : llm.n_tokens - count] = llm.input_ids[end : llm.n_tokens].copy()
        llm.n_tokens -= count
        self.prunes += 1
        return int(count)
