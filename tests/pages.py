"""The pages of the documentation, their code blocks and the commands in them, for the tests that run them.

Everything in a block of Python or of a shell runs, unless a comment before the block says otherwise::

    <!-- not run (network): pip install -->           commands that begin so; reasons are GPU, network and hours
    <!-- not run (hours, trains for a day) -->        the whole block, with more words about the reason
    <!-- run in tests/test_serving.py::test_name -->  a test of its own; after a colon, commands that begin so
    <!-- apart -->                                    each command in a folder of its own, as the page says
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARK = re.compile(
    r"<!-- (?:not run \((GPU|network|hours)(?:, [^)\n]+)?\)|run in (tests/\w+\.py::\w+))(?:: ([^\n]+?))? -->\n"
)
FENCE = re.compile(r"^((?:<!-- (?:not run|run in|apart)\b[^\n]*-->\n)*)```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Mark:
    """Why commands of a block do not run where the others do: ``reason``, or the ``test`` that runs them."""

    reason: str
    test: str
    beginning: str


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    page: str
    line: int
    language: str
    text: str
    marks: tuple[Mark, ...]
    apart: bool

    @property
    def commands(self):
        """Of a shell's block: each with its continuation lines, without comments. A block in Python is one without words."""
        if self.language == "python":
            return [""]
        lines = [re.sub(r"(^|\s)#.*", "", line) for line in self.text.replace("\\\n", " ").splitlines()]
        return [" ".join(line.split()) for line in lines if line.strip()]

    def mark_of(self, command):
        return next((mark for mark in self.marks if command.startswith(mark.beginning)), None)


def blocks(*languages):
    """The blocks of all pages in these languages, page by page."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            before, language, body = match.groups()
            marks = tuple(Mark(*(group or "" for group in mark.groups())) for mark in MARK.finditer(before))
            if language in languages:
                line = text.count("\n", 0, match.start(2)) + 1
                name, apart = page.relative_to(ROOT).as_posix(), "<!-- apart -->" in before
                found.append(Block(name, line, language, body, marks, apart))
    return found


def comments(page):
    """How many comments of a page say that something does not run, or elsewhere, whether they stand before a block or not."""
    return len(re.findall(r"^ *<!--\s*(?:not run|run in)", page.read_text(encoding="utf-8"), re.MULTILINE))


SHELL = ("bash", "sh")


def softpick_words(command):
    """The words after ``softpick`` where a command is one of ours, else None."""
    found = re.search(r"(?:^|-m )softpick (\w.*)", command)
    return shlex.split(found.group(1).removesuffix("&")) if found else None
