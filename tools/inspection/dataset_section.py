"""One dataset of the page: its settings, the shapes of its buckets, and the pictures of each."""

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from library.config.dataset import DatasetConfig, SubsetConfig
from library.data.report_facts import BucketFacts, DatasetFacts
from library.data.report_lines import dataset_line, facts_line
from library.data.report_remarks import count_of
from library.records import Resolution
from tools.inspection.cards import Shelf
from tools.inspection.picture_card import FRAME_HEIGHT, picture_card, size_text
from tools.inspection.thumbnails import Thumbnail

_NARROWEST, _WIDEST = 200, 420
_LONGEST_SHAPE = 76
_SHOWN_ELSEWHERE = {
    *("resolution", "batch_size", "subsets", "role"),
    *("image_dir", "metadata_file", "conditioning_data_dir", "is_reg"),
}


def dataset_section(
    facts: DatasetFacts,
    when: str,
    subset_pictures: Mapping[tuple[int, int], int],
    shelves: Sequence[Shelf],
    thumbnails: Mapping[str, Thumbnail],
    anchors: Mapping[str, str],
) -> str:
    """The dataset as HTML.

    Args:
        facts: Its numbers and settings.
        when: What its visits are counted in: ``per epoch``.
        subset_pictures: Dataset and subset -> pictures, those for validation included.
        shelves: Its pictures.
        thumbnails: Key of each shown sample -> its thumbnail.
        anchors: Key of each shown sample -> id of its card.
    """
    config = facts.config
    line = facts_line(facts)
    rows = "".join(
        f'<div class="subset"><span>{escape(subset.title)}</span>'
        f'<span class="number">{count_of(subset_pictures.get((facts.number, position), 0), "picture")}</span>'
        f"<span>{_settings(subset)}</span></div>"
        for position, subset in enumerate(config.subsets)
    )
    buckets = {bucket.size: bucket for bucket in facts.buckets}
    return "".join(
        [
            f'<section class="dataset" id="dataset-{facts.number}"><header><h2>datasets[{facts.number}]</h2>',
            f"<p>{escape(dataset_line(facts, when))}</p></header>",
            f'<p class="facts">{escape(line)}</p>' if line else "",
            f'<p class="facts">{_settings(config)}</p>',
            f'<div class="subsets">{rows}</div>',
            _shapes(facts),
            '<div class="shelves">',
            *(_shelf(shelf, buckets.get(shelf.bucket), thumbnails, anchors) for shelf in shelves),
            "</div></section>",
        ]
    )


def _settings(config: DatasetConfig | SubsetConfig) -> str:
    """What differs from the defaults, as the TOML says it."""
    shown = []
    if isinstance(config, SubsetConfig):
        if config.is_reg:
            shown.append("<b>regularisation</b>")
        if config.conditioning_data_dir is not None:
            shown.append(f"masks in <b>{escape(config.conditioning_data_dir)}</b>")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in _SHOWN_ELSEWHERE and value != field.default:
            shown.append(escape(field.name) if value is True else f"{escape(field.name)} <b>{escape(_said(value))}</b>")
    return "".join(f'<span class="setting">{setting}</span>' for setting in shown)


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Resolution):
        return str(value)
    return (
        ", ".join(map(_said, value))
        if isinstance(value, tuple)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _shapes(facts: DatasetFacts) -> str:
    """Every bucket as a rectangle of its shape, all to one scale; the more pictures, the fuller its colour."""
    if not facts.buckets:
        return ""
    longest = max(max(bucket.size) for bucket in facts.buckets)
    most = max(bucket.pictures for bucket in facts.buckets)
    scale = _LONGEST_SHAPE / longest
    shapes = "".join(
        f'<a class="shape" href="#{_shelf_id(facts.number, bucket.size)}" title="{escape(_bucket_line(bucket))}">'
        f'<i style="width:{bucket.size.width * scale:.1f}px;height:{bucket.size.height * scale:.1f}px;'
        f'--share:{bucket.pictures / most:.3f}"></i><span><b>{bucket.pictures:,}</b>'
        f"<span>{size_text(bucket.size)}</span></span></a>"
        for bucket in facts.buckets
    )
    return f'<nav class="shapes" aria-label="Buckets">{shapes}</nav>'


def _bucket_line(bucket: BucketFacts) -> str:
    line = f"{count_of(bucket.pictures, 'picture')}, {count_of(bucket.visits, 'visit')}"
    if bucket.batches:
        line += f" in {bucket.batches:,} {'batch' if bucket.batches == 1 else 'batches'}"
        line += f", {bucket.short:,} of them short" if bucket.short else ""
    return line


def _shelf(
    shelf: Shelf, bucket: BucketFacts | None, thumbnails: Mapping[str, Thumbnail], anchors: Mapping[str, str]
) -> str:
    ratio = shelf.bucket.width / shelf.bucket.height
    width = round(min(_WIDEST, max(_NARROWEST, FRAME_HEIGHT * ratio)))
    line = count_of(shelf.pictures, "picture") + ", held out" if bucket is None else _bucket_line(bucket)
    cards = "".join(picture_card(card, width, thumbnails[card.sample.key], anchors) for card in shelf.cards)
    hidden = shelf.pictures - len(shelf.cards)
    rest = f'<p class="rest">{hidden:,} more of this size; a larger --pictures shows them.</p>' if hidden else ""
    return (
        f'<section class="shelf" id="{_shelf_id(shelf.dataset, shelf.bucket)}"><h3>{size_text(shelf.bucket)}'
        f'<small>{escape(line)}</small></h3><div class="cards" style="--wide:{width}px">{cards}</div>{rest}</section>'
    )


def _shelf_id(number: int, bucket: Resolution) -> str:
    return f"d{number}-{bucket}"
