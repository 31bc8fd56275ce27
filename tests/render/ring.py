"""A whole ring in one process: every rank a thread with its own stage."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from videojob_api.plan import Plan
from videojob_worker import blocks, conditions, models, topology, wan
from videojob_worker.blocks import Snapshot
from videojob_worker.link import LocalLink
from videojob_worker.models import Model
from videojob_worker.pipeline import Ring
from videojob_worker.schedule import Turn

CPU = torch.device("cpu")
GRID = (6, 8)


@dataclass
class Rendering:
    """Inputs of a render on the tiny model, and what came of it."""

    model: Path
    plan: Plan
    seed: int = 7
    guidance: tuple[float, ...] | None = (5.0, 3.0)  # of each expert
    timeout_s: float = 60.0
    known: Model = field(init=False)
    scheduler: UniPCMultistepScheduler = field(init=False)
    embeds: list[Tensor] = field(init=False)  # one per scene, then the negative one
    order: list[Turn] = field(default_factory=list)  # results as they came
    snapshots: dict[int, Snapshot] = field(default_factory=dict)  # the state before each sweep but the first

    def __post_init__(self) -> None:
        self.known = models.read(self.model)
        self.scheduler = UniPCMultistepScheduler.from_pretrained(self.model / "scheduler")
        self.scheduler.set_timesteps(self.plan.steps)
        generator = torch.Generator().manual_seed(1)
        count = max(1, len(self.plan.scene_ends)) + 1
        self.embeds = [torch.randn((1, 16, 32), generator=generator) for _ in range(count)]

    @property
    def experts(self) -> tuple[int, ...]:
        """Of each step."""
        return tuple(self.known.expert(float(timestep)) for timestep in self.scheduler.timesteps)

    def latents(self, ranks: int) -> Tensor:
        """The clean latents, rendered by this many ranks."""
        clean = self.blocks(ranks)
        return torch.cat([clean[block] for block in range(self.plan.blocks)], dim=2)

    def blocks(self, ranks: int, resumed: Snapshot | None = None) -> dict[int, Tensor]:
        """The latents of every block that comes clean, from the begin or from a snapshot on."""
        shares = topology.shares(8, ranks)
        stages = [[wan.load(folder, share, torch.float32, CPU) for folder in self.known.experts] for share in shares]
        shared = conditions.compute(stages[0], self.embeds, self.scheduler.timesteps, self.experts, self.guidance)
        clean: dict[int, Tensor] = {}

        def on_result(turn: Turn, latents: Tensor | None) -> None:
            self.order.append(turn)
            if turn.ends_sweep:
                self.snapshots[turn.sweep + 1] = queue.snapshot(turn.sweep + 1)
            if latents is not None:
                clean[turn.block] = latents

        noises = blocks.noise(self.plan, self.known.channels, *GRID, self.seed)
        queue = blocks.Blocks(self.plan, self.scheduler, noises, CPU)
        if resumed is not None:
            queue.restore(resumed)
        sweep = 0 if resumed is None else resumed.sweep

        def rank(link: LocalLink) -> None:
            own = queue if link.rank == 0 else None
            Ring(self.plan, GRID, stages[link.rank], shared, link, own, sweep).run(on_result, lambda: None)

        _together(rank, LocalLink.ring(ranks, self.timeout_s))
        return clean


def _together(rank, links: Sequence[LocalLink]) -> None:
    errors: list[BaseException] = []

    def guarded(link: LocalLink) -> None:
        try:
            rank(link)
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(link,)) for link in links]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
