import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from library.io.key_maps import to_diffusers
from library.nn.autoencoder_kl import SD3_VAE, SD_VAE, AutoencoderKL
from library.nn.autoencoder_sizes import autoencoder_key_maps

GOLDEN = Path(__file__).parents[1] / "golden" / "sd3" / "vae.txt"
TINY = dataclasses.replace(SD3_VAE, latent_channels=4, level_widths=(64, 96, 128, 128))  # groups of more than one

OLDER = dataclasses.replace(TINY, quant_convolutions=True)


def random_vae(config=TINY):
    torch.manual_seed(0)
    vae = AutoencoderKL(config)
    for name, parameter in vae.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.2)
        else:
            nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.2)
    return vae


def pictures(height=32, width=48):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def assert_close(actual, expected, tolerance=1e-5):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def test_keys_and_shapes_equal_those_of_the_published_file():
    with torch.device("meta"):
        vae = AutoencoderKL(SD3_VAE)
    published = dict(line.split("\t")[:2] for line in GOLDEN.read_text().splitlines())
    assert {key: str(list(tensor.shape)) for key, tensor in vae.state_dict().items()} == published
    assert sum(parameter.numel() for parameter in vae.encoder.parameters()) == 34_274_208
    assert sum(parameter.numel() for parameter in vae.decoder.parameters()) == 49_545_475


def test_the_older_vae_has_the_published_number_of_weights():
    with torch.device("meta"):
        vae = AutoencoderKL(SD_VAE)
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863
    assert vae.state_dict()["quant_conv.weight"].shape == (8, 8, 1, 1)
    assert vae.state_dict()["post_quant_conv.weight"].shape == (4, 4, 1, 1)


def test_shapes_of_a_picture_that_is_not_square():
    vae = random_vae()
    with torch.no_grad():
        mean, log_variance = vae.encode(pictures())
        assert mean.shape == log_variance.shape == (2, 4, 4, 6)
        assert vae.decode(mean).shape == (2, 3, 32, 48)


def test_a_picture_that_does_not_divide_by_the_stride_is_refused():
    with pytest.raises(ValueError, match="pictures of 44x32 pixels don't divide by 8"):
        random_vae().encode(pictures(32, 44))


def test_the_log_variance_is_limited():
    vae = random_vae()
    with torch.no_grad():
        vae.encoder.conv_out.bias[4:] = torch.tensor([1e4, -1e4, 1e4, -1e4])
        _, log_variance = vae.encode(pictures())
    assert log_variance.amax((0, 2, 3)).tolist() == [20, -30, 20, -30]


def test_bf16_is_finite_and_near_fp32():
    vae = random_vae()
    with torch.no_grad():
        exact = vae.decode(vae.encode(pictures())[0])
        vae.bfloat16()
        rough = vae.decode(vae.encode(pictures().bfloat16())[0])
    assert rough.dtype == torch.bfloat16
    assert_close(rough.float(), exact, 0.2)


def diffusers_twin(vae):
    diffusers = pytest.importorskip("diffusers")
    config = vae.config
    levels = len(config.level_widths)
    twin = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.level_widths,
        layers_per_block=config.blocks_per_level,
        latent_channels=config.latent_channels,
        use_quant_conv=config.quant_convolutions,
        use_post_quant_conv=config.quant_convolutions,
    )
    twin.load_state_dict(dict(to_diffusers(vae.state_dict(), key_maps(config))), strict=True)
    return twin


def key_maps(config):
    return autoencoder_key_maps(
        level_widths=config.level_widths,
        blocks_per_level=config.blocks_per_level,
        quant_convolutions=config.quant_convolutions,
    )


# In fp32, the gradients of biases that nearly cancel are rounding noise; fp64 tells whether the mathematics agree.
@pytest.mark.reference
@pytest.mark.parametrize("config", [TINY, OLDER], ids=["sd3", "sd1"])
@pytest.mark.parametrize(("dtype", "gradient_tolerance"), [(torch.float32, None), (torch.float64, 1e-5)])
def test_latents_pictures_and_gradients_equal_those_of_diffusers(dtype, gradient_tolerance, config):
    vae = random_vae(config)
    twin = diffusers_twin(vae).to(dtype)
    vae = vae.to(dtype)
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(2, 4, 4, 6, generator=generator, dtype=dtype)
    weights = [torch.randn(size, generator=generator, dtype=dtype) for size in ((2, 4, 4, 6),) * 2 + ((2, 3, 32, 48),)]

    def theirs(pixels, z):
        gaussian = twin.encode(pixels).latent_dist
        return gaussian.mean, gaussian.logvar, twin.decode(z).sample

    results, input_gradients = [], []
    for run in (lambda pixels, z: (*vae.encode(pixels), vae.decode(z)), theirs):
        leaves = [pictures().to(dtype).requires_grad_(), z.clone().requires_grad_()]
        results.append(run(*leaves))
        sum((result * weight).sum() for result, weight in zip(results[-1], weights)).backward()
        input_gradients.append([leaf.grad for leaf in leaves])
    for actual, expected in zip(*results):
        assert expected.abs().mean() > 0.1
        assert_close(actual, expected)
    for actual, expected in zip(*input_gradients):
        assert_close(actual, expected, 1e-5)

    if gradient_tolerance is not None:
        mapped = dict(to_diffusers({name: p.grad for name, p in vae.named_parameters()}, key_maps(vae.config)))
        for name, parameter in twin.named_parameters():
            if name.endswith("to_k.bias"):
                # The same constant for every key changes no softmax: this gradient is zero but for rounding.
                assert max(parameter.grad.abs().max(), mapped[name].abs().max()) < 1e-9
            else:
                assert parameter.grad.abs().max() > 0, name
                assert_close(mapped[name], parameter.grad, gradient_tolerance)
