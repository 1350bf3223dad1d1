"""A model that is spread over two processes trains as a whole one, and its states go both ways."""

import pytest
import torch

CACHED = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}


def test_first(full_trainer, monkeypatch):
    trainer = full_trainer
    options = {**CACHED, "optimizer_type": "SGDNesterov", "learning_rate": 1e-2, "max_train_steps": 4}
    assert trainer("one", **options, gradient_accumulation_steps=2) == 0
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    trainer.launch(2, "two", **options)
    print(trainer.losses("two"), trainer.losses("one"))
    assert trainer.losses("two") == pytest.approx(trainer.losses("one"), rel=1e-5)
    one, two = trainer.weights("one"), trainer.weights("two")
    assert all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-6) for name in one)
