"""Makes wrong inputs for ``tests/test_bad_input.py``. Model files are sparse: published sizes, no data."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.conftest import Trainer
from tests.families.sd3.published_files import write_sparse, write_sparse_folder
from tests.tiny import TINY_SD3

BASE = "pretrained_model_name_or_path"
UNET = "model.diffusion_model."
QKV = "lora_unet_joint_blocks_0_x_block_attn_qkv"
WIDTH = TINY_SD3.width
SD1 = {UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768)}
SDXL = {
    UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
    UNET + "label_emb.0.0.weight": (1280, 2816),
}
FLUX = {"double_blocks.0.img_attn.qkv.weight": (9216, 3072)}
LORA = {f"{QKV}.lora_down.weight": (4, 1536), f"{QKV}.lora_up.weight": (4608, 4)}
UNET_ONLY = {"network_train_unet_only": True}


class Trap:
    """In a pickle: code that leaves a file behind when it runs."""

    def __reduce__(self):
        return os.system, ("touch sprung",)


@dataclass(frozen=True)
class Workshop:
    """Makes wrong inputs. Model files are sparse: full sizes, no data."""

    trainer: Trainer
    folder: Path

    def sparse(self, shapes, name="model.safetensors") -> Path:
        return write_sparse(self.folder / name, shapes)

    def file(self, content, name="file.safetensors") -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def empty(self, name="empty") -> Path:
        (self.folder / name).mkdir()
        return self.folder / name

    def saved(self, content, name="model.ckpt") -> Path:
        torch.save(content, self.folder / name)
        return self.folder / name

    def dataset(self, *changes: tuple[str, str], append="") -> Path:
        """The trainer's dataset TOML with replacements."""
        text = self.trainer.dataset().read_text()
        for old, new in changes:
            assert text.count(old) == 1
            text = text.replace(old, new)
        return self.file(text + append, "dataset.toml")

    def lora(self, down, up, *, layer=QKV, name="adapter.safetensors") -> Path:
        return self.sparse({f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}, name)

    def pipeline_without(self, part) -> Path:
        """A folder in diffusers' layout that lacks a file or folder."""
        folder = write_sparse_folder(self.folder / "pipeline", "medium")
        path = folder / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return folder


def scaled(shapes, old, new):
    return {name: tuple(new if n == old else n for n in shape) for name, shape in shapes.items()}


def without(shapes, word):
    return {name: shape for name, shape in shapes.items() if word not in name}
