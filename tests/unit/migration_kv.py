"""KV blocks and sequences of the model: content is tracked slot by slot."""

from __future__ import annotations

from dataclasses import dataclass, field

from instance.request import SequenceStatus

BLOCK = 2
BLOCKS = 40


class Violation(AssertionError):
    """A promise of the protocol was broken."""


def draw(seed: int, position: int) -> int:
    """The token that any instance draws for this output position."""
    return (seed * 7919 + position * 104729) % 50021


def chain(previous: int, token: int) -> int:
    """Content of a KV slot: depends on every token up to it."""
    return (previous * 1_000_003 + token + 1) % 2_305_843_009_213_693_951


class Pool:
    """Blocks with reference counts, pins, reservations and slot contents."""

    def __init__(self) -> None:
        self.content = [[0] * BLOCK for _ in range(BLOCKS)]
        self.refs = [0] * BLOCKS
        self.pins = [0] * BLOCKS
        self.reserved: dict[int, str] = {}
        # Last freed is first reused, so that early frees hurt.
        self._free = list(range(BLOCKS))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        if count > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self.refs[block] = 1
            self.content[block] = [-1] * BLOCK
        return taken

    def acquire(self, block: int) -> None:
        if self.refs[block] == 0 and self.pins[block] == 0:
            self._free.remove(block)
        self.refs[block] += 1

    def release(self, blocks: list[int]) -> None:
        for block in blocks:
            if self.refs[block] <= 0:
                raise Violation(f"block {block} is freed twice")
            self.refs[block] -= 1
            self._maybe_free(block)

    def pin(self, blocks: list[int]) -> None:
        for block in blocks:
            self.pins[block] += 1

    def unpin(self, blocks: list[int]) -> None:
        for block in blocks:
            self.pins[block] -= 1
            self._maybe_free(block)

    def _maybe_free(self, block: int) -> None:
        if self.refs[block] == 0 and self.pins[block] == 0:
            self._free.append(block)

    def find_prefix(self, tags: list[int]) -> list[int]:
        """Blocks that hold the leading full blocks of this content."""
        known = {block[-1]: index for index, block in enumerate(self.content) if block[-1] > 0}
        found = []
        for end in range(BLOCK, len(tags), BLOCK):
            index = known.get(tags[end - 1])
            if index is None or self.content[index] != tags[end - BLOCK : end]:
                break
            found.append(index)
        return found

    def read(self, block: int) -> list[int]:
        """What a copy sends of this block."""
        if self.refs[block] == 0 and self.pins[block] == 0:
            raise Violation(f"a copy reads block {block}, which is free")
        return list(self.content[block])

    def remote_write(self, block: int, attempt: str, content: list[int]) -> None:
        if self.reserved.get(block) != attempt:
            raise Violation(f"remote write into block {block}, which is not reserved for it")
        self.content[block] = list(content)

    def check_empty(self) -> None:
        if any(self.refs) or any(self.pins) or self.reserved or len(self._free) != BLOCKS:
            raise Violation(
                f"leaked blocks: refs {self.refs}, pins {self.pins}, reserved {self.reserved}"
            )


@dataclass(slots=True, eq=False)
class Seq:
    """A sequence of the model."""

    request_id: str
    home: str
    seed: int
    prompt: tuple[int, ...]
    limit: int
    epoch: int
    output: list[int]
    acked: int
    status: SequenceStatus = SequenceStatus.WAITING
    table: list[int] = field(default_factory=list)
    written: int = 0
    version: int = 0
    finished: bool = False
    silent_steps: int = 0
    tags: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    def all_tags(self) -> list[int]:
        while len(self.tags) < self.num_tokens:
            at = len(self.tags)
            prompt = len(self.prompt)
            token = self.prompt[at] if at < prompt else self.output[at - prompt]
            self.tags.append(chain(self.tags[-1] if at else 0, token))
        return self.tags
