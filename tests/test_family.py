"""The three attention functions as one family: the same options, the same defaults, the same results for the same problem."""

import inspect
import typing

import pytest
import torch

from softpick import decode_attention, functional, scaled_dot_product_attention, varlen_attention
from softpick.functional import AttentionOutput

FAMILY = [scaled_dot_product_attention, varlen_attention, decode_attention]
SHARED = ["scale", "enable_gqa", "normalizer", "backend", "window", "softcap", "sink", "eps", "return_stats"]


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", SHARED)
def test_options_have_one_type_and_one_default(name):
    found = [inspect.signature(function).parameters[name] for function in FAMILY]
    hints = [typing.get_type_hints(function)[name] for function in FAMILY]
    assert hints[0] == hints[1] == hints[2]
    if name != "enable_gqa":  # torch's function refuses fewer key heads unless it is told
        assert found[0].default == found[1].default == found[2].default


@pytest.mark.parametrize("function", FAMILY)
def test_every_function_has_overloads(function):
    plain, full = typing.get_overloads(function)
    assert typing.get_type_hints(plain)["return"] is torch.Tensor
    assert typing.get_type_hints(full)["return"] == typing.get_type_hints(function)["return"]
    names = list(inspect.signature(function).parameters)
    for overload in (plain, full):
        assert list(inspect.signature(overload).parameters) == names
        for name, parameter in inspect.signature(overload).parameters.items():
            required = inspect.signature(function).parameters[name].default is inspect.Parameter.empty
            assert (parameter.default is inspect.Parameter.empty) == required, name


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_one_problem_three_ways(backend):
    """Two sequences of one length, grouped heads, the last query at the last key: outputs and statistics are the same."""
    q, k, v = draw(2, 4, 3, 8), draw(2, 2, 5, 8), draw(2, 2, 5, 6)
    options = {"is_causal": True, "window": (2, -1), "softcap": 3.0, "return_stats": True, "backend": backend}
    whole = scaled_dot_product_attention(q, k, v, enable_gqa=True, causal_alignment="bottom_right", **options)
    packed = varlen_attention(
        *(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)),
        torch.tensor([0, 3, 6]),
        torch.tensor([0, 5, 10]),
        **options,
    )
    cached = decode_attention(q, k, v, **options)
    assert type(whole) is type(packed) is type(cached) is AttentionOutput
    torch.testing.assert_close(packed.output.view(2, 3, 4, 6).transpose(1, 2), whole.output)
    torch.testing.assert_close(cached.output, whole.output)
    for name in ("lse", "row_mass", "max_score"):
        want = getattr(whole, name)
        torch.testing.assert_close(getattr(packed, name).view(4, 2, 3).transpose(0, 1), want, msg=name)
        torch.testing.assert_close(getattr(cached, name), want, msg=name)


def test_fewer_key_heads_are_refused_where_they_are_not_wanted():
    q, k = draw(1, 4, 1, 8), draw(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"For grouped-query attention pass enable_gqa=True"):
        scaled_dot_product_attention(q, k, k)
    with pytest.raises(ValueError, match=r"key_cache: expected the query's 4 heads, got 2. For grouped-query"):
        decode_attention(q, k, k, enable_gqa=False)
    pool = draw(3, 4, 2, 8)
    table = torch.tensor([[0, 1]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"key_cache: expected the query's 4 heads, got 2. For grouped-query"):
        decode_attention(q, pool, pool, block_table=table, enable_gqa=False)
    starts = torch.tensor([0, 5])
    with pytest.raises(ValueError, match=r"key: expected the query's 4 heads"):
        varlen_attention(draw(5, 4, 8), draw(5, 2, 8), draw(5, 2, 8), starts, starts, enable_gqa=False)
    k = draw(1, 4, 5, 8)
    torch.testing.assert_close(decode_attention(q, k, k, enable_gqa=False), decode_attention(q, k, k))


def test_what_is_deprecated_works_and_says_so():
    q, k = draw(1, 2, 3, 8), draw(1, 2, 5, 8)
    with pytest.warns(DeprecationWarning, match="return_lse: give return_stats=True"):
        out, lse = decode_attention(q, k, k, is_causal=True, return_lse=True)
    new = decode_attention(q, k, k, is_causal=True, return_stats=True)
    torch.testing.assert_close((out, lse), (new.output, new.lse))
    with pytest.warns(DeprecationWarning, match="is_causal: give is_causal=True for several queries"):
        torch.testing.assert_close(decode_attention(q, k, k), out)


@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_one_query_needs_no_word_about_causality():
    q, k = draw(1, 2, 1, 8), draw(1, 2, 5, 8)
    torch.testing.assert_close(decode_attention(q, k, k), decode_attention(q, k, k, is_causal=False))


def test_the_module_has_what_it_says():
    assert all(callable(getattr(functional, name)) for name in functional.__all__)
