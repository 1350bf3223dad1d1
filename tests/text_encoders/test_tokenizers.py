import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from library.config.errors import ConfigError
from library.text_encoders.tokenizers import (
    CLIP_G_HUB_ID,
    CLIP_L_HUB_ID,
    CaptionTokenizer,
    TokenizerPlaces,
    is_clip_folder,
    is_t5_folder,
    load_clip_tokenizer,
    load_t5_tokenizer,
)
from tools.miniature_tokenizers import CLIP_END, WORDS, write_clip_tokenizer, write_t5_tokenizer

REAL = Path(os.environ.get("ATELIER_TEST_TOKENIZERS", "no such folder"))
real_vocabularies = pytest.mark.skipif(
    not REAL.is_dir(), reason="set ATELIER_TEST_TOKENIZERS to a folder with clip/ and t5/ of the published models"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    write_clip_tokenizer(folder / "tokenizer", pad_token=CLIP_END)
    write_clip_tokenizer(folder / "tokenizer_2", pad_token="!")
    write_t5_tokenizer(folder / "tokenizer_3")
    return folder


def tokens(tokenizer, caption):
    ids, mask = tokenizer([caption])
    return [tokenizer.backend.id_to_token(index) for index in ids[0][mask[0]].tolist()]


def test_ids_and_mask(folder):
    tokenizer = load_clip_tokenizer(folder / "tokenizer", pad_id=None)
    ids, mask = tokenizer(["a Red circle", ""])
    assert ids.shape == mask.shape == (2, 77) and ids.dtype == torch.long and mask.dtype == torch.bool
    assert mask.sum(dim=1).tolist() == [5, 2]
    assert tokens(tokenizer, "a Red circle") == ["<|startoftext|>", "a</w>", "red</w>", "circle</w>", "<|endoftext|>"]
    end = ids[1, 1]
    assert end == ids.max() and (ids[~mask] == end).all()


def test_the_padding_is_what_the_encoder_wants_whatever_the_files_say(folder):
    padded_by_end = load_clip_tokenizer(folder / "tokenizer_2", pad_id=None)(["a"])[0]
    padded_by_zero = load_clip_tokenizer(folder / "tokenizer", pad_id=0)(["a"])[0]
    assert padded_by_end[0, -1] == padded_by_end.max() and padded_by_zero[0, -1] == 0


def test_long_captions_keep_their_end(folder):
    caption = " ".join(WORDS)
    ids, mask = load_clip_tokenizer(folder / "tokenizer", pad_id=0)([caption])
    assert mask.all() and ids[0, -1] == ids.max()
    ids, mask = load_t5_tokenizer(folder / "tokenizer_3", length=30)([caption])
    assert ids.shape == (1, 30) and mask.all() and ids[0, -1] == 1


def test_t5_pads_with_its_own_token(folder):
    ids, mask = load_t5_tokenizer(folder / "tokenizer_3", length=8)(["a red circle", ""])
    assert mask.sum(dim=1).tolist() == [4, 1]
    assert ids[1].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("caption", ["猫", "naïve 🜂", "<html> & \x07 tab\tnewline\n", "reddish"])
def test_any_text_has_ids(folder, caption):
    clip = load_clip_tokenizer(folder / "tokenizer", pad_id=None)
    t5 = load_t5_tokenizer(folder / "tokenizer_3", length=64)
    assert len(tokens(clip, caption)) > 2 and CLIP_END not in tokens(clip, caption)[:-1]
    assert len(tokens(t5, caption)) > 1 and "<unk>" not in tokens(t5, caption)


def test_workers_get_the_same_ids(folder):
    for tokenizer in (
        load_clip_tokenizer(folder / "tokenizer", pad_id=None),
        load_t5_tokenizer(folder / "tokenizer_3", length=12),
    ):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert torch.equal(copy(["a red 猫"])[0], tokenizer(["a red 猫"])[0])
        assert copy.identity() == tokenizer.identity()


def test_identity_follows_the_content(folder, tmp_path):
    identity = load_t5_tokenizer(folder / "tokenizer_3", length=12).identity()
    shutil.copytree(folder / "tokenizer_3", tmp_path / "elsewhere")
    assert load_t5_tokenizer(tmp_path / "elsewhere", length=12).identity() == identity
    assert load_t5_tokenizer(folder / "tokenizer_3", length=13).identity() != identity
    path = tmp_path / "elsewhere" / "tokenizer.json"
    path.write_text(path.read_text().replace("▁zebra", "▁zebro"))
    assert load_t5_tokenizer(tmp_path / "elsewhere", length=12).identity() != identity
    clip = load_clip_tokenizer(folder / "tokenizer", pad_id=None)
    assert clip.identity() != load_clip_tokenizer(folder / "tokenizer", pad_id=0).identity()


def test_order_of_places(folder, tmp_path):
    def found(**places):
        return TokenizerPlaces(**places).find(["tokenizer"], CLIP_L_HUB_ID, is_clip_folder)

    cached = tmp_path / "openai_clip-vit-large-patch14"
    shutil.copytree(folder / "tokenizer", cached)
    beside, named = tmp_path / "beside", tmp_path / "named"
    assert found(beside=beside, cache=tmp_path) == cached
    shutil.copytree(folder / "tokenizer", beside / "tokenizer")
    assert found(beside=beside, cache=tmp_path) == beside / "tokenizer"
    shutil.copytree(folder / "tokenizer", named / "tokenizer")
    assert found(directory=named, beside=beside, cache=tmp_path) == named / "tokenizer"


def test_a_folder_of_one_tokenizer_may_be_named_itself(folder):
    places = TokenizerPlaces(directory=folder / "tokenizer")
    assert places.find(["tokenizer_2"], CLIP_G_HUB_ID, is_clip_folder) == folder / "tokenizer"


def test_a_folder_of_the_wrong_kind_is_passed_over(folder, tmp_path):
    shutil.copytree(folder / "tokenizer_3", tmp_path / "named" / "clip_l")
    shutil.copytree(folder / "tokenizer", tmp_path / "named" / "clip")
    places = TokenizerPlaces(directory=tmp_path / "named")
    assert places.find(["clip_l", "clip"], CLIP_L_HUB_ID, is_clip_folder) == tmp_path / "named" / "clip"
    assert is_t5_folder(tmp_path / "named" / "clip_l") and not is_t5_folder(tmp_path / "named" / "clip")


def test_a_named_folder_without_tokenizers_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"--tokenizer_dir .* sub-folder tokenizer_2 or clip_g"):
        TokenizerPlaces(directory=tmp_path).find(["tokenizer_2", "clip_g"], CLIP_G_HUB_ID, is_clip_folder)


def test_offline_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    places = TokenizerPlaces(beside=tmp_path, cache=tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"--tokenizer_dir, or copy openai_clip-vit-large-patch14 into") as caught:
        places.find(["tokenizer"], CLIP_L_HUB_ID, is_clip_folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["not json", '{"model": {"type": "BPE"}}'])
def test_damaged_files_are_named(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        is_clip_folder(tmp_path)
        load_clip_tokenizer(tmp_path, pad_id=None)


def test_a_clip_tokenizer_is_no_t5_tokenizer(folder, tmp_path):
    load_clip_tokenizer(folder / "tokenizer", pad_id=None).backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="no <pad>"):
        load_t5_tokenizer(tmp_path, length=8)


def test_a_clip_tokenizer_in_one_file(folder, tmp_path):
    expected = load_clip_tokenizer(folder / "tokenizer", pad_id=None)
    expected.backend.save(str(tmp_path / "tokenizer.json"))
    ids = load_clip_tokenizer(tmp_path, pad_id=None)(["a red Circle 猫"])[0]
    assert torch.equal(ids, expected(["a red Circle 猫"])[0])


def windows(folder):
    return load_clip_tokenizer(folder / "tokenizer", pad_id=None), load_t5_tokenizer(folder / "tokenizer_3", length=20)


def test_a_caption_is_seen_up_to_the_first_word_that_is_lost(folder):
    clip, t5 = windows(folder)
    for tokenizer, words in ((clip, 75), (t5, 19)):
        fitting = " ".join(["red", "cat"] * 60).split()[:words]
        fits, cut = " ".join(fitting), " ".join([*fitting, "zebra", "zebra"])
        assert tokenizer.seen([fits, f"{fits} ", cut]) == [len(fits), len(fits) + 1, len(fits)]
        assert torch.equal(tokenizer([cut])[0], tokenizer([cut[: len(fits)]])[0])


def test_of_a_word_that_is_cut_the_part_before_is_seen(folder):
    clip, _ = windows(folder)
    start = "red " * 73
    assert clip.seen([f"{start}qqqq", f"{start}q qqq"]) == [len(f"{start}qq"), len(f"{start}q q")]


@pytest.mark.parametrize("character", ["猫", "🜂"])
def test_a_character_that_is_cut_is_lost(folder, character):
    clip, _ = windows(folder)
    size = len(tokens(clip, character)) - 2  # byte by byte
    assert size >= 3
    for spare in range(size + 1):
        start = "red " * (75 - spare)
        caption = f"{start}{character} cat"
        (kept,) = clip.seen([caption])
        assert caption[:kept].strip() == (f"{start}{character}" if spare == size else start.strip())


def test_characters_that_become_more_of_them_may_be_cut_in_a_short_caption(folder):
    _, t5 = windows(folder)
    caption = "\ufdfa" * 5  # 18 characters each, once they are normalised
    assert t5.seen([caption]) < [len(caption)] < [20]


def test_only_captions_that_may_be_too_long_are_tokenized_and_equal_ones_once(folder):
    clip, _ = windows(folder)

    batches = []

    class Counting:
        def num_special_tokens_to_add(self, is_pair):
            return clip.backend.num_special_tokens_to_add(is_pair)

        def encode_batch(self, captions):
            batches.append(captions)
            return clip.backend.encode_batch(captions)

    long = "red " * 80
    tokenizer = CaptionTokenizer(Counting(), clip.length, clip.pad_id)
    assert tokenizer.seen(["a red cat", "", long, "x" * 74, "x" * 75, "ü", long])[2] == len("red " * 75) - 1
    assert batches == [[long, "x" * 75, "ü"]]


def test_many_captions_keep_their_order(folder):
    clip, _ = windows(folder)
    captions = [f"{'red ' * (50 + number)}zebra" for number in range(600)]
    expected = [len(caption) if number < 25 else 299 for number, caption in enumerate(captions)]
    assert clip.seen(captions) == expected


def test_what_a_window_keeps_does_not_depend_on_the_padding(folder):
    one, other = (load_clip_tokenizer(folder / "tokenizer", pad_id=pad_id) for pad_id in (None, 0))
    assert one.window_identity() == other.window_identity() and one.identity() != other.identity()
    lengths = {load_t5_tokenizer(folder / "tokenizer_3", length=length).window_identity() for length in (12, 13)}
    assert len(lengths) == 2


def test_without_downloads_nothing_is_asked_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(hub_id, **options):
        asked.append(options)
        raise OSError("not here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    places = TokenizerPlaces(beside=tmp_path, cache=tmp_path / "cache")
    with pytest.raises(ConfigError, match="was found on disk; put its files"):
        places.find(["tokenizer"], CLIP_L_HUB_ID, is_clip_folder, download=False)
    assert [options["local_files_only"] for options in asked] == [True] and not (tmp_path / "cache").exists()


@real_vocabularies
def test_published_vocabularies_see_up_to_the_cut():
    caption = "a photo of a naïve cat, ½ of it asleep " * 20
    for tokenizer in (load_clip_tokenizer(REAL / "clip", pad_id=None), load_t5_tokenizer(REAL / "t5", length=77)):
        (kept,) = tokenizer.seen([caption])
        assert 0 < kept < len(caption)
        full, cut = (tokenizer([text])[0][0].tolist() for text in (caption, caption[:kept]))
        assert full[:60] == cut[:60] and len(tokens(tokenizer, caption[:kept])) in (76, 77)


@real_vocabularies
def test_published_clip_vocabulary():
    ids, mask = load_clip_tokenizer(REAL / "clip", pad_id=None)(["a photo of a Cat"])
    assert ids[0][mask[0]].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (ids[0, 6:] == 49407).all()


@real_vocabularies
@pytest.mark.parametrize("caption", ["a photo of a cat", "  two   spaces, ½ naïve\nﬁne ", "猫", ""])
def test_published_t5_vocabulary(tmp_path, caption):
    sentencepiece = pytest.importorskip("sentencepiece")
    expected = sentencepiece.SentencePieceProcessor(model_file=str(REAL / "t5" / "spiece.model")).encode(caption)
    shutil.copy(REAL / "t5" / "spiece.model", tmp_path)
    for folder in (REAL / "t5", tmp_path):
        ids, mask = load_t5_tokenizer(folder, length=256)([caption])
        assert ids[0][mask[0]].tolist() == [*expected, 1]
        assert not ids[~mask].any()
