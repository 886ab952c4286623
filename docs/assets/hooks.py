"""mkdocs hooks: text of pages that is made from the program."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMANDS = re.compile(r"<!-- help: (.*?) -->")


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Put the output of ``softpick COMMAND --help`` in the place of ``<!-- help: COMMAND -->``."""
    return COMMANDS.sub(lambda match: f"```text\n{help_text(match.group(1))}\n```", markdown)


def help_text(command: str) -> str:
    """What a command prints for ``--help``, 100 columns wide."""
    words = [] if command == "softpick" else command.split()
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    result = subprocess.run(
        [sys.executable, "-m", "softpick", *words, "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.rstrip()
