"""The parsers of files that people download, each as a function of bytes that fails only where the parser does.

What a parser may answer is a value or the error that its documentation names, in lines that a terminal can show. All
else goes on to whoever called: hypothesis in ``tests/fuzz``, or atheris in ``bench.fuzz``.
"""

import dataclasses
import functools
import json
import pickle
import random
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from library.cli import SCRIPTS, refused_options
from library.config.captions import CaptionConfig
from library.config.command_line import read_command_line
from library.config.config_file import read_config_file
from library.config.data import DataConfig
from library.config.dataset import SubsetConfig, read_datasets
from library.config.errors import ConfigError
from library.config.options import all_options, build
from library.config.pictures import PictureConfig
from library.data.captions import caption_for_visit, caption_versions
from library.data.metadata_files import read_metadata
from library.io.header import parse_header
from library.io.pickles import read_pickle_header
from library.records import AdapterTargets, FusedLinear, Resolution
from library.sampling.prompts import read_prompts

_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_LONGEST_LINE = 1100
_SCRIPT = SCRIPTS["sd3_train_network"]
_OPTIONS = all_options(_SCRIPT.groups)
_REFUSED = refused_options("sd3")
TARGETS = {
    "denoiser": AdapterTargets(
        prefix="lora_unet",
        include=("*",),
        exclude=(),
        diffusers_prefix="transformer",
        fused={"blocks.0.qkv": FusedLinear(("blocks.0.q", "blocks.0.k", "blocks.0.v"))},
    )
}
"""Of a model with one layer, for the spellings of adapters."""


class Unfit(AssertionError):
    """An error that is documented, in a form that can't be shown."""


def check_message(error: Exception) -> None:
    """This checks that an error says something, in lines that a terminal can show.

    Raises:
        Unfit: It doesn't.
    """
    text = str(error)
    if not text or _UNFIT.search(text) or max(map(len, text.split("\n"))) > _LONGEST_LINE:
        raise Unfit(repr(text[:300]))


def answer(parse: Callable[[], Any], *documented: type[Exception]) -> Any:
    """What a parser answers; None after an error that it may raise."""
    expected: tuple[type[Exception], ...] = (ConfigError, *documented)
    try:
        return parse()
    except expected as error:
        check_message(error)
        return None


def header(data: bytes, folder: Path) -> None:
    """The header of a safetensors file."""
    found = answer(lambda: parse_header(Path("x.safetensors"), BytesIO(data), len(data)))
    if found is not None:
        end = max((info.end for info in found.tensors.values()), default=0)
        assert found.data_start + end == len(data)
        assert all(info.begin >= 0 and info.elements >= 0 for info in found.tensors.values())


def checkpoint(data: bytes, folder: Path) -> None:
    """A checkpoint in torch's own format: a whole file, or the list of contents inside one."""
    path = folder / "x.ckpt"
    path.write_bytes(data)
    answer(lambda: read_pickle_header(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    answer(lambda: read_pickle_header(path))


def run_toml(data: bytes, folder: Path) -> None:
    """A TOML with options."""
    path = folder / "run.toml"
    path.write_bytes(data)
    said = answer(lambda: read_config_file(path, _OPTIONS, _REFUSED))
    if said is not None:
        values, problems = said
        for problem in [*problems, *build(_SCRIPT.groups, {}, values, path.name).problems]:
            assert problem
            check_message(ConfigError(problem))


def command_line(words: list[str]) -> None:
    """What is typed."""
    said = read_command_line(_SCRIPT.groups, words, refusals=_REFUSED)
    for problem in said.problems:
        assert problem
        check_message(ConfigError(problem))


def typed(data: bytes, folder: Path) -> None:
    """What is typed, with a line's end between words."""
    words = data.decode("utf-8", "surrogateescape").split("\n")
    command_line([word for word in words if not word.startswith("--config_file")])


def dataset_toml(data: bytes, folder: Path) -> None:
    """A TOML that describes datasets."""
    path = folder / "dataset.toml"
    path.write_bytes(data)
    groups = DataConfig(dataset_config=str(path)), PictureConfig(), CaptionConfig()
    answer(lambda: read_datasets(*groups, resolution_step=16))


def dataset_json(data: bytes, folder: Path) -> None:
    """The same as JSON."""
    path = folder / "dataset.json"
    path.write_bytes(data)
    groups = DataConfig(dataset_config=str(path)), PictureConfig(), CaptionConfig()
    answer(lambda: read_datasets(*groups, resolution_step=16))


def prompts(data: bytes, folder: Path) -> None:
    """Prompts, as each of the three kinds of files."""
    for ending in ("txt", "toml", "json"):
        path = folder / f"prompts.{ending}"
        path.write_bytes(data)
        read = functools.partial(read_prompts, str(path), native_resolution=_NATIVE, resolution_step=16, seed=0)
        for request in answer(read) or ():
            assert request.prompt and "\x00" not in request.prompt
            request.prompt.encode()


_NATIVE = Resolution(64, 64)


def pictures(data: bytes, folder: Path) -> None:
    """A picture's header, and its pixels where it is small."""
    from library.data.headers import read_header
    from library.data.images import open_picture, peek

    said = read_header(data)
    size, problem = peek(data)
    assert said.kind is not None or problem
    if problem is None and size.area < 1 << 16:
        answer(lambda: open_picture(data), OSError)


def metadata_files(data: bytes, folder: Path) -> None:
    """A list of pictures, as each of the kinds of files."""
    for ending in ("json", "jsonl", "csv"):
        path = folder / f"metadata.{ending}"
        path.write_bytes(data)
        subset = SubsetConfig(image_dir="x", metadata_file=str(path), enable_wildcard=True)
        for name, entry in (answer(functools.partial(read_metadata, str(path), subset)) or {}).items():
            (name + "".join(entry.captions)).encode()


def captions(data: bytes, folder: Path) -> None:
    """What becomes of a caption; the first byte chooses settings."""
    if data:
        make_captions(data[1:].decode("utf-8", "ignore").split("\n"), settings_by(data[0]), seed=data[0])


def settings_by(number: int) -> Mapping[str, Any]:
    """Settings of captions: each bit switches one."""
    choices: tuple[tuple[str, Any], ...] = (
        ("enable_wildcard", True),
        ("shuffle_caption", True),
        ("keep_tokens", 2),
        ("keep_tokens_separator", "|||"),
        ("secondary_separator", ";;;"),
        ("caption_tag_dropout_rate", 0.5),
        ("token_warmup_step", 3),
        ("caption_dropout_rate", 0.5),
    )
    return {name: value for bit, (name, value) in enumerate(choices) if number >> bit & 1}


def make_captions(lines: list[str], settings: Mapping[str, Any], *, seed: int) -> None:
    """A caption's visits: the same seed makes the same one, and each is among its versions."""
    subset = SubsetConfig(image_dir="x", **settings)
    for visit in range(2):
        made = [
            caption_for_visit(lines, subset, random.Random(seed), epoch=0, step=visit, max_steps=9) for _ in range(2)
        ]
        assert made[0] == made[1] and (made[0][0] == "" or not made[0][1])
    versions = caption_versions(lines, subset, 2)
    assert versions
    one, _ = caption_for_visit(
        lines, dataclasses.replace(subset, caption_dropout_rate=0.0), random.Random(seed), epoch=0, step=0,
        max_steps=9, variants=2, visit=seed,
    )  # fmt: skip
    assert one in versions or not subset.shuffle_caption


def keys(data: bytes, folder: Path) -> None:
    """An adapter's names: a line each, with the sizes of its tensor behind a space."""
    import torch

    from networks.key_formats import detect_format, read_weights, to_kohya

    tensors = {}
    for line in data.decode("utf-8", "ignore").split("\n")[:20]:
        name, _, sides = line.rpartition(" ")
        sizes = [int(side) % 5 for side in sides.split("x")[:4] if side.isascii() and side.isdigit()]
        tensors[name] = torch.ones(sizes)
    metadata = {"lora_adapter_metadata": data.decode("utf-8", "ignore").rpartition("\n")[2]}
    answer(lambda: detect_format(tensors, TARGETS, "x"))
    weights = answer(lambda: read_weights(tensors, metadata, TARGETS, "x"))
    if weights is not None:
        again = read_weights(to_kohya(weights), {}, TARGETS, "x")
        assert again.keys() == weights.keys()


def state(data: bytes, folder: Path) -> None:
    """The light part of a run's state."""
    from library.training.state_files import read_progress

    (folder / "state.json").write_bytes(data)
    answer(lambda: read_progress(str(folder)))


@dataclass(frozen=True)
class Target:
    """A parser to fuzz.

    Attributes:
        parse: Takes bytes and a folder to write them to.
        seeds: Inputs to begin with.
    """

    parse: Callable[[bytes, Path], None]
    seeds: tuple[bytes, ...]


def safetensors(tensors: Mapping[str, Any], metadata: Mapping[str, Any] | None = None, data: bytes = b"") -> bytes:
    """A file with this header, whatever it says."""
    content = json.dumps({**({"__metadata__": metadata} if metadata is not None else {}), **tensors}).encode()
    return struct.pack("<Q", len(content)) + content + data


_ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
_DATASET = (
    b"[general]\nshuffle_caption = true\n[[datasets]]\nresolution = [64, 96]\nbatch_size = 2\n"
    b"[[datasets.subsets]]\nimage_dir = '.'\nnum_repeats = 3\ncaption_prefix = \"a\"\n"
)


def _small_pictures() -> Iterator[bytes]:
    from PIL import Image

    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        file = BytesIO()
        Image.new("RGB", (9, 5), (200, 30, 10)).save(file, kind)
        yield file.getvalue()


def all_targets() -> dict[str, Target]:
    """Every parser by name."""
    one = safetensors({"a": _ONE, "b": {**_ONE, "data_offsets": [4, 8]}}, {"format": "pt"}, bytes(8))
    pickled = pickle.dumps({"state_dict": {"a": [1, 2.5, "x", (3, None)]}}, 2)
    kohya = b"lora_unet_blocks_0_qkv.lora_down.weight 2x3\nlora_unet_blocks_0_qkv.lora_up.weight 3x2\n"
    peft = (
        b'transformer.blocks.0.q.lora_A.weight 2x3\ntransformer.blocks.0.q.lora_B.weight 1x2\n{"transformer.r": 2, '
        b'"transformer.alpha_pattern": {"q": 3}}'
    )
    return {
        "header": Target(header, (one, safetensors({}))),
        "pickle": Target(checkpoint, (pickled, pickle.dumps({"a": [b"x", 1]}, 4))),
        "run_toml": Target(run_toml, (b"[network]\nnetwork_dim = 4\nlearning_rate = 1e-4\n", b'output_name = "x"\n')),
        "dataset_toml": Target(dataset_toml, (_DATASET,)),
        "dataset_json": Target(
            dataset_json, (b'{"datasets": [{"resolution": 64, "subsets": [{"image_dir": ".", "num_repeats": 2}]}]}',)
        ),
        "prompts": Target(
            prompts,
            (
                b"a cat --w 64 --h 96 --d 7 --s 20 --l 4.5 --n blurry\n# no\n",
                b'[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = "a cat"\n',
                b'{"one": "a cat", "two": {"prompt": "a dog", "scale": 3.5}}',
            ),
        ),
        "captions": Target(captions, (b"\x01a {red|{{blue}}|green} cat, ||| tag, tag;;;tag\nline", b"\x7fa, b, c")),
        "command_line": Target(typed, (b"--network_dim\n4\n--learning_rate=1e-4\n--cache_latents\n--no-flip_aug",)),
        "keys": Target(keys, (kohya, peft)),
        "state": Target(state, (b'{"format": 1, "step": 3, "checksums": {"a": "b"}, "settings": {}}',)),
        "metadata": Target(
            metadata_files,
            (b'{"a.png": {"caption": "x", "tags": ["y"]}}', b'{"file_name": "a", "text": "b"}\n', b"path,text\na,b\n"),
        ),
        "pictures": Target(pictures, tuple(_small_pictures())),
    }
