"""diffusers' UNet2DModel under the names of ddpm.py, with the options of google/ddpm-cifar10-32.

DDPM=peers/diffusers_unet.py pytest runs the tests of the network on it."""

import math
import sys
import unittest
from pathlib import Path

import torch

try:
    import diffusers
except ImportError as error:
    raise unittest.SkipTest("pip install diffusers==0.42.1") from error

sys.path.append(str(Path(__file__).parent))
from shared import lacks

PUBLISHED = dict(freq_shift=1, flip_sin_to_cos=False, downsample_padding=0, norm_eps=1e-6, attention_head_dim=None)


class Network(diffusers.UNet2DModel):
    def forward(self, x, t, y=None):
        if y is None and self.class_embedding is not None:
            y = torch.full_like(t, self.class_embedding.num_embeddings - 1)  # "no label" is the last
        return super().forward(x, t, y).sample


def UNet(
    image_channels=3,
    dim=128,
    dim_mults=(1, 2, 2, 2),
    num_res_blocks=2,
    attn_resolutions=(16,),
    image_size=32,
    dropout=0.1,
    num_classes=None,
    learned_variance=False,
    time_dim=None,
):
    if dim_mults[0] != 1:
        lacks("first level of another width than conv_in")
    attention = [image_size >> level in attn_resolutions for level in range(len(dim_mults))]
    return Network(
        sample_size=image_size,
        in_channels=image_channels,
        out_channels=image_channels * (2 if learned_variance else 1),
        block_out_channels=[dim * mult for mult in dim_mults],
        layers_per_block=num_res_blocks,
        down_block_types=["AttnDownBlock2D" if each else "DownBlock2D" for each in attention],
        up_block_types=["AttnUpBlock2D" if each else "UpBlock2D" for each in attention[::-1]],
        add_attention=bool(attn_resolutions),
        norm_num_groups=math.gcd(dim, 32 if dim >= 128 else max(1, dim // 16)),
        num_class_embeds=None if num_classes is None else num_classes + 1,
        time_embedding_dim=time_dim,
        dropout=dropout,
        **PUBLISHED,
    )
