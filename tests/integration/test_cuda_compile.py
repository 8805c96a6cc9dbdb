"""The kernels compile to machine code of a GPU, which takes none: what Triton's interpreter
does not look at (types, shared memory) is looked at here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from instance.model.cuda import attention_kernels as kernels
from instance.model.cuda.sampling_kernels import sample_kernel
from instance.model.cuda.sizing import attention_tiles

SHARED = 227 << 10
LOOSE = ("table_stride", "scale", "cap", "temperatures", "top_ks", "top_ps", "min_ps", "draws")


def build(kernel, types, constants, **options):
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    # As where it is called: tensors and strides are multiples of 16, but for a step's arrays.
    loose = {*kernels.ANYWHERE, *LOOSE, *constants}
    attributes = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(kernel.arg_names)
        if name not in loose
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.metadata.shared <= SHARED, made.metadata.shared
    assert made.asm["cubin"]
    return made.asm["ptx"]


shape = {"HEADS": 32, "DIM": 128, "BLOCK_D": 128}
ints = dict.fromkeys(("slots", "tables", "context_lens", "query_starts", "items"), "*i64")
sums = dict.fromkeys(("partial", "maxima", "sums"), "*fp32")
for decode in (True, False):
    tiles = attention_tiles(4, 128, 2, SHARED, decode)
    tensors = dict.fromkeys(("query", "key_cache", "value_cache", "out", "sinks"), "*bf16")
    code = build(
        kernels.attend_kernel,
        {**ints, **sums, **tensors, "scale": "fp32", "cap": "fp32"},
        {
            **shape,
            "GROUP": 4,
            "BLOCK_SIZE": 16,
            "BLOCK_M": tiles.block_m,
            "BLOCK_Q": tiles.block_q,
            "TILE": tiles.tile,
            "SPLITS": 16 if decode else 1,
            "CAPPED": True,
            "SINKS": True,
            "PRECISION": "tf32",
            "WIDEN": False,
            "query_dim": 1,
            "dim_stride": 1,
        },
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    # K and V come in 16 bytes at a time, while the tile before is worked on.
    assert "cp.async.cg.shared.global" in code
build(
    kernels.combine_kernel,
    {**sums, "out": "*bf16", "sinks": "*bf16", "query_starts": "*i64"},
    {**shape, "SPLITS": 16, "SINKS": True},
)
build(
    kernels.store_kernel,
    {**ints, **dict.fromkeys(("key", "value", "key_cache", "value_cache"), "*bf16")},
    {"BLOCK_SIZE": 16, "HEADS": 8, "BLOCK_H": 8, "DIM": 128, "BLOCK_D": 128},
)
# A small block compiles in a tenth of the time.
build(
    sample_kernel,
    {
        "logits": "*bf16",
        **dict.fromkeys(("tokens", "top_ks", "draws"), "*i64"),
        **dict.fromkeys(("temperatures", "top_ps", "min_ps"), "*fp64"),
    },
    {"BLOCK": 256},
    num_warps=8,
)
"""


def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
