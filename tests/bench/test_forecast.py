import sys

import pytest

from bench import forecast


def test_each_choice_of_options_is_a_row(monkeypatch, capsys):
    rows = ["--memory", "--memory", "gradient_checkpointing=true"]
    monkeypatch.setattr(sys, "argv", ["forecast", "--size", "sana-0.6b", "--resolution", "256", *rows])
    assert forecast.main() == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[0] for line in lines] == ["plain", "gradient_checkpointing=True"]
    plain, recomputed = ([float(number) for number in line[1:]] for line in lines)
    assert recomputed[0] < plain[0] and recomputed[1] > plain[1] and plain[2:] == [0, 0, 0]


def test_an_unknown_size_or_option_is_refused(monkeypatch, capsys):
    for words, told in ((["--size", "sd9"], "no size sd9"), (["--memory", "x=1"], "--memory x=1: no such option")):
        monkeypatch.setattr(sys, "argv", ["forecast", *words])
        with pytest.raises(SystemExit):
            forecast.main()
        assert told in capsys.readouterr().err
