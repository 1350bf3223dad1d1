import json
import math
import shutil
from types import SimpleNamespace

import pytest

from library.config.errors import ConfigError
from library.config.model import ModelConfig
from library.families.sd3.checkpoint import check_weights
from library.families.sd3.files import describe, locate, problems
from library.families.sd3.options import Sd3Options
from library.families.sd3.sizes import clip_sizes, denoiser_sizes, t5_sizes, vae_sizes
from tests.families.sd3.published_files import (
    CLIP_G_PREFIX,
    CLIP_L_PREFIX,
    DENOISER_PREFIX,
    DEPTHS,
    KINDS,
    T5_PREFIX,
    VAE_PREFIX,
    denoiser_in_diffusers_layout,
    everything,
    prefixed,
    published,
    vae_in_diffusers_layout,
    write_sparse,
    write_sparse_folder,
    write_sparse_shards,
)

PARAMETERS = {"medium": 2_028_328_000, "5-large": 8_056_627_520, "5-medium": 2_243_171_520}
TENSORS = {"medium": 491, "5-large": 923, "5-medium": 665}
TENSORS_DIFFUSERS = {"medium": 683, "5-large": 1227, "5-medium": 909}


def located(base, *, vae=None, **encoders):
    return locate(ModelConfig(pretrained_model_name_or_path=str(base), vae=vae and str(vae)), options(encoders))


def found_problems(base, *, vae=None, tokenizer_dir=None, **encoders):
    model = ModelConfig(
        pretrained_model_name_or_path=base and str(base), vae=vae and str(vae), tokenizer_dir=tokenizer_dir
    )
    return problems(model, options(encoders))


def options(encoders):
    return Sd3Options(**{name: str(path) for name, path in encoders.items()})


@pytest.fixture(scope="module")
def separate(tmp_path_factory):
    """Each part of SD3.5 medium in a file of its own."""
    folder = tmp_path_factory.mktemp("separate")
    return SimpleNamespace(
        folder=folder,
        base=write_sparse(
            folder / "sd3.5_medium.safetensors",
            prefixed(DENOISER_PREFIX, published("5-medium")) | prefixed(VAE_PREFIX, published("vae")),
        ),
        bare=write_sparse(folder / "mmdit.safetensors", published("5-medium")),
        vae=write_sparse(folder / "vae.safetensors", published("vae")),
        clip_l=write_sparse(folder / "clip_l.safetensors", published("clip_l")),
        clip_g=write_sparse(folder / "clip_g.safetensors", published("clip_g")),
        t5xxl=write_sparse(folder / "t5xxl.safetensors", published("t5xxl"), dtype="F8_E4M3"),
    )


def assert_complete(files, kind, t5=True):
    """All tensors of the published model are found under their own names, and fit the modules."""
    assert describe(files).parameters == PARAMETERS[kind]
    assert check_weights(files) == []
    for part, name in ((files.clip_l, "clip_l"), (files.clip_g, "clip_g"), (files.t5xxl, "t5xxl")):
        if name == "t5xxl" and not t5:
            assert part is None
            continue
        missing = set(published(name)) - set(part.names)
        assert missing <= {"text_projection.weight", "encoder.embed_tokens.weight"}
        assert part.shapes == {own: published(name)[own] for own in part.names}
    assert clip_sizes(files.clip_l).depth == 12
    assert clip_sizes(files.clip_g).pooled_width == 1280
    assert vae_sizes(files.vae).level_widths == (128, 256, 512, 512)
    if t5:
        assert t5_sizes(files.t5xxl).width == 4096


# Every way to store the published models


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_with_everything_inside(tmp_path, kind):
    files = located(write_sparse(tmp_path / "model.safetensors", everything(kind)))
    assert_complete(files, kind)
    assert (len(files.denoiser.names), files.denoiser.layout) == (TENSORS[kind], "single")
    assert len(files.vae.names) == 244
    assert files.folder is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_in_diffusers_layout(tmp_path, kind):
    files = located(write_sparse_folder(tmp_path / "model", kind))
    assert_complete(files, kind)
    assert (len(files.denoiser.names), files.denoiser.layout) == (TENSORS_DIFFUSERS[kind], "diffusers")
    assert len(files.denoiser.headers) == len(files.t5xxl.headers) == 2
    assert files.vae.layout == "diffusers"
    assert files.folder == tmp_path / "model"


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_read_from_shapes_in_both_layouts(tmp_path, kind):
    single = located(write_sparse(tmp_path / "model.safetensors", everything(kind)))
    folder = located(write_sparse_folder(tmp_path / "model", kind))
    sizes = denoiser_sizes(single.denoiser)
    assert sizes == denoiser_sizes(folder.denoiser)
    assert vae_sizes(single.vae) == vae_sizes(folder.vae)
    assert (sizes.depth, sizes.width, sizes.num_heads) == (DEPTHS[kind], 64 * DEPTHS[kind], DEPTHS[kind])
    assert (sizes.patch_size, sizes.in_channels, sizes.context_width, sizes.pooled_width) == (2, 16, 4096, 2048)
    assert sizes.pos_embed_max_size == (384 if kind == "5-medium" else 192)
    assert sizes.qk_norm == (kind != "medium")
    assert sizes.dual_attention_blocks == (tuple(range(13)) if kind == "5-medium" else ())
    assert vae_sizes(single.vae).blocks_per_level == 2
    assert vae_sizes(single.vae).latent_channels == 16


@pytest.mark.parametrize(
    ("kind", "title", "architecture"),
    [
        ("medium", "Stable Diffusion 3 medium", "stable-diffusion-3-medium"),
        ("5-large", "Stable Diffusion 3.5 large", "stable-diffusion-3-5-large"),
        ("5-medium", "Stable Diffusion 3.5 medium", "stable-diffusion-3-5-medium"),
    ],
)
def test_the_model_is_named(tmp_path, kind, title, architecture):
    description = describe(located(write_sparse(tmp_path / "model.safetensors", everything(kind))))
    assert (description.title, description.architecture, description.base_model_version) == (title, architecture, kind)
    assert description.sizes["depth"] == DEPTHS[kind]
    assert description.sizes["T5"] == "present"
    assert description.native_resolution == (1024, 1024)


def test_parts_in_files_of_their_own(separate):
    files = located(separate.base, clip_l=separate.clip_l, clip_g=separate.clip_g, t5xxl=separate.t5xxl)
    assert_complete(files, "5-medium")
    assert files.vae.title == str(separate.base)
    assert files.clip_g.title == str(separate.clip_g)


def test_a_bare_denoiser(separate):
    files = located(
        separate.bare, vae=separate.vae, clip_l=separate.clip_l, clip_g=separate.clip_g, t5xxl=separate.t5xxl
    )
    assert_complete(files, "5-medium")
    assert set(files.denoiser.names) == set(published("5-medium"))


def test_a_denoiser_file_in_diffusers_spelling(separate, tmp_path):
    bare = write_sparse(tmp_path / "transformer.safetensors", denoiser_in_diffusers_layout("5-medium"))
    files = located(bare, vae=separate.vae, clip_l=separate.clip_l, clip_g=separate.clip_g)
    assert_complete(files, "5-medium", t5=False)
    assert files.denoiser.layout == "diffusers"


def test_a_transformer_folder_or_index_alone(separate, tmp_path):
    write_sparse_shards(tmp_path, "diffusion_pytorch_model", denoiser_in_diffusers_layout("5-medium"), count=3)
    for base in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors.index.json"):
        files = located(base, vae=separate.vae, clip_l=separate.clip_l, clip_g=separate.clip_g)
        assert_complete(files, "5-medium", t5=False)


def test_t5_may_be_absent(separate, tmp_path):
    files = located(separate.base, clip_l=separate.clip_l, clip_g=separate.clip_g)
    assert files.t5xxl is None
    assert describe(files).sizes["T5"] == "absent (zeros stand in for it)"
    assert_complete(located(write_sparse_folder(tmp_path / "model", "5-medium", t5=False)), "5-medium", t5=False)


def test_a_folder_may_be_mixed_with_files(separate, tmp_path):
    folder = write_sparse_folder(tmp_path / "model", "medium", t5=False)
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "text_encoder_2")
    (folder / "text_encoder" / "model.fp16.safetensors").write_bytes(b"broken, and not looked at")
    files = located(folder, vae=separate.vae, clip_l=separate.clip_l, clip_g=separate.clip_g, t5xxl=separate.t5xxl)
    assert_complete(files, "medium")


def test_named_files_win_over_what_is_inside(separate, tmp_path):
    whole = write_sparse(tmp_path / "model.safetensors", everything("5-medium"))
    folder = write_sparse_folder(tmp_path / "model", "5-medium")
    named = {name: getattr(separate, name) for name in ("vae", "clip_l", "clip_g", "t5xxl")}
    for base in (whole, folder):
        files = located(base, **named)
        for name, path in named.items():
            assert getattr(files, name).headers[0].path == path
        assert_complete(files, "5-medium")


# Common spellings of single parts


@pytest.mark.parametrize(
    "prefix",
    ["", "transformer.", "text_encoders.clip_l.transformer.", "cond_stage_model.transformer.", "clip_l."],
)
def test_spellings_of_clip_files(separate, tmp_path, prefix):
    path = write_sparse(tmp_path / "clip_l.safetensors", prefixed(prefix, published("clip_l")))
    files = located(separate.base, clip_l=path, clip_g=separate.clip_g)
    assert files.clip_l.shapes == published("clip_l")


def test_a_whole_clip_with_its_vision_half(separate, tmp_path):
    vision = {"vision_model.encoder.layers.0.mlp.fc1.weight": (4, 4), "visual_projection.weight": (4, 4)}
    extra = {"logit_scale": (), "text_model.embeddings.position_ids": (1, 77)}
    path = write_sparse(tmp_path / "clip.safetensors", vision | published("clip_l") | extra)
    files = located(separate.base, clip_l=path, clip_g=separate.clip_g)
    assert files.clip_l.shapes == published("clip_l")


def test_one_file_may_serve_both_clips(separate, tmp_path):
    both = prefixed(CLIP_L_PREFIX, published("clip_l")) | prefixed(CLIP_G_PREFIX, published("clip_g"))
    path = write_sparse(tmp_path / "clips.safetensors", both)
    files = located(separate.base, clip_l=path, clip_g=path)
    assert (clip_sizes(files.clip_l).width, clip_sizes(files.clip_g).width) == (768, 1280)


def test_sdxl_and_sd1_checkpoints_serve_as_clip_files(separate, tmp_path):
    sdxl = prefixed("conditioner.embedders.0.transformer.", published("clip_l"))
    path = write_sparse(tmp_path / "sdxl.safetensors", sdxl | {"model.diffusion_model.label_emb.0.0.weight": (4, 2816)})
    assert located(separate.base, clip_l=path, clip_g=separate.clip_g).clip_l.shapes == published("clip_l")


def t5(*, shared=True, copy=True):
    names = published("t5xxl")
    if not shared:
        del names["shared.weight"]
    if not copy:
        del names["encoder.embed_tokens.weight"]
    return names


@pytest.mark.parametrize(
    "shapes",
    [
        t5(),
        t5(copy=False),
        t5(shared=False),
        prefixed("transformer.", t5()),
        prefixed(T5_PREFIX, t5(copy=False)),
        t5() | {"lm_head.weight": (32128, 4096), "decoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096)},
    ],
    ids=["both embeddings", "shared", "copy", "transformer.", "text_encoders.", "with decoder"],
)
def test_spellings_of_t5_files(separate, tmp_path, shapes):
    path = write_sparse(tmp_path / "t5.safetensors", shapes)
    files = located(separate.base, clip_l=separate.clip_l, clip_g=separate.clip_g, t5xxl=path)
    assert t5_sizes(files.t5xxl).depth == 24
    assert not any(name.startswith(("decoder", "lm_head")) for name in files.t5xxl.names)


@pytest.mark.parametrize(
    ("shapes", "layout"),
    [
        (prefixed(VAE_PREFIX, published("vae")), "single"),
        (prefixed("vae.", published("vae")), "single"),
        (published("vae") | {"loss.logvar": ()}, "single"),
        (vae_in_diffusers_layout(), "diffusers"),
        (everything("medium"), "single"),
    ],
    ids=["first_stage_model.", "vae.", "bare with loss", "diffusers", "inside another model"],
)
def test_spellings_of_vae_files(separate, tmp_path, shapes, layout):
    path = write_sparse(tmp_path / "vae.safetensors", shapes)
    files = located(separate.base, vae=path, clip_l=separate.clip_l, clip_g=separate.clip_g)
    assert files.vae.layout == layout
    assert len(files.vae.names) == 244
    assert check_weights(files) == []


# What is wrong, each in one line that names the option or the file


def assert_problem(lines, expected):
    assert lines == [expected]
    assert "\n" not in expected


def test_no_base_model():
    assert_problem(
        found_problems(None),
        "--pretrained_model_name_or_path is missing; name the base model's file, or its folder in diffusers' layout",
    )


def test_all_problems_are_returned_at_once(tmp_path):
    lines = found_problems(
        tmp_path / "no.safetensors",
        vae=tmp_path / "vae.safetensors",
        clip_l=tmp_path / "l.safetensors",
        tokenizer_dir=str(tmp_path / "tok"),
    )
    assert lines == [
        f"--pretrained_model_name_or_path: {tmp_path}/no.safetensors does not exist",
        f"--vae: {tmp_path}/vae.safetensors does not exist",
        f"--clip_l: {tmp_path}/l.safetensors does not exist",
        f"--tokenizer_dir: {tmp_path}/tok is not a folder",
    ]
    with pytest.raises(ConfigError) as error:
        located(tmp_path / "no.safetensors", vae=tmp_path / "vae.safetensors")
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("name", ["stabilityai/stable-diffusion-3-medium", "stabilityai/stable-diffusion-3.5-large"])
def test_hub_names_are_not_downloaded(name):
    assert_problem(
        found_problems(name),
        f"--pretrained_model_name_or_path: {name} is no file or folder here; download it first, then name its folder",
    )


def test_parts_that_are_nowhere(separate):
    assert found_problems(separate.bare) == [
        f"no VAE: {separate.bare} has none inside; add --vae",
        f"no CLIP-L: {separate.bare} has none inside; add --clip_l",
        f"no CLIP-G: {separate.bare} has none inside; add --clip_g",
    ]
    assert_problem(
        found_problems(separate.base, clip_l=separate.clip_l),
        f"no CLIP-G: {separate.base} has none inside; add --clip_g",
    )


def test_parts_that_a_folder_lacks(tmp_path):
    folder = write_sparse_folder(tmp_path / "model", "medium")
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "text_encoder_2")
    assert found_problems(folder) == [
        f"no VAE: {folder} has no folder vae; add --vae",
        f"no CLIP-G: {folder} has no folder text_encoder_2; add --clip_g",
    ]


@pytest.mark.parametrize(
    ("shapes", "seen"),
    [
        ({"double_blocks.0.img_attn.qkv.weight": (4, 4)}, "looks like FLUX (double_blocks.*)"),
        ({"model.diffusion_model.label_emb.0.0.weight": (4, 2816), "model.diffusion_model.input_blocks.0.0.bias": (4,)},
         "looks like SDXL (input_blocks.*, label_emb)"),
        ({"blocks.0.mlp.inverted_conv.conv.weight": (4, 4, 1, 1)}, "looks like Sana (blocks.*.mlp.inverted_conv)"),
        (published("clip_g"), "looks like CLIP-G (text_model.*, width 1280)"),
        ({"lora_unet_x.lora_down.weight": (4, 4)}, "looks like a LoRA in kohya's spelling (*.lora_down.weight)"),
        (
            denoiser_in_diffusers_layout("medium") | {"controlnet_blocks.0.weight": (4, 4)},
            "looks like a ControlNet (controlnet_blocks.*)",
        ),
        ({"a": (4,), "b": (4,), "c": (4,), "d": (4,)}, "is not known (it holds a, b, c, ...)"),
    ],
    ids=["FLUX", "SDXL", "Sana", "CLIP-G", "LoRA", "ControlNet", "unknown"],
)  # fmt: skip
def test_another_model_is_called_by_its_name_and_nothing_else_is_said(tmp_path, shapes, seen):
    path = write_sparse(tmp_path / "model.safetensors", shapes)
    scripts = {"Sana": "; it is for sana_train_network.py and sana_train.py"}
    scripts |= dict.fromkeys(("FLUX", "SDXL"), "; no script here is for it")
    remedy = scripts.get(seen.split()[2], "")
    assert_problem(found_problems(path), f"{path} {seen}, expected SD3 (joint_blocks.*){remedy}")


def test_a_folder_of_another_model(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    assert_problem(
        found_problems(tmp_path),
        f"{tmp_path} is a folder of StableDiffusionXLPipeline, expected one of StableDiffusion3Pipeline",
    )
    write_sparse(
        tmp_path / "transformer" / "diffusion_pytorch_model.safetensors",
        {"single_transformer_blocks.0.proj_out.bias": (4,)},
    )
    assert_problem(
        found_problems(tmp_path),
        f"{tmp_path}/transformer looks like FLUX in diffusers' spelling (single_transformer_blocks.*), "
        "expected SD3 (joint_blocks.*); no script here is for it",
    )


def test_a_folder_without_a_denoiser(tmp_path):
    (tmp_path / "vae").mkdir()
    assert_problem(
        found_problems(tmp_path), f"{tmp_path} has no folder transformer, where diffusers keeps SD3's denoiser"
    )


@pytest.mark.parametrize(
    ("option", "given", "expected"),
    [
        ("clip_l", "clip_g", "looks like CLIP-G (text_model.*, width 1280), expected CLIP-L (text_model.*, width 768)"),
        ("clip_g", "clip_l", "looks like CLIP-L (text_model.*, width 768), expected CLIP-G (text_model.*, width 1280)"),
        ("clip_l", "t5xxl", "looks like T5-XXL (encoder.block.*), expected CLIP-L (text_model.*, width 768)"),
        (
            "t5xxl",
            "clip_l",
            "looks like CLIP-L (text_model.*, width 768), expected T5-XXL (encoder.block.*, width 4096)",
        ),
        ("vae", "bare", "looks like SD3 (joint_blocks.*), expected SD3's VAE (encoder.*, decoder.*, 16 channels)"),
    ],
)
def test_files_given_to_the_wrong_option(separate, option, given, expected):
    named = {"clip_l": separate.clip_l, "clip_g": separate.clip_g} | {option: getattr(separate, given)}
    assert_problem(found_problems(separate.base, **named), f"--{option}: {getattr(separate, given)} {expected}")


def older_vae():
    shapes = dict(published("vae"))
    shapes["decoder.conv_in.weight"] = (512, 4, 3, 3)
    shapes["encoder.conv_out.weight"] = (8, 512, 3, 3)
    return shapes | {"quant_conv.weight": (8, 8, 1, 1), "post_quant_conv.weight": (4, 4, 1, 1)}


def test_a_vae_with_four_channels(separate, tmp_path):
    path = write_sparse(tmp_path / "vae.safetensors", older_vae())
    assert_problem(
        found_problems(separate.base, vae=path, clip_l=separate.clip_l, clip_g=separate.clip_g),
        f"--vae: {path} holds an SD1 or SDXL VAE with 4 channels; SD3 needs 16",
    )


def test_a_vae_with_other_channels(separate, tmp_path):
    shapes = published("vae") | {"decoder.conv_in.weight": (512, 32, 3, 3)}
    path = write_sparse(tmp_path / "vae.safetensors", shapes)
    assert_problem(
        found_problems(separate.base, vae=path, clip_l=separate.clip_l, clip_g=separate.clip_g),
        f"--vae: {path} is a VAE with 32 channels; the denoiser takes 16",
    )


def test_encoders_that_do_not_fit_the_denoiser(separate, tmp_path):
    def clip_h(shape):
        return tuple(1024 if n == 1280 else n for n in shape)

    shapes = {name: clip_h(shape) for name, shape in published("clip_g").items()}
    path = write_sparse(tmp_path / "clip_h.safetensors", shapes)
    assert_problem(
        found_problems(separate.base, clip_l=separate.clip_l, clip_g=path),
        f"--clip_l: {separate.clip_l} (CLIP-L, width 768) and --clip_g: {path} (CLIP-G, width 1024) "
        "do not fit the denoiser, which takes 2048 together",
    )
    narrow = {name: tuple(2048 if n == 4096 else n for n in shape) for name, shape in published("t5xxl").items()}
    path = write_sparse(tmp_path / "t5_xl.safetensors", narrow)
    assert_problem(
        found_problems(separate.base, clip_l=separate.clip_l, clip_g=separate.clip_g, t5xxl=path),
        f"--t5xxl: {path} is a T5 of width 2048; the denoiser takes 4096",
    )


def test_clips_with_more_features_than_the_denoiser_takes(separate, tmp_path):
    shapes = published("5-medium") | {"context_embedder.weight": (1536, 2000)}
    base = write_sparse(tmp_path / "model.safetensors", shapes)
    lines = found_problems(base, vae=separate.vae, clip_l=separate.clip_l, clip_g=separate.clip_g)
    assert lines == [
        f"--clip_l: {separate.clip_l} (CLIP-L, width 768) and --clip_g: {separate.clip_g} (CLIP-G, width 1280) "
        "give more features per token than the denoiser takes, 2000"
    ]


@pytest.mark.parametrize("cut", [1, 5_000_000_000])
def test_a_truncated_file(separate, tmp_path, cut):
    path = write_sparse(tmp_path / "t5.safetensors", published("t5xxl"))
    size = path.stat().st_size
    with open(path, "rb+") as file:
        file.truncate(size - cut)
    assert_problem(
        found_problems(separate.base, clip_l=separate.clip_l, clip_g=separate.clip_g, t5xxl=path),
        f"--t5xxl: {path} is truncated: {cut:,} bytes are missing at its end; download it again",
    )


def test_no_weights_file_at_all(separate, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"<!DOCTYPE html><html>Please log in</html>")
    assert_problem(
        found_problems(path),
        f"--pretrained_model_name_or_path: {path} is not a safetensors file: it is a web page, not a model "
        "(the download went wrong)",
    )


@pytest.mark.parametrize("part", ["denoiser", "vae", "clip_l", "clip_g", "t5xxl"])
@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_an_incomplete_part_or_one_with_more_than_it_should_have(separate, tmp_path, part, change):
    victims = {
        "denoiser": ("5-medium", "joint_blocks.7.x_block.attn2.proj.bias", "joint_blocks.7.x_block.other.bias"),
        "vae": ("vae", "decoder.mid.attn_1.q.bias", "decoder.other.bias"),
        "clip_l": ("clip_l", "text_model.encoder.layers.3.mlp.fc1.bias", "text_model.other.bias"),
        "clip_g": ("clip_g", "text_model.final_layer_norm.bias", "text_model.other.bias"),
        "t5xxl": ("t5xxl", "encoder.block.9.layer.1.DenseReluDense.wi_1.weight", "encoder.other.bias"),
    }
    kind, victim, other = victims[part]
    shapes = dict(published(kind))
    if change == "missing":
        del shapes[victim]
        expected = f"is incomplete: 1 of {{}} tensors are missing ({victim})"
    else:
        shapes[other] = (4,)
        expected = f"holds 1 unknown tensors ({other})"
    path = write_sparse(tmp_path / "part.safetensors", shapes)
    named = {name: getattr(separate, name) for name in ("vae", "clip_l", "clip_g", "t5xxl")}
    base = separate.bare
    if part == "denoiser":
        base = path
    else:
        named[part] = path
    optional = {"clip_l": 1, "clip_g": 1, "t5xxl": 1}.get(part, 0)  # the projection, or one of the two embeddings
    expected = expected.format(len(published(kind)) - optional)
    start = "" if part == "denoiser" else f"--{part}: "
    assert_problem(found_problems(base, **named), f"{start}{path} {expected}")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "encoder.block.0.layer.0.SelfAttention.q.pre_quant_scale",
            "is quantised in a format that is not known here ({}); use the fp16 or the bf16 file",
        ),
        (
            "encoder.block.0.layer.0.SelfAttention.q.weight.absmax",
            "is quantised by bitsandbytes ({}), and can't be trained; use fp16 or bf16",
        ),
    ],
    ids=["another format", "bitsandbytes"],
)
def test_quantised_files_are_refused_with_the_reason(separate, tmp_path, name, expected):
    path = write_sparse(tmp_path / "t5.safetensors", published("t5xxl") | {name: (1,)}, dtype="F8_E4M3")
    assert_problem(
        found_problems(separate.base, clip_l=separate.clip_l, clip_g=separate.clip_g, t5xxl=path),
        f"--t5xxl: {path} {expected.format(name)}",
    )


def test_scales_of_another_kind_inside_a_checkpoint_are_refused_but_can_be_replaced(separate, tmp_path):
    scaled = everything("5-medium") | {f"{T5_PREFIX}encoder.final_layer_norm.scale_weight": ()}
    path = write_sparse(tmp_path / "model.safetensors", scaled, dtype="F8_E4M3")
    (line,) = found_problems(path)
    scale = f"{T5_PREFIX}encoder.final_layer_norm.scale_weight"
    assert line.startswith(f"{path}: {scale} is one number of F8_E4M3, and only one number in fp32")
    assert found_problems(path, t5xxl=separate.t5xxl) == []


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (
            "F8_E5M2",
            "stores context_embedder.weight as fp8 e5m2, which keeps two bits of precision: too few to start a "
            "training from; use the fp16 or the fp8_e4m3fn file",
        ),
        ("I8", "stores context_embedder.weight as I8, which is no plain weight; use the fp16 or bf16 file"),
    ],
)
def test_types_that_can_not_be_read_are_refused_with_the_reason(tmp_path, dtype, expected):
    shapes = dict(sorted(published("medium").items(), key=lambda item: item[0] != "context_embedder.weight"))
    path = write_sparse(tmp_path / "model.safetensors", shapes, dtype=dtype)
    assert_problem(found_problems(path), f"{path} {expected}")


def test_sizes_that_no_mmdit_has(separate, tmp_path):
    named = {"vae": separate.vae, "clip_l": separate.clip_l, "clip_g": separate.clip_g}
    path = write_sparse(tmp_path / "a.safetensors", published("medium") | {"pos_embed": (1, 1000, 1536)})
    assert_problem(found_problems(path, **named), f"{path}: pos_embed has 1000 positions, which is no square")
    path = write_sparse(tmp_path / "b.safetensors", published("medium") | {"x_embedder.proj.weight": (1500, 16, 2, 2)})
    assert_problem(
        found_problems(path, **named), f"{path}: the denoiser's width 1500 is not a multiple of its head size 64"
    )
    path = write_sparse(tmp_path / "c.safetensors", published("medium") | {"x_embedder.proj.weight": (1536, 64)})
    assert_problem(
        found_problems(path, **named),
        f"{path}: x_embedder.proj.weight is 1536x64, which has 2 dimensions rather than 4",
    )
    without = published("medium")
    del without["pos_embed"]
    path = write_sparse(tmp_path / "d.safetensors", without)
    assert_problem(found_problems(path, **named), f"{path} is incomplete: pos_embed is missing")


def test_checking_a_16_gigabyte_file_reads_its_header_only(tmp_path):
    path = write_sparse(tmp_path / "model.safetensors", everything("5-large"))
    assert path.stat().st_size > 2 * sum(math.prod(shape) for shape in published("5-large").values())
    assert path.stat().st_blocks * 512 < 1_000_000  # the file is a hole; the test's own disk use
    assert found_problems(path) == []
