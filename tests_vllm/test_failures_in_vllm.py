"""A worker's thread that dies, and a vLLM that is not known: the one goes on, the other does not start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from asked import N_TOKENS, PROMPTS, STEERED, Stock, with_options
from kvpsi.bench.vllm.server import Setting
from served import serving
from test_balloon_in_vllm import FLOOR, until

pytestmark = pytest.mark.timeout(1800)


def test_a_worker_whose_thread_dies_leaves_vllm_its_blocks(setting: Setting, stock: Stock, tmp_path: Path) -> None:
    by_options = with_options(setting, *STEERED, "--worker-cls", "steered.MortalWorker")
    with serving(by_options, tmp_path) as served:
        served.answer(PROMPTS[0], N_TOKENS)
        (tmp_path / "die").touch()
        served.limit(FLOOR)
        until(lambda: not served.status()["governed"])
        assert served.status()["pool_blocks"] == served.status()["blocks"]
        assert served.answers(PROMPTS[:8], N_TOKENS) == [stock.texts[prompt] for prompt in PROMPTS[:8]]
        assert served.log.read_text().count("vLLM has its blocks again") == 1


def test_what_is_not_supported_does_not_start_and_says_why(setting: Setting) -> None:
    program = (
        "import sys; from kvpsi.engines.vllm import supported; supported.TESTED_VERSION = '0.1'; "
        "from vllm import LLM; LLM(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(setting.model)],
        env={"KVPSI_VLLM": "1", "PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert "kvpsi knows vLLM 0.1, this is 0.32.0" in done.stderr.replace("\n", " ")
