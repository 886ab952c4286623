"""What a trained model lets decoding leave out: the share of value blocks that are read, and the time that this takes.

    python benchmarks/decode_trained.py MODEL --data TEXT --lengths 256,1024 [--samples 4] [--steps 16] [--output rows.jsonl]

The model reads ``--samples`` texts of each length. Then, for each layer, its keys and values are a cache, and the queries of
the last ``--steps`` positions decode, each from the keys up to its own. A block of 16, 32 or 64 values has to be read for
a key head if one of the head's queries gives a weight other than 0 to one of the block's keys. For normalizers with a
rectified numerator, the blocks whose keys ``softpick.key_bounds`` leaves unread are counted as well, at ``max_error`` 0, 0.001
and 0.01, and how far above the largest score a block's bound is. The gate there: no output is farther from that of the formula
in fp64 than the error that is returned. On a GPU the last query of
every text is also timed, all layers one after the other: softpick's decode kernel, and torch's FlashAttention 2 and cuDNN,
which compute softmax attention from the same cache. The gate before: the kernel's output against the formula in fp64. Last,
tokens a second of ``generate`` from each length.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import softpick
import softpick.integrations.transformers as adapter
from softpick.experiment.corpus import get_corpus
from softpick.experiment.environment import chosen_device, hardware, versions
from softpick.experiment.files import write_text
from softpick.experiment.models import Subject, load_subject
from softpick.experiment.progress import Silent

BLOCKS = (16, 32, 64)
ERRORS = (0.0, 1e-3, 1e-2)
TOLERANCE = 2.0**-6  # of the largest output: bf16 keeps 8 bits


class Cache(NamedTuple):
    """What one layer keeps and asks: ``query (B, H, steps, D)`` of the last positions, ``key`` and ``value (B, Hkv, T, D)``."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None
    normalizer: str


@torch.no_grad()
def caches(subject: Subject, tokens: Tensor, steps: int) -> list[Cache]:
    """Of each layer, after the model has read ``(B, T)`` tokens."""
    found: list[Cache] = []

    def around(name: str, function: Any, eager: Any) -> Any:
        def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
            found.append(Cache(query[:, :, -steps:].clone(), key.clone(), value.clone(), options.get("scaling"), name))
            return function(module, query, key, value, mask, **options)

        return attention

    with adapter.intercept_attention(subject.model, around):
        subject.model(tokens, use_cache=False, logits_to_keep=1)
    return found


def weights(cache: Cache) -> Tensor:
    """``(B, H, steps, T)`` in fp32: each query sees the keys up to its own position."""
    return softpick.scaled_dot_product_attention(
        cache.query.float(), cache.key.float(), cache.value.float(), is_causal=True, causal_alignment="bottom_right",
        scale=cache.scale, enable_gqa=True, normalizer=cache.normalizer, backend="reference", return_weights=True,
    ).weights  # fmt: skip


def shares(cache: Cache) -> dict[str, float]:
    """Percent: weights other than 0, and blocks of values that are read, of those with a visible key."""
    used = weights(cache) != 0
    batch, _, steps, length = used.shape
    seen = torch.arange(length - steps + 1, length + 1, device=used.device)  # keys, by query
    result = {"weights": 100 * float((used.sum(-1) / seen).mean())}
    groups = used.view(batch, cache.key.shape[1], -1, steps, length).any(2)
    for size in BLOCKS:
        padded = torch.nn.functional.pad(groups, (0, -length % size))
        read = padded.unflatten(-1, (-1, size)).any(-1).sum(-1)
        result[f"blocks of {size}"] = 100 * float((read / ((seen + size - 1) // size)).mean())
    return result


def bounded(cache: Cache) -> dict[str, float]:
    """Percent of blocks with a visible key whose values, and whose keys at each of ``ERRORS``, the bounds leave unread; and
    :func:`tightness`.
    """
    result: dict[str, float] = {}
    steps = cache.query.shape[2]
    exact = [decode(cache._replace(query=cache.query.double(), key=cache.key.double(), value=cache.value.double()),
                    step=step, backend="reference") for step in range(steps)]  # fmt: skip
    for size in BLOCKS:
        bounds = [
            softpick.key_bounds(cache.key, block_size=size, cache_seqlens=lengths(cache, step)) for step in range(steps)
        ]
        for error in ERRORS:
            counts = torch.zeros(3)
            for step in range(steps):
                found = decode(cache, step=step, key_bounds=bounds[step], max_error=error, return_error=True)
                counts += found.blocks.sum((0, 1)).float().cpu()
                off = (found.output.double() - exact[step]).abs() - found.error[..., None].double() * exact[step].abs()
                if not float(off.max()) <= TOLERANCE * float(exact[step].abs().max()):
                    raise SystemExit(f"decode_attention: an error above the returned one by {float(off.max()):.2e}")
            visible, keys, values = counts.tolist()
            result[f"keys of {size} skipped at {error:g}"] = 100 * (1 - keys / visible)
            if not error:
                result[f"values of {size} skipped"] = 100 * (1 - values / visible)
        result |= {f"{name}, {size}": x for name, x in tightness(cache, size).items()}
    return result


def tightness(cache: Cache, size: int) -> dict[str, float]:
    """Of the last query and the full blocks: bounds by mean and radius (what is stored) and by a box (twice the bytes).

    Percent of pairs of query head and block whose largest score, or its bound, is at most 0; and by how many standard
    deviations of the scores bounds exceed it.
    """
    groups, blocks = cache.query.shape[1] // cache.key.shape[1], cache.key.shape[2] // size
    if not blocks:
        return {}
    query = cache.query[:, :, -1:].float() * (cache.scale or cache.query.shape[-1] ** -0.5)
    key = cache.key[:, :, : blocks * size].float().repeat_interleave(groups, 1).unflatten(2, (blocks, size))
    scores = torch.einsum("bhqd,bhnkd->bhnk", query, key)
    mean, low, high = key.mean(3), key.amin(3), key.amax(3)
    radius = (key - mean[:, :, :, None]).norm(dim=-1).amax(-1)
    by = {
        "score": scores.amax(-1),
        "radius": (query * mean).sum(-1) + query.norm(dim=-1) * radius,
        "box": (torch.maximum(query * low, query * high)).sum(-1),
    }
    spread = scores.std().clamp(min=1e-30)
    found = {f"at most 0 by {name}": 100 * float((x <= 0).float().mean()) for name, x in by.items()}
    over = {name: float(((by[name] - by["score"]) / spread).mean()) for name in ("radius", "box")}
    return found | {f"{name} over score": x for name, x in over.items()}


def check(cache: Cache) -> None:
    """The kernel's output for the last query against the formula in fp64."""
    out = decode(cache)
    wide = cache._replace(query=cache.query.double(), key=cache.key.double(), value=cache.value.double())
    want = decode(wide, backend="reference")
    error = float((out.double() - want).abs().max() / want.abs().max().clamp(min=1e-30))
    if not error <= TOLERANCE:
        raise SystemExit(f"decode_attention: an error of {error:.2e} of the largest output, more than {TOLERANCE:.2e}")


def lengths(cache: Cache, step: int) -> Tensor | None:
    """How many keys the query of a step sees, for each text; None for all."""
    seen = cache.key.shape[2] - cache.query.shape[2] + step + 1
    return None if seen == cache.key.shape[2] else torch.full((len(cache.key),), seen, device=cache.key.device)


def decode(cache: Cache, backend: str = "auto", step: int = -1, **options: Any) -> Any:
    """The output for the query of a step; the last one sees all keys."""
    step %= cache.query.shape[2]
    options["cache_seqlens"] = lengths(cache, step)
    return softpick.decode_attention(
        cache.query[:, :, step : step + 1], cache.key, cache.value, is_causal=True, scale=cache.scale,
        normalizer=cache.normalizer, backend=backend, **options,
    )  # fmt: skip


def times(found: list[Cache]) -> dict[str, float]:
    """Milliseconds of all layers, from replays of CUDA graphs."""
    from peers_gpu import _replay, cudnn, fa2

    calls = {
        "softpick": lambda: [decode(cache) for cache in found],
        "fa2": lambda: [fa2(cache.query[:, :, -1:], cache.key, cache.value) for cache in found],
        "cudnn": lambda: [cudnn(cache.query[:, :, -1:], cache.key, cache.value) for cache in found],
    }
    stream, result = torch.cuda.Stream(), {}
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for name, call in calls.items():
            try:
                result[name] = _replay(call, stream)
            except RuntimeError as error:
                if name == "softpick":
                    raise
                # a peer that does not take the shape
                print(f"{name}: {str(error).splitlines()[0]}")
    return result


@torch.no_grad()
def generated(subject: Subject, tokens: Tensor, new: int = 64) -> float:
    """Tokens a second of ``generate``, the reading of the text left out; NaN if that cannot be told from the noise."""
    least = {1: math.inf, 1 + new: math.inf}
    for count in (1 + new, 1, 1 + new, 1):  # the first two warm up
        begin = time.perf_counter()
        subject.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), min_new_tokens=count, max_new_tokens=count, do_sample=False
        )
        if tokens.is_cuda:
            torch.cuda.synchronize()
        least[count] = min(least[count], time.perf_counter() - begin)
    spent = least[1 + new] - least[1]
    return len(tokens) * new / spent if spent > 0 else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", help="text (default: sources of the Python standard library)")
    parser.add_argument("--lengths", default="256,1024", help="comma-separated tokens (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=4, help="texts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="queries of each text (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, help="JSONL file that gets a row for each layer and length")
    options = parser.parse_args()
    device = chosen_device(options.device)
    dtype = "bfloat16" if device.startswith("cuda") else "float32"
    subject = load_subject(options.model, reporter=Silent(), device=device, dtype=dtype)
    corpus, rows = get_corpus(options.data, characters=20_000_000), []
    about = {"model": options.model, "normalizer": subject.normalizer, "dtype": dtype, "hardware": hardware(device),
             "versions": versions(), "date": time.strftime("%Y-%m-%d")}  # fmt: skip
    for length in map(int, options.lengths.split(",")):
        tokens = subject.sequences(corpus, options.samples, length, beyond=True).to(device)
        found = caches(subject, tokens, options.steps)
        for layer, cache in enumerate(found):
            rows.append({**about, "length": length, "texts": len(tokens), "layer": layer, **shares(cache)})
        kinds = ("weights", *(f"blocks of {size}" for size in BLOCKS))
        mean = {key: sum(row[key] for row in rows[-len(found) :]) / len(found) for key in kinds}
        print(f"{length} tokens, mean of {len(found)} layers, percent read:", {k: round(v, 1) for k, v in mean.items()})
        for row in rows[-len(found) :]:
            print(f"  layer {row['layer']}:", {key: round(row[key], 1) for key in mean})
        if softpick.get_normalizer(found[0].normalizer).sparse:
            print("  with bounds of the keys, percent skipped (mean of layers, largest):")
            for row, cache in zip(rows[-len(found) :], found, strict=True):
                row.update(bounded(cache))
            for key in (key for key in rows[-1] if key not in {*about, *kinds, "length", "texts", "layer"}):
                values = [row[key] for row in rows[-len(found) :]]
                print(f"    {key}: {sum(values) / len(values):.2f}, {max(values):.2f}")
        if device.startswith("cuda"):
            for cache in found:
                check(cache)
            rows.append({**about, "length": length, "texts": len(tokens), "milliseconds": times(found)})
            print("  milliseconds, all layers:", {k: round(v, 4) for k, v in rows[-1]["milliseconds"].items()})
        rows.append({**about, "length": length, "texts": len(tokens), "generate": generated(subject, tokens)})
        print(f"  generate: {rows[-1]['generate']:,.0f} tokens a second", flush=True)
    print(about["versions"], about["date"])
    if options.output is not None:
        write_text(options.output, "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
