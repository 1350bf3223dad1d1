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


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_eight_bit_products_are_near_those_on_the_host(precision):
    from torch import nn

    from library.memory.eight_bit import EIGHT_BIT, Matmul
    from library.memory.quantization import FORMATS, compute_by, quantize_layer

    chosen = FORMATS[precision]
    if torch.cuda.get_device_capability() < chosen.arithmetic.capability:
        pytest.skip("this GPU lacks the instruction")
    torch.manual_seed(0)
    layer, x = nn.Linear(512, 256).requires_grad_(False), torch.randn(2, 40, 512)
    quantize_layer(layer, chosen)
    compute_by(layer, Matmul(EIGHT_BIT, EIGHT_BIT))
    answers = []
    for device in ("cpu", "cuda"):
        own = x.to(device, torch.bfloat16).requires_grad_()
        answer = layer.to(device)(own)
        answer.float().square().sum().backward()
        answers.append((answer.detach().float().cpu(), own.grad.float().cpu()))
    for host, gpu in zip(*answers):
        assert (gpu - host).norm() < 0.01 * host.norm()


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_way_of_eight_bit_products_is_measured_told_and_kept(trainer, capsys, precision):
    options = {**CACHED, "base_model_precision": precision, "mixed_precision": "bf16"}
    assert trainer("whole", **options, save_every_n_steps=2, save_state=True) == 0
    told = capsys.readouterr().err
    assert f"matrix products with {precision}" in told or f"has no {precision} arithmetic" in told
    state = trainer.folder / "whole" / "run-step00000002-state"
    assert trainer("resumed", **options, resume=state) == 0
    assert "as the run began" in capsys.readouterr().err
    whole, resumed = trainer.weights("whole"), trainer.weights("resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_is_dequantised_by_bitsandbytes_with_the_same_bits(dtype):
    pytest.importorskip("bitsandbytes")
    from library.memory.nf4_kernel import fast_dequantize
    from library.memory.quantization import FORMATS

    nf4, device = FORMATS["nf4"], torch.device("cuda", torch.cuda.current_device())
    codes, scales = nf4.quantize(torch.randn(512, 1024, device=device))
    fast = fast_dequantize(device, dtype, nf4.dequantize_plainly)
    assert fast is not None
    assert torch.equal(fast(codes, scales, dtype), nf4.dequantize_plainly(codes, scales, dtype))


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_text_encoders_in_few_bits_encode_as_on_the_host(trainer, monkeypatch, precision):
    options = {**CACHED, **{f"text_encoder_{number}_precision": precision for number in (1, 2, 3)}}
    assert trainer("gpu", **options, max_train_steps=1) == 0
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert trainer("host", **options, max_train_steps=1) == 0
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


@pytest.mark.parametrize("family", ["sd3.5-medium", "sana-0.6b"])
@pytest.mark.parametrize(
    "memory",
    [
        pytest.param({}, id="plain"),
        pytest.param({"gradient_checkpointing": True}, id="recomputed"),
        pytest.param({"gradient_checkpointing": True, "blocks_to_swap": 12}, id="swapped"),
        pytest.param({"base_model_precision": "int8"}, id="int8"),
    ],
)
def test_what_was_foreseen_is_what_the_device_counts(family, memory):
    from bench.synthetic_run import Setting, family_of, make_run
    from library.config.memory import MemoryConfig
    from library.memory.allocations import Allocations
    from library.memory.plain_transfers import Traffic
    from library.training.loop import optimize

    setting = Setting(family_of(family), family, 512, 2, 16, "bf16", MemoryConfig(**memory))
    before = torch.cuda.memory_allocated()
    made = make_run(setting, Allocations("cuda"), Traffic())
    optimize(made.run, 0)
    torch.cuda.reset_peak_memory_stats()
    optimize(made.run, 1)
    assert made.forecast.peak == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)


FUSED = {"fused_backward_pass": True, "max_grad_norm": 0}
CACHED_WHOLE = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"blocks_to_swap": 3}, id="all"),
        pytest.param({"blocks_to_swap": 2, "gradient_checkpointing": True}, id="checkpointed"),
        pytest.param({"blocks_to_swap": 3, "full_bf16": True, "stochastic_rounding": True}, id="rounded"),
    ],
)
@pytest.mark.parametrize("family", ["full_trainer", "sana_trainer"])
def test_trained_blocks_that_take_turns_learn_the_same(request, family, options):
    trainer = request.getfixturevalue(family)
    base = {**FUSED, **CACHED_WHOLE, "mixed_precision": "bf16", "optimizer_type": "AdamW8bit", "max_train_steps": 4}
    base |= {name: value for name, value in options.items() if name != "blocks_to_swap"}
    saving = {"save_state": True, "save_every_n_steps": 2}
    assert trainer("plain", **base) == 0
    assert trainer("moved", **base, **saving, blocks_to_swap=options["blocks_to_swap"]) == 0
    state = trainer.folder / "moved" / "run-step00000002-state"
    assert trainer("resumed", **base, blocks_to_swap=options["blocks_to_swap"], resume=state) == 0
    assert trainer.losses("moved") == trainer.losses("plain")
    plain = trainer.weights("plain")
    for name in ("moved", "resumed"):
        own = trainer.weights(name)
        assert all(torch.equal(plain[key], own[key]) for key in plain)


def trained_tower(count, *, width=2048, depth=16):
    """A tower of linear layers on the device, swapped, whose weights step in the backward pass; and its trace."""
    from torch import nn

    from library.memory.block_swap import BlockSwap
    from library.memory.transfer_trace import TransferTrace
    from library.memory.transfers import CudaTransfers
    from library.optimizers.one_by_one import OneByOne
    from library.training.fused_backward import FusedBackward

    torch.manual_seed(0)
    blocks = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))
    trace = TransferTrace(CudaTransfers(torch.device("cuda")))
    swap = BlockSwap(list(blocks), count, trace)
    parameters = list(blocks.parameters())
    fused = FusedBackward(OneByOne(torch.optim.SGD(parameters, lr=1e-3)), parameters, list("w" * depth), swap.changed)
    swap.settle = fused.settle

    def step(number, rows=64):
        x = torch.randn(rows, width, device="cuda", generator=torch.Generator("cuda").manual_seed(number))
        loss = blocks(x).square().mean()
        fused.start(number, loss, ["a"])
        loss.backward()
        fused.finish()
        return loss.item()

    return blocks, swap, trace, step


def test_trained_blocks_take_no_memory_of_the_device_and_their_numbers_come_home():
    size = 2048 * 2048 * 4
    before = torch.cuda.memory_allocated()
    blocks, swap, _, step = trained_tower(12)
    losses = [step(number) for number in range(3)]
    torch.cuda.reset_peak_memory_stats()
    losses.append(step(3))
    assert swap.device_bytes == 4 * size
    # four places, at most four gradients, and what the optimizer needs for a moment
    assert torch.cuda.max_memory_allocated() - before < 10 * size
    weights = blocks.state_dict()
    assert all(tensor.device.type == "cpu" and tensor.is_pinned() for tensor in weights.values())
    torch.manual_seed(0)
    plain = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False) for _ in range(16))).cuda()
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3)
    for number, expected in enumerate(losses):
        x = torch.randn(64, 2048, device="cuda", generator=torch.Generator("cuda").manual_seed(number))
        loss = plain(x).square().mean()
        assert loss.item() == expected
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(tensor.cpu(), weights[name]) for name, tensor in plain.state_dict().items())


def test_optimizer_state_is_loaded_to_the_device():
    blocks, swap, _, step = trained_tower(12)
    step(0)
    optimizer = torch.optim.AdamW(blocks.parameters(), lr=1e-3)
    state = {number: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2048, 2048)} for number in range(16)}
    with swap.stand_ins():
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    assert all(values["exp_avg"].is_cuda for values in optimizer.state.values())
    assert all(weight.device.type == "cpu" for weight in blocks.parameters())


def test_copies_hide_behind_computation():
    _, swap, trace, step = trained_tower(12)
    step(0, rows=16384)
    trace.clear()
    step(1, rows=16384)
    totals = trace.totals()
    assert totals.sent == swap.host_bytes
    assert totals.hidden is not None and totals.hidden > 0.8


def test_pinned_memory_is_no_larger_than_asked_for():
    import gc

    from library.memory.pinned import _forget_error, pinned_buffer

    def allocated() -> int:
        return torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)  # by torch's own allocator

    before, size = allocated(), (1 << 28) + 1
    buffer = pinned_buffer(size)
    assert buffer.is_pinned() and buffer.numel() == size
    assert allocated() == before
    buffer.fill_(7)
    assert (buffer.to("cuda", non_blocking=True) == 7).all()
    address = buffer.data_ptr()
    del buffer
    gc.collect()
    assert int(torch.cuda.cudart().cudaHostUnregister(address)) != 0, "it was unregistered when it went"
    _forget_error()  # or the next kernel would be blamed for that refusal
    assert not torch.zeros(1, device="cuda").any()


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True, "mixed_precision": "bf16"}])
def test_the_host_never_waits_for_the_device_in_a_step(trainer, options):
    import warnings

    from library.training.loop import optimize

    def act(run):
        run.trainable.train()
        optimize(run, 0)  # the optimizer's state is made
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimize(run, 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return [str(one.message) for one in caught if "synchroniz" in str(one.message)]

    options = {**CACHED, "max_train_steps": 2, "gradient_accumulation_steps": 2, **options}
    assert trainer.with_run("out", act, **options) == []
    options["optimizer_args"] = ["fused=False"]
    assert len(trainer.with_run("looked", act, **options)) == 1


def test_an_update_that_the_device_drops_never_was():
    from library.training.guarded_update import GuardedUpdate

    parameter = torch.nn.Parameter(torch.ones(1000, device="cuda"))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    guard = GuardedUpdate(optimizer, optimizer)
    parameter.grad = torch.ones_like(parameter)
    guard.step(torch.zeros((), device="cuda"))
    before = [parameter.detach().clone(), *(value.clone() for value in optimizer.state[parameter].values())]
    parameter.grad = torch.full_like(parameter, torch.nan)
    guard.step(torch.ones((), device="cuda"))
    after = [parameter.detach(), *optimizer.state[parameter].values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


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
