import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.config.errors import ConfigError
from library.io.header import TensorInfo, read_header

ROOT = Path(__file__).parents[2]


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}, path, {"key": "value"})
    return path


def write(path, content, data=b"", length=None):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_a_header_tells_names_types_shapes_and_metadata(whole):
    header = read_header(whole)
    assert header.metadata == {"key": "value"}
    assert header.tensors == {"a": TensorInfo("F32", (2, 3), 0, 24), "b": TensorInfo("BF16", (5,), 24, 34)}
    assert header.shapes == {"a": (2, 3), "b": (5,)}
    assert header.data_start + 34 == whole.stat().st_size
    assert header.tensors["a"].elements == 6


def test_empty_tensors_and_files_without_tensors_are_fine(tmp_path):
    entry = {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]}
    assert read_header(write(tmp_path / "x", {"a": entry})).tensors["a"].elements == 0
    assert read_header(write(tmp_path / "y", {})).tensors == {}
    assert read_header(write(tmp_path / "z", {"__metadata__": None})).metadata == {}


@pytest.mark.parametrize("cut", [1, 20, 34])
def test_a_truncated_file_says_how_much_is_missing(whole, cut):
    whole.write_bytes(whole.read_bytes()[:-cut])
    with pytest.raises(ConfigError) as error:
        read_header(whole)
    assert str(error.value) == f"{whole} is truncated: {cut} bytes are missing at its end; download it again"


def test_a_file_cut_inside_its_header_is_truncated_too(whole):
    whole.write_bytes(whole.read_bytes()[:50])
    with pytest.raises(ConfigError, match=r"model.safetensors is truncated: at least \d+ bytes are missing"):
        read_header(whole)


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"PK\x03\x04" + bytes(60), "a pickle or zip file"),
        (b"\x80\x02}q\x00." + bytes(60), "a pickle file"),
        (b"GGUF\x03\0\0\0" + bytes(60), "a GGUF file"),
        (b"<!DOCTYPE html><html>" + bytes(60), "a web page, not a model (the download went wrong)"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "a Git LFS pointer, not the file itself (run `git lfs pull`)",
        ),
    ],
)
def test_other_formats_are_called_by_their_name(tmp_path, start, kind):
    path = tmp_path / "model.safetensors"
    path.write_bytes(start)
    with pytest.raises(ConfigError) as error:
        read_header(path)
    assert str(error.value) == f"{path} is not a safetensors file: it is {kind}"


@pytest.mark.parametrize("content", [b"hello", b"just some longer text, forty bytes or so....", bytes(64)])
def test_anything_else_is_not_safetensors(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"is not a safetensors file$"):
        read_header(path)


@pytest.mark.parametrize(
    "content",
    [
        b"{not json at all}",
        b'{"a": \xff}',
        b"[1, 2]",
        {"a": 5},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},  # shape and length contradict
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},  # a hole
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}},
        {  # an overlap
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        },
    ],
)
def test_a_header_that_contradicts_itself_is_damaged(tmp_path, content):
    path = write(tmp_path / "model.safetensors", content, bytes(8))
    with pytest.raises(ConfigError, match=r"damaged safetensors header|is not a safetensors file"):
        read_header(path)


def test_bytes_after_the_last_tensor_are_an_error(tmp_path):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    path = write(tmp_path / "model.safetensors", {"a": entry}, bytes(7))
    with pytest.raises(ConfigError, match=r"has 3 bytes after its last tensor"):
        read_header(path)


def test_missing_empty_and_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"gone.safetensors does not exist$"):
        read_header(tmp_path / "gone.safetensors")
    with pytest.raises(ConfigError, match=r"is a folder, not a file"):
        read_header(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match=r"is empty \(0 bytes\)"):
        read_header(tmp_path / "empty")


def test_nothing_heavy_is_imported():
    code = """
import sys
import library.config.model, library.io.atomic, library.io.header, library.io.architectures, library.io.parts
import library.families.sd3.files
print(sorted({"torch", "numpy", "transformers", "accelerate", "PIL", "safetensors"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


ONE = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
TWICE = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}'
LIES = {
    "infinity": b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,1]}}',
    "NaN": b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}',
    "truth for a number": {"a": {**ONE, "shape": [True]}},
    "a fraction": {"a": {**ONE, "shape": [1.0]}},
    "texts for numbers": {"a": {**ONE, "shape": "1", "data_offsets": "01"}},
    "a number of thousands of digits": b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}',
    "a list for a type": {"a": {**ONE, "dtype": ["U8"]}},
    "a negative offset": {"a": {**ONE, "data_offsets": [-1, 0]}},
    "three offsets": {"a": {**ONE, "data_offsets": [0, 1, 1]}},
    "a thousand sides": {"a": {**ONE, "shape": [1] * 1000}},
    "a name that stands twice": TWICE,
    "depth": b'{"a":' + b"[" * 100_000,
    "half a character": b'{"a\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "metadata that is a list": {"__metadata__": ["a"], "a": ONE},
    "metadata that is no text": {"__metadata__": {"a": 1}, "a": ONE},
    "a name that steers the terminal": {"a\x1b[31m\n": {**ONE, "shape": [2]}},
    "a name of a megabyte": {"a" * 1_000_000: {**ONE, "shape": [2]}},
}


@pytest.mark.parametrize("content", LIES.values(), ids=LIES)
def test_lies_in_a_header_end_in_one_readable_line(tmp_path, content):
    with pytest.raises(ConfigError, match="has a damaged safetensors header") as caught:
        read_header(write(tmp_path / "x.safetensors", content, b"1"))
    message = str(caught.value)
    assert len(message) < 600 and message.isprintable()


def test_what_is_beyond_the_file_is_missing(tmp_path):
    entry = {**ONE, "shape": [2**40], "data_offsets": [0, 2**40]}
    with pytest.raises(ConfigError, match="1,099,511,627,775 bytes are missing"):
        read_header(write(tmp_path / "x.safetensors", {"a": entry}, b"1"))


@pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1])
def test_a_header_that_claims_to_be_endless_is_not_read(tmp_path, length):
    with pytest.raises(ConfigError, match="is not a safetensors file"):
        read_header(write(tmp_path / "x.safetensors", {}, length=length))
