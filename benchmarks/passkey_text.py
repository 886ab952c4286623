"""Passkey prompts with their answers, as JSONL: text on which a small model learns to retrieve (docs/evaluation.md).

    python benchmarks/passkey_text.py OUT.jsonl [--count 40000] [--filler 450] [--seed 1]

Keys, depths and lengths are drawn; `softpick evaluate` asks for other keys at other depths.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from softpick.evaluation.passkey import prompt_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--count", type=int, default=40_000)
    parser.add_argument("--filler", type=int, default=450, help="characters, at most")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with options.output.open("w", encoding="utf-8") as file:
        for _ in range(options.count):
            key = str(rng.randint(1, 49_999))
            text, _ = prompt_text(key, rng.random(), rng.randint(0, options.filler))
            file.write(json.dumps({"text": f"{text} {key}."}) + "\n")


if __name__ == "__main__":
    main()
