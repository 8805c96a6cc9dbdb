"""Block tables: how sequences come by KV blocks, share them and give them up."""

from __future__ import annotations

from instance.kv.blocks import BlockPool, IntegrityError
from instance.kv.prefix import extend_hashes, with_adapter
from instance.request import Sequence


class BlockTables:
    """Keeps the block tables of sequences in step with the pool and the prefix cache.

    Args:
        pool: Where blocks come from.
        salt: What KV depends on besides tokens and adapter; roots the block hashes.
        prefix_caching: Reuse full blocks of equal prefixes.
        host: Where copies of blocks are kept; None where there is no host memory for them.
    """

    def __init__(
        self, pool: BlockPool, salt: bytes, prefix_caching: bool, host: BlockPool | None = None
    ) -> None:
        self.pool = pool
        self.host = host
        self.prefix_caching = prefix_caching
        self._salt = salt

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold the KV of so many tokens."""
        return -(-num_tokens // self.pool.block_size)

    def place(self, sequence: Sequence, spare: int) -> bool:
        """Give a sequence without KV the blocks for all its tokens, cached ones first.

        A prefix hit sets ``num_computed`` and ``num_written``, and at the first admission
        ``num_cached``. It leaves at least one token to compute, to draw the next from.

        Args:
            sequence: All its tokens are known.
            spare: Blocks that must stay free; false, with nothing changed, if they cannot.
        """
        pool = self.pool
        hits = self.hits(sequence)
        wanted = self.blocks_for(len(sequence.tokens)) - len(hits)
        if wanted + pool.num_idle(hits) + spare > pool.num_free:
            return False
        pool.acquire(hits)
        fresh = pool.allocate(wanted, after=hits[-1] if hits else None)
        if fresh is None:
            raise IntegrityError(f"{pool.num_free} blocks are free, but not {wanted}")
        sequence.block_table = hits + fresh
        sequence.sealed = len(hits)
        sequence.num_computed = sequence.num_written = len(hits) * pool.block_size
        if sequence.num_cached < 0:
            sequence.num_cached = min(sequence.num_computed, sequence.num_prompt)
        return True

    def hits(self, sequence: Sequence) -> list[int]:
        """Cached blocks that the sequence would begin with; one token is left to compute."""
        if not self.prefix_caching:
            return []
        self.hash(sequence)
        most = (len(sequence.tokens) - 1) // self.pool.block_size
        return self.pool.match(sequence.tokens, sequence.block_hashes[:most])

    def shortfall(self, sequence: Sequence, spare: int) -> int:
        """Blocks that are missing for ``place``; 0 or less where it would succeed."""
        hits = self.hits(sequence)
        wanted = self.blocks_for(len(sequence.tokens)) - len(hits)
        return wanted + self.pool.num_idle(hits) + spare - self.pool.num_free

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make room for the KV of so many tokens; false if the pool has too few blocks."""
        table = sequence.block_table
        missing = self.blocks_for(num_tokens) - len(table)
        if missing > 0:
            fresh = self.pool.allocate(missing, after=table[-1] if table else None)
            if fresh is None:
                return False
            table.extend(fresh)
        return True

    def seal(self, sequence: Sequence) -> None:
        """Register the blocks that are full and written by now in the prefix cache."""
        size = self.pool.block_size
        full = sequence.num_written // size
        if full <= sequence.sealed or not self.prefix_caching:
            return
        self.hash(sequence)
        table = sequence.block_table
        for index in range(sequence.sealed, full):
            self.pool.seal(
                table[index],
                table[index - 1] if index else None,
                sequence.block_hashes[index],
                tuple(sequence.tokens[index * size : (index + 1) * size]),
            )
        sequence.sealed = full

    def release(self, sequence: Sequence) -> None:
        """Give up all KV; what was sealed can be hit until it is reused."""
        self.release_device(sequence)
        self.release_host(sequence)

    def release_device(self, sequence: Sequence) -> None:
        """Give up the KV in the pool; copies on the host stay."""
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.sealed = sequence.num_computed = sequence.num_written = 0

    def release_host(self, sequence: Sequence) -> None:
        """Give up the copies on the host."""
        if self.host is not None:
            self.host.release(sequence.host_table)
        sequence.host_table = []
        sequence.num_swapped = 0

    def hash(self, sequence: Sequence) -> None:
        """Bring the hashes of the sequence's full blocks up to date."""
        salt = with_adapter(self._salt, sequence.request.adapter)
        extend_hashes(sequence.block_hashes, sequence.tokens, self.pool.block_size, salt)
