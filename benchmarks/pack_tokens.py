"""Text, tokenised and compressed, for a machine that gets it in parts and without network (softpick.training.packed).

    python benchmarks/pack_tokens.py TEXT FOLDER [--vocab-size 8192] [--work FOLDER]

``softpick grid RECIPE data=FOLDER`` trains on it. The work folder keeps the tokenizer and the token files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from softpick.experiment.corpus import get_corpus, split_documents
from softpick.experiment.progress import Silent
from softpick.training.data import train_tokenizer
from softpick.training.packed import pack
from softpick.training.token_files import TokenFile, write_tokens

TOKENIZER_CHARACTERS = 20_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--work", type=Path, default=Path("softpick-pack"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    corpus = get_corpus(options.text)
    training, held, _ = split_documents(corpus.documents)
    beginning, characters = 0, 0
    while beginning < len(training) and characters < TOKENIZER_CHARACTERS:
        characters += len(training[beginning])
        beginning += 1
    tokenizer = train_tokenizer(training[:beginning], options.vocab_size)
    tokenizer.save_pretrained(options.work / "tokenizer")
    counts = []
    for name, texts in (("train", training), ("validation", held)):
        path = options.work / f"{name}.tokens"
        write_tokens(path, tokenizer, texts, Silent(), name, len(texts))
        counts.append(len(TokenFile(path, 2, len(tokenizer), 0).tokens))
    kind = f"{len(corpus.documents):,} documents, {corpus.characters / 1e6:.1f} million characters"
    size = pack(options.work, options.folder, f"{kind}, {counts[0]:,} tokens and {counts[1]:,} held out")
    print(f"{kind}; tokens: {counts[0]:,} and {counts[1]:,} held out; packed: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
