"""Random attention calls against the formula in fp64: ``python tests/fuzz_attention.py --calls 5000 --seed 0``.

Every call draws a record (one of the table or switches of one's own), a backend, shapes, strides, a dtype, a pattern of
masks, the size of the scores, and compares output and all gradients, element by element, with ``formula.py`` and the bounds
that stand there. What failed is printed with its seed; ``--only SEED`` repeats one call. Exit status 1 if any failed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import sys

if __name__ == "__main__" and "TRITON_INTERPRET" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import torch
from formula import attention as formula

from softpick import (
    NORMALIZERS,
    Normalizer,
    decode_attention,
    key_bounds,
    scaled_dot_product_attention,
    varlen_attention,
)
from softpick.ops.calling import interpreted

LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
SLACK = 12.0
"""Roundoffs that a result may be off by, in units of its bound: sums of rounded products, two roundings of a weight."""


def records() -> list[Normalizer]:
    """Every combination of switches that can be built, and the table."""
    found = list(NORMALIZERS.values())
    choices = (
        ("exp", "expm1", "linear", "square", "sigmoid"),
        ("none", "positive", "nonnegative"),
        (False, True),
        (0, 1, "sink"),
        (True, False),
        (True, False),
    )
    for base, rectify, absolute, constant, negative, normalized in itertools.product(*choices):
        try:
            record = Normalizer(
                "own",
                base=base,
                rectify=rectify,
                absolute_denominator=absolute,
                constant=constant,
                negative_gradient=negative,
                normalized=normalized,
                eps=0.0 if base == "exp" else 1e-6,
            )
        except ValueError:
            continue
        found.append(record)
    return found


RECORDS = records()


def _laid_out(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values with other strides."""
    if how == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "sliced":
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


class Case:
    """One call: what is drawn, what it should give, and what it gives."""

    def __init__(self, seed: int, triton: bool) -> None:
        self.seed, r = seed, random.Random(seed)
        torch.manual_seed(seed)
        self.record = r.choice(RECORDS[: len(NORMALIZERS)] if r.random() < 0.5 else RECORDS)
        on_gpu = triton and self.record.has_kernels and r.random() < 0.04
        self.backend = "triton" if on_gpu else r.choice(("tiled", "tiled", "tiled", "reference", "auto"))
        # the interpreter has no bf16
        dtypes = ["float32", "float16"] + ([] if on_gpu else ["bfloat16", "float64"])
        self.dtype = r.choice(dtypes)
        self.kind = r.choices(("dense", "packed", "decode"), (8, 1, 1))[0]
        if self.backend == "tiled" and self.kind == "decode":
            self.backend = "reference"
        small = on_gpu or r.random() < 0.6
        lengths = (1, 2, 3, 7, 16, 33) if small else (1, 5, 64, 129, 300, 700)
        self.tq, self.tk = r.choice(lengths), r.choice(lengths)
        if r.random() < 0.5:
            self.tq = self.tk
        self.b, self.hkv, self.groups = r.choice((1, 2)), r.choice((1, 2)), r.choice((1, 1, 2, 3))
        self.d, self.dv = r.choice((1, 4, 16, 33, 64)), r.choice((1, 3, 16, 64))
        level = 10 ** r.uniform(-6, 1.3 if r.random() < 0.8 else 3.5)
        dtype = LOW[self.dtype]
        root = math.sqrt(level / math.sqrt(self.d))
        h = self.hkv * self.groups
        q, k = torch.randn(self.b, h, self.tq, self.d) * root, torch.randn(self.b, self.hkv, self.tk, self.d) * root
        sign = r.choice((0, 0, 0, 1, -1))  # scores of one sign
        if sign:
            q, k = q.abs(), k.abs() * sign
        v, grad = torch.randn(self.b, self.hkv, self.tk, self.dv), torch.randn(self.b, h, self.tq, self.dv)
        layout = r.choice(("contiguous", "transposed", "sliced"))
        self.tensors = [_laid_out(x.to(dtype), layout) for x in (q, k, v)]
        self.grad = grad.to(dtype)
        self.options: dict = {"scale": r.choice((None, 1 / math.sqrt(self.d), 0.5, 1.0))}
        if r.random() < 0.15:
            self.options["softcap"] = r.choice((0.5, 5.0, 30.0))
        if r.random() < 0.15:
            self.options["eps"] = r.choice((0.0, 1e-6, 1e-2))
        self.sink = None
        if self.record.needs_sink:
            self.sink = (torch.randn(h) * 10 ** r.uniform(-2, 2)).to(dtype)
        self._draw_pattern(r, dtype)

    def _draw_pattern(self, r: random.Random, dtype: torch.dtype) -> None:
        self.causal, self.window = r.random() < 0.5, None
        self.alignment = r.choice(("top_left", "bottom_right"))
        if r.random() < 0.2:
            self.window = r.choice((1, 2, 5, (3, 1), (0, -1), (-1, 2)))
        self.mask = None
        if self.kind == "dense" and r.random() < 0.4:
            shape = (r.choice((1, self.b)), r.choice((1, self.tensors[0].shape[1])), r.choice((1, self.tq)), self.tk)
            seen = torch.rand(shape) < r.choice((0.02, 0.3, 0.7, 0.95))
            self.mask = seen
            if r.random() < 0.6:
                low = r.choice(
                    (-math.inf, -1e4, -1e9, -65504.0, torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min)
                )
                mask_dtype = r.choice((dtype, torch.float32))
                bias = torch.randn(shape).double() * r.choice((0.0, 1.0, 5.0))
                self.mask = bias.masked_fill(~seen, low).to(mask_dtype)

    def __str__(self) -> str:
        q, k, v = (tuple(x.shape) for x in self.tensors)
        mask = None if self.mask is None else (str(self.mask.dtype)[6:], tuple(self.mask.shape))
        return (
            f"seed {self.seed}: {self.kind} {self.backend} {self.dtype} {self.record.text} q {q} k {k} v {v} {self.options} "
            f"causal {self.causal} {self.alignment} window {self.window} mask {mask}"
        )

    def _keep(self, tq: int, tk: int, alignment: str) -> torch.Tensor:
        """Which keys causality and window leave, from the definition."""
        offset = tk - tq if alignment == "bottom_right" else 0
        behind = torch.arange(tq)[:, None] + offset - torch.arange(tk)
        keep = torch.ones(tq, tk, dtype=torch.bool)
        if self.window is not None:
            left, right = (self.window - 1,) * 2 if isinstance(self.window, int) else self.window
            keep &= (behind <= left) if left >= 0 else True
            keep &= (behind >= -right) if right >= 0 and not self.causal else True
        return keep & (behind >= 0) if self.causal else keep

    def _truth(self, q, k, v, grad, keep, mask=None):
        bias = None
        if mask is not None:
            if mask.dtype == torch.bool:
                keep = keep & mask
            else:
                keep, bias = keep & (mask.double() > -9983), mask
        unit = 2.0**-53 if self.dtype == "float64" else 2.0**-23 if self.backend != "triton" else 2.0**-21
        return formula(
            q, k, v, grad, self.record, keep=keep, bias=bias, sink=self.sink, unit=unit,
            scale=self.options["scale"] or 1 / math.sqrt(self.d),
            **{name: self.options.get(name) for name in ("softcap", "eps")},
        )  # fmt: skip

    def check(self) -> list[str]:
        """What is wrong; empty if nothing is."""
        leaves = [x.detach().requires_grad_() for x in self.tensors]
        common = {"normalizer": self.record, "backend": self.backend, "is_causal": self.causal, "window": self.window}
        if self.kind == "packed":
            return self._check_packed(leaves, common)
        if self.kind == "decode":
            return self._check_decode(common)
        sink = None if self.sink is None else self.sink.detach().requires_grad_()
        mask = self.mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.detach().requires_grad_()
        out = scaled_dot_product_attention(
            *leaves, mask, enable_gqa=True, causal_alignment=self.alignment, sink=sink, **common, **self.options
        )
        wanted = {"dq": leaves[0], "dk": leaves[1], "dv": leaves[2], "dsink": sink}
        wanted["dbias"] = mask if mask is not None and mask.requires_grad else None
        wanted = {name: leaf for name, leaf in wanted.items() if leaf is not None}
        grads = torch.autograd.grad(out, list(wanted.values()), self.grad, allow_unused=True)
        truth = self._truth(*self.tensors, self.grad, self._keep(self.tq, self.tk, self.alignment), self.mask)
        got = {"out": out, **dict(zip(wanted, grads, strict=True))}
        return self._compare(truth, got)

    def _check_packed(self, leaves, common) -> list[str]:
        n = random.Random(self.seed).choice((1, 2, 3))
        cuts_q, cuts_k = (
            sorted(random.Random(self.seed + i).randint(0, t) for _ in range(n - 1))
            for i, t in enumerate((self.tq, self.tk))
        )
        cu_q, cu_k = [0, *cuts_q, self.tq], [0, *cuts_k, self.tk]
        packed = [x[0].transpose(0, 1) for x in leaves]
        sink = None if self.sink is None else self.sink.detach().requires_grad_()
        out = varlen_attention(
            *packed,
            torch.tensor(cu_q),
            torch.tensor(cu_k),
            causal_alignment=self.alignment,
            sink=sink,
            **common,
            **self.options,
        )
        out = out.transpose(0, 1)[None]
        grads = torch.autograd.grad(out, leaves, self.grad[:1], allow_unused=True)
        wrong = []
        for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
            if q0 == q1:
                continue
            q, g = self.tensors[0][:1, :, q0:q1], self.grad[:1, :, q0:q1]
            k, v = (x[:1, :, k0:k1] for x in self.tensors[1:])
            truth = self._truth(q, k, v, g, self._keep(q1 - q0, k1 - k0, self.alignment))
            got = {"out": out[:, :, q0:q1], "dq": grads[0][:1, :, q0:q1]}
            got |= {"dk": grads[1][:1, :, k0:k1], "dv": grads[2][:1, :, k0:k1]}
            wrong += self._compare(truth, got)
        return wrong

    def _check_decode(self, common) -> list[str]:
        r = random.Random(self.seed)
        lengths = [r.randint(0, self.tk) for _ in range(self.b)]
        q, k, v = self.tensors
        call = {"cache_seqlens": torch.tensor(lengths)}
        if r.random() < 0.5:  # pages of 3, in any order
            pages = -(-self.tk // 3)
            order = torch.randperm(self.b * pages)
            stores = []
            for x in (k, v):
                store = torch.full((self.b * pages, 3, *x.shape[1:2], x.shape[-1]), math.nan, dtype=x.dtype)
                for b in range(self.b):
                    for j in range(lengths[b]):
                        store[order[b * pages + j // 3], j % 3] = x[b, :, j]
                stores.append(store)
            call["block_table"] = order.view(self.b, pages).int()
            k, v = stores
        elif self.record.sparse and r.random() < 0.5:  # leaves out what counts nowhere
            call["key_bounds"] = key_bounds(k.detach(), block_size=16, **call)
        with torch.no_grad():
            out = decode_attention(q, k, v, sink=self.sink, **call, **common, **self.options)
        wrong = []
        for b, n in enumerate(lengths):
            q, k, v = self.tensors[0][b : b + 1], *(x[b : b + 1, :, :n] for x in self.tensors[1:])
            truth = self._truth(q, k, v, self.grad[b : b + 1], self._keep(self.tq, n, "bottom_right"))
            wrong += self._compare(truth, {"out": out[b : b + 1]})
        return wrong

    def _compare(self, truth, got) -> list[str]:
        roundoff = torch.finfo(LOW[self.dtype]).eps / 2
        wrong = []
        for name, x in got.items():
            want = getattr(truth, name)
            value = want.value
            if x is None:
                x = torch.zeros_like(value)
            if x.dtype == torch.float16:
                limit = torch.finfo(x.dtype).max
                if name == "out":  # which overflows as torch's does
                    x, value = (y.clamp(-limit, limit) for y in (x, value))
                value = value.clamp(-limit, limit)  # gradients saturate
            least = max(torch.finfo(x.dtype).smallest_normal, 1e-37 if self.dtype != "float64" else 1e-290)
            budget = SLACK * (roundoff * want.bound + want.rough) + torch.finfo(x.dtype).eps * value.abs() + 4 * least
            off = (x.detach().double() - value).abs()
            bad = ~(off <= budget)
            if bad.any():
                excess = torch.where(bad, off / budget, 0.0)
                at = int(excess.nan_to_num(math.inf).argmax())
                wrong.append(
                    f"{name}: {int(bad.sum())} of {bad.numel()} wrong, at {at} got {x.flatten()[at].item():.6g}, right "
                    f"{value.flatten()[at].item():.6g}, allowed {budget.flatten()[at].item():.2g}"
                )
        return wrong


def fuzz(calls: int, seed: int, triton: bool, seconds: float = math.inf) -> list[str]:
    """Lines about the calls that failed."""
    import time

    end, failed = time.monotonic() + seconds, []
    for at in range(seed, seed + calls):
        if time.monotonic() > end:
            break
        case = Case(at, triton)
        try:
            wrong = case.check()
        except Exception as error:  # whatever a call raises is a failure that has to be reported with its seed
            wrong = [f"{type(error).__name__}: {error}"]
        if wrong:
            failed.append("\n    ".join([str(case), *wrong]))
            print(failed[-1], flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the seed of one call to repeat")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.only is not None:
        args.calls, args.seed = 1, args.only
    failed = fuzz(args.calls, args.seed * (1 if args.only is not None else 1_000_000), interpreted())
    print(f"{len(failed)} of {args.calls} calls failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
