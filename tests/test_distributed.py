"""Ring attention on ranks against the oracle over the whole sequence, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from oracle import attention as oracle
from ring_ranks import cases, in_pairs, inputs

from softpick import NORMALIZERS, scaled_dot_product_attention
from softpick.distributed import _Carry, ring_attention, sequence_positions, shard_sequence, unshard_sequence
from softpick.normalizers import get_normalizer
from softpick.ops.blocks import block_backward, block_forward
from softpick.ops.calling import interpreted

HERE = Path(__file__).parent
NAMES = list(NORMALIZERS)
RINGS = [(0, 1, 2, 3), (0, 1), (2, 3)]
PARTS = ("output", "dquery", "dkey", "dvalue", "dsink")


def launch(path, ranks, device):
    command = [sys.executable, str(HERE / "ring_ranks.py"), str(ranks), str(path), device]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(f"{path}.{rank}") for rank in range(ranks)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the four ranks wrote: a ring of four, and two rings of two at once."""
    return launch(tmp_path_factory.mktemp("ring") / "out", 4, "cpu")


def whole(ranks, case, members):
    """Output and gradients of the whole sequence from the parts of a ring's ranks."""
    parts = [ranks[rank][0][f"{len(members)}-{case}"] for rank in members]
    found = []
    for name, *tensors in zip(PARTS, *parts, strict=False):
        if name == "dsink":
            found.append(sum(tensors))
            continue
        # rank r holds the chunks r and 2 R - 1 - r
        early, late = zip(*(x.chunk(2, -2) for x in tensors), strict=True)
        found.append(torch.cat([*early, *late[::-1]], -2))
    return found


def expected(seed, options):
    """Output and gradients over the whole sequence in fp64."""
    q, k, v, grad, sink = (None if x is None else x.double() for x in inputs(seed, options))
    leaves = [x.requires_grad_() for x in (q, k, v, sink) if x is not None]
    keywords = {name: options[name] for name in ("softcap", "scale") if name in options}
    if (
        "eps" in options or options.get("factor", 1.0) < 1.0
    ):  # the oracle has the paper's eps, and e^s - 1 cancels in it
        keywords |= {"is_causal": options["causal"], "enable_gqa": True, "eps": options.get("eps")}
        out = scaled_dot_product_attention(
            q, k, v, normalizer=options["name"], sink=sink, backend="reference", **keywords
        )
    else:
        causal = "top_left" if options["causal"] else None
        out = oracle(q, k, v, options["name"], causal=causal, sink=sink, **keywords)[0]
    return [out, *torch.autograd.grad(out, leaves, grad)]


def errors(found, wanted):
    """Largest difference of each part relative to its largest entry, or to 1: some gradients are zero but for rounding."""
    assert len(found) == len(wanted)
    worst = {}
    for part, x, y in zip(PARTS, found, (y.detach() for y in wanted), strict=False):
        assert x.shape == y.shape
        assert x.isfinite().all(), part
        worst[part] = float((x.detach().double() - y).abs().max() / y.abs().max().clamp(min=1.0))
    return worst


EXACT = {case: options for case, options in cases().items() if options["dtype"] == "float64"}
LOW = {case: options for case, options in cases().items() if options["dtype"] != "float64"}


@pytest.mark.thinned(every=3)
@pytest.mark.slow
@pytest.mark.parametrize("case", EXACT)
def test_rings_are_exact_in_fp64(ranks, case):
    seed = list(cases()).index(case)
    wanted = expected(seed, EXACT[case])
    for members in RINGS if in_pairs(EXACT[case]) else RINGS[:1]:
        worst = errors(whole(ranks, case, members), wanted)
        assert max(worst.values()) < 1e-12, (members, worst)


def check_low_precision(ranks, case, rings, device):
    """No more than a small multiple of what one rank has against fp64."""
    options, seed = LOW[case], list(cases()).index(case)
    wanted = expected(seed, options)
    q, k, v, grad, sink = (None if x is None else x.to(device) for x in inputs(seed, options))
    leaves = [x.requires_grad_() for x in (q, k, v, sink) if x is not None]
    # not torch's kernels, which "auto" would take for softmax
    backend = "tiled" if device == "cpu" else "triton"
    out = scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True, normalizer=options["name"], sink=sink, backend=backend
    )
    budget = errors([x.cpu() for x in (out, *torch.autograd.grad(out, leaves, grad))], wanted)
    floor = 2 * torch.finfo(grad.dtype).eps
    for members in rings:
        worst = errors(whole(ranks, case, members), wanted)
        assert all(worst[part] <= 3 * budget[part] + floor for part in worst), (members, worst, budget)


@pytest.mark.slow
@pytest.mark.parametrize("case", LOW)
def test_rings_in_low_precision(ranks, case):
    check_low_precision(ranks, case, RINGS, "cpu")


@pytest.mark.slow
def test_rings_repeat_compile_and_recompute(ranks):
    assert [trouble for _, trouble in ranks] == [[]] * 4


@pytest.fixture(scope="module")
def gpus(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("gpus") / "out", 2, "cuda")


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("case", LOW)
def test_rings_of_two_gpus(gpus, case):
    """Triton's kernels and NCCL."""
    check_low_precision(gpus, case, RINGS[1:2], "cuda")


# ---------------------------------------------------------------------------------------------------------------------
# In this process: a ring of one


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def qkv(h=4, hkv=4, t=6, d=4, dtype=torch.float64):
    return [torch.randn(2, n, t, d, dtype=dtype).requires_grad_() for n in (h, hkv, hkv)]


@pytest.mark.parametrize("name", NAMES)
def test_one_rank_is_plain_attention(alone, name):
    q, k, v = qkv()
    sink = torch.randn(4, dtype=torch.float64).requires_grad_() if NORMALIZERS[name].needs_sink else None
    leaves = [x for x in (q, k, v, sink) if x is not None]
    results = []
    for function, keywords in ((ring_attention, {}), (scaled_dot_product_attention, {"backend": "reference"})):
        out = function(q, k, v, is_causal=True, normalizer=name, sink=sink, **keywords)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.thinned(every=2)
@pytest.mark.skipif(not interpreted(), reason="runs the GPU kernels in Triton's interpreter")
@pytest.mark.parametrize("name", ["softmax", "softpick", "learned_sink", "linear_softpick"])
def test_parts_of_the_gpu_kernels(name):
    """Two parts of the keys, merged, and their gradients: what a ring does, without ranks."""
    q, k, v = (x.detach() for x in qkv(hkv=2, t=20, d=16, dtype=torch.float32))
    grad = torch.randn_like(q)
    sink = torch.randn(4) if NORMALIZERS[name].needs_sink else None
    norm = get_normalizer(name)
    options = {"backend": "triton", "normalizer": name, "scale": 0.25, "is_causal": False, "softcap": 0.0}
    carry = _Carry(norm, q, v, sink, norm.eps)
    parts = [(k[:, :, keys], v[:, :, keys]) for keys in (slice(0, 7), slice(7, 20))]
    for part in parts:
        carry.add(slice(0, 20), *block_forward(q, *part, sink, eps=carry.part_eps, **options))
    out, lse = carry.finish()
    grads = [block_backward(grad, q, *part, out, lse, **options) for part in parts]

    leaves = [x.requires_grad_() for x in (q, k, v)]
    wanted = scaled_dot_product_attention(*leaves, enable_gqa=True, normalizer=name, sink=sink, backend="reference")
    torch.testing.assert_close(out, wanted, atol=2e-5, rtol=1e-4)
    dq, dk, dv = torch.autograd.grad(wanted, leaves, grad)
    torch.testing.assert_close(grads[0][0] + grads[1][0], dq, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat([grads[0][1], grads[1][1]], 2), dk, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat([grads[0][2], grads[1][2]], 2), dv, atol=1e-4, rtol=1e-4)


def test_leading_dimensions(alone):
    q = torch.randn(3, 2, 2, 6, 4)
    k = torch.randn(1, 2, 2, 6, 4)
    out = ring_attention(q, k, k, is_causal=True)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, k, is_causal=True))
    assert ring_attention(q[0, 0, 0], k[0, 0, 0], k[0, 0, 0]).shape == (6, 4)


def test_operators_say_the_truth_about_themselves(alone):
    q, k, v = qkv(hkv=2)
    sink = torch.randn(4, dtype=torch.float64).requires_grad_()
    group = dist.group.WORLD.group_name
    torch.library.opcheck(
        torch.ops.softpick.ring_forward, (q, k, v, sink, group, "learned_sink", 0.5, 0.0, True, 0.0, "tiled")
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"t": 5}, ValueError, "is_causal: .* an even number of them, .* got 5 queries, 5 keys"),
        ({"backend": "reference"}, ValueError, "backend: expected 'auto', 'tiled' or 'triton' .* got 'reference'"),
        ({"backend": "quick"}, ValueError, "backend: expected one of"),
        ({"normalizer": "soft"}, ValueError, "normalizer: expected one of"),
        ({"normalizer": "learned_sink"}, ValueError, "sink: .* needs one logit a head"),
        ({"sink": torch.zeros(4)}, ValueError, "sink: the normalizer 'softpick' has none"),
        ({"hkv": 2}, ValueError, "key: expected the query's 4 heads"),
        ({"softcap": -1.0}, ValueError, "softcap: expected a number > 0, got -1.0"),
        ({"eps": -1.0}, ValueError, "eps: expected a number >= 0, got -1.0"),
        ({"group": "all"}, TypeError, "group: expected a process group .* got str"),
        ({"dtype": torch.int64}, TypeError, "query: expected a floating-point tensor"),
    ],
)
def test_refusals(alone, change, error, message):
    shape = {name: value for name, value in change.items() if name in ("t", "hkv")}
    tensors = qkv(**shape)
    if "dtype" in change:
        tensors[0] = tensors[0].detach().to(change["dtype"])
    change = {name: value for name, value in change.items() if name not in ("t", "hkv", "dtype")}
    with pytest.raises(error, match=message):
        ring_attention(*tensors, is_causal=True, **change)


def test_lengths_that_cannot_be_divided(alone):
    for call in (lambda: sequence_positions(7), lambda: shard_sequence(torch.zeros(2, 7), 1)):
        with pytest.raises(ValueError, match=r"length: expected a multiple of 2, .* got 7"):
            call()
    with pytest.raises(ValueError, match="length: expected a multiple of 2"):
        unshard_sequence(torch.zeros(3), 0)


def test_without_torch_distributed():
    with pytest.raises(ValueError, match=r"group: expected torch.distributed to be initialized"):
        ring_attention(*qkv(), is_causal=True)
