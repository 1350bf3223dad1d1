import json

import pytest

from bench import swap_trace


@pytest.mark.parametrize("family", ["sd3", "sana"])
@pytest.mark.parametrize(
    ("job", "comes_home"),
    [(["--rank", "2", "--precision", "bf16"], False), (["--full", "--checkpointing"], True)],
    ids=["adapter", "full"],
)
def test_a_tiny_model_is_traced(family, job, comes_home, tmp_path, monkeypatch, capsys):
    out = tmp_path / "trace.json"
    words = ["--family", family, "--size", "tiny", "--resolution", "64", "--batch_size", "1"]
    words += ["--blocks_to_swap", "2", "--steps", "1", "--json", str(out), *job]
    monkeypatch.setattr("sys.argv", ["bench.swap_trace", *words])
    assert not swap_trace.main()
    told = json.loads(out.read_text())
    assert told["fetched_mib_per_step"] > 0
    assert (told["sent_home_mib_per_step"] > 0) is comes_home
    assert {turn["block"] for turn in told["turns"]} == {0, 1, 2, 3}
    shown = capsys.readouterr().out
    assert "turns in" in shown and "| on the device |" in shown


def test_more_blocks_than_there_are_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.swap_trace", "--family", "sana", "--blocks_to_swap", "5"])
    with pytest.raises(SystemExit):
        swap_trace.main()
    assert "5 of 4 blocks can't be swapped" in capsys.readouterr().err
