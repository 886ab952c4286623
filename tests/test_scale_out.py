"""benchmarks/scale_out.py: its text, what it reads from logs, its table. Without pytest it also runs whole (two CPU ranks)."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scale_out.py"
spec = importlib.util.spec_from_file_location("scale_out", SCRIPT)
scale_out = importlib.util.module_from_spec(spec)
sys.modules["scale_out"] = scale_out
spec.loader.exec_module(scale_out)


def test_a_document_is_a_sequence(tmp_path):
    pytest.importorskip("tokenizers")
    from transformers import AutoTokenizer

    assets, data = scale_out.make_text(tmp_path, 64, 16, 3)
    documents = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(assets)
    assert [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in documents] == [15] * 3
    before = data.stat().st_mtime_ns
    assert scale_out.make_text(tmp_path, 64, 16, 3) == (assets, data)
    assert data.stat().st_mtime_ns == before


def titan_line(step, loss, norm, tps):
    """As torchtitan 0.2.2 prints it, colours included."""
    red, end = "\x1b[31m", "\x1b[39m"
    return (
        f"[titan] 2026-11-29 01:00:00,000 - root - INFO - {red}step: {step:2}  {red}loss: {loss:8.5f}  "
        f"{red}grad_norm: {norm:7.4f}  "
        f"{red}memory: 20.11GiB(14.38%)  {red}tps: {tps:,}  {red}tflops: 1,146.83  {red}mfu: 14.83%{end}\n"
    )


def test_lines_of_torchtitan_are_read(tmp_path):
    log = tmp_path / "row.log"
    steps = [(1, 10.5, 3.25, 900), (5, 9.5, 2.0, 45_000), (10, 8.25, 1.5, 47_000), (20, 7.125, 1.0, 46_000)]
    log.write_text("noise\n" + "".join(titan_line(*step) for step in steps))
    found = scale_out.read_titan(log, 2)
    assert found["tokens_per_second"] == 92_000  # the median without the first line, of both ranks
    assert found["loss"] == {1: 10.5, 5: 9.5, 10: 8.25, 20: 7.125}
    assert found["grad_norm"][20] == 1.0
    assert (found["mfu"], found["peak_memory_gib"]) == (pytest.approx(0.1483), 20.11)
    log.write_text("".join(titan_line(*step) for step in steps[:3]) + "torch.OutOfMemoryError: 3 GiB\n")
    assert "OutOfMemoryError" in scale_out.read_titan(log, 2)["error"]


def test_the_table_compares_with_one_rank():
    def row(name, ranks, against, speed, loss, norm):
        figures = {"tokens_per_second": speed, "loss": {"20": loss}, "grad_norm": {"20": norm}}
        return {"row": name, "ranks": ranks, "against": against, **figures}

    rows = {
        "one": row("one", 1, "", 100.0, 7.0, 1.0),
        "four": row("four", 4, "one", 340.0, 7.0025, 1.01),
        "failed": {"row": "failed", "ranks": 4, "against": "one", "error": "torch.OutOfMemoryError"},
    }
    lines = scale_out.table(rows).splitlines()
    assert lines[3] == "| four | 4 | 340 | 85.0% |  |  | 7.0025 | 0.0025 | 1.00% |"
    assert "OutOfMemoryError" in lines[4]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_row_has_the_batch_of_all_ranks(tmp_path, monkeypatch, ranks):
    monkeypatch.setattr(scale_out, "make_text", lambda *_: (tmp_path / "tokenizer", tmp_path / "text.jsonl"))
    options = argparse.Namespace(output=tmp_path, ranks=ranks, device="cuda")
    rows = [row for group in scale_out.rows_of(options) for row in group]
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    for row in rows:
        assert not row.against or row.against in names
        if row.reads in ("trainer", "killed"):
            fields = dict(part.split("=", 1) for part in row.command if "=" in part)
            micro = int(fields["micro_batch_size"])
            assert int(fields["batch_size"]) == micro * ranks
            assert fields["parallel"] == ("none" if row.ranks == 1 else "fsdp")
        if row.reads == "titan":
            value = {name: row.command[i + 1] for i, name in enumerate(row.command[:-1]) if name.startswith("--")}
            shards = int(value.get("--parallelism.data_parallel_shard_degree", 1))
            product = shards * int(value.get("--parallelism.tensor_parallel_degree", 1))
            assert product * int(value.get("--parallelism.context_parallel_degree", 1)) == row.ranks
            whole, local = int(value["--training.global_batch_size"]), int(value["--training.local_batch_size"])
            assert whole % (local * shards) == 0
