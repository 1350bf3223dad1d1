"""Every option that people know from sd-scripts is honoured, or refused with a reason; none silently ignored."""

from pathlib import Path

import pytest

from library.cli import refused_options
from library.config.caching import UNSUPPORTED as UNSUPPORTED_CACHING
from library.config.command_line import InvocationConfig
from library.config.data import UNSUPPORTED as UNSUPPORTED_DATA
from library.config.options import all_options, canonical_names
from library.config.run import training_groups
from library.config.unsupported import REASONS, RENAMED, refusals
from library.families import FAMILIES, family_options

KOHYA_OPTIONS = (Path(__file__).parents[1] / "data" / "kohya_options.txt").read_text().split()


def honoured(family):
    groups = training_groups(family_options(family), job="adapter")
    return set(canonical_names(all_options({"invocation": InvocationConfig, **groups})))


refused = refused_options


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", KOHYA_OPTIONS)
def test_every_known_option_is_honoured_or_refused(family, name):
    assert (name in honoured(family)) != (name in refused(family)), name


def test_the_list_is_whole():
    assert len(KOHYA_OPTIONS) == len(set(KOHYA_OPTIONS)) == 218


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_both_honoured_and_refused(family):
    assert not honoured(family) & set(refused(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_new_names_exist(family):
    assert set(RENAMED.values()) <= honoured(family) | set(family_options(family).UNSUPPORTED)


def test_a_new_name_that_the_family_refuses_is_not_advised():
    assert refused("sd")["flow_sigmoid_scale"] == refused("sd")["sigmoid_scale"]
    assert refused("sd3")["flow_sigmoid_scale"] == "is called --sigmoid_scale here"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_options_of_every_other_family_are_honoured_or_refused(family):
    for other in FAMILIES:
        module = family_options(other)
        names = canonical_names(all_options({"family": module.OPTIONS, **module.OBJECTIVE_GROUPS}))
        assert not set(names) - honoured(family) - set(refused(family)), other


@pytest.mark.parametrize("family", FAMILIES)
def test_reasons_are_sentences_that_go_on(family):
    for name, reason in refused(family).items():
        assert len(reason) > 15, name
        assert not reason.endswith("."), name
        assert "\n" not in reason, name


def test_no_option_is_refused_by_two_shared_tables():
    tables = (REASONS, UNSUPPORTED_DATA, UNSUPPORTED_CACHING, RENAMED)
    names = [name for table in tables for name in table]
    assert sorted(names) == sorted(set(names))


def test_the_familys_reason_goes_first():
    assert (
        refusals({"a": "shared"}, family="sd3", family_table={"a": "its own"})["a"] == "does nothing for sd3: its own"
    )
    assert refusals({"a": "shared"}, family="sd3", family_table={})["a"] == "is not supported: shared"
