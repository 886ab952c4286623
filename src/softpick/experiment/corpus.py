"""The text of a command: what a user brings, or the standard library's sources; its split and tokens."""

from __future__ import annotations

import hashlib
import json
import secrets
import sysconfig
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softpick.experiment.reading import Corpus, DataError, read_corpus

__all__ = ["DEFAULT_CHARACTERS", "VALIDATION_SHARE", "get_corpus", "split_documents", "standard_library", "token_ids"]


DEFAULT_CHARACTERS = 8_000_000


VALIDATION_SHARE = 0.05


_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "__phello__"}


def standard_library(characters: int = DEFAULT_CHARACTERS) -> Corpus:
    """The sources of the running Python's standard library, without tests and site-packages.

    Files are taken in the order of a hash of their name, so that a cap leaves a mixture and not the letters a to k.

    Args:
        characters: stop before the file that would go beyond this.
    """
    import platform

    root = Path(sysconfig.get_path("stdlib"))
    names = [
        p.relative_to(root).as_posix()
        for p in root.rglob("*.py")
        if not _NOT_LIBRARY & set(p.relative_to(root).parts[:-1])
    ]
    names.sort(key=lambda name: (_digest(name), name))
    documents: list[str] = []
    total = 0
    for name in names:
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        if not text or total + len(text) > characters:
            continue
        documents.append(text)
        total += len(text)
    if not documents:
        raise DataError(f"the Python standard library has no sources under {root}; pass --data PATH")
    return Corpus(
        tuple(documents),
        f"sources of the Python {platform.python_version()} standard library without its tests: "
        f"{len(documents)} files, {total / 1e6:.1f} million characters",
    )


def get_corpus(path: str | Path | None, text_field: str = "text", characters: int | None = None) -> Corpus:
    """:func:`read_corpus`, or where there is no path the sources of :func:`standard_library`.

    Args:
        path: file, directory, or None.
        text_field: as for :func:`read_corpus`.
        characters: at most; None is all of a path, and the default of :func:`standard_library`.

    Raises:
        DataError: as :func:`read_corpus`.
    """
    if path is not None:
        return read_corpus(path, text_field, characters)
    return standard_library() if characters is None else standard_library(characters)


def split_documents(documents: Sequence[str], share: float = VALIDATION_SHARE) -> tuple[list[str], list[str], str]:
    """Training and validation documents, and a sentence about the split.

    By document, in the order of a hash of the text: independent of file names, and copies of a document stay on one side.
    One single document is cut instead: its last ``share`` is the validation text.
    """
    if len(documents) == 1:
        cut = int(len(documents[0]) * (1 - share))
        sentence = f"one document: its last {share:.0%} is the validation text"
        return [documents[0][:cut]], [documents[0][cut:]], sentence
    budget = share * sum(map(len, documents))
    digests = [_digest(text) for text in documents]
    sizes: dict[str, int] = {}
    for digest, text in zip(digests, documents, strict=True):
        sizes[digest] = sizes.get(digest, 0) + len(text)
    held: set[str] = set()
    for digest in sorted(sizes):
        if sizes[digest] <= budget:
            held.add(digest)
            budget -= sizes[digest]
    if not held:  # few and large documents: hold out the shortest
        held.add(min(sizes, key=lambda digest: (sizes[digest], digest)))
    train = [text for digest, text in zip(digests, documents, strict=True) if digest not in held]
    valid = [text for digest, text in zip(digests, documents, strict=True) if digest in held]
    if not train:
        raise DataError("data: all documents are the same text; nothing is left to train on")
    return train, valid, f"by document: {len(train)} to train on, {len(valid)} held out"


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that somebody wrote, without special tokens.

    The words ``<eos>`` in a text are text like any other and not the token that ends a document, which only software may set.

    Args:
        tokenizer: of transformers.
        texts: any number of them.

    Raises:
        DataError: a text has a special token's words, and the tokenizer, which is not one of the library ``tokenizers``, has
            no other token for them.
    """
    if not texts:
        return []
    found = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    names = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    # one character, or a line's end, is an ordinary text that the tokenizer also uses as a mark
    marks = {i: token for i, token in names if len(token.strip()) > 1 and token != tokenizer.unk_token}
    wrong = [at for at, ids in enumerate(found) if not marks.keys().isdisjoint(ids)]
    if wrong:
        # models such as Unigram and WordLevel have special tokens among their words: no splitting keeps them from those
        if not getattr(tokenizer, "is_fast", False):
            shown = marks[next(i for i in found[wrong[0]] if i in marks)]
            raise DataError(
                f"data: a text has the words {shown!r}, for which {type(tokenizer).__name__} has its special token only; "
                "take the words out, or choose a fast tokenizer"
            )
        again = _without(tokenizer, frozenset(marks.values())).encode_batch(
            [texts[at] for at in wrong], add_special_tokens=False
        )
        for at, encoding in zip(wrong, again, strict=True):
            found[at] = encoding.ids
    return found


_made: weakref.WeakKeyDictionary[Any, tuple[Any, Any]] = weakref.WeakKeyDictionary()


def _without(tokenizer: Any, marks: frozenset[str]) -> Any:
    """A fast tokenizer's own ``Tokenizer``, in which some tokens have names that no text has; all ids are the same.

    It is kept as long as the tokenizer is the same: a large vocabulary takes a second.
    """
    from tokenizers import Tokenizer

    key = marks, len(tokenizer)
    known = _made.get(tokenizer)
    if known is not None and known[0] == key:
        return known[1]
    secret = secrets.token_hex(16)
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    made |= {"truncation": None, "padding": None, "post_processor": None}
    model, added = made["model"], made["added_tokens"]
    marks = marks - {model.get("unk_token")}  # which text may become

    def other(token: str) -> str:
        return secret + token if token in marks else token

    if isinstance(model["vocab"], dict):
        model["vocab"] = {other(token): i for token, i in model["vocab"].items()}
    else:  # Unigram: the place is the id
        model["vocab"] = [[other(token), score] for token, score in model["vocab"]]
    if "merges" in model:
        pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if marks.isdisjoint([*pair, "".join(pair)])]
    made["added_tokens"] = [entry | {"content": other(entry["content"])} for entry in added]
    _made[tokenizer] = key, Tokenizer.from_str(json.dumps(made))
    return _made[tokenizer][1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
