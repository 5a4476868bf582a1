"""KV blocks in memory: which pages are theirs alone, and that only those go back."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import pytest

from kvpsi.engines.vllm.layout import BlockLayout, Plane, layout_of
from kvpsi.errors import LayoutError
from kvpsi.kv import pages
from kvpsi.kv.pages import PAGE_BYTES


class ArrayTensor:
    """An array that is asked like a ``torch.Tensor``."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.shape = array.shape

    def data_ptr(self) -> int:
        return int(self._array.ctypes.data)

    def element_size(self) -> int:
        return int(self._array.itemsize)

    def stride(self, dim: int) -> int:
        return int(self._array.strides[dim] // self._array.itemsize)

    def numel(self) -> int:
        return int(self._array.size)

    def is_contiguous(self) -> bool:
        return bool(self._array.flags.c_contiguous)

    def __getitem__(self, index: int) -> ArrayTensor:
        return ArrayTensor(self._array[index])


def memory(n_bytes: int) -> Any:
    array = np.frombuffer(mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=np.int16)
    array[:] = 7
    return array


def layers(shift: int = 0, n_layers: int = 3, n_blocks: int = 10, block_bytes: int = 3 * PAGE_BYTES) -> list[Any]:
    """Layer after layer, as vLLM arranges them on processors, ``shift`` bytes from the beginning of a page."""
    whole = memory(n_layers * n_blocks * block_bytes + PAGE_BYTES)
    flat = whole[shift // 2 :][: n_layers * n_blocks * block_bytes // 2]
    return list(flat.reshape(n_layers, n_blocks, 2, -1))


@pytest.mark.parametrize("shift", [0, 64])
def test_only_the_blocks_that_are_named_lose_their_contents(shift: int) -> None:
    arrays = layers(shift)
    layout = layout_of(map(ArrayTensor, arrays), 10)
    assert layout.block_bytes == 9 * PAGE_BYTES
    returned = layout.release([(2, 5), (8, 9)])
    assert layout.release([(2, 5)]) == 0, "they were given back already"
    for array in arrays:
        for block, values in enumerate(array):
            if block in (2, 3, 4, 8):
                assert (values == 0).mean() > 0.6
            else:
                assert (values == 7).all()
    pages_lost = 0 if shift == 0 else 3 * 2  # one at the edges of each run in each layer
    assert returned == 3 * 4 * 3 * PAGE_BYTES - pages_lost * PAGE_BYTES


def test_neighbours_lose_the_page_on_their_border_only_together() -> None:
    arrays = layers(64)
    layout = layout_of(map(ArrayTensor, arrays), 10)
    apart = layout.release([(2, 3)]) + layout.release([(3, 4)])
    assert layout.release([(2, 4)]) == 3 * PAGE_BYTES
    assert apart == 3 * 4 * PAGE_BYTES


def test_blocks_that_hold_all_layers_side_by_side() -> None:
    whole = memory(10 * 3 * PAGE_BYTES).reshape(10, 3, -1)
    layout = layout_of([ArrayTensor(whole[:, layer]) for layer in range(3)], 10)
    assert layout.release([(4, 6)]) == 2 * 3 * PAGE_BYTES
    assert (whole[4:6] == 0).all() and (whole[:4] == 7).all() and (whole[6:] == 7).all()


def test_layers_that_share_a_tensor_count_once() -> None:
    arrays = layers()
    assert layout_of(map(ArrayTensor, [*arrays, arrays[0]]), 10).block_bytes == 9 * PAGE_BYTES


def test_memory_is_ready_before_blocks_are_written_to_and_contents_stay() -> None:
    arrays = layers()
    layout = layout_of(map(ArrayTensor, arrays), 10)
    layout.release([(0, 5)])
    layout.provide([(3, 7)])
    assert pages.present_bytes(layout.pages_of([(3, 5)])) == 2 * layout.block_bytes
    assert pages.present_bytes(layout.pages_of([(0, 3)])) == 0
    assert (arrays[0][5:7] == 7).all() and not arrays[0][3:5].any()


def test_memory_of_blocks_is_counted_as_the_kernel_does() -> None:
    arrays = layers()
    layout = layout_of(map(ArrayTensor, arrays), 10)
    layout.set_apart()
    assert layout.resident_bytes() == 10 * layout.block_bytes
    layout.release([(0, 4)])
    assert layout.resident_bytes() == 6 * layout.block_bytes


def test_unknown_layouts_are_refused_in_a_sentence() -> None:
    with pytest.raises(LayoutError, match="does not hold 11 blocks"):
        layout_of(map(ArrayTensor, layers()), 11)
    with pytest.raises(LayoutError, match="does not hold 2 blocks"):
        layout_of([ArrayTensor(memory(8 * PAGE_BYTES).reshape(4, 2, -1).transpose(1, 0, 2))], 2)
    with pytest.raises(LayoutError, match="not apart"):
        layout_of([], 10)
    (array,) = layers(n_layers=1)
    with pytest.raises(LayoutError, match="not apart"):
        layout_of([ArrayTensor(array[:8]), ArrayTensor(array[1:9])], 8)


def test_a_run_smaller_than_a_page_has_none() -> None:
    assert BlockLayout(4, (Plane(PAGE_BYTES, 64, 64),)).pages_of([(1, 3)]) == []
