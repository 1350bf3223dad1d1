"""Models in the files of others: both generations, from and to either layout."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.config.ddpm import DdpmConfig
from library.config.full import PARTS
from library.config.loss import LossConfig
from library.config.memory import MemoryConfig
from library.config.model import ModelConfig
from library.families.sd.export import scheduler_config, unet_config
from library.families.sd.family import create
from library.families.sd.options import SdOptions
from library.families.sd.unet import CONFIGS
from library.records import Resolution
from tests.tiny import TINY_SD, TINY_SD2
from tools.miniature_sd import make_sd

CPU = {"device": "cpu", "dtype": torch.float32}
SMALL = {"multipliers": (1, 2), "attention_levels": 1, "clip_depth": 2, "vae_widths": (32, 32, 32, 32)}
SIZES = {name: dataclasses.replace(sizes, **SMALL) for name, sizes in (("sd1", TINY_SD), ("sd2-v", TINY_SD2))}
RESBLOCK_23 = "transformer.resblocks.23.mlp.c_fc.bias"
BESIDE = {
    "sd1": {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]},
    "sd2-v": {
        "cond_stage_model.model.logit_scale": torch.tensor(4.6),
        "cond_stage_model.model.text_projection": torch.ones(64, 64),
        f"cond_stage_model.model.{RESBLOCK_23}": torch.ones(3),
    },
}
NOT_KEPT = {"betas": torch.ones(4), "model_ema.decay": torch.tensor(0.9)}


@pytest.fixture(scope="module", params=SIZES)
def models(request, tmp_path_factory):
    """The same weights in both layouts; the single file as they are published, with what else lies in it."""
    folder, variant = tmp_path_factory.mktemp("models"), request.param
    single = make_sd(folder / "single", sizes=SIZES[variant], variant=variant)
    with safe_open(single, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(single), **BESIDE[variant], **NOT_KEPT}, single, metadata)
    diffusers = make_sd(folder / "diffusers", sizes=SIZES[variant], variant=variant, layout="diffusers")
    return SimpleNamespace(variant=variant, single=single, diffusers=diffusers)


def family_of(path, *, v_prediction=None, **model):
    return create(
        SimpleNamespace(
            model=ModelConfig(pretrained_model_name_or_path=str(path), **model),
            family=SdOptions(),
            ddpm=DdpmConfig(v_parameterization=v_prediction),
            loss=LossConfig(),
            memory=MemoryConfig(),
        )
    )


def trained_by(family, *, clip=False):
    """Its U-Net, and its text encoder, as if training had changed every number of them."""
    modules = {"denoiser": family.load_denoiser(**CPU)}
    if clip:
        modules |= family.load_text_encoders(**CPU)
    return {
        name: {key: tensor * 1.5 for key, tensor in module.state_dict().items()} for name, module in modules.items()
    }


def write(family, trained, path, layout, *, parts=PARTS, dtype=None):
    family.write_model(trained, path, {"modelspec.title": "t"}, layout=layout, parts=parts, dtype=dtype)
    return path


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rereading(path, layout):
    """All tensors of a written model, by file."""
    if layout == "diffusers":
        return {file.parent.name: load_file(file) for file in sorted(path.glob("*/*.safetensors"))}
    return {"": load_file(path)}


@pytest.mark.parametrize("target", ["single", "diffusers"])
@pytest.mark.parametrize("source", ["single", "diffusers"])
def test_every_layout_from_every_layout(models, source, target, tmp_path):
    family = family_of(getattr(models, source))
    untouched = {"denoiser": family.load_denoiser(**CPU).state_dict()}
    written = rereading(write(family, untouched, tmp_path / "m.safetensors", target), target)
    expected = rereading(getattr(models, target), target)
    if target == "single":
        kept = BESIDE[models.variant] if source == "single" else {}
        left_out = {*NOT_KEPT, *BESIDE[models.variant]} - kept.keys()
        expected[""] = {name: tensor for name, tensor in expected[""].items() if name not in left_out}
    assert written.keys() == expected.keys() and all(same(written[file], expected[file]) for file in written)
    if target == "diffusers":
        for file in ("unet/config.json", "vae/config.json", "text_encoder/config.json", "model_index.json"):
            assert (tmp_path / "m.safetensors" / file).read_text() == (models.diffusers / file).read_text()


@pytest.mark.parametrize("layout", ["single", "diffusers"])
def test_what_was_trained_is_written_and_comes_back_bit_for_bit(models, layout, tmp_path):
    family = family_of(models.single)
    trained = trained_by(family, clip=True)
    again = family_of(write(family, trained, tmp_path / "m", layout))
    assert same(again.load_denoiser(**CPU).state_dict(), trained["denoiser"])
    clip = again.load_text_encoders(**CPU)["clip"].state_dict()
    assert all(torch.equal(clip[name], trained["clip"][name]) for name in clip if name != "text_projection.weight")
    assert same(again.load_vae(**CPU).state_dict(), family.load_vae(**CPU).state_dict())
    assert again.files.is_v2 is (models.variant == "sd2-v")
    assert again.denoiser == family.denoiser


def test_only_what_is_trained_is_converted(models, tmp_path):
    family = family_of(models.single)
    path = write(family, trained_by(family), tmp_path / "m.safetensors", "safetensors", dtype=torch.bfloat16)
    before = load_file(models.single)
    for name, tensor in load_file(path).items():
        trained = name.startswith("model.diffusion_model.")
        assert tensor.dtype == (torch.bfloat16 if trained else before[name].dtype), name


def test_parts_that_are_not_asked_for_are_left_out(models, tmp_path):
    family = family_of(models.single)
    trained = trained_by(family)
    names = load_file(write(family, trained, tmp_path / "m.safetensors", "safetensors", parts=()))
    assert names.keys() == {f"model.diffusion_model.{name}" for name in trained["denoiser"]}
    folder = write(family, trained, tmp_path / "m", "diffusers", parts=("vae",))
    assert sorted(path.name for path in folder.iterdir()) == ["unet", "vae"]


def test_the_schedule_says_what_is_predicted(models, tmp_path):
    for v_prediction in (False, True):
        family = family_of(models.single, v_prediction=v_prediction)
        folder = write(family, trained_by(family), tmp_path / str(v_prediction), "diffusers")
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        assert config["prediction_type"] == ("v_prediction" if v_prediction else "epsilon")


def test_a_schedule_that_ends_in_noise_is_sampled_from_its_end():
    plain = scheduler_config(v_prediction=True, zero_terminal_snr=False)
    rescaled = scheduler_config(v_prediction=True, zero_terminal_snr=True)
    assert (plain["rescale_betas_zero_snr"], plain["timestep_spacing"]) == (False, "leading")
    assert (rescaled["rescale_betas_zero_snr"], rescaled["timestep_spacing"]) == (True, "trailing")


def test_scaled_fp8_of_the_text_encoder_is_written_as_bf16(tmp_path):
    single = make_sd(tmp_path / "base", sizes=SIZES["sd1"])
    tensors, name = load_file(single), "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    scaled = {name: (tensors[name] * 64).to(torch.float8_e4m3fn), name.replace(".weight", ".scale_weight"): 1 / 64}
    scaled = {key: torch.as_tensor(value) for key, value in scaled.items()}
    save_file({**tensors, **scaled, "cond_stage_model.transformer.scaled_fp8": torch.empty(0)}, single)
    family = family_of(single)
    written = load_file(write(family, trained_by(family), tmp_path / "m.safetensors", "safetensors"))
    assert written.keys() == tensors.keys() and written[name].dtype == torch.bfloat16
    torch.testing.assert_close(written[name].float(), scaled[name].float() / 64, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(
    ("kind", "side", "heads", "context", "linear"),
    [("sd1", 64, 8, 768, False), ("sd2", 96, [5, 10, 20, 20], 1024, True)],
)
def test_the_published_configuration(kind, side, heads, context, linear):
    written = json.loads(json.dumps(unet_config(CONFIGS[kind], Resolution(8 * side, 8 * side))))
    assert written["sample_size"] == side and written["attention_head_dim"] == heads
    assert written["cross_attention_dim"] == context and written["use_linear_projection"] is linear
    assert written["block_out_channels"] == [320, 640, 1280, 1280] and written["layers_per_block"] == 2
    assert written["down_block_types"] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert written["up_block_types"] == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3


@pytest.mark.reference
@torch.no_grad()
def test_diffusers_loads_both_layouts_and_answers_the_same(models, tmp_path):
    from diffusers import StableDiffusionPipeline

    v_prediction = models.variant == "sd2-v"
    family = family_of(models.single)
    trained = trained_by(family, clip=True)
    folder = write(family, trained, tmp_path / "folder", "diffusers")
    file = write(family, trained, tmp_path / "m.safetensors", "safetensors")
    again = family_of(file, tokenizer_dir=str(models.single.parent / "tokenizer"))
    strategy, encoders = again.text_strategy(), again.load_text_encoders(**CPU)
    context = strategy.encode(encoders, strategy.tokenize(["a red circle", ""])).context
    x_t, timestep = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 871])
    ours = again.load_denoiser(**CPU)(x_t, timestep, context)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    picture = again.latents.decode(again.load_vae(**CPU), latents)
    for pipeline in (
        StableDiffusionPipeline.from_pretrained(folder),
        StableDiffusionPipeline.from_single_file(str(file), config=str(folder), local_files_only=True),
    ):
        assert pipeline.scheduler.config.prediction_type == ("v_prediction" if v_prediction else "epsilon")
        ids = pipeline.tokenizer(["a red circle", ""], padding="max_length", return_tensors="pt").input_ids
        encoded = pipeline.text_encoder(ids)[0]
        torch.testing.assert_close(encoded, context, atol=1e-5, rtol=1e-4)
        theirs = pipeline.unet(x_t, timestep, encoder_hidden_states=encoded).sample
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-4)
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        torch.testing.assert_close(picture, decoded, atol=1e-5, rtol=1e-4)
