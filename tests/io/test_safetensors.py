import json

import numpy as np
import pytest
import safetensors.torch
import torch

from library.io.header import Header, read_header
from library.io.parts import Part
from library.io.pickles import read_pickle_header
from library.io.safetensors import LazyTensors, load_tensors, save_tensors, torch_dtype


def examples():
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(3, 5, generator=generator),
        "transposed": torch.randn(4, 2, generator=generator).T,
        "half": torch.randn(7, generator=generator).half(),
        "brain": torch.randn(2, 3, generator=generator).bfloat16(),
        "eight": torch.randn(5, generator=generator).to(torch.float8_e4m3fn),
        "number": torch.tensor(3),
        "flags": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
        "double": torch.randn(2, generator=generator).double(),
    }


def assert_equal(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(found.float(), expected.float())


@pytest.mark.parametrize("mmap", [True, False])
def test_what_is_saved_is_loaded(tmp_path, mmap):
    save_tensors(examples(), tmp_path / "x.safetensors", {"key": "ü"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"key": "ü"}
    loaded = dict(load_tensors(header, mmap=mmap))
    assert set(loaded) == set(examples())
    for name, tensor in examples().items():
        assert_equal(loaded[name], tensor)


@pytest.mark.parametrize("mmap", [True, False])
def test_the_format_is_the_safetensors_librarys(tmp_path, mmap):
    tensors = {name: tensor.contiguous() for name, tensor in examples().items()}
    save_tensors(tensors, tmp_path / "ours.safetensors", {"key": "value"})
    theirs = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors")
    ours = dict(load_tensors(read_header(tmp_path / "theirs.safetensors"), mmap=mmap))
    for name, tensor in tensors.items():
        assert_equal(theirs[name], tensor)
        assert_equal(ours[name], tensor)


@pytest.mark.parametrize("mmap", [True, False])
def test_tensors_at_odd_places_are_loaded(tmp_path, mmap):
    values = np.arange(6, dtype=np.float32)
    content = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "values": {"dtype": "F32", "shape": [6], "data_offsets": [3, 27]},
    }
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + b"\1\2\3" + values.tobytes())
    loaded = dict(load_tensors(read_header(tmp_path / "x"), mmap=mmap))
    assert loaded["values"].tolist() == values.tolist()
    assert loaded["odd"].tolist() == [1, 2, 3]
    assert all(tensor.data_ptr() % tensor.dtype.itemsize == 0 for tensor in loaded.values())


@pytest.mark.parametrize("mmap", [True, False])
def test_writing_to_a_loaded_tensor_does_not_reach_the_file(tmp_path, mmap):
    path = tmp_path / "x.safetensors"
    save_tensors({"a": torch.ones(5000)}, path, {})
    before = path.read_bytes()
    (_, tensor), *_ = load_tensors(read_header(path), mmap=mmap)
    tensor.zero_()
    assert path.read_bytes() == before


def test_only_the_named_tensors_come_in_the_order_asked_for(tmp_path):
    save_tensors(examples(), tmp_path / "x.safetensors", {})
    header = read_header(tmp_path / "x.safetensors")
    assert [name for name, _ in load_tensors(header, ["half", "brain"])] == ["half", "brain"]


def test_on_the_meta_device_nothing_is_read(tmp_path):
    save_tensors(examples(), tmp_path / "x.safetensors", {})
    header = read_header(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").unlink()
    loaded = dict(load_tensors(header, device="meta"))
    assert all(tensor.is_meta for tensor in loaded.values())
    assert loaded["brain"].shape == (2, 3)
    assert loaded["brain"].dtype == torch.bfloat16


def test_a_file_that_shrinks_after_the_check_is_an_error(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors({"a": torch.ones(5)}, path, {})
    header = read_header(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(OSError, match=r"it changed after its header was checked"):
        list(load_tensors(header, mmap=False))


def test_equal_contents_give_equal_bytes_in_any_order(tmp_path):
    save_tensors(examples(), tmp_path / "a", {"x": "1", "y": "2"})
    save_tensors(dict(reversed(examples().items())), tmp_path / "b", {"y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_tensor_is_aligned_to_its_type(tmp_path):
    save_tensors(examples(), tmp_path / "x", {"text": "of no particular length"})
    header = read_header(tmp_path / "x")
    assert header.data_start % 8 == 0
    for info in header.tensors.values():
        assert (header.data_start + info.begin) % torch_dtype(info.dtype).itemsize == 0


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float32, float("nan")),
        (torch.float32, float("inf")),
        (torch.bfloat16, float("-inf")),
        (torch.float16, float("nan")),
        (torch.float8_e4m3fn, float("nan")),
        (torch.float8_e5m2, float("inf")),
    ],
)
def test_numbers_that_are_not_finite_are_refused_and_the_old_file_stays(tmp_path, dtype, value):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=r"bad has numbers that are not finite"):
        save_tensors({"good": torch.ones(2), "bad": torch.tensor([1.0, value]).to(dtype)}, path, {})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_conversion_happens_while_saving_and_overflow_is_refused(tmp_path):
    tensors = {"a": torch.tensor([1.0, 2.0]), "count": torch.tensor([3])}
    save_tensors(tensors, tmp_path / "x", {}, dtype=torch.float16)
    loaded = dict(load_tensors(read_header(tmp_path / "x")))
    assert loaded["a"].dtype == torch.float16
    assert loaded["count"].dtype == torch.int64
    with pytest.raises(ValueError, match=r"a has numbers that are not finite"):
        save_tensors({"a": torch.tensor([1e6])}, tmp_path / "y", {}, dtype=torch.float16)


def test_metadata_must_be_text_and_tensors_must_have_data(tmp_path):
    with pytest.raises(ValueError, match=r"metadata values must be strings; steps of"):
        save_tensors({}, tmp_path / "x", {"steps": 5})
    with pytest.raises(ValueError, match=r"a of .* can't be saved: torch.float32 on meta"):
        save_tensors({"a": torch.empty(2, device="meta")}, tmp_path / "x", {})
    with pytest.raises(ValueError, match=r"complex128"):
        save_tensors({"a": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "x", {})


def test_a_type_that_torch_lacks_is_named():
    with pytest.raises(ValueError, match=r"stored as F6_E2M3"):
        torch_dtype("F6_E2M3")


def lazy(tmp_path, kind, **options):
    if kind == "safetensors":
        save_tensors(examples(), tmp_path / "x", {})
        header: Header = read_header(tmp_path / "x")
    else:
        torch.save(examples(), tmp_path / "x")
        header = read_pickle_header(tmp_path / "x")
    return LazyTensors(Part("x", (header,), {"short": "matrix", "eight": "eight"}), **options)


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
@pytest.mark.parametrize("mmap", [True, False])
def test_lazy_tensors_are_looked_up_by_the_parts_own_names(tmp_path, kind, mmap):
    tensors = lazy(tmp_path, kind, mmap=mmap)
    assert list(tensors) == ["short", "eight"]
    assert len(tensors) == 2
    assert_equal(tensors["short"], examples()["matrix"])
    assert_equal(dict(tensors.items())["eight"], examples()["eight"])


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_lazy_tensors_on_the_meta_device_read_nothing(tmp_path, kind):
    tensors = lazy(tmp_path, kind, device="meta")
    (tmp_path / "x").unlink()
    assert tensors["short"].is_meta
