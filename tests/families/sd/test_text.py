import pickle

import pytest
import torch

from library.families.sd.latents import SdLatentStrategy
from library.families.sd.options import SdOptions
from library.families.sd.text import SdTextStrategy
from library.families.sd.tokenizers import CHUNK, load_tokenizer
from library.text_encoders.clip import load_clip
from library.text_encoders.tokenizers import TokenizerPlaces
from tools.miniature_tokenizers import CLIP_END, WORDS, clip_vocabulary_size, write_clip_tokenizer

DEPTH = 4
LONG = " ".join(WORDS[index % len(WORDS)] for index in range(200))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    write_clip_tokenizer(folder / "tokenizer", pad_token=CLIP_END)
    return TokenizerPlaces(directory=folder)


@pytest.fixture(scope="module")
def transformers_encoder():
    """transformers' own model, with random weights that tell layers apart."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=clip_vocabulary_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=DEPTH,
        num_attention_heads=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    model = CLIPTextModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def encoder(transformers_encoder):
    """Ours, with the same weights."""
    weights = {
        f"text_model.{name.removeprefix('text_model.')}": value
        for name, value in transformers_encoder.state_dict().items()
        if not name.endswith("position_ids")
    }
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    made = {"activation": "quick_gelu", "device": "cpu", "dtype": torch.float32, "source": "clip"}
    return load_clip(iter(weights.items()), shapes, **made)


def strategy(places, *, layer=DEPTH, is_v2=False, **options):
    return SdTextStrategy(load_tokenizer(places, SdOptions(**options), is_v2=is_v2), layer, "an encoder")


def inner(ids):
    """The ids of a chunk between its start and its first end."""
    row = ids.tolist()
    return row[1 : row.index(max(row))]


def test_captions_become_chunks_with_a_start_and_an_end_each(places):
    ids = strategy(places, max_token_length="225").tokenize([LONG, "a red circle", ""]).ids
    assert ids.shape == (3, 3, 77)
    start, end = ids[0, 0, 0], ids.max()
    assert (ids[:, :, 0] == start).all()
    assert [len(inner(chunk)) for chunk in ids[0]] == [75, 75, 50]
    assert [len(inner(chunk)) for chunk in ids[1]] == [3, 0, 0]
    assert (ids[2, :, 1:] == end).all()
    whole = strategy(places).tokenizer.tokenizer.backend
    whole.enable_truncation(1000)
    assert [token for chunk in ids[0] for token in inner(chunk)] == whole.encode(LONG).ids[1:-1]


def test_the_second_generation_pads_with_its_own_token(places):
    first, second = (strategy(places, is_v2=is_v2).tokenize(["a red"]).ids[0, 0] for is_v2 in (False, True))
    assert torch.equal(first[:4], second[:4])
    assert (first[4:] == first.max()).all() and not second[4:].any()


def test_features_are_those_of_the_chunks_in_a_row(places, encoder):
    text = strategy(places, max_token_length="150")
    tokens = text.tokenize([LONG, "a red circle"])
    context = text.encode({"clip": encoder}, tokens).context
    assert context.shape == (2, 2 * CHUNK + 2, 64)
    alone = [encoder.text_model(tokens.ids[:, chunk]).last_hidden_state for chunk in range(2)]
    expected = torch.cat([alone[0][:, :-1], alone[1][:, 1:]], dim=1)
    assert torch.allclose(context, expected, atol=1e-5)


@pytest.mark.reference
@pytest.mark.parametrize("layer", [4, 3, 2])
def test_a_layer_before_the_last_is_followed_by_the_last_norm(places, encoder, layer):
    """As a model with fewer layers would answer, which is how diffusers skips layers."""
    text = strategy(places, layer=layer)
    tokens = text.tokenize(["a red circle", "blue"])
    context = text.encode({"clip": encoder}, tokens).context
    layers = encoder.text_model.encoder.layers
    kept, encoder.text_model.encoder.layers = layers, layers[:layer]
    try:
        expected = encoder.text_model(tokens.ids[:, 0]).last_hidden_state
    finally:
        encoder.text_model.encoder.layers = kept
    assert torch.allclose(context, expected, atol=1e-5)


@pytest.mark.reference
@pytest.mark.parametrize("layer", [4, 3, 2])
@pytest.mark.parametrize(("length", "chunks"), [("75", 1), ("150", 2), ("225", 3)])
def test_layers_and_chunks_are_those_of_transformers(places, encoder, transformers_encoder, layer, length, chunks):
    """One chunk and one caption at a time: hidden_states counts the embeddings as 0, and lacks the last norm."""
    text = strategy(places, layer=layer, max_token_length=length)
    captions = [LONG, "a red circle", ""]
    tokens = text.tokenize(captions)
    context = text.encode({"clip": encoder}, tokens).context
    assert context.shape == (3, chunks * 75 + 2, 64)
    for row in range(len(captions)):
        positions = []
        for chunk in range(chunks):
            output = transformers_encoder(tokens.ids[row : row + 1, chunk], output_hidden_states=True)
            features = norm_of(transformers_encoder)(output.hidden_states[layer])[0]
            positions += [features[:1]] * (chunk == 0) + [features[1:76]] + [features[76:]] * (chunk == chunks - 1)
        torch.testing.assert_close(context[row], torch.cat(positions), atol=1e-5, rtol=1e-5)


def norm_of(encoder):
    """transformers' last norm, wherever a version keeps it."""
    return next(module for name, module in encoder.named_modules() if name.endswith("final_layer_norm"))


def test_weights_multiply_the_features_of_their_tokens(places, encoder):
    plain = strategy(places).encode({"clip": encoder}, strategy(places).tokenize(["a red circle"])).context
    weighted = strategy(places, weighted_captions=True)
    tokens = weighted.tokenize(["a (red:1.5) circle", "a red circle"])
    assert torch.equal(tokens.ids[0], tokens.ids[1])
    assert tokens.weights[0, :6].tolist() == [1, 1, 1.5, 1, 1, 1] and (tokens.weights[1] == 1).all()
    context = weighted.encode({"clip": encoder}, tokens).context
    assert torch.allclose(context[1:], plain, atol=1e-5)
    assert torch.allclose(context[0, 2], 1.5 * plain[0, 2], atol=1e-5)
    assert torch.allclose(context[0, 3:], plain[0, 3:], atol=1e-5)


def test_every_setting_that_changes_features_changes_the_signature(places):
    signatures = [
        strategy(places).signature(),
        strategy(places, layer=2).signature(),
        strategy(places, is_v2=True).signature(),
        strategy(places, max_token_length="150").signature(),
        strategy(places, weighted_captions=True).signature(),
    ]
    assert len({tuple(signature.items()) for signature in signatures}) == 5
    assert strategy(places).signature() == signatures[0]


def test_packed_rows_come_back(places, encoder):
    text = pickle.loads(pickle.dumps(strategy(places)))
    made = text.encode({"clip": encoder}, text.tokenize(["a red circle", ""]))
    again = text.unpack([text.pack(made, row) for row in range(2)])
    assert isinstance(again, text.record()) and torch.equal(again.context, made.context)
    assert text.drop(made, torch.tensor([True, False])) is made and text.for_negatives() is text


def test_what_is_too_long_is_found(places):
    tokenizer = strategy(places).windows()["CLIP"]
    assert not tokenizer.may_cut("a red circle") and tokenizer.may_cut(LONG)
    short, long = tokenizer.seen(["a red circle", LONG])
    assert short == len("a red circle") and long < len(LONG)
    assert tokenizer.length == 77 and strategy(places, max_token_length="150").windows()["CLIP"].length == 152


def test_latents_are_the_vaes_mean_and_come_back():
    class Vae(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def encode(self, pixels):
            return pixels * 2, pixels * 0

        def decode(self, latents):
            return latents / 2

    latents, pixels = SdLatentStrategy("a vae"), torch.rand(1, 4, 8, 8)
    raw = latents.encode(Vae(), pixels)
    normalised = latents.format.normalise(raw)
    assert torch.allclose(normalised, raw * 0.18215)
    assert torch.allclose(latents.decode(Vae(), normalised), pixels, atol=1e-6)
    assert latents.signature() == {"features": "sd latents 1", "vae": "a vae", "posterior": "mean"}
