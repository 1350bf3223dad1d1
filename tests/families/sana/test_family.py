import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from library.config.command_line import read_command_line
from library.config.loss import LossConfig
from library.config.memory import MemoryConfig
from library.config.model import ModelConfig
from library.config.optimizer import OptimizerConfig
from library.config.run import training_groups
from library.diffusion.timesteps import SMALLEST_SIGMA
from library.families import create_family, family_options
from library.families.sana.family import create
from library.families.sana.linear_dit import LinearDiT
from library.families.sana.options import UNSUPPORTED, SanaFlowConfig, SanaOptions
from library.families.sana.synthetic import synthetic_family
from library.families.sana.text import SanaText
from library.nn.attention import sdpa
from library.records import NoisedLatents, Resolution
from tests.families.sana.published_files import published, write_parts, write_sparse
from tests.tiny import TINY_SANA

WIDTH, TOKENS = TINY_SANA.gemma_width, 7


def make(path, *, vae=None, **changes):
    options = {key: changes.pop(key) for key in ("gemma", "sana_image_size") if key in changes}
    return create(
        SimpleNamespace(
            model=ModelConfig(pretrained_model_name_or_path=str(path), vae=vae),
            family=SanaOptions(**options),
            flow=SanaFlowConfig(**changes),
            loss=LossConfig(),
            memory=MemoryConfig(),
        )
    )


def objective(**flow):
    return synthetic_family("tiny", flow=SanaFlowConfig(**flow)).objective


def text_of(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(TOKENS).expand(rows, TOKENS) < 1 + torch.arange(rows)[:, None] % TOKENS
    return SanaText(torch.randn(rows, TOKENS, WIDTH, generator=generator), mask)


def noised_of(rows, height=3, width=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(rows, 32, height, width, generator=generator)
    return NoisedLatents(x_t=x_t, sigma=torch.rand(rows, generator=generator))


class Recorder(nn.Module):
    """Stands in for a denoiser and remembers what it was asked."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, x_t, timestep, context, mask):
        self.asked = SimpleNamespace(x_t=x_t, timestep=timestep, context=context, mask=mask)
        return x_t


def asked_timestep(family, sigma):
    rows, recorder = len(sigma), Recorder()
    family.predict(recorder, NoisedLatents(torch.zeros(rows, 32, 1, 1), sigma), text_of(rows))
    return recorder.asked.timestep


# Noise levels and loss


def published_table(shift):
    """The discrete schedule: noise levels, and the timesteps that the network is told."""
    base = torch.from_numpy(1 - np.linspace(1.0, 0.001, 1000))  # torch.linspace rounds its second half differently
    sigma = shift * base / (1 + (shift - 1) * base)
    return sigma, (sigma * 1000).to(torch.int64)


def uniform_of(index):
    """Where the logit-normal draw of the published code takes entry ``index`` of the table."""
    return torch.special.ndtr(torch.logit((index.double() + 0.5) / 1000))


@pytest.mark.parametrize("shift", [0.1, 1.0, 3.0, 4.0, 6.0])
def test_the_published_table_of_noise_levels(shift):
    sigma, timesteps = published_table(shift)
    index = torch.arange(1000)
    family = synthetic_family("tiny", flow=SanaFlowConfig(training_shift=shift))
    ours = family.objective.sigmas(uniform_of(index), tokens=1024)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours[1:].double(), sigma[1:].clamp(SMALLEST_SIGMA), rtol=4e-7, atol=0)
    assert ours[0] == torch.tensor(SMALLEST_SIGMA), "a picture without noise teaches nothing"
    assert torch.equal(asked_timestep(family, ours).long(), timesteps)


def test_reference_values_of_the_table():
    ours = objective(training_shift=3.0).sigmas(uniform_of(torch.tensor([1, 100, 500, 900, 999])), tokens=1024)
    expected = torch.tensor([0.002994, 0.25, 0.75, 0.964286, 0.999666])
    torch.testing.assert_close(ours, expected, atol=5e-7, rtol=0)
    family = synthetic_family("tiny")
    assert asked_timestep(family, ours).tolist() == [2, 249, 750, 964, 999]


def test_levels_are_drawn_from_a_logit_normal():
    uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    base = objective(training_shift=1.0).sigmas(uniform, tokens=1024).double()
    normal = torch.logit(base[(base > 0.002) & (base < 0.998)])
    assert abs(normal.mean()) < 0.01 and abs(normal.std() - 1) < 0.01
    wide = objective(training_shift=1.0, logit_mean=0.5, logit_std=2.0).sigmas(uniform, tokens=1024)
    assert abs(wide.median() - torch.sigmoid(torch.tensor(0.5))) < 2e-3 and wide.std() > base.std()


@pytest.mark.parametrize("options", [{"flow_use_uniform_schedule": True}, {"timestep_sampling": "uniform"}])
def test_uniform_levels(options):
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    ours = objective(training_shift=1.0, **options).sigmas(uniform, tokens=1024)
    torch.testing.assert_close(ours, torch.arange(1000) / 1000, atol=SMALLEST_SIGMA, rtol=0)
    shifted = objective(training_shift=4.0, **options).sigmas(uniform, tokens=1024)
    torch.testing.assert_close(shifted[1:].double(), published_table(4.0)[0][1:], rtol=4e-7, atol=0)


def test_the_shift_of_the_resolution():
    uniform = uniform_of(torch.arange(1000))
    automatic = objective(flow_schedule_auto_shift=True)
    for side, factor in ((512, 1.65), (1024, 1.88)):
        tokens = (side // 32) ** 2
        exact = math.exp(0.5 + 0.65 * (tokens - 256) / 3840)
        assert round(exact, 2) == factor
        torch.testing.assert_close(
            automatic.sigmas(uniform, tokens=tokens)[1:].double(), published_table(exact)[0][1:], rtol=4e-7, atol=0
        )


@pytest.mark.parametrize(("word", "factor"), [("0.1", 0.1), ("0.5", 0.5), ("4", 4.0)])
def test_the_shift_of_the_command_line(word, factor):
    groups = training_groups(family_options("sana"), job="adapter")
    given = read_command_line(groups, ["--flow_schedule_shift", word])
    flow = given.groups["flow"]
    assert flow.training_shift == factor
    level = synthetic_family("tiny", flow=flow).objective.sigmas(uniform_of(torch.tensor([500])), tokens=1024)
    assert level.item() == pytest.approx(factor * 0.5 / (1 + (factor - 1) * 0.5), rel=1e-6)


def test_shifts_out_of_range_are_refused():
    groups = training_groups(family_options("sana"), job="adapter")
    for word in ("0.05", "11"):
        (problem,) = [
            text for text in read_command_line(groups, ["--flow_schedule_shift", word]).problems if "shift" in text
        ]
        assert word in problem


@pytest.mark.parametrize(
    ("kind", "size", "shift"),
    [
        ("0.6b", "512", 3),
        ("0.6b", "1024", 4),
        ("1.5-1.6b", "1024", 3),
        ("1.5-1.6b", "2048", 3),
        ("1.5-1.6b", "4096", 6),
    ],
)
def test_training_has_the_models_own_shift_unless_told(tmp_path, kind, size, shift):
    parts = write_parts(tmp_path)
    path = write_sparse(tmp_path / "sana.safetensors", published(kind))
    own = make(path, **parts, sana_image_size=size).objective
    middle = uniform_of(torch.tensor([500]))
    assert own.sigmas(middle, tokens=1024).item() == pytest.approx(published_table(shift)[0][500].item(), rel=1e-6)
    told = make(path, **parts, sana_image_size=size, training_shift=2.0).objective
    assert told.sigmas(middle, tokens=1024).item() == pytest.approx(published_table(2.0)[0][500].item(), rel=1e-6)


def test_the_loss_is_the_mean_squared_error_of_the_velocity():
    generator = torch.Generator().manual_seed(0)
    x_0, noise, answer = torch.randn(3, 4, 32, 3, 5, generator=generator)
    noised = objective().add_noise(x_0, noise, torch.tensor([SMALLEST_SIGMA, 0.25, 0.75, 0.9997]))
    sigma = noised.sigma.view(-1, 1, 1, 1)
    assert torch.equal(noised.x_t, (1 - sigma) * x_0 + sigma * noise)
    assert torch.equal(objective().loss(answer, noised), (answer - (noise - x_0)) ** 2), "no weight, at any level"


def test_the_learning_rate_of_a_full_fine_tune_and_of_adapters(sana_file):
    description = make(sana_file).description
    assert description.defaults["learning_rate"] == 1e-5
    groups = training_groups(family_options("sana"), job="adapter")
    assert read_command_line(groups, []).groups["optimizer"].learning_rate == OptimizerConfig().learning_rate


# The denoiser


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_denoiser_is_asked_in_its_own_type_but_told_whole_timesteps_in_fp32(sana_file, dtype):
    recorder, text, noised = Recorder(dtype), text_of(3), noised_of(3)
    noised = dataclasses.replace(noised, sigma=torch.tensor([0.9983, 0.5003, 1e-4]))
    make(sana_file).predict(recorder, noised, text)
    asked = recorder.asked
    assert asked.timestep.tolist() == [998, 500, 0] and asked.timestep.dtype == torch.float32
    assert torch.equal(asked.x_t, noised.x_t.to(dtype)) and torch.equal(asked.context, text.context.to(dtype))
    assert torch.equal(asked.mask, text.mask)


def with_empty_heads(dtype):
    """A denoiser of whose attention heads the first has no positive query, and the second no positive key."""
    torch.manual_seed(0)
    dit = LinearDiT(dataclasses.replace(TINY_SANA.denoiser(), width=96, num_cross_heads=3), attention=sdpa)
    with torch.no_grad():
        for block in dit.blocks:
            width = dit.config.width
            block.attn.qkv.weight[:32] = 0  # queries of head 0
            block.attn.qkv.weight[width + 32 : width + 64] = 0  # keys of head 1
    return dit.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_without_a_positive_query_or_key_stay_finite_under_autocast(sana_file, dtype):
    family, dit = make(sana_file), with_empty_heads(torch.float32)
    noised = noised_of(2)
    with torch.autocast("cpu", dtype):
        answer = family.predict(dit, noised, text_of(2))
    assert answer.isfinite().all() and answer.std() > 0
    answer.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in dit.parameters())
    assert all(block.attn.qkv.weight.grad.any() for block in dit.blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_heads_without_a_positive_query_or_key_stay_finite_in_few_bits(sana_file, dtype):
    answer = make(sana_file).predict(with_empty_heads(dtype), noised_of(2), text_of(2))
    assert answer.isfinite().all() and answer.float().std() > 0


def test_from_the_registry(sana_file):
    module = family_options("sana")
    groups = {name: kind() for name, kind in module.OBJECTIVE_GROUPS.items()}
    model = ModelConfig(pretrained_model_name_or_path=str(sana_file))
    family = create_family("sana", SimpleNamespace(model=model, family=SanaOptions(), memory=MemoryConfig(), **groups))
    assert family.name == "sana" and family.description.title.startswith("Sana-1.5")
    assert set(family.adapter_targets) == {"denoiser", "gemma"}


def test_parts_are_frozen_and_in_the_asked_type(sana_file):
    family, bf16 = make(sana_file), {"device": "cpu", "dtype": torch.bfloat16}
    encoders = family.load_text_encoders(**bf16)
    assert list(encoders) == ["gemma"]
    for part in (*encoders.values(), family.load_vae(**bf16), family.load_denoiser(**bf16)):
        assert not part.training
        assert all(p.dtype == torch.bfloat16 and not p.requires_grad and not p.is_meta for p in part.parameters())


@torch.no_grad()
def test_files_in_diffusers_layout_are_the_same_model(sana_file, sana_folder):
    answers = []
    for path in (sana_file, sana_folder):
        family, cpu = make(path), {"device": "cpu", "dtype": torch.float32}
        strategy = family.text_strategy()
        text = strategy.encode(family.load_text_encoders(**cpu), strategy.tokenize(["a red circle", ""]))
        answers.append(family.predict(family.load_denoiser(**cpu), noised_of(2), text))
    assert torch.equal(*answers)


@pytest.mark.reference
@torch.no_grad()
def test_same_velocity_as_diffusers(sana_file, sana_folder):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.SanaTransformer2DModel.from_pretrained(sana_folder / "transformer")
    family, text, noised = make(sana_file), text_of(2), noised_of(2, 4, 4)
    denoiser = family.load_denoiser(device="cpu", dtype=torch.float32)
    timestep = torch.floor(noised.sigma * 1000)
    expected = theirs(
        noised.x_t, encoder_hidden_states=text.context, encoder_attention_mask=text.mask.float(), timestep=timestep
    ).sample
    torch.testing.assert_close(family.predict(denoiser, noised, text), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_blocks_of_a_wrapped_denoiser(sana_file):
    family = make(sana_file)
    denoiser = family.load_denoiser(device="cpu", dtype=torch.float32)
    wrapped = nn.Module()
    wrapped.module = denoiser
    assert list(family.blocks(wrapped)) == list(family.blocks(denoiser)) == list(denoiser.blocks)


# Sampling


@pytest.mark.reference
@pytest.mark.parametrize("steps", [4, 14, 20])
@pytest.mark.parametrize(("side", "shift"), [("512", 3.0), ("1024", 3.0), ("2048", 3.0), ("4096", 6.0)])
def test_sampling_sigmas_equal_the_shipped_schedulers(sana_file, steps, side, shift):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    )
    scheduler.set_timesteps(steps)
    family = make(sana_file, sana_image_size=side)
    sigmas = family.sampling_sigmas(steps, Resolution(1024, 1024))
    torch.testing.assert_close(sigmas, scheduler.sigmas, atol=1e-6, rtol=0)
    assert asked_timestep(family, sigmas[:-1]).tolist() == scheduler.timesteps.tolist()


def test_timesteps_of_the_published_20_steps(sana_file):
    family = make(sana_file)
    told = asked_timestep(family, family.sampling_sigmas(20, Resolution(512, 768))[:-1])
    expected = "999 982 963 944 922 899 874 847 817 785 749 710 666 617 562 499 428 345 249 136"
    assert told.tolist() == [int(word) for word in expected.split()]


def test_reasons_read_as_sentences():
    for name, reason in UNSUPPORTED.items():
        assert not reason.endswith(".") and reason.count(". ") <= 1 and "\n" not in reason, name
        assert "emove" in reason or "se --" in reason, name
