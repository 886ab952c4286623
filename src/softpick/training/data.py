"""Text into sequences: split documents, train a byte-level BPE, cut into sequences that start with BOS.

Everything is deterministic: the same files give the same tokens in the same order. Nothing touches the network.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softpick.training.reading import Corpus, DataError, read_corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "BOS",
    "EOS",
    "Backcopy",
    "Corpus",
    "DataError",
    "SequenceDataset",
    "collate",
    "fingerprint",
    "make_backcopy",
    "make_sequences",
    "read_corpus",
    "split_documents",
    "standard_library",
    "token_ids",
    "train_tokenizer",
]

BOS, EOS = "<bos>", "<eos>"
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


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ``<bos>`` (0) and ``<eos>`` (1); ``encode`` puts BOS first.

    Raises:
        DataError: ``vocab_size`` below 258 (256 bytes and the two).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 258:
        raise DataError(f"vocab-size: expected at least 258 (256 bytes, BOS, EOS), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that somebody wrote, without special tokens.

    The words ``<eos>`` in a text are text like any other and not the token that ends a document, which only software may set.

    Args:
        tokenizer: of transformers.
        texts: any number of them.
    """
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def make_sequences(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], length: int, what: str = "data"
) -> Tensor:
    """``(N, length)`` token ids: documents joined by EOS, cut into pieces, BOS before each.

    Raises:
        DataError: less text than one sequence.
    """
    stream: list[int] = []
    # in slices: the token ids of a whole corpus as Python objects at once would take gigabytes
    for start in range(0, len(documents), 256):
        for ids in token_ids(tokenizer, documents[start : start + 256]):
            stream.extend(ids)
            stream.append(tokenizer.eos_token_id)
    count = len(stream) // (length - 1)
    if count == 0:
        raise DataError(
            f"{what}: {len(stream)} tokens are too few for one sequence of {length}; give more text or a smaller "
            "--sequence-length"
        )
    body = torch.tensor(stream[: count * (length - 1)]).view(count, length - 1)
    return torch.cat([torch.full((count, 1), tokenizer.bos_token_id), body], dim=1)


@dataclass(frozen=True)
class Backcopy:
    """The Bigram-Backcopy task (Guo et al. 2024, arXiv:2410.13835) over the tokens of a text.

    A Markov chain with the bigram statistics of the text; after a trigger token the next token is a copy of the one
    before the trigger. Sequences start with BOS, which the chain never emits, and then a token that is no trigger: so a
    trigger never follows a trigger (two of them would copy one another to the end of the sequence).

    Attributes:
        transitions: ``(V, V)`` bigram probabilities; those of a token that the text never leaves are ``first``.
        first: ``(V,)`` probabilities of the token after BOS: token frequencies without the triggers.
        triggers: ids of the trigger tokens.
        bos: id of BOS.
    """

    transitions: Tensor
    first: Tensor
    triggers: tuple[int, ...]
    bos: int

    def sample(self, count: int, length: int, seed: int) -> Tensor:
        """``(count, length)`` token ids."""
        generator = torch.Generator().manual_seed(seed)
        trigger = torch.zeros(len(self.first), dtype=torch.bool)
        trigger[list(self.triggers)] = True
        # sampling by the inverse cumulative distribution: one searchsorted a position for all sequences
        cumulative = self.transitions.double().cumsum(1)
        cumulative /= cumulative[:, -1:].clone()
        first = self.first.double().cumsum(0)
        out = torch.empty(count, length, dtype=torch.long)
        out[:, 0] = self.bos
        for position in range(1, length):
            u = torch.rand(count, 1, generator=generator, dtype=torch.double)
            previous = out[:, position - 1]
            if position == 1:
                out[:, 1] = torch.searchsorted(first / first[-1], u[:, 0], right=True)
                continue
            chain = torch.searchsorted(cumulative[previous], u, right=True)[:, 0]
            out[:, position] = torch.where(trigger[previous], out[:, position - 2], chain)
        return out


def make_backcopy(
    sequences: Tensor, vocab_size: int, bos: int, candidates: Sequence[int] | None = None, trigger_count: int = 3
) -> Backcopy:
    """Bigram statistics of ``sequences`` (BOS first).

    Args:
        sequences: ``(N, T)`` token ids.
        vocab_size: number of token ids.
        bos: id of BOS.
        candidates: which tokens may be triggers; by default all. The most frequent ones are taken.
        trigger_count: how many triggers.
    """
    body = sequences[:, 1:]
    counts = torch.zeros(vocab_size, vocab_size, dtype=torch.double)
    pairs = body[:, :-1] * vocab_size + body[:, 1:]
    counts.view(-1).index_add_(0, pairs.reshape(-1), torch.ones(pairs.numel(), dtype=torch.double))
    frequencies = torch.bincount(body.reshape(-1), minlength=vocab_size).double()
    eligible = frequencies.clone()
    if candidates is not None:
        eligible = torch.zeros_like(frequencies)
        eligible[list(candidates)] = frequencies[list(candidates)]
    eligible[bos] = 0
    triggers = eligible.topk(min(trigger_count, int((eligible > 0).sum()))).indices.tolist()
    counts[:, bos] = 0
    first = frequencies.clone()
    first[[bos, *triggers]] = 0
    if not triggers or not bool(first.sum() > 0):
        raise DataError("data: the text has too few different tokens for triggers and others")
    counts[counts.sum(1) == 0] = first  # a token that the text never leaves
    return Backcopy(counts / counts.sum(1, keepdim=True), first / first.sum(), tuple(triggers), bos)


class SequenceDataset(torch.utils.data.Dataset[Tensor]):
    """Rows of one tensor; ``__getitems__`` lets a data loader fetch a batch with a single index operation."""

    def __init__(self, sequences: Tensor) -> None:
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> Tensor:
        return self.sequences[index]

    def __getitems__(self, indices: list[int]) -> Tensor:
        """A batch; torch's fetcher prefers this to one call an item."""
        return self.sequences[torch.tensor(indices)]


def collate(rows: Tensor | list[Tensor]) -> dict[str, Tensor]:
    """A batch for a causal language model; no padding, so no mask."""
    batch = rows if isinstance(rows, Tensor) else torch.stack(rows)
    return {"input_ids": batch, "labels": batch}


def fingerprint(*tensors: Tensor) -> str:
    """A hash of the data, by which a resumed run knows that it is still the same."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
