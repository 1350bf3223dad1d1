import dataclasses
import pickle
from types import SimpleNamespace

import pytest
import torch

from library.config.flow import FlowConfig
from library.config.loss import LossConfig
from library.config.memory import MemoryConfig
from library.config.model import ModelConfig
from library.families.sd3.family import create
from library.families.sd3.options import Sd3Options
from library.families.sd3.text import Sd3Text, drop_encoders
from library.records import TensorRecord

CAPTIONS = ["a red circle on a blue table", "", "a photo of a zebra"]
L, G, D = 64, 128, 256  # widths of the tiny encoders


def family(path, **options):
    return create(
        SimpleNamespace(
            model=ModelConfig(pretrained_model_name_or_path=str(path)),
            family=Sd3Options(**options),
            flow=FlowConfig(),
            loss=LossConfig(),
            memory=MemoryConfig(),
        )
    )


@pytest.fixture(scope="module")
def encoders(tiny_file):
    return family(tiny_file).load_text_encoders(device="cpu", dtype=torch.float32)


@torch.no_grad()
def encode(path, encoders, captions=CAPTIONS, **options):
    strategy = family(path, **options).text_strategy()
    return strategy.encode(encoders, strategy.tokenize(captions))


def test_parts(tiny_file, encoders):
    text = encode(tiny_file, encoders)
    assert text.clip.shape == (3, 77, L + G) and text.pooled.shape == (3, L + G) and text.t5.shape == (3, 256, D)
    context = text.context(D)
    assert context.shape == (3, 77 + 256, D)
    assert torch.equal(context[:, :77, : L + G], text.clip) and not context[:, :77, L + G :].any()
    assert torch.equal(context[:, 77:], text.t5)


def test_77_zero_tokens_stand_in_for_an_absent_t5(tiny_file, encoders):
    text = dataclasses.replace(encode(tiny_file, encoders), t5=None)
    context = text.context(D)
    assert context.shape == (3, 154, D) and not context[:, 77:].any()


@pytest.mark.parametrize("width", [D - 1, L + G - 1])
def test_encoders_that_are_too_wide_are_an_error(tiny_file, encoders, width):
    with pytest.raises(ValueError, match=f"don't fit the denoiser's context of {width}"):
        encode(tiny_file, encoders).context(width)


def test_the_token_length_acts(tiny_file, encoders):
    assert encode(tiny_file, encoders, t5xxl_max_token_length=20).t5.shape == (3, 20, D)


def test_the_clip_mask_acts_in_the_encoder(tiny_file, encoders):
    plain, masked = encode(tiny_file, encoders), encode(tiny_file, encoders, apply_lg_attn_mask=True)
    for share in (slice(0, L), slice(L, None)):
        assert (plain.clip - masked.clip)[:, -1, share].abs().max() > 1e-3
    torch.testing.assert_close(masked.clip[:, :2], plain.clip[:, :2])
    torch.testing.assert_close(masked.pooled, plain.pooled)
    torch.testing.assert_close(masked.t5, plain.t5)


def test_the_t5_mask_acts_in_the_encoder(tiny_file, encoders):
    plain, masked = encode(tiny_file, encoders), encode(tiny_file, encoders, apply_t5_attn_mask=True)
    assert (plain.t5 - masked.t5)[:, 0].abs().max() > 1e-3
    torch.testing.assert_close(masked.clip, plain.clip)


def test_zero_padding_leaves_the_caption_alone(tiny_file, encoders):
    plain, zeroed = encode(tiny_file, encoders), encode(tiny_file, encoders, t5_padding="zero")
    mask = family(tiny_file).text_strategy().tokenize(CAPTIONS).t5_mask
    assert torch.equal(zeroed.t5[mask], plain.t5[mask]) and not zeroed.t5[~mask].any() and plain.t5[~mask].any()


@pytest.mark.parametrize(
    ("options", "clip", "t5"),
    [
        ({}, True, True),
        ({"sd3_clip_uncond_behaviour": "zero"}, False, True),
        ({"sd3_t5_uncond_behaviour": "zero"}, True, False),
        ({"sd3_clip_uncond_behaviour": "zero", "sd3_t5_uncond_behaviour": "zero"}, False, False),
    ],
)
def test_dropped_rows(tiny_file, encoders, options, clip, t5):
    text = encode(tiny_file, encoders, captions=["", "a cat"])
    dropped = family(tiny_file, **options).text_strategy().drop(text, torch.tensor([True, False]))
    for name, kept in (("clip", clip), ("pooled", clip), ("t5", t5)):
        before, after = getattr(text, name), getattr(dropped, name)
        assert torch.equal(after[1], before[1])
        assert torch.equal(after[0], before[0] if kept else torch.zeros_like(before[0])), name
    assert text.clip[0].any()  # the record that came in is as it was


def test_dropping_without_t5(tiny_file, encoders):
    text = dataclasses.replace(encode(tiny_file, encoders), t5=None)
    strategy = family(tiny_file, sd3_t5_uncond_behaviour="zero").text_strategy()
    assert strategy.drop(text, torch.tensor([True, False, True])).t5 is None


def test_single_encoders_are_silenced_in_single_rows(tiny_file, encoders):
    text = encode(tiny_file, encoders)
    rows = torch.eye(3, dtype=torch.bool)
    silenced = drop_encoders(text, clip_l_width=L, clip_l=rows[0], clip_g=rows[1], t5=rows[2])
    expected_clip, expected_pooled, expected_t5 = text.clip.clone(), text.pooled.clone(), text.t5.clone()
    expected_clip[0, :, :L], expected_pooled[0, :L] = 0, 0
    expected_clip[1, :, L:], expected_pooled[1, L:] = 0, 0
    expected_t5[2] = 0
    assert torch.equal(silenced.clip, expected_clip)
    assert torch.equal(silenced.pooled, expected_pooled)
    assert torch.equal(silenced.t5, expected_t5)


def test_a_batch_is_its_rows(tiny_file, encoders):
    whole = encode(tiny_file, encoders)
    single = Sd3Text.cat([encode(tiny_file, encoders, captions=[caption]) for caption in CAPTIONS])
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(getattr(single, name), tensor)


def test_stored_rows_come_back(tiny_file, encoders):
    strategy = family(tiny_file).text_strategy()
    text = encode(tiny_file, encoders)
    rows = [strategy.pack(text, row) for row in range(3)]
    assert all(torch.equal(rows[1][name], tensor[1]) for name, tensor in text.tensors().items())
    back = strategy.unpack(rows)
    assert isinstance(back, TensorRecord) and back.positions is None
    assert all(torch.equal(getattr(back, name), tensor) for name, tensor in text.tensors().items())


def test_zero_padding_is_not_stored(tiny_file, encoders):
    strategy = family(tiny_file, t5_padding="zero").text_strategy()
    text = encode(tiny_file, encoders, t5_padding="zero")
    lengths = strategy.tokenize(CAPTIONS).t5_mask.sum(dim=1).tolist()
    assert max(lengths) < 20
    for row, length in enumerate(lengths):
        packed = strategy.pack(text, row)
        assert packed["t5"].shape == (length, D) and torch.equal(packed["t5"], text.t5[row, :length])
        assert packed["clip"].shape == (77, L + G)


def test_padding_is_plus_zero_whatever_the_sign_before(tiny_file, encoders):
    zeroed = encode(tiny_file, encoders, t5_padding="zero").t5
    padding = zeroed[~family(tiny_file).text_strategy().tokenize(CAPTIONS).t5_mask]
    assert padding.numel() and not padding.view(torch.int32).any()


@pytest.mark.parametrize("used", [0, 1, 255, 256])
def test_rows_of_every_length_come_back(tiny_file, used):
    strategy = family(tiny_file, t5_padding="zero").text_strategy()
    t5 = torch.zeros(2, 256, 4)
    t5[0, :used] = -0.0  # not what padding is, so it counts
    t5[1] = 1
    text = Sd3Text(clip=torch.ones(2, 77, 8), pooled=torch.ones(2, 8), t5=t5)
    packed = [strategy.pack(text, row) for row in range(2)]
    assert [len(row["t5"]) for row in packed] == [used, 256]
    back = strategy.unpack(packed)
    assert torch.equal(back.t5.view(torch.int32), t5.view(torch.int32)) and torch.equal(back.clip, text.clip)


def test_rows_without_a_t5_come_back(tiny_file, encoders):
    text = dataclasses.replace(encode(tiny_file, encoders), t5=None)
    strategy = dataclasses.replace(family(tiny_file, t5_padding="zero").text_strategy(), t5=None)
    back = strategy.unpack([strategy.pack(text, row) for row in range(3)])
    assert back.t5 is None and torch.equal(back.clip, text.clip) and torch.equal(back.pooled, text.pooled)


def test_workers_get_the_same_tokens(tiny_file):
    strategy = family(tiny_file).text_strategy()
    copy = pickle.loads(pickle.dumps(strategy))
    ours, theirs = strategy.tokenize(CAPTIONS).tensors(), copy.tokenize(CAPTIONS).tensors()
    assert len(ours) == 6 and all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    assert copy.signature() == strategy.signature()


@pytest.mark.parametrize(
    "options",
    [
        {"apply_lg_attn_mask": True},
        {"apply_t5_attn_mask": True},
        {"t5_padding": "zero"},
        {"t5xxl_max_token_length": 77},
    ],
)
def test_the_signature_follows_what_changes_the_features(tiny_file, options):
    assert family(tiny_file, **options).text_strategy().signature() != family(tiny_file).text_strategy().signature()


@pytest.mark.parametrize("name", ["clip_l", "clip_g", "t5xxl"])
def test_the_signature_follows_the_weights(tiny_file, name):
    strategy = family(tiny_file).text_strategy()
    other = dataclasses.replace(strategy, identities={**strategy.identities, name: "other weights"})
    assert other.signature() != strategy.signature()


def test_the_signature_leaves_out_what_acts_later(tiny_file):
    later = {"sd3_clip_uncond_behaviour": "zero", "t5_dropout_rate": 0.5, "pos_emb_random_crop_rate": 0.5}
    assert family(tiny_file, **later).text_strategy().signature() == family(tiny_file).text_strategy().signature()
    assert all(isinstance(value, str) for value in family(tiny_file).text_strategy().signature().values())


def test_gradients_reach_the_encoders(tiny_file):
    strategy = family(tiny_file).text_strategy()
    encoders = family(tiny_file).load_text_encoders(device="cpu", dtype=torch.float32)
    for encoder in encoders.values():
        encoder.requires_grad_(True)
    text = strategy.encode(encoders, strategy.tokenize(["a cat"]))
    (text.context(D).square().sum() + text.pooled.square().sum()).backward()
    for encoder in encoders.values():
        assert all(parameter.grad is not None for name, parameter in encoder.named_parameters()), encoder


@pytest.mark.reference
@torch.no_grad()
@pytest.mark.parametrize("has_t5", [True, False])
def test_same_as_diffusers(tiny_file, tiny_folder, encoders, has_t5):
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(tiny_folder)
    length = 256 if has_t5 else 77
    if not has_t5:
        pipeline.text_encoder_3 = None
    context, negative, pooled, negative_pooled = pipeline.encode_prompt(
        CAPTIONS, None, None, negative_prompt=["a dog"] * 3, max_sequence_length=length
    )
    ours = encode(tiny_file, encoders)
    ours_negative = encode(tiny_file, encoders, captions=["a dog"] * 3)
    if not has_t5:
        ours, ours_negative = (dataclasses.replace(text, t5=None) for text in (ours, ours_negative))
    for text, their_context, their_pooled in ((ours, context, pooled), (ours_negative, negative, negative_pooled)):
        torch.testing.assert_close(text.context(D), their_context)
        torch.testing.assert_close(text.pooled, their_pooled)
