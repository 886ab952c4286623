"""The data of a pretraining run: made once, beside the run's folder, and used again only where they are proven to be its own.

What is made lies in ``.softpick/data`` until ``config.json`` names it by its digests. So nothing that a killed process left is
trusted: it is made again, or it is what ``config.json`` says.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softpick.experiment.corpus import get_corpus, split_documents
from softpick.experiment.files import digest, json_text, text_digest, writing
from softpick.experiment.models import load_tokenizer
from softpick.experiment.progress import Reporter, Silent
from softpick.experiment.reading import DataError, text_files
from softpick.experiment.resume import Workspace, scratch
from softpick.training.data import SequenceDataset, fingerprint, train_tokenizer
from softpick.training.packed import TOKEN_FILES, copy_folder, describe, unpack
from softpick.training.recipes import Recipe, RecipeError
from softpick.training.token_files import StreamedSequences, TokenFile, hub_documents, write_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FILES", "Data", "data_digest", "prepare", "share_tokens"]

FILES = ("tokenizer", "train.tokens", "validation.tokens")
"""What a run's data are kept in."""

_TOKENIZER_CHARACTERS = 20_000_000  # of text that a tokenizer is trained on


@dataclass(frozen=True)
class Data:
    """What a run is trained on."""

    train: torch.utils.data.Dataset[Tensor]
    validation: TokenFile | SequenceDataset
    tokenizer: PreTrainedTokenizerBase
    description: str
    key: str


def prepare(
    recipe: Recipe,
    output: Path,
    work: Workspace | None,
    config: dict[str, Any] | None,
    about: dict[str, Any],
    reporter: Reporter,
    trust_remote_code: bool = False,
    tokens: Path | None = None,
) -> Data:
    """The data of a run; ``config.json`` is written when they are complete.

    Args:
        recipe: of the run.
        output: its folder.
        work: the folder as its owner has it; None on the other ranks, for which the data are there.
        config: what ``config.json`` holds; None where there is none.
        about: what ``config.json`` says of the run besides its data.
        reporter: gets progress and messages.
        trust_remote_code: Python code that comes with the recipe's tokenizer may run.
        tokens: folder with a tokenizer and token files of the same data, which need not be tokenised again.

    Raises:
        RecipeError: the data are not those of the run in ``output``.
        DataError: the data cannot be used.
        OutputError: the disk refused.
    """
    streamed = (recipe.data or "").startswith("hub:")
    way, names = (_stream, FILES[:1]) if streamed else (_tokens, FILES)
    make = functools.partial(way, trust_remote_code=trust_remote_code)
    staged = scratch(output) / "data"
    if work is not None:
        if config is not None:  # else of a process that was killed before it wrote config.json
            _move(work.ledger.read(), staged, output)
        shutil.rmtree(staged, ignore_errors=True)
    now, then = _sources(recipe, output), (config or {}).get("sources")
    if then is not None and now is None:
        reporter.say(f"data: {recipe.data} is not there; the run goes on with the tokens that it has")
    changed = then is not None and now is not None and now != then
    if config is not None and not changed and all((output / name).exists() for name in names):
        data = make(recipe, output, config.get("description"), reporter)
        _check(output, config, data)
        return data
    if work is None:
        raise RecipeError(f"output: the first rank could not prepare the data in {output}")
    try:
        with writing(staged):
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir()
            if tokens is not None and not streamed:
                share_tokens(tokens, staged)
            data = make(recipe, staged, None, reporter)
            made = {name: digest(staged / name) for name in names}
        _adopt(output, config, data, made)
        _record(output, work, config, about | {"data": data.key, "description": data.description, "sources": now}, made)
        _move({name: [value] for name, value in made.items()}, staged, output)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return data if streamed else make(recipe, output, data.description, Silent())


def share_tokens(source: Path, target: Path) -> None:
    """Give ``target`` the tokenizer and the token files of ``source``, if it has them (the same files, where links can be)."""
    if not all((source / name).exists() for name in FILES):
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKEN_FILES:
        if (target / name).exists():
            continue
        with suppress(FileExistsError):  # another process was first
            try:
                os.link(source / name, target / name)
            except PermissionError:  # a disk without links
                shutil.copyfile(source / name, target / name)
    copy_folder(source / "tokenizer", target / "tokenizer")


def data_digest(recipe: Recipe, output: Path) -> str:
    """A digest of everything that a run's tokens depend on: the same for runs that may share them."""
    parts = [
        recipe.data,
        recipe.data_config,
        recipe.text_field,
        recipe.tokenizer,
        recipe.vocab_size,
        _sources(recipe, output),
    ]
    return text_digest(json_text(parts))[:16]


def _check(output: Path, config: dict[str, Any], data: Data) -> None:
    known = config.get("files", {}).get(FILES[0])
    if known and digest(output / FILES[0]) not in known:
        raise RecipeError(
            f"output: {output / FILES[0]} was changed since the run was started; put it back, or choose another --output"
        )
    if config["data"] != data.key:
        raise RecipeError(f"output: the data changed since the run in {output} was started; choose another --output")


def _adopt(output: Path, config: dict[str, Any] | None, data: Data, made: dict[str, str]) -> None:
    """Raise where files that are in the folder already are not those that were just made."""
    if config is not None and config["data"] != data.key:
        raise RecipeError(f"output: the data changed since the run in {output} was started; choose another --output")
    for name, value in made.items():
        path = output / name
        if path.exists() and digest(path) != value:
            raise RecipeError(f"output: {path} is not what this recipe and its data give; choose another --output")


def _record(
    output: Path, work: Workspace, config: dict[str, Any] | None, values: dict[str, Any], made: dict[str, str]
) -> None:
    from softpick.training import engine

    if config is None:
        engine.write_json(output / "config.json", values | {"files": {name: [value] for name, value in made.items()}})
        return
    engine.write_json(output / "config.json", config | {"sources": values["sources"]})
    if "files" in config:  # version 0.1 has none, and its other files are not known either
        work.ledger.add(made)


def _move(known: dict[str, list[str]], staged: Path, output: Path) -> None:
    """Move data with known digests to their final paths, where they are not yet."""
    for name in FILES:
        source, target = staged / name, output / name
        if source.exists() and not target.exists() and digest(source) in known.get(name, []):
            with writing(target):
                os.replace(source, target)


def _sources(recipe: Recipe, output: Path) -> list[Any] | None:
    """Names, sizes and times of the files that the data come from; None where there are none, or none any more.

    Those that are read as text, not whatever else lies beside them (another run's checkpoints); of a folder without text, which
    holds token files, all.
    """
    if recipe.data is None or recipe.data.startswith("hub:"):
        return None
    path, own = Path(recipe.data), output.resolve()
    files = text_files(path) or sorted(p for p in path.rglob("*") if p.is_file())
    kept = [p for p in files if own not in p.resolve().parents]
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in kept] or None


def _tokens(
    recipe: Recipe, folder: Path, description: str | None, reporter: Reporter, *, trust_remote_code: bool
) -> Data:
    """The sequences of the token files in a folder, which are made where it has none."""
    files = {name: folder / f"{name}.tokens" for name in ("train", "validation")}
    packed = describe(recipe.data)
    if packed is not None and recipe.data is not None:
        unpack(recipe.data, folder)
    if all((folder / name).exists() for name in FILES):
        tokenizer = _tokenizer(recipe, folder, lambda: iter(()), trust_remote_code)
        description = packed or description or recipe.data or "the Python standard library"
    else:
        corpus = get_corpus(recipe.data, recipe.text_field)
        description = corpus.description
        reporter.say(f"data: {description}")
        train_texts, held_texts, _ = split_documents(corpus.documents)
        tokenizer = _tokenizer(recipe, folder, lambda: iter(train_texts), trust_remote_code)
        for name, texts in (("train", train_texts), ("validation", held_texts)):
            write_tokens(files[name], tokenizer, texts, reporter, f"tokenising the {name} data", len(texts))
    shape = recipe.sequence_length, len(tokenizer), tokenizer.bos_token_id
    training = TokenFile(files["train"], *shape)
    held = TokenFile(files["validation"], *shape, at_most=recipe.validation_sequences)
    reporter.say(f"      {len(training.tokens):,} tokens, {len(held)} sequences of {recipe.sequence_length} held out")
    if len(training) < recipe.batch_size:
        raise RecipeError(
            f"batch_size: the data has {len(training)} sequences, fewer than a batch of {recipe.batch_size}"
        )
    return Data(training, held, tokenizer, description, training.fingerprint() + held.fingerprint())


def _stream(
    recipe: Recipe, folder: Path, description: str | None, reporter: Reporter, *, trust_remote_code: bool
) -> Data:
    name = (recipe.data or "").removeprefix("hub:")
    documents = hub_documents(name, recipe.data_config, recipe.text_field)
    tokenizer = _tokenizer(recipe, folder, documents, trust_remote_code)
    description = f"the Hugging Face data set {name}" + (f" ({recipe.data_config})" if recipe.data_config else "")
    reporter.say(f"data: {description}, streamed")
    held = recipe.validation_sequences
    beginning = list(StreamedSequences(documents, tokenizer, recipe.sequence_length, at_most=held + 1))
    if len(beginning) <= held:
        raise DataError(
            f"data: expected more than validation_sequences = {held} sequences of {recipe.sequence_length} tokens in "
            f"{recipe.data}, got {len(beginning)}"
        )
    rows = torch.stack(beginning[:held])
    training = StreamedSequences(documents, tokenizer, recipe.sequence_length, skip=held)
    return Data(training, SequenceDataset(rows), tokenizer, description, fingerprint(rows))


def _tokenizer(
    recipe: Recipe, folder: Path, documents: Callable[[], Iterator[str]], trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, the recipe's, or one trained on the beginning of the documents."""
    from transformers import PreTrainedTokenizerFast

    saved = folder / "tokenizer"
    if saved.exists():
        return PreTrainedTokenizerFast.from_pretrained(saved)
    if recipe.tokenizer is not None:
        tokenizer = load_tokenizer(
            recipe.tokenizer,
            recipe.tokenizer,
            trust_remote_code=trust_remote_code,
            error_class=RecipeError,
            message="tokenizer: cannot load {name!r}",
        )
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise RecipeError(f"tokenizer: {recipe.tokenizer!r} has no BOS or no EOS; sequences start with BOS")
    else:
        tokenizer = train_tokenizer(_beginning(documents()), recipe.vocab_size)
    with writing(saved):
        tokenizer.save_pretrained(saved)
    return PreTrainedTokenizerFast.from_pretrained(saved)


def _beginning(documents: Iterator[str]) -> Iterator[str]:
    total = 0
    for text in documents:
        yield text
        total += len(text)
        if total > _TOKENIZER_CHARACTERS:
            return
