import pytest

from library.config.errors import ConfigError
from library.config.sampling import SamplingConfig, SkipLayerGuidance

WHEN = {"sample_prompts": "p.txt", "sample_every_n_steps": 5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_every_n_steps": 5}, "--sample_every_n_steps needs --sample_prompts"),
        ({"sample_at_first": True}, "--sample_at_first needs --sample_prompts"),
        ({"sample_prompts": "p.txt"}, "--sample_prompts p.txt does nothing until it is said when"),
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
