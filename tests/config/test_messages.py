import pytest

from library.config.errors import ConfigError
from library.config.messages import holds_secret, name_shown, printable, shown, without_secrets


def test_a_message_steers_no_terminal_and_stays_on_its_lines():
    error = ConfigError("a \x1b[31mred\x07 name\u202e\nthe next line\x85")
    assert str(error) == "a \\x1b[31mred\\x07 name\\u202e\nthe next line\\x85"
    assert str(ConfigError("half \ud800")) == "half \\ud800"


def test_a_line_has_an_end():
    (line,) = str(ConfigError("x" * 5000)).split("\n")
    assert line == "x" * 1000 + "... (5,000 characters)"
    assert printable("x" * 20, longest=5) == "xxxxx... (20 characters)"


def test_usual_text_stays_as_it_is():
    for text in (
        "/home/ü/bild.png: 日本 'x' \"y\"\tz",
        "http://localhost:9000/a@b.png",
        "s3://bucket/a@b?c",
        "a@b.org",
    ):
        assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no answer from http://user:pass@host:9000/x", "no answer from http://***@host:9000/x"),
        ("s3://key:se/cr+et@bucket/x", "s3://***@bucket/x"),
        ("ftp://token@host", "ftp://***@host"),
        ("GET 'https://h/a.png?X-Amz-Signature=abc&x=1' failed", "GET 'https://h/a.png?***' failed"),
        ("two: http://a:b@c http://d:e@f", "two: http://***@c http://***@f"),
    ],
)
def test_logins_and_signatures_are_hidden(text, expected):
    assert without_secrets(text, {}) == expected
    assert holds_secret(text) and not holds_secret(expected.replace("***@", "").replace("?***", ""))


def test_secrets_of_the_environment_are_hidden():
    environment = {
        "AWS_SECRET_ACCESS_KEY": "verysecret",
        "HF_TOKEN": "hf_12345678",
        "HOME": "/home/me",
        "A_TOKEN": "on",
    }
    text = "verysecret hf_12345678 /home/me on"
    assert without_secrets(text, environment) == "*** *** /home/me on"


def test_values_are_shown_short():
    assert shown("plain") == "'plain'"
    assert shown([1, 2.5]) == "[1, 2.5]"
    assert shown("a\x1bü") == "'a\\x1b\\xfc'"
    assert shown("x" * 500).endswith("... (502 characters)") and len(shown("x" * 500)) < 160
    assert shown(1 << 100_000) == "a int that is too large to show"
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    assert shown(deep) == "a list that is too large to show"
    assert name_shown("a\nb") == "a\\nb"
