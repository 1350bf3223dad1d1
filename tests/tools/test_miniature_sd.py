import json

import pytest
import torch

from library.config.model import ModelConfig
from library.families.sd.checkpoint import check_weights, load_text_encoder, load_unet, load_vae
from library.families.sd.files import describe, locate, problems
from library.families.sd.options import LATENTS, SdOptions
from library.io.header import read_header
from library.nn.attention import sdpa
from tests.tiny import TINY_SD, TINY_SD2
from tools.make_miniature import main
from tools.miniature_sd import FILE_NAME, VARIANTS, make_sd

CPU = {"device": "cpu", "dtype": torch.float32}
SIZES = {"sd1": TINY_SD, "sd2": TINY_SD2, "sd2-v": TINY_SD2}


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    return make_sd(tmp_path_factory.mktemp("miniature"))


def located(path):
    return locate(ModelConfig(pretrained_model_name_or_path=str(path)), SdOptions())


def test_same_arguments_same_bytes(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        make_sd(folder, layout="diffusers", sizes=TINY_SD2, variant="sd2-v")
        make_sd(folder, sizes=TINY_SD)
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in files)
    assert make_sd(tmp_path / "seed", seed=1, sizes=TINY_SD).read_bytes() != (one / FILE_NAME).read_bytes()


def test_published_names(miniature, tmp_path):
    second = read_header(make_sd(tmp_path, sizes=TINY_SD2, variant="sd2")).tensors
    first = read_header(miniature).tensors
    for names, name in (
        (first, "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.attn2.to_v.weight"),
        (first, "first_stage_model.quant_conv.weight"),
        (first, "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"),
        (second, "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"),
        (second, "cond_stage_model.model.ln_final.bias"),
    ):
        assert name in names
    projection = "model.diffusion_model.middle_block.1.proj_in.weight"
    assert (len(first[projection].shape), len(second[projection].shape)) == (4, 2)


@pytest.mark.parametrize(("variant", "layout"), [*((name, "single") for name in VARIANTS), ("sd2-v", "diffusers")])
def test_every_variant_is_a_whole_model(tmp_path, variant, layout):
    path = make_sd(tmp_path, layout=layout, dtype="bf16", sizes=SIZES[variant], variant=variant)
    assert problems(ModelConfig(pretrained_model_name_or_path=str(path)), SdOptions()) == []
    files = located(path)
    assert check_weights(files) == [] and files.is_v2 is (variant != "sd1")
    said = {"sd1": False, "sd2": False, "sd2-v": True}[variant]
    assert files.v_prediction is (said if layout == "diffusers" or said else None)
    assert describe(files).native_resolution.width == (768 if said else 512)
    stored = {info.dtype for part in (files.denoiser, files.vae, files.clip) for info in part.tensors.values()}
    assert stored == {"BF16"}
    assert json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())["pad_token"] == (
        "!" if variant != "sd1" else "<|endoftext|>"
    )


@torch.no_grad()
def test_activations_are_moderate(miniature):
    files = located(miniature)
    torch.manual_seed(0)
    denoiser = load_unet(files, attention=sdpa, **CPU)
    context = torch.randn(2, 77, denoiser.config.context_width)
    for timestep in (999, 500, 10):
        x_t = torch.randn(2, 4, 16, 16)
        noise = denoiser(x_t, torch.full((2,), timestep), context)
        assert 0.2 < noise.std() < 2 and noise.abs().max() < 10
    assert (denoiser(x_t, torch.full((2,), 10), context.flip(0)) - noise).std() > 0.05
    vae = load_vae(files, **CPU)
    mean, log_variance = vae.encode(torch.rand(1, 3, 64, 64) * 2 - 1)
    assert 0.4 < LATENTS.normalise(mean).std() < 2 and log_variance.max() < -4
    pixels = vae.decode(LATENTS.denormalise(torch.randn(1, 4, 8, 8)))
    assert 0.1 < pixels.std() < 0.6 and (pixels.abs() > 1).float().mean() < 0.05
    clip = load_text_encoder(files.clip, is_v2=False, **CPU)
    assert 0.5 < clip.text_model(torch.randint(0, 100, (1, 77))).last_hidden_state.std() < 2


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sd", "--layout", "diffusers", "--variant", "sd2-v", "--dtype", "fp16"]) == 0
    assert located(tmp_path / "miniatures" / "sd").v_prediction is True
    assert "miniatures/sd" in capsys.readouterr().out


def test_variants_are_of_sd_alone(capsys):
    with pytest.raises(SystemExit):
        main(["sd3", "--variant", "sd2"])
    assert "--variant does nothing for sd3: only sd has variants" in capsys.readouterr().err
