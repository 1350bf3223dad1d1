"""``--quantized_matmul``: decided once, kept in states, the same after resuming."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from library.config.errors import ConfigError
from library.config.memory import MemoryConfig
from library.families.sd3.mmdit import MMDiT
from library.families.sd3.synthetic import TINY, synthetic_family
from library.io.header import read_header
from library.memory.eight_bit import DEQUANTIZE, EIGHT_BIT, Matmul
from library.memory.quantization import quantized_layers
from library.nn.attention import sdpa
from library.records import Resolution
from library.training import quantized_matmul
from library.training.placing import place
from library.training.quantized_matmul import check_instruction, decide_matmul, matmul_facts, rows_of, saved_matmul

CPU = torch.device("cpu")
CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
ROWS = 2 * 4 * 6
MIXED = Matmul(EIGHT_BIT, DEQUANTIZE)


def decided(*, before=None, timer=None, device=CPU, **options):
    """What is decided for a tiny model, and by its layers."""
    memory, family = MemoryConfig(**options), synthetic_family("tiny")
    sizes = dataclasses.replace(TINY, depth=2, width=64, num_heads=1, dual_attention_blocks=(0,))
    denoiser = MMDiT(sizes, attention=sdpa).to(torch.bfloat16)
    place(memory, family, denoiser, CPU)
    found = decide_matmul(memory, family, denoiser, device, rows=ROWS, before=before, timer=timer)
    return found, {layer.quantized_matmul for layer in quantized_layers(denoiser).values()}


class Stopwatch:
    """Scripted times, one for each way in the order in which they are measured; remembers the sizes."""

    def __init__(self, *times):
        self.times, self.count, self.sizes = times, 0, []

    def __call__(self, work):
        self.sizes.append(tuple(work().shape))
        self.count += 1
        return self.times[(self.count - 1) % 6]


def test_auto_measures_the_model_s_own_sizes_and_the_run_s_rows():
    timer = Stopwatch(4.0, 5.0, 2.0, 4.0, 5.0, 7.0)
    found, layers = decided(base_model_precision="int8", timer=timer)
    assert found.matmul == MIXED and layers == {MIXED}
    assert {size[0] for size in timer.sizes} == {ROWS}
    assert {size[1] for size in timer.sizes} == {64, 192, 256}  # not the modulation's 384 and 576
    assert f"with {ROWS} rows" in found.notes[0] and "Forward is computed in 8 bits" in found.notes[0]


def test_rows_are_the_tokens_of_the_largest_batch():
    datasets = [SimpleNamespace(batch_size=count, resolution=Resolution(64, 96)) for count in (1, 2)]
    assert rows_of(SimpleNamespace(datasets=datasets), synthetic_family("tiny")) == ROWS  # of 16 pixels a side
    assert rows_of(SimpleNamespace(datasets=()), synthetic_family("tiny")) == 0


@pytest.mark.parametrize(
    ("options", "expected", "note"),
    [
        ({"base_model_precision": "int8"}, Matmul(), "no GPU: matrices in int8 are dequantised"),
        ({"base_model_precision": "fp8", "quantized_matmul": "8bit"}, Matmul(EIGHT_BIT, EIGHT_BIT), None),
        ({"base_model_precision": "fp8", "quantized_matmul": "dequantize"}, Matmul(), None),
        ({"base_model_precision": "int8", "before": MIXED}, MIXED, "as the run began, forward in 8 bits, backward deq"),
        ({"base_model_precision": "nf4"}, None, None),
        ({}, None, None),
    ],
)
def test_what_is_decided_without_measuring(options, expected, note):
    found, layers = decided(**options)
    assert found.matmul == expected and (layers == {expected} or expected is None)
    assert [note in line for line in found.notes] == ([True] if note else [])


def test_a_choice_that_was_made_is_not_measured_again():
    found, _ = decided(base_model_precision="int8", before=MIXED, timer=Stopwatch(*range(6)))
    assert found.matmul == MIXED
    found, _ = decided(base_model_precision="int8", before=MIXED, quantized_matmul="8bit")
    assert found.matmul == Matmul(EIGHT_BIT, EIGHT_BIT) and "before, forward in 8 bits, backward deq" in found.notes[0]


def test_states_keep_it_and_older_ones_were_dequantised():
    assert matmul_facts(None) == {} and saved_matmul({"seed": 1}) == Matmul()
    assert saved_matmul(json.loads(json.dumps(matmul_facts(MIXED)))) == MIXED


def test_a_gpu_without_the_instruction(monkeypatch):
    eight = {"quantized_matmul": "8bit"}
    for name, capability, refused in (("int8", (7, 0), True), ("int8", (7, 5), False), ("fp8", (8, 6), True)):
        memory = MemoryConfig(base_model_precision=name, **eight)
        if not refused:
            check_instruction(memory, capability)
            continue
        own = ".".join(map(str, capability))
        with pytest.raises(ConfigError, match=rf"--quantized_matmul 8bit: this GPU has no {name} .*capability {own}"):
            check_instruction(memory, capability)
    check_instruction(MemoryConfig(base_model_precision="fp8", **eight), None)
    check_instruction(MemoryConfig(base_model_precision="fp8"), (8, 0))
    monkeypatch.setattr(quantized_matmul, "gpu_capability", lambda: (8, 6))
    gpu = torch.device("cuda")
    found, _ = decided(base_model_precision="fp8", device=gpu)
    assert found.matmul == Matmul() and "this GPU has no fp8 arithmetic" in found.notes[0]
    with pytest.raises(ConfigError, match="--resume: the state's run computed in 8 bits: this GPU has no fp8"):
        decided(base_model_precision="fp8", device=gpu, before=MIXED)


def test_options_that_do_nothing_are_refused():
    with pytest.raises(ConfigError, match="--quantized_matmul does nothing without --base_model_precision"):
        MemoryConfig(quantized_matmul="dequantize")
    with pytest.raises(ConfigError, match="--quantized_matmul dequantize: int4 is never computed otherwise"):
        MemoryConfig(base_model_precision="int4", quantized_matmul="dequantize")
    with pytest.raises(ConfigError, match="--quantized_matmul 8bit: nf4 has no 8-bit arithmetic"):
        MemoryConfig(quantized_matmul="8bit", base_model_precision="nf4-bnb")


@pytest.mark.parametrize("family", ["sd3", "sana"])
def test_training_in_eight_bits_resumes_with_the_same_bytes(
    family, tiny_file, tiny_sana_file, photos, tmp_path, capsys, monkeypatch
):
    from tests.conftest import Trainer

    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    trainer = Trainer(tiny_file if family == "sd3" else tiny_sana_file, photos, tmp_path, family)
    # Sana's latents at 64 px are four tokens, too few for the instruction
    own = trainer.dataset().read_text().replace("resolution = 64", f"resolution = {64 if family == 'sd3' else 192}")
    (tmp_path / "large.toml").write_text(own)
    quantised = {**CACHED, "dataset_config": tmp_path / "large.toml", "base_model_precision": "int8"}
    options = {**quantised, "quantized_matmul": "8bit", "max_train_steps": 3}
    assert trainer("whole", **options, save_every_n_steps=2, save_state=True) == 0
    state = tmp_path / "whole" / "run-step00000002-state"
    facts = json.loads((state / "state.json").read_text())
    assert facts["quantized_matmul"] == {"forward": "8bit", "backward": "8bit"}
    assert read_header(tmp_path / "whole" / "run.safetensors").metadata["ss_quantized_matmul"] == "8bit 8bit"
    assert trainer("resumed", **options, resume=state) == 0
    whole, resumed = trainer.weights("whole"), trainer.weights("resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    capsys.readouterr()
    assert trainer("other", **{**options, "quantized_matmul": "auto"}, resume=state) == 2
    assert "--quantized_matmul auto (the state: 8bit)" in capsys.readouterr().err


def test_training_in_eight_bits_is_near_training_by_dequantising(trainer, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    options = {**CACHED, "base_model_precision": "int8", "max_train_steps": 1}
    for way in ("8bit", "dequantize"):
        assert trainer(way, **options, quantized_matmul=way) == 0
    first, plain = trainer.losses("8bit")[1], trainer.losses("dequantize")[1]
    assert first != plain and first == pytest.approx(plain, rel=0.01)
