"""torchrun that leaves last words: ``python -m videojob_worker.launch`` takes torchrun's arguments.

torchrun exits with 1 whatever became of its ranks, and stops the others when one dies. So a rank that was killed leaves
nothing, and the others only that they were asked to stop; this process is the only one that knows. Each rank runs
``__main__``, which leaves the last words of every other end.
"""

from __future__ import annotations

import logging
import signal
import sys
from typing import Any, NoReturn

from videojob_api.progress import Outcome, Reason

from . import report, settings

log = logging.getLogger(__name__)


def main() -> None:
    """Run the ranks of this node until all have ended."""
    config = settings.read()

    def stop(number: int, _frame: Any) -> NoReturn:
        _terminated(config, number)

    # torchrun heeds SIGTERM only once its ranks run, and the kernel spares a container's first process what it does not
    # heed: without this, a pod that is deleted while torch is being imported stays for its whole grace period.
    signal.signal(signal.SIGTERM, stop)
    _run(config)


def _run(config: settings.Settings) -> None:
    from torch.distributed import DistError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        torchrun.run(torchrun.parse_args(sys.argv[1:]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # that one was torchrun's own
                _leave(config, Reason.RANK_KILLED, killed(rank, -failure.exitcode))
        sys.exit(1)
    except DistError as error:
        log.exception("no rendezvous")
        _leave(config, Reason.PEER_LOST, f"this node and the first one did not find, or lost, each other: {error}")
        sys.exit(1)
    except SignalException as error:
        _terminated(config, error.sigval)


def _terminated(config: settings.Settings, number: int) -> NoReturn:
    _leave(config, Reason.TERMINATED, f"the worker was asked to stop ({signal.Signals(number).name})")
    sys.exit(128 + number)


def killed(rank: int, number: int) -> str:
    """What is said of a rank that a signal ended."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    remedy = {
        "SIGKILL": "where the node was out of memory, raise spec.resources.memory",
        "SIGBUS": "where /dev/shm was full, raise spec.resources.sharedMemory",
    }.get(name, "the log may say more")
    return f"rank {rank} was killed by {name}: {remedy}"


def _leave(config: settings.Settings, reason: Reason, message: str) -> None:
    words = report.last_words(Outcome.FAILED, reason, message, retryable=True, attempt=config.attempt)
    report.leave(words, config.last_words)


if __name__ == "__main__":
    main()
