"""How ranks talk: one exchange a tick with the two neighbours in the ring, and a broadcast at the start.

``TorchLink`` is the only user of torch.distributed; ``LocalLink`` is its twin for stages that are threads of one
process. Knows nothing of what the tensors mean.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import PeerLostError


class Link(Protocol):
    """A rank's end of the ring."""

    rank: int
    size: int

    def exchange(self, sent: Tensor | None, received: Tensor | None) -> None:
        """Send to the next rank and fill ``received`` from the previous one; None moves nothing on that side.

        Raises:
            PeerLostError: a neighbour vanished or did not answer in time.
        """
        ...

    def broadcast(self, tensor: Tensor) -> None:
        """Fill ``tensor`` on every rank with the first rank's."""
        ...

    def close(self) -> None:
        """Leave the ring."""
        ...


class TorchLink:
    """The ring over torch.distributed: NCCL on CUDA, gloo on the CPU.

    Both sides of a tick go into one batch, so that NCCL runs them as one group; every rank knows from the schedule
    which sides are empty.
    """

    def __init__(self, device: torch.device, timeout: timedelta) -> None:
        backend = "nccl" if device.type == "cuda" else "gloo"
        bound = device if device.type == "cuda" else None
        try:
            dist.init_process_group(backend, timeout=timeout, device_id=bound)
        except (RuntimeError, TimeoutError) as error:
            raise PeerLostError(f"the ranks did not find each other within {timeout}: {error}") from error
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def exchange(self, sent: Tensor | None, received: Tensor | None) -> None:
        """See ``Link``."""
        sides = []
        if received is not None:
            sides.append(dist.P2POp(dist.irecv, received, (self.rank - 1) % self.size))
        if sent is not None:
            sides.append(dist.P2POp(dist.isend, sent, (self.rank + 1) % self.size))
        if not sides:
            return
        try:
            for work in dist.batch_isend_irecv(sides):
                work.wait()
        except RuntimeError as error:
            raise PeerLostError(f"rank {self.rank} lost a neighbour in the ring: {error}") from error

    def broadcast(self, tensor: Tensor) -> None:
        """See ``Link``."""
        try:
            dist.broadcast(tensor, src=0)
        except RuntimeError as error:
            raise PeerLostError(f"rank {self.rank} lost the first rank while loading: {error}") from error

    def close(self) -> None:
        """See ``Link``."""
        dist.destroy_process_group()


class LocalLink:
    """One end of a ring of threads; ``LocalLink.ring(size)`` makes all ends."""

    def __init__(self, rank: int, pipes: Sequence[queue.SimpleQueue[Tensor]], together: _Together) -> None:
        self.rank = rank
        self.size = len(pipes)
        self._pipes = pipes  # pipes[r] leads into rank r
        self._together = together

    @classmethod
    def ring(cls, size: int, timeout_s: float = 60.0) -> list[LocalLink]:
        """The ends of one ring, by rank."""
        pipes: list[queue.SimpleQueue[Tensor]] = [queue.SimpleQueue() for _ in range(size)]
        together = _Together(size, timeout_s)
        return [cls(rank, pipes, together) for rank in range(size)]

    def exchange(self, sent: Tensor | None, received: Tensor | None) -> None:
        """See ``Link``."""
        if sent is not None:
            self._pipes[(self.rank + 1) % self.size].put(sent.clone())
        if received is not None:
            try:
                arrived = self._pipes[self.rank].get(timeout=self._together.timeout_s)
            except queue.Empty as error:
                raise PeerLostError(f"rank {self.rank} waited in vain for its neighbour") from error
            if arrived.shape != received.shape or arrived.dtype != received.dtype:
                raise RuntimeError(f"rank {self.rank} expected {received.shape}, got {arrived.shape}")
            received.copy_(arrived)

    def broadcast(self, tensor: Tensor) -> None:
        """See ``Link``."""
        self._together.share(self.rank, tensor)

    def close(self) -> None:
        """See ``Link``."""


class _Together:
    """A barrier with one slot, for broadcasts between threads."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._barrier = threading.Barrier(size)
        self._slot: Tensor | None = None

    def share(self, rank: int, tensor: Tensor) -> None:
        if rank == 0:
            self._slot = tensor
        self._barrier.wait(self.timeout_s)
        if rank != 0 and self._slot is not None:
            tensor.copy_(self._slot)
        self._barrier.wait(self.timeout_s)
