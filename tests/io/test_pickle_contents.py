"""Lists of contents that were made to run code, to fill the memory or to take for ever."""

import pickle
import struct
import zipfile
from collections import OrderedDict
from io import BytesIO

import pytest
import torch

from library.config.errors import ConfigError
from library.io import pickles
from library.io.pickle_contents import Global, Opaque, PickleError, read_contents
from library.io.pickles import check_pickle, load_pickle, read_pickle_header

PLAIN = {
    "a": [1, -5, 2**70, 2.5, "ü", b"x", None, True, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ()],
    "b": {3: {"c": "d"}},
}
DOUBLED = b"\x80\x02K\x01q\x00" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(60))
"""A tuple of two tuples of two tuples ..., 2^60 in all, in 400 bytes."""


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_those_that_were_pickled(protocol):
    file = BytesIO(pickle.dumps(PLAIN, protocol) + b"rest")
    found = read_contents(file, {}, set())
    assert found["b"] == PLAIN["b"] and file.read() == b"rest"
    assert [value for value in found["a"] if not isinstance(value, Opaque)][:5] == PLAIN["a"][:5]
    assert found["a"] == PLAIN["a"] or protocol < 3  # older ones call a function to make bytes


def test_calls_are_made_by_those_who_ask_for_them():
    data = pickle.dumps({"o": OrderedDict(a=1), "c": complex(1, 2)}, 2)
    known = {Global("__builtin__", "complex"): tuple, Global("builtins", "complex"): tuple}
    assert read_contents(BytesIO(data), known, set()) == {"o": {"a": 1}, "c": (1.0, 2.0)}
    assert isinstance(read_contents(BytesIO(data), {}, set())["c"], Opaque)


HOSTILE = {
    "no end": b"\x80\x02}",
    "an empty stack": b"\x80\x02.",
    "an unknown place": b"\x80\x02h\x07.",
    "half a pair": b"\x80\x02}(K\x01u.",
    "two to the sixtieth tuples for a name": DOUBLED[:2] + b"}" + DOUBLED[2:] + b"h\x3cK\x01s.",
    "the same in a set": b"\x80\x04\x8f(" + DOUBLED[2:] + b"h\x3c\x90.",
    "the same in a frozen set": b"\x80\x04(" + DOUBLED[2:] + b"h\x3c\x91.",
    "a tebibyte of zeros": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
    "four gibibytes of a number": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "millions of lists": b"\x80\x02" + b"]" * 2_100_000 + b".",
    "a table copied again and again": b"\x80\x02(" + b"K\x01K\x02\x86" * 10_000 + b"lq\x00"
    b"ccollections\nOrderedDict\nq\x01" + b"h\x01h\x00\x85R0" * 1000 + b".",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_lists_end_in_an_error(data):
    with pytest.raises(PickleError):
        read_contents(BytesIO(data), {}, set())


@pytest.mark.parametrize(
    "data",
    [b"cos\nsystem\n(X\x0c\x00\x00\x00touch sprungtR.", b"(ios\nsystem\n.", b"(cos\nsystem\nX\x01\x00\x00\x00xo.",
     b"cos\nsystem\n)\x81.", b"cos\nsystem\n)}\x92.", b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93)R."],
)  # fmt: skip
def test_nothing_is_called(data, monkeypatch):
    monkeypatch.setattr("os.system", lambda command: pytest.fail(f"{command} was run"))
    assert isinstance(read_contents(BytesIO(b"\x80\x04" + data), {}, set()), Opaque)


def archive(folder, contents, *, packing=zipfile.ZIP_STORED, **others):
    path = folder / "model.ckpt"
    with zipfile.ZipFile(path, "w", packing) as file:
        file.writestr("archive/data.pkl", contents)
        for name, data in others.items():
            file.writestr(name, data)
    return path


def test_a_packed_archive_is_refused_before_it_is_unpacked(tmp_path):
    path = archive(tmp_path, bytes(50_000_000), packing=zipfile.ZIP_DEFLATED)
    for read in (read_pickle_header, check_pickle):
        with pytest.raises(ConfigError, match="is a compressed zip file, which torch doesn't write"):
            read(path)


def test_a_directory_beyond_measure_is_not_read(tmp_path, monkeypatch):
    path = archive(tmp_path, pickle.dumps({}), **{f"archive/{n}": b"" for n in range(50)})
    monkeypatch.setattr(pickles, "_MOST_DIRECTORY", 1000)
    with pytest.raises(ConfigError, match="more parts than any model has"):
        check_pickle(path)


def test_a_long_list_and_two_lists_are_refused(tmp_path, monkeypatch):
    path = archive(tmp_path, pickle.dumps(["x" * 3000]))
    with pytest.raises(ConfigError, match="several lists of contents"):
        check_pickle(archive(tmp_path, pickle.dumps({}), **{"b/data.pkl": b""}))
    monkeypatch.setattr(pickles, "_MOST_CONTENTS", 2000)
    path = archive(tmp_path, pickle.dumps(["x" * 3000]))
    with pytest.raises(ConfigError, match="its list of contents is longer than any model's"):
        check_pickle(path)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_tensor_larger_than_its_file_is_refused(tmp_path, new_format):
    path = tmp_path / "model.ckpt"
    torch.save({"a": torch.ones(1).expand(1 << 40)}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(ConfigError, match="its a is larger than the file"):
        load_pickle(read_pickle_header(path), mmap=True)


def test_the_state_of_an_optimizer_passes(tmp_path):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    torch.save({"optimizer": optimizer.state_dict(), "schedule": {"x": 1.5}, "scaler": None}, tmp_path / "optimizer.pt")
    check_pickle(tmp_path / "optimizer.pt")
