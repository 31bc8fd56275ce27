"""torchrun's ranks end in every way, and the launcher leaves the last words that no rank could."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from videojob_api import names
from videojob_api.progress import LastWords, Outcome, Reason
from videojob_operator import job
from videojob_worker import __main__ as worker
from videojob_worker import launch
from videojob_worker.local import free_port

WAIT = "import signal\nprint('waiting', flush=True)\nsignal.pause()\n"
RANK_1_DOES = "import os, signal, sys\nif os.environ['RANK'] != '1':\n    signal.pause()\n"
LEAVE = """
from pathlib import Path
from videojob_api.progress import Outcome, Reason
from videojob_worker import report

words = report.last_words(Outcome.FAILED, Reason({reason!r}), "as the rank says", retryable=False, attempt=3)
report.leave(words, Path(os.environ["VIDEOJOB_LAST_WORDS"]))
"""


@dataclass
class Launch:
    """A launcher whose ranks run a script."""

    folder: Path

    def start(self, script: str, *options: str, ranks: int = 2) -> subprocess.Popen[str]:
        path = self.folder / "rank.py"
        path.write_text(script)
        command = [sys.executable, "-m", "videojob_worker.launch", f"--nproc-per-node={ranks}", "--max-restarts=0"]
        environment = {
            "OMP_NUM_THREADS": "1",
            **os.environ,
            names.ENV_SPEC: str(self.folder / "absent.json"),
            names.ENV_ATTEMPT: "3",
            names.ENV_LAST_WORDS: str(self.folder / "words"),
        }
        return subprocess.Popen(
            [*command, "--master-addr=127.0.0.1", f"--master-port={free_port()}", *options, str(path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *options: str, ranks: int = 2) -> int:
        with self.start(script, *options, ranks=ranks) as child:
            child.communicate()
        return child.returncode

    @property
    def words(self) -> LastWords | None:
        path = self.folder / "words"
        return LastWords.model_validate_json(path.read_text()) if path.exists() else None


@pytest.fixture
def launched(tmp_path) -> Launch:
    return Launch(tmp_path)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("SIGKILL", "raise spec.resources.memory"), ("SIGBUS", "raise spec.resources.sharedMemory")],
)
def test_a_rank_that_a_signal_ended_is_named_with_the_signal_and_the_remedy(launched, name, remedy):
    assert launched.run(RANK_1_DOES + f"os.kill(os.getpid(), signal.{name})") == 1
    words = launched.words
    assert (words.outcome, words.reason, words.retryable, words.attempt) == (Outcome.FAILED, "RankKilled", True, 3)
    assert words.message.startswith(f"rank 1 was killed by {name}: ")
    assert remedy in words.message


def test_a_reason_that_a_rank_gave_stays(launched):
    assert launched.run(RANK_1_DOES + LEAVE.format(reason="ModelNotFound") + "sys.exit(1)") == 1
    assert launched.words.reason is Reason.MODEL_NOT_FOUND
    assert launched.words.message == "as the rank says"


def test_a_killed_rank_is_the_reason_and_not_the_neighbours_that_lost_it(launched):
    assert launched.run(RANK_1_DOES + LEAVE.format(reason="PeerLost") + "os.kill(os.getpid(), signal.SIGKILL)") == 1
    assert launched.words.reason is Reason.RANK_KILLED


def test_the_launcher_makes_up_no_reason(launched):
    assert launched.run("raise ArithmeticError('odd')") == 1
    assert launched.words is None


def test_ranks_that_end_well_leave_it_nothing_to_say(launched):
    assert launched.run("print('done')") == 0
    assert launched.words is None


def test_a_launcher_that_is_asked_to_stop_ends_its_ranks_and_says_so(launched):
    with launched.start(f"import os\nprint(os.getpid(), flush=True)\n{WAIT}") as child:
        lines = [child.stdout.readline().strip() for _ in range(4)]
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM
    assert launched.words.reason is Reason.TERMINATED
    assert launched.words.retryable
    ranks = [int(line) for line in lines if line != "waiting"]
    assert len(ranks) == 2
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]


def heeds_sigterm(child: subprocess.Popen[str]) -> bool:
    status = Path(f"/proc/{child.pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)


def test_a_launcher_can_be_stopped_while_it_is_still_importing_torch(launched):
    with launched.start(WAIT) as child:
        while not heeds_sigterm(child):
            time.sleep(0.005)
        child.terminate()
        assert "waiting" not in child.communicate()[0], "no rank has begun"
    assert child.returncode == 128 + signal.SIGTERM
    assert launched.words.reason is Reason.TERMINATED


def test_ranks_have_as_long_as_a_pods_grace_allows_to_save_their_state(launched):
    assert launched.run(f"import os\nassert os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT'] == '{launch.SHUTDOWN_S}'") == 0
    assert worker.HURRY_S + worker.GRACE_S < launch.SHUTDOWN_S < job.GRACE_SECONDS


def test_that_time_is_what_torchrun_waits(launched, monkeypatch):
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")
    script = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)\n"
    with launched.start(script + "time.sleep(60)", ranks=1) as child:
        child.stdout.readline()
        begin = time.monotonic()
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=60)
    assert time.monotonic() - begin < 15, "30 s is torchrun's own default"


def test_a_first_node_that_does_not_answer_is_a_lost_peer(launched):
    options = ("--nnodes=2", "--node-rank=1", "--rdzv-conf=timeout=1")
    assert launched.run("print('never')", *options, ranks=1) == 1
    assert launched.words.reason is Reason.PEER_LOST
    assert "did not find" in launched.words.message


def test_an_unnamed_signal_is_given_by_number():
    assert launch.killed(4, 62).startswith("rank 4 was killed by signal 62: ")
