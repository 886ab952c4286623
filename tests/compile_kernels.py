"""Compiles kernels for a GPU that is not there and prints what each takes, or a case's error.

test_triton_compile.py and matrix.py run it in a process: an architecture (90, gfx942), then cases. A case is
``NORMALIZER,HEAD_DIM,DTYPE,EXTRA``, with one or several of these, joined by ``+``:

    none     causal, as the kernels for every GPU compute it
    hopper   as the kernels for Hopper GPUs compute it
    full     not causal
    bias     an additive mask that gets its gradient, a window and a softcap
    mask     a boolean mask over keys
    window   a window and a softcap
    softcap  a softcap
    packed   packed sequences
    pages    decoding from pages, and with a list of blocks where weights can be 0
    rows     decoding with as many rows (queries times query heads of a key head) as a kernel takes
    stats    row statistics and dropout
    part     keys of a part, as in ring attention
    fp8      decoding from caches in fp8

With ``--launches`` nothing is compiled: the launches of each case are printed, with their compile-time constants.
"""

import json
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from kernel_resources import resources
from without_gpu import compile_only

LAUNCHES = "--launches" in sys.argv
if LAUNCHES:
    sys.argv.remove("--launches")
CAPABILITY = int(sys.argv[1]) if sys.argv[1].isdigit() else sys.argv[1]
SHAPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

compiled = {}


def note(name, kernel):
    before = compiled.get(name, {})  # compiled for several calls: the most that one takes
    compiled[name] = {key: max(value, before.get(key, 0)) for key, value in resources(kernel).items()}


compile_only(CAPABILITY, note)
warnings.filterwarnings("error", ".*could not be built")  # what another kernel takes over counts as failed

from softpick import NORMALIZERS  # noqa: E402
from softpick.ops.backends import DECODE_QUERIES, decode_rows  # noqa: E402
from softpick.ops.fp8 import Scales  # noqa: E402
from softpick.ops.key_bounds import BLOCK_SIZES  # noqa: E402
from softpick.ops.spec import AttentionSpec  # noqa: E402
from softpick.ops.triton import dispatch, launch, launch_decode, launch_rows, tuning  # noqa: E402

table = tuning._HOPPER if CAPABILITY == 90 else tuning._PORTABLE
tuning.multiprocessors = lambda _: 28
tuning.FEWEST_FORWARD, tuning.FEWEST_TILES, tuning.SKIP_FROM = 0, 1, 0
tuning.blocks = lambda kind, d, dtype, device: tuning.row(tuning._SINGLE if dtype == torch.float32 else table, kind, d)


launched = []


def only_note(kernel, grid, *args, **constants):
    launched.append([kernel.fn.__name__, {name: value for name, value in constants.items() if name.isupper()}])


if LAUNCHES:
    for module in (launch, launch_decode, launch_rows):
        module.run = only_note


def build(case):
    name, d, dtype, extra = case.split(",")
    d, dtype, norm, extras = int(d), SHAPES[dtype], NORMALIZERS[name], set(extra.split("+"))
    compiled.clear()
    launched.clear()
    reason = "not asked for"  # what the dispatcher says of windows, masks and packed sequences, but in decoding
    for_hopper = norm.exponential and "hopper" in extras and extras <= {"hopper", "full", "fp8", "softcap"}
    dispatch.hopper_refuses = lambda *_: None if for_hopper else reason
    in_cache = "hopper" in extras and not extras & {"bias", "mask"} and dtype == torch.bfloat16
    dispatch.hopper_refuses_decode = lambda *_: None if in_cache else reason
    q, k, v, out = (torch.empty(1, 4, 256, d, dtype=dtype) for _ in range(4))
    lse, grads = torch.empty(1, 4, 256), [torch.empty_like(q) for _ in range(3)]
    sink = torch.empty(4) if norm.needs_sink else None
    mask = torch.empty(1, 1, 256, 256, dtype=dtype) if "bias" in extras else None
    mask = torch.empty(1, 1, 1, 256, dtype=torch.bool) if "mask" in extras else mask
    bias_grad = torch.empty(1, 4, 256, 256) if "bias" in extras else None
    starts = torch.empty(3, dtype=torch.int32) if "packed" in extras else None
    seed, stats = (
        torch.empty(1, dtype=torch.int64),
        [torch.empty_like(lse) if "stats" in extras else None for _ in range(2)],
    )
    left = 64 if extras & {"bias", "window"} else -1
    softcap = 30.0 if extras & {"bias", "window", "softcap"} else 0.0
    right, dropout = -1 if "full" in extras else 0, 0.1 if "stats" in extras else 0.0
    spec = AttentionSpec(norm, d**-0.5, norm.eps, left, right, "full" not in extras, softcap, dropout)
    packed = starts, starts, seed if dropout else None
    launch.forward(spec, q, k, v, mask, sink, *packed, 128, out, lse, *stats)
    spec = spec._replace(part="part" in extras)
    launch.backward(spec, q, k, v, mask, sink, *packed, 128, 128, out, lse, out, *grads, bias_grad)
    spec = spec._replace(part=False, dropout_p=0.0)
    few = 3 if "bias" in extras else 1
    if "rows" in extras:  # all query heads have one key head
        few = 8 if "hopper" in extras else DECODE_QUERIES
        heads = (32 if "hopper" in extras else decode_rows(q, v)) // few
        q, out = (torch.empty(1, heads, few, d, dtype=dtype) for _ in range(2))
        sink = None if sink is None else torch.empty(heads)
        k, v, lse = k[:, :1], v[:, :1], torch.empty(1, heads, few)
    row = mask if mask is None or mask.shape[2] == 1 else mask[:, :, :few]
    one, written = q[:, :, :few], (out[:, :, :few], lse[:, :, :few])
    for programs in (56, 3, 1):  # keys of a head divided, shared by programs of all heads, and not divided at all
        launch_decode._resident = lambda *_, programs=programs: programs
        launch_decode.decode(spec, one, k, v, row, sink, None, None, *written)
    if extras & {"hopper", "pages"}:
        decode_cache(spec, one, k, v, sink, written)
    if "fp8" in extras:
        decode_fp8(spec, one, d, sink, written)
    if name == "softpick":
        # the last but one is read twice, as its rows do not begin at multiples of 16 bytes; the last is shared by programs
        # that wait for each other
        for n in (100, 1000, 16384, 20001, 20000):
            x, of_rows = torch.empty(8, n, dtype=dtype), torch.empty(8)
            launch_rows.softpick_forward(x, 1e-6, x, of_rows)
            launch_rows.softpick_backward(x, of_rows, x, x.float() if dtype == torch.float16 else x)


def decode_cache(spec, one, k, v, sink, written):
    """Decoding with lengths, from pages, and with a list of blocks of every size."""
    lengths, table = torch.empty(1, dtype=torch.int32), torch.empty(1, 4, dtype=torch.int32)
    launch_decode.decode(spec, one, k, v, None, sink, lengths, None, *written)
    pages = [torch.empty(9, k.shape[1], 64, k.shape[-1], dtype=k.dtype) for _ in range(2)]
    launch_decode.decode(spec, one, *pages, None, sink, lengths, table, *written)
    if spec.norm.sparse:
        blocks = (
            torch.empty(1, k.shape[1], 16, dtype=torch.int32),
            torch.empty(1, k.shape[1], dtype=torch.int32),
            written[1],
        )
        for size in BLOCK_SIZES:
            listed = launch_decode.Listed(*blocks, size)
            launch_decode.decode(spec, one, k, v, None, sink, lengths, None, *written, listed)
            if size <= 64:
                launch_decode.decode(spec, one, *pages, None, sink, lengths, table, *written, listed)


def decode_fp8(spec, one, d, sink, written):
    """Decoding from caches in fp8, with scales of heads and of pages."""
    table = torch.empty(1, 4, dtype=torch.int32)
    for of_pages, programs in ((False, 56), (False, 1), (True, 56), (True, 3)):
        launch_decode._resident = lambda *_, programs=programs: programs
        scales = Scales(torch.empty(9, 4), torch.empty(9, 4), of_pages)
        k, v = (torch.empty(9, 4, 64, d, dtype=torch.float8_e4m3fn) for _ in range(2))
        pages = table if of_pages else None
        k, v = (k, v) if of_pages else (k[:1], v[:1])
        launch_decode.decode(spec, one, k, v, None, sink, None, pages, *written, None, scales)


for case in sys.argv[2:]:
    try:
        build(case)
    except Exception as error:
        print(json.dumps({"case": case, "error": f"{type(error).__name__}: {error}"}), flush=True)
    else:
        print(
            json.dumps({"case": case, "launches": launched} if LAUNCHES else {"case": case, "kernels": compiled}),
            flush=True,
        )
