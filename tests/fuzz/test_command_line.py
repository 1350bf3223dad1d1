"""What is typed: any words, and known options with any value."""

from hypothesis import example, given
from hypothesis import strategies as st

from bench.fuzz_targets import command_line
from library.cli import SCRIPTS
from library.config.options import all_options
from tests.fuzz.vocabulary import examples, within_limits

NAMES = [f"--{name}" for name in sorted(all_options(SCRIPTS["sd3_train_network"].groups)) if name != "config_file"]
VALUES = st.text(max_size=8) | st.sampled_from(
    ["1" + "0" * 400, "1" * 5000, "nan", "-1e999", "\x00", "--", "-", "=", "٣"]
)
WORDS = st.sampled_from(NAMES) | VALUES | st.builds("{}={}".format, st.sampled_from(NAMES), VALUES)


@given(words=st.lists(WORDS, max_size=6))
@example(["--\x1b[31m\n"])
@example(["--" + "x" * 100_000])
@examples(40)
def test_any_words(words):
    within_limits(lambda: command_line(words))
