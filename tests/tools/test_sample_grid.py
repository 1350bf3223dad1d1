import pytest

from library.config.errors import ConfigError
from tools.sample_grid import arrange, readable


def test_rows_are_pictures_and_columns_are_moments(tmp_path):
    names = [
        f"my_run_{label}_{rest}.png" for label in ("e000000", "000010", "000020") for rest in ("00_5", "01_a_cat_7")
    ]
    for name in [*names, "my_run_000020_00_5_preview.png", "my_run_000020_100_8.png", "other.png"]:
        (tmp_path / name).touch()
    rows, labels = arrange(tmp_path, None, every=True)
    assert labels == ["e000000", "000010", "000020"]
    assert [[path.name for path in row] for row in rows] == [
        ["my_run_e000000_00_5.png", "my_run_000010_00_5.png", "my_run_000020_00_5.png"],
        ["my_run_e000000_01_a_cat_7.png", "my_run_000010_01_a_cat_7.png", "my_run_000020_01_a_cat_7.png"],
        ["my_run_000020_100_8.png"],
    ]
    rows, labels = arrange(tmp_path, "my_run", every=False)
    assert labels == ["e000000", "000020"] and [len(row) for row in rows] == [2, 2, 1]


def test_pictures_beside_the_average(tmp_path):
    for label in ("e000000", "000010", "000010_raw"):
        (tmp_path / f"my_run_{label}_00_5.png").touch()
    assert arrange(tmp_path, None, every=False)[1] == ["e000000", "000010"]
    (row,), labels = arrange(tmp_path, None, every=True)
    assert [path.name for path in row] == [f"my_run_{label}_00_5.png" for label in labels]
    assert [readable(label) for label in labels] == ["before training", "step 10", "step 10, not averaged"]


def test_several_runs(tmp_path):
    for run in ("a", "b"):
        (tmp_path / f"{run}_000010_00_5.png").touch()
    with pytest.raises(ConfigError, match="samples of several runs: a, b"):
        arrange(tmp_path, None, every=True)
    assert arrange(tmp_path, "b", every=True)[0] == [[tmp_path / "b_000010_00_5.png"]]
