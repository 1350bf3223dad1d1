"""The data report as plain lines: what to look at first, then the numbers. No line is wider than a terminal needs."""

from collections.abc import Iterator, Sequence

from library.data.report import DataReport
from library.data.report_cache import CacheNeeds
from library.data.report_facts import BucketFacts, DatasetFacts, Steps
from library.data.report_remarks import Remark, count_of, joined

WARNING = "warning: "
"""Begins the lines that a person should not overlook."""

_MOST_DETAILS = 5
_MOST_ROWS = 12
_WIDTH = 100
_GIB, _MIB = 2**30, 2**20


def report_lines(report: DataReport) -> list[str]:
    """The report in lines of plain text; those that begin with spaces belong to the one above."""
    lines: list[str] = []
    for remark in report.remarks:
        lines += _remark_lines(remark)
    lines += [f"note: {note}" for note in report.notes]
    for dataset in report.datasets:
        lines += _dataset_lines(dataset, counted_in(report.steps))
    lines += _window_lines(report)
    if report.cache is not None:
        lines.append(cache_line(report.cache))
    return [_printable(line) for line in (*lines, steps_line(report.steps))]


def _remark_lines(remark: Remark) -> Iterator[str]:
    yield f"{WARNING}{remark.text}"
    for detail in remark.details[:_MOST_DETAILS]:
        yield f"  {detail}"
    if (more := len(remark.details) - _MOST_DETAILS + remark.more) and more > 0:
        yield f"  and {more:,} more"


def _dataset_lines(dataset: DatasetFacts, when: str) -> Iterator[str]:
    yield f"datasets[{dataset.number}]: {dataset_line(dataset, when)}"
    yield from _bucket_lines(dataset.buckets)
    if facts := facts_line(dataset):
        yield f"  {facts}"


def dataset_line(dataset: DatasetFacts, when: str) -> str:
    """How many pictures a dataset has, and how they are used; ``when`` says what visits are counted in."""
    config = dataset.config
    if config.role == "validation":
        return f"{count_of(dataset.held_out, 'picture')} at {config.resolution}, for validation alone"
    line = (
        f"{count_of(dataset.pictures, 'picture')} at {config.resolution}, "
        f"{count_of(dataset.visits, 'visit')} {when} in batches of {config.batch_size}"
    )
    return f"{line}; {dataset.held_out:,} more held out for validation" if dataset.held_out else line


def facts_line(dataset: DatasetFacts) -> str:
    """What is special about a dataset's pictures, or nothing."""
    facts = []
    if dataset.short:
        facts.append(f"{dataset.short:,} of {dataset.batches:,} batches are short")
    if dataset.enlarged:
        facts.append(f"{dataset.enlarged:,} enlarged, at most {dataset.enlargement:.3g} times")
    if dataset.cut_away >= 0.005:
        facts.append(f"at most {dataset.cut_away:.0%} of a picture cropped away")
    if dataset.masks:
        facts.append(f"{dataset.masks:,} with a mask")
    if dataset.regularisation:
        facts.append(f"{dataset.regularisation:,} for regularisation")
    return "; ".join(facts)


def _bucket_lines(buckets: Sequence[BucketFacts]) -> Iterator[str]:
    """A row per bucket; where there are many, several in a row, without the numbers of batches."""
    if not buckets:
        return
    size_width = max(len(str(bucket.size)) for bucket in buckets)
    if len(buckets) <= _MOST_ROWS:
        columns = [("bucket", [str(bucket.size) for bucket in buckets])]
        counts = ("pictures", "visits", "batches") if any(bucket.visits for bucket in buckets) else ("pictures",)
        for name in counts:
            columns.append((name, [f"{getattr(bucket, name):,}" for bucket in buckets]))
        widths = [max(len(title), *map(len, cells)) for title, cells in columns]
        for row in zip(*([title, *cells] for title, cells in columns)):
            yield "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths))
        return
    yield f"  {len(buckets)} buckets, with their pictures:"
    count_width = max(len(f"{bucket.pictures:,}") for bucket in buckets)
    cells = [f"{str(bucket.size).rjust(size_width)} {bucket.pictures:>{count_width},}" for bucket in buckets]
    per_row = max(1, _WIDTH // (len(cells[0]) + 4))
    for start in range(0, len(cells), per_row):
        yield "  " + "    ".join(cells[start : start + per_row])


def _window_lines(report: DataReport) -> Iterator[str]:
    if report.windows and not report.cuts:
        yield f"captions: {joined(list(report.windows))} read every one to its end"


def counted_in(steps: Steps) -> str:
    """What visits and batches are counted in."""
    return "in the first epoch" if steps.varies else "per epoch"


def cache_line(cache: CacheNeeds) -> str:
    """What the caches take, and what is free."""
    parts = []
    if cache.latents:
        parts.append(f"latents {amount(cache.latents)}")
    if cache.masks:
        parts.append(f"masks {amount(cache.masks)}")
    if cache.texts is None:
        parts.append("text features of a size that isn't known yet")
    elif cache.texts:
        parts.append(f"text features {amount(cache.texts)}")
    where = []
    if cache.on_disk:
        room = "" if cache.free is None else f" ({amount(cache.free)} free)"
        where.append(f"{amount(cache.on_disk)} in {cache.folder}{room}")
    if cache.in_memory:
        where.append(f"{amount(cache.in_memory)} in memory")
    return f"cache, at most: {', '.join(parts)}; {' and '.join(where)}"


def steps_line(steps: Steps) -> str:
    """How long the run is."""
    per_epoch = f"{steps.first_epoch} in the first epoch" if steps.varies else f"{steps.first_epoch} per epoch"
    shared = (
        f"{count_of(steps.processes, 'process', 'processes')}, "
        f"{count_of(steps.accumulation, 'micro-batch', 'micro-batches')}"
    )
    return f"steps: {steps.total} optimizer steps, {per_epoch}, {steps.epochs:.4g} epochs; {shared} per step each"


def _printable(line: str) -> str:
    """The line without what names and captions may hold and neither a terminal nor a comment can."""
    return "".join(character if character.isprintable() else "?" for character in line)


def amount(size: int) -> str:
    """Bytes as people say them: ``1.2 GiB``, ``340 MiB``."""
    if size >= _GIB:
        return f"{size / _GIB:.1f} GiB"
    return f"{size / _MIB:.0f} MiB" if size >= 10 * _MIB else f"{size / _MIB:.2g} MiB"
