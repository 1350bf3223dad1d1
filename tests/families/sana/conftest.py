import pytest

from tests.tiny import TINY_SANA
from tools.miniature_sana import make_sana


@pytest.fixture(scope="session")
def sana_file(tmp_path_factory):
    """The tiny Sana in one file, with the tokenizer beside it."""
    return make_sana(tmp_path_factory.mktemp("sana"), sizes=TINY_SANA)


@pytest.fixture(scope="session")
def sana_folder(tmp_path_factory):
    """The tiny Sana in diffusers' layout."""
    return make_sana(tmp_path_factory.mktemp("sana-diffusers"), sizes=TINY_SANA, layout="diffusers")
