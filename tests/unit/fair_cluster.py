"""A small cluster for the tests of fairness: the real dispatcher core, real schedulers.

Time is counted in rounds: in each, every instance ends a step and launches the next one.
Reports, ledgers and placements arrive at once unless ``Faults`` says otherwise.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from cluster.dispatcher.core import Dispatcher, DispatcherConfig
from cluster.dispatcher.events import (
    Action,
    Event,
    FetchLedger,
    Finished,
    Joined,
    LedgerCopied,
    Left,
    MigrationEnded,
    MigrationRequested,
    Place,
    PlaceRequested,
    Refuse,
    Reported,
    SendLedger,
    Served,
    StartMigration,
    Tick,
)
from cluster.dispatcher.fairness import Source
from cluster.dispatcher.load import LoadConfig
from cluster.dispatcher.messages import PlaceRequest
from cluster.dispatcher.rebalance import RebalanceConfig
from cluster.dispatcher.requests import RequestConfig
from cluster.dispatcher.tenants import TenantPolicy
from instance.config import SchedulerConfig
from instance.fairness import service
from instance.kv.blocks import BlockPool
from instance.leases import LeasedCounters
from instance.load import InstanceInfo, LoadReport, MigrationFigures, MigrationReport, build_report
from instance.request import (
    Account,
    FinishReason,
    Request,
    RequestClass,
    SamplingParams,
    Sequence,
    StepPlan,
)
from instance.scheduler import Scheduler
from tests.unit.dispatching import MODEL

BLOCK_SIZE = MODEL.block_size
ROUND = 0.1
"""Seconds of the dispatcher's time in a round."""
GATEWAY = "gateway-0"


@dataclass
class Faults:
    """Chances that a message is lost, comes twice, or comes some rounds later."""

    lost: float = 0.0
    doubled: float = 0.0
    late: float = 0.0


class Node:
    """One incarnation of an instance: scheduler and leased counters, stepped by hand."""

    def __init__(self, name: str, number: int, config: SchedulerConfig, num_blocks: int) -> None:
        self.name = name
        self.incarnation = f"{name}.{number}"
        self.counters = LeasedCounters()
        self.pool = BlockPool(num_blocks, BLOCK_SIZE)
        self.scheduler = Scheduler(config, self.pool, counters=self.counters)
        self.info = InstanceInfo(
            name, self.incarnation, "", "", MODEL, self.pool.num_usable, config.max_num_seqs
        )
        self.news = True
        self.idle_with_waiting = 0
        self._reports = 0
        self._launched: StepPlan | None = None
        self._planned: StepPlan | None = None

    def end_step(self) -> list[tuple[Sequence, int, bool]]:
        """Sequences with the number of new tokens, and whether they have ended."""
        plan, self._launched = self._launched, None
        if plan is None:
            return []
        draws = sum(row.samples for row in plan.rows)
        found = self.scheduler.complete(plan, [9] * draws)
        return [(one.sequence, len(one.tokens), bool(one.finish_reason)) for one in found]

    def start_step(self) -> None:
        waited = bool(self.scheduler.waiting)
        plan = self._planned or self.scheduler.schedule()
        self._planned = None
        self.scheduler.patch(plan)
        if plan.rows:
            self._launched = plan
            self._planned = self.scheduler.schedule()
        elif waited:
            self.idle_with_waiting += 1
        self.news |= waited and not self.scheduler.waiting

    def take_out(self, sequence: Sequence) -> bool:
        if not self.scheduler.can_leave(sequence):
            return False
        if self._planned is not None:
            self.scheduler.drop(self._planned, sequence)
        self.scheduler.take_out(sequence)
        return True

    def report(self) -> LoadReport:
        self._reports += 1
        self.news = False
        return build_report(
            self.scheduler,
            MigrationFigures(lambda _: False, 0, 0, 0),
            instance_id=self.name,
            incarnation=self.incarnation,
            number=self._reports,
            step_seconds=ROUND,
            draining=False,
        )


@dataclass
class Job:
    """A client's request at its home."""

    request: Request
    epoch: int = 1
    emitted: int = 0
    charged_prompt: int = 0
    holder: Node | None = None
    arrived: int = 0
    started: int | None = None
    ended: int | None = None
    replays: int = 0


@dataclass
class FairCluster:
    """Dispatcher, instances and one home.

    Attributes:
        gap: Widest gap ever between waiting tenants' true counters, over its bound then.
        refused: Refusals by status.
    """

    rng: random.Random
    weights: dict[str, float]
    instances: int = 2
    num_blocks: int = 200
    run_ahead: int | None = 2
    report_rounds: int = 5
    faults: Faults = field(default_factory=Faults)
    scheduler: SchedulerConfig = field(
        default_factory=lambda: SchedulerConfig(
            max_num_seqs=4,
            max_num_batched_tokens=32,
            max_model_len=400,
            enable_prefix_caching=False,
            priority_interval=2,
        )
    )

    def __post_init__(self) -> None:
        self.round = 0
        self.jobs: dict[str, Job] = {}
        self.gap = 0.0
        self.widest = 0.0
        self.refused: Counter[int] = Counter()
        self.sums: dict[Node, Counter[Account]] = {}
        self.migrations = 0
        self.lives = 0
        self.idle_nodes = 0
        self._number = 0
        self._later: list[tuple[int, Event]] = []
        self._moves: list[StartMigration] = []
        self.core = self.new_core()
        self.nodes: dict[str, Node] = {}
        self.dead: list[Node] = []
        for index in range(self.instances):
            self.boot(f"i{index}")

    def new_core(self) -> Dispatcher:
        """A dispatcher that knows nothing; each later one begins with a higher version."""
        self.lives += 1
        policies = {name: TenantPolicy(weight) for name, weight in self.weights.items()}
        config = DispatcherConfig(
            requests=RequestConfig(run_ahead=self.run_ahead, tenants=policies, home_timeout=1e9),
            load=LoadConfig(report_interval=1e3, gone_after=1e4),
            rebalance=RebalanceConfig(enabled=False),
        )
        return Dispatcher(config, random.Random(self.rng.random()), self.lives * 1_000_000_000)

    @property
    def now(self) -> float:
        return self.round * ROUND

    # ---- messages

    def tell(self, event: Event) -> None:
        """The dispatcher hears of something, and what it wants is done."""
        for action in self.core.handle(event, self.now):
            self.do(action)

    def do(self, action: Action) -> None:
        match action:
            case Place(placement):
                node = self.nodes[placement.instance_id]
                job = self.jobs[placement.request_id]
                fits = job.epoch == placement.epoch and job.ended is None
                if fits and job.holder is None and node.incarnation == placement.incarnation:
                    self.submit_to(node, job)
            case Refuse(refusal):
                self.refused[refusal.status] += 1
                self.jobs[refusal.request_id].ended = self.round
            case SendLedger(instance_id, incarnation, update):
                node = self.nodes[instance_id]
                if node.incarnation == incarnation and self.rng.random() >= self.faults.lost:
                    node.counters.take(update)
            case FetchLedger(instance_id):
                node = self.nodes[instance_id]
                self.tell(LedgerCopied(node.name, node.incarnation, node.counters.copy()))
            case StartMigration():
                self._moves.append(action)

    def submit_to(self, node: Node, job: Job) -> None:
        job.holder = node
        sequence = Sequence.start(job.request, epoch=job.epoch, emitted=(9,) * job.emitted)
        sequence.charged_prompt = max(sequence.charged_prompt, job.charged_prompt)
        node.scheduler.add(sequence)
        node.news = True

    def send_report(self, node: Node) -> None:
        report, faults, rng = Reported(node.report()), self.faults, self.rng
        if rng.random() < faults.lost:
            return
        if rng.random() < faults.late:
            self._later.append((self.round + rng.randint(1, 6), report))
        else:
            self.tell(report)
        if rng.random() < faults.doubled:
            self._later.append((self.round + rng.randint(0, 6), report))

    # ---- what happens

    def boot(self, name: str) -> None:
        old = self.nodes.get(name)
        if old is not None:
            self.dead.append(old)
        node = Node(name, len(self.dead), self.scheduler, self.num_blocks)
        self.nodes[name] = node
        self.sums[node] = Counter()
        self.tell(Joined(node.info))
        self.tell(Reported(node.report()))

    def crash(self, name: str) -> None:
        """An instance dies and starts again; its requests are replayed."""
        node = self.nodes[name]
        self._moves = [one for one in self._moves if name not in (one.source,)]
        charged = tuple(self.sums[node].items())
        self.tell(Left(name, node.incarnation))
        self.boot(name)
        self.tell(Served(GATEWAY, name, node.incarnation, charged))
        for job in self.jobs.values():
            if job.holder is node and job.ended is None:
                job.holder = None
                job.epoch += 1
                job.replays += 1
                self.ask(job)

    def restart_dispatcher(self) -> None:
        """It forgets everything; instances join again, and the home asks again."""
        self.core = self.new_core()
        self._moves.clear()
        self._later.clear()
        for node in self.nodes.values():
            self.tell(Joined(node.info))
            self.tell(Reported(node.report()))
        for job in self.jobs.values():
            if job.holder is None and job.ended is None:
                self.ask(job)

    def submit(
        self,
        tenant: str,
        prompt: int,
        output: int,
        request_class: RequestClass = RequestClass.STANDARD,
    ) -> Job:
        self._number += 1
        name = f"{tenant}-{self._number}"
        request = Request(
            name,
            (7,) * prompt,
            SamplingParams(max_tokens=output, ignore_eos=True),
            home=GATEWAY,
            tenant=tenant,
            request_class=request_class,
            arrival=self.now + self._number * 1e-6,
        )
        job = self.jobs[name] = Job(request, arrived=self.round)
        self.ask(job)
        return job

    def ask(self, job: Job) -> None:
        request = job.request
        self.tell(
            PlaceRequested(
                PlaceRequest(
                    request_id=request.request_id,
                    epoch=job.epoch,
                    gateway_id=GATEWAY,
                    tenant=request.tenant,
                    request_class=request.request_class,
                    num_tokens=len(request.prompt) + job.emitted,
                    max_tokens=request.params.max_tokens,
                    arrival=request.arrival,
                )
            )
        )

    def backlog(self, tenant: str) -> int:
        """Requests of a tenant without a token yet that have not ended."""
        return sum(
            1
            for job in self.jobs.values()
            if job.request.tenant == tenant and job.ended is None and not job.emitted
        )

    def migrate_some(self, chance: float) -> None:
        """Ask, as an operator would, for moves of random requests."""
        for name, node in self.nodes.items():
            others = [other for other in self.nodes if other != name]
            sequences = list(node.scheduler.sequences)
            if others and sequences and self.rng.random() < chance:
                picked = self.rng.choice(sequences)
                self.tell(MigrationRequested(picked, self.rng.choice(others)))

    # ---- a round

    def advance(self) -> None:
        self.round += 1
        due = [event for at, event in self._later if at <= self.round]
        self._later = [one for one in self._later if one[0] > self.round]
        for event in due:
            self.tell(event)
        self.tell(Tick())
        for node in list(self.nodes.values()):
            for sequence, tokens, over in node.end_step():
                self.emitted(node, sequence, tokens, over)
        moves, self._moves = self._moves, []
        for move in moves:
            self.move(move)
        for index, node in enumerate(list(self.nodes.values())):
            node.start_step()
            turn = self.round % self.report_rounds == index % self.report_rounds
            if node.news or node.counters.due or turn:
                self.send_report(node)
        self.look()

    def emitted(self, node: Node, sequence: Sequence, tokens: int, over: bool) -> None:
        job = self.jobs[sequence.request_id]
        if job.holder is not node or job.epoch != sequence.epoch:
            return
        if not job.emitted and tokens:
            job.started = self.round
            fresh = sequence.num_prompt - max(0, sequence.num_cached)
            self.sums[node][sequence.account] += service(fresh, 0)
        job.emitted += tokens
        self.sums[node][sequence.account] += service(0, tokens)
        if over:
            job.ended = self.round
            node.news = True
            self.tell(Finished(sequence.request_id, job.epoch))

    def move(self, move: StartMigration) -> None:
        source, target = self.nodes[move.source], self.nodes[move.destination.instance_id]
        outcome = self.try_to_move(move.request_id, source, target)
        source.news = target.news = True
        self.migrations += outcome == "moved"
        self.tell(
            MigrationEnded(
                MigrationReport(
                    move.request_id, "1", source.name, target.name, move.reason, outcome
                )
            )
        )

    def try_to_move(self, request_id: str, source: Node, target: Node) -> str:
        sequence = source.scheduler.sequences.get(request_id)
        if sequence is None or sequence.request_id in target.scheduler.sequences:
            return "unknown request"
        if not source.take_out(sequence):
            return "cannot leave now"
        kept = sequence.num_kept
        blocks = target.pool.reserve(-(-kept // BLOCK_SIZE)) if kept else []
        if blocks is None:
            source.scheduler.put_back(sequence)
            return "refused: no blocks"
        moved = Sequence.start(
            sequence.request, epoch=sequence.epoch + 1, emitted=tuple(sequence.output)
        )
        moved.num_cached = sequence.num_cached
        moved.charged_prompt = sequence.charged_prompt
        moved.charged_output = sequence.charged_output
        target.pool.commit(blocks)
        moved.block_table = list(blocks)
        moved.num_computed = moved.num_written = kept
        source.scheduler.finish(sequence, FinishReason.NOT_FINISHED)
        (target.scheduler.insert if kept else target.scheduler.add)(moved)
        job = self.jobs[request_id]
        job.holder, job.epoch = target, moved.epoch
        return "moved"

    # ---- what an outsider sees

    def true_counter(self, account: Account) -> float:
        """The ledger's counter and what instances have not reported yet."""
        hidden = sum(
            node.counters.charged(account)
            - self.core.ledger.applied(Source(node.name, node.incarnation), account)
            for node in self.nodes.values()
        )
        return self.core.ledger.counter(account) + hidden / self.weights[account[0]]

    def look(self) -> None:
        for request_class in RequestClass:
            waiting = self.core.ledger.waiting(request_class)
            if len(waiting) < 2:
                continue
            counters = [self.true_counter(account) for account in waiting]
            bound = self.core.ledger.bound(request_class)
            self.widest = max(self.widest, max(counters) - min(counters))
            self.gap = max(self.gap, (max(counters) - min(counters)) / bound)
        if self.core.num_held:
            self.idle_nodes += sum(
                not (node.scheduler.has_work() or self.core.members.loads[name].charges)
                for name, node in self.nodes.items()
            )

    def settle(self) -> None:
        """Every instance reports, and everything on its way arrives."""
        self.faults = Faults()
        for _ in range(3):
            self.round += 7
            for _, event in self._later:
                self.tell(event)
            self._later.clear()
            for node in self.nodes.values():
                self.tell(Reported(node.report()))

    def served(self, tenant: str) -> float:
        """Service that a tenant's requests are worth so far."""
        total = 0.0
        for job in self.jobs.values():
            if job.request.tenant == tenant and job.emitted:
                total += service(len(job.request.prompt), job.emitted)
        return total
