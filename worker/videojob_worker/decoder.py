"""Turns clean latents into frames, latent by latent, with the causal VAE's state carried from block to block.

``publisher`` feeds it one block after another from its own thread and hands the frames to ``segments``. Knows nothing
of blocks, files or storage.

Shapes: C latent channels, n latents of one call, h x w latent rows and columns, H x W pixel rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from torch import Tensor

# A frame depends on its latent and the 38 before it, in both Wan VAEs: each convolution looks back 2 frames, in all 24
# latents, 14 half and 26 quarter ones.
MEMORY_LATENTS = 39
"""Latents after which a stream that began in the middle goes on exactly as one that began at the begin."""


class StreamingDecoder:
    """One video's decoder: any cut into calls gives the frames of one ``vae.decode`` over all latents.

    The state of the causal convolutions lives here and not on the VAE, so several streams may share one VAE. On a GPU,
    work is queued on a stream of its own beside the ring's. At 480p to 720p the state takes 3.5 to 8 GiB in float32,
    whatever the video's length.

    Args:
        vae: on the device and of the dtype to decode with; its weights are only read.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._vae = vae
        parameter = next(vae.decoder.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._mean = self._statistics(vae.config.latents_mean)
        self._std = self._statistics(vae.config.latents_std)
        slots = sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
        self._state: list[Any] | None = [None] * slots  # a convolution's last 2 frames, or a mark of diffusers' own
        self._first = True
        self._stream = _side_stream(self._device)

    def frames(self, latents: Tensor) -> Iterator[Tensor]:
        """The frames of the stream's next latents, one item a latent, so that a long block never lies in memory whole.

        Args:
            latents: (1, C, n, h, w) float32, normalised, as the transformer leaves them, on any device.

        Yields:
            uint8 (1, H, W, 3) for the stream's first latent, (4, H, W, 3) for every other, on the CPU.

        Raises:
            RuntimeError: the decoder is closed.
        """
        for index in range(latents.shape[2]):
            yield self._decode(latents[:, :, index : index + 1])

    def decode(self, latents: Tensor) -> Tensor:
        """The frames of the stream's next latents at once, uint8 (frames, H, W, 3) on the CPU; else as ``frames``."""
        return torch.cat(list(self.frames(latents)))

    def close(self) -> None:
        """Free the state. Nothing can be decoded afterwards."""
        self._state = None

    @torch.inference_mode()
    def _decode(self, latent: Tensor) -> Tensor:
        """One latent (1, C, 1, h, w), as ``AutoencoderKLWan._decode`` does it."""
        if self._state is None:
            raise RuntimeError("the decoder is closed")
        with self._on_stream():
            z = latent.to(self._device, torch.float32) * self._std + self._mean
            x = self._vae.post_quant_conv(z.to(self._dtype))
            x = self._vae.decoder(x, feat_cache=self._state, feat_idx=[0], first_chunk=self._first)
            self._first = False
            if self._vae.config.patch_size is not None:
                x = unpatchify(x, patch_size=self._vae.config.patch_size)
            return _pixels(x).cpu()

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _statistics(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device).view(1, -1, 1, 1, 1)


def _pixels(x: Tensor) -> Tensor:
    """(1, 3, frames, H, W) in -1..1 to uint8 (frames, H, W, 3), on the tensor's device."""
    scaled = (x[0].float().clamp(-1.0, 1.0) + 1.0) * 127.5
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))  # the weights may still be on their way
    return stream
