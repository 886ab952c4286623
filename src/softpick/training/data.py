"""Text into sequences: split documents, train a byte-level BPE, cut into sequences that start with BOS.

Everything is deterministic: the same files give the same tokens in the same order. Nothing touches the network.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softpick.experiment.corpus import token_ids
from softpick.experiment.reading import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "BOS",
    "EOS",
    "Backcopy",
    "SequenceDataset",
    "collate",
    "fingerprint",
    "make_backcopy",
    "make_sequences",
    "train_tokenizer",
]

BOS, EOS = "<bos>", "<eos>"


def __getattr__(name: str) -> object:
    """What was here in version 0.1, for one release."""
    from softpick.experiment import corpus, reading

    homes = {"get_corpus": corpus, "split_documents": corpus, "standard_library": corpus}
    home = homes.get(name) or {"Corpus": reading, "read_corpus": reading}.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} has moved to {home.__name__}.{name}", DeprecationWarning, stacklevel=2)
    return getattr(home, name)


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
