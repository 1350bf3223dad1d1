import pytest
import torch

from library.config.errors import ConfigError
from library.config.model import ModelConfig
from library.families.sd3.checkpoint import check_weights, load_mmdit, load_vae, read_mmdit_config, read_vae_config
from library.families.sd3.files import locate
from library.families.sd3.mmdit import CONFIGS
from library.families.sd3.options import Sd3Options
from library.families.sd3.sizes import denoiser_sizes, vae_sizes
from library.io.header import read_header
from library.io.key_maps import to_diffusers
from library.io.safetensors import load_tensors, save_tensors
from library.nn.attention import sdpa
from library.nn.autoencoder_kl import SD3_VAE
from tests.families.sd3.published_files import (
    DENOISER_PREFIX,
    everything,
    published,
    write_sparse,
    write_sparse_folder,
)
from tests.tiny import TINY_SD3 as TINY
from tools.miniature_sd3 import sd3_weights

PREFIXES = {
    "denoiser": DENOISER_PREFIX,
    "vae": "first_stage_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
}


@pytest.fixture(scope="module")
def weights():
    return sd3_weights(0, TINY)


@pytest.fixture(scope="module")
def encoders(weights, tmp_path_factory):
    """Both CLIPs in files of their own."""
    folder = tmp_path_factory.mktemp("encoders")
    for name in ("clip_l", "clip_g"):
        save_tensors(weights[name], folder / f"{name}.safetensors", {})
    return {name: str(folder / f"{name}.safetensors") for name in ("clip_l", "clip_g")}


def located(base, vae=None, **named):
    return locate(ModelConfig(pretrained_model_name_or_path=str(base), vae=vae and str(vae)), Sd3Options(**named))


def mmdit(files, *, device="cpu", dtype=torch.float32, **options):
    return load_mmdit(files, attention=sdpa, device=device, dtype=dtype, **options)


def vae(files, *, device="cpu", dtype=torch.float32, **options):
    return load_vae(files, device=device, dtype=dtype, **options)


def assert_holds(module, expected):
    state = module.state_dict()
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name].float(), tensor.float()), name
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("layout", ["tiny_file", "tiny_folder"])
def test_both_layouts_give_the_weights_that_were_stored(layout, mmap, weights, request):
    files = located(request.getfixturevalue(layout))
    assert check_weights(files) == []
    assert_holds(mmdit(files, mmap=mmap), weights["denoiser"])
    assert_holds(vae(files, mmap=mmap), weights["vae"])


def test_sizes_come_from_the_tensors(tiny_file, tiny_folder):
    for base in (tiny_file, tiny_folder):
        assert read_mmdit_config(located(base)) == TINY.denoiser()
        assert read_vae_config(located(base)) == TINY.vae()


def test_loaded_models_compute(tiny_file, tiny_folder):
    x_t, timestep = torch.randn(2, 16, 8, 8), torch.tensor([100.0, 900.0])
    context, pooled = torch.randn(2, 5, TINY.t5_width), torch.randn(2, TINY.clip_l_width + TINY.clip_g_width)
    outputs = [mmdit(located(base))(x_t, timestep, context, pooled) for base in (tiny_file, tiny_folder)]
    assert outputs[0].abs().mean() > 0.01
    assert torch.equal(*outputs)


def whole(weights, dtype):
    return {PREFIXES[part] + name: tensor.to(dtype) for part in PREFIXES for name, tensor in weights[part].items()}


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_converted_to_the_type_asked_for(weights, tmp_path, stored, dtype):
    save_tensors(whole(weights, stored), tmp_path / "model.safetensors", {})
    files = located(tmp_path / "model.safetensors")
    for module, part in ((mmdit(files, dtype=dtype), "denoiser"), (vae(files, dtype=dtype), "vae")):
        assert {tensor.dtype for tensor in module.state_dict().values()} == {dtype}
        assert_holds(module, {name: tensor.to(stored).to(dtype) for name, tensor in weights[part].items()})


def test_fp8_in_diffusers_layout(weights, encoders, tmp_path):
    maps = denoiser_sizes(located_bare(weights, encoders, tmp_path).denoiser).key_maps
    converted = {
        name: tensor.contiguous().to(torch.float8_e4m3fn) for name, tensor in to_diffusers(weights["denoiser"], maps)
    }
    save_tensors(converted, tmp_path / "fp8.safetensors", {})
    save_tensors(weights["vae"], tmp_path / "vae.safetensors", {})
    files = located(tmp_path / "fp8.safetensors", tmp_path / "vae.safetensors", **encoders)
    expected = {name: tensor.to(torch.float8_e4m3fn).float() for name, tensor in weights["denoiser"].items()}
    assert_holds(mmdit(files), expected)


def located_bare(weights, encoders, tmp_path):
    save_tensors(weights["denoiser"], tmp_path / "bare.safetensors", {})
    save_tensors(weights["vae"], tmp_path / "vae.safetensors", {})
    return located(tmp_path / "bare.safetensors", tmp_path / "vae.safetensors", **encoders)


def test_a_bare_denoiser_and_a_vae_of_its_own(weights, encoders, tmp_path):
    files = located_bare(weights, encoders, tmp_path)
    assert_holds(mmdit(files), weights["denoiser"])
    assert_holds(vae(files), weights["vae"])


def test_a_named_vae_wins_over_the_one_inside(weights, tiny_file, tmp_path):
    other = {name: tensor + 1 for name, tensor in weights["vae"].items()}
    save_tensors(other, tmp_path / "vae.safetensors", {})
    assert_holds(vae(located(tiny_file, tmp_path / "vae.safetensors")), other)
    assert_holds(vae(located(tiny_file)), weights["vae"])


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_pickles(weights, tmp_path, new_format, nested):
    content = whole(weights, torch.float16)
    content = {"state_dict": content, "global_step": 5} if nested else content
    torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=new_format)
    files = located(tmp_path / "model.ckpt")
    assert check_weights(files) == []
    assert_holds(mmdit(files), {name: tensor.half() for name, tensor in weights["denoiser"].items()})
    assert_holds(vae(files), {name: tensor.half() for name, tensor in weights["vae"].items()})


def test_a_wrong_shape_is_found_before_anything_is_read(weights, encoders, tmp_path):
    weights = weights | {
        "denoiser": weights["denoiser"] | {"joint_blocks.1.x_block.mlp.fc1.bias": torch.zeros(7)},
        "vae": weights["vae"] | {"encoder.norm_out.bias": torch.zeros(9)},
    }
    files = located_bare(weights, encoders, tmp_path)
    for name in ("bare", "vae"):
        (tmp_path / f"{name}.safetensors").unlink()
    expected = [
        f"{tmp_path}/bare.safetensors does not fit MMDiT: 1 of another shape "
        "(joint_blocks.1.x_block.mlp.fc1.bias is 7, not 256)",
        f"{tmp_path}/vae.safetensors does not fit AutoencoderKL: 1 of another shape "
        "(encoder.norm_out.bias is 9, not 64)",
    ]
    assert check_weights(files) == expected
    with pytest.raises(ConfigError) as error:
        mmdit(files)
    assert str(error.value) == expected[0]


@pytest.mark.parametrize(
    ("kind", "config"), [("medium", "sd3-medium"), ("5-large", "sd3.5-large"), ("5-medium", "sd3.5-medium")]
)
def test_the_published_models_load_strictly_in_both_layouts(kind, config, tmp_path):
    single = located(write_sparse(tmp_path / "model.safetensors", everything(kind), dtype="F8_E4M3"))
    folder = located(write_sparse_folder(tmp_path / "model", kind))
    for files in (single, folder):
        assert read_mmdit_config(files) == CONFIGS[config]
        assert read_vae_config(files) == SD3_VAE
        denoiser = mmdit(files, device="meta", dtype=torch.bfloat16)
        shapes = {name: tuple(tensor.shape) for name, tensor in denoiser.state_dict().items()}
        assert shapes == published(kind)
        assert {tensor.dtype for tensor in denoiser.state_dict().values()} == {torch.bfloat16}
        assert len(vae(files, device="meta").state_dict()) == 244


@pytest.mark.reference
def test_folders_that_diffusers_and_transformers_write(weights, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    config = TINY.denoiser()
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        num_layers=config.depth,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        joint_attention_dim=config.context_width,
        caption_projection_dim=config.width,
        pooled_projection_dim=config.pooled_width,
        pos_embed_max_size=config.pos_embed_max_size,
        dual_attention_layers=config.dual_attention_blocks,
        qk_norm="rms_norm",
    )
    autoencoder = diffusers.AutoencoderKL(
        latent_channels=16,
        block_out_channels=TINY.vae_widths,
        layers_per_block=TINY.vae_blocks,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer.save_pretrained(tmp_path / "transformer", max_shard_size="300KB", variant="fp16")
    autoencoder.save_pretrained(tmp_path / "vae")
    CLIPTextModelWithProjection(TINY.clip(TINY.clip_l_width, "quick_gelu")).save_pretrained(tmp_path / "text_encoder")
    CLIPTextModelWithProjection(TINY.clip(TINY.clip_g_width, "gelu")).save_pretrained(
        tmp_path / "text_encoder_2", max_shard_size="50KB"
    )
    T5EncoderModel(TINY.t5()).save_pretrained(tmp_path / "text_encoder_3")

    files = located(tmp_path)
    assert len(files.denoiser.headers) > 2
    assert len(files.clip_g.headers) > 2
    assert files.t5xxl is not None
    for module, theirs, maps in (
        (mmdit(files), transformer, denoiser_sizes(files.denoiser).key_maps),
        (vae(files), autoencoder, vae_sizes(files.vae).key_maps),
    ):
        ours = dict(to_diffusers(module.state_dict(), maps))
        assert set(ours) == set(theirs.state_dict())
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(ours[name], tensor), name


def test_a_saved_denoiser_is_loaded_again(tiny_file, encoders, tmp_path):
    files = located(tiny_file)
    denoiser = mmdit(files)
    save_tensors(denoiser.state_dict(), tmp_path / "saved.safetensors", {})
    again = located(tmp_path / "saved.safetensors", tiny_file, **encoders)
    assert_holds(mmdit(again), denoiser.state_dict())
    assert len(dict(load_tensors(read_header(tmp_path / "saved.safetensors")))) == len(again.denoiser.names)
