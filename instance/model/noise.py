"""Counter-based random numbers: a function of (seed, position, token) and of nothing else.

SplitMix64's finalizer (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014) mixes the counters, as Philox and its kin do, so that a draw needs
no generator state and a replayed or moved request draws the same.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def mix64(value: int) -> int:
    """SplitMix64's finalizer on the low 64 bits of ``value``."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def position_key(seed: int, position: int) -> int:
    """The 64-bit key of one draw."""
    return mix64(mix64(seed + _GAMMA) ^ mix64((position + 1) * _GAMMA))


def exponentials(
    keys: NDArray[np.uint64] | np.uint64, tokens: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Standard exponential variates for (draw, token) pairs, all above 0.

    Args:
        keys: Keys of the draws, of a shape that broadcasts with ``tokens``.
        tokens: Token ids.
    """
    bits = keys + (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(_GAMMA)
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(_FIRST)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(_SECOND)
    bits ^= bits >> np.uint64(31)
    # 52 bits and a half step: exact in a double, never 0 or 1.
    uniform = (bits >> np.uint64(12)).astype(np.float64)
    uniform += 0.5
    uniform *= 2.0**-52
    np.log(uniform, out=uniform)
    return np.negative(uniform, out=uniform)


def lower_bounds(key: np.uint64, count: int) -> NDArray[np.float32]:
    """What the exponential variates of tokens 0 to ``count`` - 1 reach at least.

    It is 1 - u, rounded down to a multiple of 2**-31, where the variate is -log(u): close to
    it where it is small, and cheap.
    """
    bits = key + _counters(count)
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(_FIRST)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(_SECOND)
    # The finalizer's last step leaves the highest 31 bits as they are.
    bits >>= np.uint64(33)
    # Integers below 2**24 are exact in single precision, so what is small is not rounded up.
    bound = np.subtract(np.uint32(2**31 - 1), bits, dtype=np.uint32, casting="unsafe")
    return np.multiply(bound, np.float32(2.0**-31), dtype=np.float32)


@functools.lru_cache(maxsize=4)
def _counters(count: int) -> NDArray[np.uint64]:
    return np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GAMMA)
