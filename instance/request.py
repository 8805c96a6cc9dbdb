"""Requests and the state of a sequence on an instance."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from instance.token_counts import TokenCounts


class RequestClass(enum.IntEnum):
    """Scheduling priority class; a lower value is served first."""

    INTERACTIVE = 0
    STANDARD = 1
    BATCH = 2


Account: TypeAlias = tuple[str, RequestClass]
"""Whose service is counted: a tenant within a priority class."""


class FinishReason(enum.IntEnum):
    """Why a sequence ended; the values are those of the wire format."""

    NOT_FINISHED = 0
    STOP = 1
    LENGTH = 2
    ABORT = 3
    ERROR = 4


class SequenceStatus(enum.StrEnum):
    """Where a sequence stands on this instance.

    WAITING: queued, without KV or with KV on the host (a preempted sequence returns here).
    LOADING: has blocks into which KV is being copied from the host.
    RUNNING: in the batch; its prompt may still be in chunked prefill.
    HANDOVER: taken out of the batch by a migration that has gone past its point of
        no return (source), or complete but not yet granted by the home (destination).
    FINISHED: ended; its blocks are released.
    """

    WAITING = "waiting"
    LOADING = "loading"
    RUNNING = "running"
    HANDOVER = "handover"
    FINISHED = "finished"


class GrammarKind(enum.IntEnum):
    """What a grammar is written in; the values are those of the wire format."""

    JSON_SCHEMA = 0
    JSON_OBJECT = 1
    REGEX = 2
    CHOICE = 3
    EBNF = 4


class Grammar(NamedTuple):
    """What the output must match, as text: whoever runs the request compiles it anew.

    Attributes:
        kind: How ``spec`` is read.
        spec: The JSON schema; "" for any JSON object; the regular expression; the choices as
            a JSON list of strings; the grammar in Lark's or GBNF's notation.
    """

    kind: GrammarKind
    spec: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn.

    Attributes:
        temperature: 0 means greedy.
        top_p: Nucleus mass in (0, 1].
        top_k: Candidates kept; 0 keeps all.
        min_p: Least probability relative to the likeliest token, in [0, 1].
        seed: 64-bit seed; the draw for position i depends on (logits, seed, i) only.
        max_tokens: Output tokens at most, at least 1.
        min_tokens: Stop tokens are not drawn before this many output tokens.
        ignore_eos: The model's end-of-sequence tokens do not stop the sequence.
        stop_token_ids: Further tokens that stop it.
        repetition_penalty: Above 0. Logits of tokens in prompt or output are divided by it
            where positive and multiplied where negative (Keskar et al., "CTRL", 2019); 1
            is off.
        presence_penalty: Taken off the logits of tokens in the output (OpenAI API).
        frequency_penalty: The same, once per occurrence.
        logit_bias: Token ids and what is added to their logits, first of all.
        logprobs: Likeliest tokens told with each drawn one; 0 tells the drawn one's
            log-probability alone, None nothing.
        grammar: What the output must match; an end-of-sequence token can be drawn exactly
            where it does. Where nothing else can follow, that token is drawn whatever
            ``min_tokens`` and ``ignore_eos`` say; with the latter, only there.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    grammar: Grammar | None = None

    @property
    def penalizes(self) -> bool:
        """What may be drawn depends on the tokens so far."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position, before penalties, temperature and truncation.

    Attributes:
        logprob: Of the token drawn.
        top_ids: The likeliest tokens, likeliest first.
        top_logprobs: Theirs.
    """

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked, as the instance sees it.

    Attributes:
        request_id: Unique in the cluster.
        prompt: Token ids.
        params: Sampling parameters.
        home: Id of the gateway that owns the request; "" when there is none.
        tenant: Who is charged.
        request_class: Priority class.
        arrival: Seconds since the Unix epoch at the home; kept through replays.
        model: Served model name; "" means the instance's own.
        adapter: Adapter name; "" means none.
    """

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    home: str = ""
    tenant: str = "default"
    request_class: RequestClass = RequestClass.STANDARD
    arrival: float = 0.0
    model: str = ""
    adapter: str = ""

    @property
    def account(self) -> Account:
        """Who is charged, and the class whose counters count."""
        return self.tenant, self.request_class


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's state on one instance. Compared by identity.

    Token counters, all in tokens from the start of the prompt:
        len(tokens): prompt and output tokens known.
        num_in_flight: sampled positions planned whose tokens are not known yet.
        num_computed: tokens whose KV is computed or planned; the scheduler lets it catch
            up with ``num_tokens`` (the scheduling rule of vLLM V1).
        num_written: tokens whose KV is certainly in the pool (their step has ended).

    Attributes:
        request: What was asked.
        epoch: Ownership number under which tokens are emitted.
        tokens: Prompt and output.
        stop_token_ids: Tokens that end the sequence (the model's own included).
        block_table: Pool block ids, in order.
        max_length: Tokens at which it ends; known once an instance has taken it on.
        num_cached: Prompt tokens found in the prefix cache at first admission; -1 before.
        acked: Output tokens that the home has acknowledged.
        host_table: Host blocks that hold, or are getting, copies of the leading blocks.
        num_swapped: Tokens whose KV is on the host, while that is what the sequence will go
            on from; 0 otherwise.
        sealed: Leading blocks registered in the prefix cache by this sequence.
        block_hashes: Chained prefix hashes of the leading full blocks, as far as computed.
        charged_prompt: Prompt tokens for which the tenant was charged, or which were cached at
            first admission; the right to charge the rest moves with the request.
        charged_output: Output tokens for which the tenant was charged.
        silent: Its home has not granted it yet: it is computed, but nothing is charged.
        account: Who is charged, and the class whose counters count.
        rank: Place in the scheduler's queues; the smaller is served first.
        num_preemptions: Times the sequence lost its KV.
        preempted_at: Time at which it lost its place in the batch, until it is in a step again.
        seconds_lost: Time that preemptions have taken from it.
        held: No step computes it yet: its grammar is still being compiled.
        error: Why it ended, where that was an error.
        counts: Which tokens it holds and how often; only where a penalty needs it.
        logprobs: Of the output from index ``logprobs_from`` on, where they are asked for;
            the home has acknowledged what came before.
    """

    request: Request
    epoch: int = 1
    tokens: list[int] = field(default_factory=list)
    stop_token_ids: frozenset[int] = frozenset()
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: FinishReason = FinishReason.NOT_FINISHED
    num_in_flight: int = 0
    num_computed: int = 0
    num_written: int = 0
    max_length: int = 0
    num_cached: int = -1
    charged_prompt: int = 0
    charged_output: int = 0
    silent: bool = False
    account: Account = field(init=False)
    rank: tuple[int, float, float, bool, str] = field(init=False)
    block_table: list[int] = field(default_factory=list)
    host_table: list[int] = field(default_factory=list)
    num_swapped: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    sealed: int = 0
    acked: int = 0
    num_preemptions: int = 0
    preempted_at: float | None = None
    seconds_lost: float = 0.0
    held: bool = False
    error: str = ""
    counts: TokenCounts | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    logprobs_from: int = 0

    def __post_init__(self) -> None:
        request = self.request
        self.account = request.tenant, request.request_class
        self.rank = request.request_class, 0.0, request.arrival, False, request.request_id

    @classmethod
    def start(
        cls,
        request: Request,
        *,
        epoch: int = 1,
        emitted: tuple[int, ...] = (),
        eos_token_ids: tuple[int, ...] = (),
    ) -> Sequence:
        """Make a waiting sequence; ``emitted`` are output tokens the home already has.

        They were charged when they were drawn, and the prompt before them.
        """
        params = request.params
        eos = () if params.ignore_eos and params.grammar is None else eos_token_ids
        return cls(
            request=request,
            epoch=epoch,
            tokens=[*request.prompt, *emitted],
            stop_token_ids=frozenset(params.stop_token_ids).union(eos),
            acked=len(emitted),
            charged_prompt=len(request.prompt) if emitted else 0,
            charged_output=len(emitted),
            logprobs_from=len(emitted),
        )

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def num_output(self) -> int:
        """Output tokens known."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_tokens(self) -> int:
        """Tokens known or on their way: what ``num_computed`` catches up with."""
        return len(self.tokens) + self.num_in_flight

    @property
    def num_kept(self) -> int:
        """Tokens whose KV exists, in the pool or on the host."""
        return self.num_swapped or self.num_written

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    def logprobs_since(self, index: int) -> tuple[TokenLogprobs, ...]:
        """Log-probabilities of the output from ``index`` on, which the home has not
        acknowledged; empty where none were asked for."""
        return tuple(self.logprobs[max(0, index - self.logprobs_from) :])

    def acknowledge(self, count: int) -> None:
        """The home has the first ``count`` output tokens."""
        if count <= self.acked:
            return
        self.acked = count
        if self.logprobs:
            del self.logprobs[: count - self.logprobs_from]
            self.logprobs_from = count

    def token_counts(self) -> TokenCounts:
        """``counts``, made at the first call and brought up to date at each."""
        counts = self.counts
        if counts is None:
            counts = self.counts = TokenCounts(self.num_prompt)
        counts.extend(self.tokens)
        return counts


class Row(NamedTuple):
    """One sequence's share of a step: positions [start, start + length) are computed.

    ``samples`` is true when these are the last known positions, so that the step draws
    the token at position ``start + length``.
    """

    sequence: Sequence
    start: int
    length: int
    samples: bool


@dataclass(slots=True)
class StepPlan:
    """What a step computes: decode rows (one position each) first, then prefill rows.

    ``preempted`` lists the sequences that lost their KV to make the plan possible.
    """

    number: int
    rows: list[Row] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(row.length for row in self.rows)

    def draws(self) -> dict[Sequence, int]:
        """The sequences for which it draws a token, each with the index of the draw."""
        drawing = [row.sequence for row in self.rows if row.samples]
        return {sequence: index for index, sequence in enumerate(drawing)}
