import hashlib
import json
import shutil

import pytest
import torch

from library.config.errors import ConfigError
from library.config.model import ModelConfig
from library.families.sana.files import locate
from library.families.sana.options import SanaOptions
from library.families.sana.text import SanaText, SanaTextStrategy
from library.families.sana.tokenizers import INSTRUCTION, find_windows, load_tokenizer
from library.io.header import read_header
from library.io.safetensors import load_tensors
from library.text_encoders.gemma import encode_gemma, load_gemma
from library.text_encoders.tokenizers import TokenizerPlaces
from tools.miniature_sana import _words
from tools.miniature_tokenizers import write_gemma_tokenizer

LONG = "a red circle on a blue table " * 60
CAPTIONS = ["a red Circle", "", LONG, "  two dogs \n", " ", "Über zebra 🦓"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    write_gemma_tokenizer(folder / "tokenizer", _words())
    return TokenizerPlaces(directory=folder)


@pytest.fixture(scope="module")
def gemma(sana_file):
    header = read_header(sana_file)
    weights = {n.partition("transformer.")[2]: t for n, t in load_tensors(header) if "gemma" in n}
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    return load_gemma(iter(weights.items()), shapes, device="cpu", dtype=torch.float32, source="tiny")


def strategy_of(places, **options):
    return SanaTextStrategy(load_tokenizer(places, SanaOptions(**options), None), "tiny")


@torch.no_grad()
def encode(strategy, gemma, captions):
    return strategy.encode({"gemma": gemma}, strategy.tokenize(captions))


def pieces(tokenizer, caption):
    ids, mask = tokenizer([caption])
    return [tokenizer.tokenizer.backend.id_to_token(index) for index in ids[0][mask[0]].tolist()]


def test_the_instruction_is_the_published_one():
    assert hashlib.sha256(INSTRUCTION.encode()).hexdigest().startswith("62b9ab89eebb0ac5")
    assert [len(line) for line in INSTRUCTION.split("\n")] == [173, 154, 111, 56, 188, 227, 128, 13]


def test_the_window_is_measured(places, tmp_path):
    count = len(load_tokenizer(places, SanaOptions(), None).tokenizer.backend.encode(INSTRUCTION).ids)
    tokenizer = load_tokenizer(places, SanaOptions(), None)
    assert tokenizer.tokenizer.length == count + 298 and tokenizer.skipped == count - 2
    (tmp_path / "prefix.txt").write_text("Draw: \n")
    tokenizer = load_tokenizer(places, SanaOptions(sana_prompt_prefix=str(tmp_path / "prefix.txt")), None)
    assert tokenizer.prefix == "Draw: "
    assert tokenizer.tokenizer.length == len(tokenizer.tokenizer.backend.encode("Draw: ").ids) + 298
    none = load_tokenizer(places, SanaOptions(sana_prompt_prefix="none", sana_max_token_length=20), None)
    assert (none.prefix, none.tokenizer.length, none.skipped) == ("", 20, 0)


def test_what_is_read(places):
    tokenizer = load_tokenizer(places, SanaOptions(), None)
    ids, mask = tokenizer(CAPTIONS)
    assert ids.shape == mask.shape == (6, tokenizer.tokenizer.length)
    assert mask.sum(dim=1)[2] == tokenizer.tokenizer.length and (ids[~mask] == 0).all()
    assert mask[:, 0].all() and (mask[:, 1:] <= mask[:, :-1]).all()  # padded on the right
    read = pieces(tokenizer, CAPTIONS[0])
    assert read[0] == "<bos>" and "<eos>" not in read and "▁Enhanced" in read
    assert "".join(read).endswith("▁Prompt:▁a▁red▁Circle") and "▁red" in read
    for caption in ("", " "):
        assert pieces(tokenizer, caption) == ["<bos>"]
    assert pieces(tokenizer, "  two dogs \n") == pieces(tokenizer, "two dogs")
    lower = load_tokenizer(places, SanaOptions(sana_lower_case=True), None)
    assert pieces(lower, "a red Circle") == pieces(tokenizer, "a red circle") != read
    assert "▁Enhanced" in pieces(lower, "a red Circle")


def test_the_denoiser_sees_the_start_and_the_caption_alone(places, gemma):
    strategy = strategy_of(places)
    text = encode(strategy, gemma, ["a red circle", "two dogs"])
    assert text.context.shape == (2, 300, 64) and text.mask.shape == (2, 300)
    assert text.mask.sum(dim=1).tolist()[0] == 4  # start, a, red, circle
    assert not text.context[~text.mask].any()
    ids, mask = strategy.tokenizer(["a red circle"])
    with torch.no_grad():
        whole = encode_gemma(gemma, ids, mask)[0][mask[0]]
    torch.testing.assert_close(text.context[0][text.mask[0]], whole[[0, -3, -2, -1]])


def test_the_prefix_acts_although_it_is_not_seen(places, gemma):
    plain, prefixed = (encode(strategy_of(places, **o), gemma, ["a cat"]) for o in ({"sana_prompt_prefix": "none"}, {}))
    torch.testing.assert_close(plain.context[:, 0], prefixed.context[:, 0], atol=1e-5, rtol=1e-4)
    assert (plain.context - prefixed.context)[:, 2].abs().max() > 0.01
    empty = [encode(strategy_of(places, **o), gemma, [""]) for o in ({"sana_prompt_prefix": "none"}, {})]
    assert torch.equal(empty[0].context, empty[1].context)


def test_batches_are_their_rows(places, gemma):
    strategy = strategy_of(places)
    together = encode(strategy, gemma, CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        alone = encode(strategy, gemma, [caption])
        assert torch.equal(alone.mask[0], together.mask[row])
        torch.testing.assert_close(alone.context[0], together.context[row], atol=1e-5, rtol=1e-4)


def test_packing_leaves_padding_out(places, gemma):
    strategy = strategy_of(places)
    text = encode(strategy, gemma, CAPTIONS)
    rows = [strategy.pack(text, row) for row in range(len(CAPTIONS))]
    assert [len(row["context"]) for row in rows] == text.mask.sum(dim=1).tolist()
    back = strategy.unpack(rows)
    for name, tensor in text.tensors().items():
        again = back.tensors()[name]
        assert again.contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8)), name


def test_a_dropped_caption_is_the_empty_one_with_its_own_mask(places, gemma):
    strategy = strategy_of(places)
    text = encode(strategy, gemma, ["", "a cat"])
    dropped = strategy.drop(text, torch.tensor([True, False]))
    assert isinstance(dropped, SanaText) and dropped.mask[0].sum() == 1
    assert torch.equal(dropped.context, text.context)


def test_the_signature_holds_everything(places, tmp_path):
    (tmp_path / "prefix.txt").write_text("Draw: ")
    others = [
        strategy_of(places, sana_prompt_prefix="none"),
        strategy_of(places, sana_prompt_prefix=str(tmp_path / "prefix.txt")),
        strategy_of(places, sana_lower_case=True),
        strategy_of(places, sana_max_token_length=299),
        SanaTextStrategy(load_tokenizer(places, SanaOptions(), None), "other weights"),
    ]
    write_gemma_tokenizer(tmp_path / "tokenizer", _words()[:-1])
    others.append(strategy_of(TokenizerPlaces(directory=tmp_path)))
    signatures = [tuple(strategy.signature().items()) for strategy in (strategy_of(places), *others)]
    assert len(set(signatures)) == len(signatures)
    (tmp_path / "same.txt").write_text(INSTRUCTION)
    same = strategy_of(places, sana_prompt_prefix=str(tmp_path / "same.txt"))
    assert tuple(same.signature().items()) == signatures[0], "the text counts, not where it comes from"


def test_how_much_of_a_caption_is_kept(places):
    tokenizer = load_tokenizer(places, SanaOptions(sana_max_token_length=20), None)
    captions = ["a cat", "", f"  {LONG}", LONG, "a red " * 9, "a red " * 9 + "cat", "a red " * 9 + "cat dog"]
    kept = tokenizer.seen(captions)
    assert kept[:2] == [5, 0] and kept[4:6] == [54, 57]
    assert kept[6] == len("a red " * 9 + "cat")
    assert kept[2] == kept[3] + 2
    words = LONG[: kept[3]]
    assert len(pieces(tokenizer, words)) == tokenizer.tokenizer.length
    assert not tokenizer.may_cut("a cat") and tokenizer.may_cut("x" * 20) and tokenizer.may_cut("ü")
    assert tokenizer.length == 20


def test_no_caption_that_certainly_fits_is_cut(places):
    for options in ({"sana_max_token_length": 40}, {"sana_max_token_length": 40, "sana_prompt_prefix": "none"}):
        tokenizer = load_tokenizer(places, SanaOptions(**options), None)
        for letter in "qa.♥ ":
            for length in range(20, 45):
                caption = letter * length
                if not tokenizer.may_cut(caption):
                    assert tokenizer.tokenizer.seen([tokenizer._text(caption)]) == [len(tokenizer._text(caption))]


def test_the_tokenizer_is_found_beside_gemma(tmp_path, sana_file, places):
    shutil.copytree(places.directory / "tokenizer", tmp_path / "gemma")
    shutil.copy(sana_file, tmp_path / "gemma" / "model.safetensors")
    alone = shutil.copy(sana_file, tmp_path / "alone.safetensors")
    model, options = ModelConfig(pretrained_model_name_or_path=str(alone)), SanaOptions(gemma=str(tmp_path / "gemma"))
    assert find_windows(model, options, locate(model, options))["Gemma"].length == 300


def test_a_missing_tokenizer_is_an_error(tmp_path, sana_file, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    alone = shutil.copy(sana_file, tmp_path / "alone.safetensors")
    with pytest.raises(ConfigError, match="gemma-2-2b-it"):
        find_windows(ModelConfig(pretrained_model_name_or_path=str(alone)), SanaOptions(), None)


def test_a_tokenizer_that_adds_no_start_gets_one(tmp_path, places):
    folder = shutil.copytree(places.directory / "tokenizer", tmp_path / "tokenizer")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(TokenizerPlaces(directory=tmp_path), SanaOptions(), None)
    assert pieces(tokenizer, "") == ["<bos>"]
    assert tokenizer.tokenizer.length == load_tokenizer(places, SanaOptions(), None).tokenizer.length


@pytest.mark.reference
@pytest.mark.parametrize("length", [300, 30])
@torch.no_grad()
def test_the_same_features_as_diffusers_pipeline(places, gemma, length):
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    pipe = diffusers.SanaPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(places.directory / "tokenizer"),
        text_encoder=gemma,
        vae=None,
        transformer=None,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    strategy = strategy_of(places, sana_lower_case=True, sana_max_token_length=length)
    captions = ["A red Circle", LONG, "two dogs on the beach"]
    context, mask, empty, empty_mask = pipe.encode_prompt(
        captions,
        negative_prompt="",
        device=torch.device("cpu"),
        max_sequence_length=length,
        complex_human_instruction=INSTRUCTION.split("\n"),
    )
    for ours, (theirs, their_mask) in (
        (encode(strategy, gemma, captions), (context, mask)),
        (encode(strategy, gemma, ["", "", ""]), (empty, empty_mask)),
    ):
        assert torch.equal(ours.mask, their_mask.bool())
        torch.testing.assert_close(ours.context[ours.mask], theirs[their_mask.bool()], atol=1e-5, rtol=1e-4)
