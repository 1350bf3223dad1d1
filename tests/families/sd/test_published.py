"""Every tensor of the published 1.x and 2.x is found in every layout, under the names that diffusers expects."""

import pytest
import torch

from library.config.model import ModelConfig
from library.families.sd.checkpoint import check_weights, load_text_encoder
from library.families.sd.files import describe, locate
from library.families.sd.options import SdOptions
from library.families.sd.sizes import clip_sizes
from library.nn.autoencoder_files import diffusers_config
from library.nn.autoencoder_kl import SD_VAE
from library.records import LatentFormat
from tests.families.sd.published_files import (
    KINDS,
    clip,
    clip_config,
    everything,
    open_clip,
    shapes_of,
    unet,
    vae,
    write_sparse_folder,
)
from tests.families.sd3.published_files import write_sparse

PARAMETERS = {"sd1": 859_520_964, "sd2": 865_910_724}
ENCODER = {"sd1": (12, 768, 123_060_480), "sd2": (23, 1024, 340_387_840)}
TENSORS = {"sd1": 196, "sd2": 372}


def located(path):
    return locate(ModelConfig(pretrained_model_name_or_path=str(path)), SdOptions())


def assert_complete(files, kind):
    """All tensors of the published model are found, and fit the modules."""
    assert describe(files).parameters == PARAMETERS[kind] and check_weights(files) == []
    assert files.is_v2 is (kind == "sd2")
    assert (len(files.denoiser.names), len(files.vae.names)) == (686, 248)
    sizes = clip_sizes(files.clip)
    encoder = load_text_encoder(files.clip, is_v2=files.is_v2, device="meta", dtype=torch.float32)
    numbers = {name: tensor.numel() for name, tensor in encoder.state_dict().items()}
    assert numbers.pop("text_projection.weight") == sizes.width**2
    assert (sizes.depth, sizes.width, sum(numbers.values())) == ENCODER[kind]
    assert len(numbers) == TENSORS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_with_everything_inside(tmp_path, kind):
    shapes = everything(kind, ema=True)
    files = located(write_sparse(tmp_path / "model.safetensors", shapes))
    assert_complete(files, kind)
    # OpenCLIP fuses q, k and v; its last layer isn't read
    assert len(files.clip.names) == (196 if kind == "sd1" else 23 * 12 + 4)
    stored = {name for part in (files.denoiser, files.vae, files.clip) for name in part.names.values()}
    left = {name for name in shapes if name not in stored and not name.startswith("model_ema.")}
    beside = {"position_ids"} if kind == "sd1" else {"logit_scale", "text_projection"}
    assert {name.rsplit(".", 1)[-1] for name in left if ".23." not in name and "." in name} == beside
    assert sum(".23." in name for name in left) == (0 if kind == "sd1" else 12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_in_diffusers_layout(tmp_path, kind):
    files = located(write_sparse_folder(tmp_path / "model", kind, prediction="v_prediction"))
    assert_complete(files, kind)
    assert files.clip.names.keys() == clip(kind).keys() and files.v_prediction is True


@pytest.mark.parametrize("kind", KINDS)
def test_a_vae_of_its_own(tmp_path, kind):
    shapes = {name: shape for name, shape in everything(kind).items() if not name.startswith("first_stage_model.")}
    path = write_sparse(tmp_path / "model.safetensors", shapes)
    for name, prefix in (("bare", ""), ("prefixed", "first_stage_model.")):
        own = write_sparse(tmp_path / f"{name}.safetensors", {prefix + key: s for key, s in shapes_of(vae()).items()})
        model = ModelConfig(pretrained_model_name_or_path=str(path), vae=str(own))
        files = locate(model, SdOptions())
        assert files.vae.title == str(own) and len(files.vae.names) == 248


@pytest.mark.reference
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_own_conversion_finds_the_same_tensors_in_the_single_file(kind):
    """Of our names, by its code: nothing is missing there, and nothing is left."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import (
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
        convert_open_clip_checkpoint,
    )
    from transformers import CLIPTextModel

    from library.families.sd.export import unet_config
    from library.families.sd.unet import CONFIGS
    from library.records import Resolution

    stored = {name: torch.empty(shape, device="meta") for name, shape in everything(kind).items()}
    config = unet_config(CONFIGS[kind], Resolution(512, 512))
    latents = LatentFormat(channels=4, stride=8, patch=8, scale=0.18215, shift=0.0)
    vae_config = diffusers_config(SD_VAE, latents)
    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(config), AutoencoderKL.from_config(vae_config)
        encoder = CLIPTextModel(clip_config(kind))
    for module, converted in zip(
        theirs,
        (convert_ldm_unet_checkpoint(dict(stored), config), convert_ldm_vae_checkpoint(dict(stored), vae_config)),
    ):
        assert shapes_of(converted) == shapes_of(module.state_dict())
    assert len(theirs[0].state_dict()) == 686 == len(unet(kind)) and len(theirs[1].state_dict()) == 248
    if kind == "sd2":
        converted = shapes_of(convert_open_clip_checkpoint(encoder, dict(stored)))
        assert converted.keys() >= {"text_model.final_layer_norm.weight"}
        assert {name: shape for name, shape in converted.items() if name != "text_projection.weight"} == clip(kind)
        assert len(open_clip()) == 24 * 12 + 6
