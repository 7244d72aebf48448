"""Pages read back with a parser, numbers against those worked out by hand, and a real browser."""

import html
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxprune import reports
from jaxprune.reports import _curves as drawing
from jaxprune.reports import _plots

KEYS = {
    "train_loss": 2.5,
    "train_accuracy": 0.75,
    "test_accuracy": 0.5,
    "sparsity": 0.25,
    "seconds_per_step": 0.125,
    "seconds": 90.0,
    "peak_bytes": 3 * 2**20,
    "parameters": 5000,
    "macs": 4_000_000,
}
EVIL = "</title><script>alert('1')</script>\"&"


def _write(tmp_path, **options) -> str:
    options = {"title": "A run", "records": []} | options
    reports.write_page(tmp_path / "page.html", **options)
    return (tmp_path / "page.html").read_text(encoding="utf-8")


class _Tags(HTMLParser):
    """Start tags with their attributes, and the text inside of each kind of tag."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.texts, self._open = [], {}, []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        for tag in set(self._open):
            self.texts[tag][-1] += data


def _plots_of(page: str) -> dict[str, ElementTree.Element]:
    """Name -> SVG of the plots."""
    found = re.findall(r'<svg role="img".*?</svg>', page, re.S)
    svgs = [ElementTree.fromstring(svg) for svg in found]
    return {svg.findtext("title", "").removesuffix(" over steps"): svg for svg in svgs}


def _tables(page: str) -> dict[str, list[list[str]]]:
    """Heading -> lines of cells."""
    tables = {}
    for name, body in re.findall(r'aria-label="([^"]*)"><table>(.*?)</table>', page, re.S):
        lines = re.findall(r"<tr>(.*?)</tr>", body, re.S)
        cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.S) for line in lines]
        tables[name] = [
            [html.unescape(re.sub("<.*?>", "", cell)).strip() for cell in row] for row in cells
        ]
    return tables


def _curves(svg: ElementTree.Element) -> list[list[tuple[float, float]]]:
    """Steps and values of each curve, as the read-out shows them."""
    curves = [path.get("data-points") for path in svg.iter("path") if path.get("data-points")]
    pairs = [[point.split(":") for point in curve.split()] for curve in curves if curve]
    return [[(float(s), float(v.replace(",", ""))) for s, v in curve] for curve in pairs]


def _corners(svg: ElementTree.Element) -> list[tuple[float, float]]:
    """Where something is drawn."""
    corners = []
    for path in svg.iter("path"):
        x = y = math.nan
        for command, numbers in re.findall(r"([MHVh])([^MHVh]*)", path.get("d", "")):
            values = [float(number) for number in numbers.split()]
            if command == "M":
                corners += zip(values[::2], values[1::2], strict=True)
            else:
                x, y = corners[-1]
                move = {"H": (values[0], y), "V": (x, values[0]), "h": (x + values[0], y)}
                corners.append(move[command])
    for circle in svg.iter("circle"):
        x, y, r = (float(circle.get(name, "nan")) for name in ("cx", "cy", "r"))
        corners += [(x - r, y - r), (x + r, y + r)]
    for text in svg.iter("text"):
        x, y = float(text.get("x", "nan")), float(text.get("y", "nan"))
        width = 6.5 * len(text.text or "")
        left = x - width if text.get("class") == "end" else x - width / 2
        corners += [(left, y - 9), (left + width, y + 3)]
    return corners


def _records(steps=range(0, 401, 20), seed=0, **more):
    """A made-up run that has every value."""
    rng = np.random.default_rng(seed)
    return [
        {"step": step} | {k: v * rng.uniform(0.5, 1) for k, v in KEYS.items()} for step in steps
    ]


# ---- curves


def test_curves_are_where_they_belong(tmp_path):
    records = [{"step": step, "test_accuracy": step / 200} for step in (0, 50, 200)]
    svg = _plots_of(_write(tmp_path, records=records))["Accuracy"]
    paths = [path.get("d") for path in svg.iter("path") if path.get("data-points")]
    assert paths == ["M52.0 180.0 133.0 141.0 376.0 24.0"]
    assert _curves(svg) == [[(0, 0), (50, 25), (200, 100)]]
    texts = [(text.text, text.get("y")) for text in svg.iter("text")]
    assert ("0", "184.0") in texts and ("100", "28.0") in texts and ("step", "196") in texts


def test_every_value_has_a_plot_with_unit_and_description(tmp_path):
    page = _write(tmp_path, records=[{"step": step, **KEYS} for step in (1, 2)])
    assert _Tags(page).texts["h2"] == [
        "Accuracy, %",
        "Training loss",
        "Sparsity, %",
        "Time of a step, ms",
        "Training time so far, s",
        "Peak memory of a step, MiB",
        "Parameters, k",
        "Multiply-accumulates (MACs), M",
    ]
    shown = [[value for _, value in curve] for svg in _plots_of(page).values()
             for curve in _curves(svg)]  # fmt: skip
    assert shown == [[v, v] for v in (50, 75, 2.5, 25, 125, 90, 3, 5, 4)]
    for svg in _plots_of(page).values():
        assert "at step 1," in svg.findtext("desc", "") and "highest" in svg.findtext("desc", "")
    assert re.findall(r"<b>(.*?)</b>", page)[:3] == ["50\u202f%", "75\u202f%", "2.5"]


def test_all_is_drawn_inside(tmp_path):
    runs = {"a": _records(), "b": _records(range(1000, 2_000_000, 99_999), seed=1)}
    runs["b"][3] |= {"train_loss": 1e7, "seconds_per_step": 1e4, "macs": 10**14}
    switches = {"b": [{"step": step} for step in (0, 5000, 1_000_000, 2_000_000)]}
    svgs = _plots_of(_write(tmp_path, records=runs, switches=switches))
    assert len(svgs) == 8
    for svg in svgs.values():
        _, _, width, height = map(float, svg.get("viewBox", "").split())
        for x, y in _corners(svg):
            assert 0 <= x <= width and 0 <= y <= height


def test_costs_stay_until_a_switch(tmp_path):
    records = [{"step": s, "parameters": p} for s, p in ((0, 8), (40, 8), (80, 4), (100, 2))]
    switches = [{"step": 50}]
    svg = _plots_of(_write(tmp_path, records=records, switches=switches))["Parameters"]
    (path,) = (path.get("d") for path in svg.iter("path") if path.get("data-points"))
    # From 8 to 4 at step 50, where the network changed; from 4 to 2 right after the record.
    assert path == (
        "M52.0 24.0 181.6 24.0 214.0 24.0 214.0 102.0 311.2 102.0 311.2 102.0 311.2 141.0 "
        "376.0 141.0"
    )


@given(low=st.floats(-1e9, 1e9), size=st.floats(0, 1e9))
def test_ticks_are_round(low, size):
    ticks = drawing._ticks(low, low + size)
    values = [value for value, _ in ticks]
    gap = values[1] - values[0]
    assert 2 <= len(ticks) <= 7
    assert values[0] <= low + 1e-6 * gap and values[-1] >= low + size - 1e-6 * gap
    assert np.allclose(np.diff(values), gap)
    assert f"{gap:.1e}"[:3] in ("1.0", "2.0", "5.0")


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, np.float32("nan")])
def test_what_is_missing_is_not_drawn(tmp_path, missing):
    records = [{"step": 0, **dict.fromkeys(KEYS, missing)}, {"step": 5, "train_loss": 1.0}]
    records.append({"step": 9, "train_loss": missing})
    svgs = _plots_of(_write(tmp_path, records=records))
    assert list(svgs) == ["Training loss"]
    assert _curves(svgs["Training loss"]) == [[(5, 1)]]


@pytest.mark.parametrize("records", [[], [{"step": 3}], [{"step": 3, "train_loss": math.nan}]])
def test_page_without_curves_says_so(tmp_path, records):
    page = _write(tmp_path, records=records, switches=[{"step": 1}], facts={"a": 1})
    assert "No curves" in page and not _plots_of(page)
    assert _tables(page)["Switches"] == [["Switch", "Step"], ["1", "1"]]


def test_one_record_is_a_dot(tmp_path):
    svgs = _plots_of(_write(tmp_path, records=[{"step": 7, **KEYS}, {"step": 7, "sparsity": 0}]))
    assert len(svgs) == 8
    for svg in svgs.values():
        assert any("h0" in path.get("d", "") for path in svg.iter("path"))
        assert "7" in [text.text for text in svg.iter("text")]
        assert all(52 <= x <= 376 for x, _ in _corners(svg) if x > 52)


def test_records_are_put_in_order(tmp_path):
    records = [{"step": step, "train_loss": 1.0 + step} for step in (20, 0, 10)]
    (svg,) = _plots_of(_write(tmp_path, records=records)).values()
    assert _curves(svg) == [[(0, 1), (10, 11), (20, 21)]]


@pytest.mark.parametrize("runs", [1, 5])
def test_many_records_are_thinned(tmp_path, runs):
    records = {f"run {i}": _records(range(10_000 // runs), seed=i) for i in range(runs)}
    for own in records.values():
        own[1234]["train_loss"], own[1300]["train_loss"] = 77.0, -7.0
    page = _write(tmp_path, records=records)
    assert len(page.encode()) < 300_000
    curves = [curve for svg in _plots_of(page).values() for curve in _curves(svg)]
    assert len(curves) == 9 * runs
    for curve, own in zip(_curves(_plots_of(page)["Training loss"]), records.values()):
        assert curve[0] == (0, float(f"{own[0]['train_loss']:.4g}"))
        assert curve[-1] == (len(own) - 1, float(f"{own[-1]['train_loss']:.4g}"))
        assert (1234, 77) in curve and (1300, -7) in curve
        assert 100 < len(curve) <= 6000 / len(curves)
        assert curve == sorted(curve)
    few = _curves(_plots_of(_write(tmp_path, records=_records(range(600))))["Training loss"])
    assert len(few[0]) == 600


def test_runs_differ_in_colour_and_dashes(tmp_path):
    page = _write(tmp_path, records={"dense": _records(), "agip": _records(seed=1)})
    svg = _plots_of(page)["Training loss"]
    curves = [path for path in svg.iter("path") if path.get("data-points")]
    assert len({path.get("style") for path in curves}) == 2
    assert len({path.get("stroke-dasharray") for path in curves}) == 2
    assert "dense, test <b>" in page and "agip, batch <b>" in page


# ---- switches, widths, facts


def _switched():
    """Ten records of a run that changes after step 30 and after step 60."""
    times = [0.1, 0.3, 0.2, 0.05, 0.05, 0.5, 0.01, 0.02, math.nan, 0.03]
    records = [
        {"step": 10 * i, "seconds_per_step": time, "peak_bytes": 2**20 * (12 - i), "train_loss": 1}
        for i, time in enumerate(times, 1)
    ]
    first = {"step": 30, "parameters": 6000, "parameters_before": 10_000, "seconds": 2.0}
    first |= {"macs": 700, "widths": {"a": 4}, "restarted": [], "rounded": []}
    first |= {"peak_bytes": 2**23, "difference": 1e-6}
    return records, [first, {"step": 60, "parameters": 3000, "macs": 500, "seconds": 0.5}]


def test_every_switch_is_in_every_plot(tmp_path):
    records, switches = _switched()
    svgs = _plots_of(_write(tmp_path, records=records, switches=switches))
    assert len(svgs) == 3
    for svg in svgs.values():
        groups = [group for group in svg.iter("g") if group.get("class") == "switch"]
        assert [group.findtext("text") for group in groups] == ["1", "2"]
        # Steps 30 and 60 of 10 to 100, between 52 and 376.
        lines = [path.get("d") for group in groups for path in group.iter("path")]
        assert lines == ["M124.0 24V180", "M232.0 24V180"]


def test_switch_table_has_the_numbers_worked_out_by_hand(tmp_path):
    records, switches = _switched()
    head, *rows = _tables(_write(tmp_path, records=records, switches=switches[::-1]))["Switches"]
    table = [dict(zip(head, row, strict=True)) for row in rows]
    assert table[0] == {
        "Switch": "1",
        "Step": "30",
        "Parameters": "10,000 → 6,000",
        "MACs": "– → 700",
        "Step time, ms": "200 → 50",  # medians of 0.1 0.3 0.2 and of 0.05 0.05 0.5
        "Peak memory, MiB": "9 → 8",  # of the record of step 30, and as the switch says
        "Cost, s": "2",
        "Saved, s": "8.5",  # 0.15 s in each of 70 steps, less 2 s
        "Difference": "1e-06",
    }
    assert table[1] == {
        "Switch": "2",
        "Step": "60",
        "Parameters": "6,000 → 3,000",  # before: after the first
        "MACs": "700 → 500",
        "Step time, ms": "50 → 20",
        "Peak memory, MiB": "8 → 5",  # as the first switch says, and of the record of step 70
        "Cost, s": "0.5",
        "Saved, s": "0.7",  # 0.03 s in each of 40 steps, less 0.5 s
        "Difference": "–",
    }


def test_switches_of_several_runs_are_numbered_through(tmp_path):
    records, switches = _switched()
    runs = {"dense": records, "one": records, "two": records}
    page = _write(tmp_path, records=runs, switches={"one": switches, "two": switches[:1]})
    assert [row[0] for row in _tables(page)["Switches"][1:]] == ["1 one", "2 one", "3 two"]
    for svg in _plots_of(page).values():
        numbers = [group.findtext("text") for group in svg.iter("g")]
        assert numbers == ["1", "2", "3"]


def test_widths_are_bars(tmp_path):
    widths = {"stem": (16, 8), "block.conv": [np.int64(64), 48], "gone": (32, 0)}
    page = _write(tmp_path, widths=widths)
    assert _tables(page)["Channels"] == [
        ["Layer", "", "Before → after", "Kept"],
        ["stem", "", "16 → 8", "50\u202f%"],
        ["block.conv", "", "64 → 48", "75\u202f%"],
        ["gone", "", "32 → 0", "0\u202f%"],
    ]
    bars = re.findall(r'<rect (?:class="(\w+)" )?width="([\d.]+)"', page)
    # Of the widest, in per cent; the pale one is behind.
    assert [float(width) for _, width in bars] == [25, 12.5, 100, 75, 50, 0]
    assert [kind for kind, _ in bars] == ["before", ""] * 3


def test_facts_are_shown_as_in_tables(tmp_path):
    facts = {"Weights": 1_234_567, "Accuracy": 0.98765, "Device": None, "Versions": {"jax": "0.10"}}
    texts = _Tags(_write(tmp_path, facts=facts)).texts
    assert texts["dt"] == list(facts)
    assert texts["dd"] == ["1,234,567", "0.9877", "-", "jax 0.10"]


# ---- the file


def test_text_is_escaped(tmp_path):
    records, switches = _switched()
    page = _write(
        tmp_path,
        title=EVIL,
        records={EVIL: records},
        switches={EVIL: switches},
        facts={EVIL: EVIL, "a": {EVIL: EVIL}},
        widths={EVIL: (2, 1)},
    )
    tags = _Tags(page)
    assert [tag for tag, _ in tags.tags].count("script") == 1
    assert "alert(" not in tags.texts["script"][0]
    assert tags.texts["title"][0] == EVIL and tags.texts["h1"] == [EVIL]
    assert tags.texts["dd"] == [EVIL, f"{EVIL} {EVIL}"]
    assert _tables(page)["Channels"][1][0] == EVIL
    assert _tables(page)["Switches"][1][0] == f"1 {EVIL}"


def test_file_needs_nothing_from_outside(tmp_path):
    records, switches = _switched()
    page = _write(tmp_path, records=records, switches=switches, widths={"a/b": (2, 1)})
    for part in ("http:", "https:", "//", "<link", "src=", "href", "url(", "@import", "fetch("):
        assert part not in page
    (policy,) = (own["content"] for tag, own in _Tags(page).tags if "http-equiv" in own)
    assert policy.startswith("default-src 'none';")


def _css(page: str) -> tuple[dict[str, str], dict[str, str]]:
    """Colours in the light and in the dark."""
    light, dark = re.findall(r":root\{(.*?)\}", page, re.S)
    return dict(re.findall(r"--(\w+):(#\w+)", light)), dict(re.findall(r"--(\w+):(#\w+)", dark))


def _contrast(one: str, other: str) -> float:
    """As the accessibility guidelines of the W3C define it."""
    luminances = []
    for colour in (one, other):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        rgb = np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        luminances.append(float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05)
    return max(luminances) / min(luminances)


def test_colours_can_be_told_apart(tmp_path):
    light, dark = _css(_write(tmp_path))
    assert _contrast("#fff", "#000000") == pytest.approx(21)
    assert [light[f"c{i}"] for i in range(7)] == list(_plots._COLOURS)
    assert {dark[f"c{i}"] for i in range(6)} == set(_plots._COLOURS[:6])
    for colours in (light, dark):
        for ground in ("paper", "card"):
            assert _contrast(colours["ink"], colours[ground]) > 7
            assert _contrast(colours["soft"], colours[ground]) > 4.5
            assert all(_contrast(colours[f"c{i}"], colours[ground]) > 3 for i in range(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"records": [{"step": 1}, {"train_loss": 2}]}, r"`records` .*`step`.*entry 1 .*: pass"),
        ({"records": [{"step": math.nan}]}, r"`records` .*finite `step`"),
        ({"records": "metrics.jsonl"}, r"`records` .*entry 0 is 'm'"),
        ({"records": {"step": 1, "train_loss": 2}}, r"`records` .*entry 0 is 1"),
        ({"switches": [{"macs": 1}]}, r"`switches` .*entry 0 is {'macs': 1}"),
        ({"records": [{"step": 1, "train_loss": "low"}]}, r"`train_loss` .*'low'.*: leave out"),
        ({"switches": [{"step": 1, "seconds": "2 s"}]}, r"`seconds` .*'2 s'"),
        ({"records": {"a": []}, "switches": {"b": []}}, r"`switches` .*\['a'\].*\['b'\]: pass"),
        ({"records": {"a": []}, "switches": [{"step": 1}]}, r"`switches` .*\['a'\].*: pass"),
        ({"widths": {"conv": 3}}, r"`widths` .*\(before, after\), but 'conv' has 3"),
        ({"widths": {"conv": (3, 2, 1)}}, r"`widths` .*'conv' has \(3, 2, 1\)"),
        ({"widths": {"conv": (3, 2.5)}}, r"`widths` .*'conv'"),
        ({"widths": {"conv": (3, -1)}}, r"`widths` .*'conv'"),
    ],
)
def test_mistakes_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        _write(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_failed_page_leaves_the_old_one(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("disk full")

    folder = tmp_path / "new"
    _write(folder, title="old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        with pytest.raises(OSError, match="full"):
            _write(folder, title="new")
    assert "<h1>old</h1>" in (folder / "page.html").read_text()
    assert [path.name for path in folder.iterdir()] == ["page.html"]


# ---- in a browser

BROWSERS = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Runs a headless browser: `browse(file, *options)` gives what it printed and complained of."""
    names = filter(None, (os.environ.get("CHROME"), *BROWSERS))
    browser = next((path for path in map(shutil.which, names) if path), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is there, nor $CHROME")
    profile = tmp_path_factory.mktemp("profile")

    def run(path, *options):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--no-first-run", "--disable-background-networking", "--disable-sync"]
        command += ["--disable-component-update", f"--user-data-dir={profile}"]
        # A proxy that is not there: what the browser asks for by itself stays on this machine.
        command += ["--proxy-server=http://127.0.0.1:9", "--enable-logging=stderr"]
        command += [*options, path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return run


@pytest.fixture
def pages(tmp_path):
    """A page that has everything, and copies of it that are broken in one way each."""
    records, switches = _switched()
    runs = {"dense": _records(range(10, 101, 5)), "shrinking": records}
    facts = {"Test accuracy": "98.7 %", "Versions": {"jax": "0.10.2", "optax": "0.2.8"}}
    names = [f"stage{i}.block{j}.a_rather_long_name_of_a_convolution" for i in "123" for j in "12"]
    page = _write(
        tmp_path,
        title="A run whose network gets smaller while it trains",
        records=runs,
        switches={"shrinking": switches * 2},
        facts=facts,
        widths={name: (16, 9) for name in names},
    )
    return tmp_path / "page.html", page


def _inspect(browse, folder, page: str, width: int, script: str):
    """What a script finds out about a page in a frame of some width."""
    outer = f"""<!doctype html><body style="margin:0">
<iframe style="border:0;width:{width}px;height:600px" srcdoc="{html.escape(page)}"></iframe>
<script>onload = () => {{
  const frame = document.querySelector("iframe").contentWindow, page = frame.document;
  document.body.dataset.found = JSON.stringify((() => {{ {script} }})());
}};</script>"""
    (folder / "outer.html").write_text(outer, encoding="utf-8")
    text, complaints = browse(folder / "outer.html", "--dump-dom")
    assert complaints == []
    (found,) = (own["data-found"] for tag, own in _Tags(text).tags if "data-found" in own)
    return json.loads(found)


def test_browser_runs_the_script_without_complaint(browse, pages):
    path, page = pages
    text, complaints = browse(path, "--dump-dom")
    assert complaints == []
    bodies = [own for tag, own in _Tags(text).tags if tag == "body"]
    assert bodies == [{"data-ready": "8"}]
    # What is there without the script is there with it.
    assert re.findall("<b>.*?</b>", text) == re.findall("<b>.*?</b>", page)
    path.write_text(page.replace("<script>", "<script>nothing.here();"), encoding="utf-8")
    text, complaints = browse(path, "--dump-dom")
    assert "nothing is not defined" in complaints[0] and "data-ready" not in text


def test_browser_asks_nothing_of_the_network(browse, pages):
    path, page = pages
    log = path.with_name("net.json")

    def asked(content: str) -> tuple[list[str], list[str]]:
        """What a page asks for, and what the browser says of it; its own requests do not count."""
        path.write_text(content, encoding="utf-8")
        _, complaints = browse(path, f"--log-net-log={log}", "--dump-dom")
        found = json.loads(log.read_text())
        kind = found["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
        jobs = [event.get("params", {}) for event in found["events"] if event["type"] == kind]
        urls = [job["url"] for job in jobs if job.get("initiator", "not an origin") == "null"]
        return urls, complaints

    picture = '<img src="http://nowhere.test/a.png">'
    assert asked(page) == ([], [])
    assert asked(picture) == (["http://nowhere.test/a.png"], [])
    # Were there a picture, the page's own policy would keep the browser from asking for it.
    urls, complaints = asked(page.replace("</h1>", f"</h1>{picture}"))
    assert urls == [] and "violates" in complaints[0]


@pytest.mark.parametrize("width", [360, 768])
def test_page_fits_narrow_screens(browse, pages, width):
    path, page = pages
    script = """
      const root = page.documentElement, wide = page.querySelector("[role=region]");
      return [root.scrollWidth, root.clientWidth, wide.scrollWidth > wide.clientWidth];"""
    found = _inspect(browse, path.parent, page, width, script)
    # The table of switches scrolls by itself where it must.
    assert found == [width, width, width == 360]
    broken = page.replace("overflow-x:auto", "")
    if width == 360:
        assert _inspect(browse, path.parent, broken, width, script)[0] > width


def test_pointer_reads_values_out_of_all_plots(browse, pages):
    path, page = pages
    script = """
      const figures = [...page.querySelectorAll("figure")], area = figures[0].querySelector(
        "[data-area]"), box = area.getBoundingClientRect();
      const texts = () => figures.map(own => [...own.querySelectorAll("li")].map(item =>
        item.querySelector("b").textContent + " " + item.querySelector("span").textContent));
      const crosses = () => figures.map(own => {
        const cross = own.querySelector(".cross");
        return [frame.getComputedStyle(cross).visibility, cross.getBoundingClientRect().left
          - own.querySelector("[data-area]").getBoundingClientRect().left];
      });
      const before = texts();
      const at = box.left + box.width * (52 + 324 * (51 - 10) / 90) / 400;
      figures[0].dispatchEvent(new frame.PointerEvent("pointermove", {clientX: at}));
      const during = texts(), shown = crosses();
      figures[0].dispatchEvent(new frame.PointerEvent("pointerleave"));
      return [before, during, shown, texts(), crosses(), box.width];"""
    before, during, shown, after, hidden, width = _inspect(browse, path.parent, page, 900, script)
    assert before == after != during
    plots = _plots_of(page).values()
    for svg, texts in zip(plots, during, strict=True):
        paths = [own.get("data-points", "") for own in svg.iter("path") if own.get("data-points")]
        near = [dict(p.split(":") for p in points.split())["50"] for points in paths]
        assert texts == [f"{value}{svg.get('data-unit')} 50" for value in near]
    place = width * (52 + 324 * 41 / 90) / 400
    for (visible, left), (gone, _) in zip(shown, hidden, strict=True):
        assert (visible, gone) == ("visible", "hidden")
        assert left == pytest.approx(place, abs=1.5)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_pictures_of_the_page(browse, pages, width, scheme):
    path, page = pages
    if width < 500:  # less than a window can have
        frame = f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{{}}"></iframe>'
        path.write_text(f"<body style='margin:0'>{frame.format(html.escape(page))}")
    number = ["dark", "light"].index(scheme)
    options = f"--window-size={width},900", f"--blink-settings=preferredColorScheme={number}"
    picture = path.with_suffix(".png")
    browse(path, *options, f"--screenshot={picture}")
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))[:800, :width].astype(int)
    colours = _css(page)[number == 0]

    def share(name, tolerance=12):
        digits = colours[name].removeprefix("#")
        digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
        colour = [int(digits[i : i + 2], 16) for i in (0, 2, 4)]
        return float((abs(pixels - colour).max(axis=-1) <= tolerance).mean())

    assert share("paper", 0) > 0.15 and share("card", 0) > 0.3
    assert share("ink") > 0.005 and share("c0") > 0.0005 and share("c1") > 0.0005
