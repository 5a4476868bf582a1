"""A block pool with vLLM's rules, as far as the balloon asks for them; the real one is in `make test-vllm`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class FakeBlock:
    """A block with a number of users, and something cached in it or not."""

    block_id: int
    ref_cnt: int = 0
    block_hash: str | None = None


class FakePool:
    """Free blocks in the order in which they are used or evicted; block 0 is never free."""

    def __init__(self, n_blocks: int) -> None:
        self.num_gpu_blocks = n_blocks
        self.blocks = [FakeBlock(i) for i in range(n_blocks)]
        self.queue = self.blocks[1:]

    @property
    def free_block_queue(self) -> FakePool:
        return self

    def get_all_free_blocks(self) -> list[FakeBlock]:
        return list(self.queue)

    def get_num_free_blocks(self) -> int:
        return len(self.queue)

    def touch(self, blocks: Sequence[FakeBlock]) -> None:
        for block in blocks:
            if block.ref_cnt == 0:
                self.queue.remove(block)
            block.ref_cnt += 1

    def free_blocks(self, ordered_blocks: Iterable[FakeBlock]) -> None:
        first, last = [], []
        for block in ordered_blocks:
            block.ref_cnt -= 1
            assert block.ref_cnt >= 0
            if block.ref_cnt == 0:
                (first if block.block_hash is None else last).append(block)
        self.queue = [*first, *self.queue, *last]

    def evict_blocks(self, block_ids: set[int]) -> None:
        for block_id in block_ids:
            self.blocks[block_id].block_hash = None

    def use(self, n_blocks: int) -> list[FakeBlock]:
        """As `get_new_blocks`."""
        taken, self.queue = self.queue[:n_blocks], self.queue[n_blocks:]
        for block in taken:
            block.ref_cnt, block.block_hash = 1, None
        return taken
