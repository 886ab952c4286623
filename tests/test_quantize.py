"""``softpick quantize``: rounding against formats written out, the check of a quantized model against quantizers that cheat,
simulated activations and caches against models rounded by hand, and the real libraries."""

import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from test_audit import write_gguf
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
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
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from softpick import quantize as quantize_module
from softpick.evaluation.perplexity import perplexity
from softpick.evaluation.tasks import EvaluationError
from softpick.integrations.transformers import SoftpickLlamaConfig, SoftpickLlamaForCausalLM, normalizer_of
from softpick.loading import ModelError
from softpick.quantization import methods
from softpick.quantization.simulate import FORMATS, quantized_activations, quantized_cache, round_to
from softpick.quantization.verify import QuantizationError, untouched, verify, weight_of
from softpick.quantize import QuantizeSettings, cells, columns, forget, markdown, quantize, summary_rows, weight_rows
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
# Rounding


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_integers(bits):
    x = torch.randn(5, 33, dtype=torch.float64)
    steps = 2 ** (bits - 1) - 1
    largest = x.abs().amax(-1, keepdim=True)
    want = np.round(x.numpy() / (largest.numpy() / steps)) * (largest.numpy() / steps)
    got = round_to(x, FORMATS[f"int{bits}"], largest)
    assert got.dtype == x.dtype
    torch.testing.assert_close(got, torch.from_numpy(want), rtol=1e-6, atol=1e-6)
    assert len(got[0].unique()) <= 2 * steps + 1


def test_float8_is_the_nearest_of_its_numbers():
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = numbers[numbers.isfinite()].unique()
    assert float(numbers.max()) == 448
    x = torch.cat([torch.linspace(-448, 448, 3001), torch.logspace(-4, 2, 500)]).double()
    got = round_to(x, FORMATS["fp8"], torch.tensor(448.0))
    distance = (x[:, None] - numbers).abs().min(1).values
    torch.testing.assert_close((x - got).abs(), distance, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_extremes_and_what_lies_beyond(name):
    assert round_to(torch.zeros(3), FORMATS[name], torch.tensor(0.0)).tolist() == [0, 0, 0]
    clipped = round_to(torch.tensor([2.0, -5.0, 1.0]), FORMATS[name], torch.tensor(1.0))
    torch.testing.assert_close(clipped, torch.tensor([1.0, -1.0, 1.0]))
    for scale in (1e-30, 1e30):
        x = torch.randn(16, dtype=torch.float64) * scale
        assert float((round_to(x, FORMATS[name], x.abs().max()) - x).norm() / x.norm()) < 0.2
    half = torch.randn(8).half()
    assert round_to(half, FORMATS[name], half.abs().max()).dtype == torch.float16


# ---------------------------------------------------------------------------------------------------------------------
# The check


class Other(nn.Linear):
    """Of another type than what it stands for, as a quantized layer is."""


def replaced(model, change, where=("q_proj", "up_proj")):
    """A copy in which some matrices are ``change`` of what they were, in layers of another type."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if name.endswith(where):
            other = Other(module.in_features, module.out_features, bias=False)
            other.weight.data = change(module.weight.data)
            model.get_submodule(name.rpartition(".")[0]).__setattr__(name.rpartition(".")[2], other)
    return model


def nearest(bits, group):
    def change(weight):
        rows = weight.reshape(-1, group)
        low, high = rows.aminmax(dim=1, keepdim=True)
        scale = (high - low) / (2**bits - 1)
        return (((rows - low) / scale).round() * scale + low).reshape(weight.shape)

    return change


@pytest.mark.parametrize("bias", [True, False])
def test_the_weight_of_a_layer(bias, monkeypatch):
    monkeypatch.setattr("softpick.quantization.verify._ROWS", 7 * 12)  # the identity in pieces
    linear, conv = nn.Linear(12, 5, bias=bias), Conv1D(5, 12)
    nn.init.normal_(conv.bias)
    for module, want in ((linear, linear.weight), (conv, conv.weight.T)):
        got = weight_of(module, 12, torch.float32, torch.device("cpu"))
        torch.testing.assert_close(got, want.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_the_weight_of_a_layer_with_a_large_bias(size):
    """In half precision a bias that is added and subtracted again would leave little of a weight."""
    linear = nn.Linear(64, 32).bfloat16()
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.normal_(linear.bias, std=size)
    bias = linear.bias
    assert torch.equal(weight_of(linear, 64, torch.bfloat16, torch.device("cpu")), linear.weight.detach().float())
    assert linear.bias is bias


def test_what_is_no_matrix_of_a_layer_stays():
    model = llama()
    untouched(model, copy.deepcopy(model), [])
    untouched(model, replaced(model, nearest(3, 16)), [f"model.layers.{i}.{n}" for i in range(2) for n in (
        "self_attn.q_proj", "mlp.up_proj")])  # fmt: skip
    for change, words in (
        (lambda m: m.model.norm.weight.data.mul_(2), "model.norm.weight, .*, changed"),
        (lambda m: m.lm_head.weight.data.add_(1e-3), "lm_head.weight, .*, changed"),
        (lambda m: m.model.rotary_emb.to(torch.bfloat16), r"inv_freq, .*torch.float32 before, torch.bfloat16 now"),
        (lambda m: delattr(m.model, "rotary_emb"), "inv_freq, .*, is gone"),
    ):
        other = copy.deepcopy(model)
        change(other)
        with pytest.raises(QuantizationError, match=words):
            untouched(model, other, [])


def test_what_the_check_finds():
    model = llama()
    quantized = replaced(model, nearest(3, 16))
    found = verify(model, quantized, 3, 16)
    names = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")]
    assert [layer.name for layer in found.layers] == names
    before, after = dict(model.named_parameters()), dict(quantized.named_parameters())
    difference = norm = 0.0
    for layer in found.layers:
        w, v = before[f"{layer.name}.weight"].detach().double(), after[f"{layer.name}.weight"].detach().double()
        difference, norm = difference + float((v - w).square().sum()), norm + float(w.square().sum())
        assert layer.error == pytest.approx(float((v - w).norm() / w.norm()), rel=1e-4)
        assert layer.levels == max(len(row.unique()) for row in v.reshape(-1, 16)) == 8
    assert found.error == pytest.approx((difference / norm) ** 0.5, rel=1e-4)
    assert found.share == pytest.approx(2 * (64 * 64 + 64 * 128) / sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize(
    ("change", "bits", "words"),
    [
        (None, 3, "nothing was quantized: no linear layer was replaced"),
        (torch.clone, 3, "nothing was quantized: every weight is what it was"),
        (nearest(4, 16), 3, "different values, more than 3 bits can tell apart"),
        (lambda w: w + 0.01 * torch.randn_like(w), 2, "16 different values, more than 2 bits"),
        (lambda w: -w.sign(), 3, "have nothing to do with the weights"),
        (lambda w: w * float("nan"), 8, "not finite"),
    ],
)
def test_quantizers_that_cheat(change, bits, words):
    model = llama()
    quantized = copy.deepcopy(model) if change is None else replaced(model, change)
    with pytest.raises(QuantizationError, match=words):
        verify(model, quantized, bits, 16)


# ---------------------------------------------------------------------------------------------------------------------
# Activations and caches, simulated


def by_hand(x, largest, steps):
    """Rounding to integers in numpy."""
    scale = np.maximum(largest, 1e-30) / steps
    return (np.clip(np.round(x.float().numpy() / scale), -steps, steps) * scale).astype(np.float32)


class Rounded(nn.Module):
    """A linear layer with int4 weights (a scale an output) and int4 inputs."""

    def __init__(self, linear, largest=None):
        super().__init__()
        weight = linear.weight.detach()
        self.weight = torch.from_numpy(by_hand(weight, weight.abs().amax(1, keepdim=True).numpy(), 7))
        self.largest = largest

    def forward(self, x):
        largest = x.abs().amax(-1, keepdim=True).numpy() if self.largest is None else self.largest
        return torch.from_numpy(by_hand(x, largest, 7)) @ self.weight.T


@pytest.mark.parametrize("granularity", ["tensor", "token"])
@torch.no_grad()
def test_activations_against_layers_rounded_by_hand(granularity):
    model = llama()
    calibration, ids = torch.randint(2, 300, (6, LENGTH)), torch.randint(2, 300, (3, LENGTH))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    largest = {}
    if granularity == "tensor":
        for name, module in layers.items():
            module.register_forward_pre_hook(
                lambda m, x, name=name: largest.update({name: max(largest.get(name, 0.0), float(x[0].abs().max()))})
            )
        model(input_ids=calibration)
        for module in layers.values():
            module._forward_pre_hooks.clear()
    other = copy.deepcopy(model)
    for name, module in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(other.get_submodule(parent), last, Rounded(module, largest.get(name)))
    before = model(input_ids=ids).logits
    with quantized_activations(model, "int4", granularity, calibration.split(4)) as errors:
        got = model(input_ids=ids).logits
        assert errors.relative().keys() == layers.keys()
        assert all(0.01 < error < 1 for error in errors.relative().values())
    # a rounding that falls the other way moves a number by a whole step: nearly all agree
    want = other(input_ids=ids).logits
    assert float((got - want).abs().median()) < 1e-4
    assert float((got - want).norm()) < 0.1 * float((want - before).norm())
    assert torch.equal(model(input_ids=ids).logits, before)  # it is what it was


@torch.no_grad()
def test_a_failure_inside_leaves_the_model_as_it_was():
    model, ids = llama(), torch.randint(2, 300, (2, LENGTH))
    before = model(input_ids=ids).logits

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), quantized_activations(model, "int4", "token", []):
        fail()
    with pytest.raises(KeyboardInterrupt), quantized_cache(model, 2):
        fail()
    assert torch.equal(model(input_ids=ids).logits, before)


@torch.no_grad()
def test_outliers_cost_with_a_scale_a_tensor():
    """One channel a thousand times as large: eight bits for the whole tensor leave nothing for the rest."""
    model, ids = llama(), torch.randint(2, 300, (4, LENGTH))
    model.model.layers[0].input_layernorm.weight.data[5] *= 1000
    for projection in ("q_proj", "k_proj", "v_proj"):
        getattr(model.model.layers[0].self_attn, projection).weight.data[:, 5] /= 1000
    found = {}
    before = model(input_ids=ids).logits
    for granularity in ("tensor", "token"):
        with quantized_activations(model, "int8", granularity, [ids]):
            found[granularity] = float((model(input_ids=ids).logits - before).norm() / before.norm())
    calm = llama()
    with quantized_activations(calm, "int8", "tensor", [ids]):
        found["without"] = float((calm(input_ids=ids).logits - before).norm() / before.norm())
    assert found["tensor"] > 3 * found["without"]


@pytest.mark.parametrize("normalizer", ["softmax", "softpick", "learned_sink"])
@torch.no_grad()
def test_cache_against_an_attention_that_rounds(normalizer):
    model, ids = llama(normalizer), torch.randint(2, 300, (3, LENGTH))
    plain = AttentionInterface()[normalizer]

    def rounding(module, query, key, value, *args, **kwargs):
        def near(x):
            x = x.numpy()
            low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
            return torch.from_numpy(np.round((x - low) / ((high - low) / 7)) * ((high - low) / 7) + low)

        return plain(module, query, near(key), near(value), *args, **kwargs)

    AttentionInterface.register("rounding", rounding)
    AttentionMaskInterface.register("rounding", sdpa_mask)
    before = model(input_ids=ids).logits
    with quantized_cache(model, 3) as errors:
        got = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, before)
    model.config._attn_implementation = "rounding"
    want = model(input_ids=ids).logits
    assert float((got - want).abs().median()) < 1e-4
    assert float((got - want).norm()) < 0.1 * float((want - before).norm())
    layers = [layer.relative() for layer in errors]
    assert len(layers) == 2
    assert all(0.02 < layer[name] < 0.5 for layer in layers for name in ("key", "value", "output"))


@torch.no_grad()
def test_the_error_of_a_cache_halves_with_every_bit():
    model, ids = llama(), torch.randint(2, 300, (3, LENGTH))
    found = []
    for bits in (3, 4, 5, 6):
        with quantized_cache(model, bits) as errors:
            model(input_ids=ids)
        found.append(errors[0].relative()["key"])
    for more, fewer in zip(found[1:], found[:-1], strict=True):
        assert fewer / more == pytest.approx(2, rel=0.25)


def test_a_cache_that_nobody_reads():
    with pytest.raises(QuantizationError, match="no attention was seen in Linear"), quantized_cache(nn.Linear(2, 2), 8):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# The libraries


@pytest.mark.parametrize(
    ("method", "bits", "error"),
    [
        ("hqq", (2, 4), (0.55, 0.12)),
        ("bnb", (4, 8), (0.12, 0.01)),
        pytest.param("gptq", (2, 3), (0.8, 0.4), marks=pytest.mark.slow),
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
            quantize_module.Parts(None, ""),
            quantize_module.Silent(),
        ).sequences[1]
        assert perplexity(model.eval(), held) == pytest.approx(cell["perplexity"], rel=1e-4)
    assert sorted(p.name for p in tmp_path.glob("*.log")) == [f"softpick-{method}-{b}bit.log" for b in bits]
    forget(tmp_path)
    assert not list(tmp_path.glob("quantize-*"))


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
    from softpick.training.data import Corpus, read_corpus, split_documents

    train, held, _ = split_documents(read_corpus(str(home / "text")).documents)
    return Corpus(tuple(train), ""), Corpus(tuple(held), "")


def test_a_library_that_does_nothing_is_found_out(home, tmp_path, monkeypatch):
    pytest.importorskip("hqq")
    from hqq.models.hf.base import AutoHQQHFModel

    monkeypatch.setattr(AutoHQQHFModel, "quantize_model", lambda *args, **kwargs: None)
    monkeypatch.setattr(AutoHQQHFModel, "save_quantized", lambda *args, **kwargs: None)
    with pytest.raises(QuantizationError, match="softmax, HQQ 2 bits: nothing was quantized"):
        quantize(settings(home, methods=("hqq",), bits=(2,)), tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


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
    report = quantize(settings(home, activations=("int4-token",), kv_cache=(8, 2)), tmp_path)
    assert [run["normalizer"] for run in report["runs"]] == ["softmax", "softpick"]
    plan = [(cell.kind, cell.bits) for cell in cells(settings(home, activations=("int4-token",), kv_cache=(8, 2)))]
    assert plan == [("none", 0), ("activations", 4), ("kv_cache", 2), ("kv_cache", 8)]
    assert columns(report) == ["softmax", "softpick", "Δ"]
    rows = summary_rows(report)
    assert [how for _, how, _ in rows] == ["unquantized", "W+A int4, a scale a token", "KV cache int2", "KV cache int8"]
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
        ({"kv_cache": (1,)}, "kv_cache: expected 2 to 8 bits, got 1"),
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
    for text in ("HQQ 3 bits", "W+A fp8, a scale a token", "% of parameters, error", "results.json", "Δ"):
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
