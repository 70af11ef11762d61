"""Matrix products of members by the library that is fastest here, and what else is chosen by the device."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

_UNITS_AT_ONCE = {"cpu": 512}
_UNITS_AT_ONCE_ELSEWHERE = 1024

_FEW_MULTIPLICATIONS = 1 << 22
"""Multiplications in a product below which oneDNN is slower than MKL, as a call of it takes at least 25 µs: on an AMD
EPYC with AVX-512 both take 80 µs for 32 x 256 by 256 x 512."""

_MULTIPLICATIONS_TOGETHER, _MEMBERS_TOGETHER = 1 << 23, 16
"""Multiplications in the products of small members that are one call, about a core's cache of numbers; and their
largest number, from which on the time of the calls does not count."""


def units_at_once(device: torch.device) -> int:
    """Return the number of hidden units of a slice, in which members are trained and evaluated.

    On a CPU the slice of one member and what is computed from it fit a core's cache. On a GPU, where no value has
    been measured, it limits what is in memory beside the weights.
    """
    return _UNITS_AT_ONCE.get(device.type, _UNITS_AT_ONCE_ELSEWHERE)


def product(
    left: Float[Tensor, "... rows inner"],
    right: Float[Tensor, "*members inner columns"],
    out: Float[Tensor, "*members rows columns"] | None = None,
) -> Float[Tensor, "*members rows columns"]:
    """Return ``left @ right`` of each member.

    On a GPU they are one call, with float32 or TF32 as PyTorch is set to (float32 unless the user says otherwise);
    whether a loop would be faster for large members is not measured. On a CPU large members follow one another, as do
    all in bfloat16, since a call for a batch takes longer; small ones are computed in batches of `members_together`.

    Args:
        left: A factor, or what `stored` made of one. A transposed view of rows costs no copy, here and in ``right``.
        right: The other factor, of the same type; or of one dimension more, for members that share ``left``.
        out: Memory that may be used for the result.
    """
    if right.dim() == 2:
        return _by_onednn(left, right) if _takes_onednn(left, right) else torch.mm(left, right, out=out)
    if right.device.type != "cpu":
        return torch.matmul(left, right, out=out)
    lefts = left.expand(len(right), *left.shape[-2:])
    if _is_batch(left, right):
        return _by_batches(lefts, right)
    outs = [None] * len(right) if out is None else list(out)
    products = [product(*member) for member in zip(lefts, right, outs, strict=True)]
    return products[0][None] if len(products) == 1 else torch.stack(products)


def add_product(
    total: Float[Tensor, "*members rows columns"],
    left: Float[Tensor, "*members rows inner"],
    right: Float[Tensor, "*members inner columns"],
    alpha: float = 1.0,
) -> None:
    """Add ``alpha * left @ right`` of each member to a total, in place.

    Args:
        total: Where it is added, in the total's type: sums of bfloat16 products can be kept in float32.
        left: A factor, as in `product`.
        right: The other factor.
        alpha: What the product is multiplied by.
    """
    several_on_cpu = total.dim() == 3 and total.device.type == "cpu"
    if several_on_cpu and not _is_batch(left, right):
        for member in zip(total, left, right, strict=True):
            add_product(*member, alpha)
    elif several_on_cpu or left.dtype != total.dtype or _takes_onednn(left, right):
        total.add_(product(left, right), alpha=alpha)
    elif total.dim() == 2:
        total.addmm_(left, right, alpha=alpha)
    else:
        total.baddbmm_(left, right, alpha=alpha)


def stored(factor: Float[Tensor, "*members rows columns"], others: int) -> Tensor:
    """Return a factor of many products in a form in which it need not be copied for each of them.

    Args:
        factor: What stands in the products as it is, not transposed.
        others: Columns of the products if the factor is the left one, rows if it is the right one.
    """
    return factor.to_mkldnn() if factor.dim() == 2 and _gains_by_onednn(factor, others) else factor


@cache
def onednn_is_faster() -> bool:
    """Return whether oneDNN multiplies float32 matrices faster than MKL, which PyTorch calls for them.

    On processors that are not Intel's, MKL uses vectors of half the length: on an AMD EPYC with AVX-512 it does
    100 GFLOP/s a core, and oneDNN, which is part of PyTorch too, 200. Decided by what processor this is and not
    by timing, so that the same machine always gives the same numbers.
    """
    has_both = torch.backends.mkl.is_available() and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_both and wide and processor("vendor_id") == "AuthenticAMD"


def processor(field: str) -> str | None:
    """Return what the system tells about the processor, or None if it does not tell.

    Args:
        field: A name in Linux's ``/proc/cpuinfo``, such as "model name".
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), None)


def members_together(rows: int, inner: int, columns: int) -> int:
    """Return how many members have their products of these sizes computed as one batch, on a CPU.

    One where the products are large. Small ones are computed in batches, as a call takes longer than some of them.

    Args:
        rows: Rows of the left factor.
        inner: Its columns, and the rows of the right one.
        columns: Columns of the right factor.
    """
    multiplications = rows * inner * columns
    if multiplications >= _FEW_MULTIPLICATIONS:
        return 1
    return min(_MULTIPLICATIONS_TOGETHER // max(multiplications, 1), _MEMBERS_TOGETHER)


def _is_batch(left: Tensor, right: Tensor) -> bool:
    return left.dtype != torch.bfloat16 and members_together(left.shape[-2], left.shape[-1], right.shape[-1]) > 1


def _by_batches(left: Float[Tensor, "members rows inner"], right: Float[Tensor, "members inner columns"]) -> Tensor:
    """Return ``left @ right`` of small members.

    How MKL rounds depends on the number of members in a batch, on their layout, and on whether the matrices of a member
    begin at a multiple of 64 bytes. So all batches have the same number of members, and all sizes are multiples of
    four: 16 numbers are 64 bytes. What is missing is filled up with zeros. Then a member's numbers do not depend on
    the others.
    """
    size = members_together(left.shape[-2], left.shape[-1], right.shape[-1])
    products = [
        torch.bmm(*(_filled_up(factor[start : start + size], size) for factor in (left, right)))
        for start in range(0, len(left), size)
    ]
    result = products[0] if len(products) == 1 else torch.cat(products)
    return result[: len(left), : left.shape[1], : right.shape[2]]


def _filled_up(factor: Float[Tensor, "members rows columns"], members: int) -> Float[Tensor, "_ _ _"]:
    """Return a factor with zeros around it, rows of contiguous memory or, if it is one, a transposed view of such."""
    if factor.stride(-1) != 1:
        return _filled_up(factor.mT, members).mT
    shape = (members, *(-(-size // 4) * 4 for size in factor.shape[1:]))
    if factor.shape == shape:
        return factor.contiguous()
    filled = factor.new_zeros(shape)
    filled[: len(factor), : factor.shape[1], : factor.shape[2]] = factor
    return filled


def _takes_onednn(left: Tensor, right: Tensor) -> bool:
    is_stored = left.is_mkldnn or right.is_mkldnn
    return is_stored or _gains_by_onednn(left, right.shape[-1])


def _gains_by_onednn(factor: Tensor, others: int) -> bool:
    is_large = factor.shape[-2] * factor.shape[-1] * others >= _FEW_MULTIPLICATIONS
    return is_large and factor.device.type == "cpu" and factor.dtype == torch.float32 and onednn_is_faster()


def _by_onednn(left: Float[Tensor, "rows inner"], right: Float[Tensor, "inner columns"]) -> Tensor:
    """Return ``left @ right`` by what oneDNN does for a linear layer, forwards or backwards.

    Which of the three products of such a layer it is depends on what is transposed, so that no transposed view is
    copied. They want one factor in oneDNN's own storage, which is a copy, so let ``left`` be the smaller one.
    """
    aten = torch.ops.aten
    result: Tensor
    if not right.is_mkldnn and right.stride(0) == 1 and len(right) > 1:
        result = functional.linear(_in_onednn(left), right.mT).to_dense()
    elif not left.is_mkldnn and left.stride(0) == 1 and len(left) > 1:
        (result, _) = aten.mkldnn_linear_backward_weights(_in_onednn(left.mT), _in_onednn(right), right, False)
    else:
        size, right = [len(left), right.shape[1]], right.to_dense() if right.is_mkldnn else right
        result = aten.mkldnn_linear_backward_input(size, _in_onednn(left), right).to_dense()
    return result


def _in_onednn(factor: Tensor) -> Tensor:
    return factor if factor.is_mkldnn else factor.to_mkldnn()
