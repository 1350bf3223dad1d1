"""Which settings are picked, over a model whose memory and time are plain arithmetic."""

import dataclasses

import pytest

from bench.synthetic_run import Setting
from library.config.errors import ConfigError
from library.config.memory import MemoryConfig
from library.records import Resolution
from library.training.device_rates import Rates
from library.training.fit import fewest_swaps, fit
from library.training.forecast import STEP, Forecast
from library.training.trial import MicroBatchShape, Trial

BLOCKS, BLOCK, ACTIVATIONS = 20, 100, 60
RATES = Rates(operations=1.0, copied=10.0, title="plain arithmetic")
BITS = {"no_change": 1, "int8": 2, "fp8": 2, "nf4": 4}


def config(full=False, **given):
    made = Setting("sana", "tiny", 64, 1, None if full else 4, "no", MemoryConfig(**given)).config
    return dataclasses.replace(made, provenance={**made.provenance, **dict.fromkeys(given, "typed")})


def foresee(config):
    """Weights and activations of blocks; recomputation costs a third, and swapped blocks travel twice a step."""
    memory = config.memory
    block = BLOCK // BITS[memory.base_model_precision]
    swapped = memory.blocks_to_swap or 0
    kept = BLOCKS * ACTIVATIONS
    operations = 3000.0
    if memory.gradient_checkpointing:
        computed_again = len(range(0, BLOCKS, memory.gradient_checkpointing_interval))
        kept = (BLOCKS - computed_again) * ACTIVATIONS + ACTIVATIONS
        kept += 0 if memory.cpu_offload_checkpointing else computed_again * 5
        operations *= 1 + computed_again / BLOCKS / 3
    up = 2 * 1000 * swapped * block // BLOCK
    step = Trial((BLOCKS - swapped) * block + kept, {}, 0, operations, up, 0, 0, 0, 0)
    shape = MicroBatchShape(1, Resolution(64, 64))
    return Forecast(False, shape, 1, step, {STEP: step.peak}, {})


def picked(budget, *, config=None, streams=False):
    chosen = config or globals()["config"]()
    return fit(chosen, BLOCKS, budget, RATES, foresee, streams=streams)


def test_with_room_enough_nothing_is_changed():
    found = picked(BLOCKS * (BLOCK + ACTIVATIONS))
    assert found.pasted == "" and found.seconds == 3000


def test_more_memory_is_never_slower_and_everything_fits():
    times = []
    for budget in range(200, 3400, 100):
        try:
            found = picked(budget)
        except ConfigError:
            assert not times
            continue
        assert found.forecast.peak <= budget
        if "base_model_precision" not in found.values:
            times.append(found.seconds)
    assert len(times) > 25 and times == sorted(times, reverse=True)


def test_swapping_that_costs_nothing_goes_before_computing_again():
    found = picked(BLOCKS * (BLOCK + ACTIVATIONS) - 5 * BLOCK)
    assert found.pasted == "--blocks_to_swap 5" and found.seconds == 3000


def test_the_fewest_blocks_are_swapped():
    for budget in range(250, 2000, 350):
        for count in range(BLOCKS + 1):
            if foresee(config(gradient_checkpointing=True, blocks_to_swap=count)).peak <= budget:
                break
        chosen = config(gradient_checkpointing=True, gradient_checkpointing_interval=1, cpu_offload_checkpointing=False)
        assert picked(budget, config=chosen).values.get("blocks_to_swap", 0) == count


def test_results_change_only_where_nothing_else_fits():
    least = foresee(config(gradient_checkpointing=True, cpu_offload_checkpointing=True, blocks_to_swap=BLOCKS)).peak
    assert "base_model_precision" not in picked(least).values
    given = config(blocks_to_swap=0)
    found = picked(BLOCKS * BLOCK, config=given)
    assert found.values["base_model_precision"] == "int8"


def test_what_was_given_stays():
    given = config(gradient_checkpointing=True, base_model_precision="nf4")
    found = picked(2000, config=given)
    assert found.config.memory.gradient_checkpointing and found.config.memory.base_model_precision == "nf4"
    assert "base_model_precision" not in found.values
    given = config(gradient_checkpointing=False, blocks_to_swap=3)
    assert picked(3000, config=given).config.memory == given.memory
    with pytest.raises(ConfigError, match="nothing fits"):
        picked(1000, config=dataclasses.replace(given, network=None, full=config(full=True).full))


def test_nothing_fits_is_one_line_with_the_least_and_what_would_help():
    chosen = config(fit="1GiB")
    with pytest.raises(ConfigError) as told:
        picked(10, config=chosen)
    text = str(told.value)
    assert text.startswith("--fit 1GiB: nothing fits; the least is 0.00 GiB with --gradient_checkpointing")
    assert "Lower the resolution" in text and "\n" not in text


def test_automatic_swapping_takes_the_fewest_and_all_if_none_are_enough():
    chosen = config(blocks_to_swap="auto")
    whole = BLOCKS * (BLOCK + ACTIVATIONS)
    for budget, count in ((whole, 0), (whole - 1, 1), (whole - 7 * BLOCK, 7), (10, BLOCKS)):
        assert fewest_swaps(chosen, BLOCKS, budget, RATES, foresee).config.memory.blocks_to_swap == count


def test_chosen_values_say_so_in_the_resolved_configuration():
    found = picked(1000)
    assert all(found.config.provenance[name] == "derived: what fits" for name in found.values)
