"""What the trainer relies on in every family (``library.families.protocols``), for each line of the registry.

Nothing here knows a family's options, record fields or blocks: a new family passes by keeping the promises, with a
``synthetic`` module (random weights, no files), a maker in ``tools.make_miniature`` and tiny sizes in ``tests.tiny``.
"""

import copy
import dataclasses
import itertools
import pickle
import shutil
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tests.tiny
from library.config.memory import MemoryConfig
from library.config.model import ModelConfig
from library.config.options import options_of
from library.config.samplers import SAMPLERS
from library.config.sampling import SamplingConfig
from library.data.store import MemoryStore, PackedStore
from library.families import FAMILIES, create_family, family_files, family_options, family_tokenizers
from library.io.safetensors import save_tensors
from library.memory.checkpointing import enable_checkpointing
from library.randomness import Draws
from library.records import LatentFormat, NoisedLatents, Resolution, TensorRecord
from library.sampling.pictures import encode_prompts, generate
from library.sampling.prompts import PromptRequest
from networks.loading import load_adapter
from networks.lora import AdapterNetwork, inject
from networks.settings import AdapterSettings
from tools.make_miniature import MAKERS

CPU = {"device": "cpu", "dtype": torch.float32}
CAPTIONS = ["A red circle on a blue table, by night", "a cat", "", "two dogs"]
KEYS = tuple(f"set/{i}.png" for i in range(32))
FIRST = (0,) * len(KEYS)


@dataclass(frozen=True)
class Model:
    """A family's miniature, loaded."""

    name: str
    path: Path
    family: Any
    strategy: Any
    encoders: dict[str, nn.Module]
    vae: nn.Module
    denoiser: nn.Module
    text: TensorRecord
    """Features of ``CAPTIONS``."""

    def copy_of_denoiser(self) -> nn.Module:
        return copy.deepcopy(self.denoiser)

    def noised(self, resolution=None, rows: int = len(CAPTIONS)) -> NoisedLatents:
        return noised_of(self.family, rows, resolution or self.resolution(3, 2))

    def resolution(self, across: int, down: int) -> Resolution:
        step = self.family.latents.format.resolution_step
        return Resolution(across * step, down * step)


def create(name: str, path: Path, **options) -> Any:
    module = family_options(name)
    groups = {group: kind() for group, kind in module.OBJECTIVE_GROUPS.items()}
    return create_family(
        name,
        SimpleNamespace(
            model=ModelConfig(pretrained_model_name_or_path=str(path)),
            family=module.OPTIONS(**options),
            memory=MemoryConfig(),
            **groups,
        ),
    )


def make(name: str, folder: Path, **how) -> Path:
    return MAKERS[name](folder, sizes=getattr(tests.tiny, f"TINY_{name.upper()}"), **how)


def features(strategy, encoders, captions=CAPTIONS) -> TensorRecord:
    with torch.no_grad():
        return strategy.encode(encoders, strategy.tokenize(captions))


def noised_of(family, rows: int, resolution: Resolution, seed: int = 0) -> NoisedLatents:
    latents: LatentFormat = family.latents.format
    shape = (rows, latents.channels, *latents.latent_size(resolution))
    x_0, noise = torch.randn((2, *shape), generator=torch.Generator().manual_seed(seed))
    return family.objective.add_noise(x_0, noise, torch.linspace(0.95, 0.2, rows))


def row_of(noised: NoisedLatents, row: int) -> NoisedLatents:
    fields = vars(noised).items()
    return NoisedLatents(**{name: None if value is None else value[row : row + 1] for name, value in fields})


def same(first: TensorRecord, second: TensorRecord) -> bool:
    one, other = first.tensors(), second.tensors()
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def bits(record: TensorRecord) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """The record to the last bit: zeros that differ in their sign differ."""
    return {
        name: (tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in record.tensors().items()
    }


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest number."""
    assert actual.shape == expected.shape
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def randomised(network: AdapterNetwork) -> AdapterNetwork:
    """Numbers as after training: nothing is zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network


def adapter_on(model: Model, denoiser: nn.Module, **settings) -> AdapterNetwork:
    return randomised(inject({"denoiser": denoiser}, model.family.adapter_targets, settings_of(**settings)))


def settings_of(**settings) -> AdapterSettings:
    return AdapterSettings(**{"rank": 2, "alpha": 1.0, **settings})


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory) -> Model:
    name = request.param
    path = make(name, tmp_path_factory.mktemp(name))
    family = create(name, path)
    strategy, encoders = family.text_strategy(), family.load_text_encoders(**CPU)
    return Model(
        name,
        path,
        family,
        strategy,
        encoders,
        family.load_vae(**CPU),
        family.load_denoiser(**CPU),
        features(strategy, encoders),
    )


@pytest.fixture(scope="module", params=FAMILIES)
def synthetic(request) -> SimpleNamespace:
    """The family without files, at its smallest size."""
    module = import_module(f"{FAMILIES[request.param]}.synthetic")
    return SimpleNamespace(
        name=request.param,
        module=module,
        family=module.synthetic_family("tiny"),
        denoiser=module.synthetic_denoiser("tiny", **CPU),
    )


# Shapes


@pytest.mark.parametrize(("across", "down"), [(1, 1), (4, 4), (2, 5), (6, 1)])
@torch.no_grad()
def test_every_resolution_is_answered_in_its_shape(synthetic, across, down):
    step = synthetic.family.latents.format.resolution_step
    noised = noised_of(synthetic.family, 2, Resolution(across * step, down * step))
    text = synthetic.module.synthetic_text("tiny", 2, **CPU)
    answer = synthetic.family.predict(synthetic.denoiser, noised, text)
    assert answer.shape == noised.x_t.shape and answer.dtype == torch.float32
    assert answer.isfinite().all() and answer.std() > 0


def test_resolutions_and_sizes_agree(model):
    module, format = family_options(model.name), model.family.latents.format
    assert format == module.LATENTS and format.resolution_step == module.RESOLUTION_STEP
    native = model.family.description.native_resolution
    assert native.width % format.resolution_step == native.height % format.resolution_step == 0
    assert model.family.name == model.name
    assert model.family.description.parameters == sum(p.numel() for p in model.denoiser.parameters())
    assert family_files(model.name).problems(ModelConfig(pretrained_model_name_or_path=str(model.path)),
                                             module.OPTIONS()) == []  # fmt: skip


def test_the_size_of_text_features_is_known_before_the_encoders_are(model):
    row = model.text.rows(slice(0, 1)).tensors().values()
    assert model.family.description.text_numbers == sum(tensor.numel() for tensor in row)


def test_windows_are_known_without_the_model(model):
    module, files = family_options(model.name), family_files(model.name)
    config, options = ModelConfig(pretrained_model_name_or_path=str(model.path)), module.OPTIONS()
    light = family_tokenizers(model.name).find_windows(config, options, files.locate(config, options))
    windows = model.strategy.windows()
    assert windows and {name: window.identity() for name, window in light.items()} == {
        name: window.identity() for name, window in windows.items()
    }
    for window in windows.values():
        caption = "a red circle on a blue table " * window.length
        (kept,) = window.seen([caption])
        assert 0 < kept < len(caption)


def test_what_is_loaded_is_frozen(model):
    for part in (model.denoiser, model.vae, *model.encoders.values()):
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert not any(module.training for module in part.modules())


@torch.no_grad()
def test_pixels_to_latents_and_back(model):
    format, resolution = model.family.latents.format, model.resolution(4, 3)
    pixels = torch.rand(2, 3, resolution.height, resolution.width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    raw = model.family.latents.encode(model.vae, pixels)
    assert raw.shape == (2, format.channels, *format.latent_size(resolution))
    for row in range(2):
        assert difference(model.family.latents.encode(model.vae, pixels[row : row + 1])[0], raw[row]) < 1e-5
    assert torch.equal(model.family.latents.encode(model.vae, pixels), raw), "latents must not be drawn"
    decoded = model.family.latents.decode(model.vae, format.normalise(raw))
    assert decoded.shape == pixels.shape and decoded.isfinite().all()
    torch.testing.assert_close(format.denormalise(format.normalise(raw)), raw)


# Rows are independent


@torch.no_grad()
def test_a_batch_is_its_rows(model):
    noised = model.noised()
    together = model.family.predict(model.denoiser, noised, model.text)
    for row in range(len(CAPTIONS)):
        alone = model.family.predict(model.denoiser, row_of(noised, row), model.text.rows(slice(row, row + 1)))
        assert difference(alone[0], together[row]) < 2e-5


@torch.no_grad()
def test_an_answer_depends_on_everything_in_its_row_and_on_no_other_row(model):
    noised, text = model.noised(), model.text
    plain = model.family.predict(model.denoiser, noised, text)
    changes = {
        "x_t": (dataclasses.replace(noised, x_t=noised.x_t + bump(noised.x_t)), text),
        "sigma": (dataclasses.replace(noised, sigma=noised.sigma + 0.02 * bump(noised.sigma)), text),
        **{
            name: (noised, dataclasses.replace(text, **{name: tensor + bump(tensor)}))
            for name, tensor in text.tensors().items()
            if tensor.is_floating_point()
        },
    }
    for name, (asked, given) in changes.items():
        answer = model.family.predict(model.denoiser, asked, given)
        assert difference(answer[1], plain[1]) > 1e-4, name
        for other in (0, 2, 3):
            assert difference(answer[other], plain[other]) < 1e-6, name


def bump(tensor: torch.Tensor) -> torch.Tensor:
    """Ones in row 1."""
    ones = torch.zeros_like(tensor)
    ones[1] = 1
    return ones


def test_captions_are_encoded_row_by_row(model):
    for row, caption in enumerate(CAPTIONS):
        alone = features(model.strategy, model.encoders, [caption]).tensors()
        for name, tensor in model.text.tensors().items():
            assert difference(alone[name][0], tensor[row]) < 1e-5, name
    assert type(model.text) is model.strategy.record()
    assert len(model.text) == len(CAPTIONS)


def test_dropping_changes_the_dropped_rows_only(model):
    for options in ({}, *varied(model.name)):
        strategy = create(model.name, model.path, **options).text_strategy()
        unchanged = strategy.drop(model.text, torch.zeros(len(CAPTIONS), dtype=torch.bool))
        assert same(unchanged, model.text), options
        some = strategy.drop(model.text, torch.tensor([False, True, True, False]))
        assert same(some.rows([0, 3]), model.text.rows([0, 3])), options


# What the caches keep


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_text_and_latents_come_back_from_the_store_exactly(model, tmp_path, kind, dtype):
    text, latents = model.text.to("cpu", dtype), model.noised().x_t.to(dtype)
    store = MemoryStore() if kind == "memory" else PackedStore(tmp_path / "store")
    with store:
        rows = range(len(text))
        store.write({f"t{row}": model.strategy.pack(text, row) for row in rows})
        store.write({f"l{row}": {"latents": latents[row]} for row in rows})
        store.flush()
        if kind == "disk":
            store = PackedStore(tmp_path / "store")
        read = model.strategy.unpack([store.read(f"t{row}") for row in rows])
        assert bits(read) == bits(text)
        assert torch.equal(torch.stack([store.read(f"l{row}")["latents"] for row in rows]), latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_come_back_to_the_last_bit_whatever_the_options(model, dtype):
    for options in ({}, *varied(model.name)):
        strategy = create(model.name, model.path, **options).text_strategy()
        text = features(strategy, model.encoders).to("cpu", dtype)
        packed = [strategy.pack(text, row) for row in range(len(text))]
        assert bits(strategy.unpack(packed)) == bits(text), options
        assert bits(strategy.unpack(packed[1:2])) == bits(text.rows(slice(1, 2))), options
        assert isinstance(strategy.unpack(packed), strategy.record())
        whole = sum(tensor.nbytes for tensor in text.tensors().values())
        assert sum(tensor.nbytes for row in packed for tensor in row.values()) <= whole


def varied(name: str) -> list[dict[str, Any]]:
    """Every option of the family alone, at another value than its default; those that name files are left out."""
    made = []
    for option in options_of(family_options(name).OPTIONS, "family"):
        if option.choices:
            made.append({option.name: next(choice for choice in option.choices if choice != option.default)})
        elif option.kind is bool:
            made.append({option.name: not option.default})
        elif option.kind is float:
            made.append({option.name: 0.5 if option.default != 0.5 else 0.25})
        elif option.kind is int and option.default is not None:
            made.append({option.name: option.default // 2 + 1})
    return made


def test_the_signature_changes_exactly_when_the_features_do(model):
    acting = 0
    for options in varied(model.name):
        family = create(model.name, model.path, **options)
        strategy = family.text_strategy()
        unchanged = same(features(strategy, model.encoders), model.text)
        acting += not unchanged
        assert (strategy.signature() == model.strategy.signature()) == unchanged, options
        assert family.latents.signature() == model.family.latents.signature(), options
    assert 0 < acting < len(varied(model.name))


def test_signatures_follow_the_weights_and_not_the_files_names(model, tmp_path):
    for signature in (model.strategy.signature(), model.family.latents.signature()):
        assert all(isinstance(name, str) and isinstance(value, str) for name, value in signature.items())
        assert not any(str(model.path.parent) in value for value in signature.values())
    elsewhere = shutil.copytree(model.path.parent, tmp_path / "elsewhere")
    moved = (elsewhere / model.path.name).rename(elsewhere / f"renamed{model.path.suffix}")
    copied, other = create(model.name, moved), create(model.name, make(model.name, tmp_path / "other", seed=1))
    for signature in (lambda family: family.text_strategy().signature(), lambda family: family.latents.signature()):
        assert signature(copied) == signature(model.family)
        assert signature(other) != signature(model.family)


def test_signatures_notice_a_change_in_every_part_that_shapes_the_result(model, tmp_path):
    def signatures(path):
        family = create(model.name, path)
        return family.text_strategy().signature(), family.latents.signature()

    folder = shutil.copytree(model.path.parent, tmp_path / "changed")
    text, latents = signatures(folder / model.path.name)
    for component, part in {**model.encoders, "vae": model.vae, "denoiser": model.denoiser}.items():
        tensors = load_file(model.path)
        weight = next(parameter for parameter in part.parameters() if parameter.ndim > 1)
        (name,) = (n for n, t in tensors.items() if t.shape == weight.shape and torch.equal(t, weight))
        tensors[name] = tensors[name] + 1
        save_tensors(tensors, folder / model.path.name, {})
        changed_text, changed_latents = signatures(folder / model.path.name)
        assert (changed_text != text) == (component in model.encoders), component
        assert (changed_latents != latents) == (component == "vae"), component


def test_the_text_strategy_travels_into_workers(model):
    again = pickle.loads(pickle.dumps(model.strategy))
    assert again.signature() == model.strategy.signature()
    assert same(again.tokenize(CAPTIONS), model.strategy.tokenize(CAPTIONS))
    assert len(pickle.dumps(model.strategy)) < 2e7, "it must not carry an encoder"


# What acts in training only


def training_only(name: str, value: float) -> list[dict[str, Any]]:
    return [{option: value} for option in family_options(name).TRAINING_ONLY]


def synthetic_with(synthetic, options: dict[str, Any]) -> Any:
    return synthetic.module.synthetic_family("tiny", options=family_options(synthetic.name).OPTIONS(**options))


def draws_of(rows: slice = slice(None), seed: int = 7, visits: tuple[int, ...] = FIRST) -> Draws:
    return Draws(seed, KEYS[rows], visits[rows])


def test_augmentation_acts_where_options_ask_for_it_and_nowhere_else(synthetic):
    text = synthetic.module.synthetic_text("tiny", len(KEYS), **CPU)
    size = (8, 12)
    only = family_options(synthetic.name).TRAINING_ONLY
    for options in ({}, *varied(synthetic.name)):
        augmented = synthetic_with(synthetic, options).augment(text, draws_of(), size)
        assert same(augmented, text) == (not any(name in only for name in options)), options
    for options in training_only(synthetic.name, 0.0):
        assert same(synthetic_with(synthetic, options).augment(text, draws_of(), size), text)


def test_augmentation_is_a_function_of_seed_sample_and_visit(synthetic):
    text, size = synthetic.module.synthetic_text("tiny", len(KEYS), **CPU), (8, 12)
    kept = {name: tensor.clone() for name, tensor in text.tensors().items()}
    for options in training_only(synthetic.name, 0.5):
        family = synthetic_with(synthetic, options)
        whole = family.augment(text, draws_of(), size)
        torch.manual_seed(1)
        assert same(family.augment(text, draws_of(), size), whole), options
        for rows in (slice(0, 1), slice(5, 20), slice(31, 32)):
            part = family.augment(text.rows(rows), draws_of(rows), size)
            assert same(part, whole.rows(rows)), options
        backwards = family.augment(text.rows(torch.arange(31, -1, -1)), draws_of(slice(None, None, -1)), size)
        assert same(backwards, whole.rows(torch.arange(31, -1, -1))), options
        assert not same(family.augment(text, draws_of(seed=8), size), whole), options
        assert not same(family.augment(text, draws_of(visits=(1,) * 32), size), whole), options
    assert all(torch.equal(tensor, kept[name]) for name, tensor in text.tensors().items()), "the input was changed"


@torch.no_grad()
def test_what_augmentation_makes_is_understood(synthetic):
    everything = dict.fromkeys(family_options(synthetic.name).TRAINING_ONLY, 0.5)
    if not everything:
        pytest.skip("nothing acts in training only")
    family, rows = synthetic_with(synthetic, everything), slice(0, 3)
    text = synthetic.module.synthetic_text("tiny", 3, **CPU)
    step = family.latents.format.resolution_step
    noised = noised_of(family, 3, Resolution(4 * step, 3 * step))
    augmented = family.augment(text, draws_of(rows), tuple(noised.x_t.shape[2:]))
    answer = family.predict(synthetic.denoiser, noised, augmented)
    assert answer.isfinite().all()
    assert not torch.equal(answer, family.predict(synthetic.denoiser, noised, text))


# The objective


def test_noise_levels_belong_to_their_rows(model):
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    uniform[:2] = torch.tensor([2.0**-53, 1 - 2.0**-53])
    sigma = model.family.objective.sigmas(uniform, tokens=64)
    assert sigma.shape == uniform.shape and sigma.dtype == torch.float32
    assert sigma.min() > 0 and sigma.max() <= 1
    assert torch.equal(model.family.objective.sigmas(uniform[10:20], tokens=64), sigma[10:20])
    assert sigma.unique().numel() > 60


def test_the_loss_is_per_element_and_smallest_at_the_answer(model):
    noised = model.noised()
    asked = noised.x_t.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([asked], max_iter=50)

    def total():
        optimizer.zero_grad()
        loss = model.family.objective.loss(asked, noised).sum()
        loss.backward()
        return loss

    optimizer.step(total)
    per_element = model.family.objective.loss(asked, noised)
    assert per_element.shape == noised.x_t.shape and per_element.dtype == torch.float32
    assert per_element.max() < 1e-6 and per_element.min() >= 0
    assert difference(asked.detach(), model.family.objective.target(noised)) < 1e-2
    wrong = asked.detach() + bump(asked)
    losses = model.family.objective.loss(wrong, noised).mean(dim=(1, 2, 3))
    assert losses[1] > 1e-3 and losses[[0, 2, 3]].max() < 1e-6


def test_the_loss_falls_when_one_batch_is_learned(model):
    denoiser = model.copy_of_denoiser()
    network = inject({"denoiser": denoiser}, model.family.adapter_targets, settings_of(rank=8, alpha=8.0))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    noised, losses = model.noised(), []
    for _ in range(30):
        prediction = model.family.predict(denoiser, noised, model.text)
        loss = model.family.objective.loss(prediction, noised).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0], losses


# Precision


@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
def test_bf16_autocast_is_near_fp32_and_its_gradients_are_finite(model, frozen):
    noised = model.noised()
    expected = model.family.predict(model.denoiser, noised, model.text)
    denoiser = model.copy_of_denoiser().to(frozen)
    network = inject({"denoiser": denoiser}, model.family.adapter_targets, settings_of())
    with torch.autocast("cpu", torch.bfloat16):
        answer = model.family.predict(denoiser, noised, model.text.to("cpu", frozen))
    error = (answer.float() - expected).norm() / expected.norm()
    assert error < 0.05
    model.family.objective.loss(answer.float(), noised).mean().backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)


# Adapters


def test_targets_name_layers_that_exist(model):
    roots = {"denoiser": model.denoiser, **model.encoders}
    targets = model.family.adapter_targets
    assert set(targets) == set(roots)
    prefixes = [f"{target.prefix}_" for target in targets.values()]
    assert not any(a != b and a.startswith(b) for a in prefixes for b in prefixes)
    assert len(set(prefixes)) == len(prefixes)
    for component, target in targets.items():
        paths = {path for path, module in roots[component].named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
        assert set(target.fused) <= paths
        if target.block_prefix:
            blocks = roots[component].get_submodule(target.block_prefix)
            assert list(blocks) == list(model.family.blocks(roots[component]))
        network = inject({component: copy.deepcopy(roots[component])}, targets, settings_of())
        if target.diffusers_prefix:
            names = {path.replace(".", "_") for path in target.fused}
            assert {name.removeprefix(f"{target.prefix}_") for name in network.modules_by_name} <= names


@torch.no_grad()
def test_a_disabled_or_silent_adapter_is_exactly_the_base(model):
    noised, denoiser = model.noised(), model.copy_of_denoiser()
    base = model.family.predict(denoiser, noised, model.text)
    keys = list(denoiser.state_dict())
    fresh = inject({"denoiser": denoiser}, model.family.adapter_targets, settings_of())
    assert torch.equal(model.family.predict(denoiser, noised, model.text), base), "a fresh adapter changes nothing"
    randomised(fresh)
    changed = model.family.predict(denoiser, noised, model.text)
    assert difference(changed, base) > 1e-2
    with fresh.disabled():
        assert torch.equal(model.family.predict(denoiser, noised, model.text), base)
    assert torch.equal(model.family.predict(denoiser, noised, model.text), changed)
    fresh.set_multiplier(0)
    assert torch.equal(model.family.predict(denoiser, noised, model.text), base)
    assert list(denoiser.state_dict()) == keys
    fresh.remove()
    assert torch.equal(model.family.predict(denoiser, noised, model.text), base)


@pytest.mark.parametrize("save_format", ["kohya", "diffusers"])
@torch.no_grad()
def test_a_saved_adapter_is_the_same_adapter(model, tmp_path, save_format):
    noised, targets = model.noised(), model.family.adapter_targets
    roots = {"denoiser": model.denoiser, **model.encoders}
    if save_format == "diffusers":
        roots = {component: root for component, root in roots.items() if targets[component].diffusers_prefix}
    trained = copy.deepcopy(roots)
    network = randomised(inject(trained, targets, settings_of()))
    ((tensors, metadata),) = network.files(save_format).values()
    save_tensors(tensors, tmp_path / "adapter.safetensors", metadata)
    loaded = copy.deepcopy(roots)
    again = load_adapter(str(tmp_path / "adapter.safetensors"), loaded, targets)
    assert again.modules_by_name.keys() == network.modules_by_name.keys()
    text = {id(trained): None, id(loaded): None}
    for components in (trained, loaded):
        text[id(components)] = features(model.strategy, {**model.encoders, **components})
    answers = [model.family.predict(parts["denoiser"], noised, text[id(parts)]) for parts in (trained, loaded)]
    if save_format == "kohya":
        assert torch.equal(*answers) and same(text[id(trained)], text[id(loaded)])
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), network.state_dict().values()))
    else:
        assert difference(*answers) < 1e-5
    assert difference(answers[0], model.family.predict(model.denoiser, noised, model.text)) > 1e-2


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("dropouts", [{}, {"dropout": 0.3, "rank_dropout": 0.2, "module_dropout": 0.2}])
def test_checkpointing_changes_neither_loss_nor_gradients(model, interval, dropouts):
    results = []
    for checkpointed in (False, True):
        denoiser = model.copy_of_denoiser()
        network = adapter_on(model, denoiser, **dropouts).train()
        blocks = list(model.family.blocks(denoiser))
        assert len(blocks) > 1
        if checkpointed:
            enable_checkpointing(blocks, interval)
        text = dataclasses.replace(model.text, **{n: t.clone() for n, t in model.text.tensors().items()})
        for tensor in text.tensors().values():
            tensor.requires_grad_(tensor.is_floating_point())  # as where text encoders are trained
        noised = model.noised()
        torch.manual_seed(5)
        loss = model.family.objective.loss(model.family.predict(denoiser, noised, text), noised).mean()
        loss.backward()
        of_text = [tensor.grad for tensor in text.tensors().values() if tensor.is_floating_point()]
        results.append((loss, [p.grad for p in network.parameters()], of_text))
    (loss, gradients, of_text), (checkpointed_loss, checkpointed_gradients, checkpointed_of_text) = results
    assert torch.equal(loss, checkpointed_loss)
    for one, other in zip(gradients + of_text, checkpointed_gradients + checkpointed_of_text):
        assert (one is None and other is None) or torch.equal(one, other)
    assert sum(gradient is not None and gradient.any().item() for gradient in gradients) > len(gradients) / 2
    assert all(gradient is not None and gradient.any() for gradient in of_text)


# Sampling


@pytest.mark.parametrize("steps", [1, 2, 4, 28, 50])
def test_sampling_goes_from_noise_to_the_picture(model, steps):
    x_0, noise = torch.randn((2, 1, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    sizes = (model.resolution(2, 2), model.resolution(40, 70), model.family.description.native_resolution)
    for resolution, sampler in itertools.product(sizes, model.family.description.sampling.samplers):
        path, asked = model.family.sampling_path(sampler, steps, resolution), []
        assert path.levels.shape == (steps + 1,) and (path.levels.diff() < 0).all() and path.levels[-1] >= 0

        def denoise(x, level, path=path, asked=asked):
            asked.append(path.asked(x, level))
            return x_0

        reached = path.walk(denoise, noise, fresh=lambda step: noise)
        assert (reached - x_0).abs().max() <= 1e-4 + 4 * path.levels[-1]  # a path may end a little above zero
        assert len(asked) >= steps and torch.allclose(asked[0].x_t, noise, atol=1e-6)
        assert 0 < asked[-1].sigma <= asked[0].sigma <= 1 and (steps == 1 or asked[-1].sigma < asked[0].sigma)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_learned_is_what_samplers_take_it_for(model, sampler):
    if sampler not in model.family.description.sampling.samplers:
        pytest.skip(f"{model.name} has no {sampler}")
    resolution = model.resolution(3, 2)
    path, x_0 = model.family.sampling_path(sampler, 10, resolution), model.noised(resolution, rows=1).x_0
    trained = model.family.sampling_path("euler", 10, resolution).levels.tolist()
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(7))
    for level in path.levels[:-1].tolist():
        scale = path.asked(torch.ones_like(x_0), level).x_t  # from the sampler's coordinates to the denoiser's
        noised = model.family.objective.add_noise(x_0, noise, path.asked(x_0, level).sigma)
        estimate = path.estimate(noised.x_t / scale, model.family.objective.target(noised), level)
        # between two trained levels the answer is that of the nearer one
        assert difference(estimate, x_0) < (1e-3 if level in trained else 0.2)


@torch.no_grad()
def test_skipping_a_block_acts_inside_and_leaves_nothing_behind(model):
    noised, denoiser = model.noised(), model.copy_of_denoiser()
    if model.family.description.unskippable:
        with pytest.raises(ValueError, match="no stage"), model.family.skipping(denoiser, [0]):
            pass
        return
    network = adapter_on(model, denoiser)
    blocks = list(model.family.blocks(denoiser))
    enable_checkpointing(blocks, 2)
    before = model.family.predict(denoiser, noised, model.text)
    instances = [dict(vars(block)) for block in blocks]
    answers = [before]
    for layers in ([0], [1], [0, 1], []):
        with model.family.skipping(denoiser, layers):
            answers.append(model.family.predict(denoiser, noised, model.text))
        assert [dict(vars(block)) for block in blocks] == instances
        assert torch.equal(model.family.predict(denoiser, noised, model.text), before)
    assert torch.equal(answers.pop(), before), "no layers, nothing skipped"
    for i, answer in enumerate(answers):
        assert all(difference(answer, other) > 1e-3 for other in answers[:i])
    with pytest.raises(RuntimeError, match="inside"), model.family.skipping(denoiser, [0]):
        raise RuntimeError("inside")
    assert torch.equal(model.family.predict(denoiser, noised, model.text), before)
    with pytest.raises(ValueError), model.family.skipping(denoiser, [len(blocks)]):
        pass
    assert network.modules_by_name


@torch.no_grad()
def test_negative_prompts_stack_with_prompts(model):
    reader = model.strategy.for_negatives()
    prompt, negative, empty = (
        strategy.encode(model.encoders, strategy.tokenize([text]))
        for strategy, text in ((model.strategy, "a cat"), (reader, "a cat"), (reader, ""))
    )
    stacked = type(prompt).cat([prompt, negative, empty])
    assert len(stacked) == 3 and type(negative) is type(prompt)
    own = model.strategy.encode(model.encoders, model.strategy.tokenize([""]))
    for name, tensor in own.tensors().items():
        torch.testing.assert_close(empty.tensors()[name], tensor, atol=1e-5, rtol=1e-5)
    read_alike = all(torch.equal(tensor, prompt.tensors()[name]) for name, tensor in negative.tensors().items())
    assert read_alike == (reader.signature() == model.strategy.signature())


def test_the_options_have_the_models_samplers(model):
    module, own = family_options(model.name), model.family.description.sampling
    for group, name in ((module.SAMPLING, "sample_sampler"), (module.GENERATE_GROUPS["generate"], "sampler")):
        (declared,) = (declared for declared in options_of(group) if declared.name == name)
        assert declared.choices == own.samplers
    assert own.sampler in own.samplers
    assert module.SAMPLING.__doc__ == SamplingConfig.__doc__  # one title in --help


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures_are_made(model, sampler):
    if sampler not in model.family.description.sampling.samplers:
        pytest.skip(f"{model.name} has no {sampler}")
    size = model.resolution(3, 2)
    request = PromptRequest(
        prompt="a cat", width=size.width, height=size.height, seed=1, steps=3, scale=2.0, negative_prompt="a dog"
    )
    texts = encode_prompts(model.strategy, model.encoders, [request])

    def picture(**changes):
        asked = dataclasses.replace(request, **changes)
        return generate(model.family, model.denoiser, model.vae, texts, asked, sampler=sampler, **CPU)[0]

    first = picture()
    assert first.size == size and len(set(first.tobytes())) > 20
    assert picture().tobytes() == first.tobytes()
    assert picture(seed=2).tobytes() != first.tobytes()
    assert picture(scale=4.0).tobytes() != first.tobytes()
