"""Small differences that a measurement could have: an axis, a sign, a bound, a sample without a token, a file's mode."""

import os
import stat

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from softpick.analysis import calls, measure, metrics, write_report
from softpick.analysis.metrics import MASSIVE_RATIO, Meter
from softpick.evaluation.passkey import _Rows, _Sums
from softpick.experiment.rounding import FORMATS, quantized_activations, quantized_cache, round_to
from softpick.quantization.methods import _inner, _put_back
from softpick.quantization.verify import QuantizationError, linear_layers, untouched, verify, weight_of

# ---------------------------------------------------------------------------------------------------------------------
# Quantization


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def llama(**more):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 60,
        "hidden_size": 16,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=32, bos_token_id=1, **more)).eval()


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("name", FORMATS)
def test_a_scale_belongs_to_an_output(make, name):
    """Of a matrix ``x -> x W^T``, whichever way the layer keeps it: the error is that of each row of W rounded by itself."""
    model = make()
    with torch.no_grad():
        for module in linear_layers(model).values():  # outputs of very different sizes
            outputs = module.nf if isinstance(module, Conv1D) else module.out_features
            sizes = torch.logspace(-2, 2, outputs)
            module.weight.mul_(sizes if isinstance(module, Conv1D) else sizes[:, None])
    before = {n: matrix(m).clone() for n, m in linear_layers(model).items() if n != "lm_head"}
    with quantized_activations(model, name, "token", []):
        for layer, weight in before.items():
            rows = [round_to(row, FORMATS[name], row.abs().max()) for row in weight]
            assert torch.equal(matrix(model.get_submodule(layer)), torch.stack(rows)), layer


def matrix(module):
    """``(out, in)``."""
    return module.weight.detach().T.clone() if isinstance(module, Conv1D) else module.weight.detach().clone()


@pytest.mark.parametrize("make", [gpt2, llama])
def test_the_matrix_of_a_layer_is_out_by_in(make):
    model = make()
    for name, shape in _inner(model).items():
        module = model.get_submodule(name)
        assert shape == tuple(matrix(module).shape)
        found = weight_of(module, shape[1], torch.float32, torch.device("cpu"))
        torch.testing.assert_close(found, matrix(module), atol=1e-6, rtol=1e-5)


def model_of(model):
    from softpick.experiment.models import Subject

    return Subject("m", model, None, True)


class Other(nn.Module):
    """A quantized layer: the weight rounded to 4 bits, one scale per output."""

    def __init__(self, module):
        super().__init__()
        weight = matrix(module)
        self.rounded = nn.Parameter(round_to(weight, FORMATS["int4"], weight.abs().amax(1, keepdim=True)))
        self.bias = module.bias

    def forward(self, x):
        return nn.functional.linear(x, self.rounded, self.bias)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_the_error_of_a_quantized_layer(make):
    model, other = make(), make()
    squares = norms = 0.0
    for name, module in list(linear_layers(other).items()):
        if name == "lm_head":
            continue
        parent, _, last = name.rpartition(".")
        made = Other(module)
        squares += float((made.rounded.detach() - matrix(module)).square().sum())
        norms += float(matrix(module).square().sum())
        setattr(other.get_submodule(parent), last, made)
    found = verify(model, other, 4)
    assert found.error == pytest.approx((squares / norms) ** 0.5, rel=1e-4)
    assert 0.02 < found.error < 0.2


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_constant_keys_and_values(value, bits):
    """Nothing to divide by: a head whose entries are all one number keeps it."""
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.zero_()
        layer.self_attn.v_proj.bias = nn.Parameter(torch.full((16,), value))
        layer.self_attn.k_proj.weight.zero_()
    ids = torch.randint(2, 60, (2, 8))
    before = model(input_ids=ids).logits
    with quantized_cache(model, bits) as errors:
        got = model(input_ids=ids).logits
    assert torch.equal(got, before)
    assert all(layer.relative() == {"key": 0.0, "value": 0.0, "output": 0.0} for layer in errors)
    for fmt in FORMATS.values():
        constant = torch.full((3, 4), value)
        rounded = round_to(constant, fmt, constant.abs().amax(1, keepdim=True))
        torch.testing.assert_close(rounded, constant, atol=0, rtol=1e-6)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.rotary_emb.inv_freq", "lm_head.weight"])
def test_a_tensor_of_another_dtype_is_found(name):
    """Also where every number is what it was."""
    model, other = llama(), llama()
    owner, _, last = name.rpartition(".")
    for each in (model, other):
        tensor = getattr(each.get_submodule(owner), last)
        tensor.data = tensor.data.bfloat16().float()
    module = other.get_submodule(owner)
    tensor = getattr(module, last)
    if isinstance(tensor, nn.Parameter):
        setattr(module, last, nn.Parameter(tensor.data.bfloat16()))
    else:
        module.register_buffer(last, tensor.bfloat16(), persistent=False)
    assert torch.equal(getattr(module, last).float(), getattr(model.get_submodule(owner), last))
    untouched(model, model, [])
    with pytest.raises(QuantizationError, match=r"float32 before, torch\.bfloat16 now"):
        untouched(model, other, [])
    _put_back(model, other)
    untouched(model, other, [])


# ---------------------------------------------------------------------------------------------------------------------
# Passkey


def test_signed_weights_on_a_key():
    """Weight and mass are sums with signs; the share is of magnitudes."""
    sums = _Sums()
    keys = torch.tensor([[False, True, True, False]])
    row = torch.tensor([[[0.5, -0.25, 0.125, -0.125]]])
    _Rows(keys, [1], sums)(0, row)
    found = sums.means()["answer"]
    assert found["key_weight"] == [[-0.125]]
    assert found["key_share"] == [[0.375]]
    assert found["mass"] == [[0.25]]
    assert found["largest"] == [[0.5]]


# ---------------------------------------------------------------------------------------------------------------------
# Metrics and capture


@pytest.mark.parametrize(("factor", "count"), [(1.0, 1), (1 - 2**-20, 0), (1 + 2**-20, 1)])
def test_exactly_a_thousand_times_the_median(factor, count):
    x = torch.full((1, 10, 4), 0.125)  # 125 is a float exactly
    x[0, 3, 2] = MASSIVE_RATIO * 0.125 * factor
    meter = Meter()
    meter.begin_batch(torch.ones(1, 10, dtype=torch.bool))
    meter.attention(0, torch.eye(10)[None, None], torch.ones(1, 10, 1, 2))
    meter.hidden(0, x)
    assert meter.result().hidden["massive"]["count"] == count


@pytest.mark.parametrize("empty", [(), (0,), (1,), (0, 2), (2,)])
@pytest.mark.parametrize("apart", [False, True])
def test_samples_that_are_all_padding_are_none(empty, apart):
    """Wherever they stand in the batch, and also where samples are fed one after the other."""
    torch.manual_seed(0)
    t, real = 20, 2
    a = torch.rand(real, 2, t, t).tril()
    strongest = [2, 4]  # of the five keys that enough queries see
    for sample, key in enumerate(strongest):
        a[sample, :, key:, key] += 9
    o, ids = torch.randn(real, t, 2, 3), torch.arange(real * t).view(real, t)
    x = torch.randn(real, t, 4)
    x[1, 6, 1] = 5000.0

    def fed(empty):
        places = [i for i in range(real + len(empty)) if i not in empty]
        valid = torch.zeros(real + len(empty), t, dtype=torch.bool)
        valid[places] = True

        def padded(y):
            whole = torch.full((len(valid), *y.shape[1:]), 9, dtype=y.dtype)
            whole[places] = y
            return whole

        meter = Meter()
        meter.begin_batch(valid, padded(ids))
        for first in range(len(valid)) if apart else (0,):
            part = slice(first, first + 1 if apart else None)
            meter.attention(0, padded(a)[part], padded(o)[part], first_sample=first, heads=2)
        meter.hidden(0, padded(x))
        return meter.result().to_dict()

    found = fed(empty)
    assert found == fed(())
    assert found["sink"]["strongest"]["positions"] == strongest
    assert found["hidden"]["massive"]["list"][0]["sample"] == 1


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("pieces", [False, True])
def test_a_row_of_padding_in_a_model(place, pieces, monkeypatch):
    model = llama()
    ids = torch.randint(3, 60, (2, 20))
    ids[:, 0] = 1
    if pieces:
        monkeypatch.setattr(calls, "MAX_ENTRIES", 400)
        monkeypatch.setattr(metrics, "MAX_ENTRIES", 400)
    want = measure(model, [{"input_ids": ids}], bos_policy="bos").to_dict()
    rows = [*ids[:place], torch.full((20,), 5), *ids[place:]]
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[place] = 0
    batch = {"input_ids": torch.stack(rows), "attention_mask": mask}
    found = measure(model, [batch], bos_policy="bos").to_dict()
    assert found["data"] == want["data"]
    assert found["sink"]["strongest"]["positions"] == want["sink"]["strongest"]["positions"]
    assert found["rows"]["mass"] == pytest.approx(want["rows"]["mass"], rel=1e-5)
    assert found["hidden"]["kurtosis"] == pytest.approx(want["hidden"]["kurtosis"], rel=1e-4)
    ids[1, 0] = 7
    with pytest.raises(ValueError, match="one starts with 7"):
        measure(
            model, [batch | {"input_ids": torch.stack([*ids[:place], rows[place], *ids[place:]])}], bos_policy="bos"
        )


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_a_report_is_read_by_those_whom_the_umask_lets(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_report(
            tmp_path / "report.html", {"title": "t", "meta": {}, "notes": [], "runs": [{"normalizer": "softmax"}]}
        )
        assert os.umask(umask) == umask  # it was put back
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "report.html").stat().st_mode) == 0o666 & ~umask
