"""Few queries on the GPU's kernels, in Triton's interpreter: no option is lost on the way to the decoding kernel."""

import pytest
import torch

from softpick import scaled_dot_product_attention
from softpick.ops.operators import interpreted

pytestmark = pytest.mark.skipif(not interpreted(), reason="runs the GPU kernels in Triton's interpreter")

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": {"window": (2, 1), "causal_alignment": "bottom_right"},
    "softcap": {"softcap": 0.5},
    "scale": {"scale": 2.0},
    "eps": {"eps": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option(options):
    q, k, v = torch.randn(1, 4, 2, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    want = scaled_dot_product_attention(
        q.double(), k.double(), v.double(), enable_gqa=True, backend="reference", return_stats=True, **options
    )
    out = scaled_dot_product_attention(q, k, v, enable_gqa=True, backend="triton", **options)
    torch.testing.assert_close(out.double(), want.output, rtol=1e-4, atol=1e-5)
    full = scaled_dot_product_attention(q, k, v, enable_gqa=True, backend="triton", return_stats=True, **options)
    for one, other in zip(full[:4], want[:4], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_dropout():
    q, k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16)
    assert (scaled_dot_product_attention(q, k, v, dropout_p=1.0, backend="triton") == 0).all()
    plain = scaled_dot_product_attention(q, k, v, backend="triton")
    assert not torch.allclose(scaled_dot_product_attention(q, k, v, dropout_p=0.5, backend="triton"), plain)
