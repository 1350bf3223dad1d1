"""A contact sheet: pictures in rows and columns with small captions."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_GAP = 8
_FONT_SIZE = 14
_BACKGROUND, _INK = (255, 255, 255), (32, 32, 32)


def make_grid(
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image:
    """This puts pictures side by side, for instance before and after training.

    Args:
        rows: The pictures; every row has as many. A cell is as large as the largest picture; smaller ones are centred.
        row_labels: One per row, written above it; ``""`` for none. Long ones are broken into lines.
        column_labels: One per column, written at the top; ``""`` for none.

    Returns:
        The sheet, RGB.
    """
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError(f"rows must be equally long and not empty, not {[len(row) for row in rows]}")
    if len(row_labels) != len(rows) or len(column_labels) != len(rows[0]):
        raise ValueError(
            f"{len(rows)} rows of {len(rows[0])} pictures need as many labels, "
            f"not {len(row_labels)} and {len(column_labels)}"
        )
    pictures = [picture for row in rows for picture in row]
    cell_width = max(picture.width for picture in pictures)
    cell_height = max(picture.height for picture in pictures)
    columns = len(rows[0])
    width = _GAP + columns * (cell_width + _GAP)
    font = ImageFont.load_default(_FONT_SIZE)
    headers = [_broken(label, font, cell_width) for label in column_labels]
    captions = [_broken(label, font, width - 2 * _GAP) for label in row_labels]

    height = _GAP + max(map(_text_height, headers)) + sum(_text_height(text) + cell_height + _GAP for text in captions)
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(headers):
        draw.multiline_text((_left(column, cell_width), _GAP), "\n".join(text), fill=_INK, font=font)
    top = _GAP + max(map(_text_height, headers))
    for row, text in zip(rows, captions):
        draw.multiline_text((_GAP, top), "\n".join(text), fill=_INK, font=font)
        top += _text_height(text)
        for column, picture in enumerate(row):
            left = _left(column, cell_width) + (cell_width - picture.width) // 2
            sheet.paste(picture.convert("RGB"), (left, top + (cell_height - picture.height) // 2))
        top += cell_height + _GAP
    return sheet


def _left(column: int, cell_width: int) -> int:
    return _GAP + column * (cell_width + _GAP)


def _text_height(lines: Sequence[str]) -> int:
    return len(lines) * (_FONT_SIZE + 6) + (4 if lines else 0)


def _broken(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The text in lines that fit the width; a single word that doesn't is left as it is."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
