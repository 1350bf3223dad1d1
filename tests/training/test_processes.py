"""Any number of processes does the same optimizer steps: what they see, what they sum, and what they go on from.

One launch by torchrun; elsewhere the processes are forked from this one, which saves their imports.
"""

import hashlib
import json
import shutil
from collections import Counter

import pytest
import torch

from library.training import loop, step
from library.training.gradients import sum_gradients
from library.training.loop import own_share
from library.training.step import training_loss
from tests.training.ranks import in_processes

CACHED = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True, "network_train_unet_only": True}
# AdamW's first step is the gradient's sign, which rounding turns over where the gradient is almost zero
CONTINUOUS = {"optimizer_type": "SGDNesterov", "learning_rate": 0.5}


def of_one(trainer, subset: str = "", more: str = ""):
    """A dataset in batches of one; four pictures, or three when the first is removed."""
    path = trainer.folder / "of-one.toml"
    text = trainer.dataset(subset=subset).read_text().replace("batch_size = 2", "batch_size = 1")
    path.write_text(text + more)
    return path


def close(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[k], other[k], rtol=1e-4, atol=1e-7) for k in one)


def numbers(trainer, output: str, after: int = 0) -> dict[str, float]:
    """Everything that was logged after a step, by step and name."""
    return {
        f"{line['step']} {name}": value
        for line in trainer.log(output)
        for name, value in line.items()
        if line["step"] > after and name != "step"
    }


def test_two_processes_equal_one_with_twice_the_accumulation(trainer):
    # 3 pictures in batches of 1: the epoch's last step leaves the second process without work
    (trainer.photos / "camera.png").unlink()
    options = {**CACHED, **CONTINUOUS, "dataset_config": of_one(trainer)}
    options |= {"max_train_steps": 4, "save_every_n_steps": 2, "save_state": True}
    trainer.launch(2, "two", **options)
    assert trainer("one", **options, gradient_accumulation_steps=2) == 0
    assert trainer.losses("two") == pytest.approx(trainer.losses("one"), rel=1e-5)
    assert close(trainer.weights("one"), trainer.weights("two"))

    later = {at: loss for at, loss in trainer.losses("one").items() if at > 2}
    state = trainer.folder / "two" / "run-step00000002-state"
    assert trainer("two then one", **options, gradient_accumulation_steps=2, resume=state) == 0
    assert trainer.losses("two then one") == pytest.approx(later, rel=1e-5)
    state = trainer.folder / "one" / "run-step00000002-state"
    assert in_processes(2, lambda rank: trainer("one then two", **options, resume=state)) == [0, 0]
    assert trainer.losses("one then two") == pytest.approx(later, rel=1e-5)
    assert close(trainer.weights("one"), trainer.weights("one then two"))


def seen(trainer, output: str, processes: int, **options) -> list[list[tuple]]:
    """What every process trained on: per process a list of (step, sample, visit, caption, noise, noise level)."""

    def act(rank: int) -> list[tuple]:
        rows, at = [], [0]
        with pytest.MonkeyPatch.context() as patch:
            optimize, noised = loop.optimize, step._noised

            def counted(run, number):
                at[0] = number
                optimize(run, number)

            def watched(run, batch, uniform, draws):
                made = noised(run, batch, uniform, draws)
                for row, (key, visit, caption) in enumerate(zip(batch.keys, batch.visits, batch.captions)):
                    noise = hashlib.sha256(made.noise[row].contiguous().numpy().tobytes()).hexdigest()
                    rows.append((at[0], key, visit, caption, noise, made.sigma[row].item()))
                return made

            patch.setattr(loop, "optimize", counted)
            patch.setattr(step, "_noised", watched)
            assert trainer(output, **options) == 0
        return rows

    return in_processes(processes, act)


@pytest.mark.usefixtures("unforeseen")
def test_any_number_of_processes_sees_the_same_in_every_step(trainer):
    others = shutil.copytree(trainer.photos, trainer.folder / "others")
    (others / "coffee.png").unlink()
    for path in trainer.photos.glob("*.txt"):
        path.write_text("red, round, far, near, old")
    subset = f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(others))}\nnum_repeats = 3"
    more = f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(trainer.photos))}\n"
    sizes = "resolution = 32\nbatch_size = 3\nmin_bucket_reso = 32\nbucket_reso_steps = 32"
    varied = "shuffle_caption = true\ncaption_dropout_rate = 0.3"
    dataset = trainer.folder / "uneven.toml"
    dataset.write_text(f"{trainer.dataset(subset=subset, general=varied).read_text()}\n[[datasets]]\n{sizes}\n{more}")
    options = {"cache_latents": True, **CONTINUOUS, "learning_rate": 0.05, "network_train_unet_only": True}
    options |= {"dataset_config": dataset, "max_train_epochs": 3, "max_train_steps": None}
    by_count = {
        (processes, accumulation): seen(
            trainer, f"{processes}", processes, **options, gradient_accumulation_steps=accumulation
        )
        for processes, accumulation in ((1, 6), (2, 3), (3, 2))
    }
    together = {how: Counter(row for rows in ranks for row in rows) for how, ranks in by_count.items()}
    assert together[1, 6] == together[2, 3] == together[3, 2]
    assert all(count == 1 for count in together[1, 6].values()), "something was seen twice"
    uses = Counter((key, visit) for _, key, visit, *_ in together[1, 6])
    assert set(uses.values()) == {1}, "a visit was made twice"
    per_sample = Counter(key for _, key, *_ in together[1, 6])
    expected = {"0/0/": 1 * 3, "0/1/": 3 * 3, "1/0/": 1 * 3}
    assert Counter(key[:4] for key in per_sample) == {"0/0/": 4, "0/1/": 3, "1/0/": 4}
    assert all(count == expected[key[:4]] for key, count in per_sample.items())
    last = max(number for number, *_ in together[1, 6])
    assert any(not any(row[0] == last for row in rows) for rows in by_count[3, 2]), "each rank had work in each step"
    assert len({row[4] for row in together[1, 6]}) == len(together[1, 6]), "two visits had the same noise"
    for processes in ("2", "3"):
        assert trainer.losses(processes) == pytest.approx(trainer.losses("1"), rel=1e-5)


@pytest.mark.parametrize("options", [CACHED, {}], ids=["denoiser", "text encoders too"])
def test_the_gradients_of_an_adapter_are_summed_though_its_forward_is_patched_in(trainer, options):
    def gradients(run) -> tuple[dict, dict]:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for layer in run.trainable.modules_by_name.values():  # at first the lower halves have no gradient
                layer.lora_up.weight.copy_(0.05 * torch.randn(layer.lora_up.weight.shape, generator=generator))
        mine, samples = own_share(run, 0)
        for _ in range(mine):
            run.accelerator.backward(training_loss(run, next(run.batches), step_samples=samples).loss)
        named = dict(run.trainable.named_parameters())
        own = {name: parameter.grad.clone() for name, parameter in named.items()}
        sum_gradients(run.parameters, run.accelerator)
        return own, {name: parameter.grad.clone() for name, parameter in named.items()}

    settings = {**options, "dataset_config": of_one(trainer)}
    ranks = in_processes(2, lambda rank: trainer.with_run("two", gradients, **settings))
    (own, expected) = trainer.with_run("one", gradients, **settings, gradient_accumulation_steps=2)
    assert all(torch.equal(own[name], expected[name]) for name in own)
    assert {name.split(".")[0] for name in expected} and any(gradient.abs().max() > 0 for gradient in expected.values())
    for alone, summed in ranks:
        scale = max(gradient.abs().max().item() for gradient in expected.values())
        assert all(torch.allclose(summed[k], expected[k], rtol=1e-4, atol=1e-6 * scale) for k in expected)
        apart = [name for name in expected if not torch.allclose(alone[name], expected[name], rtol=1e-2)]
        assert len(apart) > len(expected) / 2, "one process's own gradient would have done"
    assert all(torch.equal(ranks[0][1][name], ranks[1][1][name]) for name in expected)


def with_teachers(trainer):
    folders = [shutil.copytree(trainer.photos, trainer.folder / name) for name in ("taught", "ordinary")]
    taught, ordinary = (json.dumps(str(folder)) for folder in folders)
    return of_one(
        trainer,
        subset=f"[[datasets.subsets]]\nimage_dir = {taught}\nis_regularisation_data = true\n"
        f"[[datasets.subsets]]\nimage_dir = {ordinary}\nis_reg = true",
    )


@pytest.mark.parametrize(
    ("job", "options", "data", "logged"),
    [
        pytest.param(
            "trainer",
            {**CACHED, "prior_loss_weight": 0.5},
            with_teachers,
            {"loss/regularisation", "loss/prior"},
            id="teachers and priors",
        ),
        pytest.param("trainer", {"cache_latents": True}, of_one, {"lr/textencoder 1"}, id="adapters of text encoders"),
        pytest.param(
            "full_trainer",
            {"cache_latents": True, "train_text_encoder": True, "learning_rate": 1e-3},
            of_one,
            {"lr/textencoder 1"},
            id="full with text encoders",
        ),
        pytest.param(
            "trainer",
            {**CACHED, "use_ema": True, "ema_decay": 0.5, "ema_validation": "comparison"}
            | {"validation_split": 0.5, "validate_every_n_steps": 2},
            of_one,
            {"loss/validation", "loss/validation_raw", "loss/validation_raw/level_1"},
            id="validation and a moving average",
        ),
    ],
)
def test_two_processes_log_and_learn_as_one(request, job, options, data, logged):
    trainer = request.getfixturevalue(job)
    options = {**CONTINUOUS, **options, "dataset_config": data(trainer), "save_state": True, "save_every_n_steps": 2}
    assert in_processes(2, lambda rank: trainer("two", **options)) == [0, 0]
    options["gradient_accumulation_steps"] = 2
    assert trainer("one", **options) == 0
    one, two = numbers(trainer, "one"), numbers(trainer, "two")
    assert logged <= {name.split(" ", 1)[1] for name in one}
    assert two == pytest.approx(one, rel=1e-4)
    assert close(trainer.weights("one"), trainer.weights("two"))
    state = trainer.folder / "two" / "run-step00000002-state"
    assert trainer("two then one", **options, resume=state) == 0
    assert numbers(trainer, "two then one") == pytest.approx(numbers(trainer, "one", after=2), rel=1e-4)
