"""The dataset page: HTML around a report, in one file that needs nothing else. All text from outside is escaped."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from library.data.report import DataReport
from library.data.report_lines import amount, counted_in
from library.data.report_remarks import Remark, count_of, joined
from library.version import VERSION
from tools.inspection.cards import Card, Shelf
from tools.inspection.dataset_section import dataset_section
from tools.inspection.thumbnails import Thumbnail

_FEW_NOTES = 8


def render(
    title: str,
    family: str,
    report: DataReport,
    subset_pictures: Mapping[tuple[int, int], int],
    shelves: Sequence[Shelf],
    thumbnails: Mapping[str, Thumbnail],
) -> str:
    """The page.

    Args:
        title: Its heading: the dataset's file.
        family: Title of the model family.
        report: What is said about the data.
        subset_pictures: Dataset and subset -> pictures, those for validation included.
        shelves: The pictures.
        thumbnails: Key of each shown sample -> its thumbnail.
    """
    anchors = {card.sample.key: f"p{number}" for number, card in enumerate(_cards(shelves))}
    body = [
        _header(title, family, report),
        _remarks(report.remarks, anchors),
        _tiles(report),
        _notes(report.notes),
        _bar(shelves),
    ]
    for facts in report.datasets:
        own = [shelf for shelf in shelves if shelf.dataset == facts.number]
        body.append(dataset_section(facts, counted_in(report.steps), subset_pictures, own, thumbnails, anchors))
    body.append('<p class="nothing" hidden>No picture fits. <kbd>Esc</kbd> shows all again.</p>')
    body.append(
        f"<footer>Made by tools/inspect_dataset.py of atelier {escape(VERSION)}. <kbd>/</kbd> searches, <kbd>c</kbd> "
        "and <kbd>m</kbd> show and hide crops and masks, <kbd>Esc</kbd> shows all pictures. A click on a caption shows "
        "all of it.</footer>"
    )
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    page = template.replace("<!--TITLE-->", escape(title), 1).replace("<!--BODY-->", "\n".join(body), 1)
    return page.encode("utf-8", "replace").decode()  # file names may be no valid text


def _cards(shelves: Sequence[Shelf]) -> Iterator[Card]:
    for shelf in shelves:
        yield from shelf.cards


def _header(title: str, family: str, report: DataReport) -> str:
    steps = report.steps
    visits = sum(dataset.visits for dataset in report.datasets)
    lead = (
        f"{count_of(_pictures(report), 'picture')}, {count_of(visits, 'visit')} {counted_in(steps)}. The run has "
        f"{count_of(steps.total, 'optimizer step')}, which is {steps.epochs:.3g} epochs."
    )
    if report.windows:
        tokens = ", ".join(f"{name} {length}" for name, length in report.windows.items())
        lead += f" Tokens of a caption that the text encoders read: {tokens}; what one doesn't read is struck through."
    else:
        lead += (
            " Captions are shown whole: name the model, or its tokenizers with --tokenizer_dir, to see what encoders "
            "cut."
        )
    over = f"Dataset report · {family}"
    return f'<p class="over">{escape(over)}</p><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>'


def _remarks(remarks: Sequence[Remark], anchors: Mapping[str, str]) -> str:
    if not remarks:
        return '<p class="fine">Nothing to warn of.</p>'
    return (
        f'<section class="remarks" aria-label="Warnings">{"".join(_remark(one, anchors) for one in remarks)}</section>'
    )


def _remark(remark: Remark, anchors: Mapping[str, str]) -> str:
    line = f'<span class="kind">{escape(remark.kind)}</span><span class="what">{escape(remark.text)}</span>'
    if any(key in anchors for key in remark.samples):
        line += f'<button data-kind="{escape(remark.kind)}">show</button>'
    if not remark.details:
        return f'<div class="remark"><div class="line">{line}</div></div>'
    items = [f"<li>{escape(detail)}</li>" for detail in remark.details]
    if remark.more:
        items.append(f"<li>and {remark.more:,} more</li>")
    return f'<details class="remark"><summary>{line}</summary><ul>{"".join(items)}</ul></details>'


def _tiles(report: DataReport) -> str:
    steps, cache = report.steps, report.cache
    datasets = report.datasets
    held_out = sum(dataset.held_out for dataset in datasets)
    tiles = [
        (f"{_pictures(report):,}", "pictures to train on"),
        (f"{held_out:,}", "held out for validation") if held_out else None,
        (f"{sum(len(dataset.buckets) for dataset in datasets):,}", "buckets"),
        (f"{sum(dataset.visits for dataset in datasets):,}", f"visits {counted_in(report.steps)}"),
        (f"{steps.first_epoch:,}", f"optimizer steps {counted_in(report.steps)}"),
        (f"{steps.total:,}", f"optimizer steps in all, {steps.epochs:.3g} epochs"),
    ]
    if cache is not None:
        where = joined([*["on disk"] * bool(cache.on_disk), *["in memory"] * bool(cache.in_memory)])
        free = "" if cache.free is None else f", {amount(cache.free)} free"
        tiles.append((amount(cache.on_disk + cache.in_memory), f"for the cache {where}{free}"))
    shown = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>'
        for value, what in (tile for tile in tiles if tile is not None)
    )
    return f'<section class="tiles" aria-label="Numbers">{shown}</section>'


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    is_open = " open" if len(notes) <= _FEW_NOTES else ""
    return (
        f'<details class="notes"{is_open}><summary>{count_of(len(notes), "note")}</summary><ul>{items}</ul></details>'
    )


def _bar(shelves: Sequence[Shelf]) -> str:
    cards = list(_cards(shelves))
    kinds = Counter(kind for card in cards for kind in card.kinds)
    chips = [
        f'<button class="chip" data-kind="" aria-pressed="true">all<span class="count">{len(cards):,}</span></button>'
    ]
    chips += [
        f'<button class="chip" data-kind="{escape(kind)}" aria-pressed="false">{escape(kind)}'
        f'<span class="count">{count:,}</span></button>'
        for kind, count in kinds.items()
    ]
    switches = _switch("crop", "c", "cut", "cropped away")
    if any(card.masked for card in cards):
        switches += _switch("mask", "m", "tint", "masked out")
    return (
        '<div class="bar" role="search"><input type="search" id="search" placeholder="Find in names and captions" '
        f'aria-label="Find in names and captions">{"".join(chips)}'
        f'<span class="right"><span id="count" role="status"></span>{switches}</span></div>'
    )


def _switch(name: str, key: str, swatch: str, text: str) -> str:
    """A box that shows and hides something; the script finds it by its name and its key."""
    box = f'<input type="checkbox" name="{name}" data-key="{key}" checked>'
    return f'<label>{box}<i class="swatch {swatch}"></i>{escape(text)}</label>'


def _pictures(report: DataReport) -> int:
    return sum(dataset.pictures for dataset in report.datasets)
