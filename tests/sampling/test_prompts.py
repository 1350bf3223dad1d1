import json
import subprocess
import sys

import pytest
from PIL import Image

from library.config.errors import ConfigError
from library.records import Resolution
from library.sampling.prompts import PromptRequest, read_prompts


def read(tmp_path, name: str, content: str, **options) -> list[PromptRequest]:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return read_prompts(
        path, **{"native_resolution": Resolution(1024, 768), "resolution_step": 16, "seed": 7, **options}
    )


def one(tmp_path, line: str, **options) -> PromptRequest:
    (request,) = read(tmp_path, "prompts.txt", line, **options)
    return request


def test_txt(tmp_path):
    content = (
        "# a comment\n"
        "a cat, sitting --w 768 --h 512 --d 5 --s 12 --l 4.5 --n ugly, blurry --ss dpmpp_2m\n"
        "\n"
        "  a dog  \r\n"
    )
    cat, dog = read(tmp_path, "prompts.txt", content)
    assert cat == PromptRequest(
        prompt="a cat, sitting",
        negative_prompt="ugly, blurry",
        width=768,
        height=512,
        seed=5,
        steps=12,
        scale=4.5,
        sampler="dpmpp_2m",
    )
    assert (dog.prompt, dog.negative_prompt, dog.resolution) == ("a dog", "", (1024, 768))
    assert (dog.steps, dog.scale, dog.sampler) == (28, 5.0, None)


@pytest.mark.parametrize(
    "text",
    [
        "n girl, standing",
        "s 12 cats",
        "w 3 apples, d 4 pears",
        "a well-known man -- on film",
        "code: x --- y",
        "rock-n-roll --, loud",
        "a half--way house--d 5",
        "# in the middle: 100 % #hashtag",
    ],
)
def test_text_is_never_taken_for_an_option(tmp_path, text):
    (request,) = read(tmp_path, "prompts.txt", f"x {text}")
    assert request.prompt == f"x {text}"
    assert request.negative_prompt == ""
    (request,) = read(tmp_path, "prompts.txt", f"a cat --n {text} --d 3")
    assert (request.prompt, request.negative_prompt, request.seed) == ("a cat", text, 3)


def test_a_steered_prompt_names_its_control_picture(tmp_path):
    picture = tmp_path / "edges.png"
    Image.new("RGB", (8, 8)).save(picture)
    (request,) = read(tmp_path, "prompts.txt", f"a cat --cn {picture} --d 3", steered=True)
    assert (request.prompt, request.control, request.seed) == ("a cat", str(picture), 3)
    table = json.dumps([{"prompt": "a cat", "controlnet_image": str(picture)}])
    (request,) = read(tmp_path, "prompts.json", table, steered=True)
    assert request.control == str(picture)
    picture.write_bytes(picture.read_bytes()[:40])
    for line, told in (
        ("a cat", "line 1: the control picture is missing, by which the ControlNet steers; add --cn FILE"),
        ("a cat --cn no.png", "line 1: the control picture 'no.png' can't be read: No such file"),
        (f"a cat --cn {picture}", "line 1: the control picture .* can't be read: "),
    ):
        with pytest.raises(ConfigError, match=told):
            read(tmp_path, "prompts.txt", line, steered=True)


def test_first_characters_of_the_text_are_no_option_either(tmp_path):
    assert one(tmp_path, "n girl, standing").prompt == "n girl, standing"
    assert one(tmp_path, "s 12 cats").steps == 28


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat --seed 5", "line 2: unknown option --seed; did you mean --d?"),
        ("a cat --steps 5", "line 2: unknown option --steps; did you mean --s?"),
        ("a cat --sample-steps 5", "line 2: unknown option --sample-steps; did you mean --s?"),
        ("a cat --xyzzy", "line 2: unknown option --xyzzy; known are --n --w --h --d --s --l --ss"),
        ("a cat --d5", "unknown option --d5"),
        ("a cat --d 1.5", "line 2: --d: expected a whole number from 0 to 9223372036854775807, got '1.5'"),
        ("a cat --d -1", "--d: expected a whole number"),
        ("a cat --d", "--d: expected a whole number"),
        ("a cat --w 512.0", "--w: expected a whole number"),
        ("a cat --s 0", "--s: expected a whole number from 1 to 1000, got '0'"),
        ("a cat --s 1001", "--s: expected a whole number from 1 to 1000, got '1001'"),
        ("a cat --l high", "--l: expected a number of at least 0, got 'high'"),
        ("a cat --l nan", "--l: expected a number of at least 0"),
        ("a cat --ss dpm_2", "--ss: expected one of euler, heun, dpmpp_2m, ddim, euler_a, unipc, got 'dpm_2'"),
        ("a cat --w 72", "line 2: width 72 isn't a multiple of 16; the nearest are 64 and 80"),
        ("a cat --h 8", "line 2: height 8 isn't a multiple of 16; the nearest are 16"),
        ("a cat --w 64 --w 64", "--w stands twice"),
        ("a cat --g 3.5", "--g does nothing: the model has no guidance input; write the guidance scale as --l"),
        ("a cat --cn x.png", "line 2: the control picture 'x.png' does nothing: samples of train_control_net.py alone"),
        ("--w 64 --h 64", "line 2: the prompt is missing"),
    ],
)
def test_mistakes_name_the_line(tmp_path, line, message):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, "my prompts.txt", f"fine\n{line}\n")
    assert str(caught.value).startswith("my prompts.txt, line 2: ")
    assert message in str(caught.value)


def test_all_mistakes_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, "p.txt", "a --w 3\nb\nc --q 1\n")
    assert [line[:13] for line in str(caught.value).splitlines()] == ["p.txt, line 1", "p.txt, line 3"]


def test_toml(tmp_path):
    content = """
        [prompt]
        width = 512
        scale = 4
        negative_prompt = "bad -- very --bad"
        [[prompt.subset]]
        prompt = "a cat --w 3"
        [[prompt.subset]]
        prompt = "a dog"
        width = 768
        seed = 3
        sample_steps = 9
        sample_sampler = "heun"
    """
    cat, dog = read(tmp_path, "prompts.toml", content)
    assert (cat.prompt, cat.width, cat.height, cat.scale) == ("a cat --w 3", 512, 768, 4.0)
    assert cat.negative_prompt == dog.negative_prompt == "bad -- very --bad"
    assert (dog.width, dog.seed, dog.steps, dog.sampler) == (768, 3, 9, "heun")


def test_json(tmp_path):
    content = json.dumps(["a cat --d 4", {"prompt": "", "scale": 1, "seed": 2}])
    cat, nothing = read(tmp_path, "prompts.json", content)
    assert (cat.prompt, cat.seed) == ("a cat", 4)
    assert (nothing.prompt, nothing.scale, nothing.seed) == ("", 1.0, 2)
    assert nothing.texts == (("", False),)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.toml", "[prompt]\n[[prompt.subset]]\nwidth = 64\n", "p.toml, prompt 1: the key prompt is missing"),
        ("p.toml", "[prompts]\n", "unknown table prompts"),
        ("p.toml", "[[prompt]]\nprompt = 'x'\n", "must be one table [prompt]"),
        ("p.toml", "[prompt]\nprompt = 'x'\n", "no prompts in it"),
        ("p.toml", "[prompt\n", "not valid TOML"),
        ("p.json", '[{"prompt": "a", "widht": 64}]', "prompt 1: unknown key widht; did you mean width?"),
        ("p.json", '["a", {"prompt": "b", "width": 64.0}]', "prompt 2: width: expected a whole number"),
        ("p.json", '[{"prompt": "b", "width": "64"}]', "width: expected a whole number from 1 to 65536, got '64'"),
        ("p.json", '[{"prompt": "b", "seed": true}]', "seed: expected a whole number"),
        ("p.json", '[{"prompt": "b", "scale": true}]', "scale: expected a number"),
        ("p.json", '[{"prompt": 5}]', "prompt: expected text, got 5"),
        ("p.json", '[{"prompt": "b", "guidance_scale": 5}]', "guidance_scale does nothing"),
        ("p.json", '{"prompt": "b"}', "expected a list"),
        ("p.json", "[3]", "expected a list of prompts"),
        ("p.json", "[", "not valid JSON"),
        ("p.txt", "# nothing\n\n", "no prompts in it"),
        ("p.yaml", "a", "ends in .txt, .toml or .json"),
    ],
)
def test_mistakes_in_files(tmp_path, name, content, message):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, name, content)
    assert message in str(caught.value)


def test_missing_file_and_wrong_encoding(tmp_path):
    options = {"native_resolution": Resolution(64, 64), "resolution_step": 16, "seed": 0}
    with pytest.raises(ConfigError, match="no such file"):
        read_prompts(tmp_path / "none.txt", **options)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ConfigError, match="UTF-8"):
        read_prompts(tmp_path / "latin.txt", **options)


def test_seeds_are_a_function_of_run_seed_and_place(tmp_path):
    first = read(tmp_path, "p.txt", "a\nb\nc")
    again = read(tmp_path, "p.txt", "x\nb\nc --d 1")
    assert [request.seed for request in first[:2]] == [request.seed for request in again[:2]]
    assert len({request.seed for request in first}) == 3
    assert first[0].seed != read(tmp_path, "p.txt", "a", seed=8)[0].seed


def test_fallbacks_give_way_to_the_line(tmp_path):
    requests = read(tmp_path, "p.txt", "a\nb --s 3 --w 64", fallbacks={"steps": 9, "width": 32, "seed": 1})
    assert [(request.steps, request.width, request.seed) for request in requests] == [(9, 32, 1), (3, 64, 1)]


def test_texts_needed():
    size = {"width": 16, "height": 16, "seed": 0}
    assert PromptRequest(prompt="a", negative_prompt="b", **size).texts == (("a", False), ("b", True))
    assert PromptRequest(prompt="", negative_prompt="", **size).texts == (("", False), ("", False))
    assert PromptRequest(prompt="a", negative_prompt="b", scale=1.0, **size).texts == (("a", False),)


def test_light():
    code = (
        "import sys, library.sampling.prompts; assert not {'torch', 'numpy', 'PIL', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
