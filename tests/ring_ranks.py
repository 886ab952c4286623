"""Ring attention on ranks, for test_distributed.py: ``python ring_ranks.py 4 OUT cpu``.

Four ranks are a ring of four, and two rings of two at the same time. Rank ``r`` writes its parts of output and gradients of
each case, and a list of what went wrong otherwise, to ``OUT.r``.
"""

import functools
import os
import sys

import torch
import torch._dynamo  # the first call of an operator would import it on every rank
import torch.distributed as dist
from torch.multiprocessing import start_processes
from torch.utils.checkpoint import checkpoint

from softpick import NORMALIZERS
from softpick.distributed import ring_attention, sequence_positions, shard_sequence, unshard_sequence
from softpick.ops import cpu

SHAPES = {
    # chunks of one position, of an odd number, of more than a tile; fewer key heads, one key head, no batch dimension
    "short": {"b": 1, "h": 2, "hkv": 2, "t": 8, "d": 4, "dv": 4},
    "odd": {"b": 2, "h": 4, "hkv": 2, "t": 24, "d": 8, "dv": 5},
    "tiles": {"b": 1, "h": 3, "hkv": 1, "t": 40, "d": 6, "dv": 7},
}


def cases():
    """Name to options."""
    found = {}
    for name in NORMALIZERS:
        for shape in SHAPES:
            found[f"{name}-{shape}"] = {"name": name, "shape": shape, "causal": True}
        found[f"{name}-full"] = {"name": name, "shape": "odd", "causal": False}
        found[f"{name}-large"] = {"name": name, "shape": "odd", "causal": True, "factor": 60.0}
        found[f"{name}-small"] = {"name": name, "shape": "odd", "causal": True, "factor": 1e-6}
        found[f"{name}-negative"] = {"name": name, "shape": "odd", "causal": True, "negative": True}
        found[f"{name}-options"] = {
            "name": name,
            "shape": "odd",
            "causal": True,
            "softcap": 1.5,
            "scale": 0.7,
            "eps": 0.1,
        }
    found["softpick-other-keys"] = {"name": "softpick", "shape": "odd", "causal": False, "tk": 16}
    for options in found.values():
        options["dtype"] = "float64"
    for name in NORMALIZERS:
        for dtype in ("float32", "bfloat16"):
            found[f"{name}-{dtype}"] = {"name": name, "shape": "tiles", "causal": True, "dtype": dtype}
    return found


def in_pairs(options):
    """Whether rings of two run this case as well as the ring of four: those about shapes and dtypes."""
    return not {"factor", "negative", "eps"} & options.keys()


def inputs(seed, options):
    """query, key, value, gradient of the output, sink."""
    s = SHAPES[options["shape"]]
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tk = options.get("tk", s["t"])
    q, k = draw(s["b"], s["h"], s["t"], s["d"]), draw(s["b"], s["hkv"], tk, s["d"])
    v, grad = draw(s["b"], s["hkv"], tk, s["dv"]), draw(s["b"], s["h"], s["t"], s["dv"])
    if options.get("negative"):  # every score below zero but those of the first key
        q, k = q.abs() * 8, -k.abs()
        k[:, :, 0] *= -1
    sink = draw(s["h"]) if NORMALIZERS[options["name"]].needs_sink else None
    dtype = getattr(torch, options["dtype"])
    made = [q * options.get("factor", 1.0), k, v, grad, sink]
    return [None if x is None else x.to(dtype) for x in made]


def run(seed, options, group, device):
    given = [None if x is None else x.to(device) for x in inputs(seed, options)]
    parts = [None if x is None else shard_sequence(x, -2, group=group) for x in given[:4]]
    leaves = [x.requires_grad_() for x in (*parts[:3], given[4]) if x is not None]
    keywords = {name: options[name] for name in ("softcap", "scale", "eps") if name in options}
    call = functools.partial(
        ring_attention,
        group=group,
        is_causal=options["causal"],
        enable_gqa=True,
        normalizer=options["name"],
        **keywords,
    )
    out = call(*leaves[:3], sink=leaves[3] if len(leaves) > 3 else None)
    return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, leaves, parts[3]))]


def extras(group):
    """What is no comparison with an oracle: repeatable, compiled whole, recomputed in the backward pass, autocast."""
    options = {"name": "softpick", "shape": "odd", "causal": True, "dtype": "float32"}
    q, k, v, grad, _ = (None if x is None else shard_sequence(x, -2, group=group) for x in inputs(0, options))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def attend(q, k, v):
        return ring_attention(q * 1.0, k, v, group=group, is_causal=True, enable_gqa=True)

    def both(function):
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    first = both(attend)
    found = {"again": both(attend), "checkpoint": both(functools.partial(checkpoint, attend, use_reentrant=False))}
    if dist.get_world_size(group) == 2:
        found["compiled"] = both(torch.compile(attend, backend="aot_eager", fullgraph=True))
    wrong = [name for name, other in found.items() if not all(map(torch.equal, first, other))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if attend(*leaves).dtype != torch.bfloat16:
            wrong.append("autocast")
    try:
        out = attend(*leaves)
        (dq,) = torch.autograd.grad(out.sum(), leaves[0], create_graph=True)
        dq.sum().backward()
        wrong.append("gradient of the gradient")
    except NotImplementedError:
        pass
    order = torch.arange(SHAPES["odd"]["t"])
    mine = sequence_positions(len(order), group=group)
    if not torch.equal(shard_sequence(order, 0, group=group), mine) or not torch.equal(
        unshard_sequence(mine, 0, group=group), order
    ):
        wrong.append("positions")
    return wrong


def work(rank, world, output, device):
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:  # so that parts cross tiles
        cpu.BLOCK_Q, cpu.BLOCK_K, cpu.TILE_SCORES = 8, 6, 2 * 8 * 6
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{output}.store", rank=rank, world_size=world)
    pairs = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
    rings = {world: dist.group.WORLD, 2: pairs[rank // 2]}
    results, trouble = {}, []
    for size, group in rings.items():
        for seed, (case, settings) in enumerate(cases().items()):
            if size < world and not in_pairs(settings):
                continue
            if device == "cuda" and settings["dtype"] == "float64":
                continue  # Triton's kernels have no fp64
            results[f"{size}-{case}"] = run(seed, settings, group, device)
        if device == "cpu":
            trouble += [f"{size} ranks: {name}" for name in extras(group)]
    torch.save((results, trouble), f"{output}.{rank}")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads sometimes abort when Python ends


if __name__ == "__main__":
    world, output, device = int(sys.argv[1]), os.path.abspath(sys.argv[2]), sys.argv[3]
    # ranks of the CPU are forked: torch is imported once
    method = "spawn" if device == "cuda" else "fork"
    start_processes(work, (world, output, device), nprocs=world, start_method=method)
