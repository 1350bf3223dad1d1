"""Files with the published checkpoints' names and shapes but without their data: sparse, so they cost no disk."""

import json
import math
from pathlib import Path

import torch

from library.families.sana.key_maps import denoiser_key_maps
from library.io.header import DTYPE_BITS

KEYS = Path(__file__).parents[2] / "data" / "keys"
LISTS = {
    "0.6b": "sana_600M_P1_D28",
    "1.5-1.6b": "sana_1.5_1600M_P1_D20",
    "vae": "dcae_f32c32_sana",
    "vae diffusers": "dcae_f32c32_sana_diffusers",
    "gemma": "gemma2_2b",
}
KINDS = ("0.6b", "1.5-1.6b")
DEPTHS = {"0.6b": 28, "1.5-1.6b": 20}


def published(name):
    """Name -> shape of one of the key lists."""
    lines = (KEYS / f"keys_{LISTS[name]}.txt").read_text().splitlines()
    return {line.split("\t")[0]: tuple(json.loads(line.split("\t")[1])) for line in lines if line}


def prefixed(prefix, shapes):
    return {prefix + name: shape for name, shape in shapes.items()}


def denoiser_in_diffusers_layout(kind):
    """The same tensors under diffusers' names; the effect on shapes written out independently."""
    shapes, converted = published(kind), {}
    for entry in denoiser_key_maps(depth=DEPTHS[kind], qk_norm=kind != "0.6b"):
        rows, *rest = shapes[entry.ours]
        for name in entry.theirs:
            converted[name] = (rows // len(entry.theirs), *rest)
    return converted


def write_sparse(path, shapes, dtype="BF16"):
    """A whole and valid safetensors file, all of whose data is a hole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content, position = {}, 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(content).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return path


def write_pth(path, shapes, dtype=torch.bfloat16):
    """A checkpoint as NVlabs' trainer saves it, with little data: each tensor is one number, repeated."""
    state_dict = {name: torch.zeros(1, dtype=dtype).expand(shape) for name, shape in shapes.items()}
    torch.save({"epoch": 1, "state_dict": state_dict, "optimizer": {"state": {}}}, path)
    return path


def write_parts(folder):
    """DC-AE and Gemma in files of their own; what ``--vae`` and ``--gemma`` take."""
    return {
        "vae": str(write_sparse(Path(folder) / "dc-ae.safetensors", published("vae"))),
        "gemma": str(write_sparse(Path(folder) / "gemma.safetensors", published("gemma"))),
    }


def write_sparse_folder(folder, kind, config=None):
    """A diffusers folder; ``config`` is the transformer's."""
    folder = Path(folder)
    stem = "diffusion_pytorch_model.safetensors"
    write_sparse(folder / "transformer" / stem, denoiser_in_diffusers_layout(kind))
    write_sparse(folder / "vae" / stem, published("vae diffusers"))
    bare = {name.removeprefix("model."): shape for name, shape in published("gemma").items()}
    write_sparse(folder / "text_encoder" / "model.safetensors", bare)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "SanaPipeline"}))
    if config is not None:
        (folder / "transformer" / "config.json").write_text(json.dumps(config))
    return folder
