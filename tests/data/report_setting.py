"""Hand-made data for tests of the report."""

from library.config.dataset import DatasetConfig, SubsetConfig
from library.config.options import build
from library.config.run import make_run_config, training_groups
from library.data.buckets import place_all
from library.data.discovery import Discovery
from library.data.plan import BatchPlan
from library.data.report import report_data
from library.families import family_options
from library.records import LatentFormat, Resolution, Sample

LATENTS = LatentFormat(channels=4, stride=8, patch=2, scale=1.0, shift=0.0)
SQUARE, WIDE, SMALL = Resolution(64, 64), Resolution(128, 32), Resolution(16, 16)


def dataset(*subsets, **settings):
    defaults = {"resolution": SQUARE, "batch_size": 2, "min_bucket_reso": 32, "bucket_reso_steps": 32}
    return DatasetConfig(**{**defaults, **settings}, subsets=subsets or (subset(),))


def subset(**settings):
    return SubsetConfig(image_dir="pictures", **settings)


def samples(*sizes, number=0, position=0, start=0, **fields):
    made = []
    for row, size in enumerate(sizes, start):
        key = f"{number}/{position}/{row}.png"
        defaults = {"path": f"pictures/{row}.png", "content": f"content of {key}", "captions": (f"picture {row}",)}
        made.append(Sample(key=key, size=size, dataset=number, subset=position, **{**defaults, **fields}))
    return tuple(made)


def run(*datasets, **options):
    groups = training_groups(family_options("sd3"), job="adapter")
    built = build(groups, {}, {"max_train_steps": 10, **options})
    assert not built.problems
    return make_run_config("sd3", "test.py", built.groups, built.provenance, datasets)


def report(config, found, *, validation=(), micro_batches_per_step=1, windows=None, index=None, **discovery):
    empty = {"skipped": (), "duplicates": (), "near_duplicates": (), "notes": ()}
    placements, held_out = (place_all(group, config.datasets, 16) for group in (found, validation))
    plan = BatchPlan(found, placements, config.datasets, seed=1, micro_batches_per_step=micro_batches_per_step)
    return report_data(
        config,
        Discovery(samples=tuple(found), validation=tuple(validation), **{**empty, **discovery}),
        placements,
        held_out,
        plan,
        latents=LATENTS,
        text_numbers=1000,
        windows=windows,
        index=index,
    )


def kinds(made):
    return [remark.kind for remark in made.remarks]


def only(made, kind):
    (remark,) = [remark for remark in made.remarks if remark.kind == kind]
    return remark
