"""What travels between the rooms: small frozen records.

Nothing here imports torch when it is loaded, so that configuration and dataset scans stay light.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from typing_extensions import Self


class Resolution(NamedTuple):
    """A size in pixels."""

    width: int
    height: int

    @property
    def area(self) -> int:
        """Width times height."""
        return self.width * self.height

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class Box(NamedTuple):
    """A rectangle in pixels; right and bottom are exclusive."""

    left: int
    top: int
    right: int
    bottom: int


class Sample(NamedTuple):
    """One picture of a dataset, as found on disk.

    Attributes:
        key: Names the sample in random draws, logs and errors: ``dataset/subset/relative path``. It doesn't contain
            the absolute path, so a run gives the same draws wherever the folder lies.
        path: The picture's file, or its URL.
        content: Hash of the file's bytes.
        captions: The lines that may be its caption (one, unless wildcards are on); ``("",)`` without a caption.
        size: The picture's size after its EXIF orientation was applied.
        dataset: Index of the dataset in the configuration.
        subset: Index of the subset in its dataset.
        num_repeats: Visits per epoch.
        is_reg: Whether it is a regularisation picture.
        mask: The file of its loss mask; None: it has none, or its own transparency is the mask.
        mask_content: Hash of that file's bytes; empty without one.
        focus: Centre and size of a face (x, y, width, height) in pixels of the upright picture, for crops around it.
        control: The file of its control picture, by which a ControlNet steers; None: it has none.
        control_content: Hash of that file's bytes; empty without one.
    """

    key: str
    path: str
    content: str
    captions: tuple[str, ...]
    size: Resolution
    dataset: int
    subset: int
    num_repeats: int = 1
    is_reg: bool = False
    mask: str | None = None
    mask_content: str = ""
    focus: tuple[int, int, int, int] | None = None
    control: str | None = None
    control_content: str = ""


@dataclass(frozen=True)
class TensorRecord:
    """Tensors (or None) that share their first dimension, the batch. Families derive their conditioning from it."""

    def tensors(self) -> dict[str, "Tensor"]:
        """The fields that are tensors, by name."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in values if value is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, "Tensor"]) -> "Self":
        """The record whose fields are ``tensors``; fields not named are None."""
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(tensors) - names:
            raise ValueError(f"{cls.__name__} has no field {sorted(unknown)}; it has {sorted(names)}")
        return cls(**{name: tensors.get(name) for name in names})

    def to(self, device: "torch.device | str", dtype: "torch.dtype | None" = None) -> "Self":
        """The record on ``device``; ``dtype`` applies to its floating-point tensors only."""
        return self._map(lambda t: t.to(device, dtype if t.is_floating_point() else None, non_blocking=True))

    def rows(self, index: Any) -> "Self":
        """The record of the chosen rows (a slice, or a tensor of indices)."""
        return self._map(lambda t: t[index])

    def __len__(self) -> int:
        return len(next(iter(self.tensors().values())))

    @classmethod
    def stack(cls, rows: Sequence[Mapping[str, "Tensor"]]) -> "Self":
        """The batch of single samples, each given as tensors without the batch dimension.

        Rows of unequal length in their first dimension are padded with zeros at the end.
        """
        from torch.nn.utils.rnn import pad_sequence

        def joined(parts: list["Tensor"]) -> "Tensor":
            if all(part.shape == parts[0].shape for part in parts):
                return stack_rows(parts)
            return pad_sequence(parts, batch_first=True)

        return cls.from_tensors({name: joined([row[name] for row in rows]) for name in rows[0]})

    @classmethod
    def cat(cls, records: Sequence["Self"]) -> "Self":
        """The batches one after another."""
        import torch

        parts = [record.tensors() for record in records]
        return cls.from_tensors({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def _map(self, function: Any) -> "Self":
        return dataclasses.replace(self, **{name: function(tensor) for name, tensor in self.tensors().items()})


def stack_rows(rows: Sequence["Tensor"]) -> "Tensor":
    """The rows as one tensor, as ``torch.stack`` gives it; rows that lie one after the other already aren't copied."""
    import torch

    first = rows[0]
    size, start, memory = first.numel(), first.storage_offset(), first.untyped_storage().data_ptr()
    if all(
        row.is_contiguous()
        and not row.requires_grad
        and (row.shape, row.dtype) == (first.shape, first.dtype)
        and (row.storage_offset(), row.untyped_storage().data_ptr()) == (start + number * size, memory)
        for number, row in enumerate(rows)
    ):
        return first.as_strided((len(rows), *first.shape), (size, *first.stride()), start)
    return torch.stack(list(rows))


@dataclass(frozen=True)
class NoisedLatents:
    """What the denoiser is asked about.

    Attributes:
        x_t: The noised latents (B, C, h, w).
        sigma: The noise level, 1 is pure noise (B,), fp32.
        x_0: The clean, normalised latents (B, C, h, w); None while sampling.
        noise: The noise in ``x_t`` (B, C, h, w); None while sampling.
        control: The pictures that a ControlNet steers by (B, 3, H, W) in 0..1; None: nothing steers.
    """

    x_t: "Tensor"
    sigma: "Tensor"
    x_0: "Tensor | None" = None
    noise: "Tensor | None" = None
    control: "Tensor | None" = None


@dataclass(frozen=True)
class LatentFormat:
    """The geometry and scale of a family's latents.

    Attributes:
        channels: Channels of the latents.
        stride: Pixels per latent position, on each side.
        patch: Latent positions per token of the denoiser, on each side.
        scale: ``normalised = (raw - shift) * scale``.
        shift: See ``scale``.
    """

    channels: int
    stride: int
    patch: int
    scale: float
    shift: float

    @property
    def resolution_step(self) -> int:
        """Both sides of a picture are multiples of this many pixels."""
        return self.stride * self.patch

    def latent_size(self, resolution: Resolution) -> tuple[int, int]:
        """Height and width of the latents of a picture."""
        return resolution.height // self.stride, resolution.width // self.stride

    def tokens(self, resolution: Resolution) -> int:
        """How many tokens the denoiser sees for a picture."""
        return (resolution.width // self.resolution_step) * (resolution.height // self.resolution_step)

    def normalise(self, raw: "Tensor") -> "Tensor":
        """Raw latents of the VAE, as the denoiser wants them."""
        return (raw - self.shift) * self.scale

    def denormalise(self, latents: "Tensor") -> "Tensor":
        """The inverse of ``normalise``."""
        return latents / self.scale + self.shift


@dataclass(frozen=True)
class Batch:
    """One micro-batch, as the loader makes it. Rows are samples of one resolution.

    Attributes:
        keys: ``Sample.key`` per row.
        visits: How often each sample had been visited before; with the key it seeds all of the row's draws.
        captions: The caption of each row after shuffling, dropout and the rest; ``""`` where it was dropped.
        dropped: Whether caption dropout struck (B,), bool.
        loss_weight: Weight of each row's loss (B,), fp32.
        resolution: The pictures' size.
        noise: The noise to add (B, C, h, w), fp32, drawn per row.
        latents: Raw latents from the cache (B, C, h, w), or None: then ``pixels``.
        pixels: The pictures (B, 3, H, W) in -1..1, or None.
        text: Cached text features (a record of the family), or None: then ``tokens``.
        tokens: Token ids for the text encoders (a record of the family), or None.
        mask: Weight of the loss (B, 1, h, w) in 0..1, or None: 1 everywhere.
        taught: Rows whose target is the base model's own answer (B,), bool; None: no row is.
        prior: Rows that are regularisation pictures, ``Sample.is_reg`` (B,), bool; None: no row is.
        control: The pictures that a ControlNet steers by (B, 3, H, W) in 0..1, or None.
    """

    keys: tuple[str, ...]
    visits: tuple[int, ...]
    captions: tuple[str, ...]
    dropped: "Tensor"
    loss_weight: "Tensor"
    resolution: Resolution
    noise: "Tensor"
    latents: "Tensor | None" = None
    pixels: "Tensor | None" = None
    text: TensorRecord | None = None
    tokens: TensorRecord | None = None
    mask: "Tensor | None" = None
    taught: "Tensor | None" = None
    prior: "Tensor | None" = None
    control: "Tensor | None" = None

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, for torch's loader."""
        return self._map(lambda t: t.pin_memory())

    def to(self, device: "torch.device | str") -> "Batch":
        """The same batch on ``device``."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def rows(self, index: Sequence[int]) -> "Batch":
        """The batch of the chosen rows."""
        return dataclasses.replace(
            self._map(lambda t: t[index]),
            keys=tuple(self.keys[row] for row in index),
            visits=tuple(self.visits[row] for row in index),
            captions=tuple(self.captions[row] for row in index),
        )

    def _map(self, function: Any) -> "Batch":
        def mapped(value: Any) -> Any:
            if isinstance(value, TensorRecord):
                return value._map(function)
            return function(value) if hasattr(value, "pin_memory") else value

        changes = {field.name: mapped(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class FusedLinear:
    """A linear layer of ours that another tool keeps as several, or in another order of rows.

    Attributes:
        parts: The other tool's module paths, in the order of our rows; equal shares.
        swap_halves: Whether the other tool stores the second half of the rows first.
    """

    parts: tuple[str, ...]
    swap_halves: bool = False


@dataclass(frozen=True)
class AdapterTargets:
    """Which layers of one component (the denoiser, a text encoder) an adapter may change, in module paths with globs.

    Attributes:
        prefix: Of the adapter's keys: ``lora_unet``, ``lora_te1``.
        include: Globs of the layers that get an adapter by default.
        exclude: Globs of layers that never do.
        dims: ``--network_args`` name -> globs of the layers whose rank it sets (0 leaves them out).
        optional: Layers outside ``include`` that ``emb_dims`` switches on: one tuple of globs per position of its list.
        block_prefix: Path of the block list (``joint_blocks``) that ``train_block_indices`` counts in; None: no blocks.
        ways: A U-Net's: name of a way through it (``down``, ``mid``, ``up``) -> the paths of its blocks, in forward
            order. The settings per block count in all of them, ``down_lr_weight`` and so on in one.
        convolutional: Globs of the layers outside ``include`` that get an adapter where ``conv_dim`` asks for one on
            convolutions; the rank of linear layers and 1x1 convolutions among them is the network's.
        key_paths: Our module path -> the path that the adapter's keys are made of, where it is another.
        fused: Our module path -> the same layer in diffusers' spelling, for every layer whose adapter can be saved so.
        diffusers_prefix: Of the component's keys in a diffusers adapter file: ``transformer``, ``text_encoder``; empty:
            diffusers has no place for it.
        enabled_by: ``--network_args`` switch without which the component gets no adapter; None: it gets one by default.
    """

    prefix: str
    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    dims: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    optional: tuple[tuple[str, ...], ...] = ()
    block_prefix: str | None = None
    ways: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    convolutional: tuple[str, ...] = ()
    key_paths: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fused: Mapping[str, FusedLinear] = dataclasses.field(default_factory=dict)
    diffusers_prefix: str = ""
    enabled_by: str | None = None


@dataclass(frozen=True)
class SamplingDefaults:
    """How pictures of a model are made where nobody says.

    Attributes:
        sampler: One of ``samplers``.
        samplers: Those that the model has, as options name them; by default those of flow matching.
        steps: Sampling steps.
        scale: Classifier-free guidance.
        table: Name of the published table (``library.data.bucket_tables``) with the sizes that the model was trained
            at, for a model that computes other sizes at the nearest of them; None: it computes at every size.
    """

    sampler: str = "euler"
    samplers: tuple[str, ...] = ("euler", "heun", "dpmpp_2m")
    steps: int = 28
    scale: float = 5.0
    table: str | None = None


@dataclass(frozen=True)
class ModelDescription:
    """What the files said about the model, read from headers alone.

    Attributes:
        title: For people: ``Stable Diffusion 3.5 medium``.
        architecture: ``modelspec.architecture`` without the adapter suffix: ``stable-diffusion-3-5-medium``.
        base_model_version: ``ss_base_model_version``: ``5-medium``.
        parameters: Learnable parameters of the denoiser.
        sizes: Sizes for the log, name -> value.
        native_resolution: The resolution that the model was made for, for samples that name none.
        implementation: ``modelspec.implementation``: the address of the reference implementation.
        blocks: How many repeated blocks the denoiser has.
        unskippable: Why pictures can't be guided by leaving out blocks; empty: they can.
        largest_side: The longest side of a picture in pixels that the denoiser has positions for; None: any.
        text_numbers: How many numbers the features of one caption have, padding included; 0: not known.
        specification: More of what saved files say as ``modelspec.*``: name -> value.
        defaults: Options whose default depends on the model: name -> what acts where nobody gave one.
        stated: Those of them that the files decide: name -> what they say, as a sentence; another value is an error
            where the model stays as it is.
        unsure: Those of them that are a guess: name -> why, and what to do, as a sentence.
        text_encoders: The text encoders that the files have, in the order in which options number them.
        trainable_text_encoders: The text encoders that a full fine-tune can train.
        save_layouts: What ``--save_model_as`` can be in a full fine-tune, best first -> what ``--save_parts`` can be.
        sampling: How its pictures are made where nobody says.
        precision_warnings: ``--mixed_precision`` -> why these weights lose quality in it.
        refused_precisions: ``--mixed_precision`` -> why the model can't compute in it, and what to use.
    """

    title: str
    architecture: str
    base_model_version: str
    parameters: int
    sizes: Mapping[str, int | str]
    native_resolution: Resolution
    implementation: str = ""
    blocks: int = 0
    unskippable: str = ""
    largest_side: int | None = None
    text_numbers: int = 0
    specification: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, float | bool | str] = dataclasses.field(default_factory=dict)
    stated: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unsure: Mapping[str, str] = dataclasses.field(default_factory=dict)
    text_encoders: tuple[str, ...] = ()
    trainable_text_encoders: tuple[str, ...] = ()
    save_layouts: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    sampling: SamplingDefaults = SamplingDefaults()
    precision_warnings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refused_precisions: Mapping[str, str] = dataclasses.field(default_factory=dict)
