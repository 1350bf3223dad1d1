import pytest

from library.config.errors import ConfigError
from library.config.sampling import SamplingConfig, SkipLayerGuidance, parse_sizes
from library.records import Resolution

WHEN = {"sample_prompts": "p.txt", "sample_every_n_steps": 5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_every_n_steps": 5}, "--sample_every_n_steps needs --sample_prompts"),
        ({"sample_at_first": True}, "--sample_at_first needs --sample_prompts"),
        ({"sample_prompts": "p.txt"}, "--sample_prompts p.txt does nothing until it is said when"),
        ({"validation_prompt": ("a",)}, "--validation_prompt does nothing until it is said when"),
        ({"sample_sampler": "heun"}, "--sample_sampler does nothing without --sample_prompts"),
        ({"validation_num_inference_steps": 5}, "--validation_num_inference_steps does nothing without"),
        ({"validation_guidance": 5.0}, "--validation_guidance does nothing without"),
        ({"validation_negative_prompt": "a"}, "--validation_negative_prompt does nothing without"),
        ({"validation_resolution": "512x512"}, "--validation_resolution does nothing without"),
        ({"use_resolution_binning": False}, "--use_resolution_binning does nothing without"),
        ({"preview_every": 5}, "--preview_every does nothing without"),
        (
            {
                "sample_at_first": True,
                "validation_prompt": ("a",),
                "validation_guidance": 1.0,
                "validation_negative_prompt": "b",
            },
            "--validation_negative_prompt does nothing at --validation_guidance 1",
        ),
        ({**WHEN, "validation_guidance_skip_scale": 2.0}, "--validation_guidance_skip_scale 2.0 does nothing"),
        ({**WHEN, "validation_guidance_skip_layers_stop": 0.5}, "_stop 0.5 does nothing"),
        ({**WHEN, "validation_guidance_skip_layers": (7, 7)}, "7 7 must be different block numbers"),
        ({**WHEN, "validation_guidance_skip_layers": (-1,)}, "from 0 on"),
        (
            {**WHEN, "validation_guidance_skip_layers": (7,), "validation_guidance_skip_layers_start": 0.4},
            "_start 0.4 must be below --validation_guidance_skip_layers_stop 0.2",
        ),
    ],
)
def test_contradictions(options, message):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**options)


def test_skip_layer_guidance():
    assert SkipLayerGuidance.of(SamplingConfig()) is None
    skip = SkipLayerGuidance.of(SamplingConfig(**WHEN, validation_guidance_skip_layers=(7, 8, 9)))
    assert skip == SkipLayerGuidance(layers=(7, 8, 9), scale=2.8, start=0.01, stop=0.2)
    assert [step for step in range(28) if skip.acts(step, 28)] == [1, 2, 3, 4, 5]
    assert [step for step in range(20) if skip.acts(step, 20)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("value", "sizes"),
    [
        ("1024x1024,1280x768", [(1024, 1024), (1280, 768)]),
        (" 512 , 256x128 ", [(512, 512), (256, 128)]),
        (["512", "256x128"], [(512, 512), (256, 128)]),
        (512, [(512, 512)]),
    ],
)
def test_sizes(value, sizes):
    config = SamplingConfig(**WHEN, validation_resolution=parse_sizes(value))
    assert config.resolutions == tuple(Resolution(*size) for size in sizes)
    assert parse_sizes(config.validation_resolution) == config.validation_resolution


@pytest.mark.parametrize("value", ["", "1024x", "1.0", "512x0", "512,", "512x512,512", "-512", "512X512"])
def test_sizes_that_are_none(value):
    with pytest.raises(ValueError, match=r"expected sizes such as 1024x1024,1280x768|names a size twice"):
        parse_sizes(value)


def test_options_of_pictures_are_idle_without_any():
    assert "sample_sampler" in SamplingConfig().idle_options
    assert SamplingConfig(**WHEN).idle_options == ()
