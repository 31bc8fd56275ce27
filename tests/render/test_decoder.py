"""A streamed video equals a whole one, however it is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from videojob_worker.decoder import MEMORY_LATENTS, StreamingDecoder

LATENTS = 7
KINDS = {
    "2.1": {"base_dim": 8, "z_dim": 16, "num_res_blocks": 1},
    "2.2": {
        "base_dim": 8,
        "decoder_base_dim": 8,
        "z_dim": 48,
        "num_res_blocks": 1,
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
        "latents_mean": [0.01 * channel - 0.2 for channel in range(48)],
        "latents_std": [0.5 + 0.02 * channel for channel in range(48)],
    },
}


class Sample:
    """A small VAE with random weights, latents, and what one whole decode makes of them."""

    def __init__(self, kind: str) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.vae = AutoencoderKLWan(**KINDS[kind]).eval()
            self.latents = torch.randn((1, KINDS[kind]["z_dim"], LATENTS, 4, 6))
        self.whole = self.decode_whole(self.latents)

    def decode_whole(self, latents: Tensor) -> Tensor:
        mean = torch.tensor(self.vae.config.latents_mean).view(1, -1, 1, 1, 1)
        std = torch.tensor(self.vae.config.latents_std).view(1, -1, 1, 1, 1)
        with torch.inference_mode():
            video = self.vae.decode(latents * std + mean).sample
        return ((video[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0)


@pytest.fixture(scope="module", params=list(KINDS))
def sample(request):
    return Sample(request.param)


def test_a_video_has_one_frame_for_its_first_latent_and_four_for_every_other(sample):
    shapes = [tuple(frames.shape) for frames in StreamingDecoder(sample.vae).frames(sample.latents)]
    height, width = sample.whole.shape[1:3]
    assert shapes == [(1, height, width, 3)] + [(4, height, width, 3)] * (LATENTS - 1)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.sets(st.integers(1, LATENTS - 1)))
def test_any_cut_into_blocks_gives_the_whole_video_bit_for_bit(sample, cuts):
    decoder = StreamingDecoder(sample.vae)
    edges = [0, *sorted(cuts), LATENTS]
    blocks = [sample.latents[:, :, begin:end] for begin, end in pairwise(edges)]
    assert torch.equal(torch.cat([decoder.decode(block) for block in blocks]), sample.whole)


@pytest.fixture(scope="module", params=list(KINDS))
def deep(request):
    """A VAE with the released ones' layers, narrow."""
    fields = {**KINDS[request.param], "num_res_blocks": 2, "base_dim": 4}
    if "decoder_base_dim" in fields:
        fields["decoder_base_dim"] = 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return AutoencoderKLWan(**fields).eval(), torch.randn((1, fields["z_dim"], MEMORY_LATENTS + 4, 2, 2))


def test_a_latent_is_forgotten_after_as_many_as_we_say_and_not_earlier(deep):
    vae, latents = deep
    poisoned = latents.clone()
    poisoned[:, :, 0] = float("nan")  # spreads to everything that depends on it
    with torch.inference_mode():
        video = vae.decode(poisoned).sample[0]
    frames = video.isnan().any(dim=3).any(dim=2).any(dim=0)
    assert frames[: 1 + 4 * (MEMORY_LATENTS - 2)].all()
    assert frames[: 1 + 4 * (MEMORY_LATENTS - 1)].any()
    assert not frames[1 + 4 * (MEMORY_LATENTS - 1) :].any()


def test_a_stream_that_begins_in_the_middle_goes_on_as_the_whole_one(deep):
    vae, latents = deep
    whole, warmed = StreamingDecoder(vae), StreamingDecoder(vae)
    whole.decode(latents[:, :, : MEMORY_LATENTS + 2])
    warmed.decode(latents[:, :, 2 : MEMORY_LATENTS + 2])
    states = zip(whole._state, warmed._state, strict=True)
    assert all(torch.equal(one, other) for one, other in states if isinstance(one, Tensor))
    rest = latents[:, :, MEMORY_LATENTS + 2 :]
    assert torch.equal(whole.decode(rest), warmed.decode(rest))


def test_two_streams_and_a_whole_decode_share_a_vae_without_meeting(sample):
    one, other = StreamingDecoder(sample.vae), StreamingDecoder(sample.vae)
    backwards = sample.latents.flip(2)
    frames_of_one, frames_of_other = [], []
    for index in range(LATENTS):
        frames_of_one.append(one.decode(sample.latents[:, :, index : index + 1]))
        frames_of_other.append(other.decode(backwards[:, :, index : index + 1]))
        sample.vae.decode(sample.latents[:, :, :1])
    assert torch.equal(torch.cat(frames_of_one), sample.whole)
    assert torch.equal(torch.cat(frames_of_other), sample.decode_whole(backwards))


def test_frames_come_latent_by_latent(sample):
    decoder = StreamingDecoder(sample.vae)
    first = next(decoder.frames(sample.latents))
    second = next(decoder.frames(sample.latents[:, :, 1:]))
    assert torch.equal(torch.cat((first, second)), sample.whole[:5])


def test_a_vae_in_half_precision_decodes_in_half_precision(sample):
    vae = AutoencoderKLWan.from_config(sample.vae.config).to(torch.bfloat16).eval()
    vae.load_state_dict(sample.vae.state_dict())
    frames = StreamingDecoder(vae).decode(sample.latents)
    assert frames.dtype == torch.uint8
    assert (frames.float() - sample.whole.float()).abs().mean() < 8


def test_nothing_is_kept_for_gradients(sample):
    assert all(parameter.requires_grad for parameter in sample.vae.decoder.parameters())
    assert not StreamingDecoder(sample.vae).decode(sample.latents[:, :, :2]).requires_grad


def test_a_closed_decoder_decodes_no_more(sample):
    decoder = StreamingDecoder(sample.vae)
    decoder.decode(sample.latents[:, :, :2])
    decoder.close()
    with pytest.raises(RuntimeError, match="closed"):
        decoder.decode(sample.latents[:, :, 2:])
