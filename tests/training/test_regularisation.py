"""Pictures that the base model teaches, and ordinary regularisation pictures: targets, gradients, what is logged."""

import dataclasses
import itertools
import json
import shutil

import pytest
import torch

from library.families.sd3.family import Sd3Family
from library.training.loop import optimize
from library.training.step import base_answer, encoded, taught_rows, training_loss
from tests.training.ranks import in_processes

UNET_ONLY = {"network_train_unet_only": True}
CACHED = {**UNET_ONLY, "cache_latents": True, "cache_text_encoder_outputs": True}
ONE_BUCKET = "enable_bucket = false"
DROPOUT = {"network_dropout": 0.5, "network_args": ["rank_dropout=0.3", "module_dropout=0.3"]}
ENCODERS_TRAINED = {"caption_dropout_rate": 0.3, "clip_g_dropout_rate": 0.5, "pos_emb_random_crop_rate": 1.0}


@pytest.fixture
def taught(trainer):
    """A dataset that is taught by the base model throughout."""
    return trainer.dataset(dataset=ONE_BUCKET, subset="is_regularisation_data = true")


@pytest.fixture
def mixed(trainer):
    """One micro-batch of four learned pictures and four that the base model teaches."""
    others = shutil.copytree(trainer.photos, trainer.folder / "others")
    return mixed_dataset(trainer, f"image_dir = {json.dumps(str(others))}\nis_regularisation_data = true")


def mixed_dataset(trainer, second: str):
    path = trainer.dataset(dataset=ONE_BUCKET, subset=f"[[datasets.subsets]]\n{second}")
    path.write_text(path.read_text().replace("batch_size = 2", "batch_size = 8"))
    return path


def unsettle(run) -> None:
    """Give every layer an update."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in run.trainable.modules_by_name.values():
            layer.lora_up.weight.copy_(0.05 * torch.randn(layer.lora_up.weight.shape, generator=generator))


def gradients(run) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in run.trainable.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(CACHED, id="cached"),
        pytest.param(UNET_ONLY, id="encoded in the step"),
        pytest.param(ENCODERS_TRAINED, id="text encoders trained"),
        pytest.param({**ENCODERS_TRAINED, "gradient_checkpointing": True, "mixed_precision": "bf16"}, id="bf16"),
    ],
)
def test_an_untrained_adapter_has_nothing_to_learn_from_its_teacher(trainer, taught, options):
    options = {**options, **DROPOUT, "dataset_config": taught, "max_train_steps": 2, "network_dropout": 0.5}
    assert trainer("out", **options) == 0
    first = trainer.log("out")[0]
    assert first["loss/current"] == first["loss/regularisation"] == 0
    assert first["gradient_norm"] == 0
    assert "loss/prior" not in first


def test_gradients_are_those_written_out(trainer, mixed, monkeypatch):
    predict, asked = Sd3Family.predict, []

    def watched(self, denoiser, noised, text):
        asked.append((noised, text))
        return predict(self, denoiser, noised, text)

    def act(run):
        unsettle(run)
        batch = next(run.batches)
        batch = dataclasses.replace(batch, loss_weight=torch.linspace(0.5, 2, 8))
        teacher_rows = taught_rows(batch)
        monkeypatch.setattr(Sd3Family, "predict", watched)
        run.trainable.train()
        share = training_loss(run, batch, step_samples=16)
        share.loss.backward()
        found = gradients(run)
        (_, _), (noised, text) = asked
        for parameter in run.parameters:
            parameter.grad = None

        base = run.family.load_denoiser(device="cpu", dtype=torch.float32)  # without any adapter
        with torch.no_grad():
            answers = predict(run.family, base, noised, text)
        answer = predict(run.family, run.denoiser, noised, text)
        total = 0
        for row in range(8):
            target = answers[row] if row in teacher_rows else noised.noise[row] - noised.x_0[row]
            total = total + batch.loss_weight[row] * ((answer[row] - target) ** 2).mean() / 16
        total.backward()
        assert share.loss.item() == pytest.approx(total.item(), rel=1e-5)
        return teacher_rows, asked[0][0].x_t.shape[0], found, gradients(run)

    options = {**CACHED, "dataset_config": mixed, "weighting_scheme": "sigma_sqrt"}
    teacher_rows, teacher_asked, found, expected = trainer.with_run("out", act, **options)
    assert 0 < len(teacher_rows) < 8 and teacher_asked == len(teacher_rows)  # one forward, for these rows alone
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max()), name


@pytest.mark.parametrize("options", [CACHED, {"clip_l_dropout_rate": 0.5}], ids=["cached", "text encoders trained"])
def test_the_teacher_is_the_base_model_without_dropout(trainer, mixed, options):
    def act(run):
        batch = next(run.batches)
        rows = taught_rows(batch)
        of_teacher = encoded(run, batch).rows(rows)
        untrained = base_answer(run, of_teacher)
        unsettle(run)
        run.trainable.train()
        state = torch.get_rng_state()
        answer = base_answer(run, of_teacher)
        assert torch.equal(torch.get_rng_state(), state), "the teacher drew something"
        assert all(layer.enabled for layer in run.trainable.modules_by_name.values())
        return untrained, answer, training_loss(run, batch, step_samples=8).per_sample[rows]

    untrained, answer, losses = trainer.with_run("out", act, **options, **DROPOUT, dataset_config=mixed)
    assert torch.equal(untrained, answer)
    assert losses.min() > 0


def test_dropout_of_the_others_does_not_depend_on_the_teacher(trainer, mixed):
    """What the student draws is the same with a teacher before it and without."""

    def act(run):
        unsettle(run)
        run.trainable.train()
        batch = next(run.batches)
        learned = [row for row in range(8) if row not in taught_rows(batch)]
        with_teacher = training_loss(run, batch, step_samples=8).per_sample[learned]
        without = training_loss(run, dataclasses.replace(batch, taught=None), step_samples=8).per_sample[learned]
        return with_teacher, without

    with_teacher, without = trainer.with_run("out", act, **CACHED, **DROPOUT, dataset_config=mixed)
    assert torch.equal(with_teacher, without)


def test_both_kinds_are_logged_apart_before_they_are_weighted(trainer):
    others, third = (shutil.copytree(trainer.photos, trainer.folder / name) for name in ("others", "third"))
    subsets = (
        f"image_dir = {json.dumps(str(others))}\nis_regularisation_data = true\nregularisation_weight = 0.5\n"
        f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(third))}\nis_reg = true\nnum_repeats = 2"
    )
    path = mixed_dataset(trainer, subsets)
    path.write_text(path.read_text().replace("batch_size = 8", "batch_size = 3"))

    def act(run):
        unsettle(run)
        run.trainable.train()
        batches = list(itertools.islice(run.batches, 3))
        shares = [(batch, training_loss(run, batch, step_samples=9)) for batch in batches]
        run.batches = (batch for batch in batches)
        optimize(run, 0)
        return shares, run.step_numbers

    options = {**CACHED, "dataset_config": path, "prior_loss_weight": 0.25, "gradient_accumulation_steps": 3}
    shares, numbers = trainer.with_run("out", act, **options)
    sums: dict[str, list[float]] = {"0/1/": [], "0/2/": [], "0/0/": []}
    optimized = 0.0
    for batch, share in shares:
        for key, loss in zip(batch.keys, share.per_sample.tolist()):
            sums[key[:4]].append(loss)
            optimized += loss * {"0/0/": 1.0, "0/1/": 0.5, "0/2/": 0.25}[key[:4]]
    assert sum(map(len, sums.values())) == 9 and all(sums.values())
    assert numbers["loss/regularisation"] == pytest.approx(sum(sums["0/1/"]) / len(sums["0/1/"]), rel=1e-5)
    assert numbers["loss/prior"] == pytest.approx(sum(sums["0/2/"]) / len(sums["0/2/"]), rel=1e-5)
    assert numbers["loss"] == pytest.approx(optimized / 9, rel=1e-5)


def test_two_processes_log_the_means_over_all_their_samples(trainer, mixed):
    mixed.write_text(mixed.read_text().replace("batch_size = 8", "batch_size = 1"))
    prior = shutil.copytree(trainer.photos, trainer.folder / "prior")
    mixed.write_text(f"{mixed.read_text()}[[datasets.subsets]]\nimage_dir = {json.dumps(str(prior))}\nis_reg = true\n")
    cached = {**UNET_ONLY, "cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
    options = {**cached, "dataset_config": mixed, "optimizer_type": "SGDNesterov", "learning_rate": 0.5}
    options["max_train_steps"] = 3
    assert in_processes(2, lambda rank: trainer("two", **options, gradient_accumulation_steps=3)) == [0, 0]
    assert trainer("one", **options, gradient_accumulation_steps=6) == 0
    names = ("loss/current", "loss/regularisation", "loss/prior")
    two, one = (
        [{name: line[name] for name in names if name in line} for line in trainer.log(run)] for run in ("two", "one")
    )
    assert two == [pytest.approx(line, rel=1e-3, abs=1e-9) for line in one]
    assert all(any(line.get(name) for line in one) for name in names)


def test_the_weight_of_taught_pictures_is_their_subsets(trainer):
    others = shutil.copytree(trainer.photos, trainer.folder / "others")
    still = {**CACHED, "max_train_epochs": 1, "max_train_steps": None, "learning_rate": 1e-12}
    logged = {}
    for weight in (1.0, 0.5):
        second = (
            f"image_dir = {json.dumps(str(others))}\nis_regularisation_data = true\nregularisation_weight = {weight}"
        )
        assert trainer("start", **CACHED) == 0
        options = {**still, "dataset_config": mixed_dataset(trainer, second)}
        weights = trainer.folder / "start" / "run.safetensors"
        assert trainer(f"w{weight}", **options, network_weights=weights) == 0
        (logged[weight],) = trainer.log(f"w{weight}")
    assert logged[1.0]["loss/regularisation"] == pytest.approx(logged[0.5]["loss/regularisation"], rel=1e-5)
    share = logged[1.0]["loss/regularisation"] / 2  # half of the samples are taught
    assert share > 0
    assert logged[1.0]["loss/current"] - logged[0.5]["loss/current"] == pytest.approx(share / 2, rel=1e-3)
