"""The interpreter runs kernels as Python; this compiles them for GPUs that are not there, with the block sizes of the table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from softpick.ops.triton import tuning

KIBIBYTE = 1024
ROOM = {
    90: 227 * KIBIBYTE,
    89: 99 * KIBIBYTE,
    86: 99 * KIBIBYTE,
}  # shared memory a program may have: Hopper, consumer GPUs
# capability, normalizer, head dim, dtype, extra; CI has one of each kind of kernels
TARGETS = [
    (90, "softpick,64,bfloat16,hopper"),
    (86, "softpick,64,bfloat16,none"),
    *(
        pytest.param(capability, case, marks=pytest.mark.long)
        for capability, case in (
            # one for each way through the kernels: with a constant 0, with a sink, without exponentials
            *((90, f"{name},64,bfloat16,none") for name in ("softpick", "learned_sink", "linear_softpick")),
            (90, "softpick,128,bfloat16,hopper"),
            (90, "learned_sink,64,bfloat16,hopper"),
            *((90, f"softpick,{d},float16,hopper") for d in (64, 128)),
            *((90, f"softpick,{d},bfloat16,hopper+softcap") for d in (64, 128)),
            (90, "softpick,128,bfloat16,bias"),
            (90, "softmax,64,bfloat16,pages"),
            (90, "softpick,128,bfloat16,pages"),  # with a list of blocks, too
            (90, "softpick,128,bfloat16,fp8"),
            *((90, f"{name},128,bfloat16,fp8+hopper") for name in ("softpick", "learned_sink")),
            (89, "softmax,64,float16,fp8"),
            (89, "linear_softpick,80,bfloat16,fp8"),
            (89, "softpick,64,float32,fp8"),
            (90, "softpick,80,float32,none"),
            (86, "softpick,256,bfloat16,none"),
            (86, "softpick,256,float32,none"),
            (86, "softpick,256,float32,rows+mask"),  # as many rows as the decode kernel takes: 128 took 152 KiB
            (86, "softpick,64,float32,rows"),
        )
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "case"), TARGETS)
def test_kernels_compile_and_fit(capability, case, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script), str(capability), case], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = map(json.loads, done.stdout.splitlines())
    assert result["case"] == case
    assert "error" not in result, result
    forward = "forward_queries" if ",128," in case else "forward_narrow"
    for_hopper = {forward, "backward_keys", "backward_queries", "decode_keys"}
    others = {"attention_forward", "attention_backward_keys", "attention_backward_queries", "decode_split"}
    if "float16,hopper" in case and "bf" not in case:
        for_hopper = (for_hopper - {"decode_keys"}) | {"decode_split"}
    wanted = for_hopper if "hopper" in case else others
    assert {"decode_merge", "row_statistics"} | wanted <= set(result["kernels"])
    for name, taken in result["kernels"].items():
        assert taken["cubin"] > 0
        assert taken["shared"] <= ROOM[capability], (case, name, taken)
    if case.startswith("softpick,"):
        size = 4 if "float32" in case else 2
        for kind in ("forward", "backward"):
            assert f"rows_{kind}_long" in result["kernels"]
            taken = result["kernels"].get(f"rows_{kind}_ring")
            assert (taken is not None) == (capability == 90)
            if taken:  # all programs have to run at the same time: each keeps to its share of a multiprocessor
                programs = tuning.HOPPER_ROWS[kind, size].programs
                assert programs * taken["registers"] <= 65536
                assert programs * (taken["shared"] + KIBIBYTE) <= 228 * KIBIBYTE
                assert programs * taken["warps"] <= 64
