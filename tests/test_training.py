"""Data and the glue to the Trainer: formats, splits, sequences, Backcopy by brute force, resume equality."""

import itertools
import json
import os
import signal
import threading
from collections import Counter

import pytest
import torch

pytest.importorskip("transformers")

from softpick import NORMALIZERS
from softpick.experiment.corpus import split_documents, standard_library
from softpick.experiment.reading import DataError, read_corpus
from softpick.training import engine
from softpick.training.data import SequenceDataset, collate, fingerprint, make_backcopy, make_sequences, train_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog; " * 40


# ---- documents


def write_all(folder):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    (folder / "a.txt").write_text("text file")
    (folder / "b.jsonl").write_text('{"text": "line one"}\n\n{"text": "line two"}\n')
    (folder / "c").mkdir()
    pq.write_table(pa.table({"text": ["row one", None, "row two"]}), folder / "c" / "d.parquet")
    (folder / "ignored.bin").write_bytes(b"\xff\xfe")


def test_directory_of_every_format(tmp_path):
    write_all(tmp_path)
    corpus = read_corpus(tmp_path)
    assert corpus.documents == ("text file", "line one", "line two", "row one", "row two")
    assert "5 documents" in corpus.description
    assert str(tmp_path) in corpus.description


@pytest.mark.parametrize(("name", "count"), [("a.txt", 1), ("b.jsonl", 2), ("c/d.parquet", 2)])
def test_single_files(tmp_path, name, count):
    write_all(tmp_path)
    assert len(read_corpus(tmp_path / name).documents) == count


def test_text_field(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"body": "hello"}\n')
    assert read_corpus(tmp_path / "x.jsonl", "body").documents == ("hello",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": "a"}\n{"body": "b"}\n', r"x\.jsonl, line 2: no field 'text' \(found 'body'\)"),
        ("x.jsonl", '{"text": "a"}\nnot json\n', r"x\.jsonl, line 2: not JSON"),
        ("x.jsonl", '{"text": 3}\n', r"x\.jsonl, line 1: field 'text' is int"),
        ("x.jsonl", "[1]\n", r"x\.jsonl, line 1: no field 'text' \(found list\)"),
        ("x.txt", "  \n", "has no text"),
        ("x.txt", b"\xff\xfe\x00", "is not UTF-8"),
        ("x.parquet", b"PAR", "is not a parquet file"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_corpus(path)


def test_bad_paths_and_columns(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_corpus(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no files below"):
        read_corpus(tmp_path)
    write_all(tmp_path)
    with pytest.raises(DataError, match=r"d\.parquet: no column 'body' \(found 'text'\)"):
        read_corpus(tmp_path / "c", "body")


def test_standard_library_is_deterministic_and_without_tests():
    corpus = standard_library(300_000)
    assert corpus == standard_library(300_000)
    assert 200_000 < corpus.characters <= 300_000
    assert "standard library" in corpus.description


def test_split_keeps_copies_together_and_loses_nothing():
    documents = [f"document {i % 50} " * 20 for i in range(100)]
    train, valid, sentence = split_documents(documents)
    assert Counter(train) + Counter(valid) == Counter(documents)
    assert not set(train) & set(valid)
    assert valid
    assert "by document" in sentence
    assert split_documents(documents[::-1])[1] == valid[::-1]  # the order of files does not matter


def test_split_of_one_and_of_equal_documents():
    train, valid, sentence = split_documents(["abcdefghij" * 10])
    assert train[0] + valid[0] == "abcdefghij" * 10
    assert "one document" in sentence
    with pytest.raises(DataError, match="same text"):
        split_documents(["same", "same"])


# ---- sequences


def test_tokenizer_and_sequences():
    documents = [TEXT, "äöü ☃ " * 30]
    tokenizer = train_tokenizer(documents, 300)
    assert len(tokenizer) <= 300
    assert tokenizer("fox").input_ids[0] == tokenizer.bos_token_id
    sequences = make_sequences(tokenizer, documents, 16)
    assert (sequences[:, 0] == tokenizer.bos_token_id).all()
    assert not (sequences[:, 1:] == tokenizer.bos_token_id).any()
    decoded = tokenizer.decode(sequences[:, 1:].flatten())
    assert "<eos>".join(documents).startswith(decoded)
    assert len(decoded) > len(TEXT)
    assert fingerprint(sequences) == fingerprint(make_sequences(train_tokenizer(documents, 300), documents, 16))
    with pytest.raises(DataError, match="too few for one sequence of 64"):
        make_sequences(tokenizer, ["short"], 64)
    with pytest.raises(DataError, match="at least 258"):
        train_tokenizer(documents, 100)


def test_dataset_batches_are_rows():
    data = SequenceDataset(torch.arange(12).view(4, 3))
    loader = torch.utils.data.DataLoader(data, batch_size=2, collate_fn=collate)
    batches = list(loader)
    assert torch.equal(torch.cat([b["input_ids"] for b in batches]), data.sequences)
    assert torch.equal(collate([data[0], data[2]])["labels"], data.sequences[[0, 2]])


def test_backcopy_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([0.0, 5, 4, 3, 2, 1])  # token 0 is BOS
    body = torch.multinomial(weights, 400 * 31, replacement=True, generator=generator).view(400, 31)
    sequences = torch.cat([torch.zeros(400, 1, dtype=torch.long), body], dim=1)
    chain = make_backcopy(sequences, 6, bos=0, candidates=[2, 3], trigger_count=2)
    assert chain.triggers == (2, 3)

    counts = Counter()
    for row in sequences[:, 1:].tolist():
        counts.update(itertools.pairwise(row))
    for a in range(1, 6):
        total = sum(counts[a, b] for b in range(6))
        for b in range(6):
            assert chain.transitions[a, b].item() == pytest.approx(counts[a, b] / total)

    drawn = chain.sample(4000, 32, seed=3)
    assert torch.equal(drawn, chain.sample(4000, 32, seed=3))
    assert not torch.equal(drawn, chain.sample(4000, 32, seed=4))
    follows = Counter()
    for row in drawn.tolist():
        assert row[0] == 0
        assert 0 not in row[1:]
        assert row[1] not in (2, 3)
        for i in range(3, 32):
            if row[i - 1] in (2, 3):
                assert row[i] == row[i - 2]
                assert row[i - 2] not in (2, 3)
            else:
                follows[row[i - 1], row[i]] += 1
    for a in (1, 4, 5):  # after other tokens: the bigrams of the text
        total = sum(follows[a, b] for b in range(6))
        for b in range(1, 6):
            p = chain.transitions[a, b].item()
            assert abs(follows[a, b] / total - p) < 5 * (p * (1 - p) / total) ** 0.5 + 1e-9


def test_backcopy_needs_different_tokens():
    with pytest.raises(DataError, match="too few different tokens"):
        make_backcopy(torch.tensor([[0, 1, 1, 1]]), 3, bos=0)


# ---- training


def model(normalizer="softpick", seed=0, **more):
    shape = {"vocab_size": 32, "layers": 1, "heads": 2, "width": 8, "sequence_length": 8} | more
    return engine.build_model(normalizer, seed=seed, **shape)


def test_all_normalizers_start_from_the_same_weights():
    base = model("softmax").state_dict()
    for name in NORMALIZERS:
        other = model(name).state_dict()
        assert all(torch.equal(base[key], other[key]) for key in base)
        assert all("sinks" in key for key in set(other) - set(base))
    assert not torch.equal(model(seed=1).state_dict()["lm_head.weight"], base["lm_head.weight"])


def arguments(folder, **more):
    given = {"steps": 12, "batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1, "seed": 0, "log_every": 3}
    return engine.training_arguments(folder, **(given | {"evaluate_every": 4, "save_every": 3} | more))


@pytest.fixture
def data():
    sequences = torch.randint(1, 32, (40, 8), generator=torch.Generator().manual_seed(5))
    return SequenceDataset(sequences), SequenceDataset(sequences[:8])


class StopAt:
    """A progress bar that wishes training to stop after a step."""

    def __init__(self, step):
        self.step, self.stop, self.seen = step, engine.StopRequest(), []

    def update(self, step, loss, note=""):
        self.seen.append(step)
        if step >= self.step:
            self.stop.requested = True


def test_schedule_and_optimizer(tmp_path, data):
    args = arguments(tmp_path, steps=20, log_every=1, save_every=None)
    trainer = engine.Trainer(
        model=model(), args=args, train_dataset=data[0], eval_dataset=data[1], data_collator=collate
    )
    trainer.create_optimizer_and_scheduler(20)
    decayed, free = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert decayed["betas"] == (0.9, 0.95)
    assert all(p.dim() == 1 for p in free["params"])
    for _ in range(20):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(1e-3)


@pytest.mark.parametrize("at", [3, 6])
def test_interrupted_run_resumes_to_the_same_weights_and_losses(tmp_path, data, at):
    whole = model()
    expected = engine.train(whole, arguments(tmp_path / "whole"), *data)
    assert expected.curves["step"] == [3, 6, 9, 12]
    assert expected.curves["eval_step"] == [4, 8, 12]

    bar = StopAt(at)
    with pytest.raises(engine.Interrupted, match=f"after step {at + 3} of 12"):
        engine.train(model(), arguments(tmp_path / "cut", save_every=None), *data, stop=bar.stop, progress=bar)
    checkpoint = engine.last_checkpoint(tmp_path / "cut")
    assert checkpoint is not None
    assert bar.seen[-1] < 12

    resumed = model(seed=99)  # the weights come from the checkpoint
    bar = StopAt(1000)
    outcome = engine.train(resumed, arguments(tmp_path / "cut", save_every=None), *data, stop=bar.stop, progress=bar)
    assert bar.seen[0] > at
    assert outcome.curves == expected.curves
    assert outcome.validation_loss == expected.validation_loss
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_checkpoint_that_was_cut_short_does_not_count(tmp_path):
    for step, complete in ((3, True), (12, True), (9, True), (15, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if complete:
            (folder / "complete.json").write_text(json.dumps({"seconds": 1.0}))
    assert engine.last_checkpoint(tmp_path).name == "checkpoint-12"
    assert engine.last_checkpoint(tmp_path / "none") is None


def test_loss_that_is_not_finite_is_logged(tmp_path, data):
    broken = model()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    outcome = engine.train(broken, arguments(tmp_path, steps=3, save_every=None), *data)
    assert outcome.curves["loss"][0] != outcome.curves["loss"][0]


def test_stop_request_listens_and_lets_go():
    before = signal.getsignal(signal.SIGINT)
    stop = engine.StopRequest()
    with stop.on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before

    def elsewhere():
        with engine.StopRequest().on_signals():
            pass

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()


def test_write_json_replaces_whole_files(tmp_path):
    engine.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        engine.write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
