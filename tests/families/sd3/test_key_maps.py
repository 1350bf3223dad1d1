import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from library.families.sd3.key_maps import denoiser_key_maps, fused_linears
from library.io.key_maps import from_diffusers, to_diffusers
from library.nn.autoencoder_sizes import autoencoder_key_maps
from library.records import FusedLinear

GOLDEN = Path(__file__).parents[2] / "golden" / "sd3"
PUBLISHED = {
    "sd3-medium": (dict(depth=24, qk_norm=False, dual_attention_blocks=()), 491, 683),
    "sd3.5-medium": (dict(depth=24, qk_norm=True, dual_attention_blocks=range(13)), 665, 909),
    "sd3.5-large": (dict(depth=38, qk_norm=True, dual_attention_blocks=()), 923, 1227),
}
VAE = dict(level_widths=(128, 256, 512, 512), blocks_per_level=2, quant_convolutions=False)


def published_shapes(name):
    shapes = {}
    for line in (GOLDEN / f"{name}.txt").read_text().splitlines():
        key, shape = line.split("\t")[:2]
        size = tuple(int(side) for side in shape.strip("[]").split(","))
        blocks = re.search(r"\{(\d+)\.\.(\d+)\}", key)
        for i in range(int(blocks[1]), int(blocks[2]) + 1) if blocks else [None]:
            shapes[key if i is None else key.replace(blocks[0], str(i))] = size
    return shapes


def random_tensors(maps):
    """Small tensors with the ranks of the real ones and rows that divide by 6."""
    generator = torch.Generator().manual_seed(0)
    return {
        entry.ours: torch.randn((6, 2, 1, 1) if entry.operation == "squeeze" else (6, 2), generator=generator)
        for entry in maps
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_maps_cover_the_published_file_exactly(name):
    sizes, ours, theirs = PUBLISHED[name]
    maps = denoiser_key_maps(**sizes)
    assert len(maps) == ours
    assert {entry.ours for entry in maps} == set(published_shapes(name))
    names = [part for entry in maps for part in entry.theirs]
    assert len(names) == len(set(names)) == theirs


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_round_trip_is_exact(name):
    maps = denoiser_key_maps(**PUBLISHED[name][0])
    tensors = random_tensors(maps)
    back = dict(from_diffusers(dict(to_diffusers(tensors, maps)), maps))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_halves_are_swapped_in_the_two_layers_without_gate_and_rows_cut_in_order():
    maps = denoiser_key_maps(depth=3, qk_norm=True, dual_attention_blocks=(0,))
    assert {entry.ours for entry in maps if entry.operation == "swap"} == {
        f"{layer}.adaLN_modulation.1.{kind}"
        for layer in ("final_layer", "joint_blocks.2.context_block")
        for kind in ("weight", "bias")
    }
    tensors = random_tensors(maps)
    theirs = dict(to_diffusers(tensors, maps))
    ours = tensors["final_layer.adaLN_modulation.1.weight"]
    assert torch.equal(theirs["norm_out.linear.weight"], torch.cat([ours[3:], ours[:3]]))
    fused = tensors["joint_blocks.0.x_block.attn2.qkv.weight"]
    for rows, part in zip((fused[:2], fused[2:4], fused[4:]), "qkv"):
        assert torch.equal(theirs[f"transformer_blocks.0.attn2.to_{part}.weight"], rows)


def test_the_vae_maps_equal_the_published_list_of_both_spellings():
    lines = [line.split("\t") for line in (GOLDEN / "vae.txt").read_text().splitlines()]
    maps = autoencoder_key_maps(**VAE)
    assert len(lines) == len(maps) == 244
    assert {entry.ours: entry.theirs[0] for entry in maps} == {ours: theirs for ours, _, theirs in lines}
    squeezed = {entry.ours for entry in maps if entry.operation == "squeeze"}
    assert squeezed == {ours for ours, shape, _ in lines if "attn_1" in ours and shape.endswith("1, 1]")}

    tensors = random_tensors(maps)
    theirs = dict(to_diffusers(tensors, maps))
    assert theirs["encoder.mid_block.attentions.0.to_q.weight"].shape == (6, 2)
    back = dict(from_diffusers(theirs, maps))
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_adapters_learn_what_stands_in_place_of_each_layer():
    fused = fused_linears(depth=24, dual_attention_blocks=range(13))
    path = "transformer_blocks.0.attn"
    assert fused["joint_blocks.0.x_block.attn.qkv"] == FusedLinear((f"{path}.to_q", f"{path}.to_k", f"{path}.to_v"))
    assert fused["joint_blocks.23.context_block.adaLN_modulation.1"].swap_halves
    assert not fused["joint_blocks.22.context_block.adaLN_modulation.1"].swap_halves
    assert fused["final_layer.adaLN_modulation.1"] == FusedLinear(("norm_out.linear",), swap_halves=True)
    weights = {key.removesuffix(".weight") for key, shape in published_shapes("sd3.5-medium").items() if len(shape) > 1}
    assert set(fused) == weights - {"pos_embed"}
    assert Counter(len(layer.parts) for layer in fused.values())[3] == 24 * 2 + 13


def test_tensors_are_fetched_one_at_a_time():
    class Lazy(dict):
        def __getitem__(self, key):
            fetched.append(key)
            return super().__getitem__(key)

    fetched = []
    maps = denoiser_key_maps(depth=2, qk_norm=False, dual_attention_blocks=())
    pairs = to_diffusers(Lazy(random_tensors(maps)), maps)
    next(pairs)
    assert fetched == ["pos_embed"]
    list(pairs)
    assert Counter(fetched) == Counter(entry.ours for entry in maps)


def test_missing_and_unknown_tensors_are_named():
    maps = denoiser_key_maps(depth=1, qk_norm=False, dual_attention_blocks=())
    tensors = random_tensors(maps)
    with pytest.raises(ValueError, match=r"1 tensors have no counterpart, such as joint_blocks\.7\.attn"):
        list(to_diffusers(tensors | {"joint_blocks.7.attn": tensors["pos_embed"]}, maps))
    del tensors["pos_embed"]
    with pytest.raises(ValueError, match="1 tensors are missing, such as pos_embed"):
        list(to_diffusers(tensors, maps))


def test_importing_the_maps_loads_no_torch():
    program = "import sys, library.families.sd3.key_maps; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
