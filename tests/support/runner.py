"""Loads a model, says READY, reads a long prompt and writes, stock or governed; prints JSON about it at the end.

Usage: runner.py stock|governed MODEL N_CTX PROMPT_TOKENS NEW_TOKENS [LOG]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import kvpsi
from kvpsi.engines.loading import LoadSettings, open_llama
from kvpsi.kv.pages import process_rss_bytes


def main(kind: str, model: str, n_ctx: int, prompt_tokens: int, new_tokens: int, log: str = "") -> None:
    llm = open_llama(Path(model), n_ctx, LoadSettings(n_threads=1))
    governed = None
    if kind == "governed":
        governed = kvpsi.govern(llm, instrument=kvpsi.JsonLines(open(log, "w")) if log else None)  # noqa: SIM115, PTH123
    text = "The keeper of the lighthouse wrote down the wind, the height of the waves and the ships that passed. "
    prompt = llm.tokenize((text * (prompt_tokens // 10)).encode())[:prompt_tokens]
    print("READY", process_rss_bytes() >> 20, "MiB", flush=True)
    gaps = []
    last = time.perf_counter()
    produced = 0
    for _ in llm.generate(prompt, temp=0.0):
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
        produced += 1
        if produced == 1:
            print("WRITING", flush=True)
        if produced == new_tokens:
            break
    gaps_ms = sorted(g * 1000 for g in gaps[1:])
    result = {
        "produced": produced,
        "prefill_s": gaps[0],
        "p50_ms": gaps_ms[len(gaps_ms) // 2],
        "p99_ms": gaps_ms[int(len(gaps_ms) * 0.99)],
    }
    if governed is not None:
        s = governed.summary()
        result |= {
            "trims": s.trims,
            "interrupts": s.interrupts,
            "trusted": s.trusted,
            "reason": s.reason,
            "returned_bytes": s.returned_bytes,
            "resident_bytes": s.resident_bytes,
        }
        result["error"] = repr(governed.governor.monitor.last_error)
        governed.close()
    llm.close()
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), *sys.argv[6:7])
