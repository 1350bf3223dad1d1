import json
import subprocess
import sys

import pytest

from library.config.captions import CaptionConfig
from library.config.data import UNSUPPORTED, DataConfig
from library.config.dataset import DatasetConfig
from library.config.errors import ConfigError
from library.config.pictures import (
    BUCKET_TABLES,
    Megapixels,
    PictureConfig,
    parse_colour,
    parse_factors,
    parse_resolution,
)
from library.records import Resolution
from tests.dataset_toml import read_with


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cats", "dogs", "reg"):
        (tmp_path / name).mkdir()
    return tmp_path


def read(folder, text, *, name="dataset.toml", **options):
    (folder / name).write_text(text, encoding="utf-8")
    return read_with(dataset_config=name, **options)


def problems_of(folder, text, **options):
    with pytest.raises(ConfigError) as caught:
        read(folder, text, **options)
    return str(caught.value).splitlines()


MINIMAL = """
[[datasets]]
resolution = 512
[[datasets.subsets]]
image_dir = "cats"
"""


def test_a_minimal_file_takes_the_rest_from_the_options(folder):
    (dataset,) = read(folder, MINIMAL, train_batch_size=3, dataset_repeats=4, shuffle_caption=True, flip_aug=True)
    assert dataset.resolution == Resolution(512, 512)
    assert (dataset.batch_size, dataset.enable_bucket, dataset.max_bucket_reso) == (3, True, 2048)
    (subset,) = dataset.subsets
    assert (subset.image_dir, subset.num_repeats, subset.shuffle_caption, subset.flip_aug) == ("cats", 4, True, True)
    assert (subset.caption_extension, subset.class_tokens, subset.is_reg) == (".txt", None, False)


def test_values_are_inherited_from_the_nearest_scope(folder):
    text = """
    [general]
    batch_size = 2
    num_repeats = 2
    shuffle_caption = false
    keep_tokens = 1
    resolution = [768, 512]
    class_tokens = "of general"
    [[datasets]]
    num_repeats = 3
    batch_size = 4
    [[datasets.subsets]]
    image_dir = "cats"
    num_repeats = 5
    class_tokens = "of the subset"
    [[datasets.subsets]]
    image_dir = "dogs"
    [[datasets]]
    [[datasets.subsets]]
    image_dir = "cats"
    """
    first, second = read(folder, text, shuffle_caption=True, keep_tokens=7, caption_prefix="typed")
    assert first.resolution == second.resolution == Resolution(768, 512)
    assert (first.batch_size, second.batch_size) == (4, 2)
    assert [subset.num_repeats for subset in (*first.subsets, *second.subsets)] == [5, 3, 2]
    assert [subset.class_tokens for subset in first.subsets] == ["of the subset", "of general"]
    assert not first.subsets[0].shuffle_caption  # false in the file goes before a typed switch
    assert first.subsets[0].keep_tokens == 1
    assert first.subsets[0].caption_prefix == "typed"


def test_whole_numbers_become_floats(folder):
    text = MINIMAL.replace("resolution = 512", "resolution = 512\nvalidation_split = 1\ncaption_dropout_rate = 0")
    (dataset,) = read(folder, text)
    assert isinstance(dataset.subsets[0].validation_split, float)
    assert isinstance(dataset.subsets[0].caption_dropout_rate, float)


def test_json_is_read_too(folder):
    document = {"datasets": [{"resolution": [512, 768], "subsets": [{"image_dir": "cats", "num_repeats": 2}]}]}
    (dataset,) = read(folder, json.dumps(document), name="dataset.json")
    assert dataset.resolution == Resolution(512, 768)
    with pytest.raises(ConfigError, match=r"dataset.json: not valid JSON: .*line 1"):
        read(folder, "{", name="dataset.json")


def test_all_mistakes_come_at_once_with_their_places(folder):
    text = """
    [general]
    batch_size = "4"
    bucket_steps = 64
    image_dir = "cats"
    [[datasets]]
    resolution = 512
    enable_bucket = 1
    is_reg = true
    [[datasets.subsets]]
    image_dir = "cats"
    [[datasets.subsets]]
    image_dir = "dogs"
    num_repeat = 3
    batch_size = 2
    cache_info = true
    [[datasets]]
    resolution = 500
    [[datasets.subsets]]
    image_dir = "nowhere"
    num_repeats = 0
    [[datasets.subsets]]
    num_repeats = 2
    caption_dropout_rate = 1.5
    keep_tokens = true
    [[datasets]]
    resolution = 512
    """
    assert problems_of(folder, text) == [
        "dataset.toml: general.batch_size: expected a whole number of at least 1, got '4'",
        "dataset.toml: general.bucket_steps: unknown key; did you mean bucket_reso_steps?",
        "dataset.toml: general.image_dir: belongs in [[datasets.subsets]]",
        "dataset.toml: datasets[0].subsets[1].num_repeat: unknown key; did you mean num_repeats?",
        "dataset.toml: datasets[0].subsets[1].batch_size: belongs in [general] or [[datasets]]",
        f"dataset.toml: datasets[0].subsets[1].cache_info: not supported: {UNSUPPORTED['cache_info']}",
        "dataset.toml: datasets[0].enable_bucket: expected true or false, got 1",
        "dataset.toml: datasets[0].is_reg: belongs in [[datasets.subsets]]",
        "dataset.toml: datasets[1].subsets[0].num_repeats: expected a whole number of at least 1, got 0",
        "dataset.toml: datasets[1].subsets[1].caption_dropout_rate: expected a number from 0 to 1, got 1.5",
        "dataset.toml: datasets[1].subsets[1].keep_tokens: expected a whole number of at least 0, got True",
        "dataset.toml: datasets[2]: no subset; add [[datasets.subsets]] with image_dir",
        f"dataset.toml: datasets[1].subsets[0].image_dir: nowhere: no such folder; relative paths start at {folder}",
        "dataset.toml: datasets[1].subsets[1].image_dir: missing; name the folder with the pictures",
    ]


def sizes(**values):
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
    return f'[[datasets]]\n{lines}\n[[datasets.subsets]]\nimage_dir = "cats"\n'


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({}, "resolution: missing; give the size of the pictures, such as 1024"),
        ({"resolution": 500}, "resolution: 500x500 is not a multiple of 16 on both sides; 496x496 is"),
        (
            {"resolution": [512, 500], "enable_bucket": False},
            "resolution: 512x500 is not a multiple of 16 on both sides",
        ),
        ({"resolution": 512, "bucket_reso_steps": 24}, "bucket_reso_steps: 24 is not a multiple of 16, which this"),
        ({"resolution": 512, "min_bucket_reso": 640}, "min_bucket_reso: 640 is above the short side of 512x512"),
        ({"resolution": [512, 768], "max_bucket_reso": 704}, "max_bucket_reso: 704 is below the long side of 512x768"),
        (
            {"resolution": 512, "min_bucket_reso": 600, "max_bucket_reso": 512},
            "min_bucket_reso: 600 is more than max_b",
        ),
        ({"resolution": 48, "bucket_no_upscale": True}, "resolution: 48x48 is smaller than one bucket step (64)"),
        ({"resolution": "big"}, "resolution: expected a size such as 1024 or 832,1216 (width,height), got 'big'"),
    ],
)
def test_sizes_that_cannot_work_are_refused(folder, values, problem):
    (line,) = problems_of(folder, sizes(**values))
    assert line.startswith(f"dataset.toml: datasets[0].{problem}")


def test_limits_of_buckets_are_rounded_to_whole_steps(folder):
    (dataset,) = read(folder, sizes(resolution=512, min_bucket_reso=300, max_bucket_reso=1000))
    assert (dataset.min_bucket_reso, dataset.max_bucket_reso) == (256, 1024)
    (dataset,) = read(folder, sizes(resolution=128, min_bucket_reso=10))
    assert dataset.min_bucket_reso == 64


def test_without_upscaling_the_limits_of_buckets_do_not_matter(folder):
    (dataset,) = read(folder, sizes(resolution=128, bucket_no_upscale=True))
    assert dataset.resolution == Resolution(128, 128)


def test_a_folder_twice_in_a_dataset_is_refused_and_across_datasets_allowed(folder):
    subset = '[[datasets.subsets]]\nimage_dir = "cats"\n'
    (line,) = problems_of(folder, f"[[datasets]]\nresolution = 512\n{subset}{subset.replace('cats', './cats/')}")
    assert line.startswith(
        "dataset.toml: datasets[0].subsets[1].image_dir: ./cats/ is the folder of dataset.toml: datas"
    )
    dataset = f"[[datasets]]\nresolution = 512\n{subset}"
    assert len(read(folder, dataset + dataset)) == 2


def test_regularisation_alone_is_refused(folder):
    assert problems_of(folder, MINIMAL + "is_reg = true") == [
        "dataset.toml: datasets[0]: all subsets are is_reg; add one with the pictures to learn"
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "dataset.toml: no dataset; add [[datasets]]"),
        ("[datasets]\nresolution = 512", "dataset.toml: datasets: expected a list of tables, each headed [[datasets]]"),
        ("datasets = [1]", "dataset.toml: datasets[0]: expected a table"),
        ("[[dataset]]\nresolution = 512", "dataset.toml: dataset: unknown key; did you mean datasets?"),
        ("general = 1\n" + MINIMAL, "dataset.toml: general: expected a table"),
        ("batch_size = 1\n" + MINIMAL, "dataset.toml: batch_size: belongs in [general] or [[datasets]]"),
        (
            "[[datasets]]\n[datasets.subsets]\n",
            "dataset.toml: datasets[0].subsets: expected a list of tables, each head",
        ),
    ],
)
def test_wrong_shapes_are_explained(folder, text, problem):
    assert problems_of(folder, text)[0].startswith(problem)


def test_errors_of_the_file_itself_name_it(folder):
    (line,) = problems_of(folder, "[general]\nbatch_size 4\n")
    assert line.startswith("dataset.toml: not valid TOML: ") and "line 2" in line
    with pytest.raises(ConfigError, match=r"absent.toml: no such file"):
        read_with(dataset_config="absent.toml")


def test_every_unsupported_key_is_refused_in_the_file(folder):
    for key, reason in UNSUPPORTED.items():
        (line,) = problems_of(folder, f"[general]\n{key} = true\n{MINIMAL}")
        assert line == f"dataset.toml: general.{key}: not supported: {reason}"


def test_unsupported_options_are_no_options():
    assert not set(UNSUPPORTED) & {*vars(DataConfig()), *vars(PictureConfig()), *vars(CaptionConfig())}


def test_named_folders_become_subsets(folder):
    for name in ("train/10_sks cat", "train/2", "train/.hidden", "reg/1_cat"):
        (folder / name).mkdir(parents=True)
    sizes = {"resolution": Resolution(512, 512), "train_batch_size": 2}
    (dataset,) = read_with(train_data_dir="train", reg_data_dir="reg", **sizes)
    assert dataset.batch_size == 2
    assert [(s.image_dir, s.num_repeats, s.class_tokens, s.is_reg) for s in dataset.subsets] == [
        ("train/10_sks cat", 10, "sks cat", False),
        ("train/2", 2, None, False),
        ("reg/1_cat", 1, "cat", True),
    ]


def test_folders_without_repeats_and_missing_ones_are_reported_together(folder):
    for name in ("train/cat", "train/0_dog"):
        (folder / name).mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        read_with(train_data_dir="train", reg_data_dir="absent")
    assert str(caught.value).splitlines() == [
        "--train_data_dir: folder 0_dog: its name must start with its repeats, such as 10_0_dog",
        "--train_data_dir: folder cat: its name must start with its repeats, such as 10_cat",
        "--reg_data_dir: absent: no such folder",
        "--resolution: missing; give the size of the pictures, such as 1024",
    ]


def test_a_run_needs_exactly_one_description(folder):
    with pytest.raises(ConfigError, match="no pictures to train on: give --dataset_config"):
        read_with()
    with pytest.raises(ConfigError, match="--reg_data_dir alone"):
        read_with(reg_data_dir="reg")
    assert problems_of(folder, MINIMAL, train_data_dir="cats") == [
        "--train_data_dir does nothing beside --dataset_config; remove one of the two"
    ]


def test_validation_reads_without_augmentation(folder):
    (dataset,) = read(
        folder,
        MINIMAL,
        flip_aug=True,
        shuffle_caption=True,
        caption_dropout_rate=0.5,
        caption_tag_dropout_rate=0.5,
        caption_dropout_every_n_epochs=2,
        token_warmup_step=5,
        caption_prefix="a photo of",
    )
    calm = dataset.without_augmentation().subsets[0]
    assert not calm.flip_aug and not calm.shuffle_caption and calm.caption_prefix == "a photo of"
    assert calm.caption_dropout_rate == calm.caption_tag_dropout_rate == calm.token_warmup_step == 0
    assert calm.caption_dropout_every_n_epochs == 0


@pytest.mark.parametrize("value", [512, "512", "512,512", "512 x 512", [512, 512], (512, 512), [512]])
def test_a_resolution_may_be_spelled_in_many_ways(value):
    assert parse_resolution(value) == Resolution(512, 512)


@pytest.mark.parametrize(
    "value", ["", "512,", "-1", "1,2,3", 0, True, [512, True], [1, 2, 3], None, "0,512", 0.0, -1.5]
)
def test_what_is_no_resolution_is_refused(value):
    with pytest.raises(ValueError, match="expected a size"):
        parse_resolution(value)


def test_width_comes_first():
    assert parse_resolution("512,768") == Resolution(width=512, height=768)


def test_an_extension_gets_its_dot(folder):
    (dataset,) = read(folder, MINIMAL + 'caption_extension = "caption"')
    assert dataset.subsets[0].caption_extension == ".caption"


def test_records_have_the_defaults_of_the_options():
    dataset = DatasetConfig(resolution=Resolution(512, 512), subsets=())
    assert dataset.batch_size == DataConfig().train_batch_size
    assert dataset.bucket_reso_steps == 64


def test_nothing_heavy_is_imported():
    code = (
        "import sys, library.config.dataset, library.data.buckets, library.data.captions, library.data.plan,"
        " library.data.discovery, library.data.file_index\n"
        "assert not {'torch', 'numpy', 'PIL', 'transformers', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def subset(**values):
    """A dataset file of 512 pixels whose only subset has these values."""
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items() if key != "image_dir")
    folder = values.get("image_dir", "cats")
    image_dir = "" if folder is None else f'image_dir = "{folder}"\n'
    return f"[[datasets]]\nresolution = 512\n[[datasets.subsets]]\n{image_dir}{lines}\n"


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"resolution": 512, "resolution_type": "area"}, "resolution: 512x512 with resolution_type area; megapixels"),
        ({"resolution": 1.0}, "resolution: 1.0 with resolution_type pixel_area; megapixels have a decimal point"),
        ({"resolution": 0.001, "resolution_type": "area"}, "resolution: 0.001 megapixels is smaller than one bucket"),
        ({"resolution": [512, 768], "resolution_type": "pixel"}, "resolution: 512x768 is not one short side"),
        (
            {"resolution": 512, "resolution_type": "pixel", "bucket_no_upscale": True},
            "bucket_no_upscale: works with resolution_type pixel_area alone",
        ),
        ({"bucket_table": "aspect_1024", "resolution": 512}, "bucket_table: aspect_1024 has pictures of 1024x1024"),
        ({"bucket_table": "aspect_1024", "enable_bucket": False}, "bucket_table: does nothing with enable_bucket = fa"),
        ({"bucket_table": "aspect_1024", "bucket_no_upscale": True}, "bucket_table: does nothing with bucket_no_upsc"),
        ({"bucket_table": "aspect_1024", "resolution_type": "pixel"}, "bucket_table: does nothing with resolution_ty"),
        ({"bucket_table": "aspect_1000"}, "bucket_table: expected one of aspect_256, "),
        ({"resolution": 512, "maximum_image_size": 512, "crop": True}, "maximum_image_size: goes together with target"),
        (
            {"resolution": 512, "maximum_image_size": 512, "target_downsample_size": 600, "crop": True},
            "target_downsample_size: 600 is above maximum_image_size 512",
        ),
        (
            {"resolution": 512, "maximum_image_size": 512, "target_downsample_size": 512},
            "maximum_image_size: does nothing without crop = true",
        ),
        ({"resolution": 512, "crop_aspect": "preserve"}, "crop_aspect: does nothing without crop = true"),
        ({"resolution": 512, "crop_aspect_buckets": [1.0]}, "crop_aspect_buckets: does nothing without crop = true"),
        ({"resolution": 512, "crop": True, "crop_aspect": "closest"}, "crop_aspect: closest needs crop_aspect_buckets"),
        ({"resolution": 512, "crop": True, "crop_aspect_buckets": [1.0]}, "crop_aspect_buckets: does nothing with cro"),
        ({"resolution": 512, "crop": True, "enable_bucket": False}, "crop: gives every picture the shape of crop_aspe"),
        ({"resolution": 512, "crop": True, "bucket_no_upscale": True}, "crop: gives every picture the shape of crop_a"),
        (
            {"bucket_table": "aspect_512", "crop": True},
            "crop: gives every picture the shape of crop_aspect; remove buc",
        ),
        (
            {"resolution": 512, "minimum_aspect_ratio": 2, "maximum_aspect_ratio": 1},
            "minimum_aspect_ratio: 2 is above maximum_aspect_ratio 1",
        ),
        ({"resolution": 512, "skip_image_resolution": 0.5}, "skip_image_resolution: expected a size in pixels"),
        ({"resolution": 512, "custom_attributes": {"other": True}}, "custom_attributes: expected a table with diff_ou"),
        ({"resolution": 512, "face_crop_aug_range": [3, 2]}, "face_crop_aug_range: expected two rising numbers"),
        ({"resolution": 512, "alpha_color": "greenish"}, "alpha_color: expected a colour such as white"),
    ],
)
def test_what_contradicts_itself_in_a_dataset_is_refused(folder, values, problem):
    table = "".join(f"{name} = {str(value).lower()}" for name, value in values.get("custom_attributes", {}).items())
    text = sizes(**{key: value for key, value in values.items() if key != "custom_attributes"})
    if table:
        text = text.replace("[[datasets.subsets]]", f"custom_attributes = {{ {table} }}\n[[datasets.subsets]]")
    (line,) = problems_of(folder, text)
    assert line.startswith(f"dataset.toml: datasets[0].{problem}")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"image_dir": None}, "image_dir: missing; name the folder with the pictures"),
        ({"metadata_file": "meta.jsonl"}, "metadata_file: meta.jsonl: no such file; relative paths start at"),
        ({"metadata_file": "folder.json"}, "metadata_file: folder.json: is a folder, not a file"),
        ({"metadata_file": "meta.xml"}, "metadata_file: meta.xml is none of json, jsonl, csv, parquet"),
        ({"conditioning_data_dir": "masks"}, "conditioning_data_dir: masks: no such folder"),
        ({"caption_strategy": "csv"}, "caption_strategy: csv needs a metadata_file of that kind, but there is no"),
        (
            {"caption_strategy": "csv", "metadata_file": "meta.json"},
            "caption_strategy: csv needs a metadata_file of that kind, but metadata_file is meta.json",
        ),
        ({"caption_strategy": "instanceprompt"}, "caption_strategy: instanceprompt needs class_tokens"),
        ({"filename_column": "name"}, "filename_column: does nothing without a metadata_file that is csv or parquet"),
        ({"unmasked_weight": 0.5}, "unmasked_weight: does nothing without masks"),
        ({"regularisation_weight": 0.5}, "regularisation_weight: does nothing without is_regularisation_data"),
        ({"random_crop": True, "face_crop_aug_range": [1, 2]}, "random_crop: excludes face_crop_aug_range"),
        ({"start_epoch": 2, "start_step": 5}, "start_step: excludes start_epoch; keep one"),
        ({"end_epoch": 2, "end_step": 5}, "end_step: excludes end_epoch; keep one"),
        ({"start_epoch": 3, "end_epoch": 2}, "end_epoch: 2 is before start_epoch 3"),
        ({"start_step": 3, "end_step": 2}, "end_step: 2 is before start_step 3"),
        ({"probability": 0}, "probability: expected a number from 0.0001 to 1, got 0"),
        ({"role": "validation"}, "role: belongs in [general] or [[datasets]]"),
    ],
)
def test_what_contradicts_itself_in_a_subset_is_refused(folder, values, problem):
    (folder / "folder.json").mkdir()
    for name in ("meta.xml", "meta.json"):
        (folder / name).write_text("{}")
    (line,) = problems_of(folder, subset(**values))
    assert line.startswith(f"dataset.toml: datasets[0].subsets[0].{problem}")


def test_both_kinds_of_regularisation_exclude_each_other(folder):
    text = subset(is_reg=True, is_regularisation_data=True) + '[[datasets.subsets]]\nimage_dir = "dogs"\n'
    (line,) = problems_of(folder, text)
    assert "subsets[0].is_reg: excludes is_regularisation_data" in line


def test_a_crop_style_and_random_crops_contradict_each_other(folder):
    text = subset(random_crop=True).replace("resolution = 512", 'resolution = 512\ncrop_style = "corner"')
    (line,) = problems_of(folder, text)
    assert line.startswith("dataset.toml: datasets[0].subsets[0].random_crop: crops anywhere, but crop_style corner")


def test_both_spellings_of_teaching_by_the_base_model_are_one(folder):
    (dataset,) = read(folder, subset(is_regularisation_data=True))
    assert dataset.subsets[0].is_regularisation_data
    text = MINIMAL + "custom_attributes = { diff_output_preservation = true }\n"
    (dataset,) = read(folder, text)
    assert dataset.subsets[0].is_regularisation_data
    (dataset,) = read(folder, text.replace("true", "false"))
    assert not dataset.subsets[0].is_regularisation_data


def test_what_is_disabled_is_not_even_looked_at(folder):
    text = MINIMAL + '[[datasets.subsets]]\nimage_dir = "nowhere"\ndisabled = true\n'
    (dataset,) = read(folder, text)
    assert [subset.image_dir for subset in dataset.subsets] == ["cats"]
    both = MINIMAL + "[[datasets]]\ndisabled = true\n[[datasets.subsets]]\nimage_dir = 'nowhere'\n"
    assert len(read(folder, both)) == 1
    assert problems_of(folder, subset(disabled=True)) == ["dataset.toml: every dataset is disabled; leave one on"]


def test_a_validation_dataset_is_one_and_cannot_be_alone(folder):
    validation = MINIMAL.replace("resolution = 512", 'resolution = 512\nrole = "validation"').replace("cats", "dogs")
    first, second = read(folder, MINIMAL + validation)
    assert (first.role, second.role) == ("train", "validation")
    (line,) = problems_of(folder, validation)
    assert line == 'dataset.toml: every dataset has role = "validation"; add one to train on'
    (line,) = problems_of(folder, MINIMAL + validation + "num_repeats = 3\n")
    assert line == (
        'dataset.toml: datasets[1].subsets[0].num_repeats: does nothing in a dataset with role = "validation"; '
        "remove it"
    )


def test_megapixels_become_the_nearest_square_of_whole_steps(folder):
    (dataset,) = read(folder, sizes(resolution=1.0, resolution_type="area"))
    assert dataset.resolution == Resolution(1024, 1024)
    (dataset,) = read(folder, sizes(resolution=0.25, resolution_type="area", bucket_reso_steps=32))
    assert dataset.resolution == Resolution(512, 512)
    assert isinstance(parse_resolution("0.5"), Megapixels)


@pytest.mark.parametrize("name", BUCKET_TABLES)
def test_a_bucket_table_says_the_resolution(folder, name):
    text = f'[[datasets]]\nbucket_table = "{name}"\n[[datasets.subsets]]\nimage_dir = "cats"\n'
    (dataset,) = read(folder, text)
    assert dataset.resolution == Resolution(BUCKET_TABLES[name], BUCKET_TABLES[name])


def test_a_bucket_table_must_fit_the_model(folder):
    (folder / "dataset.toml").write_text(sizes(bucket_table="aspect_256"))
    with pytest.raises(ConfigError, match="sides in aspect_256 are not all multiples of 32, as this model needs"):
        read_with(dataset_config="dataset.toml", resolution_step=32)
    (folder / "dataset.toml").write_text(sizes(bucket_table="aspect_512"))
    assert read_with(dataset_config="dataset.toml", resolution_step=32)


def test_a_list_of_captions_stands_for_a_dataset(folder):
    (folder / "meta.json").write_text("{}")
    (dataset,) = read_with(in_json="meta.json", train_data_dir="cats", resolution=Resolution(512, 512))
    (subset_,) = dataset.subsets
    assert (subset_.metadata_file, subset_.image_dir, subset_.captions_from) == ("meta.json", "cats", "json")
    with pytest.raises(ConfigError, match="--in_json does nothing beside --dataset_config"):
        read(folder, MINIMAL, in_json="meta.json")
    with pytest.raises(ConfigError, match="--reg_data_dir does nothing beside --in_json"):
        read_with(in_json="meta.json", reg_data_dir="reg", resolution=Resolution(512, 512))


def test_remote_folders_are_not_looked_for_here(folder):
    (dataset,) = read(folder, MINIMAL.replace('"cats"', '"s3://bucket/cats"'))
    assert dataset.subsets[0].image_dir == "s3://bucket/cats"


@pytest.mark.parametrize(("value", "colour"), [("White", "#ffffff"), ("gray", "#808080"), ("#FF8000", "#ff8000")])
def test_colours(value, colour):
    assert parse_colour(value) == colour


def test_factors_are_typed_with_a_comma():
    assert parse_factors("1.5,3") == (1.5, 3.0) == parse_factors([1.5, 3])
