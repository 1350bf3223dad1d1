"""One picture of the page: what is cut away, what is masked out, and what the encoders read of its caption."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from library.data.report_remarks import joined
from library.records import Resolution
from tools.inspection.cards import Card, Part
from tools.inspection.thumbnails import Thumbnail

FRAME_HEIGHT = 220
"""Pixels of a picture's frame; ``.frame`` in page.html has as many."""


def picture_card(card: Card, width: int, thumbnail: Thumbnail, anchors: Mapping[str, str]) -> str:
    """The card of a picture as HTML.

    Args:
        card: What it says.
        width: Its width in pixels.
        thumbnail: What it shows.
        anchors: Key of each shown sample -> id of its card.
    """
    sample, placement = card.sample, card.placement
    name = sample.key.split("/", 2)[-1]
    caption = "".join(part.text for part in card.caption)
    kinds = "|".join(["", *card.kinds, ""])
    badges = "".join(_badges(card))
    return (
        f'<article class="card" id="{anchors[sample.key]}" data-kinds="{escape(kinds)}" '
        f'data-text="{escape(f"{name} {caption}".lower())}">'
        f'<div class="frame">{_picture(card, width, thumbnail, name)}<div class="badges">{badges}</div></div>'
        f'<div class="text"><h4 title="{escape(sample.path)}">{escape(name)}</h4>'
        f'<p class="sizes" title="scaled to {size_text(placement.resized)}, then cropped">{size_text(sample.size)} → '
        f"<b>{size_text(placement.bucket)}</b></p>{_caption(card.caption)}{_same(card, anchors)}</div></article>"
    )


def _picture(card: Card, width: int, thumbnail: Thumbnail, name: str) -> str:
    if thumbnail.problem:
        return f'<p class="gone">{escape(thumbnail.problem)}</p>'
    size, crop = card.sample.size, card.crop
    scale = min(width / size.width, FRAME_HEIGHT / size.height)
    mask = f'<img class="mask" src="{thumbnail.mask}" alt="">' if thumbnail.mask else ""
    left, top, across, down = (f"{100 * share:.2f}%" for share in dataclasses.astuple(crop))
    shown_width, shown_height = max(1, size.width * scale), max(1, size.height * scale)
    return (
        f'<div class="whole" style="width:{shown_width:.0f}px;height:{shown_height:.0f}px">'
        f'<img src="{thumbnail.picture}" alt="{escape(name)}" decoding="async">{mask}'
        f'<i style="left:{left};top:{top};width:{across};height:{down}"></i></div>'
    )


def _badges(card: Card) -> Iterator[str]:
    if card.enlargement > 1:
        warn = " warn" if "enlarged" in card.kinds else ""
        yield f'<span class="badge{warn}">enlarged {card.enlargement:.2f}×</span>'
    for kind in card.kinds:
        if kind != "enlarged":
            yield f'<span class="badge warn">{escape(kind)}</span>'
    for on, what, why in (
        (card.changes, "caption varies", "The caption is another at every visit; this is the first."),
        (card.held_out, "held out", "The loss is measured on it; it is not trained on."),
        (card.sample.is_reg, "regularisation", "It shows what the model knows already."),
        (card.flips, "⇄", "Mirrored at half of its visits."),
        (card.moves, "crop moves", "Cropped elsewhere at every visit; this is where it would be without."),
    ):
        if on:
            yield f'<span class="badge" title="{escape(why)}">{escape(what)}</span>'


def _caption(parts: Sequence[Part]) -> str:
    if not parts:
        return '<p class="caption none">no caption</p>'
    shown: list[str] = []
    before: tuple[str, ...] = ()
    for part in parts:
        if part.unread != before:
            stopped = [name for name in part.unread if name not in before]
            title = escape(f"{joined(stopped)} {'reads' if len(stopped) == 1 else 'read'} up to here")
            shown.append(f'<span class="stop {_extent(part)}" title="{title}">{escape(" · ".join(stopped))}</span>')
            before = part.unread
        text = escape(part.text)
        shown.append(f'<s class="{_extent(part)}">{text}</s>' if part.unread else text)
    return f'<p class="caption">{"".join(shown)}</p>'


def _extent(part: Part) -> str:
    """Class of a stretch that isn't read: by no encoder, or not by all."""
    return "all" if part.lost else "some"


def _same(card: Card, anchors: Mapping[str, str]) -> str:
    if not card.same:
        return ""
    links = []
    for key in card.same:
        name = escape(key.split("/", 2)[-1])
        links.append(f'<a href="#{anchors[key]}">{name}</a>' if key in anchors else name)
    return f'<p class="same">same as {", ".join(links)}</p>'


def size_text(size: Resolution) -> str:
    """``832×1216``."""
    return f"{size.width}×{size.height}"
