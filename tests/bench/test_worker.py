"""The bench's processes: they answer, and are gone afterwards."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from kvpsi.bench.elastic.run import written_pages
from kvpsi.bench.elastic.worker import worker
from kvpsi.engines.loading import LoadSettings
from kvpsi.errors import KvpsiError
from kvpsi.kv import pages

pytestmark = pytest.mark.engine

LOAD = LoadSettings(n_ctx=512, n_threads=1)


@pytest.mark.parametrize("kind", ["stock", "elastic"])
def test_a_worker_reads_decodes_and_ends(default_model: Path, kind: str) -> None:
    before = set(psutil.Process().children())
    with worker(kind, default_model, LOAD) as one:  # type: ignore[arg-type]
        assert one.idle_rss_bytes > 50 << 20
        one.read(16)
        assert one.decode_seconds(2) > 0.0
    assert set(psutil.Process().children()) == before


def test_a_worker_that_cannot_load_says_so(tmp_path: Path) -> None:
    with pytest.raises(KvpsiError, match="ended early"), worker("stock", tmp_path / "none.gguf", LOAD):
        pass


def test_what_the_kernel_alone_takes_back_was_really_there() -> None:
    with written_pages(8 << 20, 4) as ranges:
        assert sum(r.n_bytes for r in ranges) == pages.present_bytes(ranges) == 8 << 20
        pages.release(ranges)
        assert pages.present_bytes(ranges) == 0
