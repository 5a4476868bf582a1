"""The default model as a Hugging Face folder, as vLLM reads it: made once, kept beside the GGUF file."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path


def convert(gguf: Path, folder: Path) -> None:
    """Write weights (bfloat16), configuration and tokenizer of ``gguf`` into ``folder``; nothing if it is there."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if folder.exists():
        return
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


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
