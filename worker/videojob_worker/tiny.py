"""Makes a small model with random weights in the real diffusers layout, so that the real loading code runs anywhere.

``videojob tiny-model DIR`` calls it. Structure, file names and formats are those of the released Wan repositories:
sharded safetensors with an index, a UMT5 text encoder, a T5 tokenizer, the causal video VAE and a UniPC scheduler; for
Wan2.2 T2V-A14B a second transformer and the boundary between the two, for Wan2.2 TI2V-5B its VAE of 48 channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from .models import TI2V_CHANNELS, Kind

CHANNELS = {Kind.WAN21: 16, Kind.A14B: 16, Kind.TI2V_5B: TI2V_CHANNELS}
PIPELINE: dict[Kind, dict[str, Any]] = {
    Kind.WAN21: {},
    Kind.A14B: {"boundary_ratio": 0.875},
    Kind.TI2V_5B: {"expand_timesteps": True},
}
TEXT_DIM = 32


def save(folder: Path, *, kind: Kind = Kind.WAN21, layers: int = 8, seed: int = 0, shard_size: str = "40KB") -> None:
    """Write the model; the same arguments give the same weights.

    Args:
        folder: made if it does not exist.
        kind: of which model it has the structure.
        layers: layers of each transformer, and so the most ranks that can share them.
        seed: of the weights.
        shard_size: largest transformer shard, small so that there are several.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = _transformer(CHANNELS[kind], layers)
        vae = _vae(kind)
        tokenizer = _tokenizer()
        text_encoder = UMT5EncoderModel(_text_config(len(tokenizer)))
        experts = {"transformer": transformer}
        if kind is Kind.A14B:
            experts["transformer_2"] = _transformer(CHANNELS[kind], layers)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipeline = WanPipeline(tokenizer, text_encoder, vae, scheduler, **experts, **PIPELINE[kind])
    pipeline.save_pretrained(folder, safe_serialization=True)
    for name, expert in experts.items():
        (folder / name / "diffusion_pytorch_model.safetensors").unlink()
        expert.save_pretrained(folder / name, max_shard_size=shard_size)


def _transformer(channels: int, layers: int) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=64,
        num_layers=layers,
    )


def _vae(kind: Kind) -> AutoencoderKLWan:
    small: dict[str, Any] = {"base_dim": 8, "z_dim": CHANNELS[kind], "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}
    if kind is not Kind.TI2V_5B:
        return AutoencoderKLWan(**small)
    return AutoencoderKLWan(
        **small,
        decoder_base_dim=8,
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=16,
        latents_mean=[0.01 * channel - 0.2 for channel in range(TI2V_CHANNELS)],
        latents_std=[0.5 + 0.02 * channel for channel in range(TI2V_CHANNELS)],
    )


def _text_config(vocabulary: int) -> UMT5Config:
    return UMT5Config(
        vocab_size=vocabulary,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )


def _tokenizer() -> T5Tokenizer:
    """A T5 tokenizer whose pieces are the printable ASCII characters; others are unknown."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return T5Tokenizer(vocab=[*special, *((chr(code), -4.0) for code in range(33, 127))], extra_ids=0)
