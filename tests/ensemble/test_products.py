"""Products by either library against float64, whatever is transposed, sliced or empty."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ntk_ensembles.ensemble import products
from ntk_ensembles.ensemble.products import add_product, members_together, processor, product, stored, units_at_once

LIBRARIES = [False, pytest.param(True, marks=pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason=""))]


def take(onednn: bool, monkeypatch: pytest.MonkeyPatch, few: int = 1) -> None:
    """Multiply by one of the libraries, oneDNN from a number of multiplications on, whatever processor this is."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: onednn)
    monkeypatch.setattr(products, "_FEW_MULTIPLICATIONS", few)


def forms(matrix: Tensor) -> list[Tensor]:
    """The same numbers as rows, as a transposed view of rows, and as columns of a wider matrix."""
    wider = torch.full((len(matrix), matrix.shape[1] + 3), torch.nan, dtype=matrix.dtype)
    wider[:, 2:-1] = matrix
    return [matrix, matrix.T.contiguous().T, wider[:, 2:-1]]


@pytest.mark.parametrize("onednn", LIBRARIES)
@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("inner", [1, 2, 33])
@pytest.mark.parametrize("columns", [1, 2, 17])
def test_products_are_those_of_float64(
    rows: int, inner: int, columns: int, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(onednn, monkeypatch)
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
    expected = left.double() @ right.double()
    # float32 sums of at most 33 terms of size 1; bfloat16 has 8 bits, in both factors and in the result.
    for factors in itertools.product([*forms(left), stored(left, columns)], [*forms(right), stored(right, rows)]):
        torch.testing.assert_close(product(*factors).double(), expected, rtol=0, atol=1e-5)
        total = torch.ones(rows, columns)
        add_product(total, *factors, alpha=-2.0)
        torch.testing.assert_close(total.double(), 1 - 2 * expected, rtol=0, atol=2e-5)
    low = product(left.bfloat16(), right.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), expected, rtol=2**-7, atol=2**-7 * inner**0.5 * 2)


@pytest.mark.parametrize("onednn", LIBRARIES)
@pytest.mark.parametrize("members", [1, 3, 20])
@pytest.mark.parametrize("few", [1, 1 << 22])
def test_members_are_multiplied_each_by_itself(
    members: int, few: int, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(onednn, monkeypatch, few)
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(members, 5, 9, generator=generator), torch.randn(members, 9, 7, generator=generator)
    expected = torch.einsum("eij,ejk->eik", left.double(), right.double())
    torch.testing.assert_close(product(left, right).double(), expected, rtol=0, atol=1e-5)
    total = torch.ones(members, 5, 7)
    add_product(total, left, right, alpha=-2.0)
    torch.testing.assert_close(total.double(), 1 - 2 * expected, rtol=0, atol=2e-5)
    shared = torch.einsum("ij,ejk->eik", left[0].double(), right.double())
    torch.testing.assert_close(product(left[0], right).double(), shared, rtol=0, atol=1e-5)


@pytest.mark.parametrize("onednn", LIBRARIES)
def test_products_without_terms_are_zero(onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    take(onednn, monkeypatch)
    assert product(torch.zeros(2, 0), torch.zeros(0, 3)).tolist() == [[0.0] * 3] * 2
    assert product(torch.zeros(0, 4), torch.zeros(4, 3)).shape == (0, 3)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a PyTorch without oneDNN")
def test_small_products_are_left_to_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    take(True, monkeypatch, few=6 * 7 * 8)
    left, right, calls = torch.randn(6, 7), torch.randn(7, 8), []
    by_onednn = products._by_onednn
    monkeypatch.setattr(products, "_by_onednn", lambda *factors: calls.append(factors) or by_onednn(*factors))
    for count, columns in ((0, 7), (1, 8)):
        some = right[:, :columns].contiguous()
        assert product(left, some).shape == (6, columns)
        assert (len(calls), stored(left, columns).is_mkldnn, stored(some, 6).is_mkldnn) == (count, *[count == 1] * 2)
    # A factor that is stored already has no other way to go.
    add_product(torch.zeros(6, 7), stored(left, 8), torch.randn(7, 7))
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(st.integers(1, 40), st.integers(1, 70), st.sampled_from([1, 2, 5, 31, 100, 255, 511, 512]), st.integers(2, 20))
@settings(max_examples=60, deadline=None)
def test_products_of_small_members_do_not_depend_on_the_others(
    dtype: torch.dtype, rows: int, inner: int, columns: int, members: int
) -> None:
    """To the bit: a library rounds by the number of matrices, their layout and the address that they begin at."""
    assert members_together(rows, inner, columns) > 1
    generator = torch.Generator().manual_seed(0)
    # Slices of wider matrices, as hidden units are.
    left = torch.randn(members, rows, inner + 3, generator=generator, dtype=dtype)[:, :, :inner]
    right = torch.randn(members, inner + 1, columns, generator=generator, dtype=dtype)[:, :inner]
    for one, other in ((left, right), (right.mT, left.mT)):
        together = product(one, other)
        torch.testing.assert_close(together.double(), one.double() @ other.double(), rtol=0, atol=1e-4)
        for part in (slice(0, 1), slice(members - 1, members), slice(1, members)):
            assert torch.equal(product(one[part], other[part]), together[part])


def test_slices_are_of_the_device_and_what_no_system_tells_is_none() -> None:
    assert units_at_once(torch.device("cpu")) == 512
    assert units_at_once(torch.device("meta")) == 1024
    assert processor("no such field") is None


def test_without_the_file_nothing_is_known_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: object, encoding: str) -> str:
        raise FileNotFoundError

    monkeypatch.setattr("pathlib.Path.read_text", missing)
    assert processor("model name") is None
