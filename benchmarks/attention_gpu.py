"""GPU attention, side by side with torch's softmax kernels in one run: prefill, decode, rows, a training step.

    python benchmarks/attention_gpu.py [--sections prefill,decode,rows,step] [--output benchmarks/results]

Before anything is timed it must pass its gate in the same process: the relative error against fp64 (a slice of the heads) at
most 1.5 times that of torch's FlashAttention-2 softmax on the same inputs. Times of attention are medians of CUDA
graph replays (else the processor may set them), prefill also of calls from Python; those of rows are of ``do_bench``. Rows of
the result go to ``attention_gpu.csv`` with the GPU, the versions and the date; ``--plot`` draws them.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import functools
import time
from pathlib import Path

import torch
from peers_gpu import PEERS, SHAPES, fa2, replay_times, times

import softpick
from softpick.ops.spec import AttentionSpec
from softpick.ops.triton import launch_decode, tuning

ROWS: list[dict] = []


def record(section: str, shape: str, contestant: str, what: str, value: float, unit: str = "ms") -> None:
    ROWS.append({"section": section, "shape": shape, "contestant": contestant, "what": what, "value": round(value, 5)})
    ROWS[-1]["unit"] = unit


def ours(normalizer: str = "softpick"):
    def call(q, k, v):
        return softpick.scaled_dot_product_attention(
            q, k, v, is_causal=q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1], normalizer=normalizer
        )

    return call


@contextlib.contextmanager
def thresholds(value: int):
    """Sizes from which the kernels for Hopper are taken."""
    names = "FEWEST_SCORES", "FEWEST_FORWARD", "FEWEST_CACHED"
    usual = {name: getattr(tuning, name) for name in names}
    for name in names:
        setattr(tuning, name, value)
    try:
        yield
    finally:
        for name in names:
            setattr(tuning, name, usual[name])


def gate(section: str, shape: str, normalizer: str, q, k, v, grad=None) -> None:
    """Raise unless the error of output and gradients is within the budget, on the first heads of the first sequence, with the
    kernels for Hopper and with the others: the size of the whole decides which of them are timed.

    The first queries get no gradient: with a few keys the rounding of the weights comes back magnified by ``1 / sum |s|``, and
    whether it does is chance (exact arithmetic with rounded weights and outputs: 0.05 to 2 % for some seeds).
    """
    groups = q.shape[1] // k.shape[1]
    t = min(2048, q.shape[2])
    slices = [q[:1, :groups, -t:], k[:1, :1, : max(t, 2048)], v[:1, :1, : max(t, 2048)]]
    inputs = [x.contiguous().detach().requires_grad_(grad is not None) for x in slices]
    exact = [x.detach().double().requires_grad_(grad is not None) for x in inputs]

    def error(call, reference) -> list[float]:
        got, want = [call(*inputs)], [reference(*exact)]
        if grad is not None:
            g = grad[:1, :groups, -t:].clone()
            g[:, :, :16] = 0
            got += torch.autograd.grad(got[0], inputs, g)
            want += torch.autograd.grad(want[0], exact, g.double())
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]

    def reference(name):
        return lambda q, k, v: softpick.scaled_dot_product_attention(
            q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True, normalizer=name, backend="reference"
        )

    both = []
    for value in (0, 2**62):
        with thresholds(value):
            both.append(error(ours(normalizer), reference(normalizer)))
    mine = [max(pair) for pair in zip(*both, strict=True)]
    budget = error(fa2, reference("softmax"))
    for name, a, b in zip(("out", "dq", "dk", "dv"), mine, budget, strict=False):
        record(section, shape, normalizer, f"error {name} over that of FA2 softmax", a / b, "ratio")
    if not all(a <= 1.5 * b for a, b in zip(mine, budget, strict=True)):
        raise SystemExit(f"gate failed for {normalizer} {shape}: {mine} against {budget}")


def prefill() -> None:
    for shape, (b, t, h, hkv, d) in SHAPES.items():
        q, grad = (torch.randn(b, h, t, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        k, v = (torch.randn(b, hkv, t, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        gate("prefill", shape, "softpick", q, k, v, grad)
        line = []
        for name, call in {"softpick": ours(), "softmax, our kernel": _our_softmax, **PEERS}.items():
            forward, backward = replay_times(call, (q, k, v), grad)
            record("prefill", shape, name, "forward", forward)
            record("prefill", shape, name, "backward", backward)
            eager = times(call, q, k, v, grad)
            record("prefill", shape, name, "forward, from Python", eager[0])
            record("prefill", shape, name, "backward, from Python", eager[1])
            line.append(f"{name} {forward:.3f} / {backward:.3f} (from Python {eager[0]:.3f} / {eager[1]:.3f})")
        print(f"prefill {shape}: " + "; ".join(line), flush=True)


def _our_softmax(q, k, v):
    return softpick.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1], normalizer="softmax", backend="triton"
    )


def decode() -> None:
    import triton

    bench = triton.testing.do_bench_cudagraph
    for b, t in ((1, 8192), (1, 32768), (1, 131072), (8, 32768), (64, 8192)):
        shape = f"{b}x{t}"
        q = torch.randn(b, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(b, 8, t, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        keep = torch.rand(b, 8, t // 64, device="cuda") >= 0.75
        empty_q = torch.ones_like(q)
        empty_k = torch.where(keep, 0.5, -0.5).repeat_interleave(64, 2)[..., None].bfloat16() + 0.1 * k
        gate("decode", shape, "softpick", q, k, v)
        found = {}
        with torch.no_grad():
            for name in ("cudnn", "fa2"):
                found[name] = 1e3 * bench(lambda name=name: PEERS[name](q, k, v), rep=40, return_mode="median")
            out, lse = torch.empty_like(q), torch.empty(b, 32, 1, device="cuda")
            norm = softpick.NORMALIZERS["softpick"]
            spec = AttentionSpec(norm, 128**-0.5, norm.eps, right=0, bottom_right=True)
            for inputs, pair in (("dense", (q, k)), ("75 % empty", (empty_q, empty_k))):
                for what, rule in (("all values", lambda *_: False), ("default", launch_decode.skips_values)):
                    usual, launch_decode.skips_values = launch_decode.skips_values, rule
                    call = functools.partial(launch_decode.decode, spec, *pair, v, None, None, None, None, out, lse)
                    found[f"softpick, {what}, {inputs}"] = 1e3 * bench(call, rep=40, return_mode="median")
                    launch_decode.skips_values = usual
        for name, microseconds in found.items():
            record("decode", shape, name, "time", microseconds, "us")
        print(f"decode {shape}: " + "; ".join(f"{name} {value:.1f}" for name, value in found.items()), flush=True)


def rows() -> None:
    import triton

    copy = torch.empty(2**29, dtype=torch.bfloat16, device="cuda").normal_()
    other = torch.empty_like(copy)
    bench = triton.testing.do_bench
    bandwidth = 4 * 2**29 / bench(lambda: other.copy_(copy), return_mode="median") / 1e9
    record("rows", "1 GiB", "copy", "bandwidth", bandwidth, "TB/s")
    print(f"copy {bandwidth:.2f} TB/s")
    for dtype in (torch.bfloat16, torch.float32):
        for n in (128, 1024, 8192, 131072):
            x = torch.randn(2**28 // n, n, device="cuda", dtype=dtype).requires_grad_()
            grad = torch.randn_like(x)
            some = [0, 1, x.shape[0] // 2, x.shape[0] - 1]
            y = softpick.softpick(x)
            (dx,) = torch.autograd.grad(y, x, grad)
            truth = x.detach()[some].double().requires_grad_()
            want = softpick.softpick(truth)
            (want_dx,) = torch.autograd.grad(want, truth, grad[some].double())
            for what, got, true in (("forward", y, want), ("backward", dx, want_dx)):
                error = float((got.detach()[some].double() - true.detach()).norm() / true.detach().norm())
                if not error < (1e-5 if dtype == torch.float32 else 1e-2):
                    raise SystemExit(f"gate failed for rows of {n} {dtype}, {what}: {error}")
            del y, dx
            line = []
            for name, f in (("softpick", softpick.softpick), ("torch.softmax", torch.softmax)):
                out = f(x, -1)
                forward = bench(lambda f=f: f(x.detach(), -1), warmup=5, rep=20, return_mode="median")
                backward = bench(
                    lambda out=out: torch.autograd.grad(out, x, grad, retain_graph=True), 5, 20, return_mode="median"
                )
                moved = x.numel() * x.element_size() / 1e9
                speeds = 2 * moved / forward, 3 * moved / backward
                for what, speed in zip(("forward", "backward"), speeds, strict=True):
                    record("rows", f"{n} {str(dtype).removeprefix('torch.')}", name, what, speed, "TB/s")
                line.append(f"{name} {speeds[0]:.2f} / {speeds[1]:.2f}")
            print(f"rows of {n} {dtype}: " + "; ".join(line), flush=True)


def step() -> None:
    """A training step of a 340M Llama: forward, backward, AdamW; eager, bf16, T 4096."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from softpick.integrations.transformers import register

    register()

    config = LlamaConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16, intermediate_size=2816,
        vocab_size=32000, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    tokens = torch.randint(0, 32000, (4, 4096), device="cuda")
    found: dict[str, list[float]] = {"sdpa": [], "softpick": []}
    models = {}
    for name in found:
        torch.manual_seed(0)
        model = LlamaForCausalLM._from_config(config, attn_implementation=name, dtype=torch.bfloat16).cuda()
        models[name] = model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for repetition in range(9):
        for name, (model, optimizer) in models.items():  # alternating
            torch.cuda.synchronize()
            start = time.perf_counter()
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            if repetition >= 3:
                found[name].append(time.perf_counter() - start)
    medians = {name: 1e3 * sorted(values)[len(values) // 2] for name, values in found.items()}
    for name, value in medians.items():
        record("step", "340M, 4x4096", name, "time", value)
    print(f"step: {medians}, ratio {medians['softpick'] / medians['sdpa']:.3f}")


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(17, 4.6))
    for axis, what in zip(axes, ("forward", "backward"), strict=False):
        part = [r for r in rows if r["section"] == "prefill" and r["what"] == what]
        shapes = list(dict.fromkeys(r["shape"] for r in part))
        names = list(dict.fromkeys(r["contestant"] for r in part))
        for i, name in enumerate(names):
            values = {r["shape"]: float(r["value"]) for r in part if r["contestant"] == name}
            base = {r["shape"]: float(r["value"]) for r in part if r["contestant"] == "flex"}
            axis.bar(
                [x + 0.16 * i for x in range(len(shapes))], [values[s] / base[s] for s in shapes], 0.16, label=name
            )
        axis.set_xticks([x + 0.32 for x in range(len(shapes))], shapes, fontsize=8)
        axis.set_ylabel(f"{what} time / FlexAttention softmax")
        axis.axhline(1, color="gray", linewidth=0.8)
    axes[0].set_ylim(0, 1.7)
    axes[0].legend(fontsize=8)
    part = [r for r in rows if r["section"] == "decode" and r["unit"] == "us"]
    shapes = list(dict.fromkeys(r["shape"] for r in part))
    base = {r["shape"]: float(r["value"]) for r in part if r["contestant"] == "cudnn"}
    for name in dict.fromkeys(r["contestant"] for r in part):
        if name != "fa2" and "all values, 75" not in name:
            values = {r["shape"]: float(r["value"]) for r in part if r["contestant"] == name}
            axes[2].plot(shapes, [values[s] / base[s] for s in shapes], marker="o", label=name)
    axes[2].set_ylabel("decode time / cuDNN softmax")
    axes[2].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


SECTIONS = {"prefill": prefill, "decode": decode, "rows": rows, "step": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--plot", type=Path, help="only draw this CSV, beside it")
    options = parser.parse_args()
    if options.plot:
        with open(options.plot, newline="") as file:
            plot(list(csv.DictReader(file)), options.plot.with_suffix(".png"))
        return
    import triton

    where = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    where["date"] = datetime.date.today().isoformat()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "attention_gpu.csv"
    for name in options.sections.split(","):
        SECTIONS[name]()
        with open(path, "w", newline="") as file:  # after every section: a run that is cut short keeps what it has
            writer = csv.DictWriter(file, [*ROWS[0], *where])
            writer.writeheader()
            writer.writerows({**row, **where} for row in ROWS)


if __name__ == "__main__":
    main()
