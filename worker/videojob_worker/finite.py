"""Watches what a stage computes for NaN and infinity without making the GPU wait for the host.

``pipeline`` shows it what enters and what leaves the stage at every turn. A stage whose input is sound and whose output
is not knows by itself that it is the first, so nothing travels between ranks. On CUDA the two flags of a turn are
copied in the background and read when they have arrived, a turn or two later; one reduction a tensor is all it costs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import NotFiniteError
from .place import spell

REMEDY = (
    "set VIDEOJOB_DTYPE to a wider type (bfloat16 instead of float16, or float32) or lower "
    "spec.sampling.guidanceScale; where neither helps, the model's weights are broken"
)


@dataclass(frozen=True)
class _Seen:
    where: str
    flags: Tensor  # input and output finite, two booleans on the host
    has_arrived: Callable[[], bool]


class Finite:
    """The watch over one stage.

    Args:
        layers: the stage's.
        is_first: whether latents enter it, which no other stage has checked.
    """

    def __init__(self, layers: range, *, is_first: bool) -> None:
        self._layers = layers
        self._is_first = is_first
        self._pending: deque[_Seen] = deque()

    def watch(self, where: str, entered: Tensor, left: Tensor) -> None:
        """Look at a turn's input and output.

        Raises:
            NotFiniteError: this or an earlier turn went wrong in this stage.
        """
        self._pending.append(_fetch(where, torch.stack((_sound(entered), _sound(left)))))
        self._judge()

    def settle(self) -> None:
        """Wait for the flags that are under way, and judge them.

        Raises:
            NotFiniteError: a turn went wrong in this stage.
        """
        if self._pending:
            torch.cuda.synchronize()
        self._judge()

    def _judge(self) -> None:
        while self._pending and self._pending[0].has_arrived():
            seen = self._pending.popleft()
            entered, left = seen.flags.tolist()
            if not entered and self._is_first:
                raise NotFiniteError(f"the latents are NaN or infinite {seen.where}, after the step before: {REMEDY}")
            if entered and not left:
                raise NotFiniteError(f"{spell(self._layers)} gave NaN or infinity {seen.where}: {REMEDY}")


def check_contexts(contexts: Tensor) -> None:
    """Look at what the text encoder gave, once.

    Raises:
        NotFiniteError: it is NaN or infinite.
    """
    if not _sound(contexts):
        raise NotFiniteError(f"the text encoder gave NaN or infinity: {REMEDY}")


def _sound(tensor: Tensor) -> Tensor:
    """Whether all is finite, (); the largest magnitude is, and takes one pass without a copy."""
    largest: Tensor = torch.linalg.vector_norm(tensor, float("inf"))
    return largest.isfinite()


def _fetch(where: str, flags: Tensor) -> _Seen:
    if not flags.is_cuda:
        return _Seen(where, flags, lambda: True)
    host = flags.to("cpu", non_blocking=True)  # into pinned memory
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return _Seen(where, host, arrived.query)
