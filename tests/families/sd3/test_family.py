import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from library.config.errors import ConfigError
from library.config.flow import FlowConfig
from library.config.loss import LossConfig
from library.config.memory import MemoryConfig
from library.config.model import ModelConfig
from library.families import create_family
from library.families.sd3 import position_table
from library.families.sd3.family import create
from library.families.sd3.options import UNSUPPORTED, Sd3Options
from library.families.sd3.text import Sd3Text
from library.io.header import read_header
from library.io.safetensors import load_tensors, save_tensors
from library.randomness import Draws
from library.records import NoisedLatents, Resolution

L, G, D, TABLE = 64, 128, 256, 16  # sizes of the tiny model
KEYS = tuple(f"set/{i}.png" for i in range(64))


def make(path, *, datasets=(), model=None, **options):
    return create(
        SimpleNamespace(
            model=ModelConfig(pretrained_model_name_or_path=str(path), **(model or {})),
            family=Sd3Options(**options),
            flow=FlowConfig(),
            loss=LossConfig(),
            memory=MemoryConfig(),
            datasets=datasets,
        )
    )


def text_of(rows, seed=0, **fields):
    generator = torch.Generator().manual_seed(seed)
    return Sd3Text(
        clip=torch.randn(rows, 77, L + G, generator=generator),
        pooled=torch.randn(rows, L + G, generator=generator),
        t5=torch.randn(rows, 12, D, generator=generator),
        **fields,
    )


def noised_of(rows, height=8, width=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(rows, 16, height, width, generator=generator)
    return NoisedLatents(x_t=x_t, sigma=torch.rand(rows, generator=generator))


@pytest.fixture(scope="module")
def denoiser(tiny_file):
    return make(tiny_file).load_denoiser(device="cpu", dtype=torch.float32)


class Recorder(nn.Module):
    """Stands in for a denoiser and remembers what it was asked."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.register_buffer("pos_embed", position_table.sincos_table(TABLE, 64))

    def forward(self, x_t, timestep, context, pooled, *, position_table):
        self.asked = SimpleNamespace(
            x_t=x_t, timestep=timestep, context=context, pooled=pooled, position_table=position_table
        )
        return x_t


def test_from_the_registry(tiny_file):
    family = create_family("sd3", SimpleNamespace(**{
        "model": ModelConfig(pretrained_model_name_or_path=str(tiny_file)),
        "family": Sd3Options(), "flow": FlowConfig(), "loss": LossConfig(), "memory": MemoryConfig(),
    }))  # fmt: skip
    assert family.name == "sd3" and family.description.title == "Stable Diffusion 3.5 medium"
    assert set(family.adapter_targets) == {"denoiser", "clip_l", "clip_g", "t5xxl"}
    assert "text_model.encoder.layers.1.mlp.fc2" in family.adapter_targets["clip_l"].fused
    assert "text_model.encoder.layers.2.mlp.fc2" not in family.adapter_targets["clip_l"].fused


def test_parts_are_frozen_and_in_the_asked_type(tiny_file):
    family = make(tiny_file)
    encoders = family.load_text_encoders(device="cpu", dtype=torch.bfloat16)
    assert list(encoders) == ["clip_l", "clip_g", "t5xxl"]
    assert encoders["clip_l"].config.hidden_act == "quick_gelu" and encoders["clip_g"].config.hidden_act == "gelu"
    parts = [*encoders.values(), family.load_vae(device="cpu", dtype=torch.bfloat16)]
    parts.append(family.load_denoiser(device="cpu", dtype=torch.bfloat16))
    for part in parts:
        assert not part.training
        assert all(p.dtype == torch.bfloat16 and not p.requires_grad and not p.is_meta for p in part.parameters())


def test_files_in_diffusers_layout_are_the_same_model(tiny_file, tiny_folder):
    with torch.no_grad():
        answers = []
        for path in (tiny_file, tiny_folder):
            family = make(path)
            strategy = family.text_strategy()
            encoders = family.load_text_encoders(device="cpu", dtype=torch.float32)
            text = strategy.encode(encoders, strategy.tokenize(["a red circle", ""]))
            denoiser = family.load_denoiser(device="cpu", dtype=torch.float32)
            answers.append(family.predict(denoiser, noised_of(2), text))
    assert torch.equal(*answers)


def test_without_a_t5(tiny_file, tmp_path):
    header = read_header(tiny_file)
    names = [name for name in header.tensors if "t5xxl" not in name]
    save_tensors(dict(load_tensors(header, names)), tmp_path / "no-t5.safetensors", {})
    family = make(tmp_path / "no-t5.safetensors", model={"tokenizer_dir": str(tiny_file.parent)})
    strategy = family.text_strategy()
    encoders = family.load_text_encoders(device="cpu", dtype=torch.float32)
    assert list(encoders) == ["clip_l", "clip_g"] and strategy.t5 is None
    assert not any("t5" in name for name in strategy.signature())
    text = strategy.encode(encoders, strategy.tokenize(["a cat"]))
    recorder = Recorder()
    family.predict(recorder, noised_of(1), family.augment(text, Draws(0, ("a",), (0,)), (8, 12)))
    assert recorder.asked.context.shape == (1, 154, D) and not recorder.asked.context[:, 77:].any()


def test_missing_tokenizers_are_an_error(tiny_file, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "alone.safetensors").symlink_to(tiny_file)
    with pytest.raises(ConfigError, match="--tokenizer_dir"):
        make(tmp_path / "alone.safetensors").text_strategy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_denoiser_is_asked_in_its_own_type_but_told_the_noise_level_in_fp32(tiny_file, dtype):
    recorder, text, noised = Recorder(dtype), text_of(3), noised_of(3)
    noised = dataclasses.replace(noised, sigma=torch.tensor([0.9983, 0.5003, 1e-4]))
    make(tiny_file).predict(recorder, noised, text)
    asked = recorder.asked
    assert torch.equal(asked.timestep, noised.sigma * 1000) and asked.timestep.dtype == torch.float32
    assert torch.equal(asked.x_t, noised.x_t.to(dtype)) and torch.equal(asked.pooled, text.pooled.to(dtype))
    assert torch.equal(asked.context, text.context(D).to(dtype))
    assert asked.position_table is None


@torch.no_grad()
def test_a_batch_is_its_rows(tiny_file, denoiser):
    family, text, noised = make(tiny_file), text_of(2), noised_of(2)
    together = family.predict(denoiser, noised, text)
    assert together.shape == noised.x_t.shape
    for row in range(2):
        one = NoisedLatents(x_t=noised.x_t[row : row + 1], sigma=noised.sigma[row : row + 1])
        torch.testing.assert_close(family.predict(denoiser, one, text.rows(slice(row, row + 1)))[0], together[row])


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("clip_l_dropout_rate", {"clip": slice(0, L), "pooled": slice(0, L)}),
        ("clip_g_dropout_rate", {"clip": slice(L, None), "pooled": slice(L, None)}),
        ("t5_dropout_rate", {"t5": slice(None)}),
    ],
)
def test_encoder_dropout(tiny_file, option, parts):
    family, text, draws = make(tiny_file, **{option: 0.3}), text_of(64), Draws(7, KEYS, (0,) * 64)
    augmented = family.augment(text, draws, (8, 12))
    purpose = option.removesuffix("_rate")
    struck = draws.uniform(purpose) < 0.3
    assert 5 < struck.sum() < 35
    for name in ("clip", "pooled", "t5"):
        expected = getattr(text, name).clone()
        if name in parts:
            expected[..., parts[name]][struck] = 0
        assert torch.equal(getattr(augmented, name), expected), name
    assert augmented.positions is None


def test_rate_one_strikes_always_and_zero_never(tiny_file):
    draws, text = Draws(0, KEYS, (0,) * 64), text_of(64)
    every = make(tiny_file, clip_l_dropout_rate=1.0, clip_g_dropout_rate=1.0, t5_dropout_rate=1.0)
    assert not any(tensor.any() for tensor in every.augment(text, draws, (8, 12)).tensors().values())
    assert make(tiny_file).augment(text, draws, (8, 12)) is text


def test_draws_belong_to_samples_and_visits(tiny_file):
    rates = {"clip_l_dropout_rate": 0.5, "t5_dropout_rate": 0.5, "pos_emb_random_crop_rate": 0.5}
    family, text = make(tiny_file, **rates), text_of(64)
    whole = family.augment(text, Draws(7, KEYS, (0,) * 64), (8, 12))
    part = family.augment(text.rows(slice(20, 40)), Draws(7, KEYS[20:40], (0,) * 20), (8, 12))
    for name, tensor in part.tensors().items():
        assert torch.equal(tensor, getattr(whole, name)[20:40]), name
    later = family.augment(text, Draws(7, KEYS, (1,) * 64), (8, 12))
    assert not torch.equal(later.positions, whole.positions) and not torch.equal(later.clip, whole.clip)


@torch.no_grad()
def test_random_windows_of_the_position_table(tiny_file, denoiser):
    family, text, noised = make(tiny_file, pos_emb_random_crop_rate=0.5), text_of(64), noised_of(64)
    augmented = family.augment(text, Draws(7, KEYS, (0,) * 64), (8, 12))
    rows, columns = augmented.positions.T.tolist()
    middle = (TABLE - 4) // 2, (TABLE - 6) // 2
    stay = torch.tensor([position == middle for position in zip(rows, columns)])
    assert 15 < stay.sum() < 50
    assert min(rows) >= 0 and max(rows) <= TABLE - 4 and min(columns) >= 0 and max(columns) <= TABLE - 6
    assert len({*rows}) > 6 and len({*columns}) > 6
    assert torch.corrcoef(augmented.positions[~stay].T.double())[0, 1].abs() < 0.6
    plain, moved = family.predict(denoiser, noised, text), family.predict(denoiser, noised, augmented)
    change = (plain - moved).abs().amax(dim=(1, 2, 3))
    assert change[stay].max() < 1e-4 and change[~stay].min() > 1e-3
    recorder = Recorder()
    family.predict(recorder, noised, augmented)
    grid = denoiser.pos_embed.view(TABLE, TABLE, -1)
    for row in (0, 33):
        window = grid[rows[row] : rows[row] + 4, columns[row] : columns[row] + 6]
        assert torch.equal(recorder.asked.position_table[row], window.flatten(0, 1))


def datasets(*sizes):
    return tuple(SimpleNamespace(resolution=Resolution(*size)) for size in sizes)


def test_the_scaled_table_follows_the_training_resolutions(tiny_file):
    tables = {}
    for name, resolutions in {"same": [(80, 80)], "larger": [(160, 160)], "none": []}.items():
        family = make(tiny_file, enable_scaled_pos_embed=True, datasets=datasets(*resolutions))
        recorder = Recorder()
        family.predict(recorder, noised_of(2), text_of(2))
        tables[name] = recorder.asked.position_table
        side = {"same": 5, "larger": 10, "none": 5}[name]  # 4 x 6 tokens are about 5 x 5
        assert torch.equal(tables[name], position_table.scaled_table([side], 4, 6, 64))
    assert not torch.equal(tables["same"], tables["larger"])


def test_windows_of_the_scaled_table(tiny_file):
    options = {"enable_scaled_pos_embed": True, "pos_emb_random_crop_rate": 1.0}
    family = make(tiny_file, datasets=datasets((128, 128)), **options)
    text = family.augment(text_of(64), Draws(7, KEYS, (0,) * 64), (8, 12))
    size = position_table.scaled_size(8)
    assert text.positions.max(dim=0).values.tolist() == [size - 4, size - 6]
    recorder = Recorder()
    family.predict(recorder, noised_of(64), text)
    expected = position_table.scaled_table([8], 4, 6, 64, offsets=text.positions)
    assert torch.equal(recorder.asked.position_table, expected)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (1, [1, 0]),
        (4, [1, 0.85769, 0.60215, 0.00893, 0]),
        (10, [1, 0.96013, 0.91335, 0.85769, 0.79037, 0.70728, 0.60215, 0.46488, 0.27805, 0.00893, 0]),
    ],
)
def test_sampling_sigmas(tiny_file, steps, expected):
    sigmas = make(tiny_file).sampling_sigmas(steps, Resolution(512, 512))
    assert sigmas.dtype == torch.float32
    torch.testing.assert_close(sigmas, torch.tensor(expected, dtype=torch.float32), atol=6e-6, rtol=0)


def test_sampling_sigmas_of_the_published_40_steps(tiny_file):
    sigmas = make(tiny_file).sampling_sigmas(40, Resolution(1024, 1024))
    expected = torch.tensor([1.0, 0.99133, 0.98236, 0.97306, 0.14651, 0.08105, 0.00893, 0])
    torch.testing.assert_close(torch.cat([sigmas[:4], sigmas[-4:]]), expected, atol=6e-6, rtol=0)


@torch.no_grad()
def test_blocks_and_skipping(tiny_file, denoiser):
    family, text, noised = make(tiny_file), text_of(1), noised_of(1)
    assert list(family.blocks(denoiser)) == list(denoiser.joint_blocks)
    full = family.predict(denoiser, noised, text)
    with family.skipping(denoiser, [1]):
        assert not torch.allclose(family.predict(denoiser, noised, text), full, atol=1e-3)
    assert torch.equal(family.predict(denoiser, noised, text), full)


@torch.no_grad()
def test_a_wrapped_denoiser_is_the_same(tiny_file, denoiser):
    class Wrapped(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    family, text, noised = make(tiny_file), text_of(2, positions=torch.tensor([[0, 3], [5, 1]])), noised_of(2)
    wrapped = Wrapped(denoiser)
    assert torch.equal(family.predict(wrapped, noised, text), family.predict(denoiser, noised, text))
    assert list(family.blocks(wrapped)) == list(denoiser.joint_blocks)


def test_reasons_read_as_sentences():
    for name, reason in UNSUPPORTED.items():
        assert not reason.endswith(".") and reason.count(". ") <= 1 and "\n" not in reason, name
        assert "emove" in reason or "Use " in reason, name


@pytest.mark.reference
@torch.no_grad()
def test_same_velocity_as_diffusers(tiny_file, tiny_folder):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.SD3Transformer2DModel.from_pretrained(tiny_folder / "transformer")
    family, text, noised = make(tiny_file), text_of(2), noised_of(2)
    denoiser = family.load_denoiser(device="cpu", dtype=torch.float32)
    expected = theirs(noised.x_t, text.context(D), text.pooled, noised.sigma * 1000).sample
    torch.testing.assert_close(family.predict(denoiser, noised, text), expected, atol=1e-4, rtol=1e-4)
