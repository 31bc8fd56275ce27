"""Makes a small model with random weights in the real diffusers layout, so that the real loading code runs anywhere.

``videojob tiny-model DIR`` calls it. Structure, file names and formats are those of the released Wan 2.1 repositories:
sharded safetensors with an index, a UMT5 text encoder, a T5 tokenizer, the causal video VAE and a UniPC scheduler.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

LATENT_CHANNELS = 16
TEXT_DIM = 32


def save(folder: Path, *, layers: int = 8, seed: int = 0, shard_size: str = "40KB") -> None:
    """Write the model; the same arguments give the same weights.

    Args:
        folder: made if it does not exist.
        layers: transformer layers, and so the most ranks that can share them.
        seed: of the weights.
        shard_size: largest transformer shard, small so that there are several.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            text_dim=TEXT_DIM,
            freq_dim=32,
            ffn_dim=64,
            num_layers=layers,
        )
        vae = AutoencoderKLWan(base_dim=8, z_dim=LATENT_CHANNELS, dim_mult=[1, 2, 4, 4], num_res_blocks=1)
        tokenizer = _tokenizer()
        text_encoder = UMT5EncoderModel(_text_config(len(tokenizer)))
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipeline = WanPipeline(tokenizer, text_encoder, vae, scheduler, transformer)
    pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    transformer.save_pretrained(folder / "transformer", max_shard_size=shard_size)


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
