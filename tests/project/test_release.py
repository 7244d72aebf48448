"""Version, tag, changelog and citation are one release, and the changelog's new names exist."""

import importlib
import re
import subprocess
import tomllib
from datetime import date
from pathlib import Path
from typing import NamedTuple

import pytest

import jaxprune

ROOT = Path(__file__).parents[2]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


class Section(NamedTuple):
    """A version in the changelog."""

    version: str
    day: str | None  # None: not released
    text: str


def sections(text: str) -> list[Section]:
    """All versions of a changelog, newest first."""
    parts = re.split(r"^## \[([^\]]+)\](?: - (\S+))?\n", text, flags=re.M)[1:]
    return [Section(*part) for part in zip(parts[::3], parts[1::3], parts[2::3])]


def numbers(version: str) -> tuple[int, ...]:
    """Of a release, or of the one that a development version leads to."""
    return tuple(map(int, version.partition(".dev")[0].split(".")))


def problems(version: str, changelog: str, citation: str, tags: list[str]) -> list[str]:
    """What a person who makes a release can forget."""
    newest, *releases = sections(changelog)
    found = []
    if newest.version != "Unreleased" or newest.day:
        found.append("the changelog must begin with a section [Unreleased], without a date")
    if [numbers(one.version) for one in releases] != sorted(
        {numbers(one.version) for one in releases}, reverse=True
    ):
        found.append("versions of the changelog must fall")
    if ".dev" in version:
        if numbers(version) <= numbers(releases[0].version):
            found.append(f"{version} must be newer than the release {releases[0].version}")
        released = releases[0]
    else:
        released = next((one for one in releases if one.version == version), None)
        if released is None or released != releases[0]:
            return [*found, f"the newest release of the changelog must be {version}"]
        if newest.text.strip():
            found.append(f"[Unreleased] must be empty while the version is {version}")
    try:
        date.fromisoformat(released.day or "")
    except ValueError:
        found.append(f"{released.version} must have a date such as 2026-11-29")
    for field, wanted in ("version", released.version), ("date-released", released.day):
        match = re.search(rf"^{field}: (\S+)$", citation, re.M)
        if match is None or match.group(1) != wanted:
            found.append(f"CITATION.cff must have `{field}: {wanted}`")
    found += [f"tag {tag} must be v{version}" for tag in tags if tag != f"v{version}"]
    return found


def tags_here() -> list[str]:
    """Tags of versions at the commit that is checked out; none where this is not a checkout."""
    command = ["git", "-C", str(ROOT), "tag", "--points-at", "HEAD", "--list", "v*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.split()
    except FileNotFoundError:
        return []


def test_this_release():
    citation = (ROOT / "CITATION.cff").read_text()
    assert problems(jaxprune.__version__, CHANGELOG, citation, tags_here()) == []


LOG = """# Changelog

## [Unreleased]

## [0.2.0] - 2027-01-02

### Added
- a

## [0.1.0] - 2026-11-29
"""
CITED = "version: 0.2.0\ndate-released: 2027-01-02\n"
CASES = {
    "a release": ("0.2.0", LOG, CITED, ["v0.2.0"], None),
    "a release without a tag yet": ("0.2.0", LOG, CITED, [], None),
    "development": ("0.3.0.dev0", LOG.replace("\n## [0.2", "\n- b\n\n## [0.2"), CITED, [], None),
    "another tag": ("0.2.0", LOG, CITED, ["v0.2.1"], "tag v0.2.1 must be v0.2.0"),
    "a tag on development": ("0.3.0.dev0", LOG, CITED, ["v0.3.0"], "tag v0.3.0 must be"),
    "no section": ("0.3.0", LOG, CITED, [], "newest release of the changelog must be 0.3.0"),
    "an old version": ("0.1.0", LOG, CITED, [], "newest release of the changelog must be 0.1.0"),
    "old development": ("0.2.0.dev0", LOG, CITED, [], "must be newer than the release 0.2.0"),
    "left in Unreleased": (
        "0.2.0", LOG.replace("\n## [0.2", "\n- b\n\n## [0.2"), CITED, [], "must be empty"
    ),
    "no date": ("0.2.0", LOG.replace(" - 2027-01-02", ""), CITED, [], "must have a date"),
    "cited otherwise": ("0.2.0", LOG, "version: 0.1.0\n", [], "must have `version: 0.2.0`"),
    "cited without a date": ("0.2.0", LOG, "version: 0.2.0\n", [], "`date-released: 2027-01-02`"),
    "no Unreleased": (
        "0.2.0", LOG.replace("## [Unreleased]\n", ""), CITED, [], "must begin with a section"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_can_be_forgotten_is_named(case):
    *release, wanted = CASES[case]
    found = problems(*release)
    assert (found == []) if wanted is None else any(wanted in problem for problem in found), found


def test_the_version_is_written_once():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in settings["project"]
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "jaxprune.__version__"}


def test_sections_have_the_headings_of_keep_a_changelog():
    for section in sections(CHANGELOG):
        assert set(re.findall(r"^### (.+)$", section.text, re.M)) <= KINDS


def changed_names() -> list[tuple[str, str]]:
    """Rows of the tables of changed names."""
    tables = re.findall(r"^#### Changed names\n\n(.+?)\n\n", CHANGELOG, re.M | re.S)
    lines = [line for table in tables for line in table.splitlines()[2:]]
    return [(before, now) for before, now in (line.strip("| ").split(" | ") for line in lines)]


def resolve(name: str) -> object:
    """A dotted name of ours; an error if there is none."""
    value = jaxprune
    for part in name.removeprefix("jaxprune.").split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            value = importlib.import_module(f"{getattr(value, '__name__', '')}.{part}")
    return value


DOTTED = r"`((?:jaxprune\.)?[a-z_]+\.[A-Za-z_.]+)(?:\([^`]*)?`"


def test_new_names_exist_and_old_ones_do_not():
    rows = changed_names()
    assert len(rows) > 15
    checked = 0
    for before, now in rows:
        for name in re.findall(DOTTED, now):
            if name.endswith("NAME") or name.startswith("InputStatistics"):
                continue
            resolve(name)
            checked += 1
        old = re.match(DOTTED, before)
        if old and not old.group(1).endswith("NAME"):
            with pytest.raises((AttributeError, ModuleNotFoundError)):
                resolve(old.group(1))
                pytest.fail(f"{before} is still there")
    assert checked > 15
