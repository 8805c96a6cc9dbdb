"""What a simulation writes down of each request and of each instance."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from instance.request import RequestClass


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One request, from its arrival to its end; times in seconds of the virtual clock.

    Attributes:
        wanted: Output tokens that it should end with.
        times: When each output token left its instance.
        placed: When it was first given an instance; nan before.
        started: When the first step that computes some of its prompt began; nan before.
        ended: When its last token left, or when it was refused; nan before.
        status: "open", "finished", or the HTTP status with which it was refused.
        cached: Prompt tokens found in a prefix cache at its first admission.
        instances: Where it was placed or moved, in order.
        preemptions: Times that it lost its place in a batch.
        preemption_loss: Seconds between a preemption and the next token, less a step.
        pauses: At each move, the gap in its tokens, less the step before it.
        transfer: Seconds, over all moves, from its leaving a batch until all its KV was at
            the other instance.
        joining: Seconds from then to the next token, less a step there.
        moves: Moves that came to an end, by reason.
        replays: Times that it was started again elsewhere.
    """

    request_id: str
    tenant: str
    request_class: RequestClass
    group: str
    arrival: float
    prompt_tokens: int
    wanted: int
    times: array[float] = field(default_factory=lambda: array("d"))
    placed: float = float("nan")
    started: float = float("nan")
    ended: float = float("nan")
    status: str = "open"
    cached: int = 0
    instances: list[str] = field(default_factory=list)
    preemptions: int = 0
    preemption_loss: float = 0.0
    pauses: list[float] = field(default_factory=list)
    transfer: float = 0.0
    joining: float = 0.0
    moves: list[str] = field(default_factory=list)
    replays: int = 0
    left_at: float | None = None
    landed_at: float | None = None
    preempted_at: float | None = None
    step_then: float = 0.0
    known_then: int = 0

    def preempted(self, now: float, step: float, known: int) -> None:
        """It lost its place.

        Args:
            step: What a step of its instance takes.
            known: Output tokens that it has, or that the running step still brings.
        """
        self.preemptions += 1
        if self.preempted_at is None:
            self.preempted_at, self.step_then, self.known_then = now, step, known

    def arrived(self, instance_id: str, now: float, step: float) -> None:
        """Its tokens come from another instance than before.

        Args:
            now: When the first of them came.
            step: What a step takes there.
        """
        if len(self.times) > 1:
            usual = self.times[-1] - self.times[-2]
            self.pauses.append(now - self.times[-1] - usual)
        if self.left_at is not None and self.landed_at is not None:
            self.transfer += self.landed_at - self.left_at
            self.joining += max(0.0, now - self.landed_at - step)
        self.left_at = self.landed_at = None
        self.instances.append(instance_id)

    def resumed(self) -> None:
        """Tokens came: if one of them could only come after the preemption, that is over."""
        if self.preempted_at is not None and len(self.times) > self.known_then:
            lost = self.times[self.known_then] - self.preempted_at - self.step_then
            self.preemption_loss += max(0.0, lost)
            self.preempted_at = None


@dataclass(slots=True)
class InstanceRecord:
    """One instance over time, as its load reports show it.

    Attributes:
        total_blocks: Its KV pool.
        times: When it reported; the lists that follow have an entry for each.
        used: Blocks that are neither free nor cached.
        running: Sequences in the batch.
        waiting: Sequences in the queue.
        wanted: Blocks that the first waiting sequence wants; 0 where none waits.
        steps: Steps so far, over all its lives.
    """

    total_blocks: int
    times: array[float] = field(default_factory=lambda: array("d"))
    used: array[int] = field(default_factory=lambda: array("l"))
    running: array[int] = field(default_factory=lambda: array("l"))
    waiting: array[int] = field(default_factory=lambda: array("l"))
    wanted: array[int] = field(default_factory=lambda: array("l"))
    steps: array[int] = field(default_factory=lambda: array("l"))
