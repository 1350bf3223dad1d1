import json
from pathlib import Path

import pytest

from library.families import FAMILIES
from library.io.architectures import ARCHITECTURES, SCRIPTS, find_architecture, identify, scripts_for

ROOT = Path(__file__).parents[2]
KEYS = ROOT / "tests" / "data" / "keys"

MODELS = [
    (
        "SD1.x (input_blocks.*)",
        {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768)},
    ),
    (
        "SD2.x (input_blocks.*)",
        {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024)},
    ),
    (
        "SDXL (input_blocks.*, label_emb)",
        {
            "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
            "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
            "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
        },
    ),
    (
        "SDXL refiner (input_blocks.*, label_emb)",
        {
            "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (768, 1280),
            "model.diffusion_model.label_emb.0.0.weight": (1536, 2560),
        },
    ),
    (
        "unCLIP of SD2.x (input_blocks.*, label_emb)",
        {
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
            "model.diffusion_model.label_emb.0.0.weight": (1280, 2048),
        },
    ),
    (
        "unCLIP of SD2.x in diffusers' spelling (down_blocks.*, class_embedding)",
        {
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
            "class_embedding.linear_1.weight": (1280, 2048),
        },
    ),
    (
        "the upscaler of SD2.x (input_blocks.*, label_emb)",
        {
            "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (512, 1024),
            "model.diffusion_model.label_emb.weight": (1000, 1024),
        },
    ),
    (
        "the upscaler of SD2.x in diffusers' spelling (down_blocks.*, class_embedding)",
        {
            "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (512, 1024),
            "class_embedding.weight": (1000, 1024),
        },
    ),
    (
        "SD1.x in diffusers' spelling (down_blocks.*)",
        {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 768)},
    ),
    (
        "SDXL in diffusers' spelling (down_blocks.*, add_embedding)",
        {
            "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
            "add_embedding.linear_1.weight": (1280, 2816),
        },
    ),
    ("SD3 (joint_blocks.*)", {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536)}),
    ("FLUX (double_blocks.*)", {"double_blocks.0.img_attn.qkv.weight": (9216, 3072)}),
    ("FLUX (double_blocks.*)", {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (9216, 3072)}),
    (
        "FLUX in diffusers' spelling (single_transformer_blocks.*)",
        {
            "single_transformer_blocks.0.attn.to_q.weight": (3072, 3072),
            "transformer_blocks.0.attn.add_q_proj.weight": (3072, 3072),
            "transformer_blocks.0.norm1_context.linear.weight": (18432, 3072),
        },
    ),
    (
        "Chroma (distilled_guidance_layer.*)",
        {"distilled_guidance_layer.in_proj.weight": (1, 1), "double_blocks.0.img_attn.qkv.weight": (1, 1)},
    ),
    ("HunyuanVideo (double_blocks.*.img_attn_qkv)", {"double_blocks.0.img_attn_qkv.weight": (1, 1)}),
    ("Hunyuan-DiT (text_embedding_padding)", {"text_embedding_padding": (333, 1024)}),
    (
        "PixArt (y_embedder.y_proj.*)",
        {
            "y_embedder.y_proj.fc1.weight": (1152, 4096),
            "t_block.1.weight": (6912, 1152),
            "blocks.0.mlp.fc1.weight": (1, 1),
        },
    ),
    (
        "PixArt in diffusers' spelling (adaln_single.*)",
        {"adaln_single.linear.weight": (6912, 1152), "caption_projection.linear_1.weight": (1152, 4096)},
    ),
    (
        "AuraFlow (double_layers.*)",
        {"model.double_layers.0.attn.w1q.weight": (1, 1), "double_layers.0.attn.w1q.weight": (1, 1)},
    ),
    (
        "AuraFlow in diffusers' spelling (joint_transformer_blocks.*)",
        {"joint_transformer_blocks.0.attn.to_q.weight": (1, 1)},
    ),
    ("Lumina (cap_embedder.*)", {"cap_embedder.0.weight": (2304,), "layers.0.attention.qkv.weight": (1, 1)}),
    ("Z-Image (cap_pad_token)", {"cap_pad_token": (1, 3840), "cap_embedder.0.weight": (2560,)}),
    (
        "Wan (blocks.*.cross_attn.norm_q)",
        {"blocks.0.cross_attn.norm_q.weight": (1536,), "text_embedding.0.weight": (1536, 4096)},
    ),
    (
        "Wan in diffusers' spelling (condition_embedder.*)",
        {"condition_embedder.text_embedder.linear_1.weight": (1, 1), "blocks.0.attn1.to_q.weight": (1, 1)},
    ),
    (
        "Qwen-Image (transformer_blocks.*.img_mod)",
        {"transformer_blocks.0.img_mod.1.weight": (1, 1), "transformer_blocks.0.attn.add_q_proj.weight": (1, 1)},
    ),
    (
        "Sana Sprint (cfg_embedder.*)",
        {"cfg_embedder.mlp.0.weight": (1, 1), "blocks.0.mlp.inverted_conv.conv.weight": (1, 1, 1, 1)},
    ),
    (
        "Sana in diffusers' spelling (transformer_blocks.*.ff.conv_inverted)",
        {"transformer_blocks.0.ff.conv_inverted.weight": (1, 1, 1, 1), "adaln_single.x": (1,)},
    ),
    (
        "a VAE with 4 channels (SD1, SD2, SDXL) (decoder.conv_in)",
        {
            "encoder.conv_in.weight": (128, 3, 3, 3),
            "decoder.conv_in.weight": (512, 4, 3, 3),
            "quant_conv.weight": (8, 8, 1, 1),
        },
    ),
    ("a CLIP vision model (vision_model.*)", {"vision_model.encoder.layers.0.mlp.fc1.weight": (1, 1)}),
    ("a T5 (encoder.block.*)", {"encoder.block.0.layer.0.SelfAttention.q.weight": (512, 512)}),
    ("a language model (layers.*.self_attn)", {"model.layers.0.self_attn.q_proj.weight": (1, 1)}),
    (
        "a LoRA in kohya's spelling (*.lora_down.weight)",
        {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": (4, 8)},
    ),
    (
        "a LoRA in diffusers' spelling (*.lora_A.weight)",
        {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 8)},
    ),
    ("a LyCORIS adapter (*.lokr_w1, *.hada_w1_a)", {"lora_unet_joint_blocks_0_x_block_attn_qkv.lokr_w1": (4, 8)}),
    ("a LyCORIS adapter (*.lokr_w1, *.hada_w1_a)", {"lora_unet_x.hada_w1_a": (4, 8)}),
    (
        "a ControlNet (controlnet_blocks.*)",
        {"controlnet_blocks.0.weight": (1, 1), "transformer_blocks.0.norm1_context.linear.weight": (1, 1)},
    ),
]


@pytest.mark.parametrize(("title", "shapes"), MODELS, ids=[title for title, _ in MODELS])
def test_models_are_recognised_by_what_gives_them_away(title, shapes):
    assert identify(shapes, shapes) == title


LISTS = {
    "SD3-medium": "SD3 (joint_blocks.*)",
    "SD3_5-large": "SD3 (joint_blocks.*)",
    "SD3_5-medium": "SD3 (joint_blocks.*)",
    "clip_l": "CLIP-L (text_model.*, width 768)",
    "clip_g": "CLIP-G (text_model.*, width 1280)",
    "t5xxl": "T5-XXL (encoder.block.*)",
    "sd3_vae": "a VAE with 16 channels (SD3, FLUX) (decoder.conv_in)",
    "sana_600M_P1_D28": "Sana (blocks.*.mlp.inverted_conv)",
    "sana_1.5_1600M_P1_D20": "Sana (blocks.*.mlp.inverted_conv)",
    "dcae_f32c32_sana": "DC-AE (encoder.stages.*)",
    "dcae_f32c32_sana_diffusers": "DC-AE in diffusers' spelling (encoder.down_blocks.*.conv_inverted)",
    "gemma2_2b": "Gemma 2 (layers.*.pre_feedforward_layernorm)",
}


def published(name, column=0):
    rows = [line.split("\t") for line in (KEYS / f"keys_{name}.txt").read_text().splitlines()]
    return {row[column]: tuple(json.loads(row[1])) for row in rows}


@pytest.mark.parametrize("name", LISTS)
def test_published_checkpoints_are_recognised(name):
    assert identify(published(name), published(name)) == LISTS[name]


def test_the_vae_in_diffusers_spelling_is_recognised():
    shapes = published("sd3_vae", column=2)
    assert identify(shapes, shapes) == LISTS["sd3_vae"]


def test_a_file_with_everything_inside_is_called_by_its_denoiser():
    names = [f"text_encoders.clip_l.transformer.{name}" for name in published("clip_l")]
    names += [f"first_stage_model.{name}" for name in published("sd3_vae")]
    assert identify([*names, *(f"model.diffusion_model.{name}" for name in published("SD3-medium"))]).startswith("SD3")


def test_what_is_not_known_is_not_guessed():
    assert identify(["some.weight", "other.bias"]) is None
    assert identify([]) is None
    width_decides = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    assert identify([width_decides]) is None
    assert find_architecture([width_decides], {width_decides: (320, 768)}).title == "SD1.x"


def test_scripts_are_those_of_the_registry():
    assert {row.family for row in ARCHITECTURES} == {*FAMILIES, ""}
    assert SCRIPTS.keys() == FAMILIES.keys()
    for family, scripts in SCRIPTS.items():
        assert all(f'main("{family}"' in (ROOT / script).read_text() for script in scripts)


def test_only_denoisers_have_scripts():
    assert scripts_for(None) == scripts_for(find_architecture(published("clip_l"), published("clip_l"))) == ""
    assert (
        scripts_for(find_architecture(published("SD3-medium"))) == "; it is for sd3_train_network.py and sd3_train.py"
    )
    assert scripts_for(find_architecture(["double_blocks.0.x"])) == "; no script here is for it"


def test_every_row_says_what_gives_the_model_away():
    assert all(row.title and row.evidence and row.names for row in ARCHITECTURES)
