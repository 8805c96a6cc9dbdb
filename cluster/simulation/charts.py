"""Plots as inline SVG: lines over time and bars side by side. No script, no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 26, 34
COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#a16207", "#475569")

Scale = Callable[[float], float]
Points = Sequence[tuple[float, float | None]]


def colour(number: int) -> str:
    """A colour that tells series apart; they repeat after eight."""
    return COLOURS[number % len(COLOURS)]


def lines(
    title: str,
    series: Mapping[str, Points],
    x_label: str,
    y_label: str,
    *,
    thin: bool = False,
    legend: bool = True,
    log_y: bool = False,
) -> str:
    """Lines through points; a point without a value interrupts its line.

    Args:
        series: By name.
        thin: For many lines of one kind.
        legend: Name the series below the title.
        log_y: Decades are equally high; values of 0 and less are left out.
    """
    known = [
        (x, y)
        for points in series.values()
        for x, y in points
        if y is not None and math.isfinite(y) and (y > 0 or not log_y)
    ]
    if not known:
        return _frame(title, [_text(WIDTH / 2, HEIGHT / 2, "no data", "middle")])
    x_ticks = _ticks(min(x for x, _ in known), max(x for x, _ in known))
    low, high = min(y for _, y in known), max(y for _, y in known)
    y_ticks = _decades(low, high) if log_y else _ticks(min(0.0, low), high)
    across = _scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT)
    place = math.log10 if log_y else float
    height = _scale(place(y_ticks[0]), place(y_ticks[-1]), HEIGHT - BOTTOM, TOP)

    def up(value: float) -> float:
        return height(place(value))

    parts = _axes(x_ticks, y_ticks, across, up, x_label, y_label)
    for number, (name, points) in enumerate(series.items()):
        path, pen_down = [], False
        for x, y in points:
            if y is None or not math.isfinite(y) or (log_y and y <= 0):
                pen_down = False
                continue
            path.append(f"{'L' if pen_down else 'M'}{across(x):.1f} {up(y):.1f}")
            pen_down = True
        parts.append(
            f'<path d="{" ".join(path)}" fill="none" stroke="{colour(number)}" '
            f'stroke-width="{0.8 if thin else 1.6}"><title>{escape(name)}</title></path>'
        )
    if legend:
        parts += _legend(list(series))
    return _frame(title, parts)


def bars(title: str, groups: Mapping[str, Mapping[str, float]], y_label: str) -> str:
    """Bars of several series next to each other.

    Args:
        groups: By group, then by series; every group has the same series.
    """
    names = list(next(iter(groups.values()), {}))
    values = [value for group in groups.values() for value in group.values()]
    if not values or not names:
        return _frame(title, [_text(WIDTH / 2, HEIGHT / 2, "no data", "middle")])
    ticks = _ticks(0.0, max(values))
    up = _scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = _axes([], ticks, lambda x: x, up, "", y_label)
    slot = (WIDTH - LEFT - RIGHT) / len(groups)
    width = 0.8 * slot / len(names)
    for place, (label, group) in enumerate(groups.items()):
        start = LEFT + place * slot + 0.1 * slot
        parts.append(_text(start + 0.4 * slot, HEIGHT - BOTTOM + 14, label, "middle"))
        for number, name in enumerate(names):
            top = up(group[name])
            parts.append(
                f'<rect x="{start + number * width:.1f}" y="{top:.1f}" width="{width * 0.92:.1f}" '
                f'height="{HEIGHT - BOTTOM - top:.1f}" fill="{colour(number)}">'
                f"<title>{escape(name)}: {group[name]:.4g}</title></rect>"
            )
    return _frame(title, parts + _legend(names))


# ---- parts


def _frame(title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'<text x="{LEFT}" y="12" class="title">{escape(title)}</text>{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _legend(names: Sequence[str]) -> list[str]:
    parts, x = [], WIDTH - RIGHT
    for number, name in reversed(list(enumerate(names))):
        x -= 6 * len(name) + 16
        parts.append(f'<rect x="{x}" y="4" width="8" height="8" fill="{colour(number)}"/>')
        parts.append(f'<text x="{x + 11}" y="12">{escape(name)}</text>')
    return parts


def _axes(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    across: Scale,
    up: Scale,
    x_label: str,
    y_label: str,
) -> list[str]:
    parts = []
    for tick in y_ticks:
        y = up(tick)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
        )
        parts.append(_text(LEFT - 4, y + 3, _number(tick), "end"))
    for tick in x_ticks:
        parts.append(_text(across(tick), HEIGHT - BOTTOM + 14, _number(tick), "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_label, "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="11" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 11 {middle})">{escape(y_label)}</text>'
    )
    return parts


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    span = high - low
    return lambda value: start + (value - low) / span * (end - start)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``."""
    span = high - low
    if span < 1e-9 * max(abs(low), abs(high), 1e-3):
        span = abs(high) if abs(high) > 1e-12 else 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= 5)
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [number * step for number in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, max(first + 1, last) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
