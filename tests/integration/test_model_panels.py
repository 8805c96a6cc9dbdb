"""Products with weights in panels, against plain ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from instance.model import panels
from instance.model.packing import ACTIVATIONS, PackedLinear, PanelMlp

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
DTYPES = [dtype for dtype in TOLERANCE if panels.available(dtype)]

pytestmark = pytest.mark.skipif(not DTYPES, reason="this processor has no kernels for products")


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


def close(found: Tensor, expected: Tensor) -> None:
    """Relative to the largest value: sums of many products cancel."""
    assert found.shape == expected.shape
    slack = TOLERANCE[found.dtype] * float(expected.abs().max().clamp_min(1e-6))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=slack)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    words=st.integers(1, 70),
    outputs=st.integers(1, 20),
    bias=st.booleans(),
    other=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_products(
    rows: int,
    words: int,
    outputs: int,
    bias: bool,
    other: bool,
    dtype: torch.dtype,
    threads: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    inputs, outputs = words * 4 // dtype.itemsize, 16 * outputs
    x, weight = random(rows, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype)
    added = torch.randn(outputs) if bias else None
    beside = random(rows, outputs, dtype=dtype) if other else None
    assert panels.fits(weight)
    found = panels.multiply(x, panels.to_panels(weight), outputs, added, other=beside)
    expected = x.double() @ weight.double().T
    if added is not None:
        expected += added
    if beside is not None:
        expected += beside.double()
    close(found, expected)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    inner=st.integers(1, 8),
    name=st.sampled_from(["swish", "gelu"]),
    scale=st.sampled_from([0.1, 1.0, 200.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_gated_mlps(
    rows: int, inner: int, name: str, scale: float, dtype: torch.dtype, seed: int
) -> None:
    """Large inputs too, where exponentials overflow."""
    torch.manual_seed(seed)
    width, inner = 32, 16 * inner
    weights = [random(*shape, dtype=dtype) for shape in ((inner, width),) * 2 + ((width, inner),)]
    gate, up, down = (PackedLinear(weight, None) for weight in weights)
    assert all([gate.pack(), up.pack(), down.pack()])
    number = next(number for known, _, number, _ in ACTIVATIONS if known == name)
    x = scale * random(rows, width, dtype=dtype)
    found = PanelMlp(gate, up, down, number)(x)
    wide = [weight.double() for weight in weights]
    gated = x.double() @ wide[0].T
    gated = silu(gated) if name == "swish" else gelu(gated, approximate="tanh")
    close(found, (gated * (x.double() @ wide[1].T)).to(dtype).double() @ wide[2].T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_threads_change_nothing(dtype: torch.dtype) -> None:
    """Not a bit: neither those beside a row nor who computes it."""
    weight = panels.to_panels(random(96, 64, dtype=dtype))
    x = random(200, 64, dtype=dtype)
    whole = panels.multiply(x, weight, 96)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(panels.multiply(x, weight, 96), whole)
    for first, last in ((0, 1), (3, 5), (100, 107), (60, 199)):
        assert torch.equal(panels.multiply(x[first:last], weight, 96), whole[first:last])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    x = random(9, 32, dtype=dtype)
    x[4] = torch.nan
    found = panels.multiply(x, panels.to_panels(random(48, 32, dtype=dtype)), 48)
    assert found[4].isnan().all()
    assert found.isnan().sum() == 48


def test_what_fits() -> None:
    for dtype in DTYPES:
        assert panels.fits(torch.zeros(16, 4, dtype=dtype))
        assert not panels.fits(torch.zeros(24, 4, dtype=dtype))
    assert not panels.fits(torch.zeros(16, 4, dtype=torch.float64))
    if torch.bfloat16 in DTYPES:
        assert not panels.fits(torch.zeros(16, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_does_not_fit_is_packed_otherwise_or_stays(dtype: torch.dtype) -> None:
    layer = nn.Linear(30, 20).to(dtype).requires_grad_(False)
    packed = PackedLinear(layer.weight, layer.bias)
    packed.pack()
    assert packed.panels is None
    x = random(5, 30, dtype=dtype)
    close(packed(x), layer(x).double())
