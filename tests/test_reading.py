"""Text files as people have them: every kind and compression, and everything that can be wrong with them, by file and line."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import threading
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softpick.experiment.corpus import get_corpus
from softpick.experiment.reading import DataError, read_corpus

TEXTS = ["hello", "two\nlines", 'a "quoted", text', "äöü ☃ 🙂", "<eos> is a word"]


def jsonl(texts, field="text"):
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()


def table(texts, delimiter=","):
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerow(["id", "text"])
    writer.writerows(enumerate(texts))
    return stream.getvalue().encode()


def parquet(texts):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), stream)
    return stream.getvalue()


def zstd(content):
    pa = pytest.importorskip("pyarrow")
    return pa.compress(content, codec="zstd", asbytes=True)


WRITERS = {
    "jsonl": jsonl,
    "ndjson": jsonl,
    "json": lambda texts: json.dumps([{"text": text} for text in texts], indent=1).encode(),
    "csv": table,
    "tsv": lambda texts: table(texts, "\t"),
    "parquet": parquet,
}
COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_and_compression(tmp_path, kind, compression):
    path = tmp_path / f"x.{kind}{compression}"
    path.write_bytes(COMPRESSIONS[compression](WRITERS[kind](TEXTS)))
    assert read_corpus(path).documents == tuple(TEXTS)
    assert read_corpus(tmp_path).documents == tuple(TEXTS)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(set(WRITERS) - {"parquet"})),
    st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip), min_size=1),
)
def test_what_was_written_is_read(tmp_path_factory, kind, texts):
    path = tmp_path_factory.mktemp("any") / f"x.{kind}"
    path.write_bytes(WRITERS[kind](texts))
    assert read_corpus(path).documents == tuple(texts)


def test_json_may_be_one_object_or_lines(tmp_path):
    (tmp_path / "one.json").write_text('{\n "text": "hello"\n}')
    (tmp_path / "two.json").write_bytes(jsonl(["a", "b"]))
    assert read_corpus(tmp_path).documents == ("hello", "a", "b")


def test_what_a_directory_leaves_out_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for name in ("b.docx", "c.tar.gz", "d.tar.gz", "e"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"4 files of other kinds left out \(2 \.tar\.gz, 1 "):
        corpus = read_corpus(tmp_path)
    assert "4 files of other kinds left out" in corpus.description
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match="no files below"):
        read_corpus(tmp_path)


def test_links_and_pipes_of_a_directory_are_said(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b.txt").write_text("elsewhere")
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("here")
    (data / "c.txt").symlink_to(tmp_path / "elsewhere/b.txt")
    for name in ("one", "two"):
        (data / name).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (data / "d.txt").symlink_to(tmp_path / "nothing")
    os.mkfifo(data / "e.txt")
    (data / "zero.txt").symlink_to("/dev/zero")
    with pytest.warns(UserWarning, match="left out") as said:
        corpus = read_corpus(data)
    assert corpus.documents == ("here", "elsewhere")
    message = str(said[0].message)
    assert "3 entries that are not files left out (" in message
    assert all(word in message for word in ("1 broken link", "1 pipe", "1 device"))
    assert "2 linked folders left out" in message
    assert "other kinds" not in message
    assert "2 linked folders left out" in corpus.description
    (data / "a.txt").unlink()
    (data / "c.txt").unlink()
    with pytest.raises(DataError, match=r"no files below .*; 3 entries that are not files left out .*2 linked folders"):
        read_corpus(data)


def test_what_softpick_writes_below_the_data_is_no_data(tmp_path, recwarn):
    (tmp_path / "a.txt").write_text("text")
    for name in (".softpick/lock", "run/.softpick/lock", "run/config.json", "run/log.txt", ".softpick-0.tmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("ours")
    assert read_corpus(tmp_path).documents == ("text",)
    assert not recwarn.list


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "/dev/full"])
def test_a_device_is_no_data(name):
    with pytest.raises(DataError, match=f"data: {name} is a device; expected a file"):
        read_corpus(name)


@pytest.mark.parametrize("kind", ["txt", "json", "jsonl", "csv", "txt.gz"])
def test_a_pipe_is_said_first_and_read(tmp_path, kind):
    path = tmp_path / f"pipe.{kind}"
    os.mkfifo(path)
    lines = kind == "json"
    content = jsonl(TEXTS) if lines else {"txt": b"a", "txt.gz": gzip.compress(b"a")}.get(kind) or WRITERS[kind](TEXTS)
    said = []

    def write():
        while not said:  # nobody waits for a writer without a word
            time.sleep(0.01)
        path.write_bytes(content)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: said.append(str(message))
        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        corpus = read_corpus(path)
        writer.join()
    assert corpus.documents == (("a",) if kind.startswith("txt") else tuple(TEXTS))
    assert said == [f"data: {path}: reading from a pipe, until the program that writes to it closes it"]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize("letter", ["\u2028", "\u2029", "\x85", "\u001c", "\x0b", "\x0c"])
def test_only_a_newline_ends_a_line_of_json(tmp_path, kind, letter):
    texts = [f"a{letter}b", f"c{letter}", "d"]
    lines = [json.dumps({"text": text}, ensure_ascii=letter < " ") for text in texts]
    (tmp_path / f"x.{kind}").write_bytes("\n".join(lines).encode())
    assert read_corpus(tmp_path).documents == tuple(texts)
    (tmp_path / f"x.{kind}").write_text("\n".join([*lines, "{"]), encoding="utf-8")
    with pytest.raises(DataError, match="line 4: not JSON"):
        read_corpus(tmp_path)


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_every_end_of_a_line_of_a_table(tmp_path, kind, end):
    texts = ["a", "two\nlines", "two\rlines", "d"]
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter="," if kind == "csv" else "\t", lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([["text", "id"], *([text, "1"] for text in texts)])
    (tmp_path / f"x.{kind}").write_bytes(stream.getvalue().encode())
    assert read_corpus(tmp_path).documents == tuple(texts)


@pytest.mark.parametrize("content", [b"", b" \n", b"\0" * 100, b"\0 \n\0"])
def test_nothing_is_no_text(tmp_path, content):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(DataError, match="has no text in it"):
        read_corpus(tmp_path / "x.txt")


def test_an_empty_path_is_refused():
    with pytest.raises(DataError, match="data: expected a path, got ''"):
        read_corpus("")


def test_rows_without_text_are_counted(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": null}\n{"text": "a"}\n{"text": null}\n')
    corpus = read_corpus(tmp_path)
    assert corpus.documents == ("a",)
    assert "2 without text (null) left out" in corpus.description


def test_numbers_that_python_does_not_read_do_no_harm(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"id": ' + "9" * 10_000 + ', "text": "a"}\n')
    assert read_corpus(tmp_path / "x.jsonl").documents == ("a",)


GOOD = jsonl([f"document {i}" for i in range(399)])
BAD_LINES = {
    "lone surrogate": (rb'{"text": "\ud83d"}', "half of a character"),
    "latin-1": (b'{"text": "caf\xe9"}', "is not UTF-8"),
    "deep": (b'{"text": ' + b"[" * 100_000, "nested too deeply"),
    "cut": (b'{"text": "a', "not JSON"),
    "digits": (b'{"text": ' + b"9" * 10_000 + b"}", "not a string"),
    "list": (b'{"text": ["a"]}', "field 'text' is list, not a string"),
    "no field": (b'{"body": "a"}', "no field 'text'"),
}


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, name, compression):
    line, words = BAD_LINES[name]
    path = tmp_path / f"x.jsonl{compression}"
    path.write_bytes(COMPRESSIONS[compression](GOOD + line + b"\n" + GOOD))
    with pytest.raises(DataError, match="line 400") as raised:
        read_corpus(path)
    assert words in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"id,text\n1,a\n2\n", "line 3: expected 2 columns, got 1"),
        ("x.csv", b"id,body\n1,a\n", "line 1: expected one column 'text', found 'id', 'body'"),
        ("x.csv", b'id,text\n1,"a', "line 2: not CSV"),
        ("x.csv", b"id,text\n1,a\n2,caf\xe9\n", "line 3, byte 5"),
        ("x.txt", b"a\nb\ncaf\xe9\n", "line 3, byte 3"),
        ("x.json", b'[{"text": "a"},\n {"text": 3}]', "object 2: field 'text' is int"),
        ("x.json", b'[{"text": "a"},\n {"text" 3}]', "line 2: not JSON"),
        ("x.json", b"[" * 100_000, "nested too deeply"),
        ("x.jsonl.gz", gzip.compress(GOOD)[:-20], "cannot be read"),
        ("x.jsonl.gz", b"no gzip", "cannot be read"),
        ("x.jsonl.xz", lzma.compress(GOOD)[:100], "cannot be read"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        read_corpus(tmp_path / name)
    assert name in str(raised.value)


def test_a_parquet_file_with_a_damaged_page(tmp_path):
    content = bytearray(parquet([f"document {i} " * 50 for i in range(2000)]))
    content[4:2000] = b"\xff" * 1996
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.parquet"):
        read_corpus(tmp_path)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("a")

    def refuse(*args):
        raise PermissionError(13, "Permission denied", str(tmp_path / "x.txt"))

    monkeypatch.setattr("softpick.experiment.reading._open", refuse)
    with pytest.raises(DataError, match=r"x\.txt cannot be read \(Permission denied\)"):
        read_corpus(tmp_path)


def test_hub_records(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("transformers")
    from softpick.training.token_files import hub_documents

    def documents(*records):
        def stream():
            for record in records:
                if isinstance(record, Exception):
                    raise record
                yield {"text": record}

        class Stream:
            def __iter__(self):
                return stream()

        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: Stream())
        return list(hub_documents(str(tmp_path), None, "text")())

    assert documents(None, "a", None, "b") == ["a", "b"]
    with pytest.raises(DataError, match="record 2: field 'text' is int"):
        documents("a", 3)
    with pytest.raises(DataError, match=r"record 2: .*half of a character"):
        documents("a", "\ud83d")
    with pytest.raises(DataError, match=r"cannot be read after record 1 \(gone\)"):
        documents("a", ConnectionError("gone"))


# ---- the cap on characters


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("letters", ["a", "ä", "☃", "🙂", "a🙂☃"])
def test_of_a_long_text_only_the_beginning_is_read(tmp_path, compression, mark, letters):
    text = letters * 5000
    path = tmp_path / f"x.txt{compression}"
    path.write_bytes(COMPRESSIONS[compression](mark + text.encode()))
    for cap in (1, 2, 999, 1000, 1001, 1002):
        assert read_corpus(path, characters=cap).documents == (text[:cap],)
    assert read_corpus(path).documents == (text,)
    assert read_corpus(path, characters=len(text)).documents == (text,)
    assert "more are not used" not in read_corpus(path, characters=len(text)).description


@pytest.mark.parametrize(
    ("texts", "cap", "kept"),
    [
        (["abc", "defg", "h"], 8, ["abc", "defg", "h"]),  # ends exactly at the cap
        (["abc", "defg"], 7, ["abc", "defg"]),
        (["abc", "defg", "h"], 7, ["abc", "defg"]),
        (["abc", "defg", "h"], 6, ["abc", "def"]),
        (["a" * 50], 10, ["a" * 10]),  # one document that is longer than all that is used
        (["abc"], 3, ["abc"]),
    ],
)
def test_documents_up_to_the_cap(tmp_path, texts, cap, kept):
    (tmp_path / "x.jsonl").write_bytes(jsonl(texts))
    corpus = get_corpus(tmp_path / "x.jsonl", "text", cap)
    assert list(corpus.documents) == kept
    assert ("more are not used" in corpus.description) == (sum(map(len, texts)) > cap)
