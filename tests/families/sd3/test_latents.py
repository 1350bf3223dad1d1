import pytest
import torch
from torch import nn

from library.families.sd3.latents import sd3_latents
from library.nn.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from library.records import Resolution


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(AutoencoderKLConfig(3, 16, (32, 32, 32, 32), 1, False)).eval()


class Constant(nn.Module):
    """A VAE that answers with fixed tensors."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))

    def encode(self, pixels):
        return torch.full((1, 16, 2, 2), 0.25), torch.full((1, 16, 2, 2), 3.0)

    def decode(self, z):
        self.asked = z
        return z


def test_geometry():
    latents = sd3_latents("vae").format
    assert latents.resolution_step == 16 and latents.channels == 16
    assert latents.latent_size(Resolution(512, 256)) == (32, 64) and latents.tokens(Resolution(512, 256)) == 512


def test_encoding_gives_the_mean_not_normalised():
    assert torch.equal(
        sd3_latents("vae").encode(Constant(), torch.zeros(1, 3, 16, 16)), torch.full((1, 16, 2, 2), 0.25)
    )


def test_published_scale_and_shift():
    strategy, vae = sd3_latents("vae"), Constant()
    torch.testing.assert_close(strategy.format.normalise(torch.tensor(1.0)), torch.tensor((1 - 0.0609) * 1.5305))
    strategy.decode(vae, torch.full((1, 16, 2, 2), 1.5305))
    assert vae.asked.dtype == torch.bfloat16
    torch.testing.assert_close(vae.asked.float(), torch.full((1, 16, 2, 2), 1.0609), atol=4e-3, rtol=0)


@torch.no_grad()
def test_round_trip_and_determinism(vae):
    strategy, pixels = sd3_latents("vae"), torch.rand(2, 3, 32, 48) * 2 - 1
    raw = strategy.encode(vae, pixels)
    assert raw.shape == (2, 16, 4, 6) and torch.equal(raw, strategy.encode(vae, pixels))
    torch.testing.assert_close(raw[:1], strategy.encode(vae, pixels[:1]))
    decoded = strategy.decode(vae, strategy.format.normalise(raw))
    assert decoded.shape == pixels.shape
    torch.testing.assert_close(decoded, vae.decode(raw), atol=1e-5, rtol=1e-4)


def test_the_signature_names_the_vae():
    assert sd3_latents("one").signature() != sd3_latents("other").signature()
    # caches on disk depend on every word of it
    assert sd3_latents("one").signature() == {"features": "sd3 latents 1", "vae": "one", "posterior": "mean"}
