import pytest

from tests.tiny import TINY_SD3
from tools.miniature_sd3 import make_sd3


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The tiny SD3 in diffusers' layout."""
    return make_sd3(tmp_path_factory.mktemp("sd3-diffusers"), sizes=TINY_SD3, layout="diffusers")
