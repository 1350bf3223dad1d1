"""What the options of a training run make of the prompts."""

import dataclasses
import json

import pytest

from library.config.errors import ConfigError
from library.config.samplers import DDPM_SAMPLERS
from library.config.sampling import SamplingConfig, skip_layer_problems
from library.records import ModelDescription, Resolution, SamplingDefaults
from library.sampling.requests import requested_samples

PLAIN = ModelDescription("Plain", "plain", "1", 1, {}, Resolution(1024, 512))
BINNED = ModelDescription(
    "Binned",
    "binned",
    "1",
    1,
    {},
    Resolution(1024, 1024),
    sampling=SamplingDefaults(sampler="dpmpp_2m", steps=20, scale=4.5, table="aspect_1024"),
)


def requests(description=PLAIN, *, prompts=None, **options):
    if prompts is not None:
        options["sample_prompts"] = str(prompts)
    config = SamplingConfig(sample_at_first=True, **options)
    return requested_samples(config, description, resolution_step=16, seed=7)


@pytest.fixture
def write(tmp_path):
    def written(content, name="prompts.txt"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return written


def test_nothing_is_asked_for():
    assert requested_samples(SamplingConfig(), PLAIN, resolution_step=16, seed=7) == []


def test_the_models_own_settings_act_where_nothing_is_said(write):
    (plain,) = requests(prompts=write("a cat"))
    assert (plain.sampler, plain.steps, plain.scale, plain.resolution) == ("euler", 28, 5.0, (1024, 512))
    (binned,) = requests(BINNED, prompts=write("a cat"))
    assert (binned.sampler, binned.steps, binned.scale, binned.resolution) == ("dpmpp_2m", 20, 4.5, (1024, 1024))


def test_options_act_where_the_prompt_says_nothing(write):
    options = {
        "sample_sampler": "heun",
        "validation_num_inference_steps": 9,
        "validation_guidance": 2.5,
        "validation_negative_prompt": "blurry",
    }
    quiet, loud = requests(BINNED, prompts=write("a cat\na dog --ss euler --s 4 --l 1.5 --n ugly\n"), **options)
    assert (quiet.sampler, quiet.steps, quiet.scale, quiet.negative_prompt) == ("heun", 9, 2.5, "blurry")
    assert (loud.sampler, loud.steps, loud.scale, loud.negative_prompt) == ("euler", 4, 1.5, "ugly")


def test_typed_prompts_come_first_and_are_pure_text(write):
    made = requests(prompts=write("a dog"), validation_prompt=("a cat --w 64", "a bird"))
    assert [request.prompt for request in made] == ["a cat --w 64", "a bird", "a dog"]
    assert len({request.seed for request in made}) == 3


def test_every_prompt_without_a_size_is_sampled_at_each_listed_one(write):
    made = requests(
        prompts=write("a cat\na dog --w 64\na bird --w 32 --h 32 --d 5"), validation_resolution="256x128,512x512"
    )
    assert [(request.prompt, request.resolution) for request in made] == [
        ("a cat", (256, 128)),
        ("a cat", (512, 512)),
        ("a dog", (64, 512)),
        ("a bird", (32, 32)),
    ]
    assert made[0].seed == made[1].seed != made[2].seed
    (alone,) = requests(prompts=write("a cat"))
    assert alone.seed == made[0].seed


def test_a_listed_size_that_nobody_uses(write):
    prompts = write("a cat --w 64 --h 64")
    with pytest.raises(ConfigError, match="--validation_resolution does nothing: every prompt says its own size"):
        requests(prompts=prompts, validation_resolution="256x128")


def test_a_listed_size_that_cant_be_made(write):
    with pytest.raises(ConfigError, match="--validation_resolution 250x128: width 250 isn't a multiple of 16"):
        requests(prompts=write("a cat"), validation_resolution="512x512,250x128")


def test_with_a_table_any_size_is_computed_at_the_nearest_of_it(write):
    prompts = write("a cat --w 1280 --h 768\na dog --w 333 --h 222\n")
    table, between = requests(BINNED, prompts=prompts)
    assert (table.resolution, table.computed_at) == ((1280, 768), None)
    assert (between.resolution, between.computed_at) == ((333, 222), (1216, 832))
    with pytest.raises(ConfigError, match="width 333 isn't a multiple of 16"):
        requests(BINNED, prompts=prompts, use_resolution_binning=False)
    (plain,) = requests(BINNED, prompts=write("a cat --w 320 --h 224"), use_resolution_binning=False)
    assert plain.computed_at is None


@pytest.mark.parametrize(("wanted", "spelt"), [(True, "--use_"), (False, "--no-use_")])
def test_binning_without_a_table(write, wanted, spelt):
    with pytest.raises(ConfigError, match=f"^{spelt}resolution_binning does nothing for Plain: it has no table"):
        requests(prompts=write("a cat"), use_resolution_binning=wanted)


def test_a_library_of_names_and_prompts(write):
    library = {"cat": "a cat on a mat --d 5", "big dog": {"prompt": "a dog", "width": 64}}
    cat, dog = requests(prompts=write(library, "library.json"))
    assert (cat.name, cat.prompt, cat.seed, cat.file_stem) == ("cat", "a cat on a mat", 5, "cat_5")
    assert (dog.name, dog.prompt, dog.width) == ("big dog", "a dog", 64)
    assert dog.file_stem == f"big dog_{dog.seed}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"cat": "a --w 3"}', 'library.json, "cat": width 3 isn\'t a multiple of 16'),
        ('{"cat": "a", "cat": "b"}', 'library.json: "cat" stands twice'),
        ('{"a/b": "a"}', 'library.json, "a/b": the name becomes part of a file name'),
        ('{".a": "a"}', "the name becomes part of a file name"),
        ('{"cat": 3}', "expected a list of prompts"),
        ('{"prompt": "a cat", "seed": 3}', "expected a list of prompts"),
        ('{"cat": {"width": 64}}', 'library.json, "cat": the key prompt is missing'),
        ("{}", "no prompts in it"),
    ],
)
def test_mistakes_in_a_library(write, content, message):
    with pytest.raises(ConfigError) as caught:
        requests(prompts=write(content, "library.json"))
    assert message in str(caught.value)


def test_previews_that_never_come(write):
    prompts = write("a cat --s 4\na dog --s 6\n")
    requests(prompts=prompts, preview_every=5)
    with pytest.raises(ConfigError, match="--preview_every 6 does nothing: no picture has more than 6 steps"):
        requests(prompts=prompts, preview_every=6)


NOISE = dataclasses.replace(
    PLAIN, title="Noise", sampling=SamplingDefaults(sampler="ddim", samplers=DDPM_SAMPLERS, steps=30, scale=7.5)
)


def test_a_prompt_names_a_sampler_that_the_model_has(write):
    lines = "a cat --ss k_euler_a\na dog --ss uni_pc\na bird\n"
    assert [made.sampler for made in requests(NOISE, prompts=write(lines))] == ["euler_a", "unipc", "ddim"]
    known = "expected one of ddim, euler, euler_a, dpmpp_2m, unipc, got 'heun'"
    with pytest.raises(ConfigError, match=f"prompts.txt, line 1: --ss: {known}"):
        requests(NOISE, prompts=write("a cat --ss heun"))
    with pytest.raises(ConfigError, match=f"prompts.json, prompt 1: sample_sampler: {known}"):
        requests(NOISE, prompts=write([{"prompt": "a cat", "sample_sampler": "heun"}], "prompts.json"))
    with pytest.raises(ConfigError, match="--ss: expected one of euler, heun, dpmpp_2m, got 'euler_a'"):
        requests(prompts=write("a cat --ss k_euler_a"))


def test_blocks_that_can_not_be_left_out():
    asked = SamplingConfig(sample_at_first=True, validation_prompt=("a",), validation_guidance_skip_layers=(0,))
    assert skip_layer_problems(asked, dataclasses.replace(NOISE, blocks=3)) == []
    (problem,) = skip_layer_problems(asked, dataclasses.replace(NOISE, blocks=3, unskippable="they are needed"))
    assert problem == "--validation_guidance_skip_layers does nothing for Noise: they are needed. Remove it"
    assert skip_layer_problems(SamplingConfig(), dataclasses.replace(NOISE, unskippable="they are needed")) == []
