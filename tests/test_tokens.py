"""Text that somebody wrote into tokens: special tokens are set by software only, and no document is lost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from softpick.experiment.corpus import split_documents, token_ids
from softpick.experiment.progress import Silent
from softpick.experiment.reading import DataError
from softpick.training.data import make_sequences, train_tokenizer
from softpick.training.token_files import StreamedSequences, TokenFile, collator, write_tokens

WORDS = "a text about <eos> and <bos>, </s> and <pad>; "


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([WORDS * 20, "0123456789 " * 20], 300)


@pytest.fixture(scope="module")
def gpt2_like(tokenizer):
    """BOS, EOS and padding are one token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>", eos_token="<bos>", pad_token="<bos>"
    )


@pytest.mark.parametrize("name", ["tokenizer", "gpt2_like", "slow"])
def test_special_tokens_in_a_text_are_text(name, request):
    tokenizer = ByT5Tokenizer() if name == "slow" else request.getfixturevalue(name)
    special = set(tokenizer.all_special_ids)
    texts = [WORDS, "<eos>", "a<bos>b</s>"]
    for text, ids in zip(texts, token_ids(tokenizer, texts), strict=True):
        assert not special & set(ids)
        assert tokenizer.decode(ids) == text
    # and it is a matter of this call only
    assert special & set(tokenizer("a <eos> <bos> </s> b", add_special_tokens=False)["input_ids"])


SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
PIECES = [*"<>/sabunkpd", "ab", "</", "s>", "pad", "▁", "▁a"]


def own(model, split=None, **names):
    """A tokenizer whose model has the special tokens among its words, as those of XLM-R, T5 and many others."""
    made = Tokenizer(model)
    if split is not None:
        made.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        **({"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | names),
    )


def numbered(words):
    return {word: i for i, word in enumerate(words)}


MODELS = {
    "unigram": lambda: own(
        models.Unigram(
            [(word, 0.0 if word in SPECIAL else -float(i)) for i, word in enumerate([*SPECIAL, *PIECES])], unk_id=0
        ),
        pre_tokenizers.Metaspace(prepend_scheme="never"),
    ),
    "merges": lambda: own(
        models.BPE(numbered([*SPECIAL, *PIECES]), [("<", "/"), ("s", ">"), ("</", "s>"), ("a", "b")], unk_token="<unk>")
    ),
    "words": lambda: own(
        models.WordLevel(numbered([*SPECIAL, "a", "ab"]), unk_token="<unk>"), pre_tokenizers.WhitespaceSplit()
    ),
    "pieces": lambda: own(
        models.WordPiece(numbered([*SPECIAL, "a", "<", "##s", "##>"]), unk_token="<unk>"),
        pre_tokenizers.WhitespaceSplit(),
    ),
    # unknown words become the token that also is the padding
    "padding": lambda: own(
        models.WordLevel(numbered([*SPECIAL, "a", "ab"]), unk_token="<pad>"),
        pre_tokenizers.WhitespaceSplit(),
        unk_token="<pad>",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_has_special_tokens_among_its_words(name):
    tokenizer = MODELS[name]()
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    texts = ["a </s> ab", "ab a", "</s>", "a <s> a", "<s></s>ab <pad>"]
    plain = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert sum(not special.isdisjoint(ids) for ids in plain) >= 2  # else this tests nothing
    found = token_ids(tokenizer, texts)
    for text, before, ids in zip(texts, plain, found, strict=True):
        assert special.isdisjoint(ids)
        assert len(ids) >= len(text.split())
        if special.isdisjoint(before) and tokenizer.pad_token_id not in before:
            assert ids == before
        if name == "unigram":
            assert "".join(tokenizer.convert_ids_to_tokens(ids)).replace("▁", " ") == text
    assert [tokenizer.convert_ids_to_tokens(found[0]), found[1]] == [
        {
            "unigram": ["a", "▁", "<", "/", "s", ">", "▁a", "b"],
            "merges": ["a", "<unk>", "</", "s>", "<unk>", "ab"],
            "words": ["a", "<unk>", "ab"],
            "pieces": ["a", "<unk>", "<unk>"],
            "padding": ["a", "<pad>", "ab"],
        }[name],
        plain[1],
    ]
    assert found[3] == token_ids(tokenizer, [texts[3]])[0]
    tokenizer.add_special_tokens({"sep_token": "ab"})  # whatever was kept of the tokenizer is not used any more
    assert tokenizer.sep_token_id not in token_ids(tokenizer, ["a </s> ab"])[0]


def test_a_newline_that_ends_documents_is_a_newline_in_a_text():
    tokenizer = own(
        models.WordLevel(numbered(["<unk>", "\n", "a"]), "<unk>"), pre_tokenizers.Split("", "isolated"), eos_token="\n"
    )
    assert token_ids(tokenizer, ["a\na"]) == [[2, 1, 2]]


class Slow(PreTrainedTokenizer):
    """In Python, of a fixed set of words."""

    words = ("<unk>", "</s>", "a")
    vocab_size = 3

    def get_vocab(self):
        return numbered(self.words)

    def _tokenize(self, text, **_):
        return text.split()

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token, 0)

    def _convert_id_to_token(self, index):
        return self.words[index]


def test_a_slow_tokenizer_that_knows_no_other_word_is_an_error():
    tokenizer = Slow(unk_token="<unk>", eos_token="</s>")
    assert token_ids(tokenizer, ["a b", "b</s>"]) == [[2, 0], [0]]
    with pytest.raises(DataError, match="data: a text has the words '</s>', for which Slow has its special token only"):
        token_ids(tokenizer, ["a", "a </s> a"])


@pytest.mark.parametrize("count", [1, 255, 256, 257, 512, 600])
def test_every_document_once_in_every_way(tmp_path, tokenizer, count):
    documents = [f"{i} <eos> " for i in range(count)]
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    stream = [token for text in documents for token in [*token_ids(tokenizer, [text])[0], eos]]
    assert stream.count(eos) == count
    made = {"tensor": make_sequences(tokenizer, documents, 3)}
    write_tokens(tmp_path / "x.tokens", tokenizer, documents, Silent(), "", count)
    made["file"] = torch.stack(list(TokenFile(tmp_path / "x.tokens", 3, len(tokenizer), bos)))
    made["stream"] = torch.stack(list(StreamedSequences(lambda: documents, tokenizer, 3)))
    whole = len(stream) // 2 * 2
    for name, rows in made.items():
        assert (rows[:, 0] == bos).all()
        assert rows[:, 1:].flatten().tolist() == stream[:whole], name


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text("abc", min_size=1, max_size=40), st.integers(1, 30)), min_size=2, max_size=30))
def test_copies_count_in_the_share_that_is_held_out(groups):
    documents = [text for text, copies in groups for _ in range(copies)]
    if len(set(documents)) < 2:
        return
    train, held, _ = split_documents(documents)
    assert sorted(train + held) == sorted(documents)
    assert not set(train) & set(held)
    budget = 0.05 * sum(map(len, documents))
    fits = any(documents.count(text) * len(text) <= budget for text in set(documents))
    if fits:
        assert 0 < sum(map(len, held)) <= budget
    else:
        assert len(set(held)) == 1


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(5, 9), min_size=0, max_size=6), min_size=1, max_size=12),
    st.sampled_from([(0, 1), (0, 0), (1, 1), (3, 2)]),
    st.integers(3, 9),
)
def test_documents_of_a_batch(documents, special, length):
    """Against documents that were counted while the rows were written, for any BOS and EOS."""
    bos, eos = special
    stream = [(token, number, at) for number, d in enumerate(documents) for at, token in enumerate([*d, eos])]
    size = length - 1
    rows = [stream[i : i + size] for i in range(0, len(stream) // size * size, size)]
    if not rows:
        return
    batch = collator(True, eos)([torch.tensor([bos, *(token for token, _, _ in row)]) for row in rows])
    starts, labels = [], []
    for i, row in enumerate(rows):
        starts.append(i * length)
        labels.append([bos])
        for j, (token, number, _) in enumerate(row):
            other = j > 0 and row[j - 1][1] != number
            labels[-1].append(-100 if other else token)
            if other:
                starts.append(i * length + 1 + j)
    assert batch["labels"].tolist() == labels
    assert batch["cu_seq_lens_q"].unique().tolist() == [*starts, len(rows) * length]
