import pytest

from library.config.errors import ConfigError
from library.config.model import ModelConfig
from library.families import FAMILIES, family_files, family_options
from library.families.sd.parts import LAYOUT
from library.families.sd.sizes import clip_sizes, unet_sizes, vae_sizes
from library.families.searching import base_folder, search
from tests.families.sd3.published_files import write_sparse

READERS = {"denoiser": unet_sizes, "vae": vae_sizes, "clip": clip_sizes}


@pytest.mark.parametrize("name", FAMILIES)
def test_all_that_is_wrong_is_told_at_once(name, tmp_path):
    model = ModelConfig(vae=str(tmp_path / "no.safetensors"), tokenizer_dir=str(tmp_path / "nowhere"))
    base, vae, tokenizer = family_files(name).problems(model, family_options(name).OPTIONS())
    assert base.startswith("--pretrained_model_name_or_path is missing")
    assert vae == f"--vae: {tmp_path}/no.safetensors does not exist"
    assert tokenizer == f"--tokenizer_dir: {tmp_path}/nowhere is not a folder"


def test_a_part_that_the_user_named_is_told_with_its_option(tmp_path):
    vae = write_sparse(tmp_path / "vae.safetensors", {"decoder.mid.block_1.norm1.weight": (4,)})
    named = {"vae": str(vae)}
    found = search(LAYOUT, READERS, ModelConfig(pretrained_model_name_or_path=str(tmp_path / "no.ckpt")), named)
    assert found.at("vae") == f"--vae: {vae}" and found.sizes == {}
    assert found.wrong[-1].startswith(f"--vae: {vae} is incomplete")
    with pytest.raises(ConfigError, match=r"no\.ckpt does not exist\n--vae: "):
        found.checked()


def test_only_folders_in_diffusers_layout_count_as_one(tmp_path):
    (tmp_path / "model" / "unet").mkdir(parents=True)
    for path, folder in ((tmp_path / "model", tmp_path / "model"), (tmp_path, None), (tmp_path / "file.ckpt", None)):
        assert base_folder(LAYOUT, ModelConfig(pretrained_model_name_or_path=str(path))) == folder
