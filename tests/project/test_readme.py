"""Every snippet in README.md and docs/ runs: Python blocks are executed, commands are parsed."""

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]

# Languages of fenced blocks: run, read as commands, or only shown.
SHOWN = {"", "text", "bibtex", "json", "toml"}
# Commands that we do not check further: they are not ours.
FOREIGN = {"apt-get", "cd", "git", "pip", "sudo", "tensorboard"}


class Block(NamedTuple):
    """A fenced block of a Markdown page."""

    language: str
    line: int  # of its first line of content, from 1
    text: str


def fenced_blocks(markdown: str) -> list[Block]:
    """All fenced blocks of a page; an unclosed one is an error."""
    blocks, start = [], None
    lines = markdown.splitlines()
    for number, line in enumerate(lines, start=1):
        fence = re.match(r"\s*```(.*)", line)
        if not fence:
            continue
        if start is None:
            start, language = number, fence.group(1).strip()
        else:
            text = "\n".join(lines[start : number - 1])
            blocks.append(Block(language, start + 1, text))
            start = None
    if start is not None:
        raise ValueError(f"the block that starts at line {start} is never closed")
    return blocks


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
        config = words[3] if words[2] == "headline" else words[2]
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
    return None if program in FOREIGN else "unknown command: teach tests/test_readme.py about it"


def _cases(language: str):
    pages = [(page, fenced_blocks(page.read_text())) for page in PAGES if page.exists()]
    return [
        pytest.param(page, [b for b in blocks if b.language == language], id=page.name)
        for page, blocks in pages
        if any(b.language == language for b in blocks)
    ]


def test_readme_exists_with_both_kinds_of_blocks():
    languages = {block.language for block in fenced_blocks((ROOT / "README.md").read_text())}
    assert {"python", "bash"} <= languages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_block_escapes(page):
    unknown = [
        (block.line, block.language)
        for block in fenced_blocks(page.read_text())
        if block.language not in SHOWN | {"python", "bash"}
    ]
    assert unknown == [], "write ```python or ```bash, or add the language to SHOWN"


@pytest.mark.parametrize(("page", "blocks"), _cases("python"))
def test_python_blocks_run(page, blocks, tmp_path):
    # Blocks keep their line numbers, so that a traceback points into the page.
    lines: list[str] = []
    for block in blocks:
        lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
    code = f"exec(compile({chr(10).join(lines)!r}, {str(page)!r}, 'exec'), {{'__name__': 'page'}})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stdout + run.stderr


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
    with pytest.raises(ValueError, match="line 2"):
        fenced_blocks("\n```bash\nmake test\n")


def test_commands():
    text = "$ make demo  # two minutes\nA=1 python x.py \\\n  --flag 'a b'\n\ncd d && make test"
    assert commands(text) == [
        ["make", "demo"],
        ["python", "x.py", "--flag", "a b"],
        ["cd", "d"],
        ["make", "test"],
    ]


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
