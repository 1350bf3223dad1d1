"""A TOML with options: valid documents bent, and known options with any value."""

from hypothesis import example, given
from hypothesis import strategies as st

from bench.fuzz_targets import all_targets, run_toml
from library.cli import SCRIPTS
from library.config.options import all_options
from library.config.resolved import toml_value
from tests.fuzz.vocabulary import bent, examples, parses

NAMES = sorted(all_options(SCRIPTS["sd3_train_network"].groups))
VALUES = (
    st.sampled_from(
        [0, -1, 2**63, 10**400, 1e300, float("nan"), float("inf"), True, "", "a\x00b", "\x1b[31m", [], [[1]]]
    )
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
)


@given(data=bent(*all_targets()["run_toml"].seeds))
@example(data=b"a=" + b"{a=" * 50_000)
@examples(25)
def test_bent(data, tmp_path):
    parses(run_toml, data, tmp_path)


@given(values=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4))
@examples(30)
def test_any_value_of_known_options(values, tmp_path):
    text = "".join(f"{name} = {toml_value(value)}\n" for name, value in values.items())
    parses(run_toml, text.encode(), tmp_path)
