import json

import pytest

from bench import train_step


@pytest.mark.parametrize("job", [["--rank", "2"], ["--full"]], ids=["adapter", "full"])
@pytest.mark.parametrize("family", ["sd3", "sana"])
def test_a_tiny_model_is_timed(family, job, tmp_path, monkeypatch):
    out = tmp_path / "step.json"
    words = ["--family", family, "--size", "tiny", "--resolution", "64", "--batch_size", "1", "--precision", "no"]
    words += ["--steps", "2", "--warmup", "1", "--plain", "--checkpointing", "off", "--json", str(out), *job]
    monkeypatch.setattr("sys.argv", ["bench.train_step", *words])
    assert not train_step.main()
    assert "seconds_per_step" in json.dumps(json.loads(out.read_text()))
