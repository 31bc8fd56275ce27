"""How ranks talk: one exchange a tick with the two neighbours in the ring, and a broadcast at the start.

``TorchLink`` is the only user of torch.distributed; ``LocalLink`` is its twin for stages that are threads of one
process. Knows nothing of what the tensors mean.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from .errors import PeerLostError
from .pulse import Board

POLL_S = 0.0005  # for the end of an exchange between GPUs; a turn takes hundreds of times as long


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
    which sides are empty. gloo reports a lost neighbour at once and bounds every wait. NCCL does neither to this
    thread, so here it runs at most one exchange ahead of its GPU, which costs nothing: that has a whole turn in hand.

    Args:
        device: of this rank's tensors.
        timeout: of an exchange with a rank that lives; ``pulse`` notices the others sooner.
        name: a rank for people.
    """

    def __init__(self, device: torch.device, timeout: timedelta, name: Callable[[int], str] = "rank {}".format) -> None:
        backend = "nccl" if device.type == "cuda" else "gloo"
        self._on_gpu = device.type == "cuda"
        bound = device if self._on_gpu else None
        try:
            dist.init_process_group(backend, timeout=timeout, device_id=bound)
        except (RuntimeError, TimeoutError) as error:
            raise PeerLostError(f"the ranks did not find each other within {timeout}: {error}") from error
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._pace = Pace(timeout) if self._on_gpu else None
        self._name = name

    def exchange(self, sent: Tensor | None, received: Tensor | None) -> None:
        """See ``Link``."""
        before, after = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        sides, peers = [], []
        if received is not None:
            sides.append(dist.P2POp(dist.irecv, received, before))
            peers.append(before)
        if sent is not None:
            sides.append(dist.P2POp(dist.isend, sent, after))
            peers.append(after)
        if not sides:
            return
        works: list[dist.Work] = []  # one a side over gloo, one of all over NCCL
        ended: list[dist.Work] = []
        try:
            works = dist.batch_isend_irecv(sides)
            for work in works:
                work.wait()
                ended.append(work)
        except RuntimeError as error:
            lost = [peers[len(ended)]] if len(works) == len(peers) else peers
            raise PeerLostError(f"lost {' or '.join(map(self._name, lost))}: {error}") from error
        if self._pace is not None:
            self._pace.keep(works)

    def broadcast(self, tensor: Tensor) -> None:
        """See ``Link``."""
        try:
            dist.broadcast(tensor, src=0)
        except RuntimeError as error:
            raise PeerLostError(f"lost {self._name(0)}: {error}") from error

    def close(self) -> None:
        """See ``Link``."""
        dist.destroy_process_group()


class Work(Protocol):
    """A transfer under way, as torch.distributed shows it."""

    def is_completed(self) -> bool:
        """Whether it has ended."""
        ...


class Pace:
    """Keeps this process at most one exchange ahead of its GPU, on which waiting for a transfer only puts it in line.

    Args:
        timeout: for an exchange to end.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._timeout = timeout
        self._before: Sequence[Work] = ()

    def keep(self, works: Sequence[Work]) -> None:
        """A new exchange was put in line: wait for the one before it.

        Raises:
            PeerLostError: it does not end.
        """
        deadline = time.monotonic() + self._timeout.total_seconds()
        while not all(work.is_completed() for work in self._before):
            if time.monotonic() > deadline:
                raise PeerLostError(f"no exchange with the neighbours ended for {self._timeout}")
            time.sleep(POLL_S)
        self._before = works


def board(timeout: timedelta) -> Board:
    """The counters that all ranks share: torchrun's own store on the first node, by a connection of its own.

    Raises:
        RuntimeError: it does not answer.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])  # which torch.distributed reads, too
    return TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)


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
                raise PeerLostError(f"waited in vain for rank {(self.rank - 1) % self.size}") from error
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
