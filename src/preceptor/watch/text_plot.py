"""A plot of a few curves in the letters of a terminal: Braille dots, or ASCII where its encoding has none."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a Braille letter: rows of two
_LABEL = 7  # letters of a number beside the plot


@dataclass(frozen=True, slots=True)
class Curve:
    """Values by step. marks: a mark at each value in place of a line. colour: index in COLOURS."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    marks: bool = False
    colour: int = 0


def plot(curves: Sequence[Curve], width: int, height: int, unicode: bool = True) -> list[Text]:
    """`height` lines of at most `width` letters, the last with the steps; none where there is nothing to show."""
    points = [(x, y) for curve in curves for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
    columns, rows = width - _LABEL - 2, height - 1
    if not points or columns < 8 or rows < 2:
        return []
    (x0, x1), (y0, y1) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    x1, y1 = x1 if x1 > x0 else x0 + 1, y1 if y1 > y0 else y0 + max(abs(y0), 1.0) / 10
    canvas = _Canvas(columns, rows, unicode)
    for curve in sorted(curves, key=lambda each: each.marks):  # marks lie on top
        across = [(x - x0) / (x1 - x0) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
        down = [(y1 - y) / (y1 - y0) for y in curve.y if math.isfinite(y)]
        draw = canvas.mark if curve.marks else canvas.line
        draw(across, down, COLOURS[curve.colour % len(COLOURS)])
    labels = {0: _number(y1), rows - 1: _number(y0)}
    bar = "│" if unicode else "|"
    lines = [Text(f"{labels.get(row, ''):>{_LABEL}} {bar}", "dim").append_text(canvas.row(row)) for row in range(rows)]
    first, last = f"{x0:,.0f}", f"step {x1:,.0f}"
    return [*lines, Text(" " * (_LABEL + 2) + first + last.rjust(columns - len(first)), "dim")]


class _Canvas:
    """Cells of letters; places are shares of width and height, from the upper left."""

    def __init__(self, columns: int, rows: int, unicode: bool) -> None:
        self._columns, self._rows, self._unicode = columns, rows, unicode
        self._fine = (2, 4) if unicode else (1, 1)  # dots of a cell, across and down
        self._dots: dict[tuple[int, int], int] = {}
        self._colour: dict[tuple[int, int], str] = {}
        self._marks: set[tuple[int, int]] = set()

    def line(self, across: Sequence[float], down: Sequence[float], colour: str) -> None:
        """The mean of the values in each column of dots, joined to the next."""
        columns, rows = self._columns * self._fine[0], self._rows * self._fine[1]
        places: dict[int, list[float]] = {}
        for x, y in zip(across, down, strict=True):
            places.setdefault(round(x * (columns - 1)), []).append(y)
        before: tuple[int, int] | None = None
        for column in sorted(places):
            row = round(sum(places[column]) / len(places[column]) * (rows - 1))
            for x, y in _between(before or (column, row), (column, row)):
                self._dot(x, y, colour)
            before = (column, row)

    def mark(self, across: Sequence[float], down: Sequence[float], colour: str) -> None:
        for x, y in zip(across, down, strict=True):
            cell = (round(y * (self._rows - 1)), round(x * (self._columns - 1)))
            self._marks.add(cell)
            self._colour[cell] = colour

    def row(self, row: int) -> Text:
        text = Text()
        for column in range(self._columns):
            cell = (row, column)
            if cell in self._marks:
                letter = "●" if self._unicode else "o"
            elif cell in self._dots:
                letter = chr(0x2800 + self._dots[cell]) if self._unicode else "."
            else:
                letter = " "
            text.append(letter, self._colour.get(cell))
        return text

    def _dot(self, x: int, y: int, colour: str) -> None:
        across, down = self._fine
        cell = (y // down, x // across)
        self._dots[cell] = self._dots.get(cell, 0) | (_DOTS[y % down][x % across] if self._unicode else 1)
        self._colour[cell] = colour


def _between(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots of a line, its end included."""
    num = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (round(start[0] + (end[0] - start[0]) * at / num), round(start[1] + (end[1] - start[1]) * at / num))
        for at in range(num + 1)
    ]


def _number(value: float) -> str:
    """Three digits or more, in at most _LABEL letters."""
    size = abs(value)
    return f"{value:.2f}" if 0.1 <= size < 1000 else f"{value:.0f}" if size < 1e6 and size >= 1 else f"{value:.1e}"
