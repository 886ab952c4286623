"""``softpick quantize`` with the real libraries: their weights, going on after a stop, errors, and the command."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from test_audit import write_gguf
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from softpick.evaluation.tasks import EvaluationError
from softpick.experiment.models import ModelError
from softpick.experiment.perplexity import perplexity
from softpick.integrations.transformers import SoftpickLlamaConfig, SoftpickLlamaForCausalLM, normalizer_of
from softpick.quantization import methods, plots
from softpick.quantization import quantize as quantize_module
from softpick.quantization.methods import fitting_group
from softpick.quantization.quantize import (
    QuantizeSettings,
    cells,
    columns,
    forget,
    markdown,
    quantize,
    summary_rows,
    weight_rows,
)
from softpick.quantization.verify import QuantizationError, inner_layers
from softpick.training.data import train_tokenizer

TEXT = [f"def function_{i}(a, b):\n    return a * {i} + b - {i * i}\n" * 6 for i in range(60)]
LENGTH = 32


def llama(normalizer="softpick", vocabulary=300, seed=0, **fields):
    torch.manual_seed(seed)
    config = SoftpickLlamaConfig(
        **{
            "normalizer": normalizer, "vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH,
            "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2, "tie_word_embeddings": False,
        } | fields
    )  # fmt: skip
    return SoftpickLlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two models of the same text, and a text to measure on."""
    folder = tmp_path_factory.mktemp("quantize")
    (folder / "text").mkdir()
    for i, text in enumerate(TEXT):
        (folder / "text" / f"{i:03}.txt").write_text(text)
    tokenizer = train_tokenizer(TEXT, 300)
    for seed, name in enumerate(("softmax", "softpick")):
        model = llama(name, len(tokenizer), seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ids = torch.tensor([[0, *tokenizer(t, add_special_tokens=False)["input_ids"]][:LENGTH] for t in TEXT])
        for _ in range(30):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def settings(home, **changes):
    given = {
        "model": str(home / "softmax"), "against": (str(home / "softpick"),), "methods": (), "activations": (),
        "kv_cache": (), "data": str(home / "text"), "samples": 4, "calibration_samples": 4,
    }  # fmt: skip
    if {"hqq", "gptq"} & set(changes.get("methods", ())):
        given["group_size"] = 32
    return QuantizeSettings(**(given | changes))


# ---------------------------------------------------------------------------------------------------------------------
# The libraries


@pytest.mark.parametrize(
    ("method", "bits", "error"),
    [
        ("hqq", (2, 4), (0.55, 0.12)),
        ("bnb", (4, 8), (0.12, 0.01)),
        pytest.param("gptq", (2, 3), (0.8, 0.4), marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_weights(home, tmp_path, method, bits, error, monkeypatch):
    """Each library: errors that fit the bits, the same attention, and what was saved is what was measured."""
    for package in methods.METHODS[method].packages:
        pytest.importorskip(package)
    monkeypatch.setenv("GPTQMODEL_DISABLE_PACK_EXT", "1")  # its C++ extension takes half a minute to compile
    given = settings(home, against=(), model=str(home / "softpick"), methods=(method,), bits=bits, keep=True)
    report = quantize(given, tmp_path)
    (run,) = report["runs"]
    base, *found = run["cells"]
    inner = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    for cell, most in zip(found, error, strict=True):
        weights = cell["weights"]
        assert len(weights["layers"]) == 14
        assert weights["share"] == pytest.approx(inner / run["parameters"])
        assert most / 4 < weights["error"] < most
        assert max(layer["levels"] for layer in weights["layers"]) > 2 ** (cell["bits"] - 1) or cell["bits"] == 8
        assert cell["bits"] < weights["bits_per_weight"] < cell["bits"] + 4
        assert cell["perplexity"] != base["perplexity"]
    assert found[0]["weights"]["error"] > 1.5 * found[1]["weights"]["error"]
    assert abs(found[1]["perplexity"] / base["perplexity"] - 1) < 0.5
    for cell in found:
        kept = tmp_path / f"softpick-{method}-{cell['bits']}bit"
        if method == "hqq":
            from hqq.models.hf.base import AutoHQQHFModel

            model = AutoHQQHFModel.from_quantized(str(kept), compute_dtype=torch.float32, device="cpu")
            model.set_attn_implementation("softpick")
        else:
            model = AutoModelForCausalLM.from_pretrained(kept, device_map="cpu")
        assert normalizer_of(model) == "softpick"
        AutoTokenizer.from_pretrained(kept)
        held = quantize_module._Run(
            given.model,
            "",
            given,
            corpus(home),
            LENGTH,
            tmp_path,
            quantize_module.ResultCache(None, ""),
            quantize_module.Silent(),
        ).sequences[1]
        assert perplexity(model.eval(), held) == pytest.approx(cell["perplexity"], rel=1e-4)
    assert sorted(p.name for p in tmp_path.glob("*.log")) == [f"softpick-{method}-{b}bit.log" for b in bits]
    forget(tmp_path)
    assert not list(tmp_path.glob("quantize-*"))


class Rounded(nn.Linear):
    """A matrix of 2 bits: one scale for all of it."""


def round_all(job):
    """A quantizer that needs no library."""
    model = job.load().model
    for layer in inner_layers(model).values():
        largest = layer.weight.detach().abs().max()
        layer.weight.data = (layer.weight / largest).round() * largest
        layer.__class__ = Rounded
    model.save_pretrained(job.folder)
    return model


def test_a_quantizer_is_one_record(home, tmp_path, monkeypatch):
    """One that is added is on the command line, in the settings, the table, the report and the plot."""
    record = methods.Method(
        name="toy", title="Toy rounding", bits=(2, 5), packages=("json",), citation="Nobody 2026", apply=round_all,
        check=lambda job: None, block=lambda job: None, grouped=True, distributions=("pytest",), marker="*", line=":",
    )  # fmt: skip
    monkeypatch.setitem(methods.METHODS, "toy", record)
    given = settings(home, methods=("toy",), bits=(2,), group_size=32)
    report = quantize(given, tmp_path)
    for run in report["runs"]:
        (_, cell) = run["cells"]
        assert (cell["title"], cell["bits"]) == ("Toy rounding 2 bits", 2)
        assert max(layer["levels"] for layer in cell["weights"]["layers"]) == 3
    assert "Toy rounding (Nobody 2026)" in report["meta"]["quantizers"]
    assert f"pytest {pytest.__version__}" in report["meta"]["versions"]
    assert "| Toy rounding 2 bits |" in markdown(report)
    drawn = [line for line in plots._weights(report).axes[0].lines if "toy" in str(line.get_label())]
    assert {(line.get_marker(), line.get_linestyle()) for line in drawn} == {("*", ":")}
    with pytest.raises(EvaluationError, match=r"bits: toy has 2, 5; got 3"):
        settings(home, methods=("toy",), bits=(3,)).check()
    code = (
        "from dataclasses import replace\n"
        "from softpick.quantization.methods import METHODS\n"
        "METHODS['toy'] = replace(METHODS['hqq'], name='toy', title='Toy rounding', bits=(2, 5), calibrated=True)\n"
        "from softpick.cli import main\n"
        "main(['quantize', '--help'])"
    )
    help_text = " ".join(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split())
    for words in ("HQQ, bitsandbytes, GPTQ or Toy rounding", "Comma-separated: hqq, bnb, gptq, toy; none", "toy 2,5.",
                  "(hqq, gptq, toy)", "Sequences that gptq, toy and the scales"):  # fmt: skip
        assert words in help_text, help_text


@pytest.mark.parametrize("method", ["hqq", "bnb"])
def test_half_precision(home, tmp_path, method):
    """Eight bits cost next to nothing, also in bf16: norms and rotary frequencies are not rounded on the way."""
    pytest.importorskip(methods.METHODS[method].packages[0])
    given = settings(home, against=(), methods=(method,), bits=(8,), dtype="bfloat16")
    base, found = quantize(given, tmp_path)["runs"][0]["cells"]
    assert found["weights"]["error"] < 0.01
    assert found["perplexity"] == pytest.approx(base["perplexity"], rel=0.03)


def test_hqq_of_a_model_whose_layers_it_does_not_know(home, tmp_path):
    pytest.importorskip("hqq")
    tokenizer = AutoTokenizer.from_pretrained(home / "softpick")
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    tokenizer.save_pretrained(tmp_path / "neox")
    given = settings(home, model=str(tmp_path / "neox"), methods=("hqq",), bits=(4,))
    report = quantize(given, tmp_path / "out")
    assert len(report["runs"][0]["cells"][1]["weights"]["layers"]) == 8
    # the other model has room for half as many positions: that is the length for both
    assert [run["sequence_length"] for run in report["runs"]] == [LENGTH, LENGTH]
    assert f"of {LENGTH} tokens" in report["notes"][0]


def test_a_gguf_file(home, tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("hqq")
    tokenizer = AutoTokenizer.from_pretrained(home / "softpick")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    write_gguf(tmp_path / "llama.gguf", tmp_path / "llama", quantized=False)
    found = []
    for name in ("llama", "llama.gguf"):
        given = settings(
            home, model=str(tmp_path / name), against=(), methods=("hqq",), bits=(4,), kv_cache=(4,), sequence_length=24
        )
        found.append(quantize(given, tmp_path / f"out-{name}")["runs"][0]["cells"])
    for _, weights, cache in found:
        assert weights["weights"]["error"] == pytest.approx(found[0][1]["weights"]["error"], rel=1e-4)
        assert len(weights["weights"]["layers"]) == 14
        assert cache["cache_errors"][1]["key"] == pytest.approx(0.06, rel=0.5)
    given = settings(home, model=str(tmp_path / "llama.gguf"), against=(), methods=("bnb",))
    with pytest.raises(QuantizationError, match="a GGUF file is quantized already"):
        quantize(given, tmp_path / "out")


def test_what_is_not_rounded_is_said(home, tmp_path):
    """Experts that are one tensor are no linear layers; and a vocabulary of another size makes perplexities incomparable."""
    tokenizer = train_tokenizer(TEXT, 290)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1, max_position_embeddings=64, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    tokenizer.save_pretrained(tmp_path / "mixtral")
    given = settings(home, model=str(tmp_path / "mixtral"), activations=("int4-token",), group_size=None)
    notes = " ".join(quantize(given, tmp_path / "out")["notes"])
    assert "% of the parameters besides the vocabulary's are in linear layers" in notes
    assert "mixtral: only" in notes
    assert "softpick: only" not in notes
    assert "have different vocabularies" in notes


def corpus(home):
    from softpick.experiment.corpus import split_documents
    from softpick.experiment.reading import Corpus, read_corpus

    train, held, _ = split_documents(read_corpus(str(home / "text")).documents)
    return Corpus(tuple(train), ""), Corpus(tuple(held), "")


def test_a_library_that_does_nothing_is_found_out(home, tmp_path, monkeypatch):
    pytest.importorskip("hqq")
    from hqq.models.hf.base import AutoHQQHFModel

    monkeypatch.setattr(AutoHQQHFModel, "quantize_model", lambda *args, **kwargs: None)
    monkeypatch.setattr(AutoHQQHFModel, "save_quantized", lambda *args, **kwargs: None)
    with pytest.raises(QuantizationError, match="softmax, HQQ 2 bits: nothing was quantized"):
        quantize(settings(home, methods=("hqq",), bits=(2,)), tmp_path)
    # what says which files of the folder are its own may stay there, so that the same command can go on
    assert not [p for p in tmp_path.iterdir() if p.is_dir() and p.name != ".softpick"]
    assert {p.name for p in tmp_path.glob(".softpick/*")} <= {"lock", "files.json"}


def test_a_library_that_fails_says_why(home, tmp_path, monkeypatch):
    pytest.importorskip("hqq")
    from hqq.models.hf.base import AutoHQQHFModel

    def fail(*args, **kwargs):
        print("the library's own words")
        os.write(2, b"and its compiler's\n")
        raise RuntimeError("out of ideas")

    monkeypatch.setattr(AutoHQQHFModel, "quantize_model", fail)
    with pytest.raises(QuantizationError, match="hqq failed: RuntimeError: out of ideas"):
        quantize(settings(home, methods=("hqq",), bits=(2,)), tmp_path)
    log = (tmp_path / "softmax-hqq-2bit.log").read_text()
    assert "own words" in log
    assert "compiler's" in log


# ---------------------------------------------------------------------------------------------------------------------
# The whole


def test_two_models_side_by_side(home, tmp_path):
    given = settings(home, activations=("int4-token",), kv_cache=(8, "fp8", 2))
    report = quantize(given, tmp_path)
    assert [run["normalizer"] for run in report["runs"]] == ["softmax", "softpick"]
    plan = [(cell.kind, cell.bits) for cell in cells(given)]
    assert plan == [("none", 0), ("activations", 4), ("kv_cache", 2), ("kv_cache", 8), ("kv_cache", 8)]
    assert columns(report) == ["softmax", "softpick", "Δ"]
    rows = summary_rows(report)
    assert [how for _, how, _ in rows] == [
        "unquantized",
        "W+A int4, one scale per token",
        "KV cache int2",
        "KV cache int8",
        "KV cache fp8",
    ]
    for (_, _, texts), one, two in zip(rows, *(run["cells"] for run in report["runs"]), strict=True):
        a, b = one["perplexity"], two["perplexity"]
        assert float(texts[0].split()[0]) == pytest.approx(a, rel=1e-3)
        assert float(texts[2]) == pytest.approx(b - a, rel=6e-3, abs=1e-9)
    changed = report["runs"][1]["cells"][1]["perplexity"] / report["runs"][1]["cells"][0]["perplexity"] - 1
    assert f"({100 * changed:+.2f} %)" in rows[1][2][1]
    assert weight_rows(report) == []
    assert all(word in markdown(report) for word in ("| Δ |", "KV cache int2", "versions: softpick"))
    json.loads(json.dumps(report, allow_nan=False))


def test_goes_on_after_a_stop(home, tmp_path, monkeypatch):
    given = settings(home, activations=("int4-token", "int8-tensor"), kv_cache=(4,))
    whole = quantize(given, tmp_path / "whole")
    measured = []
    real = quantize_module.perplexity

    def counted(*args, **kwargs):
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(real(*args, **kwargs))
        return measured[-1]

    monkeypatch.setattr(quantize_module, "perplexity", counted)
    with pytest.raises(KeyboardInterrupt):
        quantize(given, tmp_path / "parts")
    measured.insert(0, None)  # no more stops
    measured.append(None)
    before = len(measured)
    again = quantize(given, tmp_path / "parts")
    assert len(measured) - before == 3  # of eight
    for one, other in zip(again["runs"], whole["runs"], strict=True):
        assert [c["perplexity"] for c in one["cells"]] == [c["perplexity"] for c in other["cells"]]
    # a cell that is new is measured, those that are there are not
    before = len(measured)
    quantize(settings(home, activations=("int4-token", "int8-tensor"), kv_cache=(4, 3)), tmp_path / "parts")
    assert len(measured) - before == 2
    for name in ("mine.json", "quantize-config.json"):
        (tmp_path / "parts" / name).write_text("{}")
    forget(tmp_path / "parts")
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["mine.json", "quantize-config.json"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ("awq",)}, "methods: expected one of hqq, bnb, gptq; got 'awq'"),
        ({"methods": ("bnb",), "bits": (3,)}, "bits: bnb has 4, 8; got 3"),
        ({"methods": ("hqq", "bnb"), "bits": (4, 5)}, "bits: none of hqq, bnb has 5 bits"),
        ({"activations": ("int8",)}, "activations: expected one of int8, int6, int4, fp8 and then -tensor or -token"),
        ({"kv_cache": (1,)}, "kv_cache: expected 2 to 8 bits or fp8, got 1"),
        ({"kv_cache": ("fp4",)}, "kv_cache: expected 2 to 8 bits or fp8, got fp4"),
        ({"kv_cache": (4, 4)}, "kv_cache: expected different ones, got 4, 4"),
        ({}, "methods: expected methods, activations or kv_cache, got none"),
        ({"kv_cache": (4,), "samples": 0}, "samples: expected at least 1, got 0"),
        ({"kv_cache": (4,), "dtype": "half"}, "dtype: expected one of .*; got 'half'"),
        ({"kv_cache": (4,), "bits": (7,)}, "bits: expected none without methods, got 7"),
        ({"kv_cache": (4,), "group_size": 32}, "group_size: expected none without hqq or gptq, got 32"),
        ({"kv_cache": (4,), "tasks": ("arc",)}, "tasks: .*'arc'"),
    ],
)
def test_bad_settings(home, tmp_path, changes, words):
    with pytest.raises(EvaluationError, match=words):
        quantize(settings(home, **changes), tmp_path)


def test_models_that_a_library_cannot_take(home, tmp_path):
    pytest.importorskip("hqq")
    pytest.importorskip("gptqmodel")
    tokenizer = AutoTokenizer.from_pretrained(home / "softpick")
    odd = llama(vocabulary=len(tokenizer), intermediate_size=80)
    for name, model in (
        ("odd", odd),
        (
            "gpt2",
            GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=64, n_positions=64, vocab_size=len(tokenizer))),
        ),
        (
            "bert",
            BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)),
        ),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for name, changes, words in (
        ("odd", {"methods": ("hqq",)}, "group_size: expected a divisor .*mlp.down_proj has 80, got 32"),
        ("odd", {"methods": ("gptq",), "group_size": 16}, "gptq: expects inputs and outputs in multiples of 32"),
        ("odd", {"methods": ("bnb",), "bits": (4,)}, "bnb: 4 bits on the CPU expect outputs in multiples of 32"),
        ("gpt2", {"methods": ("hqq",)}, "hqq: quantizes nn.Linear only"),
    ):
        given = settings(home, model=str(tmp_path / name), against=(), **changes)
        with pytest.raises(QuantizationError, match=words):
            quantize(given, tmp_path / "out")
    with pytest.raises(ModelError, match="is an encoder"):
        quantize(settings(home, model=str(tmp_path / "bert"), against=(), kv_cache=(4,)), tmp_path / "out")
    # Conv1D goes through what is simulated
    report = quantize(
        settings(home, model=str(tmp_path / "gpt2"), against=(), activations=("int4-token",), kv_cache=(4,)),
        tmp_path / "out",
    )
    assert len({cell["perplexity"] for cell in report["runs"][0]["cells"]}) == 3


def test_a_missing_package_is_named(home, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "hqq" else find(name, *more))
    with pytest.raises(ImportError, match=r"method hqq needs hqq: pip install 'softpick\[quantize\]'"):
        quantize(settings(home, methods=("hqq",)), tmp_path)


def test_the_command(home, tmp_path):
    """As a user types it: tables on the screen, files in the folder, and no noise of the libraries."""
    pytest.importorskip("hqq")
    out = tmp_path / "out"
    words = [
        sys.executable, "-m", "softpick.cli", "quantize", home / "softmax", "--against", home / "softpick", "--method", "hqq",
        "--bits", "3,8", "--activations", "fp8-token", "--kv-cache", "none", "--group-size", "32", "--data", home / "text",
        "--samples", "4", "--output", out,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    for text in ("HQQ 3 bits", "W+A fp8, one scale per token", "% of parameters, error", "results.json", "Δ"):
        assert text in done.stdout
    assert not done.stderr.strip()
    names = {p.name for p in out.iterdir()}
    assert {"results.json", "table.md", "weights.png", "activations.png"} <= names
    assert not [name for name in names if name.startswith(("quantize-", "."))]
    report = json.loads((out / "results.json").read_text())
    assert "hqq" in report["meta"]["versions"]
    assert report["meta"]["command"].startswith("softpick quantize")
    (out / "results.json").unlink()  # a table is not overwritten either
    refused = subprocess.run([str(w) for w in words], capture_output=True, text=True, env=environment, timeout=300)
    assert refused.returncode == 2
    assert "table.md is there already; choose another --output" in refused.stderr


@pytest.mark.parametrize(("widths", "group"), [((64, 176), 16), ((576, 1536), 64), ((96, 128), 32), ((14, 64), 2)])
def test_groups_fit_where_no_size_is_given(widths, group):
    config = LlamaConfig(
        vocab_size=20, hidden_size=widths[0], intermediate_size=widths[1], num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=widths[0],
    )  # fmt: skip
    with torch.device("meta"):
        assert fitting_group(LlamaForCausalLM(config)) == group
