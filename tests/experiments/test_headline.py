"""scripts/study.py headline with a stand-in for train.py: arms, order, numbers, and refusals."""

import json
import sys
import types

import pytest

from jaxprune import reports
from jaxprune.experiments.studies import headline as headline_module
from jaxprune.experiments.studies import methods

pytestmark = pytest.mark.scripts  # the stand-in runs in child processes

# A run whose numbers follow from its options, as train.py would leave them.
FAKE = """
import argparse, json, os, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("config")
names = "method granularity widths seed steps workdir sparsity learning-rate parts warmup-steps"
names += " log-every eval-every save-every budget multiple regrow prune-start prune-stop"
for name in (names + " fine-sparsity validation grow-from grow-at kernels teacher ema").split():
    parser.add_argument("--" + name)
parser.add_argument("--compact", action="store_true")
args = parser.parse_args()
folder = pathlib.Path(args.workdir)
faults = json.loads((folder.parent / "faults.json").read_text())
with open(folder.parent / "calls.jsonl", "a") as file:
    cached = os.environ.get("JAX_ENABLE_COMPILATION_CACHE")
    file.write(json.dumps({"run": folder.name, "args": sys.argv[1:], "cached": cached}) + chr(10))
if folder.name in faults:
    sys.exit(3)
seed, steps = int(args.seed), int(args.steps)
names = ("sparsity", "parts", "learning_rate", "multiple", "regrow", "prune_start", "prune_stop")
names += ("fine_sparsity", "validation", "warmup_steps", "log_every", "eval_every", "save_every")
names += ("grow_from", "grow_at", "teacher", "ema")
numbers = {name: json.loads(getattr(args, name) or "null") for name in names}
config = vars(args) | {"seed": seed, "steps": steps} | numbers
config = {name: value for name, value in config.items() if value is not None}
(folder / "config.json").write_text(json.dumps(config))
small = args.compact or bool(args.widths)
accuracy = 0.9 + 0.01 * seed - 0.02 * small - 0.001 * (100 - steps) * (args.method == "none")
cost = 0.5 if small else 1.0 + seed
summary = {
    "test_accuracy": accuracy, "parameters": 25 if small else 100, "macs": 30 if small else 100,
    "seconds": 7.0 + steps * cost, "cpu_seconds": 3.0 + steps * cost, "steps": steps,
    "nonzeros": 24 if small else 100, "dense_bytes": 400,
    "file_bytes": {"exact": 100, "bfloat16": 50, "int8": None if seed else 20},
    "step_peak_bytes": 40 if args.parts else 100, "process_peak_bytes": 1000,
    "widths": {"stem": 4, "blocks": [[2, 3]]}, "device": "1 x cpu",
    "versions": {"jax": "9.9"}, "switches": [], "records": 7,
}
if args.validation:
    summary["unseen_accuracy"] = accuracy - 0.1
tests = [(0.5, 0.9), (0.9, 0.995), (1.0, 1.0)]  # part of the run, part of the accuracy
records = [
    {"step": step, "train_loss": 2.0, "cpu_seconds": 3.0 + step * cost, "macs": summary["macs"],
     "parameters": 6 if args.grow_from and step <= 10 else
        25 if args.widths or small and step > 10 else 100}
    for step in (5, 10, 15, 20)
] + [
    {"step": 2, "test_accuracy": share * accuracy}
    | {clock: part * summary[clock] for clock in ("seconds", "cpu_seconds")}
    for part, share in tests
]
(folder / "metrics.jsonl").write_text("".join(json.dumps(r) + chr(10) for r in records))
(folder / "summary.json").write_text(json.dumps(summary))
"""
LEVERS = ["--levers", "--parts 4"]
TRAINING = ["--", "--steps", "100"]
ARMS = [
    "dense", "agip", "narrow", "dense, time of agip", "magnitude", "random", "agip, masks only",
]  # fmt: skip


@pytest.fixture
def headline(tmp_path, monkeypatch):
    """The script with the stand-in; `headline.go(...)` is one command in `headline.root`."""
    module = types.SimpleNamespace(**vars(headline_module))
    (tmp_path / "fake.py").write_text(FAKE)
    module.root = tmp_path / "headline"
    module.root.mkdir()
    (module.root / "faults.json").write_text("[]")
    monkeypatch.setattr(headline_module, "TRAIN", [sys.executable, str(tmp_path / "fake.py")])
    monkeypatch.setattr(reports, "plot_tradeoffs", lambda *_: None)

    def go(*args):
        try:
            methods.main(["headline", *args[:1], "--workdir", str(module.root), *args[1:]])
        except SystemExit as stopped:
            return stopped.code
        return 0

    module.go = go
    return module


def _calls(headline):
    path = headline.root / "calls.jsonl"
    calls = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    return calls


def _option(call, name):
    return call["args"][call["args"].index(name) + 1] if name in call["args"] else None


def _rows(headline):
    lines = [
        line for line in (headline.root / "results.md").read_text().splitlines() if "|" in line
    ]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    heading = rows[0]
    return {row[0]: dict(zip(heading, row)) for row in rows[2:] if len(row) == len(heading)}


@pytest.mark.slow
def test_arms_wait_for_what_they_need(headline):
    assert headline.go("fashion", "--seeds", "0", "1", *LEVERS, *TRAINING) == 0
    calls = {call["run"]: call for call in _calls(headline)}
    plus = ["dense+", "agip+", "narrow+", "dense+, time of agip+"]
    assert set(calls) == {headline.folder_of(arm, s) for arm in [*ARMS, *plus] for s in (0, 1)}
    assert all(call["cached"] == "false" for call in calls.values())
    for name, call in calls.items():
        assert (_option(call, "--parts") == "4") == ("+" in name)
        assert ("--compact" in call["args"]) == name.startswith(("agip-s", "agip+", "mag", "ran"))
        assert json.loads(_option(call, "--widths") or "{}").get("stem", 4) == 4
        assert ("--widths" in call["args"]) == name.startswith("narrow")
    # The dense network takes 3 s of CPU and 1 + seed s a step; agip is done after 53 s.
    assert _option(calls["dense-time-of-agip-seed0"], "--steps") == "100"
    steps = [w for w in calls["dense-time-of-agip-seed0"]["args"] if w.isdigit()]
    assert "50" in steps
    assert "25" in calls["dense-time-of-agip-seed1"]["args"]


def test_numbers(headline):
    assert headline.go("fashion", "--seeds", "0", "1", "--jobs", "2", *TRAINING) == 0
    rows = _rows(headline)
    assert list(rows) == ARMS
    assert rows["dense"]["accuracy"] == "90.50% ± 0.71%"
    assert rows["agip"]["accuracy"] == "88.50% ± 0.71%"
    assert rows["agip"]["relative"] == "97.79% ± 0.02%"  # .88 / .90 and .89 / .91
    assert rows["agip"]["relative time"] == "0.404 ± 0.182"  # 57 / 107 and 57 / 207
    assert (rows["agip"]["parameters"], rows["agip"]["step bytes"]) == ("0.250", "1.000")
    assert rows["agip"]["close (runs)"] == "-"
    assert rows["dense"]["close (runs)"] == "141 (2)"  # after 9 tenths
    text = (headline.root / "results.md").read_text()
    # On CPU goals go by the time of the process: 53 / 103 and 53 / 203.
    assert "| agip | yes: 0.240 of 0.28 | no: 0.978 of 0.992 | no: 0.388 of 0.32 |" in text
    assert "| agip | 0.240 | 0.250 | 0.125 | 0.050 |" in text  # int8: of the one seed that has it
    assert "device: 1 x cpu" in text and "study.py headline fashion" in text
    assert len((headline.root / "results.jsonl").read_text().splitlines()) == 14


def test_held_out_images_while_training_and_test_images_at_the_end(headline):
    options = ["--seeds", "0", "--arms", "dense", "agip", *TRAINING, "--validation", "50"]
    assert headline.go("fashion", *options) == 0
    row = _rows(headline)["agip"]
    assert (row["accuracy"], row["held out"]) == ("78.00%", "88.00%")
    assert row["relative"] == "97.50%"  # .78 / .80


def test_goes_on_after_a_failure(headline):
    (headline.root / "faults.json").write_text('["agip-seed0"]')
    assert "1 runs failed" in headline.go("fashion", "--seeds", "0", *TRAINING)
    first = [call["run"] for call in _calls(headline)]
    assert "narrow-seed0" not in first and "dense-seed0" in first
    (headline.root / "faults.json").write_text("[]")
    assert headline.go("fashion", "--seeds", "0", *TRAINING) == 0
    second = [call["run"] for call in _calls(headline)]
    assert second == ["agip-seed0", "narrow-seed0", "dense-time-of-agip-seed0"]


@pytest.mark.parametrize("size", [0, 20, -1, -3])
def test_a_log_that_lost_lines_gives_no_times(headline, size):
    """-1 cuts the new line only, with which the last record is still whole."""
    options = ["--seeds", "0", "--arms", "narrow", "dense"]
    assert headline.go("fashion", *options, *TRAINING) == 0
    path = headline.root / "dense-seed0" / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    code = headline.go("fashion", *options, *TRAINING)
    if size == -1:
        assert code == 0
    else:
        lost = {0: 7, 20: 7, -3: 1}[size]
        assert "has lost lines" in code and f"dense-seed0: {lost} records" in code
        assert "has lost lines" in headline.go("--report-only")


def test_a_run_for_another_run_than_is_there_is_refused(headline):
    """`narrow` and `time of agip` follow from runs that may have been trained again since."""
    assert headline.go("fashion", "--seeds", "0", *TRAINING) == 0
    path = headline.root / "agip-seed0" / "summary.json"
    summary = json.loads(path.read_text())
    widths, seconds = {"stem": 3, "blocks": [[2, 2]]}, summary["cpu_seconds"] + 20
    path.write_text(json.dumps(summary | {"widths": widths, "cpu_seconds": seconds}))
    _calls(headline)
    code = headline.go("fashion", "--seeds", "0", *TRAINING)
    assert "delete their folders" in code
    for part in ("narrow-seed0: --widths", "dense-time-of-agip-seed0: --steps 50 there, 70 now"):
        assert part in code
    path.write_text(json.dumps(summary))
    assert headline.go("fashion", "--seeds", "0", *TRAINING) == 0


def test_equal_time(headline):
    """Dense costs 3 s and 1 s a step, so a half is 51.5 s; narrow ones take half a second."""
    names = ["dense", "dense, same time", "agip", "narrow", "agip early", "grow"]
    options = ["--time", "0.5", "--seeds", "0", "--arms", *names, "--probe-steps", "20"]
    assert headline.go("fashion", *options, *TRAINING) == 0
    calls = {call["run"]: call for call in _calls(headline)}
    plain = {"dense-seed0", "dense-same-time-seed0", "agip-seed0", "narrow-seed0"}
    probes = {"probe-dense", "probe-agip", "probe-narrow", "probe-agip-early", "probe-grow"}
    assert set(calls) == plain | probes | {"agip-early-seed0", "grow-seed0"}
    steps = json.loads((headline.root / "steps.json").read_text())
    # 3 + n <= 51.5, and 3 + n / 2 <= 51.5, as all steps of the stand-in of agip cost the same.
    assert steps == {
        "dense": 100, "dense, same time": 48, "agip": 97, "narrow": 97, "agip early": 97,
        "grow": 97,
    }  # fmt: skip
    grow = calls["grow-seed0"]  # the widths are those of agip, which it reaches later
    assert json.loads(_option(grow, "--widths")) == {"stem": 4, "blocks": [[2, 3]]}
    found = [_option(grow, name) for name in ("--method", "--granularity", "--multiple")]
    assert found == ["none", "channels", "4"]
    assert (_option(grow, "--grow-from"), _option(grow, "--grow-at")) == ("0.5", "0.1")
    for arm, count in steps.items():
        words = calls[headline.folder_of(arm, 0)]["args"]
        assert [words[i + 1] for i, w in enumerate(words) if w == "--steps"][-1] == str(count)
    assert all(_option(calls[name], "--log-every") == "5" for name in probes)
    rows = _rows(headline)
    assert rows["narrow"]["steps"] == "97" and rows["narrow"]["training MACs"] == "0.300"
    assert rows["narrow"]["CPU time"] == f"{(3 + 97 * 0.5) / 103:.3f}"
    # What was chosen is kept, whatever a later measurement would say.
    (headline.root / "steps.json").write_text(json.dumps(steps | {"narrow": 50}))
    assert headline.go("fashion", *options, *TRAINING) == 0
    assert not (headline.root / "calls.jsonl").exists(), "nothing is trained again"


def test_the_arm_with_a_teacher(headline):
    options = ["--time", "0.5", "--probe-steps", "20", "--seeds", "0"]
    options += ["--arms", "dense", "agip teacher+"]
    assert headline.go("fashion", *options, *LEVERS, *TRAINING) == 0
    calls = {call["run"]: call for call in _calls(headline)}
    assert set(calls) == {
        "probe-dense", "probe-agip-teacher+", "dense-seed0", "agip-teacher+-seed0",
    }  # fmt: skip
    words = ("--method", "--teacher", "--ema", "--parts")
    for name in ("probe-agip-teacher+", "agip-teacher+-seed0"):
        found = [_option(calls[name], word) for word in words]
        assert found == ["agip", "0.5", "0.99", "4"] and "--compact" in calls[name]["args"]
    text = (headline.root / "results.md").read_text()
    about = "as agip+, and the wide network teaches the narrow one; averages of the parameters"
    assert about in text


def test_equal_work_does_not_depend_on_the_clock(headline):
    options = ["--time", "0.5", "--clock", "macs", "--arms", "dense", "narrow", "--seeds", "0"]
    options += ["--probe-steps", "20"]
    assert headline.go("fashion", *options, *TRAINING) == 0
    steps = json.loads((headline.root / "steps.json").read_text())
    assert steps["narrow"] == 166  # 30 n <= half of 100 * 100


def test_chosen_arms_bring_what_they_need(headline):
    options = ["--arms", "narrow", "--rates", "narrow=0.4", "--seeds", "0"]
    assert headline.go("fashion", *options, *TRAINING) == 0
    calls = {call["run"]: call for call in _calls(headline)}
    assert set(calls) == {"agip-seed0", "narrow-seed0"}
    rates = {name: _option(call, "--learning-rate") for name, call in calls.items()}
    assert rates == {"agip-seed0": None, "narrow-seed0": "0.4"}
    assert not (headline.root / "results.md").exists(), "nothing to compare with"


def test_the_network_may_have_other_widths(headline):
    widths = json.dumps({"stem": 9, "blocks": [[9, 9]]})
    options = ["--arms", "narrow", "dense", "--seeds", "0", *TRAINING, "--widths", widths]
    assert headline.go("fashion", *options) == 0
    calls = {call["run"]: call for call in _calls(headline)}
    for name in ("dense-seed0", "agip-seed0"):
        assert calls[name]["args"].count("--widths") == 1
        assert _option(calls[name], "--widths") == widths
    words = calls["narrow-seed0"]["args"]  # the last one counts
    last = words[len(words) - words[::-1].index("--widths")]
    assert json.loads(last) == {"stem": 4, "blocks": [[2, 3]]}, "those of agip's summary"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["fashion", "--arms", "wide"], "no arm is named wide"),
        (["fashion", "--rates", "wide=1"], "no arm is named wide"),
        (["fashion", "--", "--method", "agip"], "--method may not be given"),
        (["fashion", "--levers", "--widths 3"], "--widths may not be given"),
        (["fashion", "--", "--grow-from", "0.5"], "--grow-from may not be given"),
        (["fashion", "--levers", "--teacher 0.5"], "--teacher may not be given"),
        (["fashion", "--jobs", "0"], "--jobs must be at least 1"),
        (["--jobs=1"], "CONFIG is missing"),
        (["fashion", "--time", "0", *TRAINING], "--time must lie in (0, 1]"),
        (["fashion", "--time", "0.3"], "--time needs the steps of the dense network"),
        (["fashion", "--time", "0.3", "--probe-steps", "9", *TRAINING], "--probe-steps at least"),
        (
            ["fashion", "--time", "0.01", "--probe-steps", "20", "--seeds", "0", *TRAINING],
            "a run of one step costs 3.5",
        ),
    ],
)
def test_refusals(headline, options, message, capsys):
    code = headline.go(*options)
    assert code and message in capsys.readouterr().err + str(code)


def test_other_options_in_the_same_workdir(headline):
    assert headline.go("fashion", "--seeds", "0", "--arms", "dense", *TRAINING) == 0
    code = headline.go("fashion", "--seeds", "0", "--arms", "dense", "--", "--steps", "7")
    assert "options" in str(code)
