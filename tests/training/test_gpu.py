"""What only a GPU can show. Run with ``bash run_tests.sh -m gpu`` on a machine that has one."""

import pytest
import torch

from library.nn.attention import TORCH_KERNELS, attention_function
from library.nn.modulated_norm import kernel_works

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}


def losses_on_the_host(trainer, monkeypatch) -> dict[int, float]:
    """The same steps in fp32 on the CPU."""
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert trainer("host", **CACHED) == 0
    return trainer.losses("host")


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        pytest.param({}, 1e-2, id="fp32"),
        pytest.param({"mixed_precision": "bf16"}, 0.1, id="bf16"),
        pytest.param({"mixed_precision": "fp16"}, 0.1, id="fp16 with the loss scaler"),
        pytest.param({"mixed_precision": "bf16", "gradient_checkpointing": True}, 0.1, id="checkpointing"),
        pytest.param({"optimizer_type": "AdamW8bit"}, 0.1, id="8-bit"),
        pytest.param({"max_data_loader_n_workers": 2}, 1e-2, id="pinned memory"),
        pytest.param({"mixed_precision": "bf16", "torch_compile": True}, 0.1, id="compiled"),
        pytest.param({"mixed_precision": "bf16", "attn_mode": "auto"}, 0.1, id="measured attention"),
    ],
)
def test_a_gpu_takes_the_steps_that_the_host_takes(trainer, monkeypatch, options, tolerance):
    assert trainer("gpu", **CACHED, **options) == 0
    assert trainer.losses("gpu") == pytest.approx(losses_on_the_host(trainer, monkeypatch), rel=tolerance)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_resumed_run_ends_with_the_same_bytes(trainer, precision):
    options = {**CACHED, "mixed_precision": precision, "max_train_steps": 4}
    assert trainer("whole", **options, save_every_n_steps=2, save_state=True) == 0
    state = trainer.folder / "whole" / "run-step00000002-state"
    assert trainer("resumed", **options, resume=state) == 0
    whole, resumed = trainer.weights("whole"), trainer.weights("resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("device", ["cpu", "accelerator"])
def test_a_moving_average_goes_on_with_the_same_bytes_and_leaves_training_alone(trainer, device):
    options = {**CACHED, "max_train_steps": 4, "validation_split": 0.5, "validate_every_n_steps": 1}
    average = {"use_ema": True, "ema_decay": 0.5, "ema_device": device, "ema_save_raw": True}
    assert trainer("plain", **options) == 0
    assert trainer("whole", **options, **average, save_every_n_steps=2, save_state=True) == 0
    state = trainer.folder / "whole" / "run-step00000002-state"
    assert trainer("resumed", **options, **average, resume=state) == 0
    plain, raw = trainer.weights("plain"), trainer.weights("whole", "run_raw")
    assert all(torch.equal(plain[name], raw[name]) for name in plain)
    whole, resumed = trainer.weights("whole"), trainer.weights("resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not all(torch.equal(whole[name], raw[name]) for name in whole)


def test_an_average_on_the_host_takes_no_memory_of_the_device():
    from library.training.ema import WeightAverage

    parameter = torch.nn.Parameter(torch.randn(1 << 24, device="cuda"))
    own = parameter.detach().clone()
    before = torch.cuda.memory_allocated()
    average = WeightAverage({"w": parameter}, 0.5, on_host=True)
    average.update()
    with torch.no_grad():
        parameter.zero_()  # the copy of before is what the thread takes in
    average.update()
    assert torch.allclose(average.tensors()["w"], own.cpu() * 2 / 11, atol=1e-6)
    with average.shown():
        assert torch.equal(parameter.cpu(), average.tensors()["w"])
        assert torch.cuda.memory_allocated() == before
    assert not parameter.any()
    average.close()


def test_samples_on_a_gpu_are_the_hosts_up_to_rounding(trainer, monkeypatch):
    from PIL import Image, ImageChops, ImageStat

    prompts = trainer.folder / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 4 --l 3 --d 5\n")
    sampling = {"sample_prompts": prompts, "sample_at_first": True, "max_train_steps": 1}
    assert trainer("gpu", **CACHED, **sampling) == 0
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert trainer("host", **CACHED, **sampling) == 0
    pictures = [Image.open(trainer.folder / name / "sample" / "run_e000000_00_5.png") for name in ("gpu", "host")]
    assert max(ImageStat.Stat(ImageChops.difference(*pictures)).mean) < 4


@pytest.mark.parametrize("trained", [{"network_train_unet_only": True}, {}], ids=["captions too", "pictures alone"])
def test_encoding_in_the_background_gives_what_the_step_would_encode(trainer, trained):
    options = {**trained, "max_train_steps": 8, "max_data_loader_n_workers": 2}
    assert trainer("in_step", **options) == 0
    assert trainer("ahead", **options, vae_cache_disable=True) == 0
    assert trainer.losses("ahead") == pytest.approx(trainer.losses("in_step"), rel=1e-2)


def test_encoding_overlaps_the_step_and_hands_its_memory_over():
    """The caller's stream waits for the encoding; nothing reuses the memory before that stream is through with it."""
    from library.records import Batch, Resolution
    from library.training.encode_ahead import encode_ahead

    device = torch.device("cuda")
    weight = torch.randn(4096, 4096, device=device)

    def batches():
        for number in range(20):
            yield Batch(
                keys=("",),
                visits=(number,),
                captions=("",),
                dropped=torch.zeros(1, dtype=torch.bool),
                loss_weight=torch.ones(1),
                resolution=Resolution(8, 8),
                noise=torch.full((64, 1024, 1024), float(number)).pin_memory(),
            )

    def encode(batch):
        torch.linalg.matrix_power(weight / 64, 16)  # keeps the stream busy before the copy
        return batch.to(device)

    for number, batch in enumerate(encode_ahead(batches(), encode, device)):
        torch.linalg.matrix_power(weight / 64, 16)
        assert (batch.noise == number).all(), number


NO_MODULATION = {"network_args": ["x_mod_dim=0", "context_mod_dim=0"]}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"blocks_to_swap": 3}, id="all swapped"),
        pytest.param({"blocks_to_swap": 3, "gradient_checkpointing": True}, id="swapped and checkpointed"),
        pytest.param({"gradient_checkpointing": True, "cpu_offload_checkpointing": True}, id="offloaded"),
        pytest.param({"stream_modulation": True, "blocks_to_swap": 2}, id="streamed modulation"),
    ],
)
def test_where_weights_and_activations_lie_changes_nothing(trainer, options):
    base = {**CACHED, **NO_MODULATION, "mixed_precision": "bf16"}
    assert trainer("plain", **base) == 0
    assert trainer("moved", **base, **options) == 0
    assert trainer.losses("moved") == trainer.losses("plain")
    plain, moved = trainer.weights("plain"), trainer.weights("moved")
    assert all(torch.equal(plain[name], moved[name]) for name in plain)


@pytest.mark.parametrize("precision", ["int8", "fp8", "int4", "nf4"])
def test_a_base_in_few_bits_trains_as_on_the_host(trainer, monkeypatch, precision):
    options = {**CACHED, "base_model_precision": precision}
    assert trainer("gpu", **options) == 0
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert trainer("host", **options) == 0
    assert trainer.losses("gpu") == pytest.approx(trainer.losses("host"), rel=1e-2)


def test_swapped_blocks_take_no_memory_of_the_device():
    from torch import nn

    from library.memory.block_swap import BlockSwap
    from library.memory.transfers import CudaTransfers

    blocks = [nn.Linear(2048, 2048, bias=False).requires_grad_(False) for _ in range(16)]
    device, size = torch.device("cuda"), 2048 * 2048 * 4
    before = torch.cuda.memory_allocated()
    swap = BlockSwap(blocks, 16, CudaTransfers(device))
    x = torch.randn(64, 2048, device=device)
    expected = x
    for block in blocks:
        expected = nn.functional.linear(expected, block.weight.data.to(device))
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        for block in blocks:
            x = block(x)
    assert torch.equal(x, expected)
    assert swap.device_bytes == 2 * size
    assert torch.cuda.max_memory_allocated() - before < 4 * size


def test_the_norms_kernel_works_here():
    assert kernel_works(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("name", TORCH_KERNELS)
def test_torchs_kernels_are_near_exact_attention(name):
    tensors = [torch.randn(2, 3, 300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    answer = attention_function(name)(*tensors)
    exact = [tensor.detach().float().requires_grad_() for tensor in tensors]
    expected = (exact[0] @ exact[1].mT / 8).softmax(-1) @ exact[2]
    for one, other in zip(
        (answer, *torch.autograd.grad(answer.sum(), tensors)), (expected, *torch.autograd.grad(expected.sum(), exact))
    ):
        assert (one.float() - other).norm() < 0.02 * other.norm() + 1e-3
