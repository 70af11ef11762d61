"""How many different states a validation has seen."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt64
from numpy.typing import NDArray

from ntk_ensembles.tasks.planes import Words, to_integers

CAPACITY = 1 << 28
"""Codes kept at most, unless said otherwise: 2 GiB of them."""

_BLOCK = 1 << 20
_CODE_BITS = 64
# Any odd number spreads the low digits of a product over its high ones; this is 2^64 over the golden ratio.
_SPREAD = np.uint64(0x9E3779B97F4A7C15)


class StateCodes:
    """A 64-bit code for every state of m bits.

    Up to 64 bits a code is the state itself. Beyond, each further bit flips a random half of the code's bits: two
    different states that agree in those bits have different codes, and any others have equal ones with a chance of
    2^-64 over the draw. Among n states a pair is confused with a chance below n²/2^65: 3e-4 for 1e8 states.

    Args:
        bits: m.
        seed: of the draw.
    """

    def __init__(self, bits: int, seed: int = 0) -> None:
        further = max(bits - _CODE_BITS, 0)
        flips = np.random.default_rng(seed).random((_CODE_BITS, further)) < 0.5
        self._sources = [np.flatnonzero(row) + _CODE_BITS for row in flips]

    def __call__(self, planes: UInt64[Words, "bits words"]) -> UInt64[NDArray[np.uint64], " lanes"]:
        """The code of the state in every lane."""
        digits = planes[:_CODE_BITS]
        if len(planes) > _CODE_BITS:
            digits = digits.copy()
            for digit, sources in zip(digits, self._sources, strict=True):
                digit ^= np.bitwise_xor.reduce(planes[sources], axis=0)
        return to_integers(digits).astype(np.uint64, copy=False)


class DistinctCount:
    """Counts different codes, in bounded memory.

    Codes are kept in one array that is sorted in place. When different ones fill more than half of it, only every
    second of them, chosen by value, is kept from then on, then every fourth, …: the count is then an estimate
    with a relative standard error of at most 2/√capacity.

    Args:
        capacity: codes kept at most, of eight bytes each, at least 2; memory is taken as it fills.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._codes = np.empty(capacity, np.uint64)
        self._used = 0
        self._halvings = 0

    def add(self, codes: UInt64[NDArray[np.uint64], " codes"]) -> None:
        """Take up codes, repeated or not."""
        half = len(self._codes) // 2
        for start in range(0, len(codes), half):
            kept = self._kept(codes[start : start + half])
            if self._used + len(kept) > len(self._codes):
                self._compact()
                while self._used > half:
                    self._halvings += 1
                    self._compact()
                kept = self._kept(kept)
            self._codes[self._used : self._used + len(kept)] = kept
            self._used += len(kept)

    def result(self) -> tuple[int, bool]:
        """The number of different codes, and whether it is exact."""
        self._compact()
        return self._used << self._halvings, self._halvings == 0

    def _kept(self, codes: UInt64[NDArray[np.uint64], " codes"]) -> UInt64[NDArray[np.uint64], " _kept"]:
        if not self._halvings:
            return codes
        kept: NDArray[np.uint64] = codes[codes * _SPREAD >> np.uint64(_CODE_BITS - self._halvings) == 0]
        return kept

    def _compact(self) -> None:
        """Sort, and drop repetitions and codes that are not kept, in blocks so that nothing is copied as a whole."""
        codes = self._codes[: self._used]
        codes.sort()
        self._used = 0
        last: np.uint64 | None = None
        for start in range(0, len(codes), _BLOCK):
            block = codes[start : start + _BLOCK]
            first = np.ones(len(block), np.bool_)
            first[1:] = block[1:] != block[:-1]
            first[0] = last is None or block[0] != last
            last = block[-1]
            fresh = self._kept(block[first])
            codes[self._used : self._used + len(fresh)] = fresh
            self._used += len(fresh)
