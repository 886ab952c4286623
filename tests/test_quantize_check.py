"""Rounding against formats written out, the check of a quantized model against quantizers that cheat, and simulated
activations and caches against models rounded in the test."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from test_quantize import LENGTH, llama
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
)
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from softpick.experiment.rounding import FORMATS, quantized_activations, quantized_cache, round_to
from softpick.integrations.transformers_fp8 import through_fp8
from softpick.quantization.verify import QuantizationError, untouched, verify, weight_of

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
    """A linear layer with int4 weights (one scale per output) and int4 inputs."""

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


@torch.no_grad()
def test_the_error_of_a_cache_in_fp8():
    """Keys as fp8 rounds them, here element by element: a scale a head of 64 positions, four bits of each number."""
    model, ids = llama(), torch.randint(2, 300, (3, LENGTH))
    with quantized_cache(model, "fp8") as errors:
        model(input_ids=ids)
    for layer in errors:
        assert all(0.015 < layer.relative()[name] < 0.04 for name in ("key", "value"))
    x = torch.randn(2, 3, 100, 8)
    got = through_fp8(x)
    for b, h, page in itertools.product(range(2), range(3), (slice(0, 64), slice(64, 100))):
        largest = float(x[b, h, page].abs().max())
        scale = 2.0 ** math.ceil(math.log2(largest / 448))
        assert torch.equal(got[b, h, page], (x[b, h, page] / scale).to(torch.float8_e4m3fn).float() * scale)
    with (
        pytest.raises(ValueError, match="kv_cache: expected 2 to 8 bits or fp8, got fp4"),
        quantized_cache(model, "fp4"),
    ):
        pass


def test_a_cache_that_nobody_reads():
    with pytest.raises(QuantizationError, match="no attention was seen in Linear"), quantized_cache(nn.Linear(2, 2), 8):
        pass
