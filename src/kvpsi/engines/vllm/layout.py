"""Where vLLM's KV blocks lie in a worker's memory, and giving back the pages of those that nobody uses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from kvpsi.errors import LayoutError
from kvpsi.kv import pages

Run = tuple[int, int]
"""Blocks side by side: the first one, and the one after the last."""


def runs_of(block_ids: Sequence[int]) -> list[Run]:
    """Ascending ids as runs."""
    runs: list[Run] = []
    for block_id in block_ids:
        if runs and runs[-1][1] == block_id:
            runs[-1] = (runs[-1][0], block_id + 1)
        else:
            runs.append((block_id, block_id + 1))
    return runs


class Tensor(Protocol):
    """What is asked of a ``torch.Tensor``, here of shape [blocks, ...]."""

    @property
    def shape(self) -> Sequence[int]: ...
    def data_ptr(self) -> int: ...
    def element_size(self) -> int: ...
    def stride(self, dim: int) -> int: ...
    def numel(self) -> int: ...
    def is_contiguous(self) -> bool: ...
    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True, slots=True)
class Plane:
    """One layer's keys and values: block i occupies ``block_bytes`` from ``base + i * stride_bytes``."""

    base: int
    stride_bytes: int
    block_bytes: int


@dataclass(frozen=True)
class BlockLayout:
    """The KV blocks of one worker. Each has a part in every plane."""

    n_blocks: int
    planes: tuple[Plane, ...]

    @cached_property
    def block_bytes(self) -> int:
        """Of one block, all layers."""
        return sum(plane.block_bytes for plane in self.planes)

    @cached_property
    def extents(self) -> list[pages.Mapping]:
        """The whole pages that hold blocks; others may share the first and the last page."""
        return self.pages_of([(0, self.n_blocks)])

    def pages_of(self, runs: Iterable[Run]) -> list[pages.Mapping]:
        """The whole pages inside runs of blocks, in ascending order. Where the bytes of two runs follow each other the
        page on their border is inside, too."""
        start, end = self._ranges(np.concatenate([np.arange(*run, dtype=np.int64) for run in runs]))
        begins = np.flatnonzero(np.concatenate([[True], start[1:] != end[:-1]]))
        joined = zip(start[begins], end[np.append(begins[1:], start.size) - 1], strict=True)
        return [inside for a, b in joined if (inside := pages.whole_pages(int(a), int(b)))]

    def _ranges(self, blocks: Any) -> tuple[Any, Any]:
        base, stride, size = (
            np.array([getattr(plane, name) for plane in self.planes], dtype=np.int64)[:, None]
            for name in ("base", "stride_bytes", "block_bytes")
        )
        start = base + stride * blocks
        order = np.argsort(start, axis=None, kind="stable")
        return start.ravel()[order], (start + size).ravel()[order]

    def overlaps(self) -> bool:
        """Whether two parts share a byte."""
        start, end = self._ranges(np.arange(self.n_blocks, dtype=np.int64))
        return bool((start[1:] < end[:-1]).any())

    def set_apart(self) -> None:
        """Keep huge pages out, and let smaps count the blocks alone."""
        for extent in self.extents:
            pages.forbid_huge_pages(extent)
            pages.set_apart(extent)

    def release(self, runs: Iterable[Run]) -> int:
        """Give back the pages of runs of blocks; bytes that were in memory before (mincore) and are not any more.

        Raises:
            OSError: the kernel refused.
        """
        inside = self.pages_of(runs)
        present = pages.present_bytes(inside)
        pages.release(inside)
        return present

    def provide(self, runs: Iterable[Run]) -> None:
        """Have memory ready for runs of blocks that are about to be written to, if the kernel can."""
        with contextlib.suppress(OSError):  # then each page comes when it is written to
            pages.provide(self.pages_of(runs))

    def resident_bytes(self) -> int:
        """Memory of all blocks as the kernel counts it (smaps)."""
        return pages.resident_bytes(self.extents)[0]


def layout_of(tensors: Iterable[Tensor], n_blocks: int) -> BlockLayout:
    """Where the blocks lie in vLLM's ``kv_caches``, one tensor for each layer; layers may share one.

    Raises:
        LayoutError: pages cannot be given back here, or blocks lie in a way that is not known.
    """
    if not pages.can_release():
        raise LayoutError("Pages can be given back on Linux only; start vLLM without kvpsi.")
    planes: dict[int, Plane] = {}
    for tensor in tensors:
        if not hasattr(tensor, "data_ptr"):
            raise LayoutError("This model's state is not in KV blocks alone; start vLLM without kvpsi.")
        if tensor.shape[0] != n_blocks or not tensor[0].is_contiguous():
            raise LayoutError(
                f"A KV tensor of shape {tuple(tensor.shape)} does not hold {n_blocks} blocks, each in one piece, so "
                "they cannot be given back; start vLLM without kvpsi."
            )
        item_bytes = tensor.element_size()
        plane = Plane(tensor.data_ptr(), tensor.stride(0) * item_bytes, tensor[0].numel() * item_bytes)
        planes[plane.base] = plane
    layout = BlockLayout(n_blocks, tuple(planes.values()))
    if not planes or layout.overlaps():
        raise LayoutError("vLLM's KV blocks are not apart in memory here; start vLLM without kvpsi.")
    return layout
