"""Prints, as JSON, what a process holds that has loaded a model and does nothing; run as a process of its own."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from kvpsi.engines.llama import govern
from kvpsi.engines.loading import LoadSettings, open_llama
from kvpsi.kv.pages import process_rss_bytes


def main(kind: str, model: str, n_ctx: str) -> None:
    """``kind`` is stock or elastic."""
    llm = open_llama(Path(model), int(n_ctx), LoadSettings(n_ctx=int(n_ctx)))
    governed = govern(llm) if kind == "elastic" else None
    time.sleep(0.5)
    print(json.dumps({"rss_bytes": process_rss_bytes()}))
    if governed is not None:
        governed.close()
    llm.close()


if __name__ == "__main__":
    main(*sys.argv[1:4])
