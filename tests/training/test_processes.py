"""Two processes do the same optimizer steps as one that accumulates twice as much."""

import pytest
import torch

CACHED = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True, "network_train_unet_only": True}


def test_two_processes_equal_one_with_twice_the_accumulation(trainer):
    # 4 pictures in batches of 1 and 3 micro-batches: the epoch's last step leaves the second process without work
    dataset = trainer.dataset(general='caption_extension = ".txt"')
    text = dataset.read_text().replace("batch_size = 2", "batch_size = 1")
    (trainer.photos / "camera.png").unlink()
    dataset.write_text(text)
    # AdamW's first step is the gradient's sign, which rounding turns over where the gradient is almost zero
    options = {**CACHED, "dataset_config": dataset, "optimizer_type": "SGDNesterov", "learning_rate": 0.5}
    options |= {"max_train_steps": 4, "save_every_n_steps": 2, "save_state": True}
    trainer.launch(2, "two", **options)
    assert trainer("one", **options, gradient_accumulation_steps=2) == 0
    assert trainer.losses("two") == pytest.approx(trainer.losses("one"), rel=1e-5)
    one, two = trainer.weights("one"), trainer.weights("two")
    assert all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-7) for name in one)

    state = trainer.folder / "two" / "run-step00000002-state"
    assert trainer("resumed", **options, gradient_accumulation_steps=2, resume=state) == 0
    later = {step: loss for step, loss in trainer.losses("one").items() if step > 2}
    assert trainer.losses("resumed") == pytest.approx(later, rel=1e-5)


def test_every_process_has_the_same_moving_average(trainer):
    options = {**CACHED, "use_ema": True, "ema_decay": 0.5}
    options |= {"optimizer_type": "SGDNesterov", "learning_rate": 0.5, "ema_validation": "comparison"}
    options |= {"validation_split": 0.5, "validate_every_n_steps": 2}
    trainer.launch(2, "two", **options)
    assert trainer("one", **options, gradient_accumulation_steps=2) == 0
    measured = [
        [
            line[name]
            for line in trainer.log(output)
            for name in ("loss/validation", "loss/validation_raw")
            if name in line
        ]
        for output in ("two", "one")
    ]
    assert len(measured[0]) == 4 and len(set(measured[0])) == 4
    assert measured[0] == pytest.approx(measured[1], rel=1e-5)
    one, two = trainer.weights("one"), trainer.weights("two")
    assert all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-7) for name in one)
