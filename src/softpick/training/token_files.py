"""Token files and streams: text tokenised once, sequences of one length that start with BOS, document boundaries known.

A token file is the concatenation of all documents, each followed by EOS, as 16- or 32-bit integers. It is mapped into
memory, not read. Sequence ``i`` is BOS and the ``length - 1`` tokens from ``i (length - 1)`` on.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softpick.experiment.corpus import token_ids
from softpick.experiment.files import writing
from softpick.experiment.progress import Reporter
from softpick.experiment.reading import DataError, check_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["StreamedSequences", "TokenFile", "collator", "hub_documents", "write_tokens"]

_TOGETHER = 256  # documents tokenised at once


def _tokenised(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> Iterator[list[int]]:
    """Token ids of each document, EOS behind it."""
    documents = iter(documents)
    while chunk := list(itertools.islice(documents, _TOGETHER)):
        for ids in token_ids(tokenizer, chunk):
            yield [*ids, tokenizer.eos_token_id]


def write_tokens(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    reporter: Reporter,
    label: str,
    total: int,
) -> None:
    """Tokenise ``documents`` into a token file, which appears complete or not at all.

    Args:
        path: the file.
        tokenizer: with an EOS.
        documents: texts.
        reporter: shows how many of ``total`` documents are done.
        label: of the progress bar.
        total: number of documents.
    """
    import numpy as np

    dtype = _dtype(len(tokenizer))
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path), temporary.open("wb") as file, reporter.progress(label, total) as progress:
        for done, ids in enumerate(_tokenised(tokenizer, documents), 1):
            file.write(np.asarray(ids, dtype=dtype).tobytes())
            if done % _TOGETHER == 0 or done == total:
                progress.update(done, None)
    os.replace(temporary, path)


def _dtype(vocabulary: int) -> Any:
    import numpy as np

    return np.uint16 if vocabulary <= 2**16 else np.uint32


class TokenFile(torch.utils.data.Dataset[Tensor]):
    """The sequences of a token file.

    Args:
        path: as :func:`write_tokens` wrote it.
        length: tokens a sequence, BOS included.
        vocabulary: size of the vocabulary, which says how wide an id is.
        bos: id of BOS.
        at_most: no more sequences than this.

    Raises:
        DataError: fewer tokens than one sequence.
    """

    def __init__(self, path: Path, length: int, vocabulary: int, bos: int, at_most: int | None = None) -> None:
        import numpy as np

        self.tokens = np.memmap(path, dtype=_dtype(vocabulary), mode="r") if path.stat().st_size else np.zeros(0)
        self.length, self.bos, self.path = length, bos, path
        self.count = len(self.tokens) // (length - 1)
        if self.count == 0:
            raise DataError(
                f"data: {len(self.tokens)} tokens ({path.stem}) are too few for one sequence of {length}; give more text or "
                "a smaller sequence_length"
            )
        self.count = min(self.count, at_most or self.count)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        """``(length,)`` token ids."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        body = self.tokens[index * (self.length - 1) : (index + 1) * (self.length - 1)]
        return torch.cat([torch.tensor([self.bos]), torch.from_numpy(body.astype("int64"))])

    def __getitems__(self, indices: list[int]) -> Tensor:
        """``(len(indices), length)``: a batch; torch's fetcher prefers this to one call an item."""
        import numpy as np

        chosen = np.asarray(indices, dtype=np.int64)
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < self.count:
            raise IndexError(f"{chosen.min()} to {chosen.max()}")
        size = self.length - 1
        rows = self.tokens[: self.count * size].reshape(self.count, size)[chosen]
        return torch.cat([torch.full((len(rows), 1), self.bos), torch.from_numpy(rows.astype("int64"))], dim=1)

    def fingerprint(self) -> str:
        """A hash of the file, by which a resumed run knows that it is still the same."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]


class StreamedSequences(torch.utils.data.IterableDataset[Tensor]):
    """Sequences of documents that are tokenised on the fly, in the order of the stream.

    A resumed run gets the same sequences again: the Trainer skips those that it has had.

    Args:
        documents: starts the stream from its beginning.
        tokenizer: with an EOS and a BOS.
        length: tokens a sequence, BOS included.
        skip: sequences at the start that are left out (those of the validation).
        at_most: no more sequences than this.
    """

    def __init__(
        self,
        documents: Callable[[], Iterable[str]],
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        skip: int = 0,
        at_most: int | None = None,
    ) -> None:
        self.documents, self.tokenizer, self.length = documents, tokenizer, length
        self.skip, self.at_most = skip, at_most

    def __iter__(self) -> Iterator[Tensor]:
        stop = None if self.at_most is None else self.skip + self.at_most
        return itertools.islice(self._all(), self.skip, stop)

    def _all(self) -> Iterator[Tensor]:
        rest: list[int] = []
        size = self.length - 1
        for ids in _tokenised(self.tokenizer, self.documents()):
            rest += ids
            whole = len(rest) // size
            for i in range(whole):
                yield torch.tensor([self.tokenizer.bos_token_id, *rest[i * size : (i + 1) * size]])
            del rest[: whole * size]


def hub_documents(name: str, config: str | None, field: str) -> Callable[[], Iterator[str]]:
    """The texts of a Hugging Face data set, streamed; a record whose text is null has none.

    Raises:
        DataError: ``datasets`` is missing, the hub cannot be reached, or there is no such field; while it streams, a record
            that cannot be read or whose text is no text.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise DataError(f"data: hub:{name} needs datasets: pip install 'softpick[train]'") from None
    try:
        if not Path(name).exists():
            from huggingface_hub import HfApi

            HfApi().dataset_info(name, timeout=10)  # says in seconds what datasets says after five tries
        stream = datasets.load_dataset(name, config, split="train", streaming=True)
        first = next(iter(stream))
    except Exception as error:  # whatever a network, the hub or a data set can do wrong
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"data: cannot read the hub data set {name!r} ({reason}); without network give data=PATH, or data=none for the "
            "built-in corpus"
        ) from error
    if field not in first:
        raise DataError(f"data: hub:{name} has no text field {field!r} (found {', '.join(first)}); see text_field")

    def texts() -> Iterator[str]:
        records, number = iter(stream), 0
        while True:
            try:
                record = next(records, None)
            except Exception as error:  # the same
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise DataError(f"data: hub:{name} cannot be read after record {number} ({reason})") from error
            if record is None:
                return
            number += 1
            if record.get(field) is not None:  # no text, no document
                yield check_text(record[field], f"data: hub:{name}, record {number}: field {field!r}")

    return texts


def collator(document_mask: bool, eos: int) -> Callable[[list[Tensor] | Tensor], dict[str, Any]]:
    """Rows ``(T,)``, a list or a tensor of them, into a batch for a causal language model.

    With ``document_mask`` also ``cu_seq_lens``, the starts of the documents among all tokens of the batch, by which attention
    keeps them apart; and the first token of a document, which nothing before it can tell, is no target. Positions go on
    through a row: rotary embeddings only know differences.
    """

    def collate(rows: list[Tensor] | Tensor) -> dict[str, Any]:
        ids = rows if isinstance(rows, Tensor) else torch.stack(list(rows))
        if not document_mask:
            return {"input_ids": ids, "labels": ids}
        first = torch.zeros_like(ids, dtype=torch.bool)
        first[:, 2:] = ids[:, 1:-1] == eos  # the token in front of all is BOS, also where BOS and EOS are one token
        starts = (first | (torch.arange(ids.shape[1]) == 0)).flatten().nonzero().flatten()
        # up to a power of two with empty documents: a compiled layer shall not see a new shape in every batch
        offsets = torch.full((2 ** (len(starts) - 1).bit_length() + 1,), ids.numel(), dtype=torch.int32)
        offsets[: len(starts)] = starts
        return {
            "input_ids": ids,
            "labels": ids.masked_fill(first, -100),
            "cu_seq_lens_q": offsets,
            "cu_seq_lens_k": offsets,
            "max_length_q": ids.shape[1],
            "max_length_k": ids.shape[1],
        }

    return collate
