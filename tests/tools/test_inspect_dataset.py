import base64
import json
import os
import re
import shutil
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from library.families import FAMILIES
from tools.inspect_dataset import main
from tools.miniature_tokenizers import CLIP_END, write_clip_tokenizer, write_t5_tokenizer

PHOTOS = Path(__file__).resolve().parents[2] / "examples" / "data" / "photos"
EVIL = "<script>alert(\"1\")</script> & <b>bold</b> 'quoted'"
VOID = {"meta", "img", "input", "br"}


class Page(HTMLParser):
    """What a page holds: its elements in order with their attributes, and all of its text."""

    def __init__(self, html):
        super().__init__()
        self.html, self.elements, self.open, self.text = html, [], [], []
        self.feed(html)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, tag, name=None):
        return [a for t, a in self.elements if t == tag and (name is None or name in (a.get("class") or "").split())]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    return folder


def picture(path, size=(64, 64), colour=0, caption="a cat", **options):
    image = Image.new(options.pop("mode", "RGB"), size, colour)
    image.putpixel((0, 0), tuple(min(255, len(path.stem) + row) for row in range(len(image.getbands()))))
    image.save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def toml(folder, subset="", dataset=""):
    path = folder.parent / "dataset.toml"
    path.write_text(
        f"[[datasets]]\nresolution = 64\nbatch_size = 2\nmin_bucket_reso = 32\nbucket_reso_steps = 32\n{dataset}\n"
        f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(folder))}\n{subset}\n"
    )
    return path


def inspect(folder, *options, subset="", dataset="", config=None):
    output = folder.parent / "page.html"
    config = config or toml(folder, subset, dataset)
    arguments = [
        "sd3",
        "--dataset_config",
        config,
        "--output",
        output,
        "--cache_dir",
        folder.parent / "cache",
        *options,
    ]
    assert main([str(argument) for argument in arguments]) == 0
    return Page(output.read_text(encoding="utf-8"))


def image_of(url):
    kind, _, data = url.partition(";base64,")
    assert kind.startswith("data:image/")
    return Image.open(BytesIO(base64.b64decode(data)))


def crop_of(page, number=0):
    (style,) = [a["style"] for a in page.all("i") if a.get("style", "").startswith("left")][number : number + 1]
    return [float(value) for value in re.findall(r":([\d.]+)%", style)]


# the page as a whole


def test_photos_become_one_page_that_needs_nothing_else(tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(PHOTOS, folder)
    before = sorted((path.name, path.read_bytes()) for path in folder.iterdir())
    page = inspect(folder, dataset="enable_bucket = true")
    assert len(page.all("article")) == 12 and "12 pictures to train on" in page.words
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "base")
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert "http" not in re.sub(r"data:image/[^\"]+", "", page.html) and "@import" not in page.html
    assert [a["src"] for a in page.all("img")] and max(image_of(page.all("img")[0]["src"]).size) <= 360
    assert sorted((path.name, path.read_bytes()) for path in folder.iterdir()) == before
    assert not (tmp_path / "cache").exists()


def test_whatever_names_and_captions_hold_is_text(folder):
    picture(folder / "a&b<i>.png", caption=EVIL)
    page = inspect(folder, subset=f"caption_prefix = {json.dumps(EVIL)}\nclass_tokens = '<u>x</u>'")
    assert len(page.all("script")) == 1 and not page.all("b", "bold") and not page.all("u")
    assert page.words.count("<b>bold</b> 'quoted'") == 3 and "a&b<i>.png" in page.words  # prefix twice, caption once
    assert page.all("article")[0]["data-text"].startswith("a&b<i>.png <script>")


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_name_that_is_no_text(folder):
    odd = os.fsencode(folder) + b"/\xff.png"
    picture(folder / "a.png")
    shutil.copy(folder / "a.png", odd)
    shutil.copy(folder / "a.txt", odd[:-4] + b".txt")
    assert len(inspect(folder).all("article")) == 2


def test_nothing_to_warn_of_is_said(folder):
    picture(folder / "a.png")
    page = inspect(folder)
    assert "Nothing to warn of." in page.words and not page.all("section", "remarks")


def test_warnings_come_first_and_lead_to_their_pictures(folder, capsys):
    picture(folder / "a.png")
    picture(folder / "small.png", (20, 20), caption="")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "broken.txt").write_text("x")
    page = inspect(folder)
    kinds = [a["data-kind"] for a in page.all("button") if "class" not in a]
    assert kinds == ["no caption", "enlarged"]
    remarks = page.html.index('class="remarks"')
    assert page.html.index("<h1>") < remarks < page.html.index('class="tiles"') < page.html.index("<article")
    assert "1 can't be read" in page.words and "broken.png: not a picture" in page.words
    by_name = {a["data-text"].split()[0]: a["data-kinds"] for a in page.all("article")}
    assert by_name == {"a.png": "|", "small.png": "|no caption|enlarged|"}
    chips = [a["data-kind"] for a in page.all("button", "chip")]
    assert chips == ["", "no caption", "enlarged"]
    out = capsys.readouterr().out
    assert "warning: 1 picture with an empty caption" in out and out.endswith("page.html: 2 of 2 pictures\n")


# pictures


def test_the_crop_box_lies_where_the_crop_is(folder):
    picture(folder / "wide.png", (256, 64))
    page = inspect(folder, dataset="enable_bucket = false")
    assert crop_of(page) == [37.5, 0.0, 25.0, 100.0]
    assert "256×64 → 64×64" in page.words
    page = inspect(folder, dataset="enable_bucket = false\ncrop_style = 'corner'")
    assert crop_of(page) == [0.0, 0.0, 25.0, 100.0]


def test_sizes_are_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(folder / "turned.jpg", (128, 32), exif=exif)
    page = inspect(folder)
    assert "32×128 → 32×128" in page.words
    assert image_of(page.all("img")[0]["src"]).size == (32, 128)


def test_every_bucket_is_drawn_in_its_shape_with_its_pictures(folder):
    for number, size in enumerate([(64, 64), (64, 64), (128, 32)]):
        picture(folder / f"{'p' * (number + 1)}.png", size)
    page = inspect(folder)
    shapes = [a["style"] for a in page.all("i") if a.get("style", "").startswith("width")]
    assert [shape.split(";--")[0] for shape in shapes] == ["width:38.0px;height:38.0px", "width:76.0px;height:19.0px"]
    assert [a["id"] for a in page.all("section", "shelf")] == ["d0-64x64", "d0-128x32"]
    assert {a["href"] for a in page.all("a", "shape")} == {"#d0-64x64", "#d0-128x32"}


def test_what_a_mask_leaves_out_is_tinted(folder):
    picture(folder / "a.png", (64, 64))
    masks = folder.parent / "masks"
    masks.mkdir()
    half = Image.new("L", (64, 64), 255)
    half.paste(0, (0, 0, 32, 64))
    half.save(masks / "a.png")
    page = inspect(folder, subset=f"conditioning_data_dir = {json.dumps(str(masks))}")
    tint = image_of(page.all("img", "mask")[0]["src"]).getchannel("A")
    assert tint.getpixel((8, 32)) == 128 and tint.getpixel((56, 32)) == 0
    assert "1 with a mask" in page.words and [a["name"] for a in page.all("input") if "name" in a] == ["crop", "mask"]


def test_transparency_is_laid_on_its_colour_and_may_be_the_mask(folder):
    picture(folder / "a.png", (64, 64), (0, 0, 255, 0), mode="RGBA")
    page = inspect(folder, subset="alpha_color = '#ff8000'\nalpha_mask = true")
    red, green, blue = image_of(page.all("img")[0]["src"]).convert("RGB").getpixel((32, 32))
    assert red > 240 and 110 < green < 146 and blue < 15
    assert image_of(page.all("img", "mask")[0]["src"]).getchannel("A").getpixel((32, 32)) == 128
    assert not inspect(folder, subset="alpha_color = '#ff8000'").all("img", "mask")


def test_copies_lead_to_each_other(folder):
    picture(folder / "a.png")
    shutil.copy(folder / "a.png", folder / "b.png")
    shutil.copy(folder / "a.txt", folder / "b.txt")
    page = inspect(folder)
    cards = [a["id"] for a in page.all("article")]
    links = [a["href"] for a in page.all("a") if "class" not in a]
    assert links == [f"#{cards[1]}", f"#{cards[0]}"]


def test_badges_say_how_a_picture_is_used(folder):
    for name in ("a", "bb", "ccc", "dddd"):
        picture(folder / f"{name}.png", (40, 64) if name == "a" else (64, 64), caption="x, y, z")
    page = inspect(folder, subset="flip_aug = true\nshuffle_caption = true\nrandom_crop = true\nvalidation_split = 0.3")
    badges = page.words
    assert "⇄" in badges and "caption varies" in badges and "crop moves" in badges
    assert badges.count("held out") >= 1
    held_out = re.findall(r"<article.*?</article>", page.html)
    (card,) = [card for card in held_out if ">held out<" in card]
    assert "⇄" not in card and "crop moves" not in card


def test_pictures_with_a_warning_are_shown_first_and_the_rest_is_counted(folder):
    for number in range(12):
        picture(folder / f"{'p' * (number + 1)}.png", (20, 20) if number == 9 else (64, 64))
    page = inspect(folder, "--pictures", "3")
    shown = [a["data-text"].split()[0] for a in page.all("article")]
    assert len(shown) == 3 and "pppppppppp.png" in shown and "p.png" in shown
    assert "9 more of this size; a larger --pictures shows them." in page.words


def test_a_picture_that_has_gone_says_so(folder, monkeypatch):
    picture(folder / "a.png")

    def gone(path):
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr("tools.inspection.thumbnails.read_bytes", gone)
    assert "No such file or directory" in inspect(folder).words


# captions


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    write_clip_tokenizer(folder / "tokenizer", pad_token=CLIP_END)
    write_t5_tokenizer(folder / "tokenizer_3")
    return folder


def test_what_encoders_do_not_read_is_struck_through(folder, tokenizers):
    picture(folder / "a.png", caption="a red cat " * 30)
    page = inspect(folder, "--tokenizer_dir", tokenizers, "--t5xxl_max_token_length", "80")
    assert [a["class"] for a in page.all("s")] == ["some", "all"]
    stops = [(a["class"], a["title"]) for a in page.all("span", "stop")]
    assert stops == [("stop some", "CLIP-L and CLIP-G read up to here"), ("stop all", "T5 reads up to here")]
    (first, second) = re.findall(r"<s class=[^>]*>(.*?)</s>", page.html)
    assert first.split() == ["a", "red", "cat", "a"] and len(second.split()) == 90 - 75 - 4
    assert "CLIP-L 77, CLIP-G 77, T5 80" in page.words and page.all("article")[0]["data-kinds"] == "|caption cut|"


def test_the_caption_is_the_one_of_the_first_visit(folder):
    picture(folder / "a.png", caption="one, two, three, four, five, six")
    page = inspect(folder, subset="shuffle_caption = true\nkeep_tokens = 1\ncaption_prefix = 'photo:'\n"
                                  "caption_dropout_rate = 1.0\ntoken_warmup_step = 100")  # fmt: skip
    (caption,) = re.findall(r'<p class="caption">(.*?)</p>', page.html)
    assert caption.startswith("photo: one, ") and sorted(caption[12:].split(", ")) == sorted(
        ["two", "three", "four", "five", "six"]
    )
    assert caption != "photo: one, two, three, four, five, six" and "caption_dropout_rate 1" in page.words


def test_without_a_caption_that_is_said(folder):
    picture(folder / "a.png", caption="")
    assert inspect(folder).all("p", "none")


def test_without_tokenizers_captions_are_whole_and_the_page_says_why(folder):
    picture(folder / "a.png", caption="a red cat " * 30)
    page = inspect(folder)
    assert "name the model, or its tokenizers with --tokenizer_dir" in page.words and not page.all("s")


# errors


def errors_of(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    return [line.removeprefix("error: ") for line in captured.err.splitlines()]


def test_mistakes_are_told_at_once(folder, capsys):
    errors = errors_of(capsys, "sd3", "--dataset_config", folder / "no.toml", "--picturess", "3", "--pictures", "0")
    assert [error.split(":")[0].split(";")[0] for error in errors] == [
        "unknown option --picturess",
        "--pictures",
        str(folder / "no.toml"),
        "--output is missing",
    ]
    assert "did you mean --pictures?" in errors[0]


def test_the_family_must_be_known(capsys):
    names = ", ".join(FAMILIES)
    assert errors_of(capsys, "sd9") == [f"the first word is the model family ({names}), not sd9"]
    assert errors_of(capsys) == [f"the first word is the model family ({names}), not nothing"]


def test_a_dataset_without_pictures_is_an_error(folder, capsys):
    (error,) = errors_of(capsys, "sd3", "--dataset_config", toml(folder), "--output", folder / "page.html")
    assert "no pictures" in error and not (folder / "page.html").exists()


def test_tokenizers_that_were_named_must_be_there(folder, capsys):
    picture(folder / "a.png")
    arguments = ["sd3", "--dataset_config", toml(folder), "--output", folder / "p.html", "--tokenizer_dir", folder]
    (error,) = errors_of(capsys, *arguments)
    assert error.startswith(f"--tokenizer_dir {folder} holds no tokenizer")


def test_a_page_that_cannot_be_written_is_an_error(folder, capsys):
    picture(folder / "a.png")
    (error,) = errors_of(capsys, "sd3", "--dataset_config", toml(folder), "--output", folder / "a.png" / "page.html")
    assert error.startswith(f"--output {folder / 'a.png' / 'page.html'}: can't be written")


def test_the_options_of_a_run_may_stay(folder, tmp_path):
    picture(folder / "a.png")
    (tmp_path / "run.toml").write_text("[network]\nnetwork_dim = 4\n[pictures]\nflip_aug = true\n")
    page = inspect(folder, "--config_file", tmp_path / "run.toml", "--max_train_epochs", "7", "--learning_rate", "1e-4")
    assert "⇄" in page.words and "7 epochs" in page.words


def test_help_and_version(capsys):
    assert main(["sd3", "--help"]) == 0 and main(["--version"]) == 0
    out = capsys.readouterr().out
    assert "--output FILE.html" in out and "--resolution SIZE" in out and "atelier " in out
