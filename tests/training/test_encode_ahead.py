"""Encoding in the background gives what encoding in the step gives, and fails and ends as that does."""

import threading
import time

import pytest
import torch

from library.config.errors import ConfigError
from library.records import Batch, Resolution
from library.training import step
from library.training.encode_ahead import encode_ahead
from tests.training.ranks import in_processes

CPU = torch.device("cpu")
UNET_ONLY = {"network_train_unet_only": True}
ACCUMULATED = {"gradient_accumulation_steps": 2, "max_data_loader_n_workers": 2}


def batch(number: int) -> Batch:
    return Batch(
        keys=(f"0/0/{number}.png",),
        visits=(0,),
        captions=("",),
        dropped=torch.zeros(1, dtype=torch.bool),
        loss_weight=torch.ones(1),
        resolution=Resolution(64, 64),
        noise=torch.zeros(1, 16, 8, 8),
        pixels=torch.full((1, 3, 64, 64), float(number)),
    )


class Source:
    """A generator of batches that remembers who asked for them and whether it was closed."""

    def __init__(self, count: int, error_at: int | None = None):
        self.threads: list[threading.Thread] = []
        self.closed = False
        self.batches = self._made(count, error_at)

    def _made(self, count, error_at):
        try:
            for number in range(count):
                self.threads.append(threading.current_thread())
                if number == error_at:
                    raise ConfigError("0/0/2.png can't be read")
                yield batch(number)
        finally:
            self.closed = True


def numbers(batches) -> list[float]:
    return [found.pixels.mean().item() for found in batches]


def encoders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("encode")]


def test_batches_come_in_order_and_are_encoded_by_another_thread():
    source, threads = Source(5), []

    def encode(found):
        threads.append(threading.current_thread())
        return found

    assert numbers(encode_ahead(source.batches, encode, CPU)) == [0, 1, 2, 3, 4]
    assert set(source.threads) == {threading.current_thread()}  # a plan and forks are for one thread
    assert threading.current_thread() not in threads and len(set(threads)) == 1
    assert source.closed and not encoders()
    assert numbers(encode_ahead(Source(0).batches, encode, CPU)) == []


def test_one_batch_is_encoded_while_the_one_before_is_in_use():
    begun, in_use = [], threading.Event()

    def encode(found):
        begun.append(int(found.pixels.mean()))
        if len(begun) == 2:
            assert in_use.wait(10)  # would never be set if the first batch came only after the second was encoded
        return found

    ahead = encode_ahead(Source(4).batches, encode, CPU)
    next(ahead)
    in_use.set()
    deadline = time.monotonic() + 10
    while len(begun) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert begun == [0, 1]
    ahead.close()


def test_what_goes_wrong_in_the_loader_is_raised_when_its_batch_is_due():
    source = Source(5, error_at=2)
    ahead, seen = encode_ahead(source.batches, lambda found: found, CPU), []
    with pytest.raises(ConfigError, match=r"0/0/2.png can't be read"):
        for found in ahead:
            seen.append(found.pixels.mean().item())
    assert seen == [0, 1] and source.closed and not encoders()


def test_what_goes_wrong_in_encoding_is_raised_as_it_is_when_its_batch_is_due():
    error, seen = torch.OutOfMemoryError("too much"), []

    def encode(found):
        if found.pixels.mean() == 2:
            raise error
        return found

    source = Source(5)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        for found in encode_ahead(source.batches, encode, CPU):
            seen.append(found.pixels.mean().item())
    assert caught.value is error
    assert seen == [0, 1] and source.closed and not encoders()


def test_closing_waits_for_the_thread_and_closes_the_loader():
    source, begun, ended = Source(5), threading.Event(), []

    def encode(found):
        if found.pixels.mean() == 1:
            begun.set()
            time.sleep(0.1)
        ended.append(found)
        return found

    ahead = encode_ahead(source.batches, encode, CPU)
    next(ahead)
    assert begun.wait(10)
    ahead.close()
    assert len(ended) == 2 and source.closed and not encoders()


def test_an_autocast_in_the_thread_leaves_the_casts_of_the_caller_alone():
    weight, x = torch.nn.Parameter(torch.randn(8, 8)), torch.randn(2, 8)

    def encode(found):
        with torch.autocast("cpu", torch.bfloat16):
            return found

    def cast_of(answer):
        """What brought the weight into bf16."""
        transposed = next(before for before, _ in answer.grad_fn.next_functions if before is not None)
        return next(before for before, _ in transposed.next_functions)

    ahead = encode_ahead(Source(3).batches, encode, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        before = torch.nn.functional.linear(x, weight)
        next(ahead)
        next(ahead)
        after = torch.nn.functional.linear(x, weight)
    ahead.close()
    assert cast_of(before).name() == "ToCopyBackward0"
    assert cast_of(before) is cast_of(after)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(UNET_ONLY, id="pictures and captions"),
        pytest.param({}, id="text encoders trained"),
        pytest.param({**UNET_ONLY, "cache_text_encoder_outputs": True}, id="text cached"),
        pytest.param(
            {**UNET_ONLY, "gradient_accumulation_steps": 2, "max_data_loader_n_workers": 2}, id="accumulation"
        ),
        pytest.param({"mixed_precision": "bf16", "network_dropout": 0.3}, id="bf16"),
    ],
)
def test_losses_and_weights_are_those_of_encoding_in_the_step(trainer, options):
    assert trainer("in_step", **options) == 0
    assert trainer("ahead", **options, vae_cache_disable=True) == 0
    assert trainer.losses("ahead") == trainer.losses("in_step")
    in_step, ahead = trainer.weights("in_step"), trainer.weights("ahead")
    assert all(torch.equal(in_step[name], tensor) for name, tensor in ahead.items())
    assert not encoders()


def test_samples_and_validation_in_between_change_nothing(trainer):
    prompts = trainer.folder / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 5\n")
    dataset = trainer.dataset(general="validation_split = 0.25")
    options = {**UNET_ONLY, "dataset_config": dataset, "validate_every_n_steps": 1}
    options |= {"sample_prompts": prompts, "sample_every_n_steps": 1}
    for name, ahead in (("in_step", False), ("ahead", True)):
        assert trainer(name, **options, vae_cache_disable=ahead or None) == 0
    logs = [(trainer.folder / name / "run-log.jsonl").read_text() for name in ("in_step", "ahead")]
    assert logs[0] == logs[1]


def test_a_resumed_run_ends_with_the_same_bytes(trainer):
    options = {**UNET_ONLY, "vae_cache_disable": True, "max_train_steps": 5}
    assert trainer("whole", **options) == 0
    assert trainer("parts", **options, save_every_n_steps=3, save_state=True) == 0
    state = trainer.folder / "parts" / "run-step00000003-state"
    assert trainer("resumed", **options, resume=state) == 0
    whole, resumed = trainer.weights("whole"), trainer.weights("resumed")
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())


def test_a_picture_that_fails_stops_at_its_step_and_leaves_no_thread(trainer, monkeypatch, capsys):
    encoded, calls = step.encoded, []

    def failing(run, found):
        if found.latents is None:
            calls.append(found)
            if len(calls) == 3:
                raise ConfigError("the third micro-batch can't be encoded")
        return encoded(run, found)

    monkeypatch.setattr("library.training.setup.encoded", failing)
    assert trainer("out", **UNET_ONLY, vae_cache_disable=True, save_every_n_steps=1) == 2
    assert "error: the third micro-batch can't be encoded" in capsys.readouterr().err
    assert list(trainer.losses("out")) == [1, 2]
    assert (trainer.folder / "out" / "run-step00000002.safetensors").exists()
    assert not encoders()


def test_two_processes_take_the_steps_of_one_with_twice_the_accumulation(trainer):
    options = {**UNET_ONLY, "max_train_steps": 2, "vae_cache_disable": True, "optimizer_type": "SGDNesterov"}
    assert in_processes(2, lambda rank: trainer("two", **options)) == [0, 0]
    assert trainer("one", **options, gradient_accumulation_steps=2) == 0
    assert trainer.losses("two") == pytest.approx(trainer.losses("one"), rel=1e-5)
