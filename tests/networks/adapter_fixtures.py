"""Tiny models with random weights, and an adapter with random numbers, as after training."""

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from library.config.network import NetworkConfig
from library.config.optimizer import OptimizerConfig
from library.families.sd3.adapter_targets import adapter_targets
from library.families.sd3.mmdit import MMDiT, MMDiTConfig
from library.nn.attention import attention_function

# width / num_heads differs from num_heads, and 9 * width from anything else, so that mix-ups show.
TINY = MMDiTConfig(
    depth=3,
    width=32,
    num_heads=2,
    patch_size=2,
    in_channels=4,
    context_width=24,
    pooled_width=20,
    pos_embed_max_size=16,
    qk_norm=True,
    dual_attention_blocks=(0,),
)
TARGETS = adapter_targets(depth=3, dual_attention_blocks=(0,), clip_l_layers=2, clip_g_layers=2)
LARGEST = "emb_dims=[3,3,3,3,3,3]"


def tiny_mmdit(seed=0):
    torch.manual_seed(seed)
    mmdit = MMDiT(TINY, attention=attention_function("sdpa"))
    for parameter in mmdit.parameters():
        nn.init.normal_(parameter, std=0.1)
    return mmdit.requires_grad_(False).eval()


def tiny_clip(seed=0, layers=2):
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=10,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=8,
        eos_token_id=2,
    )
    return CLIPTextModelWithProjection(config).requires_grad_(False).eval()


def inputs(batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    return (
        noise(batch, 4, 8, 12),
        torch.tensor([10.0, 800.0, 400.0, 990.0])[:batch],
        noise(batch, 5, 24),
        noise(batch, 20),
    )


def randomise(network, seed=2):
    """Numbers as after training: nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network


class Config:
    """The two groups of a run's configuration that the adapter reads."""

    def __init__(self, optimizer=None, **network):
        self.network = NetworkConfig(**network)
        self.optimizer = optimizer or OptimizerConfig()
