"""README.md and docs/: Python blocks run, commands parse, links lead somewhere, lines are short.

What pages say of the code is compared with it: errors in docs/faq.md, files in the map of
docs/architecture.md.
"""

import ast
import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(ROOT.glob("docs/notebooks/*.md"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *NOTEBOOKS,
]

# Languages of fenced blocks: run, read as commands, or only shown.
SHOWN = {"", "text", "bibtex", "json", "py", "toml"}
LANGUAGES = {"{code-cell} ipython3": "python"}  # the cells of notebooks
MAX_PROSE = 120  # columns of a line
MAX_CELL = 160  # characters of a table cell
# Commands that we do not check further: they are not ours.
FOREIGN = {"apt-get", "cd", "dpkg", "git", "pip", "source", "sudo", "tensorboard"}


class Block(NamedTuple):
    """A fenced block of a Markdown page."""

    language: str
    line: int  # of its first line of content, from 1
    text: str
    needs: str = ""  # a package, in "```python needs=haiku": without it the block is not run

    @property
    def runs(self) -> bool:
        """Whether the package that the block needs is installed."""
        return not self.needs or importlib.util.find_spec(self.needs) is not None


def name_of(page: Path) -> str:
    """The name of a page in tests, such as elastic.md and notebooks/elastic.md."""
    return page.relative_to(ROOT / "docs" if ROOT / "docs" in page.parents else ROOT).as_posix()


def fenced_blocks(markdown: str) -> list[Block]:
    """All fenced blocks of a page; an unclosed one is an error."""
    blocks, start = [], None
    lines = markdown.splitlines()
    for number, line in enumerate(lines, start=1):
        fence = re.match(r"\s*```(.*)", line)
        if not fence:
            continue
        if start is None:
            start = number
            language, _, needs = fence.group(1).strip().partition(" needs=")
            language = LANGUAGES.get(language, language)
        else:
            text = "\n".join(lines[start : number - 1])
            blocks.append(Block(language, start + 1, text, needs))
            start = None
    if start is not None:
        raise ValueError(f"the block that starts at line {start} is never closed")
    return blocks


def prose(markdown: str) -> list[tuple[int, str]]:
    """The lines outside of fenced blocks, with their numbers."""
    found, inside = [], False
    for number, line in enumerate(markdown.splitlines(), start=1):
        if re.match(r"\s*```", line):
            inside = not inside
        elif not inside:
            found.append((number, line))
    return found


def too_long(markdown: str) -> list[int]:
    """The numbers of lines with prose, or with a table cell, that is too long to read."""
    found = []
    for number, line in prose(markdown):
        is_row = line.startswith("|")
        cells = re.split(r"(?<!\\)\|", line) if is_row else [line]
        if max(map(len, cells)) > (MAX_CELL if is_row else MAX_PROSE):
            found.append(number)
    return found


def anchors(markdown: str) -> set[str]:
    """The names of the headings of a page, as GitHub makes them."""
    headings = [line.lstrip("# ") for _, line in prose(markdown) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """The links of a page to files or headings that are not there."""
    broken = []
    text = "\n".join(line for _, line in prose(page.read_text()))
    for target in re.findall(r"\]\(([^)]+)\)", text):
        name, _, heading = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue  # the network
        other = page.parent / name if name else page
        if not other.exists() or heading and heading not in anchors(other.read_text()):
            broken.append(target)
    return broken


@functools.cache
def texts_of_the_library() -> tuple[str, ...]:
    """All strings in the code of the library; values in f-strings are left out."""
    found = []
    for path in ROOT.glob("jaxprune/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", "") for part in node.values]
                found.append("".join(part for part in parts if isinstance(part, str)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def is_said(heading: str) -> bool:
    """Whether a string of the library has the text of a heading, where `...` is for anything."""
    parts = [re.escape(part.strip()) for part in heading.split("...")]
    return any(re.search(".*".join(parts), text, re.S) for text in texts_of_the_library())


def commands(text: str) -> list[list[str]]:
    """The words of each command of a shell block, without comments, prompts and assignments."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|;", line.strip().removeprefix("$ ")):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]):
                words = words[1:]
            if words:
                found.append(words)
    return found


@functools.cache
def make_targets() -> frozenset[str]:
    makefile = (ROOT / "Makefile").read_text()
    return frozenset(re.findall(r"^([a-z-]+):", makefile, re.M))


@functools.cache
def help_text(script: str, *positional: str) -> str:
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    run = subprocess.run(
        [sys.executable, script, *positional, "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def problem(words: list[str]) -> str | None:
    """What is wrong with a command of ours, or None."""
    if "--" in words:  # what follows goes to the training script, with the same configuration
        end = words.index("--")
        studies = {"headline": words[3], "text": "text_mini"}
        config = studies.get(words[2], words[2])
        levers = [word for part in words[:end] if " " in part for word in shlex.split(part)]
        training = ["python", "scripts/train.py", config, *levers, *words[end + 1 :]]
        return problem([word for word in words[:end] if " " not in word]) or problem(training)
    program = words[0].rpartition("/")[2]
    if program == "make":
        goals = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        unknown = [goal for goal in goals if goal not in make_targets()]
        return f"no such make target: {unknown}" if unknown else None
    if re.fullmatch(r"python(3(\.\d+)?)?", program) and len(words) > 1:
        if words[1].startswith("-"):
            return None if words[1:3] in (["-m", "pip"], ["-m", "venv"]) else "not a known script"
        if not (ROOT / words[1]).is_file():
            return f"no such script: {words[1]}"
        options = [word for word in words[2:] if word.startswith("-")]
        first = next((i for i, word in enumerate(words) if i > 1 and word.startswith("-")), None)
        known = help_text(words[1], *words[2:first])
        unknown = [
            option
            for option in (word.partition("=")[0] for word in options)
            if not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", known)
            and not re.fullmatch(r"-[\d.]+", option)
        ]
        return f"{words[1]} has no option {unknown}" if unknown else None
    return None if program in FOREIGN else "unknown command: teach tests/project/test_readme.py"


def _cases(language: str):
    pages = [(page, fenced_blocks(page.read_text())) for page in PAGES if page.exists()]
    return [
        pytest.param(page, [b for b in blocks if b.language == language], id=name_of(page))
        for page, blocks in pages
        if any(b.language == language for b in blocks)
    ]


def test_readme_exists_with_both_kinds_of_blocks():
    languages = {block.language for block in fenced_blocks((ROOT / "README.md").read_text())}
    assert {"python", "bash"} <= languages


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_block_escapes(page):
    unknown = [
        (block.line, block.language)
        for block in fenced_blocks(page.read_text())
        if block.language not in SHOWN | {"python", "bash"}
    ]
    assert unknown == [], "write ```python or ```bash, or add the language to SHOWN"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_are_short(page):
    assert too_long(page.read_text()) == [], f"break {page.name} at these lines"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_errors_of_the_faq_are_those_of_the_library():
    page = (ROOT / "docs" / "faq.md").read_text()
    headings = [line.removeprefix("### ") for _, line in prose(page) if line.startswith("### ")]
    assert len(headings) >= 10
    assert [heading for heading in headings if not is_said(heading)] == []


def test_the_map_names_every_file():
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = {name.rpartition("/")[2] for name in re.findall(r"`([\w/]+\.py)`", page)}
    files = {path.name for path in ROOT.glob("jaxprune/**/*.py")} - {"__init__.py"}
    assert files - named == set(), "give each file its line in the map of docs/architecture.md"
    tests = {path.name for path in ROOT.glob("tests/**/*.py")}
    assert named - files - tests == set(), "docs/architecture.md names files that are not there"


@pytest.mark.scripts
@pytest.mark.parametrize(("page", "blocks"), _cases("python"))
def test_python_blocks_run(page, blocks, tmp_path):
    # Blocks keep their line numbers, so that a traceback points into the page.
    lines: list[str] = []
    for block in filter(lambda block: block.runs, blocks):
        lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
    code = f"exec(compile({chr(10).join(lines)!r}, {str(page)!r}, 'exec'), {{'__name__': 'page'}})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.scripts
@pytest.mark.parametrize(("page", "blocks"), _cases("bash"))
def test_commands_parse(page, blocks):
    found = {
        f"{page.name}:{block.line}: {shlex.join(words)}": problem(words)
        for block in blocks
        for words in commands(block.text)
    }
    assert {command: why for command, why in found.items() if why} == {}


def test_fenced_blocks():
    page = "text\n```python\nx = 1\n\ny = 2\n```\n```\nshown\n```\n"
    assert fenced_blocks(page) == [Block("python", 3, "x = 1\n\ny = 2"), Block("", 8, "shown")]
    (block,) = fenced_blocks("```python needs=no_such_package\nraise\n```\n")
    assert block == Block("python", 2, "raise", "no_such_package") and not block.runs
    assert Block("python", 1, "", "numpy").runs and Block("python", 1, "").runs
    with pytest.raises(ValueError, match="line 2"):
        fenced_blocks("\n```bash\nmake test\n")


def test_prose_and_long_lines():
    page = "a\n```python\nx\n```\nb\n"
    assert prose(page) == [(1, "a"), (5, "b")]
    code = "\n".join(["```python", "x" * 200, "```"])
    assert too_long(f"{code}\n{'y' * 121}\n{'y' * 120}\n") == [4]
    assert too_long(f"| {'y' * 150} | {'y' * 150} |\n| {'y' * 161} |\n") == [2]


def test_broken_links(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A page: 80 to 98 %\n[a](#a-page-80-to-98-) [b](#b) [c](page.md) [d](e.md#f)\n"
    )
    assert broken_links(page) == ["#b", "e.md#f"]


def test_is_said():
    assert is_said("`prunable` matches no leaf")
    assert is_said("needs ..., which is not installed")
    assert not is_said("`prunable` matches no ... whatsoever")


def test_commands():
    text = "$ make demo  # two minutes\nA=1 python x.py \\\n  --flag 'a b'\n\ncd d && make test"
    assert commands(text) == [
        ["make", "demo"],
        ["python", "x.py", "--flag", "a b"],
        ["cd", "d"],
        ["make", "test"],
    ]


@pytest.mark.scripts
@pytest.mark.parametrize(
    ("command", "fine"),
    [
        ("make demo", True),
        ("make test ARGS=-x", True),
        ("make coffee", False),
        ("python scripts/demo.py --folder x", True),
        (".venv/bin/python scripts/demo.py --folder=x", True),
        ("python scripts/demo.py --fold", False),
        ("python scripts/nothing.py", False),
        ("python scripts/study.py headline digits_resnet8 --levers '--parts 2' -- --pad 1", True),
        ("python scripts/study.py headline digits_resnet8 --levers '--part 2' -- --pad 1", False),
        ("git clone somewhere", True),
        ("wget somewhere", False),
    ],
)
def test_problem_finds_what_it_should(command, fine):
    assert (problem(shlex.split(command)) is None) is fine
