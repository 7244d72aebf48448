"""Writes the course of training runs as one HTML file that loads nothing from the network."""

import itertools
import math
import numbers
import os
import reprlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jaxprune import files
from jaxprune.reports._curves import (
    BYTES,
    NUMBER,
    TIME,
    Run,
    finite,
    lines,
    measured,
    number_text,
    plots,
    unit_of,
)
from jaxprune.reports._tables import _text


def write_page(
    path: str | os.PathLike[str],
    *,
    title: str,
    records: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]],
    switches: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]] = (),
    facts: Mapping[str, Any] | None = None,
    widths: Mapping[str, tuple[int, int]] | None = None,
) -> None:
    """Writes a page of facts, curves over steps, switches to smaller networks, and widths.

    The file loads nothing. Values that were not measured are not shown. Long curves are thinned,
    but keep their first, last, lowest and highest values.

    Args:
        path: the HTML file to write, atomically. Its folder is created.
        title: heading of the page.
        records: lines of `metrics.jsonl`: `step`, and if measured `test_accuracy`, `train_accuracy`
            and `sparsity` as fractions, `train_loss`, `seconds_per_step`, `seconds` of training so
            far, `peak_bytes`, `parameters` and `macs`; None and NaN count as not measured. To
            compare runs, a mapping label -> records.
        switches: switches of `summary.json`: `step`, and if known `parameters`, `macs` and
            `peak_bytes` (also with `_before`), `seconds` that the switch took, and `difference` of
            outputs. A record of the same step is from before the switch. To compare runs, a mapping
            label -> switches.
        facts: label -> value, for the top of the page. A value may be a mapping itself.
        widths: name of a layer or group -> its channels (before, after).

    Raises:
        ValueError: if a `step` is missing, a value is no number, or labels or widths do not fit.

    Example:
        >>> import pathlib, tempfile
        >>> run = [{"step": 0, "test_accuracy": 0.1}, {"step": 9, "test_accuracy": 0.9}]
        >>> cut = [{"step": 5, "parameters": 500, "parameters_before": 1000}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_page(f"{folder}/run.html", title="A run", records=run, switches=cut)
        ...     "1,000 → 500" in pathlib.Path(folder, "run.html").read_text(encoding="utf-8")
        True
    """
    runs = _runs(records, switches)
    body = [_facts(facts or {}), plots(runs), _switches(runs), _widths(widths or {})]
    name, body = escape(title), "\n".join(filter(None, body))
    page = f"{_HEAD}<title>{name}</title>\n<style>{_CSS}</style>\n<main>\n<h1>{name}</h1>\n{body}\n"
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(target) as file:
        file.write(f"{page}</main>\n<script>{_SCRIPT}</script>\n")


def _runs(records: Any, switches: Any) -> list[Run]:
    """Makes label, records and switches of each run, sorted by step; a single run has no label."""
    if not isinstance(records, Mapping):
        records, switches = {"": records}, {"": switches}
    switches = switches if isinstance(switches, Mapping) else {"": switches} if switches else {}
    if unknown := [label for label in switches if label not in records]:
        raise ValueError(
            f"`switches` must use the labels of `records`, {list(records)}, but has {unknown}: "
            "pass a mapping from these labels to switches"
        )
    return [
        (str(label), _by_step(own, "records"), _by_step(switches.get(label, ()), "switches"))
        for label, own in records.items()
    ]


def _by_step(entries: Any, argument: str) -> list[Mapping[str, Any]]:
    """Checks entries and sorts them by step."""
    entries = list(entries) if isinstance(entries, Iterable) else [entries]
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or finite(entry, "step") is None:
            raise ValueError(
                f"`{argument}` must hold mappings with a finite `step`, but entry {number} is "
                f"{reprlib.repr(entry)}: pass lines of metrics.jsonl, or switches of summary.json"
            )
    return sorted(entries, key=lambda entry: entry["step"])


def _facts(facts: Mapping[str, Any]) -> str:
    """Writes the facts that the caller gave."""
    rows = []
    for label, value in facts.items():
        parts = value.items() if isinstance(value, Mapping) else [("", value)]
        text = ", ".join(f"{name} {_text(part)}".strip() for name, part in parts)
        rows.append(f"<div><dt>{escape(str(label))}</dt><dd>{escape(text)}</dd></div>")
    return f"<dl>\n{lines(rows)}\n</dl>" if rows else ""


def _table(name: str, head: Iterable[str], rows: Iterable[Iterable[str]], note: str) -> str:
    """Writes a table of HTML cells that scrolls if it is too wide."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = lines("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<section><h2>{name}</h2>\n<div tabindex="0" role="region" aria-label="{name}"><table>\n'
        f"<tr>{top}</tr>\n{body}\n</table></div>\n<p class='note'>{note}</p></section>"
    )


_COLUMNS = {
    "parameters": ("Parameters", NUMBER),
    "macs": ("MACs", NUMBER),
    "seconds_per_step": ("Step time", TIME[2:]),
    "peak_bytes": ("Peak memory", BYTES),
    "cost": ("Cost", TIME[2:3]),
    "saved": ("Saved", TIME[2:3]),
    "difference": ("Difference", NUMBER),
}
_NOTE = """Before → after. Step time: median of the records between switches. Saved: time saved per
step, times the steps that followed, minus the cost. Difference: the largest between outputs."""


def _switches(runs: list[Run]) -> str:
    """Writes what each switch changed, cost and saved."""
    found = [change for run in runs for change in _changes(*run)]
    head = ["Switch", "Step"]
    rows = [
        [f"{i} {escape(own['run'])}", number_text(own["step"])] for i, own in enumerate(found, 1)
    ]
    for key, (name, units) in _COLUMNS.items():
        if known := [value for change in found for value in change[key] if value is not None]:
            factor, unit = unit_of(units, known)
            head.append(f"{name}, {unit}" if unit else name)
            for row, change in zip(rows, found):
                own = ["–" if n is None else number_text(n, factor) for n in change[key]]
                row.append(" → ".join(own))
    return _table("Switches", head, rows, _NOTE) if found else ""


def _changes(label: str, records: list, switches: list) -> list[dict[str, Any]]:
    """Collects the values before and after each switch."""
    edges = [-math.inf, *(entry["step"] for entry in switches), math.inf]
    stages = [[r for r in records if a < r["step"] <= b] for a, b in itertools.pairwise(edges)]
    changes, earlier = [], {}
    for entry, before, after in zip(switches, stages, stages[1:]):
        change: dict[str, Any] = {"run": label, "step": entry["step"]}
        for key in ("parameters", "macs", "peak_bytes"):
            old = [finite(entry, f"{key}_before"), finite(earlier, key)]
            old += [value for _, value in reversed(measured(before, key))]
            new = [finite(entry, key), *(value for _, value in measured(after, key))]
            change[key] = [next((v for v in vs if v is not None), None) for vs in (old, new)]
        times = [[v for _, v in measured(own, "seconds_per_step")] for own in (before, after)]
        slow, fast = (statistics.median(stage) if stage else None for stage in times)
        cost, saved = finite(entry, "seconds"), None
        if slow is not None and fast is not None and cost is not None:
            saved = (slow - fast) * (records[-1]["step"] - entry["step"]) - cost
        change |= {"seconds_per_step": (slow, fast), "cost": (cost,), "saved": (saved,)}
        changes.append(change | {"difference": (finite(entry, "difference"),)})
        earlier = entry
    return changes


def _widths(widths: Mapping[str, tuple[int, int]]) -> str:
    """Draws the channels of each layer as bars."""
    for name, pair in widths.items():
        found = pair if isinstance(pair, Sequence) else ()
        if [isinstance(n, numbers.Integral) and n >= 0 for n in found] != [True, True]:
            raise ValueError(
                f"`widths` must have counts of channels (before, after), but {name!r} has {pair!r}"
            )
    rows, most = [], max((1, *(n for pair in widths.values() for n in pair)))
    for name, (before, after) in widths.items():
        bars = f'<rect class="before" width="{100 * before / most:.2f}" height="10"/>'
        bars += f'<rect width="{100 * after / most:.2f}" height="10"/>'
        svg = f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none">{bars}</svg>'
        kept = f"{100 * after / before:.0f}\u202f%" if before else "–"
        label = escape(str(name)).replace(".", ".<wbr>").replace("/", "/<wbr>")
        rows.append([label, svg, f"{before:,} → {after:,}", kept])
    head = "Layer", "", "Before → after", "Kept"
    return _table("Channels", head, rows, "Pale: before. Full: after.") if rows else ""


_HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
"""
# The colours are those of all plots; in dark mode the brighter ones come first.
_CSS = """
:root{--paper:#fff;--card:#f7f8fa;--ink:#1c2128;--soft:#57606a;--line:#d9dee4;--c:var(--soft);
--c0:#0072B2;--c1:#D55E00;--c2:#009E73;--c3:#CC79A7;--c4:#56B4E9;--c5:#E69F00;--c6:#000000}
@media screen and (prefers-color-scheme:dark){
:root{--paper:#14171b;--card:#1c2127;--ink:#e8ebee;--soft:#a3adb8;--line:#353c45;
--c0:#56B4E9;--c1:#E69F00;--c2:#009E73;--c3:#CC79A7;--c4:#0072B2;--c5:#D55E00;--c6:#FFFFFF}}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1160px;margin:auto;padding:28px 16px 48px;font-variant-numeric:tabular-nums}
h1{font-size:clamp(22px,4vw,30px);line-height:1.2;margin:0 0 20px;overflow-wrap:anywhere}
h2{font-size:16px;margin:0}section{margin-top:28px}.note,dt,i{color:var(--soft);font:13px system-ui}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:10px 20px;margin:0}
dl div{border-top:2px solid var(--line)}dd{margin:0;overflow-wrap:anywhere;font-weight:600}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:16px}
figure{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px 8px;
margin:0;break-inside:avoid;touch-action:pan-y}ul{list-style:none;margin:2px 0 6px;padding:0}
li{overflow-wrap:anywhere}.key{display:inline-block;width:20px;margin-right:8px}
svg{display:block;width:100%;pointer-events:none}path{fill:none;stroke:currentColor}
text{font-size:11.5px;fill:var(--soft);text-anchor:middle}.end{text-anchor:end}
.grid{color:var(--line)}.curve{stroke-width:2;stroke-linejoin:round}.cross{visibility:hidden}
.dots{stroke-width:5;stroke-linecap:round;stroke-dasharray:none}.dots.thin{stroke-width:3.5}
.curve.thin{stroke-width:1.1;opacity:.7}.switch path{stroke-dasharray:3 3}[role]{overflow-x:auto}
.switch circle{fill:var(--card);stroke:currentColor}.switch text{fill:var(--ink)}
table{border-collapse:collapse;width:100%;font-size:14px}tr{border-bottom:1px solid var(--line)}
th,td{padding:6px 10px 6px 0;text-align:right}td{white-space:nowrap}td:has(.bar){width:50%}
th{font-weight:500;color:var(--soft);vertical-align:bottom}th:first-child,td:first-child{text-align:left}
td:has(+* .bar){white-space:normal;overflow-wrap:anywhere;min-width:106px}
.bar{min-width:48px;height:12px;fill:var(--c0)}.before{opacity:.28}
@media print{[role]{overflow:visible}table{font-size:11px}.plots{grid-template:none/1fr 1fr}}
"""
_SCRIPT = """
const plots = [...document.querySelectorAll("figure")].map(figure => {
  const svg = figure.querySelector("[data-area]"), items = figure.querySelectorAll("li");
  const [left, right, low, high] = svg.dataset.area.split(" ").map(Number), width = right - left;
  const cross = svg.querySelector(".cross"), curves = [...svg.querySelectorAll("[data-points]")]
    .map(path => path.dataset.points.split(" ").map(point => point.split(":")));
  figure.onpointermove = figure.onpointerdown = event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * 400;
    plots.forEach(show => show(Math.min(1, Math.max(0, (at - left) / width))));
  };
  figure.onpointerleave = () => plots.forEach(show => show(null));
  return part => {
    cross.style.cssText = part === null ? "" : `visibility:visible;translate:${part * width}px`;
    const far = ([step]) => part === null ? -step : Math.abs(step - low - part * (high - low));
    curves.forEach((points, i) => {
      const [step, value] = points.reduce((a, b) => far(b) <= far(a) ? b : a);
      items[i].querySelector("b").textContent = value + svg.dataset.unit;
      items[i].querySelector("span").textContent = step;
    });
  };
});
document.body.dataset.ready = plots.length;
"""
