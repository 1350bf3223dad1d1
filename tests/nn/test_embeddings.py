import math

import pytest
import torch

from library.nn.embeddings import MLPEmbedder, sincos_1d, timestep_sinusoid


def test_timesteps_become_cosines_then_sines():
    embedded = timestep_sinusoid(torch.tensor([0.0, 500.0]), 8)
    assert embedded[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    angles = [500 * 10000 ** (-k / 4) for k in range(4)]
    expected = [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
    assert embedded[1].tolist() == pytest.approx(expected, abs=1e-4)


def test_timesteps_are_embedded_in_fp32_under_autocast():
    neighbours = torch.tensor([999.0, 999.5])
    with torch.autocast("cpu", torch.bfloat16):
        embedded = timestep_sinusoid(neighbours, 16)
    assert embedded.dtype == torch.float32
    assert (embedded[0] - embedded[1]).abs().max() > 0.1
    assert torch.equal(embedded, timestep_sinusoid(neighbours, 16))


@pytest.mark.reference
def test_timesteps_are_embedded_as_in_diffusers():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    timestep = torch.linspace(0, 1000, 33)
    theirs = embeddings.get_timestep_embedding(timestep, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.allclose(timestep_sinusoid(timestep, 256), theirs, rtol=0, atol=1e-4)  # 1000 rad in fp32


def test_positions_become_sines_then_cosines():
    position = torch.tensor([[0.0, -2.5], [7.0, 1.0]])
    embedded = sincos_1d(position, 4)
    assert embedded.shape == (2, 2, 4)
    assert embedded.dtype == torch.float32
    expected = [math.sin(-2.5), math.sin(-0.025), math.cos(-2.5), math.cos(-0.025)]
    assert embedded[0, 1].tolist() == pytest.approx(expected, abs=1e-7)


def test_the_mlp_has_its_activation_in_the_middle():
    embedder = MLPEmbedder(3, 5)
    vector = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    first, _, second = embedder.mlp
    assert torch.equal(embedder(vector), second(torch.nn.functional.silu(first(vector))))
    assert set(embedder.state_dict()) == {"mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"}
