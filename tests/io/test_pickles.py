import os
import pickle
import sys

import pytest
import torch

from library.config.errors import ConfigError
from library.io.header import TensorInfo
from library.io.pickles import is_pickle, load_pickle, pickle_checksum, read_pickle_header


def tensors():
    return {
        "a.weight": torch.arange(6.0).reshape(2, 3),
        "b": torch.ones(4, dtype=torch.bfloat16),
        "c": torch.ones(3, dtype=torch.float16)[1:],
        "n": torch.tensor(7),
    }


EXPECTED = {
    "a.weight": TensorInfo("F32", (2, 3), 0, 24),
    "b": TensorInfo("BF16", (4,), 0, 8),
    "c": TensorInfo("F16", (2,), 0, 4),
    "n": TensorInfo("I64", (), 0, 8),
}


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_contents_are_listed_and_loaded(tmp_path, new_format, nested):
    content = {"state_dict": tensors(), "epoch": 3, "ema": {"x": torch.ones(1)}} if nested else tensors()
    path = tmp_path / "model.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    assert is_pickle(path)
    header = read_pickle_header(path)
    assert header.format == "pickle"
    assert header.tensors == EXPECTED
    loaded = load_pickle(header, mmap=True)
    assert set(loaded) == set(EXPECTED)
    assert torch.equal(loaded["a.weight"], tensors()["a.weight"])


def test_parameters_and_fp8_are_listed(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"p": torch.nn.Parameter(torch.ones(2)), "q": torch.ones(3).to(torch.float8_e4m3fn)}, path)
    assert read_pickle_header(path).tensors == {
        "p": TensorInfo("F32", (2,), 0, 8),
        "q": TensorInfo("F8_E4M3", (3,), 0, 3),
    }


class Trap:
    def __reduce__(self):
        return os.system, ("touch sprung",)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_pickle_never_runs(tmp_path, monkeypatch, new_format):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": tensors(), "trap": Trap()}, "model.ckpt", _use_new_zipfile_serialization=new_format)
    with pytest.raises(ConfigError, match=r"model.ckpt can't be loaded safely: it contains more than .*posix.system"):
        read_pickle_header("model.ckpt")
    assert not (tmp_path / "sprung").exists()


class Callbacks(dict):
    """What a training framework leaves in its checkpoints."""


def test_objects_of_other_classes_are_named_without_their_code(tmp_path, monkeypatch):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": tensors(), "callbacks": Callbacks(x=1), "list": [Callbacks()]}, path)
    monkeypatch.delitem(sys.modules, Callbacks.__module__)
    with pytest.raises(ConfigError, match=r"more than tensors \(tests.io.test_pickles.Callbacks\). Convert it"):
        read_pickle_header(path)


def test_what_torch_alone_refuses_is_refused_when_it_is_loaded(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": tensors(), "of torch": torch.nn.Linear(1, 1)}, path)
    with pytest.raises(ConfigError, match=r"model.ckpt can't be loaded safely: it contains more than tensors"):
        load_pickle(read_pickle_header(path), mmap=True)


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_truncated_file_is_called_so(tmp_path, keep):
    path = tmp_path / "model.ckpt"
    torch.save({"w": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(ConfigError, match=r"model.ckpt is a truncated checkpoint: its end is missing"):
        read_pickle_header(path)


def test_a_truncated_file_of_the_older_format_is_called_so_when_it_is_loaded(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"w": torch.ones(1000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ConfigError, match=r"model.ckpt is a damaged or truncated checkpoint"):
        load_pickle(read_pickle_header(path), mmap=True)


def test_a_safetensors_file_is_never_taken_for_a_pickle(tmp_path):
    for padding in range(8, 3000, 8):  # every length of a header, so every first two bytes
        path = tmp_path / "x.safetensors"
        text = b"{}" + b" " * (padding - 2)
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        assert not is_pickle(path)


def test_other_pickles_and_zips_are_refused(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(ConfigError, match=r"not one that torch saved"):
        read_pickle_header(tmp_path / "x.pkl")
    torch.save([1, 2], tmp_path / "y.pt")
    with pytest.raises(ConfigError, match=r"holds no named tensors"):
        read_pickle_header(tmp_path / "y.pt")
    with pytest.raises(ConfigError, match=r"does not exist"):
        read_pickle_header(tmp_path / "z.pt")


@pytest.mark.parametrize("new_format", [True, False])
def test_the_checksum_follows_every_number_and_not_the_name(tmp_path, new_format):
    def checksum(name, value):
        torch.save({"w": torch.full((1000,), value)}, tmp_path / name, _use_new_zipfile_serialization=new_format)
        return pickle_checksum(tmp_path / name)

    first = checksum("a.pt", 1.0)
    assert first != checksum("a.pt", 1.5)
    if new_format:  # the older format numbers its storages by memory address
        assert first == checksum("b.pt", 1.0)
