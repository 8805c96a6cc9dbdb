"""The bench of the GPU engine runs whole on the CPU, where its figures mean nothing."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from bench import gpu
from bench.gpu_model import Size, decode_steps, prefill_step, random_model, weight_bytes

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU only"
)


def test_every_part_runs(capsys: pytest.CaptureFixture[str]) -> None:
    size = Size(
        "tiny",
        "cpu",
        batches=(1, 2),
        context=18,
        prefill=20,
        steps=2,
        copied=1 << 20,
        max_num_seqs=2,
    )
    result = gpu.run(size, gpu.PARTS)
    failed = {name: one for name, one in result.items() if isinstance(one, dict) and "error" in one}
    assert not failed
    assert result["correctness"][0]["tokens"] == 3
    assert result["correctness"][0]["largest_gap"] < 1e-3
    assert result["attention"][0]["largest_difference"] < 1e-4
    for mode in gpu.MODES:
        rows = result[mode]["decode"]
        assert [one["rows"] for one in rows] == [1, 2]
        assert all(one["tokens_per_second"] > 0 for one in rows)
    assert result["engine"]["steps"] > 0
    names = [one.name for one in gpu.targets(result, size)]
    assert "engine overhead" in names
    assert not any(math.isnan(one.measured) for one in gpu.targets(result, size)[:1])
    gpu.show(result)
    assert "compiled" in capsys.readouterr().out


def test_a_part_that_fails_is_told_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(size: Size) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("bench.gpu_kernels.matrix_peak", broken)
    size = Size("tiny", "cpu", batches=(1,), context=18, steps=1, copied=1 << 20)
    result = gpu.run(size, ["copies"])
    assert result["matrix_flops"] == {"error": "MemoryError: no room"}
    assert result["copies"]["share_of_plain_by_run"]
    targets = gpu.targets(result, size)
    # What was not measured does not hold.
    assert not any(one.holds for one in targets if one.name.startswith(("attention", "engine")))


def test_weights_that_a_decode_reads() -> None:
    model = random_model("tiny", "cpu", torch.float32)
    table = model.get_input_embeddings().weight.nbytes
    assert weight_bytes(model) == sum(one.nbytes for one in model.parameters()) - table


def test_steps_write_where_their_tables_say() -> None:
    for batch in decode_steps(3, 31, 4, 4):
        at = batch.positions
        rows = range(3)
        expected = [batch.block_tables[i, at[i] // 16] * 16 + at[i] % 16 for i in rows]
        assert batch.slots.tolist() == expected
        assert (batch.context_lens == at + 1).all()
    step = prefill_step(range(100), 20, 30, first_block=5)
    assert step.slots[0] == 6 * 16 + 4
    assert step.slots[-1] == 8 * 16 + 1
    assert step.token_ids.tolist() == list(range(20, 50))
