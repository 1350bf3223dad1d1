import contextlib
import json
import logging

import pytest
from accelerate import Accelerator
from PIL import Image

from library.data.store import PackedStore
from library.data.store_care import StoreCare
from library.training import upkeep
from tools.cache import main
from tools.cache_commands import DAMAGED

KEPT = ("cache_latents_to_disk", "cache_text_encoder_outputs_to_disk")
ON_DISK = {**dict.fromkeys(KEPT, True), "network_train_unet_only": True}


def cache(*words):
    """The tool, in this process; the exit code."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    try:
        return main([str(word) for word in words])
    finally:
        logging.getLogger().handlers.clear()


@pytest.fixture
def fill(trainer):
    def fill(output, **options):
        return cache("fill", "sd3", *trainer.arguments(output, **{**ON_DISK, **options}))

    return fill


def held(place):
    """Store -> the keys of its entries."""
    found = {}
    for name in ("latents", "masks", "text"):
        store = StoreCare(f"{place}/{name}")
        found[name] = {key for shard, size in store.shards().items() for key in store._entries(shard, size)}
    return found


def configuration(trainer, name, **options):
    """A file for ``--config_file``."""
    words = trainer.arguments(name, **{**ON_DISK, **options})
    lines, values = [], {}
    for word in words:
        if word.startswith("--"):
            values[word.removeprefix("--")] = True
            last = word.removeprefix("--")
        else:
            values[last] = word
    for option, value in values.items():
        if value is not True:
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        lines.append(f"{option} = {json.dumps(value)}")
    path = trainer.folder / f"{name}.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


# fill


def test_a_run_after_filling_encodes_nothing(trainer, fill, capfd):
    assert fill("out") == 0
    printed = capfd.readouterr().out.splitlines()
    folder = trainer.folder / "out" / "cache"
    assert [line.split(":")[0] for line in printed] == [f"{folder}/latents", f"{folder}/text"]
    assert "4 entries added in" in printed[0] and "per second; it holds 4, " in printed[0]
    assert "5 entries added in" in printed[1]  # four captions and the empty one
    before = held(folder)
    assert {name: len(keys) for name, keys in before.items()} == {"latents": 4, "masks": 0, "text": 5}
    assert not (trainer.folder / "out" / "run.safetensors").exists()
    assert trainer("out", **ON_DISK) == 0
    log = capfd.readouterr().err
    assert "loading the VAE" not in log and "loading the text encoders" not in log
    assert held(folder) == before
    assert fill("out") == 0
    assert "latents: 0 entries added; it holds 4, " in capfd.readouterr().out


def test_only_what_is_kept_on_disk_is_filled(trainer, fill, capfd):
    assert fill("out", cache_latents_to_disk=None, cache_latents=True) == 0
    assert "loading the VAE" not in capfd.readouterr().err
    assert {name: len(keys) for name, keys in held(trainer.folder / "out" / "cache").items()} == {
        "latents": 0, "masks": 0, "text": 5,
    }  # fmt: skip
    assert fill("out", cache_text_encoder_outputs_to_disk=None) == 0
    assert "loading the text encoders" not in capfd.readouterr().err
    assert len(held(trainer.folder / "out" / "cache")["latents"]) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict.fromkeys(KEPT),
            "error: nothing would be kept: add --cache_latents_to_disk, --cache_text_encoder_outputs_to_disk, or both",
        ),
        ({"network_dimm": 4}, "error: unknown option --network_dimm; did you mean --network_dim?"),
        ({"config_file": "nowhere.toml"}, "error: --config_file nowhere.toml"),
    ],
)
def test_what_is_wrong_with_the_options_is_one_line(fill, capfd, options, message):
    assert fill("out", **options) == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line.startswith(message) for line in lines] == [True], lines


def test_filling_only_checked(trainer, fill, capfd):
    assert fill("out", dry_run=True) == 0
    assert capfd.readouterr().out == "the options are right; nothing was encoded (--dry_run)\n"
    assert not (trainer.folder / "out").exists()


def test_help_lists_the_options_of_the_script(capsys):
    assert cache("fill", "sd3", "--help") == 0
    printed = capsys.readouterr().out
    assert (
        "usage: python -m tools.cache fill sd3_train_network --option value ..." in printed
        and "--[no-]cache_latents_to_disk" in printed
    )


def test_a_cache_in_a_bucket(trainer, fill, s3_bucket, capfd):
    url = f"{s3_bucket}/cache"
    assert fill("out", cache_dir=url) == 0
    assert f"{url}/latents: 4 entries added" in capfd.readouterr().out
    assert cache("sizes", url) == 0 and cache("verify", url) == 0
    assert "latents              4" in capfd.readouterr().out
    assert trainer("elsewhere", cache_dir=url, max_data_loader_n_workers=2, **ON_DISK) == 0  # as on another machine
    assert "loading the VAE" not in capfd.readouterr().err
    assert trainer("local", **ON_DISK) == 0
    assert trainer.losses("elsewhere") == trainer.losses("local")
    folder = trainer.folder / "elsewhere"
    assert cache("gc", "--delete", folder / "run-run.toml") == 0
    assert capfd.readouterr().out.splitlines()[-1] == "0 bytes deleted"
    assert not list(folder.rglob("cache/**/*.safetensors"))


# sizes and verify


@pytest.fixture
def filled(fill, trainer, capfd):
    assert fill("out") == 0
    capfd.readouterr()
    return trainer.folder / "out" / "cache"


def test_sizes(filled, capfd):
    assert cache("sizes", filled) == 0
    rows = [line.split() for line in capfd.readouterr().out.splitlines()]
    sizes = {n: sum(p.stat().st_size for p in (filled / n).glob("*.safetensors")) for n in ("latents", "text")}
    assert rows[0] == ["entries", "size", "shards"]
    assert rows[1] == ["latents", "4", *f"{sizes['latents'] / 1024:.1f} KiB".split(), "1"]
    assert rows[2][:2] == ["text", "5"]
    assert rows[3][:3] == ["in", "all", "9"]


def test_one_store_can_be_looked_at_too(filled, capfd):
    assert cache("sizes", filled / "text") == 0
    assert capfd.readouterr().out.splitlines()[1].split()[:2] == ["text", "5"]


@pytest.mark.parametrize("command", ["sizes", "verify"])
def test_a_folder_without_a_cache(tmp_path, capfd, command):
    assert cache(command, tmp_path / "nothing") == 2
    assert capfd.readouterr().err == (
        f"error: {tmp_path}/nothing holds no cache: no shard lies in it, nor below it in latents, masks, text\n"
    )


def test_damage_is_named_and_removed(filled, trainer, capfd):
    assert cache("verify", filled) == 0
    assert capfd.readouterr().out == f"{filled} is intact\n"
    (shard,) = (filled / "latents").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    before = held(filled)
    for words, ending in ((), "add --remove, and they are encoded again"), (
        ("--remove",), "removed; the next run encodes them again",
    ):  # fmt: skip
        assert cache("verify", filled, *words) == DAMAGED
        first, last = capfd.readouterr().out.splitlines()
        assert first.startswith(f"{filled}/latents: {shard.name}, entry ")
        assert first.endswith(": its bytes are not those that were written")
        assert last == f"1 damaged entries or shards in {filled}: {ending}"
    assert cache("verify", filled) == 0
    after = held(filled)
    assert after["text"] == before["text"] and len(before["latents"] - after["latents"]) == 1
    assert trainer("out", **ON_DISK) == 0
    assert held(filled) == before


# gc


def test_what_no_run_uses_goes(trainer, capfd):
    assert trainer("first", **ON_DISK) == 0
    folder = trainer.folder / "first" / "cache"
    used = held(folder)
    other = trainer.dataset(subset='caption_prefix = "photo of "').read_text().replace("= 64", "= 128")
    (trainer.folder / "other.toml").write_text(other)
    options = {**ON_DISK, "dataset_config": trainer.folder / "other.toml", "cache_dir": folder}
    assert trainer("second", **options) == 0
    everything = held(folder)
    assert {name: len(keys) for name, keys in everything.items()} == {"latents": 8, "masks": 0, "text": 9}
    first, second = (trainer.folder / name / "run-run.toml" for name in ("first", "second"))
    capfd.readouterr()

    assert cache("gc", first, second) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "nothing was changed; --delete frees 0 bytes"
    assert cache("gc", first) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith(f"{folder}/latents: 4 entries that none of these runs uses, ")
    assert lines[-2].startswith(f"{folder}/text: 4 entries that none of these runs uses, ")
    assert lines[-1].startswith("nothing was changed; --delete frees ")
    assert held(folder) == everything

    assert cache("gc", first, "--delete") == 0
    assert capfd.readouterr().out.splitlines()[-1].endswith(" deleted")
    assert held(folder) == used
    with PackedStore(folder / "latents") as store:
        assert store.missing(used["latents"]) == []
        assert len(store.missing(everything["latents"])) == 4
    assert trainer("first", **ON_DISK) == 0
    assert "loading the" not in capfd.readouterr().err.replace("loading the denoiser", "")


def test_the_cache_of_a_full_fine_tune(sana_trainer, capfd):
    options = {**dict.fromkeys(KEPT, True), "save_parts": ["vae"], "save_model_as": "diffusers"}
    assert cache("fill", "sana_train", *sana_trainer.arguments("out", **options)) == 0
    assert "loading the VAE" in capfd.readouterr().err
    assert sana_trainer("out", **options) == 0
    assert "loading the" not in capfd.readouterr().err
    before = held(sana_trainer.folder / "out" / "cache")
    assert cache("gc", "--delete", sana_trainer.folder / "out" / "run-run.toml") == 0
    assert held(sana_trainer.folder / "out" / "cache") == before and before["text"]


def test_everything_that_a_run_may_ask_for_is_kept(trainer, fill, capfd, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for picture in trainer.photos.glob("*.png"):
        Image.new("L", Image.open(picture).size, 128).save(masks / picture.name)
    (tmp_path / "prompts.txt").write_text("a red ball --n a blue ball --w 64 --h 64\n")
    options = {
        "dataset_config": trainer.dataset(
            subset=f"flip_aug = true\nconditioning_data_dir = {json.dumps(str(masks))}\n"
            "shuffle_caption = true\nvalidation_split = 0.3"
        ),
        "caption_variants": 3,
        "sample_prompts": tmp_path / "prompts.txt",
        "sample_every_n_steps": 2,
    }
    for seed in range(1, 5):  # each may hold out another picture, which isn't mirrored
        assert fill("out", **options, seed=seed) == 0
    before = held(trainer.folder / "out" / "cache")
    assert all(before.values()) and len(before["latents"]) == 8
    path = configuration(trainer, "out", **options, seed=None)
    capfd.readouterr()
    assert cache("gc", "--family", "sd3", "--delete", path) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "0 bytes deleted"
    assert held(trainer.folder / "out" / "cache") == before


def test_what_another_machine_computes_in_another_type_is_kept(trainer, fill, capfd):
    assert fill("out", mixed_precision="fp16") == 0  # there is no GPU here: it computes in fp32
    folder = trainer.folder / "out" / "cache"
    before = held(folder)
    assert cache("gc", "--family", "sd3", "--delete", configuration(trainer, "out", mixed_precision="fp16")) == 0
    assert held(folder) == before
    with pytest.MonkeyPatch.context() as patch:  # the CPU stands in for a GPU, which computes in fp16
        patch.setattr(upkeep, "has_accelerator", lambda: True)
        patch.setattr(upkeep, "start_accelerator", lambda config, precision: Accelerator())
        assert fill("out", mixed_precision="fp16") == 0
    everything = held(folder)
    assert {name: len(keys) for name, keys in everything.items()} == {"latents": 8, "masks": 0, "text": 10}
    assert cache("gc", "--family", "sd3", "--delete", configuration(trainer, "out", mixed_precision="fp16")) == 0
    assert held(folder) == everything


def test_a_run_that_keeps_nothing_on_disk_uses_nothing(trainer, filled, capfd):
    path = configuration(trainer, "out", **dict.fromkeys(KEPT), cache_latents=True)
    assert cache("gc", "--family", "sd3", path) == 0
    lines = capfd.readouterr().out.splitlines()
    assert "4 entries that none of these runs uses" in lines[0] and "5 entries" in lines[-2]
    assert all(held(filled)[name] for name in ("latents", "text"))


def test_a_configuration_that_does_not_say_its_family(trainer, capfd):
    path = configuration(trainer, "out")
    assert cache("gc", path) == 2
    assert capfd.readouterr().err.startswith(f"error: {path} doesn't say its model family; add --family ")


def test_a_run_whose_data_are_gone_deletes_nothing(trainer, filled, capfd):
    path = configuration(trainer, "out", dataset_config="gone.toml")
    before = held(filled)
    assert cache("gc", "--family", "sd3", "--delete", path) == 2
    errors = capfd.readouterr().err.splitlines()
    assert errors and all(line.startswith("error: ") for line in errors) and "gone.toml" in errors[0]
    assert cache("gc", "--delete", trainer.folder / "nowhere.toml") == 2
    assert capfd.readouterr().err == f"error: {trainer.folder}/nowhere.toml: no such file\n"
    assert held(filled) == before


def test_the_state_that_a_run_was_resumed_from_may_be_gone(trainer, filled, capfd):
    path = configuration(trainer, "out", resume=trainer.folder / "out" / "gone-state")
    assert cache("gc", "--family", "sd3", path) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "nothing was changed; --delete frees 0 bytes"


def test_interrupting(monkeypatch, filled, capfd):
    def interrupted(self, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(StoreCare, "damages", interrupted)
    assert cache("verify", filled) == 130
    assert capfd.readouterr().err == "interrupted; what was done so far is kept\n"
