import math

import pytest
import torch

from library.config.flow import WEIGHTING_SCHEMES, FlowConfig
from library.config.loss import LossConfig
from library.diffusion.flow_matching import FlowMatching, x_0_estimate
from library.diffusion.loss import weight

SHAPE = (6, 4, 3, 5)
SIGMA = torch.tensor([1e-4, 0.001, 0.25, 0.5, 0.9, 1.0])


def material(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_0, noise, error = ((torch.randn(SHAPE, generator=generator) * 64).round() / 64 for _ in range(3))
    return x_0, noise, noise - x_0 + error


def written_out(flow: FlowConfig, loss: LossConfig, x_0, noise, prediction, sigma) -> torch.Tensor:
    """The formulas as the established trainer's documentation writes them, one element at a time, in fp64."""
    result = torch.empty(SHAPE, dtype=torch.float64)
    for b, s in enumerate(sigma.double().tolist()):
        for index, (z, e, v) in enumerate(zip(x_0[b].flatten(), noise[b].flatten(), prediction[b].flatten())):
            z, e, v = float(z), float(e), float(v)
            x = s * e + (1 - s) * z
            estimate = x - s * v
            d = estimate - z
            if loss.huber_schedule == "exponential":
                c = math.exp(math.log(loss.huber_c) / 1000 * (1000 * s)) * loss.huber_scale
            else:
                c = loss.huber_c * loss.huber_scale
            element = {
                "l2": d * d,
                "l1": abs(d),
                "huber": 2 * c * (math.sqrt(d * d + c * c) - c),
                "smooth_l1": 2 * (math.sqrt(d * d + c * c) - c),
            }[loss.loss_type]
            factor = {"sigma_sqrt": s**-2, "cosmap": 2 / (math.pi * (1 - 2 * s + 2 * s * s))}
            result[b].view(-1)[index] = element * factor.get(flow.weighting_scheme, 1.0)
    return result


@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(),
        LossConfig(loss_type="l1"),
        LossConfig(loss_type="huber", huber_c=0.2, huber_scale=1.7),
        LossConfig(loss_type="smooth_l1", huber_schedule="constant"),
        LossConfig(loss_type="huber", huber_schedule="exponential", huber_scale=0.5),
        LossConfig(loss_type="smooth_l1", huber_schedule="exponential", huber_c=0.3),
    ],
    ids=lambda loss: f"{loss.loss_type}-{loss.huber_schedule}",
)
def test_loss_is_the_formula_written_out(scheme, loss):
    flow = FlowConfig(weighting_scheme=scheme)
    objective = FlowMatching(flow, loss)
    x_0, noise, prediction = material()
    per_element = objective.loss(prediction, objective.add_noise(x_0, noise, SIGMA))
    assert per_element.dtype == torch.float32
    expected = written_out(flow, loss, x_0, noise, prediction, SIGMA)
    assert torch.allclose(per_element.double(), expected, rtol=2e-5, atol=1e-12)


def test_sigma_sqrt_is_the_plain_velocity_loss_to_the_last_bit():
    objective = FlowMatching(FlowConfig(weighting_scheme="sigma_sqrt"), LossConfig())
    x_0, noise, prediction = material()
    tiny = torch.full((6,), 1e-30)
    for sigma in (SIGMA, tiny, torch.zeros(6)):
        per_element = objective.loss(prediction, objective.add_noise(x_0, noise, sigma))
        assert torch.equal(per_element, (prediction - (noise - x_0)) ** 2)


def test_uniform_is_the_velocity_loss_weighted_by_sigma_squared():
    x_0, noise, prediction = material()
    uniform = FlowMatching(FlowConfig(), LossConfig())
    plain = FlowMatching(FlowConfig(weighting_scheme="sigma_sqrt"), LossConfig())
    noised = uniform.add_noise(x_0, noise, SIGMA)
    factor = SIGMA.view(-1, 1, 1, 1) ** 2
    assert torch.allclose(uniform.loss(prediction, noised), factor * plain.loss(prediction, noised), rtol=1e-5)


@pytest.mark.parametrize("loss_type", ["l2", "huber", "smooth_l1"])
def test_gradient_is_finite_and_zero_at_the_truth(loss_type):
    objective = FlowMatching(FlowConfig(weighting_scheme="sigma_sqrt"), LossConfig(loss_type=loss_type))
    x_0, noise, _ = material()
    prediction = (noise - x_0).requires_grad_()
    objective.loss(prediction, objective.add_noise(x_0, noise, SIGMA)).sum().backward()
    assert torch.equal(prediction.grad, torch.zeros(SHAPE))


def test_add_noise_is_fp32_and_interpolates():
    x_0, noise, _ = material()
    objective = FlowMatching(FlowConfig(), LossConfig())
    noised = objective.add_noise(x_0.bfloat16(), noise, SIGMA.double())
    assert {noised.x_t.dtype, noised.sigma.dtype, noised.x_0.dtype, noised.noise.dtype} == {torch.float32}
    assert torch.equal(noised.x_t[-1], noise[-1])
    s = SIGMA.view(-1, 1, 1, 1)
    assert torch.allclose(noised.x_t, (1 - s) * x_0.bfloat16().float() + s * noise)


def test_a_bf16_prediction_is_compared_in_fp32():
    x_0, noise, prediction = material()
    objective = FlowMatching(FlowConfig(), LossConfig())
    noised = objective.add_noise(x_0, noise, SIGMA)
    rounded = prediction.bfloat16()
    assert torch.equal(objective.loss(rounded, noised), objective.loss(rounded.float(), noised))


def test_loss_needs_the_truth():
    objective = FlowMatching(FlowConfig(), LossConfig())
    x_0, noise, prediction = material()
    noised = objective.add_noise(x_0, noise, SIGMA)
    bare = type(noised)(noised.x_t, noised.sigma)
    for ask in (lambda: objective.loss(prediction, bare), lambda: objective.target(bare)):
        with pytest.raises(ValueError, match="x_0 and noise"):
            ask()


def test_the_target_is_the_velocity_unless_another_is_given():
    x_0, noise, prediction = material()
    _, _, other = material(seed=1)
    objective = FlowMatching(FlowConfig(), LossConfig(loss_type="huber"))
    noised = objective.add_noise(x_0, noise.bfloat16(), SIGMA)
    target = objective.target(noised)
    assert target.dtype == torch.float32 and torch.equal(target, noise.bfloat16().float() - x_0)
    assert torch.equal(objective.loss(prediction, noised, target), objective.loss(prediction, noised))
    assert torch.equal(objective.loss(other, noised, other), torch.zeros(SHAPE))
    # the same difference costs the same, whatever it is a difference from; and a given target needs no truth
    bare = type(noised)(noised.x_t, noised.sigma)
    shifted = objective.loss(prediction - target + other, bare, other)
    assert torch.allclose(shifted, objective.loss(prediction, noised), rtol=1e-4, atol=1e-6)


def test_snr_schedule_is_refused():
    objective = FlowMatching(FlowConfig(), LossConfig(loss_type="huber", huber_schedule="snr"))
    x_0, noise, prediction = material()
    with pytest.raises(ValueError, match="snr"):
        objective.loss(prediction, objective.add_noise(x_0, noise, SIGMA))


def test_x_0_estimate_of_the_true_velocity_is_x_0():
    x_0, noise, _ = material()
    x_t = 0.7 * noise + 0.3 * x_0
    assert torch.allclose(x_0_estimate(x_t, (noise - x_0).bfloat16().float(), 0.7), x_0, atol=0.05)
    assert torch.allclose(x_0_estimate(x_t, noise - x_0, 0.7), x_0, atol=1e-5)


@pytest.mark.reference
@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap", "logit_normal"])
def test_weights_are_those_of_diffusers(scheme):
    oracle = pytest.importorskip("diffusers.training_utils").compute_loss_weighting_for_sd3
    sigma = torch.linspace(0.01, 1, 50)
    assert torch.allclose(weight(scheme, sigma), oracle(scheme, sigma))
