"""Trained MobileNets of scripts/train.py, saved for a browser, see `jaxprune.browser`."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune import browser, checkpoints, models
from jaxprune.experiments import command
from jaxprune.experiments.config import Config
from jaxprune.experiments.experiment import Experiment
from jaxprune.experiments.network import variables_of
from jaxprune.experiments.pruning import pruning_of

PER_CLASS = 2  # test images of each class
FASHION = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot",
)  # fmt: skip


def save_runs(folder: Path, runs: Mapping[str, tuple[Path, str]]) -> list[str]:
    """Saves finished runs, and a few test images, into one folder.

    Args:
        folder: it is made if it does not exist. A network that is there already is kept.
        runs: name of the network -> workdir of the run and title.

    Returns:
        The names.

    Raises:
        ValueError: if a workdir holds no finished run of a MobileNet on a small data set.
    """
    problems = [
        f"{path}: holds no finished run of scripts/train.py"
        for path, _ in runs.values()
        if command.read_summary(path, ("test_accuracy",)) is None
    ]
    if problems:
        raise ValueError("runs must be finished:\n  " + "\n  ".join(problems))
    for name, (path, title) in runs.items():
        if (folder / f"{name}.npz").exists() and (folder / "images.npz").exists():
            continue
        config = read_config(path)
        experiment = Experiment(config, pruning_of)
        with contextlib.closing(checkpoints.open_manager(path / "checkpoints")) as manager:
            state, _ = checkpoints.restore(manager, experiment.create(config.seed))
        model = experiment.model
        if not isinstance(model, models.MobileNet):
            raise ValueError(
                f"{path} must be a run of a mobilenet, but its model is a {config.model}"
            )
        summary = command.read_summary(path, ("test_accuracy",)) or {}
        facts = {"title": title, "accuracy": summary["test_accuracy"]}
        browser.save(folder, name, model, variables_of(state), facts)
        save_images(folder, experiment)
    return [*runs]


def read_config(path: Path) -> Config:
    """Returns the configuration of a run."""
    saved = command.read_config(path)
    if saved is None:
        raise ValueError(f"{path} must hold a run of scripts/train.py")
    names = {field.name for field in dataclasses.fields(Config)}
    return Config(**{key: saved[key] for key in saved if key in names})


def save_images(folder: Path, experiment: Experiment) -> None:
    """Saves the first test images of each class."""
    images, labels = (np.asarray(part) for part in experiment.source.test)
    chosen = first_of_each(labels, PER_CLASS)
    inputs = experiment.source.prepare(jnp.asarray(images[chosen]))
    browser.write_images(folder, images[chosen], np.asarray(inputs, np.float32), labels[chosen])


def first_of_each(labels: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """Returns the indices of the first `count` examples of each class, class by class in turn.

    Example:
        >>> first_of_each([1, 0, 0, 1, 1], 2).tolist()
        [1, 0, 2, 3]
    """
    labels = np.asarray(labels)
    rows: list[Any] = [np.flatnonzero(labels == own)[:count] for own in np.unique(labels)]
    return np.array([row[at] for at in range(count) for row in rows if at < len(row)])
