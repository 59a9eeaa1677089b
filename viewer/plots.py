"""Line plots as SVG, without dependencies."""

import math
from xml.sax.saxutils import escape

Curve = list[tuple[float, float]]  # points (step, value)
COLOURS = ("#1f5fa8", "#c2571a", "#3b8a3b", "#8a3b7f", "#b8860b", "#2a8f8f", "#a83232", "#555555")
WIDTH, HEIGHT, ACROSS, DOWN, COLUMNS = 220, 130, 268, 192, 3  # of a panel, from one to the next, in a row


def label(x: float, y: float, text: str, **style) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes(style)}>{escape(text)}</text>'


def line(points: list[tuple[float, float]], **style) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" {attributes(style)}/>'


def attributes(style: dict) -> str:
    return " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in style.items())


def ticks(low: float, high: float) -> list[float]:
    """At most six round numbers, the first not above `low`, the last not below `high`."""
    unit = 10.0**math.floor(math.log10((high - low) / 4))
    step = next(k * unit for k in (1, 2, 2.5, 5, 10) if k * unit >= (high - low) / 4)
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def coloured(names: list[str]) -> dict[str, str]:
    return dict(zip(names, COLOURS * len(names)))


def picture(panels: dict[str, dict[str, Curve]], colours: dict[str, str], note: str) -> str:
    """panels[title][name] is a curve; as SVG. A name that has a colour has it in all
    panels and stands in the legend; any other curve is dashed, a reference with its name beside it."""
    last = max(x for curves in panels.values() for points in curves.values() for x, _ in points) or 1
    parts, rows = [], -(-len(panels) // COLUMNS)
    for i, (title, curves) in enumerate(panels.items()):
        left, top = 46 + i % COLUMNS * ACROSS, 28 + i // COLUMNS * DOWN
        values = [y for points in curves.values() for _, y in points]
        low, high = min(0, *values), max(0, *values)
        share = low == high == 0 or low == 0 and 0.1 <= high <= 1  # most rewards are: on one scale
        marks = [0, 0.25, 0.5, 0.75, 1] if share else ticks(low, high)

        def at(x: float, y: float, left=left, top=top, low=marks[0], high=marks[-1]) -> tuple[float, float]:
            return left + WIDTH * x / last, top + HEIGHT * (high - y) / (high - low)

        parts.append(label(left, top - 9, title, font_size=12, font_weight="bold"))
        for mark in marks:
            x, y = at(0, mark)
            parts += [line([(x, y), at(last, mark)], stroke="#ddd"),
                      label(x - 6, y + 4, f"{mark:.4g}", text_anchor="end")]
        for step in (t for t in ticks(0, last) if t <= last and t == int(t)):
            parts.append(label(at(step, marks[0])[0], top + HEIGHT + 15, f"{step:g}", text_anchor="middle"))
        for name, points in curves.items():
            drawn = [at(*point) for point in points]
            if name in colours:
                parts.append(line(drawn, stroke=colours[name], stroke_width=1.8))
            else:
                x, y = drawn[-1]
                parts += [line(drawn, stroke="#888", stroke_dasharray="4 3"),
                          label(x, y + 13, name, text_anchor="end", fill="#666")]
    width = max(min(len(panels), COLUMNS) * ACROSS + 26, *(7 * len(text) + 60 for text in (*colours, note)))
    x, y = 46, rows * DOWN + 2
    for text, colour in [*colours.items(), (note, "#333")]:
        if x > 46 and x + 7 * len(text) > width:
            x, y = 46, y + 16
        parts.append(label(x, y, text, fill=colour))
        x += 7 * len(text) + 16
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 12}" '
    style = 'font-family="sans-serif" font-size="11" fill="#333">'
    return "\n".join([head + style, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])
