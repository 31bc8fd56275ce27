"""Decodes the video as it grows: block after block through the causal VAE, its state carried over.

``publisher`` feeds it clean latents. Knows nothing of blocks, files or storage.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor


class StreamingDecoder:
    """One stream through one VAE; equal bit for bit to one ``vae.decode`` of all latents together.

    The VAE's convolutions look back through a cache on the module, which ``vae.decode`` empties at its begin and end.
    Here it lives as long as the stream, so the VAE must not be used for anything else meanwhile.

    Args:
        vae: on its device, in its dtype; the first latent decodes to 1 frame, each later one to 4.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._vae = vae
        self._first = True
        shape = (1, -1, 1, 1, 1)
        self._mean = torch.tensor(vae.config.latents_mean, device=vae.device).view(shape)
        self._deviation = torch.tensor(vae.config.latents_std, device=vae.device).view(shape)
        vae.clear_cache()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """The next latents (1, C, n, h, w), normalised as the transformer leaves them, as frames.

        Yields:
            uint8 frames (1 or 4, height, width, 3) on the CPU, one tensor a latent.
        """
        vae = self._vae
        scaled = latents.to(vae.device, torch.float32) * self._deviation + self._mean
        quantised = vae.post_quant_conv(scaled.to(vae.dtype))
        for index in range(latents.shape[2]):
            vae._conv_idx = [0]
            decoded = vae.decoder(
                quantised[:, :, index : index + 1],
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=self._first,
            )
            self._first = False
            if vae.config.patch_size is not None:
                decoded = unpatchify(decoded, patch_size=vae.config.patch_size)
            yield _to_uint8(decoded)

    def close(self) -> None:
        """Free the cache, which is gigabytes at full size."""
        self._vae.clear_cache()


def _to_uint8(decoded: Tensor) -> Tensor:
    """(1, 3, frames, height, width) in -1 to 1 as (frames, height, width, 3) in 0 to 255."""
    scaled = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled[0].permute(1, 2, 3, 0).contiguous().cpu()
