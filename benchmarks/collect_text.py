"""Text that lies on a machine without network, as JSONL: sources and documents of the installed packages.

    python benchmarks/collect_text.py OUT.jsonl [--characters 420000000] [FOLDER ...]

Files are taken in the order of a hash of their text (each text once), so that a cap leaves a mixture. For pretraining runs
that only have to be the same for two normalizers (docs/results.md).

    python benchmarks/collect_text.py OUT.jsonl --prose FOLDER [FOLDER ...] [--prose-characters 150000000]

With ``--prose`` the first part of the text is English paragraphs of the documentation below those folders: markup, index
pages, code and other languages are left out, and each paragraph is taken once. The sources that follow are those of which
most long lines have not occurred before. docs/results.md lists the packages of the recipe ``sinks_h200``.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import re
import sysconfig
from collections.abc import Iterator
from multiprocessing import Pool
from pathlib import Path

SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".cuh", ".c", ".cpp", ".cu", ".js", ".html"}
DOCUMENTS = {".html", ".htm", ".xhtml", ".page", ".txt", ".md", ".rst", ".pod", ".dz", ".noun", ".verb", ".adj", ".adv"}
MARKUP = {".html", ".htm", ".xhtml", ".page"}
NOT_PROSE = {"_sources", "_static", "src", "genindex", "fonts"}  # parts of paths: the same text again, or none
LARGEST = 20_000_000  # bytes of a file
PIECE = 50_000  # characters of a document, which ends with a paragraph
COMMON = frozenset(
    re.findall(
        r"\w+",
        "the of and to a in is that for it as with be by on are this not or from an at which if you can have was "
        "will when but has its no all one we they he his her their used use any these may must there so than into",
    )
)

_HIDDEN = re.compile(r"<(script|style|head|pre|table|nav|svg|math)\b.*?</\1\s*>|<!--.*?-->", re.S | re.I)
_BLOCK = re.compile(
    r"</?(p|div|li|ul|ol|dl|dt|dd|h\d|br|tr|td|section|article|title|item|note|blockquote)\b[^>]*>", re.I
)
_TAG = re.compile(r"<[^<>]*>")
_MARKS = re.compile(r"[CBIFLSXEZ]<+([^<>]*)>+|``?|\*\*|\[(?:1913 Webster|PJC|WordNet 1\.5)\]")
_WORD = re.compile(r"[A-Za-z']+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("folders", type=Path, nargs="*", default=[Path(sysconfig.get_path("purelib")), Path("/usr")])
    parser.add_argument("--characters", type=float, default=420e6, help="of all of it")
    parser.add_argument("--prose", type=Path, nargs="+", default=[], metavar="FOLDER")
    parser.add_argument("--prose-characters", type=float, default=150e6, help="of the prose, at most")
    options = parser.parse_args()
    texts = list(_cut(_prose(options.prose), options.prose_characters))
    prose = sum(map(len, texts))
    print(f"prose: {len(texts)} pieces, {prose / 1e6:.0f} million characters")
    sources = list(_cut(_sources(options.folders, new_lines=bool(options.prose)), options.characters - prose))
    print(f"sources: {len(sources)} files, {sum(map(len, sources)) / 1e6:.0f} million characters")
    if texts:
        sources = sorted(texts + sources, key=_order)
    with options.output.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in sources)


def _order(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _cut(texts: Iterator[str], characters: float) -> Iterator[str]:
    """Texts up to the first that would go beyond."""
    total = 0
    for text in texts:
        total += len(text)
        if total > characters:
            return
        yield text


# ---------------------------------------------------------------------------------------------------------------------
# Sources


def _sources(folders: list[Path], new_lines: bool) -> Iterator[str]:
    """Each text once, in the order of its hash; with ``new_lines`` only where most long lines have not occurred before."""
    suffixes = {".py"} if new_lines else SUFFIXES
    found: dict[str, Path] = {}
    for folder in folders:
        for path in folder.rglob("*"):
            if path.suffix in suffixes and path.is_file() and 200 < path.stat().st_size < 2_000_000:
                found.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path)
    seen: set[int] = set()
    for digest in sorted(found):
        text = found[digest].read_text(encoding="utf-8", errors="replace")
        if new_lines:
            lines = {_key(line) for line in text.splitlines() if len(line.strip()) >= 30}
            if len(lines & seen) > 0.3 * len(lines):
                continue
            seen |= lines
        yield text


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.strip().encode("utf-8", "replace"), digest_size=8).digest())


# ---------------------------------------------------------------------------------------------------------------------
# Prose


def _prose(folders: list[Path]) -> Iterator[str]:
    """English paragraphs, each once, in pieces; pieces in the order of their hash."""
    files: list[Path] = []
    for folder in sorted(folders):
        files += sorted(path for path in folder.rglob("*") if _is_document(path, folder))
    seen: set[int] = set()
    pieces: list[str] = []
    with Pool(2) as pool:
        for paragraphs in pool.imap(_paragraphs, files, chunksize=16):
            fresh = []
            for key, paragraph in paragraphs:
                if key not in seen:
                    seen.add(key)
                    fresh.append(paragraph)
            pieces += _pieces(fresh)
    pieces.sort(key=_order)
    yield from pieces


def _is_document(path: Path, folder: Path) -> bool:
    if not path.is_file() or path.is_symlink() or NOT_PROSE & set(path.relative_to(folder).parts):
        return False
    if path.stat().st_size > LARGEST:
        return False
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return suffix in DOCUMENTS or path.parent.name == "fortunes"


def _pieces(paragraphs: list[str]) -> Iterator[str]:
    piece: list[str] = []
    size = 0
    for paragraph in paragraphs:
        piece.append(paragraph)
        size += len(paragraph)
        if size > PIECE:
            yield "\n\n".join(piece)
            piece, size = [], 0
    if size > 300:
        yield "\n\n".join(piece)


def _paragraphs(path: Path) -> list[tuple[int, str]]:
    """The English paragraphs of a file, each with a hash of its words."""
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    text = raw.decode("utf-8", errors="replace")
    if path.suffix in MARKUP:
        text = _BLOCK.sub("\n\n", _HIDDEN.sub("\n\n", text))
        text = html.unescape(_TAG.sub("", text))
    elif path.parent.name == "wordnet":
        text = re.sub(r"^.*\|", "\n", text, flags=re.M)
    else:
        text = re.sub(r"^%$", "\n", _MARKS.sub(lambda match: match.group(1) or "", text), flags=re.M)
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        if _is_english(paragraph):
            words = " ".join(_WORD.findall(paragraph.lower()))
            found.append((_key(words), paragraph))
    return found


def _is_english(paragraph: str) -> bool:
    """Sentences: long enough, mostly letters, and many of the most common English words among the others."""
    if len(paragraph) < 60 or "\ufffd" in paragraph:
        return False
    words = _WORD.findall(paragraph)
    if sum(map(len, words)) < 0.7 * len(paragraph):
        return False
    return sum(word.lower() in COMMON for word in words) >= 0.2 * len(words)


if __name__ == "__main__":
    main()
