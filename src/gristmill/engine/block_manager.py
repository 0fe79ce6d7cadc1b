"""KV-cache block manager: reference counts, prefix caching and LRU eviction.

A block holds BLOCK_SIZE positions of all layers. A full block is registered under its own tokens and all tokens before it, so that prompts
that begin alike share blocks without anyone saying so. Full blocks are never written again; a block that is not full has one owner.
"""

from collections import OrderedDict

BLOCK_SIZE = 32  # positions; as in kernels.cpp
ROOT = 0  # the prefix before the first block; those of adapters are below zero, each its own
MIN_EVICTABLE = 64  # unused blocks that stay registered in any case


class BlockManager:
    """Block allocator with a prefix cache: reference counts of `num_blocks` blocks, and the blocks registered under their prefix.

    A prefix id is a number that is never given twice: that of (id of the prefix before, the block's tokens). A block without references
    stays registered, and is evictable: the least recently used one goes first. While fewer blocks are in use than evictable, those are
    evicted before memory that was never touched is.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_touched = 0  # blocks from here on were never used
        self._free: list[int] = []  # the last freed first: its memory is warm
        self._ref_counts = [0] * num_blocks
        self._prefix_ids = [ROOT] * num_blocks
        self._key_of: dict[int, tuple[int, bytes]] = {}  # prefix id -> prefix before, tokens
        self._registered: dict[tuple[int, bytes], tuple[int, int]] = {}  # prefix before, tokens -> block, prefix id
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._last_prefix_id = ROOT

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be allocated, evictable ones among them."""
        return self.num_blocks - self._num_touched + len(self._free) + len(self._evictable)

    @property
    def num_used_blocks(self) -> int:
        """Blocks with references."""
        return self.num_blocks - self.num_free_blocks

    def allocate(self) -> int | None:
        """A block with one reference, or None if all are in use."""
        fresh = self._num_touched < self.num_blocks
        if self._free:
            block = self._free.pop()
        elif self._evictable and (not fresh or len(self._evictable) > max(MIN_EVICTABLE, self.num_used_blocks)):
            block, _ = self._evictable.popitem(last=False)
            self._unregister(block)
        elif fresh:
            block = self._num_touched
            self._num_touched += 1
        else:
            return None
        self._ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a reference."""
        if not self._ref_counts[block]:
            del self._evictable[block]
        self._ref_counts[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Drop a reference to each."""
        for block in reversed(blocks):  # the end of a text is less likely to be read again than its beginning
            self._ref_counts[block] -= 1
            if self._ref_counts[block]:
                continue
            if self._prefix_ids[block] == ROOT:
                self._free.append(block)
            else:
                self._evictable[block] = None

    def lookup(self, before: int, tokens: bytes) -> tuple[int, int] | None:
        """Prefix-cache lookup: the block that holds these tokens after that prefix, and its own prefix id. It is not yet shared."""
        return self._registered.get((before, tokens))

    def register(self, block: int, before: int, tokens: bytes) -> int:
        """Put a full block into the prefix cache; returns its prefix id. A second block that holds the same stays outside."""
        key = (before, tokens)
        if key in self._registered:
            return self._registered[key][1]
        self._last_prefix_id += 1
        self._prefix_ids[block] = self._last_prefix_id
        self._key_of[self._last_prefix_id] = key
        self._registered[key] = (block, self._last_prefix_id)
        return self._last_prefix_id

    def reset_prefix_cache(self) -> None:
        """Unregister every block: the weights have changed."""
        for block in list(self._evictable):
            self._free.append(block)
        self._evictable.clear()
        self._prefix_ids = [ROOT] * self.num_blocks
        self._registered.clear()
        self._key_of.clear()

    def _unregister(self, block: int) -> None:
        prefix_id = self._prefix_ids[block]
        if prefix_id != ROOT:
            del self._registered[self._key_of.pop(prefix_id)]
            self._prefix_ids[block] = ROOT
