"""What ``--dry_run`` tells beyond what needs no torch: what would be trained, from which state it would go on, and
what it would take.
"""

from collections.abc import Sequence

from library.config.run import RunConfig
from library.data.buckets import Placement
from library.data.report import DataReport
from library.families import create_family
from library.families.protocols import ModelFamily
from library.records import Sample
from library.training.before_start import dry_run_lines
from library.training.checks import check_run
from library.training.encoders import base_weights_signature
from library.training.jobs import job_of
from library.training.resume_from import Resumed, RunIsComplete, find_resumed
from library.training.resuming import changes_since
from library.training.setup import has_accelerator
from library.training.states import refuse_other_weights


def rehearsal(
    config: RunConfig, samples: Sequence[Sample], placements: Sequence[Placement], report: DataReport
) -> list[str]:
    """This checks all that a run checks before it loads anything, and says what it would do and take, in lines.

    Args:
        config: The run.
        samples: What it trains on.
        placements: One per sample.
        report: What is said about its data.

    Raises:
        ConfigError: All that is wrong, one line each.
    """
    family: ModelFamily = create_family(config.family_name, config)
    available = has_accelerator()
    trained = f"trained: {', '.join(check_run(config, family, accelerator_available=available))}"
    try:
        resumed = find_resumed(config)
    except RunIsComplete as told:
        return [trained, f"{told}; there would be nothing to do"]
    lines = [trained, *(_resume_lines(config, family, resumed) if resumed is not None else ())]
    return [*lines, *dry_run_lines(config, family, samples, placements, report, accelerator_available=available)]


def _resume_lines(config: RunConfig, family: ModelFamily, resumed: Resumed) -> list[str]:
    weights = {**family.identities(), **base_weights_signature(config)}
    changes = changes_since(config, resumed, weights=weights)
    refuse_other_weights(resumed.folder, job_of(config).rehearse(config, family))
    told = [f"resumed: {resumed.folder}, after step {resumed.step}"]
    return [*told, f"--resume_anyway: other than in that state: {', '.join(changes)}"] if changes else told
