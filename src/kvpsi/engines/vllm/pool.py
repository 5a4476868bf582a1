"""What is asked of vLLM's block pool (``vllm/v1/core/block_pool.py``), which is not its public interface."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol


class Block(Protocol):
    """vLLM's ``KVCacheBlock``."""

    @property
    def block_id(self) -> int: ...
    @property
    def block_hash(self) -> Any: ...


class FreeQueue(Protocol):
    """vLLM's ``FreeKVCacheBlockQueue``."""

    def get_all_free_blocks(self) -> Sequence[Any]:
        """What will be used or evicted first comes first."""
        ...


class Pool(Protocol):
    """What is asked of vLLM's ``BlockPool``; block 0 is never used."""

    num_gpu_blocks: int

    @property
    def free_block_queue(self) -> Any: ...
    def get_num_free_blocks(self) -> int: ...
    def touch(self, blocks: Sequence[Any]) -> None:
        """Count one more user for each block; one that was free is not any more."""
        ...

    def free_blocks(self, ordered_blocks: Iterable[Any]) -> None:
        """Count one user less."""
        ...

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Forget what is cached in them."""
        ...
