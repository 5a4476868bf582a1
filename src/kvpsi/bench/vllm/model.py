"""A GGUF model as a Hugging Face folder, as vLLM reads it: made once, kept beside the GGUF file."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

from kvpsi.errors import EnvironmentProblem
from kvpsi.models.store import cache_dir


def folder_of(gguf: Path) -> Path:
    """The folder, made if it was not there.

    Raises:
        EnvironmentProblem: what makes it, and reads it, is not installed.
    """
    if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("transformers") is None:
        raise EnvironmentProblem("vLLM is not installed here; docs/vllm.md says how to, or call `make bench-vllm`.")
    folder = cache_dir() / "vllm" / gguf.stem
    if not folder.exists():
        _convert(gguf, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Write weights (bfloat16), configuration and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        whole = Path(scratch) / "whole"
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        model.save_pretrained(whole)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(whole)
        whole.replace(folder)
