"""The network, and a stack of members: networks of one shape with an axis of their own (docs/theory.md, section 3)."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Literal, TypeVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ntk_ensembles.errors import OptionError, check_choice, check_range, check_seed

Init = Literal["gaussian", "antisymmetric"]
"""``gaussian``: all weights i.i.d. N(0, 1), the paper's. ``antisymmetric``: the second half of the hidden
units repeats the first with its output weights negated, so that the network starts at exactly 0."""

INITS: tuple[Init, ...] = get_args(Init)

WIDTH_MAX = FEATURES_MAX = 1 << 24
MEMBER_MAX = (1 << 32) - 1

_NUMBERS_AT_ONCE = 1 << 16
"""Weights drawn by one call of the generator. Another value means other members. A GPU fills a tensor of this
size with the same numbers whatever its number of multiprocessors, which is not so for larger ones."""


class TwoLayerMLP(nn.Module):
    """f(x) = W2·relu(W1·x/√k)/√n: two layers, no biases, NTK parameterization (docs/theory.md, section 3).

    Args:
        in_features: k, the inputs' dimension, at least 1.
        out_features: m, the outputs' dimension, at least 1.
        width: n, the number of hidden units, 1 to 16777216.
        device: Where the weights lie; PyTorch's default device if None.
        dtype: Type of the weights; PyTorch's default type if None.
        generator: Source of the initial weights, which are i.i.d. N(0, 1); PyTorch's global one if None. It must
            be of the same device.

    Attributes:
        hidden: W1, shape (width, in_features); the 1/√k is in `forward`.
        readout: W2, shape (out_features, width); likewise, with 1/√n.

    Raises:
        OptionError: A size outside its range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(in_features, out_features, width)
        self.hidden = nn.Parameter(torch.empty(width, in_features, device=device, dtype=dtype))
        self.readout = nn.Parameter(torch.empty(out_features, width, device=device, dtype=dtype))
        with torch.no_grad():
            for weights in (self.hidden, self.readout):
                weights.normal_(generator=generator)

    def forward(self, x: Float[Tensor, "inputs in_features"]) -> Float[Tensor, "inputs out_features"]:
        """Return the network's outputs at a batch of inputs."""
        width, features = self.hidden.shape
        return torch.relu(x @ self.hidden.mT / math.sqrt(features)) @ self.readout.mT / math.sqrt(width)

    def extra_repr(self) -> str:
        """Show the three sizes."""
        width, features = self.hidden.shape
        return f"in_features={features}, out_features={len(self.readout)}, width={width}"


class MLPStack(nn.Module):
    """Members of an ensemble side by side: the weights of several `TwoLayerMLP` in two parameters.

    The layout is that of `torch.func.stack_module_state`. Member i of an ensemble is a function of (seed, i)
    and the type of the device alone; its weights are drawn in float32, whatever type they are kept in.

    Args:
        in_features: k, the inputs' dimension, at least 1.
        out_features: m, the outputs' dimension, at least 1.
        width: n, the hidden units of each member, 1 to 16777216; even if ``init`` is "antisymmetric".
        members: Number of members, which are then 0, 1, …; or their indices in the ensemble, each at most 2³² − 1.
        seed: Seed of the ensemble, 0 to 2⁶³ − 1.
        init: How the weights are drawn, "gaussian" or "antisymmetric".
        device: Where the weights lie; PyTorch's default device if None.
        dtype: Type of the weights; PyTorch's default type if None.
        draw: Pass False to leave the weights uninitialised, for `load_state_dict`.

    Attributes:
        indices: Indices of the members in their ensemble.
        hidden: W1 of every member, shape (members, width, in_features).
        readout: W2 of every member, shape (members, out_features, width).

    Raises:
        OptionError: A size, a seed or an index outside its range, or an unknown ``init``.
        MemoryError: The weights do not fit into memory.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        width: int,
        members: int | Sequence[int],
        *,
        seed: int = 0,
        init: Init = "gaussian",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        draw: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes(in_features, out_features, width)
        check_seed("seed", seed)
        check_choice("init", init, INITS)
        if init == "antisymmetric" and width % 2:
            raise OptionError("width", width, "an even number with antisymmetric initialisation")
        self.indices = tuple(range(members)) if isinstance(members, int) else tuple(members)
        if not self.indices:
            raise OptionError("members", members, "at least one member")
        for index in self.indices:
            check_range("members", index, 0, MEMBER_MAX)
        self.seed = seed
        self.init: Init = init
        count = len(self.indices)
        try:
            hidden = torch.empty(count, width, in_features, device=device, dtype=dtype)
            readout = torch.empty(count, out_features, width, device=device, dtype=dtype)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # A CPU allocation that fails has no type of its own; nothing else can fail here.
            raise MemoryError(f"{count} members of width {width} do not fit into memory") from error
        self.hidden, self.readout = nn.Parameter(hidden), nn.Parameter(readout)
        if draw:
            map_members(self.redraw, range(count), self.hidden.device)

    def __len__(self) -> int:
        """Return the number of members."""
        return len(self.indices)

    def forward(self, x: Float[Tensor, "inputs in_features"]) -> Float[Tensor, "members inputs out_features"]:
        """Return every member's outputs at a batch of inputs, differentiable in the weights and the inputs."""
        # Made anew for each call: a submodule on "meta" could not be moved to a device.
        forward = forward_of(self.hidden, self.readout)
        outputs: Tensor = vmap(forward, in_dims=(0, None))({"hidden": self.hidden, "readout": self.readout}, x)
        return outputs

    def member(self, position: int) -> TwoLayerMLP:
        """Return a copy of one member as a network of its own.

        Args:
            position: Which of this stack's members, 0 to ``len(self) − 1``.
        """
        return self._network(self.hidden[position], self.readout[position])

    def initial(self, position: int) -> TwoLayerMLP:
        """Return one member as it was before training, drawn again from its seed; ``position`` as for `member`."""
        hidden, readout = torch.empty_like(self.hidden[position]), torch.empty_like(self.readout[position])
        self._draw(self.indices[position], hidden, readout)
        return self._network(hidden, readout)

    @torch.no_grad()
    def redraw(self, position: int) -> None:
        """Set one member back to its initial weights, in place; ``position`` as for `member`."""
        self._draw(self.indices[position], self.hidden[position], self.readout[position])

    def _network(self, hidden: Tensor, readout: Tensor) -> TwoLayerMLP:
        network = TwoLayerMLP(hidden.shape[1], len(readout), len(hidden), device="meta")
        network.to_empty(device=hidden.device).to(hidden.dtype)
        network.load_state_dict({"hidden": hidden, "readout": readout})
        return network

    def _draw(self, index: int, hidden: Tensor, readout: Tensor) -> None:
        """Write the initial weights of the member with this index."""
        generator = torch.Generator(hidden.device).manual_seed(member_seed(self.seed, index))
        if self.init == "gaussian":
            _fill(hidden, generator)
            _fill(readout, generator)
            return
        half = len(hidden) // 2
        _fill(hidden[:half], generator)
        hidden[half:] = hidden[:half]
        first = torch.empty(len(readout), half, device=readout.device, dtype=readout.dtype)
        _fill(first, generator)
        readout[:, :half], readout[:, half:] = first, -first

    def extra_repr(self) -> str:
        """Show the number of members and the three sizes."""
        members, width, features = self.hidden.shape
        return f"members={members}, in_features={features}, out_features={self.readout.shape[1]}, width={width}"


def forward_of(
    hidden: Float[Tensor, "*members width in_features"], readout: Float[Tensor, "*members out_features width"]
) -> Callable[[Mapping[str, Tensor], Tensor], Tensor]:
    """Return `TwoLayerMLP.forward` as a pure function of one member's weights, by name, and the inputs.

    Args:
        hidden: Weights whose shape says what networks these are.
        readout: The same of the second layer.
    """
    # Only its `forward` is used, so it needs no memory.
    network = TwoLayerMLP(hidden.shape[-1], readout.shape[-2], hidden.shape[-2], device="meta")

    def forward(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        outputs: Tensor = functional_call(network, dict(weights), (x,))
        return outputs

    return forward


def member_seed(seed: int, index: int) -> int:
    """Return the generator seed of one member.

    A CPU generator uses 32 bits of its seed. For a fixed ensemble seed this maps indices below 2³² to
    distinct values (each step can be undone), so no two members of an ensemble are alike.
    """
    value = index & 0xFFFFFFFF
    for factor in (0x7FEB352D, 0x846CA68B):
        value = (value ^ value >> 16) * factor & 0xFFFFFFFF
        value ^= value >> 15
    return value ^ (seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019 & 0xFFFFFFFFFFFFFFFF) >> 32


def _fill(weights: Tensor, generator: torch.Generator) -> None:
    """Fill a tensor with N(0, 1), row by row of its contiguous layout."""
    numbers = weights if weights.is_contiguous() else torch.empty_like(weights, memory_format=torch.contiguous_format)
    for part in torch.split(numbers.view(-1), _NUMBERS_AT_ONCE):
        if part.dtype == torch.float32:
            part.normal_(generator=generator)
        else:
            part.copy_(torch.empty_like(part, dtype=torch.float32).normal_(generator=generator))
    if numbers is not weights:
        weights.copy_(numbers)


def _check_sizes(in_features: int, out_features: int, width: int) -> None:
    check_range("in_features", in_features, 1, FEATURES_MAX)
    check_range("out_features", out_features, 1, FEATURES_MAX)
    check_range("width", width, 1, WIDTH_MAX)


T = TypeVar("T")
R = TypeVar("R")


def allowed_cores() -> int:
    """Return the number of cores that the system lets this process use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_workers() -> int:
    """Return how many members are worked on at the same time on a CPU: the cores that this process may use."""
    return min(allowed_cores(), torch.get_num_threads())


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread meanwhile: small operations gain nothing by several, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def map_members(work: Callable[[T], R], over: Iterable[T], device: torch.device) -> list[R]:
    """Apply a function to members, or to parts of a stack, without recording gradients.

    On a CPU every item is computed by one thread, so that a member's numbers depend neither on the number of
    cores nor on the other members. On any other device the items follow one another.

    Args:
        work: Function of one item.
        over: The items.
        device: Where the members lie.

    Returns:
        The results, in order.
    """
    items = list(over)
    # Threads inherit neither `no_grad` nor inference mode, nor the number of threads of an operation.
    inference = torch.is_inference_mode_enabled()
    work = torch.inference_mode(inference)(torch.no_grad()(work))
    if device.type != "cpu":
        return [work(item) for item in items]
    if len(items) < 2 or cpu_workers() == 1 or getattr(_THREAD, "is_worker", False):
        with one_thread():
            return [work(item) for item in items]
    # Several items at a time where there are many, which are small: handing one over takes as long as some of them.
    size = -(-len(items) // (16 * cpu_workers()))
    shares = [items[start : start + size] for start in range(0, len(items), size)]
    futures = [_workers(cpu_workers()).submit(lambda share: [work(item) for item in share], share) for share in shares]
    try:
        return [result for future in futures for result in future.result()]
    finally:
        # Whoever goes on after an error needs the memory of those that still work.
        for future in futures:
            future.cancel()
        wait(futures)


_THREAD = threading.local()
_POOLS: dict[int, ThreadPoolExecutor] = {}
"""Threads that work on members, by their number. They stay: what libraries hold for a thread is not freed with it."""

# The threads are not there in a process that was forked.
os.register_at_fork(after_in_child=_POOLS.clear)


def _workers(count: int) -> ThreadPoolExecutor:
    def begin() -> None:
        torch.set_num_threads(1)
        _THREAD.is_worker = True

    if count not in _POOLS:
        _POOLS[count] = ThreadPoolExecutor(count, initializer=begin)
    return _POOLS[count]
