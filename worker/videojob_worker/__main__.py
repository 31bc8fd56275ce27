"""One rank of a render: ``torchrun -m videojob_worker``. Composes all other modules, and alone catches broadly.

The first rank also holds latents, encodes the prompts, decodes, publishes and reports; the others hold layers alone.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import safetensors.torch
import torch
import transformers
from diffusers import AutoencoderKLWan
from torch import Tensor

import videojob_api.plan
from videojob_api import validation
from videojob_api.plan import Plan
from videojob_api.progress import PERMANENT, Outcome, Reason, Stage
from videojob_api.spec import Spec, VideoJob

from . import checkpoint, conditions, models, report, sampler, settings, source, topology, wan
from .blocks import Blocks, noise
from .conditions import Conditions
from .decoder import StreamingDecoder
from .errors import InvalidSpecError, ModelInvalidError, PeerLostError, RenderError
from .keeper import Keeper
from .link import Link, TorchLink, board
from .models import Model
from .pipeline import Ring
from .place import Place
from .publisher import Publisher
from .pulse import Pulse
from .schedule import Turn
from .settings import Settings
from .store import FolderStore, Output, S3Store, Store
from .wan import WanStage

log = logging.getLogger("videojob_worker")

GRACE_S = 15.0  # from SIGTERM, or from the last checkpoint, to the end
HURRY_S = 80.0  # for the last checkpoint; together less than `launch.SHUTDOWN_S`
LOST_GRACE_S = 5.0  # from the loss of another rank to the end


def main() -> None:
    """Render, and leave last words whatever happens."""
    config = settings.read()
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s rank {config.rank} %(levelname)s %(message)s", stream=sys.stderr
    )
    _quiet_libraries()
    ending = Ending(config)
    ending.heed_sigterm()
    place = Place(config.rank)
    try:
        with _pulse(config, place, ending):
            message = render(config, ending, place)
    except SystemExit:  # by ``Ending``
        ending.tell_terminated()
        raise
    except Exception as error:
        reason, message = cause(error, place)
        log.error("%s: %s", reason, message, exc_info=None if isinstance(error, RenderError) else error)
        ending.tell(Outcome.FAILED, reason, message)
        sys.exit(1)
    if config.rank == 0:
        ending.tell(Outcome.SUCCEEDED, Reason.COMPLETED, message)


class Ending:
    """A rank's end: the first reason that it gives becomes its last words, and SIGTERM is one wherever it comes.

    An exception out of a signal's handler would strike anywhere, even between a lock's acquisition and its release, and
    the main thread may sit in C++, waiting for another rank. So the handler raises nothing. A thread that is woken at
    once leaves the words, does the last act and ends the process; while the ring turns, it first lets the main thread
    leave of itself, which looks every tick.
    """

    def __init__(self, config: Settings) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._told = self._asked = self._turns = False
        self.last_act: Callable[[], object] = _nothing
        """What is still to be done when SIGTERM has come; takes at most HURRY_S."""

    def tell(self, outcome: Outcome, reason: Reason, message: str) -> None:
        """Leave last words, unless some were left."""
        retryable = outcome is Outcome.FAILED and reason not in PERMANENT
        words = report.last_words(outcome, reason, message, retryable=retryable, attempt=self._config.attempt)
        with self._lock:
            if not self._told:
                report.leave(words, self._config.last_words)
                self._told = True

    def tell_terminated(self) -> None:
        """Say that SIGTERM came; on return, some last words are left."""
        self.tell(Outcome.FAILED, Reason.TERMINATED, f"rank {self._config.rank} was asked to stop (SIGTERM)")

    def heed_sigterm(self) -> None:
        """From now on SIGTERM ends this process, in an orderly way if it can, but before torchrun kills it."""
        woken, waking = os.pipe()
        os.set_blocking(waking, False)
        signal.set_wakeup_fd(waking)
        signal.signal(signal.SIGTERM, self._note)
        threading.Thread(target=self._await_sigterm, args=(woken,), name="sigterm", daemon=True).start()

    @contextmanager
    def turning(self) -> Iterator[Callable[[], None]]:
        """The ring turns; what is yielded is to be called every tick, and raises SystemExit once SIGTERM has come."""
        self._turns = True
        yield self._check
        self._turns = False

    def _check(self) -> None:
        if self._asked:
            sys.exit(1)

    def _note(self, _signum: int, _frame: Any) -> None:
        self._asked = True

    def _await_sigterm(self, woken: int) -> None:
        while os.read(woken, 1) != bytes([signal.SIGTERM]):
            pass  # other signals wake it, too
        try:
            self.tell_terminated()
            self.last_act()
            if self._turns:
                time.sleep(GRACE_S)
        finally:
            os._exit(1)


def cause(error: Exception, place: Place) -> tuple[Reason, str]:
    """What is said of an error."""
    if isinstance(error, PeerLostError):
        return error.reason, f"{place}: {error}"
    if isinstance(error, RenderError):
        return error.reason, str(error)
    if isinstance(error, torch.OutOfMemoryError):
        remedy = "use more GPUs, fewer dualParallel latents or a smaller video"
        return Reason.OUT_OF_MEMORY, f"{place}: out of GPU memory: {remedy}: {error}"
    if isinstance(error, MemoryError) or "not enough memory" in str(error):  # the latter is torch's
        remedy = "raise spec.resources.memory, or use more nodes, fewer dualParallel latents or a smaller video"
        return Reason.OUT_OF_MEMORY, f"{place}: out of memory: {remedy}: {error}"
    return Reason.CRASHED, f"{place}: {type(error).__name__}: {error}"


@contextmanager
def _pulse(config: Settings, place: Place, ending: Ending) -> Iterator[None]:
    """Show the other ranks that this one lives, and end where one of them does not."""
    if config.world_size == 1:
        yield
        return

    def lost(message: str) -> None:
        ending.tell(Outcome.FAILED, Reason.PEER_LOST, f"{place}: {message}")
        log.error("%s", message)
        os.kill(os.getpid(), signal.SIGTERM)  # orderly, if the main thread can
        time.sleep(LOST_GRACE_S)
        os._exit(1)

    silence = timedelta(seconds=config.peer_timeout_s)
    with Pulse(lambda: board(silence), config.rank, config.world_size, config.peer_timeout_s, place.name, lost):
        yield


def render(config: Settings, ending: Ending, place: Place | None = None) -> str:
    """This rank's part of the render; on the first rank, where the video is."""
    place = place or Place(config.rank)
    videojob = _videojob(config.spec)
    reporter = report.Reporter(videojob_api.plan.cut(videojob.spec), videojob.spec.video.fps, config.attempt, time.time)
    device = _device(config)
    with ExitStack() as stack:
        output = None
        if config.rank == 0:
            stack.enter_context(report.serving(reporter, config.port))
            output = stack.enter_context(Output.take(_store(config, videojob), videojob, config.attempt))
            ending.last_act = output.give_back
        model = models.read(source.fetch(videojob.spec.model.source, config.scratch))
        spec, grid = sampler.resolve(videojob.spec, model), model.grid(videojob.spec.video)
        plan = videojob_api.plan.plan(spec)
        place.shares = topology.shares(model.layers, config.world_size)
        layers = place.shares[config.rank]
        log.info("%s, %s", model.kind, sampler.used(spec))
        reporter.sampling(sampler.used(spec))
        stages = [wan.load(folder, layers, getattr(torch, config.dtype), device) for folder in model.experts]
        log.info("holds layers %d to %d of %d on %s", layers.start, layers.stop - 1, model.layers, device)
        link = TorchLink(device, timedelta(seconds=config.stall_timeout_s), place.name)
        scheduler = sampler.load(model, spec, device)
        shared = _conditions(spec, model, stages, link, scheduler.timesteps, config, device)
        if output is None:
            ring = Ring(plan, grid, stages, shared, link, None, _agreed(link, 0, device), place)
            with ending.turning() as check:
                ring.run(_nothing, check)
        else:
            keeper = _keeper(config, spec, model, grid, output, device)
            ending.last_act = keeper.hurry
            blocks = Blocks(plan, scheduler, noise(plan, model.channels, *grid, spec.sampling.seed), device)
            sweep = _agreed(link, _restore(keeper, plan, blocks, reporter), device)
            ring = Ring(plan, grid, stages, shared, link, blocks, sweep, place)
            publisher = Publisher(
                videojob,
                output=output,
                decoder=StreamingDecoder(load_vae(model.folder, device)),
                scratch=config.scratch,
                on_segment=lambda segment: reporter.segment_ready(segment.frames),
                finished=plan.clean_before(sweep),
                read=keeper.read,
            )
            _lead(config, ending, plan, ring, blocks, keeper, publisher, reporter)
        link.close()  # not after an error: it would wait for the other ranks
        return "" if output is None else output.url("")


def _keeper(
    config: Settings, spec: Spec, model: Model, grid: tuple[int, int], output: Output, device: torch.device
) -> Keeper:
    fingerprint = source.fingerprint(model.folder)
    return Keeper(
        output=output,
        identity=checkpoint.identity(spec, model=fingerprint, dtype=config.dtype, grid=grid),
        scratch=config.scratch,
        every_s=spec.checkpoint.every_seconds,
        device=device,
        hurry_s=HURRY_S,
    )


def _restore(keeper: Keeper, plan: Plan, blocks: Blocks, reporter: report.Reporter) -> int:
    """Bring the queue to where an older attempt was; the sweep to begin at."""
    found = keeper.newest()
    if found is None:
        return 0
    blocks.restore(found.snapshot)
    sweep = found.snapshot.sweep
    reporter.resumed(plan.turns_before(sweep), plan.clean_before(sweep))
    return sweep


def _agreed(link: Link, sweep: int, device: torch.device) -> int:
    """The first rank's sweep, on every rank."""
    shared = torch.tensor([sweep], dtype=torch.int64, device=device)
    if link.size > 1:
        link.broadcast(shared)
    return int(shared.item())


def _lead(
    config: Settings,
    ending: Ending,
    plan: Plan,
    ring: Ring,
    blocks: Blocks,
    keeper: Keeper,
    publisher: Publisher,
    reporter: report.Reporter,
) -> None:
    """The first rank's part: render, keep every sweep's state, publish every clean block at once, finish."""

    def on_result(turn: Turn, clean: Tensor | None) -> None:
        reporter.turn_done(block_done=clean is not None)
        if clean is not None:
            wanted = clean[:, :, : plan.wanted_latents(turn.block)]
            publisher.submit(turn.block, wanted)
            keeper.keep(turn.block, wanted)
            log.info("block %d of %d is clean", turn.block + 1, plan.blocks)
        if turn.ends_sweep:
            keeper.offer(blocks.snapshot(turn.sweep + 1))
            log.info("sweep %d of %d is done", turn.sweep + 1, plan.sweeps)

    with publisher, keeper:  # the keeper ends first, since the publisher's end stops all writing
        reporter.stage(Stage.RENDERING)
        with ending.turning() as check:

            def on_tick() -> None:
                check()
                publisher.check()
                keeper.check()

            ring.run(on_result, on_tick)
        reporter.stage(Stage.FINISHING)
        keeper.finish()
        if config.dump_latents is not None:
            latents = torch.cat([keeper.read(block) for block in range(plan.blocks)], dim=2)
            safetensors.torch.save_file({"latents": latents}, config.dump_latents)
        publisher.finish()
        keeper.remove()
    reporter.stage(Stage.SUCCEEDED)


def load_vae(folder: Path, device: torch.device) -> AutoencoderKLWan:
    """The VAE in float32, as its authors recommend.

    Raises:
        ModelInvalidError: it is missing or broken.
    """
    try:
        vae = AutoencoderKLWan.from_pretrained(
            folder, subfolder="vae", dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelInvalidError(f"the VAE in {folder} cannot be loaded: {error}") from error
    return vae.to(device).eval().requires_grad_(False)


def _videojob(path: Path) -> VideoJob:
    try:
        return validation.read(json.loads(path.read_text()))
    except OSError as error:
        raise InvalidSpecError(f"the VideoJob document {path} cannot be read: {error}") from error
    except (validation.InvalidVideoJobError, ValueError) as error:
        raise InvalidSpecError(f"the VideoJob document {path} is invalid: {error}") from error


def _device(config: Settings) -> torch.device:
    if config.device == "cpu":
        return torch.device("cpu")
    if config.local_rank >= torch.cuda.device_count():
        raise InvalidSpecError(
            f"rank {config.rank} wants GPU {config.local_rank}, but {torch.cuda.device_count()} are visible: "
            "set spec.gpusPerNode to 0 for CPU ranks, or ask for as many GPUs as there are"
        )
    torch.cuda.set_device(config.local_rank)
    return torch.device("cuda", config.local_rank)


def _store(config: Settings, videojob: VideoJob) -> Store:
    if config.output_dir is not None:
        return FolderStore(config.output_dir)
    return S3Store(videojob.spec.output.s3)


def _conditions(
    spec: Spec,
    model: Model,
    stages: Sequence[WanStage],
    link: Link,
    timesteps: Tensor,
    config: Settings,
    device: torch.device,
) -> Conditions:
    dtype = getattr(torch, config.dtype)
    experts = tuple(model.expert(float(timestep)) for timestep in timesteps)
    guidance = sampler.guidance(spec)
    computed = None
    if stages[0].is_first:
        prompts = [*(scene.prompt for scene in spec.all_scenes), spec.negative_prompt]
        embeds = conditions.encode(model.folder, prompts, dtype, device)
        computed = conditions.compute(stages, embeds, timesteps, experts, guidance)
    return conditions.share(
        link,
        computed,
        scenes=len(spec.all_scenes),
        width=model.width,
        experts=experts,
        guidance=guidance,
        dtype=dtype,
        device=device,
    )


def _nothing(*_: object) -> None:
    """A callback that does nothing."""


def _quiet_libraries() -> None:
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    main()
