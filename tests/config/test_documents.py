import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.config.config_file import read_toml
from library.config.documents import count_values, parse_json, parse_toml, read_json, read_text
from library.config.errors import ConfigError
from library.config.resolved import toml_value

DEEP = {
    "lists": "a=" + "[" * 100_000,
    "tables": "a=" + "{a=" * 100_000,
    "the parts of a key": ".".join(["a"] * 1_000_000) + "=1",
    "the parts of a heading": "[" + ".".join(["a"] * 1_000_000) + "]",
    "a quoted key": ".".join(['"a.b"', "'c'"] * 1000) + "=1",
    "behind a comment": "# [ ' \" \n" * 1000 + "b=[" * 60,
}


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
def test_deep_toml_is_refused_before_it_is_parsed(text):
    started = time.process_time()
    with pytest.raises(ValueError, match=r"deep|parts"):
        parse_toml(text)
    assert time.process_time() - started < 20


def test_the_line_is_told(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("a = 1\n\nb = " + "[" * 60)
    with pytest.raises(
        ConfigError, match=r"run.toml: not valid TOML: tables or lists nested more than 50 deep \(at line 3"
    ):
        read_toml(path)


def test_brackets_in_texts_and_comments_are_no_nesting():
    brackets = "[{." * 100
    text = f'# {brackets}\na = "{brackets}\\" [" # {brackets}\nb = \'{brackets}\'\n'
    text += f'c = """{brackets}\n"" \\" {brackets}"""\n'
    text += f"d = '''\n{brackets} '' '''\n" + "".join(f"x{i} = [[1.5], {{y = 2.5}}]\n" for i in range(200))
    found = parse_toml(text)
    assert found["a"] == f'{brackets}" [' and len(found) == 204


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=5), st.text("[]{}.'\"#\\\n"))
def test_valid_toml_stays_valid(texts, mess):
    assert parse_toml(f"a = {toml_value([*texts, mess])}")["a"] == [*texts, mess]


def test_numbers_of_thousands_of_digits():
    for parse, text in ((parse_toml, "a = " + "9" * 5000), (parse_json, "[" + "9" * 5000 + "]")):
        with pytest.raises(ValueError, match="a number of thousands of digits"):
            parse(text)


def test_json_is_read_within_limits():
    assert parse_json('{"a": [1, 2.5, "x", null]}') == {"a": [1, 2.5, "x", None]}
    for text in ("[" * 100_000, '{"a":' * 100_000):
        with pytest.raises(ValueError, match="nested too deep"):
            parse_json(text)
    with pytest.raises(ValueError, match="NaN is not a number"):
        parse_json("[NaN]")
    assert parse_json("[Infinity]", constants=True) == [float("inf")]
    many = "[" + "1," * 600_000 + "1]"
    assert len(parse_json(many)) == 600_001
    with pytest.raises(ValueError, match="more than 1,000 values"):
        parse_json(many, most_values=1000)


def test_commas_in_texts_are_no_values():
    count_values('["' + ",[{:" * 1000 + '\\" , \\\\", 1]', 3)
    with pytest.raises(ValueError, match="more than 2 values"):
        count_values('["", 1, 2]', 2)


def test_no_more_is_read_than_may_be(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert read_text(tmp_path / "a.txt", 6) == "abc"
    with pytest.raises(ConfigError, match=r"a.txt: larger than the 5 bytes that a list may have"):
        read_text(tmp_path / "a.txt", 5, kind="a list")
    with pytest.raises(ConfigError, match="/dev/zero: larger than the 1 MiB"):
        read_text("/dev/zero", 1 << 20)
    with pytest.raises(ConfigError, match="can't be read"):
        read_text("a\x00b", 1)
    with pytest.raises(ConfigError, match=r"no.json: no such file"):
        read_json(tmp_path / "no.json")
