"""LoKr and LoHa trained end to end on tiny models: resuming, starting points, teachers, pictures, diffusers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Trainer
from tests.tiny import TINY_SANA
from tools.miniature_sana import make_sana

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
LOKR = {"network_module": "networks.lokr", "network_args": ["factor=4"]}
LOHA = {"network_module": "lycoris.kohya", "network_args": ["algo=loha"]}
DROPOUTS = ["rank_dropout=0.2", "module_dropout=0.2"]


@pytest.fixture(scope="session")
def tiny_sana(tmp_path_factory) -> Path:
    return make_sana(tmp_path_factory.mktemp("sana-adapter"), sizes=TINY_SANA)


@pytest.fixture
def trainers(trainer, tiny_sana) -> dict[str, Trainer]:
    return {"sd3": trainer, "sana": Trainer(tiny_sana, trainer.photos, trainer.folder)}


def train(trainers, family: str, output: str, **options) -> int:
    from accelerate.state import AcceleratorState, PartialState

    from library.cli import main

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    return main(family, job="adapter", argv=trainers[family].arguments(output, **{**CACHED, **options}))


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", [LOKR, LOHA], ids=["lokr", "loha"])
@pytest.mark.parametrize("family", ["sd3", "sana"])
def test_training_moves_it_and_resuming_is_bit_equal(trainers, family, kind):
    trainer = trainers[family]
    options = {**kind, "network_args": [*kind["network_args"], *DROPOUTS], "max_train_steps": 4}
    assert train(trainers, family, "whole", **options) == 0
    assert train(trainers, family, "parts", **options, save_every_n_steps=2, save_state=True) == 0
    state = trainer.folder / "parts" / "run-step00000002-state"
    assert train(trainers, family, "resumed", **options, resume=state) == 0
    whole = trainer.weights("whole")
    assert equal(whole, trainer.weights("parts"))
    assert equal(whole, trainer.weights("resumed"))
    assert any(key.endswith((".lokr_w1", ".hada_w1_a")) for key in whole)
    zeros_at_first = [key for key in whole if key.endswith((".lokr_w2", ".lokr_w2_b", ".hada_w2_a"))]
    assert all(whole[key].abs().max() > 0 for key in zeros_at_first)
    losses = trainer.losses("whole")
    assert trainer.losses("resumed") == {step: loss for step, loss in losses.items() if step > 2}


def test_training_goes_on_from_a_file_and_merges_it(trainers):
    trainer = trainers["sana"]
    one = {**LOKR, "max_train_steps": 1}
    assert train(trainers, "sana", "first", **LOKR) == 0
    file = trainer.folder / "first" / "run.safetensors"
    again = {"network_weights": file, "dim_from_weights": True, "network_module": "networks.lokr", "max_train_steps": 1}
    assert train(trainers, "sana", "plain", **one) == 0
    assert train(trainers, "sana", "on", **one, network_weights=file) == 0
    assert train(trainers, "sana", "again", **again, network_dim=None, network_alpha=None) == 0
    assert train(trainers, "sana", "merged", **one, base_weights=[file]) == 0
    losses = {name: trainer.losses(name)[1] for name in ("plain", "on", "again", "merged")}
    assert losses["on"] == losses["again"] == pytest.approx(losses["merged"], rel=1e-5)
    assert losses["plain"] != pytest.approx(losses["on"], rel=1e-4)


def test_wrong_options_are_told_before_anything_is_loaded(trainers, capsys):
    assert train(trainers, "sd3", "out", network_module="networks.lokr", network_args=["factr=4"]) == 2
    assert "unknown name factr; did you mean factor" in capsys.readouterr().err
    whole = {"network_module": "networks.lokr", "network_dim": 1000, "network_alpha": 1, "save_format": "both"}
    assert train(trainers, "sana", "out", **whole) == 2
    assert "diffusers reads only LoRA" in capsys.readouterr().err
    assert train(trainers, "sana", "out", lycoris_config="a.json") == 2
    assert "tools.import_simpletuner" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [LOKR, LOHA], ids=["lokr", "loha"])
def test_the_teacher_is_the_base_model(trainer, kind):
    """Where the base model teaches every picture, an adapter that has learned nothing has no loss."""
    dataset = trainer.dataset(dataset="enable_bucket = false", subset="is_regularisation_data = true")
    assert trainer("out", **CACHED, **kind, dataset_config=dataset, max_train_steps=1) == 0
    assert trainer.losses("out")[1] == 0


def test_weight_norms_and_metadata(trainer):
    assert trainer("out", **CACHED, **LOKR, scale_weight_norms=0.01, max_train_steps=2) == 0
    log = trainer.log("out")
    assert log[-1]["max_norm/max_key_norm"] <= 0.0101
    assert log[-1]["max_norm/keys_scaled"] > 0
    from library.io.header import read_header

    metadata = read_header(trainer.folder / "out" / "run.safetensors").metadata
    assert metadata["ss_network_module"] == "networks.lokr"
    assert json.loads(metadata["ss_network_args"]) == {"factor": "4"}
    args = ["full_matrix=true", "factor=4"]
    full = {"network_module": "networks.lokr", "network_args": args, "network_dim": None, "network_alpha": None}
    assert trainer("full", **CACHED, **full, max_train_steps=1) == 0
    metadata = read_header(trainer.folder / "full" / "run.safetensors").metadata
    assert "ss_network_dim" not in metadata and "ss_network_alpha" not in metadata


@pytest.mark.parametrize("kind", [LOKR, LOHA], ids=["lokr", "loha"])
def test_generate_shows_it_at_its_strength(trainer, kind):
    from library.sampling.generate_command import main

    assert trainer("out", **CACHED, **kind) == 0
    file = trainer.folder / "out" / "run.safetensors"

    def picture(name, *words) -> bytes:
        folder = trainer.folder / name
        fixed = {"prompt": "a cat", "seed": 5, "steps": 2, "width": 64, "height": 32, "mixed_precision": "no"}
        settings = {**fixed, "pretrained_model_name_or_path": trainer.checkpoint, "device": "cpu", "output_dir": folder}
        assert main([*(str(w) for n, v in settings.items() for w in (f"--{n}", v)), *map(str, words)]) == 0
        from PIL import Image

        (path,) = folder.iterdir()
        return Image.open(path).tobytes()

    base = picture("base")
    assert picture("trained", "--network_weights", file) != base
    assert picture("silent", "--network_weights", file, "--network_mul", 0) == base


@pytest.mark.reference
@pytest.mark.parametrize("kind", [{**LOKR, "network_args": ["factor=8"]}, LOHA], ids=["lokr", "loha"])
def test_diffusers_loads_what_was_trained_on_sana(trainers, kind):
    """As a LoRA, by the pipeline's own loader: its transformer answers as ours does."""
    diffusers = pytest.importorskip("diffusers")
    from types import SimpleNamespace

    from library.config.memory import MemoryConfig
    from library.config.model import ModelConfig
    from library.families import create_family, family_options
    from library.families.sana.key_maps import denoiser_key_maps
    from library.io.key_maps import to_diffusers
    from networks.loading import load_adapter

    trainer = trainers["sana"]
    assert train(trainers, "sana", "out", **kind, save_format="both", network_dim=1, network_alpha=1) == 0
    options = family_options("sana")
    groups = {group: kind() for group, kind in options.OBJECTIVE_GROUPS.items()}
    model = ModelConfig(pretrained_model_name_or_path=str(trainer.checkpoint))
    family = create_family(
        "sana", SimpleNamespace(model=model, family=options.OPTIONS(), memory=MemoryConfig(), **groups)
    )
    denoiser = family.load_denoiser(device="cpu", dtype=torch.float32).eval()
    config = denoiser.config
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        num_layers=config.depth,
        num_cross_attention_heads=config.num_cross_heads,
        cross_attention_head_dim=config.width // config.num_cross_heads,
        cross_attention_dim=config.width,
        caption_channels=config.context_width,
        mlp_ratio=config.mlp_ratio,
        sample_size=32,
        patch_size=config.patch_size,
        interpolation_scale=None,
        qk_norm="rms_norm_across_heads" if config.qk_norm else None,
    ).eval()
    maps = denoiser_key_maps(depth=config.depth, qk_norm=config.qk_norm)
    transformer.load_state_dict(dict(to_diffusers(denoiser.state_dict(), maps)))
    pipe = diffusers.SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, config.in_channels, 4, 6, generator=generator)
    context = torch.randn(2, 5, config.context_width, generator=generator)
    timestep, mask = torch.tensor([100.0, 700.0]), torch.ones(2, 5, dtype=torch.bool)

    @torch.no_grad()
    def theirs():
        return transformer(x_t, context, timestep, encoder_attention_mask=mask.float(), return_dict=False)[0]

    base = theirs()
    pipe.load_lora_weights(str(trainer.folder / "out"), weight_name="run_diffusers.safetensors")
    answer = theirs()
    load_adapter(str(trainer.folder / "out" / "run.safetensors"), {"denoiser": denoiser}, family.adapter_targets)
    with torch.no_grad():
        ours = denoiser(x_t, timestep, context, mask)
    assert (ours - answer).abs().max() <= 2e-5 * answer.abs().max()
    assert (answer - base).abs().max() > 1e-3 * answer.abs().max()
    written = load_file(trainer.folder / "out" / "run.safetensors")
    assert any("mlp_inverted_conv_conv" in key for key in written)
