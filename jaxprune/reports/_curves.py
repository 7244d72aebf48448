"""Draws curves over steps as SVG, for an HTML page."""

import itertools
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

Run = tuple[str, list, list]  # label, records and switches, by step


def finite(entry: Mapping[str, Any], key: str) -> Any:
    """Returns a measured number, or None if it is absent or not finite."""
    value = entry.get(key)
    try:
        return value if value is not None and math.isfinite(value) else None
    except TypeError:
        raise ValueError(
            f"`{key}` of a record or switch must be a number or None, but is {value!r} in "
            f"{reprlib.repr(entry)}: leave out values that were not measured"
        ) from None


def measured(records: Iterable[Mapping[str, Any]], key: str) -> list[tuple[Any, Any]]:
    """Lists step and value of the records in which the value was measured."""
    found = [(record["step"], finite(record, key)) for record in records]
    return [(step, value) for step, value in found if value is not None]


NUMBER = ((1, ""),)
_PERCENT = ((0.01, "%"),)
TIME = (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs")
BYTES = (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes")
_COUNT = (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")
lines = "\n".join


def unit_of(units: Sequence[tuple[float, str]], values: Iterable[float]) -> tuple[float, str]:
    """Chooses the largest unit of which some value has at least two, or the smallest unit."""
    largest = max(map(abs, values))
    return next((unit for unit in units if largest >= 2 * unit[0]), units[-1])


def number_text(value: Any, factor: float = 1) -> str:
    """Formats a value in a unit: integers in full, other numbers with four digits."""
    value = value / factor if factor != 1 else value
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"


# Title; keys of records with their labels; units; an upper bound for the start of the axis; and
# whether a value is constant between switches.
_SHOWN = (
    ("Accuracy", {"test_accuracy": "test", "train_accuracy": "batch"}, _PERCENT, math.inf, False),
    ("Training loss", {"train_loss": ""}, NUMBER, math.inf, False),
    ("Sparsity", {"sparsity": ""}, _PERCENT, 0, False),
    ("Time of a step", {"seconds_per_step": ""}, TIME, 0, False),
    ("Training time so far", {"seconds": ""}, TIME, 0, False),
    ("Peak memory of a step", {"peak_bytes": ""}, BYTES, 0, True),
    ("Parameters", {"parameters": ""}, _COUNT, 0, True),
    ("Multiply-accumulates (MACs)", {"macs": ""}, _COUNT, 0, True),
)
_MOST_POINTS = 6000  # largest number of points of all curves together, about 25 bytes each
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 376, 24, 180  # edges of the area between the axes
_DASHES = "none", "7 2", "2 2", "8 2 2 2"


def plots(runs: list[Run]) -> str:
    """Draws all plots over the same range of steps."""
    drawn = [(plot, curves) for plot in _SHOWN if (curves := _curves(plot[1], runs))]
    if not drawn:
        return '<p class="note">No curves: no record has a measured value.</p>'
    steps = [entry["step"] for _, *entries in runs for own in entries for entry in own]
    low, high = min(steps), max(steps)

    def x(step: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * ((step - low) / (high - low) if high > low else 0.5)

    frame, ends, number = [], [-99.0, -99.0], itertools.count(1)
    frame.append(f'<text x="20" y="{_BOTTOM + 16}">step</text>')
    for step, text in _ticks(low, high, least=1) if low < high else [(low, f"{low:,}")]:
        if low <= step <= high:
            frame.append(f'<text x="{x(step):.1f}" y="{_BOTTOM + 16}">{text}</text>')
    for i, (*_, switches) in enumerate(runs):
        for at in (x(entry["step"]) for entry in switches):
            row = int(abs(at - ends[0]) < 15)  # a second row for numbers that would overlap
            ends[row], y = at, 10 + 14 * row
            frame.append(
                f'<g class="switch" style="color:var(--c{i % 7 if len(runs) > 1 else ""})">'
                f'<path d="M{at:.1f} {_TOP}V{_BOTTOM}"/><circle cx="{at:.1f}" cy="{y}" r="7"/>'
                f'<text x="{at:.1f}" y="{y + 3.5}">{next(number)}</text></g>'
            )
    frame.append(f'<path class="cross" d="M{_LEFT} {_TOP}V{_BOTTOM}"/>')
    most = max(40, _MOST_POINTS // sum(len(curves) for _, curves in drawn))
    figures = [_figure(*own, x, frame, most, f"{_LEFT} {_RIGHT} {low} {high}") for own in drawn]
    return f'<section class="plots">\n{lines(figures)}\n</section>'


def _curves(keys: Mapping[str, str], runs: list[Run]) -> list[tuple]:
    """Makes label, attributes, points and switch steps of each line; each run has one colour."""
    curves = []
    for i, (run, records, switches) in enumerate(runs):
        for j, (key, name) in enumerate(keys.items()):
            look = f'class="curve{" thin" * j}" stroke-dasharray="{_DASHES[i % len(_DASHES)]}" '
            look += f'style="color:var(--c{(i if len(runs) > 1 else j) % 7})"'
            label = escape(", ".join(filter(None, (run, name))))
            if points := measured(records, key):
                curves.append((label, look, points, [entry["step"] for entry in switches]))
    return curves


def _figure(
    plot: tuple, curves: list, x: Callable[[float], float], frame: list[str], most: int, area: str
) -> str:
    """Draws a plot with its last values and a text for screen readers."""
    name, _, units, lowest, stays = plot
    values = [value for _, _, points, _ in curves for _, value in points]
    factor, unit = unit_of(units, values)
    ticks = _ticks(min(lowest, *values) / factor, max(values) / factor)
    bottom, top = ticks[0][0], ticks[-1][0]

    def y(value: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * (value / factor - bottom) / (top - bottom)

    drawn, keys, told = [], [], []
    for tick, text in ticks:
        height = y(tick * factor)
        drawn.append(f'<path class="grid" d="M{_LEFT} {height:.1f}H{_RIGHT}"/>')
        drawn.append(f'<text class="end" x="{_LEFT - 6}" y="{height + 4:.1f}">{text}</text>')
    drawn += frame
    heading, unit = (f"{name}, {unit}", f"\u202f{unit}") if unit else (name, "")
    for label, look, points, switches in curves:
        points = _thin(points, most)
        line = _corners(points, switches) if stays else points
        path = " ".join(f"{x(step):.1f} {y(value):.1f}" for step, value in line)
        data = [f"{step}:{number_text(value, factor)}" for step, value in points]
        drawn.append(f'<path {look} d="M{path}" data-points="{" ".join(data)}"/>')
        if len(points) <= 40:
            dots = "".join(f"M{x(step):.1f} {y(value):.1f}h0" for step, value in points)
            drawn.append(f'<path {look.replace("curve", "dots", 1)} d="{dots}"/>')
        (start, first), (step, last) = (data[i].split(":") for i in (0, -1))
        key = f'<svg class="key" viewBox="0 0 20 8"><path {look} d="M1 4H19"/></svg>{label}'
        keys.append(f"<li>{key} <b>{last}{unit}</b> <i>at step <span>{step}</span></i></li>")
        low, high = (number_text(pick(v for _, v in points), factor) for pick in (min, max))
        told.append(f"{label or name}: {first}{unit} at step {start}, {last}{unit} at step {step},")
        told.append(f"lowest {low}{unit}, highest {high}{unit}.")
    return (
        f"<figure><figcaption><h2>{heading}</h2><ul>{''.join(keys)}</ul></figcaption>\n"
        f'<svg role="img" viewBox="0 0 400 200" data-unit="{unit}" data-area="{area}">'
        f"<title>{name} over steps</title><desc>{' '.join(told)}</desc>\n"
        f"{lines(drawn)}\n</svg></figure>"
    )


def _thin(points: list[tuple], most: int) -> list[tuple]:
    """Keeps the first, last, lowest and highest points of equal parts of a long curve."""
    if len(points) <= most:
        return points
    kept, parts = set(), most // 4
    for part in range(parts):
        own = range(part * len(points) // parts, (part + 1) * len(points) // parts)
        kept |= {*own[:1], *own[-1:], *sorted(own, key=lambda i: points[i][1])[:: len(own) - 1]}
    return [points[i] for i in sorted(kept)]


def _corners(points: list[tuple], switches: list) -> list[tuple]:
    """Makes a stepped curve that changes at switches, or at a record if there is no switch."""
    line = points[:1]
    for (start, before), (stop, after) in itertools.pairwise(points):
        at = next((step for step in switches if start <= step < stop), start)
        line += [(at, before), (at, after), (stop, after)] if before != after else [(stop, after)]
    return line


def _ticks(low: float, high: float, least: float = 0) -> list[tuple[float, str]]:
    """Chooses round, equally spaced numbers that enclose all values, with their texts."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = min(0, low), max(0, high) or 1
    unit = 10.0 ** math.floor(math.log10((high - low) / 5))
    size = max(least, next(m * unit for m in (1, 2, 5, 10) if 5 * m * unit >= high - low))
    digits = max(0, -math.floor(math.log10(size) + 1e-9))
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    form = f",.{digits}f" if digits < 5 and max(-first, last) * size < 1e6 else ".3g"
    return [(i * size, format(i * size, form)) for i in range(first, last + 1)]
