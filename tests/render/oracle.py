"""The method once more, as plainly as possible: one process, whole unmodified diffusers modules, every state kept.

Shares nothing with the worker but the paper: no queue, no cache, no stages, no attention processor. The next block's
keys and values enter by putting its tokens behind the block's own in one sequence, each token with its own timestep,
and dropping their output after every layer. Of a model with two experts, each block goes through the whole of the one
that its timestep asks for, and sees the next block only where that one goes through the same.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """What is rendered; the last three make wrong renderings for the tests of the tests."""

    blocks: int
    size: int  # latents of a block
    context: int
    steps: int
    seed: int
    guidance: tuple[float, ...]  # of each expert
    grid: tuple[int, int]
    boundary: float = 0.0  # below this timestep the second expert predicts
    left_sweep: int = 0  # 1: the left neighbour as it stands one sweep earlier
    right_block: int = 1  # 0: no right context
    right_of_other: int = 0  # 1: right context also from a block that goes through the other expert

    def wrong(self, **change: float) -> Problem:
        return replace(self, **change)  # type: ignore[arg-type]


@torch.inference_mode()
def render(
    experts: list[WanTransformer3DModel], scheduler, prompts: list[Tensor], negative: Tensor, problem: Problem
) -> Tensor:
    """Latents (1, C, context + blocks * size, h, w); ``prompts[b]`` embeds block b's prompt."""
    noises = _noise(problem, experts[0].config.in_channels)
    states = [[noise] for noise in noises]  # states[b][k]: block b after k steps
    schedulers = [copy.deepcopy(scheduler) for _ in states]
    for each in schedulers:
        each.set_begin_index(0)
    for sweep in range(problem.steps + problem.blocks - 1):
        active = [block for block in range(problem.blocks) if 0 <= sweep - block < problem.steps]
        inputs = {block: _input(states, block, sweep - block, problem) for block in active}
        times = {block: scheduler.timesteps[sweep - block] for block in active}
        chosen = {block: int(times[block] < problem.boundary) for block in active}
        models = {block: experts[chosen[block]] for block in active}
        conditional = _predict(models, inputs, times, {b: prompts[b] for b in active}, problem)
        unconditional = _predict(models, inputs, times, dict.fromkeys(active, negative), problem)
        for block in active:
            scale = problem.guidance[chosen[block]]
            noise = unconditional[block] + scale * (conditional[block] - unconditional[block])
            own = noise[:, :, 0 if block == 0 else problem.context :]
            stepped = schedulers[block].step(own, times[block], states[block][-1], return_dict=False)[0]
            states[block].append(stepped)
    return torch.cat([history[problem.steps] for history in states], dim=2)


def _noise(problem: Problem, channels: int) -> list[Tensor]:
    shape = (1, channels, problem.size + problem.context, *problem.grid)
    template = torch.randn(shape, generator=torch.Generator().manual_seed(problem.seed))
    noises = []
    for block in range(problem.blocks):
        order = torch.randperm(problem.size, generator=torch.Generator().manual_seed(problem.seed + 1 + block))
        head, tail = template[:, :, : problem.size], template[:, :, problem.size :]
        template = torch.cat((tail, head[:, :, order]), dim=2)
        noises.append(template if block == 0 else template[:, :, -problem.size :])
    return noises


def _input(states: list[list[Tensor]], block: int, step: int, problem: Problem) -> Tensor:
    own = states[block][step]
    if block == 0 or problem.context == 0:
        return own
    left = states[block - 1][step + 1 - problem.left_sweep]
    return torch.cat((left[:, :, -problem.context :], own), dim=2)


def _predict(models, inputs, times, prompts, problem: Problem) -> dict[int, Tensor]:
    """One branch's prediction for every active block, layer by layer over all of them, each with its own model."""
    per_latent = (problem.grid[0] // 2) * (problem.grid[1] // 2)
    hidden = {b: models[b].patch_embedding(x).flatten(2).transpose(1, 2) for b, x in inputs.items()}
    embedded = {b: models[b].condition_embedder(times[b][None], prompts[b]) for b in inputs}
    for layer in range(len(next(iter(models.values())).blocks)):
        entering = dict(hidden)
        for block in inputs:
            sequence, projection = entering[block], embedded[block][1]
            tokens = sequence.shape[1]
            modulation = projection.unflatten(1, (6, -1))[:, None].expand(-1, tokens, -1, -1)
            latents = inputs[block].shape[2]
            neighbour = block + 1
            same = neighbour in inputs and (models[neighbour] is models[block] or problem.right_of_other)
            if problem.right_block and problem.context and same:
                begin = problem.context * per_latent
                borrowed = entering[neighbour][:, begin : 2 * begin]
                theirs = embedded[neighbour][1].unflatten(1, (6, -1))[:, None].expand(-1, begin, -1, -1)
                sequence = torch.cat((sequence, borrowed), dim=1)
                modulation = torch.cat((modulation, theirs), dim=1)
                latents += problem.context
            rotary = models[block].rope(torch.empty(1, 1, latents, *problem.grid))
            hidden[block] = models[block].blocks[layer](sequence, embedded[block][2], modulation, rotary)[:, :tokens]
    return {b: _project(models[b], h, embedded[b][0], inputs[b].shape) for b, h in hidden.items()}


def _project(model, hidden: Tensor, temb: Tensor, shape: torch.Size) -> Tensor:
    shift, scale = (model.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
    out = model.proj_out(model.norm_out(hidden) * (1 + scale) + shift)
    rows, columns = shape[3] // 2, shape[4] // 2
    out = out.reshape(1, shape[2], rows, columns, 1, 2, 2, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return out.flatten(6, 7).flatten(4, 5).flatten(2, 3)
