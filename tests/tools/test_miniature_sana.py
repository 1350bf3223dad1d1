import pytest
import torch
from safetensors.torch import load_file

from library.config.model import ModelConfig
from library.families.sana.checkpoint import check_weights, load_dit, load_vae, read_dit_config
from library.families.sana.files import locate, problems
from library.families.sana.options import LATENTS, SanaOptions
from library.io.header import read_header
from library.nn.attention import sdpa
from tests.tiny import TINY_SANA
from tools.make_miniature import main
from tools.miniature_sana import FILE_NAME, make_sana

CPU = {"device": "cpu", "dtype": torch.float32}


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    return make_sana(tmp_path_factory.mktemp("miniature"))


def located(path):
    return locate(ModelConfig(pretrained_model_name_or_path=str(path)), SanaOptions())


def test_same_seed_same_bytes(miniature, tmp_path):
    again, other = make_sana(tmp_path / "again"), make_sana(tmp_path / "other", seed=1)
    for name in (FILE_NAME, "tokenizer/tokenizer.json"):
        assert (again.parent / name).read_bytes() == (miniature.parent / name).read_bytes(), name
    assert other.read_bytes() != miniature.read_bytes()


def test_published_names(miniature):
    names = read_header(miniature).tensors
    for name in (
        "model.diffusion_model.blocks.3.attn.q_norm.weight",
        "model.diffusion_model.blocks.0.mlp.depth_conv.conv.weight",
        "first_stage_model.encoder.stages.3.op_list.0.context_module.main.qkv.conv.weight",
        "text_encoders.gemma2_2b.transformer.model.layers.0.mlp.gate_proj.weight",
    ):
        assert name in names


@pytest.mark.parametrize("layout", ["single", "diffusers"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_every_layout_and_type_is_a_whole_model(tmp_path, layout, dtype):
    path = make_sana(tmp_path, layout=layout, dtype=dtype, sizes=TINY_SANA)
    assert problems(ModelConfig(pretrained_model_name_or_path=str(path)), SanaOptions()) == []
    files = located(path)
    assert check_weights(files, read_dit_config(files, SanaOptions())) == []
    stored = {info.dtype for part in (files.denoiser, files.vae, files.gemma) for info in part.tensors.values()}
    assert stored == {{"fp32": "F32", "fp16": "F16", "bf16": "BF16"}[dtype]}


@torch.no_grad()
def test_activations_are_moderate(miniature):
    files = located(miniature)
    torch.manual_seed(0)
    denoiser = load_dit(files, read_dit_config(files, SanaOptions()), attention=sdpa, **CPU)
    context = torch.randn(2, 100, denoiser.config.context_width)
    for timestep in (999.0, 500.0, 10.0):
        x_t = torch.randn(2, 32, 4, 4)
        velocity = denoiser(x_t, torch.full((2,), timestep), context)
        assert 0.2 < velocity.std() < 2 and velocity.abs().max() < 10
    assert (denoiser(x_t, torch.full((2,), 10.0), context.flip(0)) - velocity).std() > 0.05
    vae = load_vae(files, **CPU)
    latents = LATENTS.normalise(vae.encode(torch.rand(1, 3, 128, 128) * 2 - 1))
    assert 0.4 < latents.std() < 2
    pixels = vae.decode(LATENTS.denormalise(torch.randn(1, 32, 4, 4)))
    assert 0.1 < pixels.std() < 0.6 and (pixels.abs() > 1).float().mean() < 0.05


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sana", "--layout", "diffusers"]) == 0
    assert (tmp_path / "miniatures" / "sana" / "model_index.json").is_file()
    assert main(["sana", "--output", "here", "--dtype", "bf16"]) == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "here" / FILE_NAME).values()} == {torch.bfloat16}
    assert "here" in capsys.readouterr().out


@pytest.mark.reference
def test_diffusers_draws_with_the_folder(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.SanaPipeline.from_pretrained(make_sana(tmp_path, layout="diffusers"))
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        "a red circle",
        height=64,
        width=64,
        num_inference_steps=2,
        use_resolution_binning=False,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert pictures.shape == (1, 3, 64, 64) and pictures.isfinite().all() and 0.02 < pictures.std() < 0.45
