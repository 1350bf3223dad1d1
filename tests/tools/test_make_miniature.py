import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.config.model import ModelConfig
from library.families.sd3.checkpoint import check_weights, load_mmdit, load_vae
from library.families.sd3.files import locate, problems
from library.families.sd3.options import Sd3Options
from library.io.header import read_header
from library.nn.attention import sdpa
from tools.make_miniature import main
from tools.miniature_sd3 import FILE_NAME, Sd3Sizes, make_sd3

ROOT = Path(__file__).parents[2]
TOKENIZERS = ("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/vocab.json", "tokenizer_3/tokenizer.json")


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    return make_sd3(tmp_path_factory.mktemp("miniature"))


def located(path):
    return locate(ModelConfig(pretrained_model_name_or_path=str(path)), Sd3Options())


def test_same_seed_same_bytes(miniature, tmp_path):
    again, other = make_sd3(tmp_path / "again"), make_sd3(tmp_path / "other", seed=1)
    for name in (FILE_NAME, *TOKENIZERS):
        assert (again.parent / name).read_bytes() == (miniature.parent / name).read_bytes(), name
    assert other.read_bytes() != miniature.read_bytes()


def test_published_layout(miniature):
    names = read_header(miniature).tensors
    for name in (
        "model.diffusion_model.joint_blocks.1.x_block.attn2.ln_k.weight",
        "model.diffusion_model.pos_embed",
        "first_stage_model.decoder.up.3.upsample.conv.weight",
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight",
        "text_encoders.clip_g.transformer.text_projection.weight",
        "text_encoders.t5xxl.transformer.shared.weight",
    ):
        assert name in names
    assert "text_encoders.clip_l.transformer.text_projection.weight" not in names
    assert not any("joint_blocks.2.x_block.attn2" in name for name in names)


@pytest.mark.parametrize("layout", ["single", "diffusers"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_every_layout_and_type_is_a_whole_model(tmp_path, layout, dtype):
    path = make_sd3(tmp_path, layout=layout, dtype=dtype, sizes=Sd3Sizes(depth=2, width=64, pos_embed_max_size=16))
    assert problems(ModelConfig(pretrained_model_name_or_path=str(path)), Sd3Options()) == []
    files = located(path)
    assert files.t5xxl is not None and check_weights(files) == []
    stored = {info.dtype for part in (files.denoiser, files.vae, files.clip_g) for info in part.tensors.values()}
    assert stored == {{"fp32": "F32", "fp16": "F16", "bf16": "BF16"}[dtype]}


@torch.no_grad()
def test_activations_are_moderate(miniature):
    files = located(miniature)
    torch.manual_seed(0)
    denoiser = load_mmdit(files, attention=sdpa, device="cpu", dtype=torch.float32)
    config = denoiser.config
    context, pooled = torch.randn(2, 100, config.context_width), torch.randn(2, config.pooled_width)
    for sigma in (1.0, 0.5, 0.01):
        x_t = torch.randn(2, 16, 32, 32)
        velocity = denoiser(x_t, torch.full((2,), sigma * 1000), context, pooled)
        assert 0.2 < velocity.std() < 2 and velocity.abs().max() < 10
    assert (denoiser(x_t, torch.full((2,), 10.0), context.flip(0), pooled.flip(0)) - velocity).std() > 0.05
    vae = load_vae(files, device="cpu", dtype=torch.float32)
    mean, log_variance = vae.encode(torch.rand(1, 3, 64, 64) * 2 - 1)
    assert 0.3 < mean.std() < 1.2 and log_variance.max() < -4  # 0.65 would be 1 when normalised
    pixels = vae.decode(torch.randn(1, 16, 8, 8) / 1.5305)
    assert 0.1 < pixels.std() < 0.6 and (pixels.abs() > 1).float().mean() < 0.05


def test_the_command_runs_from_anywhere(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "make_miniature.py"), "sd3", "--output", "here", "--dtype", "fp16"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["--pretrained_model_name_or_path", str(Path("here") / FILE_NAME)]
    assert (tmp_path / "here" / FILE_NAME).stat().st_size > 1e7


def test_the_default_folder_is_named_after_the_family(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sd3", "--layout", "diffusers"]) == 0
    assert (tmp_path / "miniatures" / "sd3" / "model_index.json").is_file()
    assert str(Path("miniatures", "sd3")) in capsys.readouterr().out


@pytest.mark.reference
def test_diffusers_draws_with_the_folder(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(make_sd3(tmp_path, layout="diffusers"))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    pictures = pipeline(
        "a red circle", height=64, width=64, num_inference_steps=2, generator=generator, output_type="pt"
    ).images
    assert pictures.shape == (1, 3, 64, 64) and pictures.isfinite().all() and 0.02 < pictures.std() < 0.45
