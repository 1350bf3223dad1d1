import json

import pytest

from bench import swap_trace


@pytest.mark.parametrize(
    ("job", "comes_home"),
    [(["--rank", "2"], False), (["--full", "--checkpointing"], True)],
    ids=["adapter", "full"],
)
def test_a_tiny_model_is_traced(job, comes_home, tmp_path, monkeypatch, capsys):
    out = tmp_path / "trace.json"
    words = ["--family", "sana", "--size", "tiny", "--resolution", "64", "--batch_size", "1"]
    words += ["--blocks_to_swap", "2", "--steps", "2", "--json", str(out), *job]
    monkeypatch.setattr("sys.argv", ["bench.swap_trace", *words])
    assert not swap_trace.main()
    told = json.loads(out.read_text())
    assert told["fetched_mib_per_step"] > 0
    assert (told["sent_home_mib_per_step"] > 0) is comes_home
    assert {turn["block"] for turn in told["turns"]} == {0, 1, 2, 3}
    shown = capsys.readouterr().out
    assert "take turns in" in shown and "| on the device |" in shown


def test_more_blocks_than_there_are_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.swap_trace", "--family", "sana", "--blocks_to_swap", "5"])
    with pytest.raises(SystemExit):
        swap_trace.main()
    assert "the model has 4 blocks" in capsys.readouterr().err
