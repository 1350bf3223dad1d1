import json

import pytest

from bench import train_step
from bench.memory_options import described, given, table
from library.config.errors import ConfigError
from library.config.memory import MemoryConfig


@pytest.fixture(autouse=True)
def own_accelerator():
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.mark.parametrize("job", [["--rank", "2"], ["--full"]], ids=["adapter", "full"])
@pytest.mark.parametrize("family", ["sd3", "sana"])
def test_a_tiny_model_is_timed(family, job, tmp_path, monkeypatch):
    out = tmp_path / "step.json"
    words = ["--family", family, "--size", "tiny", "--resolution", "64", "--batch_size", "1", "--precision", "no"]
    words += ["--steps", "2", "--warmup", "1", "--plain", "--checkpointing", "off", "--json", str(out), *job]
    monkeypatch.setattr("sys.argv", ["bench.train_step", *words])
    assert not train_step.main()
    (row,) = json.loads(out.read_text())["rows"]
    assert row["seconds_per_step"] > 0 and row["ratio_to_plain"] > 0
    assert row["foreseen_to_counted"] == pytest.approx(1, abs=0.01)


def test_every_memory_option_makes_a_row_and_what_can_not_be_says_so(tmp_path, monkeypatch, capsys):
    words = ["--family", "sana", "--resolution", "64", "--batch_size", "1", "--steps", "1", "--warmup", "0"]
    words += ["--memory", "blocks_to_swap=2", "gradient_checkpointing=true", "--memory", "blocks_to_swap=9"]
    out = tmp_path / "step.json"
    monkeypatch.setattr("sys.argv", ["bench.train_step", *words, "--json", str(out)])
    assert not train_step.main()
    swapped, refused = json.loads(out.read_text())["rows"]
    assert swapped["memory"] == "gradient_checkpointing=True blocks_to_swap=2" and swapped["up_gib"] > 0
    assert refused["failed"] == "--blocks_to_swap 9: the model has 4 blocks; lower it"
    rows = train_step.markdown([swapped, refused], train_step.COLUMNS).splitlines()
    assert len(rows) == 4 and len({row.count("|") for row in rows}) == 1


def test_memory_options_are_read_by_name():
    assert given(["base_model_precision=int8", "gradient_checkpointing", "sdpa=false"]) == {
        "base_model_precision": "int8",
        "gradient_checkpointing": True,
        "sdpa": False,
    }
    for word, reason in (
        ("swap=1", "no such option"),
        ("base_model_precision=int9", "int8"),
        ("gradient_checkpointing=x", "true or false"),
    ):
        with pytest.raises(ConfigError, match=reason):
            given([word])
    assert described(MemoryConfig(blocks_to_swap=3)) == "blocks_to_swap=3" and described(MemoryConfig()) == "plain"


def test_every_row_of_the_table_can_be():
    rows = list(table(24, full=False))
    assert len({described(MemoryConfig(**row)) for row in rows}) == len(rows) >= 11
    assert {"blocks_to_swap": 12} in rows and {"base_model_precision": "nf4"} in rows
    assert not any("base_model_precision" in row for row in table(24, full=True))
