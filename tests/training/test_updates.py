"""Fused backward and stochastic rounding in a training run."""

import pytest
import torch
from torch import nn

from library.config.errors import ConfigError
from library.optimizers.one_by_one import OneByOne
from library.training.fused_backward import WAITING, FusedBackward, refuse_processes
from library.training.non_finite import NonFiniteLoss

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
CACHED_ON_DISK = {
    "cache_latents_to_disk": True,
    "cache_text_encoder_outputs_to_disk": True,
    "network_train_unet_only": True,
}
ROUNDED = {"mixed_precision": "bf16", "full_bf16": True, "stochastic_rounding": True}
KAHAN = {"mixed_precision": "bf16", "full_bf16": True, "kahan_summation": True}
FUSED = {"fused_backward_pass": True, "max_grad_norm": 0}
AWAY = {"offload_optimizer_device": "cpu"}


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"optimizer_type": "AdamW"}, id="AdamW"),
        pytest.param({"optimizer_type": "Adafactor"}, id="Adafactor"),
        pytest.param({"optimizer_type": "CAME", "learning_rate": 1e-4}, id="CAME"),
        pytest.param({"optimizer_type": "Lion", "learning_rate": 1e-3}, id="Lion"),
        pytest.param({"optimizer_type": "StableAdamW", "gradient_checkpointing": True}, id="checkpointing"),
        pytest.param({"optimizer_type": "CAME8bit", "learning_rate": 1e-4, **ROUNDED}, id="rounding"),
        pytest.param({"lr_scheduler": "cosine", "lr_warmup_steps": 2}, id="schedule"),
    ],
)
def test_fused_backward_changes_nothing(trainer, options):
    assert trainer("whole", **CACHED, **options, max_grad_norm=0) == 0
    assert trainer("fused", **CACHED, **options, **FUSED) == 0
    assert equal(trainer.weights("whole"), trainer.weights("fused"))
    whole, fused = ([line for line in trainer.log(name) if "gradient_norm" in line] for name in ("whole", "fused"))
    assert trainer.losses("whole") == trainer.losses("fused")
    tolerance = 1e-2 if "full_bf16" in options else 0  # the norm of bf16 gradients together is summed in bf16
    for expected, line in zip(whole, fused):
        assert line["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=tolerance, abs=0)
    assert len(fused) == 4


def test_text_encoders_train_fused_too(trainer):
    assert trainer("whole", max_grad_norm=0, max_train_steps=2) == 0
    assert trainer("fused", **FUSED, max_train_steps=2) == 0
    assert equal(trainer.weights("whole"), trainer.weights("fused"))


@pytest.mark.parametrize("fused", [{}, FUSED], ids=["whole", "fused"])
@pytest.mark.parametrize(
    ("optimizer", "rounding"),
    [("AdamW", ROUNDED), ("CAME8bit", ROUNDED), ("AdamW", KAHAN)],
    ids=["AdamW", "CAME8bit", "Kahan"],
)
def test_a_resumed_run_rounds_as_the_whole_one(trainer, optimizer, rounding, fused):
    options = {**CACHED_ON_DISK, **rounding, **fused, "optimizer_type": optimizer, "max_train_steps": 5}
    assert trainer("whole", **options, save_every_n_steps=3, save_state=True) == 0
    state = trainer.folder / "whole" / "run-step00000003-state"
    assert trainer("resumed", **options, resume=state) == 0
    assert equal(trainer.weights("whole"), trainer.weights("resumed"))


def test_rounding_learns_what_the_nearest_loses(trainer):
    # rank 64, so that weights which start random are large beside this update
    small = {**CACHED, "mixed_precision": "bf16", "full_bf16": True, "learning_rate": 1e-7, "network_dim": 64}

    def change(name, **options):
        assert trainer(name, **small, **options, save_every_n_steps=1, max_train_steps=20) == 0
        first, last = trainer.weights(name, "run-step00000001"), trainer.weights(name)
        down = [key for key in first if key.endswith("lora_down.weight")]
        return sum((first[key] != last[key]).sum().item() for key in down)

    nearest, rounded = change("nearest"), change("rounded", stochastic_rounding=True)
    assert rounded > 10 * max(1, nearest)
    other = {name: tensor.clone() for name, tensor in trainer.weights("rounded").items()}
    assert trainer("seeded", **small, stochastic_rounding=True, max_train_steps=20, seed=8) == 0
    assert not equal(trainer.weights("seeded"), other)


def test_what_kahan_summation_keeps_is_saved_and_dropped_with_it(trainer, capsys):
    def rests(name):
        saved = torch.load(trainer.folder / name / "run-state" / "optimizer.pt", weights_only=True)
        return sum("kahan_rest" in state for state in saved["optimizer"]["state"].values())

    options = {**CACHED_ON_DISK, **KAHAN, "save_state_on_train_end": True}
    assert trainer("kept", **options, max_train_steps=1) == 0
    assert rests("kept") == len(trainer.weights("kept")) * 2 // 3  # of down and up, not of alpha
    options |= {"kahan_summation": None, "resume": trainer.folder / "kept" / "run-state", "max_train_steps": 2}
    assert trainer("other", **options, resume_anyway=True) == 2
    assert "optimizer steps in bf16 (the state: fp32)" in capsys.readouterr().err
    options["stochastic_rounding"] = True
    assert trainer("other", **options) == 2
    assert "--kahan_summation False (the state: True)" in capsys.readouterr().err
    assert trainer("without", **options, resume_anyway=True) == 0
    assert rests("without") == 0


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"fused_backward_pass": True}, "--max_grad_norm 1 needs the norm of all gradients"),
        ({**FUSED, "gradient_accumulation_steps": 2}, "--gradient_accumulation_steps 2 finds none to add to"),
        ({**FUSED, "mixed_precision": "fp16"}, "--mixed_precision fp16 scales the loss"),
        ({**FUSED, "optimizer_type": "Prodigy"}, "but Prodigy estimates one learning rate from all gradients"),
        ({**ROUNDED, "optimizer_type": "DAdaptLion"}, "--stochastic_rounding steps one weight at a time, but DAdaptLi"),
        ({**ROUNDED, "optimizer_type": "AdamWScheduleFree"}, "moves all weights to and fro"),
        ({**ROUNDED, "optimizer_type": "prodigyopt.Prodigy"}, "with prodigyopt.Prodigy that is not the same"),
        ({**FUSED, "optimizer_type": "schedulefree.SGDScheduleFree"}, "schedulefree.SGDScheduleFree that is not the"),
        ({"stochastic_rounding": True}, "--stochastic_rounding does nothing without --full_bf16"),
        ({**KAHAN, "optimizer_type": "DAdaptAdam"}, "--kahan_summation steps one weight at a time, but DAdaptAdam est"),
        ({**AWAY, "optimizer_type": "Prodigy"}, "--offload_optimizer_device steps one weight at a time, but Prodigy"),
        ({**AWAY, "optimizer_type": "prodigyopt.Prodigy"}, "with prodigyopt.Prodigy that is not the same"),
        ({**AWAY, "optimizer_type": "PagedAdamW8bit"}, "with PagedAdamW8bit, whose paged state goes to the host by it"),
        ({**AWAY, "optimizer_type": "bitsandbytes.optim.PagedLion"}, "whose paged state goes to the host by itself"),
        (
            {**AWAY, "mixed_precision": "fp16"},
            "fp16 scales the loss and drops whole steps, but --offload_optimizer_dev",
        ),
        ({"offload_optimizer_nvme_path": "/x"}, "state goes to host memory only. Use --offload_optimizer_device cpu"),
        (
            {"optimizer_type": "CAME", "optimizer_args": ["clip_treshold=1"]},
            "CAME has no argument 'clip_treshold'; did you mean clip_threshold?",
        ),
        ({"optimizer_type": "CAME8bit", "optimizer_args": ["betas=0.9,0.99"]}, "betas takes three numbers"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(trainer, capsys, options, problem):
    assert trainer("out", **CACHED, **options) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert problem in errors[0]


def test_a_class_of_ones_own_that_steps_weights_apart_is_taken(trainer):
    assert trainer("out", **CACHED, **FUSED, optimizer_type="torch.optim.NAdam", max_train_steps=1) == 0


def test_several_processes_are_refused():
    refuse_processes(1)
    with pytest.raises(ConfigError, match="works in one process, and there are 2"):
        refuse_processes(2)


class Chain(nn.Module):
    """Twelve layers of one size."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(12))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x.square().mean()


def fused_chain(optimizer_class=torch.optim.SGD):
    chain = Chain()
    parameters = list(chain.parameters())
    one_by_one = OneByOne(optimizer_class(parameters, lr=0.1))
    return chain, FusedBackward(one_by_one, parameters, [name for name, _ in chain.named_parameters()])


def test_few_gradients_live_at_a_time():
    chain, fused = fused_chain()
    one = 32 * 32 * 4
    most = []

    def count(gradient):
        own = sum(weight.grad.nbytes for weight in chain.parameters() if weight.grad is not None)
        most.append(fused.waiting_bytes + own + gradient.nbytes)

    for weight in chain.parameters():
        weight.register_hook(count)
    loss = chain(torch.ones(4, 32))
    fused.start(0, loss, ["a"])
    loss.backward()
    assert len(most) == 12
    assert max(most) <= (WAITING + 1) * one
    norm = fused.finish()
    assert norm > 0
    assert all(weight.grad is None for weight in chain.parameters())


def test_a_gradient_that_is_no_number_reaches_no_weight():
    chain, fused = fused_chain(torch.optim.AdamW)
    before = {name: weight.detach().clone() for name, weight in chain.named_parameters()}
    chain.layers[5].weight.register_hook(lambda gradient: gradient * torch.inf)
    loss = chain(torch.ones(4, 32))
    fused.start(6, loss, ["cat", "dog"])
    with pytest.raises(
        NonFiniteLoss, match=r"step 7: the gradient of layers\.5\.weight is (inf|nan); samples: cat, dog"
    ):
        loss.backward()
    weights = dict(chain.named_parameters())
    assert all(weight.isfinite().all() for weight in weights.values())
    assert torch.equal(weights["layers.5.weight"], before["layers.5.weight"])
    assert not torch.equal(weights["layers.11.weight"], before["layers.11.weight"])


def test_a_loss_that_is_no_number_starts_no_backward_pass():
    _, fused = fused_chain()
    with pytest.raises(NonFiniteLoss, match="step 1: the loss is nan; samples: cat"):
        fused.start(0, torch.tensor(torch.nan), ["cat"])


def test_a_run_stops_at_a_bad_number_and_saves_nothing_bad(trainer, capsys):
    options = {**CACHED, **FUSED, "learning_rate": 1e30, "save_every_n_steps": 1, "max_train_steps": 10}
    assert trainer("out", **options) == 2
    error = capsys.readouterr().err
    assert "step 2: the" in error and "samples: 0/0/" in error
    for path in (trainer.folder / "out").glob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in trainer.weights("out", path.stem).values())


def test_no_schedule_complains_of_the_order_of_steps(trainer, recwarn):
    assert trainer("out", **CACHED, **FUSED, max_train_steps=1) == 0
    assert not [warning for warning in recwarn if "lr_scheduler.step()" in str(warning.message)]
