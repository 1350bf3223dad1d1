"""Weights in captions: ``(words:1.2)``, ``(words)``, ``[words]``, as AUTOMATIC1111's web interface reads them."""

import re

UP, DOWN = 1.1, 1 / 1.1
"""What a pair of round brackets without a number, and a pair of square ones, multiply the weight by."""

_TOKENS = re.compile(
    r"""
    (?P<escaped> \\[()\[\]\\] )
    | (?P<number> :\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\) )
    | (?P<mark> [()\[\]] )
    | (?P<text> [^\\()\[\]:]+ | [\\:] )
    """,
    re.VERBOSE,
)


def weighted_pieces(caption: str) -> list[tuple[str, float]]:
    """This cuts a caption into pieces of equal weight; brackets that act are gone.

    ``(words:1.2)`` multiplies by 1.2, ``(words)`` by 1.1, ``[words]`` divides by 1.1, and brackets may stand within
    each other. A backslash before a bracket makes it a plain one. A bracket that nothing closes acts up to the end.

    Args:
        caption: The caption.

    Returns:
        Texts, none of them empty, each with its weight.
    """
    pieces: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []  # which bracket, and how many pieces there were

    def multiply(first: int, factor: float) -> None:
        pieces[first:] = [(text, weight * factor) for text, weight in pieces[first:]]

    def close(bracket: str, factor: float) -> bool:
        if not opened or opened[-1][0] != bracket:
            return False
        multiply(opened.pop()[1], factor)
        return True

    for token in _TOKENS.finditer(caption):
        text = token[0]
        if token.lastgroup == "escaped":
            pieces.append((text[1], 1.0))
        elif token.lastgroup == "number":
            if not close("(", float(text[1:-1])):
                pieces.append((text, 1.0))
        elif text in "([" and token.lastgroup == "mark":
            opened.append((text, len(pieces)))
        elif text in ")]" and token.lastgroup == "mark":
            if not close("(" if text == ")" else "[", UP if text == ")" else DOWN):
                pieces.append((text, 1.0))
        else:
            pieces.append((text, 1.0))
    for bracket, first in opened:
        multiply(first, UP if bracket == "(" else DOWN)
    return _joined(pieces)


def _joined(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Neighbours of equal weight as one."""
    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined
