"""Whole LoKr and LoHa adapters: settings, files, merging, and other programs' readers."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.config.errors import ConfigError
from library.config.network import NetworkConfig
from library.config.optimizer import OptimizerConfig
from library.io.safetensors import save_tensors
from networks.key_formats import read_weights, to_kohya
from networks.loading import create_network, load_adapter
from networks.lora import inject
from networks.merge import merge
from networks.settings import read_settings
from tests.networks.adapter_fixtures import LARGEST, TARGETS, Config, inputs, randomise, tiny_clip, tiny_mmdit

QKV = "lora_unet_joint_blocks_1_x_block_attn_qkv"
UNET_ONLY = {"network_train_unet_only": True}
KINDS = {
    "lokr": {
        "network_module": "networks.lokr",
        "network_dim": 1,
        "network_alpha": 3.0,
        "network_args": ("factor=4",),
    },
    "lokr whole": {"network_module": "networks.lokr", "network_dim": 1000, "network_args": ("factor=4",)},
    "lokr both": {
        "network_module": "networks.lokr",
        "network_dim": 1,
        "network_args": ("factor=4", "decompose_both=true", LARGEST),
    },
    "loha": {"network_module": "networks.loha", "network_dim": 3, "network_args": (LARGEST,)},
}
LOW_RANK = [name for name in KINDS if name != "lokr whole"]


def settings(*network_args, **network):
    return read_settings(NetworkConfig(network_args=network_args, **network), TARGETS)


def models():
    return {"denoiser": tiny_mmdit(), "clip_l": tiny_clip(), "clip_g": tiny_clip(1)}


def outputs(roots):
    with torch.no_grad():
        ids = torch.tensor([[3, 5, 7, 49]])
        return [roots["denoiser"](*inputs()), roots["clip_l"](ids).text_embeds, roots["clip_g"](ids).text_embeds]


def assert_same_outputs(actual, expected, tolerance=2e-5):
    for ours, theirs in zip(outputs(actual), outputs(expected)):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def saved(path, kind, save_format="kohya", **network):
    roots = models()
    created = create_network(Config(save_format=save_format, **KINDS[kind], **network), roots, TARGETS, 0)
    # The norm of a product of products falls with its factors.
    randomise(created)
    with torch.no_grad():
        for parameter in created.parameters():
            parameter.mul_(2.5)
    for suffix, (tensors, metadata) in created.files(save_format).items():
        save_tensors(tensors, path.with_name(path.stem + suffix + ".safetensors"), metadata)
    return roots


# Settings


def test_names_of_other_trainers_mean_ours():
    for module, args, method in (
        ("networks.lokr", (), "lokr"),
        ("networks.loha", (), "loha"),
        ("lycoris.kohya", ("algo=lokr",), "lokr"),
        ("lycoris.kohya", ("algo=LoHa",), "loha"),
        ("lycoris.kohya", ("algo=locon",), "lora"),
        ("lycoris.kohya", (), "lora"),
        ("networks.lora_sd3", (), "lora"),
    ):
        assert settings(*args, network_module=module).method == method
        assert NetworkConfig(network_module=module, network_args=args).method == method


def test_lycoris_and_ours_are_the_same_adapter():
    theirs = {"network_module": "lycoris.kohya", "network_args": ("algo=lokr", "factor=4", "preset=full")}
    theirs |= {"network_dim": 1, "network_alpha": 3.0}
    states = [
        create_network(Config(**options), models(), TARGETS, 0).state_dict() for options in (KINDS["lokr"], theirs)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (("algo=lokrr",), {"network_module": "lycoris.kohya"}, "algo=lokrr can't be trained; did you mean lokr"),
        (("algo=boft",), {"network_module": "lycoris.kohya"}, "algo=boft can't be trained; lora, locon"),
        (("algo=lokr",), {"network_module": "networks.loha"}, "algo=lokr goes with --network_module lycoris.kohya"),
        ((), {"network_dropout": 0.1}, "--network_dropout 0.1 does nothing for LoKr"),
        (("dropout=0.1",), {}, "dropout does nothing for LoKr: its update has no inner activations"),
        (("loraplus_lr_ratio=4",), {}, "loraplus_lr_ratio does nothing for LoKr"),
        (("factor=4",), {"network_module": "networks.loha"}, "factor does nothing for LoHa"),
        (("factr=4",), {}, "unknown name factr; did you mean factor"),
        (("factor=0",), {}, "factor: expected a whole number of at least 1, or -1"),
        (("x_attn_factor=-2",), {}, "x_attn_factor: expected a whole number"),
        (("x_attn_facto=2",), {}, "did you mean x_attn_factor"),
        (
            ("preset=unet-only",),
            {},
            "preset: expected full, attn-mlp, attn-only, which choose among this model's types",
        ),
        (("preset=full",), {"dim_from_weights": True, "network_weights": "a"}, "preset does nothing with --dim_from_w"),
        (("dora_wd=True",), {}, "dora_wd=True can't be used: DoRA can't be trained"),
        (("full_matrix=maybe",), {}, "full_matrix: expected true or false"),
        (("full_matrix=true",), {"network_dim": 8}, "--network_dim 8 does nothing with .*full_matrix"),
        (("full_matrix=true", "decompose_both=true"), {}, "decompose_both does nothing with full_matrix"),
        (("full_matrix=true", "x_mlp_dim=2"), {}, "x_mlp_dim does nothing with full_matrix"),
        (("factor=4",), {"dim_from_weights": True, "network_weights": "a"}, "factor does nothing with --dim_from_w"),
    ],
)
def test_what_does_nothing_or_is_unknown(args, options, message):
    with pytest.raises(ConfigError, match=message):
        settings(*args, **{"network_module": "networks.lokr", **options})


def test_full_matrix_leaves_rank_and_alpha_out_of_metadata():
    config = NetworkConfig(network_module="networks.lokr", network_args=("full_matrix=true",))
    assert {"network_dim", "network_alpha"} <= set(config.idle_options)
    assert "network_dim" not in NetworkConfig(network_module="networks.lokr").idle_options


def plans(*network_args, **network):
    network = inject(
        {"denoiser": tiny_mmdit()}, TARGETS, settings(*network_args, network_module="networks.lokr", **network)
    )
    return {name.removeprefix("lora_unet_"): layer.plan for name, layer in network.modules_by_name.items()}


def test_factors_and_ranks_by_type():
    chosen = plans("factor=4", "x_attn_factor=8", "x_mlp_dim=2", "context_mod_dim=0", network_dim=3)
    assert chosen["joint_blocks_1_x_block_attn_qkv"].w1 == (8, 4)  # 96 = 8 * 12, 32 = 4 * 8
    assert chosen["joint_blocks_0_x_block_attn2_proj"].w1 == (4, 4)  # 8 divides 32, and is the larger one
    assert chosen["joint_blocks_1_context_block_attn_qkv"].w1 == (4, 4)
    assert chosen["joint_blocks_1_x_block_mlp_fc1"].w2_rank == 2
    assert chosen["joint_blocks_1_x_block_attn_qkv"].w2_rank == 3
    assert not any("context_block_adaLN" in name for name in chosen)


def test_presets_choose_types_of_layers():
    def kinds(*args):
        found = {"attn": 0, "mlp": 0, "adaLN": 0}
        for name in plans("factor=4", *args):
            found[next(kind for kind in found if f"_{kind}" in name)] += 1
        return {kind for kind, count in found.items() if count}

    assert plans("factor=4", "preset=full") == plans("factor=4")
    assert kinds("preset=attn-mlp") == {"attn", "mlp"}
    assert kinds("preset=attn-only") == {"attn"}
    assert kinds("preset=attn-only", "x_mod_dim=2") == {"attn", "adaLN"}  # what is said of a type goes first


def test_large_ranks_and_full_matrix_give_whole_factors():
    assert all(plan.is_whole for plan in plans("factor=4", network_dim=1000).values())
    assert all(plan.is_whole for plan in plans("factor=4", "full_matrix=true").values())
    assert not any(plan.is_whole for plan in plans("factor=2", network_dim=1).values())


def test_settings_that_do_nothing_with_these_sizes_are_errors():
    with pytest.raises(
        ConfigError, match="--network_alpha 8 does nothing: at rank 1000 every layer's factors are whole"
    ):
        plans("factor=4", network_dim=1000, network_alpha=8.0)
    plans("factor=4", network_dim=1000, network_alpha=1000.0)
    with pytest.raises(ConfigError, match="decompose_both does nothing: at rank 4"):
        plans("factor=4", "decompose_both=true")
    with pytest.raises(ConfigError, match="x_attn_factor does nothing"):
        inject({"clip_l": tiny_clip()}, TARGETS, settings("x_attn_factor=4", network_module="networks.lokr"))


# The adapter


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_and_follows_the_seed(kind):
    plain = outputs(models())
    states = []
    for seed in (0, 0, 1):
        roots = models()
        network = create_network(Config(**KINDS[kind]), roots, TARGETS, seed)
        assert all(map(torch.equal, outputs(roots), plain))
        states.append(network.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.parametrize("kind", KINDS)
def test_off_and_gone_are_exactly_the_base(kind):
    roots = models()
    plain = outputs(roots)
    network = randomise(create_network(Config(**KINDS[kind]), roots, TARGETS, 0))
    assert not torch.equal(outputs(roots)[0], plain[0])
    with network.disabled():
        assert all(map(torch.equal, outputs(roots), plain))
    network.remove()
    assert all(map(torch.equal, outputs(roots), plain))


@pytest.mark.parametrize("kind", KINDS)
def test_groups_hold_every_parameter_once(kind):
    network = create_network(Config(**KINDS[kind]), models(), TARGETS, 0)
    groups = network.parameter_groups(OptimizerConfig(learning_rate=1.0, text_encoder_lr=(2.0, 3.0)))
    assert {group["name"]: group["lr"] for group in groups} == {"unet": 1, "textencoder 1": 2, "textencoder 2": 3}
    every = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(every) == sorted(id(parameter) for parameter in network.parameters())
    own = [id(parameter) for parameter in network.component_parameters("clip_l")]
    assert own and set(own) == {id(parameter) for parameter in groups[1]["params"]}


@pytest.mark.parametrize("kind", KINDS)
def test_scale_weight_norms_clamps_what_is_above(kind):
    network = randomise(create_network(Config(**KINDS[kind], **UNET_ONLY), models(), TARGETS, 0))
    before = {name: weights.delta().clone() for name, weights in network.weights().items()}
    limit = float(torch.stack([delta.norm() for delta in before.values()]).median())
    result = network.scale_weight_norms(limit)
    for name, weights in network.weights().items():
        factor = min(1.0, limit / before[name].norm().item())
        torch.testing.assert_close(weights.delta(), before[name] * factor, atol=1e-6, rtol=1e-4)
    assert result.largest <= limit * 1.0001
    assert 0 < int(result.scaled) < len(before)


# Files


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_loads_and_merges(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    trained = saved(path, kind)
    loaded, merged = models(), models()
    load_adapter(path, loaded, TARGETS)
    assert_same_outputs(loaded, trained, tolerance=0)
    assert merge(merged, TARGETS, [path]) > 0
    assert_same_outputs(merged, trained)
    assert (outputs(trained)[0] - outputs(models())[0]).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("from_file", [False, True])
def test_training_starts_from_a_file(tmp_path, kind, from_file):
    path = tmp_path / "a.safetensors"
    trained = saved(path, kind)
    options = KINDS[kind]
    if from_file:
        options = {"network_module": options["network_module"], "dim_from_weights": True}
    roots = models()
    network = create_network(Config(**options, network_weights=str(path)), roots, TARGETS, 1)
    assert_same_outputs(roots, trained, tolerance=0)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_another_kind_or_factor_than_the_files_is_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    saved(path, "lokr")
    start = {"network_weights": str(path)}
    for options, message in (
        ({}, "is a LoKr adapter where this run trains a LoRA .*networks.lokr"),
        ({"network_module": "networks.loha"}, "is a LoKr adapter where this run trains a LoHa"),
        ({**KINDS["lokr"], "network_dim": 1000, "network_alpha": 1.0}, "lokr_w2_a .*, this run has .*--network_args"),
        ({**KINDS["lokr"], "network_args": ("factor=2",)}, r"lokr_w1 \[4, 4\].*, this run has lokr_w1 \[2, 2\]"),
        ({**KINDS["lokr"], "network_alpha": 1.0}, "alpha 3 where this run has 1"),
        ({"dim_from_weights": True}, "is a LoKr, and --network_module says LoRA"),
    ):
        with pytest.raises(ConfigError, match=message):
            create_network(Config(**options, **start), models(), TARGETS, 1)


def test_kohya_and_back_is_exact():
    for options in KINDS.values():
        weights = randomise(create_network(Config(**options), models(), TARGETS, 0)).weights()
        back = read_weights(to_kohya(weights), {}, TARGETS, "file")
        for name, layer in weights.items():
            assert type(back[name]) is type(layer)
            assert (back[name].alpha, back[name].rank) == (layer.alpha, layer.rank)
            assert all(torch.equal(back[name].tensors()[part], tensor) for part, tensor in layer.tensors().items())


def test_lycoris_prefix_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    trained = saved(path, "lokr", **UNET_ONLY)
    tensors = {key.replace("lora_unet_", "lycoris_"): value for key, value in load_file(path).items()}
    save_file(tensors, path)
    roots = models()
    load_adapter(path, roots, TARGETS)
    assert_same_outputs(roots, trained, tolerance=0)


def test_alphas_of_whole_factors_are_ignored_whatever_they_are(tmp_path):
    path = tmp_path / "a.safetensors"
    trained = saved(path, "lokr whole", **UNET_ONLY)
    tensors = load_file(path)
    save_file({k: torch.tensor(1e10) if k.endswith(".alpha") else v for k, v in tensors.items()}, path)
    roots = models()
    load_adapter(path, roots, TARGETS)
    assert_same_outputs(roots, trained, tolerance=0)


def test_convolutions_laid_out_flat_are_read():
    from networks.loading import layers_by_name, match_layers

    roots = {"denoiser": tiny_mmdit()}
    config = Config(network_module="networks.lokr", network_args=("factor=2", "emb_dims=[9,9,9,9,9,9]"), **UNET_ONLY)
    network = randomise(create_network(config, roots, TARGETS, 0))
    name = "lora_unet_x_embedder_proj"
    weights = network.weights()[name]
    assert weights.w2[0].ndim == 4
    flat = weights._replace(w2=(weights.w2[0].flatten(1),))
    match_layers({name: flat}, layers_by_name(roots, TARGETS), roots, TARGETS, "file", partial=False)
    network.load_weights({name: flat}, "file")
    assert torch.equal(network.weights()[name].w2[0], weights.w2[0])


def lokr_file(change):
    tensors = {
        f"{QKV}.lokr_w1": torch.ones(4, 4),
        f"{QKV}.lokr_w2_a": torch.ones(24, 2),
        f"{QKV}.lokr_w2_b": torch.ones(2, 8),
        f"{QKV}.alpha": torch.tensor(1.0),
    }
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lokr_file(lambda t: t.pop(f"{QKV}.lokr_w1")), "has lokr_w1 not at all"),
        (lokr_file(lambda t: t.update({f"{QKV}.lokr_w2": torch.ones(24, 8)})), "has lokr_w2 twice"),
        (lokr_file(lambda t: t.pop(f"{QKV}.lokr_w2_b")), "has no lokr_w2_b"),
        (lokr_file(lambda t: t.update({f"{QKV}.lokr_w2_b": torch.ones(3, 8)})), "no rank in common"),
        (lokr_file(lambda t: t.update({f"{QKV}.lokr_w1": torch.ones(4)})), r"lokr_w1 of size \[4\]"),
        (lokr_file(lambda t: t.update({f"{QKV}.lokr_w1": torch.full((4, 4), torch.nan)})), "not finite"),
        (lokr_file(lambda t: t.update({f"{QKV}.alpha": torch.tensor(torch.inf)})), "not finite"),
        (lokr_file(lambda t: t.update({f"{QKV}.hada_w1_a": torch.ones(4, 4)})), "mixes kinds"),
        (lokr_file(lambda t: t.update({f"{QKV}.dora_scale": torch.ones(4, 4)})), "DoRA adapter"),
        (
            {f"{QKV}.hada_{n}": torch.ones(*s) for n, s in (("w1_a", (96, 2)), ("w1_b", (2, 32)), ("w2_a", (96, 2)))},
            "has no hada_w2_b",
        ),
    ],
)
def test_broken_files_are_refused(tensors, message):
    with pytest.raises(ConfigError, match=message):
        read_weights(tensors, {}, TARGETS, "file")


def test_files_of_another_size_are_refused():
    roots = models()
    tensors = lokr_file(lambda t: t.update({f"{QKV}.lokr_w2_b": torch.ones(2, 16)}))
    from networks.loading import layers_by_name, match_layers

    with pytest.raises(ConfigError, match=r"another model: .*\[96, 64\]"):
        match_layers(
            read_weights(tensors, {}, TARGETS, "file"),
            layers_by_name(roots, TARGETS),
            roots,
            TARGETS,
            "file",
            partial=False,
        )


# For diffusers


@pytest.mark.parametrize("kind", LOW_RANK)
def test_diffusers_spelling_is_the_lora_that_it_equals(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    trained = saved(path, kind, "both")
    written = load_file(tmp_path / "a_diffusers.safetensors")
    assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in written)
    roots = models()
    load_adapter(tmp_path / "a_diffusers.safetensors", roots, TARGETS)
    assert_same_outputs(roots, trained)


@pytest.mark.parametrize("save_format", ["both", "diffusers"])
def test_whole_factors_have_no_place_in_diffusers_and_it_is_said_before_training(save_format):
    with torch.device("meta"):
        roots = models()
    with pytest.raises(ConfigError, match=r"diffusers reads only LoRA, and .* whole second factor"):
        create_network(Config(save_format=save_format, **KINDS["lokr whole"]), roots, TARGETS, 0)
    with torch.device("meta"):
        create_network(Config(save_format=save_format, **KINDS["loha"]), models(), TARGETS, 0)


# LyCORIS reads what we write


@pytest.mark.reference
@pytest.mark.parametrize("kind", KINDS)
def test_lycoris_loads_our_file(tmp_path, kind):
    """By its function for scripts like kohya's, and by its own for any model, which wants its prefix."""
    lycoris = pytest.importorskip("lycoris")
    from lycoris import kohya

    path = tmp_path / "a.safetensors"
    trained = saved(path, kind, **UNET_ONLY)
    denoiser = tiny_mmdit()
    network, tensors = kohya.create_network_from_weights(1.0, str(path), None, [], denoiser)
    network.apply_to([], denoiser, False, True)
    network.load_state_dict(tensors)
    assert_same_outputs({**models(), "denoiser": denoiser}, trained)

    renamed = {key.replace("lora_unet_", "lycoris_"): value for key, value in load_file(path).items()}
    save_file(renamed, tmp_path / "b.safetensors")
    denoiser = tiny_mmdit()
    network, tensors = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "b.safetensors"), denoiser)
    network.apply_to()
    network.load_state_dict(tensors, strict=False)
    assert_same_outputs({**models(), "denoiser": denoiser}, trained)
