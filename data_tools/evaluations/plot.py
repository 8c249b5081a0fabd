"""A drawing of evaluations side by side, as SVG: a dot for each share with its 95% interval. Pure text."""

from html import escape

from data_tools.evaluations.accuracy import REWARDS
from data_tools.evaluations.side_by_side import SideBySide

# Okabe and Ito's colours, which the colour-blind tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LEFT, _WIDTH, _LINE, _TOP = 240, 520, 14, 40  # pixels: of the labels, of the axis, between two dots, above the rows


def svg_of(found: SideBySide) -> str:
    """Return the drawing of all measures that are shares, on one axis from 0 to 100%; rewards have no common axis."""
    rows = [row for row in found.rows if row.measure not in REWARDS]
    height = _LINE * (len(found.names) + 1)
    bottom = _TOP + height * len(rows)
    parts = [_text(_LEFT + x * _WIDTH / 4, bottom + 16, f"{25 * x}%", "middle") for x in range(5)]
    parts += [_line(_x(x / 4), _TOP - 8, _x(x / 4), bottom, "#ddd") for x in range(5)]
    for place, name in enumerate(found.names):
        x, colour = 10 + place * 150, _COLOURS[place % len(_COLOURS)]
        parts += [f'<circle cx="{x}" cy="14" r="4" fill="{colour}"/>', _text(x + 10, 18, name, "start")]
    for number, row in enumerate(rows):
        top = _TOP + number * height
        parts.append(_text(_LEFT - 10, top + height / 2, f"{row.task}, {row.label}", "end"))
        for place, score in enumerate(row.scores):
            if score is None:
                continue
            y, colour = top + _LINE * (place + 0.5), _COLOURS[place % len(_COLOURS)]
            if score.interval:
                parts.append(_line(_x(score.interval[0]), y, _x(score.interval[1]), y, colour))
            told = f"{found.names[place]}: {100 * score.value:.1f}% of {score.prompts:,} prompts"
            dot = f'<circle cx="{_x(score.value):.1f}" cy="{y:.1f}" r="4" fill="{colour}">'
            parts.append(f"{dot}<title>{escape(told)}</title></circle>")
    size = f'width="{max(_LEFT + _WIDTH + 40, 150 * len(found.names))}" height="{bottom + 28}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
                      '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>", ""])  # fmt: skip


def _x(share: float) -> float:
    return _LEFT + share * _WIDTH


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x: float, y: float, x_to: float, y_to: float, colour: str) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x_to:.1f}" y2="{y_to:.1f}" stroke="{colour}" stroke-width="2"/>'
