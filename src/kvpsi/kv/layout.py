"""Finds the KV tensors of a llama.cpp context in memory, with public calls only, and verifies what it found.

One probe token is decoded into the empty context. Its saved state holds that cell's K and V rows byte for byte, so
the process's own memory can be searched for the first K row; all other rows must then lie where llama.cpp's
allocation order (K0 V0 K1 V1 …, each ``bytes_per_cell x cells x streams``) puts them.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import llama_cpp

from kvpsi.errors import LayoutError
from kvpsi.kv import pages
from kvpsi.kv.statedata import SectionState, TensorRows, parse_state

_TENSOR_ALIGN_BYTES = 32
_SWA_PAD_CELLS = 256


@dataclass(frozen=True, slots=True)
class Plane:
    """Cells side by side in memory: cell i occupies ``bytes_per_cell`` bytes from ``base + i * bytes_per_cell``.

    K, and V with flash attention, give one plane per layer with a whole row in each cell; V without flash attention
    is transposed and gives one plane per layer and dimension with a single element in each.
    """

    base: int
    bytes_per_cell: int


@dataclass(frozen=True)
class Section:
    """One KV cache of a context; sliding-window models have two.

    ``planes[s]`` are the planes of stream s; the first is layer 0's K, whose rows serve to verify predictions.
    ``keys[s]`` are those of its K, a layer each, whose values are of ggml's type ``key_type``.
    """

    n_cells: int
    n_swa: int
    planes: tuple[tuple[Plane, ...], ...]
    extent: pages.Mapping
    keys: tuple[tuple[Plane, ...], ...] = ()
    key_type: int = 0

    @property
    def n_stream(self) -> int:
        """Streams, 1 with unified cells."""
        return len(self.planes)

    @cached_property
    def bytes_per_cell(self) -> int:
        """Bytes of one cell over all layers, K and V."""
        return sum(p.bytes_per_cell for p in self.planes[0])

    @property
    def n_bytes(self) -> int:
        """Size of the cache."""
        return self.bytes_per_cell * self.n_cells * self.n_stream

    @cached_property
    def block_cells(self) -> int:
        """Cells in a block: large enough that at most an eighth of a freed block lies in shared edge pages."""
        widest = max(p.bytes_per_cell for p in self.planes[0])
        return min(block_cells_of(widest), max(self.n_cells // 4, 1))


def block_cells_of(row_bytes: int) -> int:
    """Cells in a block, if the widest row of one cell has so many bytes and the cache is large."""
    cells = -(-8 * pages.PAGE_BYTES // row_bytes)
    return max(16, -(-cells // 16) * 16)


def seq_state(ctx: llama_cpp.llama_context_p, seq_id: int) -> bytes:
    """A sequence's state as llama.cpp saves it (cells, K rows, V rows)."""
    size = llama_cpp.llama_state_seq_get_size(ctx, seq_id)
    buffer = (ctypes.c_uint8 * size)()
    written = llama_cpp.llama_state_seq_get_data(ctx, buffer, size, seq_id)
    return ctypes.string_at(buffer, written)


def seq_state_apart(ctx: llama_cpp.llama_context_p, seq_id: int) -> mmap.mmap:
    """The same in pages of its own, which go back to the system when it is closed.

    Raises:
        LayoutError: llama.cpp saved nothing.
    """
    size = max(1, llama_cpp.llama_state_seq_get_size(ctx, seq_id))
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    state = mmap.mmap(-1, size, **private)
    buffer = (ctypes.c_uint8 * size).from_buffer(state)
    written = llama_cpp.llama_state_seq_get_data(ctx, buffer, size, seq_id)
    del buffer  # it may not be closed as long as something refers to it
    if written != size:
        state.close()
        raise LayoutError(f"llama.cpp saved {written} instead of {size} bytes of sequence {seq_id}.")
    return state


def _decode_probe(ctx: llama_cpp.llama_context_p, token: int, seq_id: int) -> None:
    batch = llama_cpp.llama_batch_init(1, 0, 1)
    try:
        batch.n_tokens = 1
        batch.token[0] = token
        batch.pos[0] = 0
        batch.n_seq_id[0] = 1
        batch.seq_id[0][0] = seq_id
        batch.logits[0] = 1
        code = llama_cpp.llama_decode(ctx, batch)
    finally:
        llama_cpp.llama_batch_free(batch)
    if code != 0:
        raise LayoutError(f"The context would not decode a probe token (llama_decode returned {code}).")


def _read(address: int, n_bytes: int) -> bytes:
    return ctypes.string_at(address, n_bytes)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Where one layer's K or V would lie, given the address of the first."""

    offset: int
    rows: TensorRows

    def cell_bytes(self, base: int, n_cells: int, stream: int) -> Iterator[tuple[int, bytes]]:
        """Address and expected bytes of cell 0 of a stream, for each row of the tensor."""
        size, n_rows = self.rows.bytes_per_cell, self.rows.n_rows
        start = base + self.offset + stream * size * n_rows * n_cells
        for row in range(n_rows):
            yield start + row * size * n_cells, bytes(self.rows.data[row * size : (row + 1) * size])


def _tensors(state: SectionState, n_cells: int) -> tuple[list[_Tensor], int]:
    """All tensors in allocation order and the bytes they take together."""
    found: list[_Tensor] = []
    offset = 0
    values: tuple[TensorRows | None, ...] = state.values or (None,) * len(state.keys)
    for key, value in zip(state.keys, values, strict=True):
        for rows in (key, value):
            if rows is None:
                continue
            found.append(_Tensor(offset, rows))
            size = rows.bytes_per_cell * rows.n_rows * n_cells * state.n_stream
            offset += -(-size // _TENSOR_ALIGN_BYTES) * _TENSOR_ALIGN_BYTES
    return found, offset


def _verifies(state: SectionState, base: int, n_cells: int, limit: int) -> bool:
    tensors, total = _tensors(state, n_cells)
    if base + total > limit:
        return False
    return all(
        _read(address, len(expected)) == expected
        for tensor in tensors
        for address, expected in tensor.cell_bytes(base, n_cells, state.stream)
    )


def _candidates(state: SectionState, sizes: list[int]) -> list[tuple[int, int]]:
    """All (address of the first K tensor, cells per stream) at which the whole cache could lie.

    More than one is found where memory still holds what a context that was freed left behind.
    """
    row = state.keys[0].bytes_per_cell
    needle = bytes(state.keys[0].data[:row])
    if not any(needle):
        raise LayoutError("The probe token left only zeros, so the KV tensors cannot be recognised.")
    smallest = min(_tensors(state, n)[1] for n in sizes)
    found = []
    for mapping in sorted(pages.anonymous_mappings(), key=lambda m: -m.n_bytes):
        if mapping.n_bytes < smallest:
            break
        for address in pages.search(mapping, needle):
            for n_cells in sizes:
                base = address - state.stream * row * n_cells
                if base >= mapping.start and _verifies(state, base, n_cells, mapping.end):
                    found.append((base, n_cells))
    return found


def _still_there(state: SectionState, found: list[tuple[int, int]]) -> tuple[int, int]:
    """The one candidate whose rows followed when another token was decoded: the living cache."""
    living = [(base, n) for base, n in found if _verifies(state, base, n, base + _tensors(state, n)[1])]
    if len(living) != 1:
        raise LayoutError(
            "The KV tensors were not found in this process's memory: they lie on a GPU, or this llama.cpp arranges "
            "them in a way that is not known here."
        )
    return living[0]


def _section(state: SectionState, base: int, n_cells: int, n_swa: int) -> Section:
    tensors, total = _tensors(state, n_cells)
    of_keys = [tensor for tensor in tensors if any(tensor.rows is rows for rows in state.keys)]

    def planes(some: list[_Tensor]) -> tuple[tuple[Plane, ...], ...]:
        return tuple(
            tuple(
                Plane(address, tensor.rows.bytes_per_cell)
                for tensor in some
                for address, _ in tensor.cell_bytes(base, n_cells, stream)
            )
            for stream in range(state.n_stream)
        )

    extent = pages.Mapping(base, base + total)
    return Section(n_cells, n_swa, planes(tensors), extent, planes(of_keys), state.keys[0].ggml_type)


def _stream_sizes(ctx: llama_cpp.llama_context_p, n_swa: int) -> list[int]:
    """Possible sizes of a stream: the whole context's, and a sliding window's (`llama_kv_cache_iswa`)."""
    whole = int(llama_cpp.llama_n_ctx_seq(ctx))
    if not n_swa:
        return [whole]
    n_ubatch, n_seq = int(llama_cpp.llama_n_ubatch(ctx)), int(llama_cpp.llama_n_seq_max(ctx))
    sizes = {whole}
    for seqs in (n_seq, 1):
        padded = -(-(n_swa * seqs + n_ubatch) // _SWA_PAD_CELLS) * _SWA_PAD_CELLS
        sizes.add(-(-min(whole, padded) // _SWA_PAD_CELLS) * _SWA_PAD_CELLS)
    return sorted(sizes, reverse=True)


def refuse_unsupported(ctx: llama_cpp.llama_context_p) -> None:
    """Raise LayoutError, in a sentence, for a context whose cache is not made of cells that could be freed."""
    model = llama_cpp.llama_get_model(ctx)
    if llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model):
        raise LayoutError("This model keeps a recurrent state instead of a plain KV cache; it is left alone.")
    if not llama_cpp.llama_get_memory(ctx):
        raise LayoutError("This context has no KV cache.")


def _probe(ctx: llama_cpp.llama_context_p, token: int, seq_id: int) -> list[SectionState]:
    """Decode one token into the emptied context; what each cache then holds of it."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), False)
    _decode_probe(ctx, token, seq_id)
    return parse_state(seq_state(ctx, seq_id))


def discover(ctx: llama_cpp.llama_context_p) -> list[Section]:
    """Find and verify the KV tensors of an *empty* context; it is empty again afterwards.

    A place is believed only if it follows a second probe with another token, as what a freed context left behind
    looks the same; with one stream per sequence the last stream is probed, too.

    Raises:
        LayoutError: the cache is of another kind, not in host memory, or did not verify.
    """
    if not pages.can_release():
        raise LayoutError("Pages can be given back on Linux only; here the cache stays as it is.")
    refuse_unsupported(ctx)
    model = llama_cpp.llama_get_model(ctx)
    n_vocab = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)))
    n_swa = int(llama_cpp.llama_model_n_swa(model))
    sizes = _stream_sizes(ctx, n_swa)
    try:
        found = [_candidates(state, sizes) for state in _probe(ctx, n_vocab // 2, 0)]
        sections: list[Section] = []
        for index, state in enumerate(_probe(ctx, n_vocab // 3, 0)):
            base, n_cells = _still_there(state, found[index])
            window = n_swa if len(found) > 1 and index == len(found) - 1 else 0
            sections.append(_section(state, base, n_cells, window))
        if sections[0].n_stream > 1:
            last = int(llama_cpp.llama_n_seq_max(ctx)) - 1
            for section, state in zip(sections, _probe(ctx, n_vocab // 2, last), strict=True):
                if not _verifies(state, section.extent.start, section.n_cells, section.extent.end):
                    raise LayoutError("The KV tensors of the last stream are not where they should be.")
    except OSError as error:
        raise LayoutError(
            f"The KV tensors were not found, as this process may not look at its memory: {error}."
        ) from error
    finally:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), False)
    return sections
