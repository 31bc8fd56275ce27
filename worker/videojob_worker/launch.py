"""torchrun that leaves last words: ``python -m videojob_worker.launch`` takes torchrun's arguments.

torchrun exits with 1 whatever became of its ranks, and stops the others when one dies. So a rank that was killed leaves
nothing, and the others only that they were asked to stop; this process is the only one that knows. Each rank runs
``__main__``, which leaves the last words of every other end.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Any, NoReturn

from pydantic import ValidationError

from videojob_api.progress import LastWords, Outcome, Reason

from . import report, settings

log = logging.getLogger(__name__)

SHUTDOWN_S = 110  # from SIGTERM to SIGKILL: time for the last checkpoint, within a pod's 120
PATIENCE_S = 25  # torchrun kills the ranks that have not ended 30 s after the first one

# What ends a rank whose GPU waits in vain; torchrun sets the first one itself, but only by default.
NCCL = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # a failed or overdue transfer aborts and ends the process
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "120",  # and so does a watchdog that is stuck itself
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",  # nobody would find the dump, and it delays the end
}


def main() -> None:
    """Run the ranks of this node until all have ended."""
    config = settings.read()

    def stop(number: int, _frame: Any) -> NoReturn:
        _terminated(config, number)

    # torchrun heeds SIGTERM only once its ranks run, and the kernel spares a container's first process what it does not
    # heed: without this, a pod that is deleted while torch is being imported stays for its whole grace period.
    signal.signal(signal.SIGTERM, stop)
    os.environ.update({**NCCL, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_S), **os.environ})
    _run(config)


def _run(config: settings.Settings) -> None:
    from torch.distributed import DistError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        torchrun.run(torchrun.parse_args(sys.argv[1:]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        first = min(failure.timestamp for failure in error.failures.values())
        for rank, failure in sorted(error.failures.items()):
            own = failure.exitcode == -signal.SIGTERM or failure.timestamp - first >= PATIENCE_S  # torchrun's
            if failure.exitcode < 0 and not own:
                _leave(config, Reason.RANK_KILLED, killed(rank, -failure.exitcode) + _seen(config))
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
        "SIGABRT": "a transfer between GPUs failed or was overdue, or a library gave up; the log says more",
        "SIGBUS": "where /dev/shm was full, raise spec.resources.sharedMemory",
    }.get(name, "the log may say more")
    return f"rank {rank} was killed by {name}: {remedy}"


def _seen(config: settings.Settings) -> str:
    """What the neighbour of a killed rank saw, which knows its layers, block and step."""
    if config.last_words is None or not config.last_words.exists():
        return ""
    try:
        words = LastWords.model_validate_json(config.last_words.read_text())
    except ValidationError:
        return ""
    return f" ({words.message})" if words.reason is Reason.PEER_LOST else ""


def _leave(config: settings.Settings, reason: Reason, message: str) -> None:
    words = report.last_words(Outcome.FAILED, reason, message, retryable=True, attempt=config.attempt)
    report.leave(words, config.last_words)


if __name__ == "__main__":
    main()
