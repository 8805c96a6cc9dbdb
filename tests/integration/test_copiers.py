"""Copiers: the bytes, their order, and what the loop's thread can do meanwhile."""

from __future__ import annotations

import concurrent.futures
import random
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from instance.clock import VirtualClock
from instance.executor import CopyRun
from instance.kv.copier import CudaCopier, TensorCopier
from instance.model.modelled_copier import ModelledCopier


def random_kv(num_blocks: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn((num_blocks, 2, 2, 4, 2, 8)).to(dtype)


class Ended:
    """A ``done`` whose result can be waited for."""

    def __init__(self) -> None:
        self.future: concurrent.futures.Future[float | BaseException] = concurrent.futures.Future()

    def __call__(self, result: float | BaseException) -> None:
        self.future.set_result(result)

    def wait(self) -> float | BaseException:
        return self.future.result(60)


def out(copier: TensorCopier, *runs: CopyRun) -> float | BaseException:
    ended = Ended()
    copier.copy_out(runs, ended)
    return ended.wait()


def back(copier: TensorCopier, *runs: CopyRun) -> float | BaseException:
    ended = Ended()
    copier.copy_in(runs, ended)
    return ended.wait()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_blocks_return_bit_by_bit_wherever_they_lay(dtype: torch.dtype) -> None:
    rng = random.Random(1)
    kv = random_kv(40, dtype)
    written: list[tuple[int, int]] = []
    copier = TensorCopier(kv, 30, lambda block, count: written.append((block, count)))
    before = kv.clone()
    try:
        for _ in range(20):
            count = rng.randint(1, 8)
            source, host = rng.randrange(1, 40 - count), rng.randrange(1, 30 - count)
            target = rng.randrange(1, 40 - count)
            seconds = out(copier, CopyRun(source, host, count))
            assert isinstance(seconds, float)
            assert seconds > 0
            kv[target : target + count] = float("nan")
            assert isinstance(back(copier, CopyRun(target, host, count)), float)
            assert kv[target : target + count].equal(before[source : source + count])
            assert written.pop() == (target, count)
            kv.copy_(before)
    finally:
        copier.close()


def test_a_job_may_have_many_runs_and_the_host_pool_can_be_read() -> None:
    kv = random_kv(20)
    copier = TensorCopier(kv, 20)
    try:
        out(copier, CopyRun(1, 5, 2), CopyRun(9, 1, 3))
        assert copier.host is not None
        for block, host in ((1, 5), (2, 6), (9, 1), (10, 2), (11, 3)):
            assert bytes(copier.host.read(host, 1)) == kv[block].numpy().tobytes()
        assert copier.block_bytes == kv[0].numel() * 4
    finally:
        copier.close()


@pytest.mark.parametrize("run", [CopyRun(18, 1, 3), CopyRun(1, 8, 3), CopyRun(-1, 1, 1)])
def test_runs_outside_of_a_pool_are_refused(run: CopyRun) -> None:
    copier = TensorCopier(random_kv(20), 10)
    try:
        with pytest.raises(IndexError):
            copier.copy_out([run], Ended())
        with pytest.raises(IndexError):
            copier.copy_in([run], Ended())
    finally:
        copier.close()


def test_a_failed_copy_is_told_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = random_kv(20)
    copier = TensorCopier(kv, 20, lambda block, count: 1 // (block - 3))
    try:
        assert isinstance(back(copier, CopyRun(3, 1, 1)), ZeroDivisionError)
        assert isinstance(back(copier, CopyRun(4, 1, 1)), float)
    finally:
        copier.close()
    with pytest.raises(RuntimeError, match="closed"):
        copier.copy_out([CopyRun(1, 1, 1)], Ended())


def test_one_direction_does_not_wait_for_the_other() -> None:
    kv = random_kv(20)
    gate = threading.Event()
    copier = TensorCopier(kv, 20)
    held = Ended()
    copier._out.submit(lambda: float(gate.wait(60)), held)
    behind = Ended()
    try:
        copier.copy_out([CopyRun(1, 1, 1)], behind)
        assert isinstance(back(copier, CopyRun(2, 2, 1)), float)
        assert not behind.future.done()
    finally:
        gate.set()
        behind.wait()
        copier.close()


def test_a_large_copy_leaves_the_interpreter_to_others() -> None:
    kv = torch.zeros((65, 1 << 19))  # 2 MiB a block
    copier = TensorCopier(kv, 65)
    copying, turns = threading.Event(), 0
    copy = copier._copy

    def flagged(pieces: Any) -> float:
        copying.set()
        try:
            return copy(pieces)
        finally:
            copying.clear()

    copier._copy = flagged  # type: ignore[method-assign]
    ended = Ended()
    try:
        copier.copy_out([CopyRun(1, 1, 64)], ended)
        copying.wait(60)
        while copying.is_set():
            turns += 1
        assert isinstance(ended.wait(), float)
    finally:
        copier.close()
    # With the interpreter held this thread would find the copy over after a turn or two.
    assert turns > 100


class Log(list[str]):
    """Names of calls, in order."""

    def stream(self, name: str) -> Any:
        return SimpleNamespace(wait_stream=lambda other: self.append(f"{name} waits for {other}"))

    def event(self, **_: object) -> Any:
        number = sum(call.startswith("event") for call in self)
        self.append(f"event {number}")
        return SimpleNamespace(
            record=lambda stream: self.append(f"record {number}"),
            synchronize=lambda: self.append(f"synchronize {number}"),
            elapsed_time=lambda other: 250.0,
        )


def test_a_cuda_copy_begins_after_the_steps_before_it_and_ends_with_its_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = Log()
    kv, copies = random_kv(6), random_kv(6)
    inner = TensorCopier(kv, 6)
    copier = object.__new__(CudaCopier)
    copier._kv, copier._copies, copier._compute = kv, copies, "the steps"  # type: ignore[assignment]
    copier._out_stream, copier._in_stream = log.stream("out"), log.stream("in")
    copier._out, copier._in = inner._out, inner._in
    within = SimpleNamespace(__enter__=lambda self: None, __exit__=lambda self, *error: None)
    manager = type("Within", (), vars(within))
    monkeypatch.setattr(torch.cuda, "device", lambda device: manager())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: manager())
    monkeypatch.setattr(torch.cuda, "Event", log.event)
    ended = Ended()
    copier.copy_out([CopyRun(1, 2, 3)], ended)
    assert ended.wait() == 0.25
    assert log == [
        "event 0", "event 1", "out waits for the steps", "record 0", "record 1", "synchronize 1"
    ]  # fmt: skip
    assert copies[2:5].equal(kv[1:4])
    log.clear()
    ended = Ended()
    kept = copies[2:5].clone()
    kv[1:4] = float("nan")
    copier.copy_in([CopyRun(1, 2, 3)], ended)
    assert ended.wait() == 0.25
    assert log[2] == "in waits for the steps"
    assert kv[1:4].equal(kept)
    inner.close()


def test_a_cuda_copier_wants_cuda_memory() -> None:
    with pytest.raises(ValueError, match="CUDA"):
        CudaCopier(random_kv(4), 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_blocks_return_bit_by_bit() -> None:
    kv = random_kv(40).cuda()
    before = kv.clone()
    torch.cuda.synchronize()
    copier = CudaCopier(kv, 30)
    try:
        assert copier.host is not None
        for first in (1, 7, 20):
            ended = Ended()
            copier.copy_out([CopyRun(first, 3, 9)], ended)
            assert isinstance(ended.wait(), float)
            held = bytes(copier.host.read(3, 9))
            assert held == before[first : first + 9].cpu().numpy().tobytes()
            kv[25:34] = float("nan")
            ended = Ended()
            copier.copy_in([CopyRun(25, 3, 9)], ended)
            assert isinstance(ended.wait(), float)
            assert kv[25:34].equal(before[first : first + 9])
            kv.copy_(before)
    finally:
        copier.close()


def test_modelled_copies_take_their_time_one_after_the_other_each_way() -> None:
    clock = VirtualClock()
    copier = ModelledCopier(10, 100, clock, lambda size, runs: size / 1000 + runs * 0.5)
    ends: list[tuple[str, float, float | BaseException]] = []

    def note(name: str) -> Any:
        return lambda result: ends.append((name, clock.now(), result))

    copier.copy_out([CopyRun(1, 1, 2), CopyRun(5, 6, 1)], note("first"))
    copier.copy_out([CopyRun(1, 1, 10)], note("second"))
    copier.copy_in([CopyRun(1, 1, 5)], note("back"))
    clock.run_until(10.0)
    assert ends == [("back", 1.0, 1.0), ("first", 1.3, 1.3), ("second", 2.8, 1.5)]
    copier.copy_out([CopyRun(1, 1, 1)], note("abandoned"))
    copier.close()
    clock.run_until(20.0)
    assert len(ends) == 3


def test_modelled_copies_on_one_stream_follow_each_other() -> None:
    clock = VirtualClock()
    copier = ModelledCopier(
        10, 100, clock, lambda size, runs: 1.0, lambda size, runs: 0.25, one_stream=True
    )
    ends: list[tuple[float, float | BaseException]] = []
    for copy in (copier.copy_in, copier.copy_out, copier.copy_in):
        copy([CopyRun(1, 1, 1)], lambda result: ends.append((clock.now(), result)))
    clock.run_until(10.0)
    assert ends == [(0.25, 0.25), (1.25, 1.0), (1.5, 0.25)]
