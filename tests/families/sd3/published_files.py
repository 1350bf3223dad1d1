"""Files with the published checkpoints' names and shapes but without their data: sparse, so they cost no disk."""

import json
import math
from pathlib import Path

from library.families.sd3.key_maps import denoiser_key_maps
from library.io.header import DTYPE_BITS
from library.nn.autoencoder_sizes import autoencoder_key_maps

KEYS = Path(__file__).parents[2] / "data" / "keys"
LISTS = {"medium": "SD3-medium", "5-large": "SD3_5-large", "5-medium": "SD3_5-medium", "vae": "sd3_vae"}
KINDS = ("medium", "5-large", "5-medium")
DEPTHS = {"medium": 24, "5-large": 38, "5-medium": 24}

DENOISER_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_L_PREFIX = "text_encoders.clip_l.transformer."
CLIP_G_PREFIX = "text_encoders.clip_g.transformer."
T5_PREFIX = "text_encoders.t5xxl.transformer."


def published(name):
    """Name -> shape of one of the key lists."""
    lines = (KEYS / f"keys_{LISTS.get(name, name)}.txt").read_text().splitlines()
    return {line.split("\t")[0]: tuple(json.loads(line.split("\t")[1])) for line in lines if line}


def prefixed(prefix, shapes):
    return {prefix + name: shape for name, shape in shapes.items()}


def in_diffusers_layout(shapes, maps):
    """The same tensors under diffusers' names; each operation's effect on shapes written out independently."""
    converted = {}
    for entry in maps:
        rows, *rest = shapes[entry.ours]
        for name in entry.theirs:
            converted[name] = (rows // len(entry.theirs), *([] if entry.operation == "squeeze" else rest))
            if entry.operation == "squeeze":
                converted[name] = (rows, rest[0])
    return converted


def denoiser_in_diffusers_layout(kind):
    maps = denoiser_key_maps(
        depth=DEPTHS[kind],
        qk_norm=kind != "medium",
        dual_attention_blocks=tuple(range(13)) if kind == "5-medium" else (),
    )
    return in_diffusers_layout(published(kind), maps)


def vae_in_diffusers_layout():
    maps = autoencoder_key_maps(level_widths=(128, 256, 512, 512), blocks_per_level=2, quant_convolutions=False)
    return in_diffusers_layout(published("vae"), maps)


def everything(kind):
    """One file with all parts inside; CLIP-L's projection is not in there."""
    clip_l = published("clip_l")
    del clip_l["text_projection.weight"]
    return {
        **prefixed(DENOISER_PREFIX, published(kind)),
        **prefixed(VAE_PREFIX, published("vae")),
        **prefixed(CLIP_L_PREFIX, clip_l),
        **prefixed(CLIP_G_PREFIX, published("clip_g")),
        **prefixed(T5_PREFIX, published("t5xxl")),
    }


def write_sparse(path, shapes, dtype="F16", metadata=None):
    """A whole and valid safetensors file, all of whose data is a hole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content, position = ({"__metadata__": metadata} if metadata else {}), 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(content).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return path


def write_sparse_shards(folder, stem, shapes, count=2, variant=""):
    """The same, cut into shards with an index."""
    names = list(shapes)
    holders = {}
    for i in range(count):
        file = f"{stem}{variant and '.' + variant}-{i + 1:05}-of-{count:05}.safetensors"
        part = {name: shapes[name] for name in names[i::count]}
        write_sparse(Path(folder) / file, part)
        holders |= dict.fromkeys(part, file)
    index = f"{stem}.safetensors.index{variant and '.' + variant}.json"
    (Path(folder) / index).write_text(json.dumps({"metadata": {}, "weight_map": holders}))


def write_sparse_folder(folder, kind, *, t5=True):
    """A diffusers folder, with a sharded transformer, an fp16 variant and a sharded T5."""
    folder = Path(folder)
    write_sparse_shards(folder / "transformer", "diffusion_pytorch_model", denoiser_in_diffusers_layout(kind))
    write_sparse(folder / "vae" / "diffusion_pytorch_model.safetensors", vae_in_diffusers_layout())
    write_sparse(folder / "text_encoder" / "model.fp16.safetensors", published("clip_l"))
    write_sparse(folder / "text_encoder_2" / "model.safetensors", published("clip_g"))
    if t5:
        write_sparse_shards(folder / "text_encoder_3", "model", published("t5xxl"), variant="fp16")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    return folder
