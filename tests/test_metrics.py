"""The metrics file loses and doubles nothing; the display says what is known."""

import re

from jaxprune.metrics import MetricsLog, show_progress


def test_metrics_forget_what_came_after_the_checkpoint(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        for step in (2, 4, 6):
            log.write(step, {"train_loss": 1 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "tra')  # killed while it wrote
    with MetricsLog(tmp_path, 4) as log:
        assert [record["step"] for record in log.records] == [2, 4]
        log.write(6, {"train_loss": 0.5})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[-1] == '{"step": 6, "train_loss": 0.5}'
    assert len(lines) == 3


def test_lines_elsewhere_keep_the_last_values(capsys):
    with show_progress("resnet8", steps=100) as show:
        show(50, {"train_loss": 0.5, "seconds_per_step": 0.5})
        show(60, {"test_accuracy": 0.875})
    assert capsys.readouterr().out.splitlines() == [
        "step 50/100  loss 0.5000  0:25 left",
        "step 60/100  loss 0.5000  test 87.50%  0:20 left",
    ]


def test_bar_on_a_terminal_shows_the_same_numbers(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with show_progress("resnet8", steps=100) as show:
        show(50, {"train_loss": 0.5, "sparsity": 0.72, "seconds_per_step": 2.0})
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    for part in ("resnet8", "50/100", "1:40 left", "loss 0.5000", "sparsity 72.0%"):
        assert part in text
