import json

import pytest
import torch

from library.config.errors import ConfigError
from library.io.header import read_header
from library.io.parts import Part, part_identity, read_weights
from library.io.safetensors import save_tensors


def save(folder, name, **tensors):
    folder.mkdir(exist_ok=True, parents=True)
    save_tensors(tensors or {"w": torch.ones(2)}, folder / name, {})


def files(folder):
    return [header.path.name for header in read_weights(folder)]


def save_shards(folder, index, shards):
    holders = {}
    for file, names in shards.items():
        save(folder, file, **{name: torch.ones(2) for name in names})
        holders |= dict.fromkeys(names, file)
    (folder / index).write_text(json.dumps({"weight_map": holders}))


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        (["model.safetensors"], "model.safetensors"),
        (["diffusion_pytorch_model.safetensors"], "diffusion_pytorch_model.safetensors"),
        (["model.fp16.safetensors"], "model.fp16.safetensors"),
        (["model.fp16.safetensors", "model.safetensors"], "model.safetensors"),
        (["sd3.5_large.safetensors"], "sd3.5_large.safetensors"),
    ],
)
def test_a_folders_file_is_found(tmp_path, present, chosen):
    for name in present:
        save(tmp_path, name)
    assert files(tmp_path) == [chosen]


def test_safetensors_go_before_pickles(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert files(tmp_path) == ["pytorch_model.bin"]
    save(tmp_path, "model.fp16.safetensors")
    assert files(tmp_path) == ["model.fp16.safetensors"]


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        ("model.safetensors.index.json", "model-0000{}-of-00002.safetensors"),
        ("model.safetensors.index.fp16.json", "model.fp16-0000{}-of-00002.safetensors"),
    ],
)
def test_shards_are_found_through_their_index(tmp_path, index, shard):
    save_shards(tmp_path, index, {shard.format(1): ["a", "c"], shard.format(2): ["b"]})
    assert files(tmp_path) == [shard.format(1), shard.format(2)]
    assert len(read_weights(tmp_path / index)) == 2
    part = Part("x", read_weights(tmp_path), {"own": "b", "a": "a"})
    assert part.header_of("own").path.name == shard.format(2)
    assert part.shapes == {"own": (2,), "a": (2,)}


def test_incomplete_shards_are_named(tmp_path):
    save_shards(tmp_path, "model.safetensors.index.json", {"model-1.safetensors": ["a"], "model-2.safetensors": ["b"]})
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"index.json names model-2.safetensors, which is not there"):
        read_weights(tmp_path)
    save(tmp_path, "model-2.safetensors", other=torch.ones(1))
    with pytest.raises(ConfigError, match=r"says that model-2.safetensors holds b, and it does not"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is not an index of shards"):
        read_weights(tmp_path)


def test_folders_without_usable_weights(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no weights: no diffusion_pytorch_model.safetensors"):
        read_weights(tmp_path)
    save(tmp_path, "model-00001-of-00002.safetensors")
    with pytest.raises(ConfigError, match=r"holds shards without their .index.json file"):
        read_weights(tmp_path)
    save(tmp_path, "one.safetensors")
    save(tmp_path, "two.safetensors")
    with pytest.raises(ConfigError, match=r"several weights files \(one.safetensors, two.safetensors\)"):
        read_weights(tmp_path)


def identity(path, prefix=""):
    header = read_header(path)
    return part_identity(Part("x", (header,), {name.removeprefix(prefix): name for name in header.tensors}))


def test_an_identity_does_not_depend_on_names_of_files_prefixes_or_what_lies_beside(tmp_path):
    w, v = torch.randn(300, 300), torch.randn(5)
    save(tmp_path, "a.safetensors", w=w, v=v)
    save(tmp_path, "b.safetensors", **{"p.v": v, "p.w": w})
    save(tmp_path, "c.safetensors", w=w, v=v, other=torch.ones(3))
    header = read_header(tmp_path / "c.safetensors")
    assert identity(tmp_path / "a.safetensors") == identity(tmp_path / "b.safetensors", "p.")
    assert identity(tmp_path / "a.safetensors") == part_identity(Part("c", (header,), {"w": "w", "v": "v"}))


@pytest.mark.parametrize("size", [100, 300_000])  # read whole, and sampled
@pytest.mark.parametrize(
    "change", [lambda w: w.mul_(1.001), lambda w: w[0].add_(1), lambda w: w[-1].add_(1)], ids=["all", "first", "last"]
)
def test_an_identity_follows_the_numbers(tmp_path, size, change):
    w = torch.ones(size)
    save(tmp_path, "x.safetensors", w=w)
    before = identity(tmp_path / "x.safetensors")
    change(w)
    save(tmp_path, "x.safetensors", w=w)
    assert identity(tmp_path / "x.safetensors") != before


def test_a_pickles_identity_follows_all_numbers(tmp_path):
    seen = set()
    for i in (0, 5000, 9999):
        w = torch.zeros(10_000)
        w[i] = 1
        torch.save({"w": w}, tmp_path / "x.pt")
        seen.add(part_identity(Part("x", read_weights(tmp_path / "x.pt"), {"w": "w"})))
    assert len(seen) == 3


def test_an_identity_follows_types_shapes_and_names(tmp_path):
    w = torch.zeros(4, 2)
    seen = set()
    for name, tensors in {"a": {"w": w}, "b": {"w": w.T.contiguous()}, "c": {"v": w}, "d": {"w": w.half()}}.items():
        save(tmp_path, name, **tensors)
        seen.add(identity(tmp_path / name))
    assert len(seen) == 4
