"""Wrong pictures, captions, masks and lists: name -> how to make the dataset, then one text per printed line."""

import json

from PIL import Image

PHOTOS = ("camera", "chelsea", "clock_motion", "coffee")


def masks(w, **sizes):
    """A dataset whose pictures have masks of their own size, or of the one that is given; None: no mask."""
    folder = w.empty("masks")
    for stem in PHOTOS:
        with Image.open(w.trainer.photos / f"{stem}.png") as picture:
            size = sizes.get(stem, picture.size)
        if size is not None:
            Image.new("L", size, 255).save(folder / f"{stem}.png")
    return w.dataset(append=f"conditioning_data_dir = {json.dumps(str(folder))}\n")


def broken_mask(w):
    dataset = masks(w)
    (w.folder / "masks" / "coffee.png").write_bytes(b"")
    return dataset


def listed(w, content, name="list.json", *, image_dir=True):
    """A dataset of the pictures of a metadata file."""
    line = f"metadata_file = {json.dumps(str(w.file(content, name)))}\n"
    changes = () if image_dir else ((f"image_dir = {json.dumps(str(w.trainer.photos))}", ""),)
    return w.dataset(*changes, append=line)


def without_captions(w):
    for stem in PHOTOS[:2]:
        (w.trainer.photos / f"{stem}.txt").unlink()
    return w.dataset()


def in_sub_folder(w):
    folder = w.empty("outer")
    w.trainer.photos.rename(folder / "inner")
    return w.dataset((str(w.trainer.photos), str(folder)))


def latin_1(w):
    (w.trainer.photos / "camera.txt").write_bytes("un café".encode("latin-1"))
    return w.dataset()


CAPTION = '{"caption": "a photo"}'

DATA = {
    "captions are missing": (without_captions, "no class_tokens for 2 of 4 pictures: camera.png, chelsea.png. Write"),
    "a caption in another encoding": (latin_1, "camera.txt: byte 7 is not UTF-8; save the caption as UTF-8"),
    "captions of another ending": (
        lambda w: w.dataset(append="caption_extension = '.tags'"), "photos: no caption (.tags) and no class_tokens for",
    ),
    "a mask is missing": (
        lambda w: masks(w, coffee=None), "masks: no mask for 1 of 4 pictures: coffee.png. A mask is named like",
    ),
    "masks of another shape": (
        lambda w: masks(w, coffee=(400, 600), camera=(64, 10)),
        "masks: 2 masks of another shape than the picture: camera.png is 64x10, its picture 512x512, coffee.png is 400",
    ),
    "a broken mask": (
        broken_mask, "1 mask can't be read; repair or remove, or start with --skip_bad_images", "coffee.png: the file",
    ),
    "no folder of masks": (
        lambda w: w.dataset(append="conditioning_data_dir = 'no-masks'"), "conditioning_data_dir: no-masks: no such",
    ),
    "every picture is too small": (
        lambda w: w.dataset(("batch_size = 2", "batch_size = 2\nminimum_image_size = 5000")),
        "photos: none of 4 pictures is used in datasets[0]: 4 left out by minimum_image_size 5000",
    ),
    "every picture has another shape": (
        lambda w: w.dataset(("batch_size = 2", "batch_size = 2\nmaximum_aspect_ratio = 0.1")),
        "photos: none of 4 pictures is used in datasets[0]: 4 left out by maximum_aspect_ratio 0.1",
    ),
    "pictures in a sub-folder": (
        in_sub_folder, "in this folder; recursive = true reads 4 pictures in its sub-folders",
    ),
    "no list": (lambda w: w.dataset(append="metadata_file = 'no.json'"), "metadata_file: no.json: no such file"),
    "a list of an unknown kind": (lambda w: listed(w, "", "list.yaml"), "list.yaml is none of json, jsonl, csv,"),
    "a list that is no JSON": (lambda w: listed(w, "{'a': 1}"), "list.json: line 1: not valid JSON"),
    "an empty list": (lambda w: listed(w, "{}"), "list.json: lists no pictures"),
    "a list in another encoding": (lambda w: listed(w, b'{"caf\xe9": {}}'), "list.json: line 1: byte 6 is not UTF-8"),
    "a list of other pictures": (
        lambda w: listed(w, f'{{"coffee.png": {CAPTION}, "tea.png": {CAPTION}, "milk": {CAPTION}}}'),
        "list.json: 2 of 3 pictures not found in ",
    ),
    "a list without a folder": (
        lambda w: listed(w, f'{{"coffee.png": {CAPTION}}}', image_dir=False),
        "list.json: 1 relative name of pictures without image_dir, the folder where they start: coffee.png",
    ),
    "a list without captions": (
        lambda w: listed(w, '{"coffee.png": {}}'), "and no class_tokens for 1 of 1 picture: coffee.png. Write captions",
    ),
    "a line of a list that is none": (
        lambda w: listed(w, '{"file_name": "coffee.png", "text": "x"}\n{"file_name": 3}\n', "list.jsonl"), "line 2: ",
    ),
    "a table without names": (
        lambda w: listed(w, "picture;text\ncoffee.png;a cup\n", "list.csv"), "no column for the picture (file_name, ",
    ),
}  # fmt: skip


def no_text(w):
    (w.trainer.photos / "coffee.txt").write_text(" \n")
    return w.dataset()


def one_stem(w):
    with Image.open(w.trainer.photos / "coffee.png") as picture:
        picture.convert("RGB").save(w.trainer.photos / "coffee.jpg")
    return w.dataset()


def extra_mask(w):
    dataset = masks(w)
    Image.new("L", (8, 8)).save(w.folder / "masks" / "tea.png")
    return dataset


def copied(w):
    (w.trainer.photos / "cup.png").write_bytes((w.trainer.photos / "coffee.png").read_bytes())
    (w.trainer.photos / "cup.txt").write_text("a cup")
    return w.dataset()


NOTED = {
    "a caption without text": (no_text, "1 caption file without text, used as an empty caption"),
    "two pictures of one stem": (
        one_stem,
        "1 caption file used for several pictures of the same name, first for coffee",
    ),
    "a mask of another size": (lambda w: masks(w, camera=(64, 64)), "datasets[0]: 4 pictures"),
    "a mask of no picture": (extra_mask, "masks: 1 mask of no picture: tea.png"),
    "a picture twice": (copied, "2 pictures have the same content as others"),
}
"""Not wrong, but told: name -> how to make the dataset, and what a dry run prints."""
