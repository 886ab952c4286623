"""A compiled graph that was kept on disk is found again by the graph's text: operators' names and arguments, not the layouts
that their fake kernels give. So a fake kernel whose outputs change needs another schema: an argument more, less or renamed.

``python tests/test_operator_layouts.py`` prints the table anew.
"""

import hashlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import softpick.distributed
import softpick.functional  # noqa: F401  (its operators)
from softpick.ops import operators

# operator: digest of its schema, digest of the layouts of its outputs
PINNED = {
    "attention_backward": ("d593a359bf9c", "5f685ef73b44"),
    "attention_forward": ("225f6927412f", "487fa87afccb"),
    "decode": ("c817f5fa8254", "31564655b36c"),
    "ring_backward": ("90a98fd3af22", "355ff85f25c4"),
    "ring_forward": ("c9189c6c7937", "037f7261e525"),
    "rows_backward": ("4bf270d04f0d", "d88a9449d085"),
    "rows_forward": ("70b00beeeb47", "8836c56973a9"),
}

NUMBERS = {"normalizer": "softpick", "scale": 0.5, "eps": 1e-6}
BOUNDS = {"left": -1, "right": 0, "bottom_right": True, "softcap": 0.0}
LONGEST = {"max_seqlen_q": 5, "max_seqlen_k": 7}
PACKED = {"cu_seqlens_q": None, "cu_seqlens_k": None, "seed": None}


def tensors(dtype):
    """Query, key, value with grouped heads, a key that is a transposed view, other widths for the values."""
    query, key = torch.empty(2, 4, 5, 8, dtype=dtype), torch.empty(2, 7, 2, 8, dtype=dtype).transpose(1, 2)
    return {"query": query, "key": key, "value": torch.empty(2, 2, 7, 6, dtype=dtype)}


def calls(name):
    """Keyword arguments of a few calls of an operator; tensors are fake."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        qkv, rows = tensors(dtype), torch.empty(3, 10, dtype=dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        sink, mask, lse = (
            torch.empty(4, dtype=dtype),
            torch.empty(1, 1, 5, 7, dtype=dtype),
            torch.empty(2, 4, 5, dtype=wide),
        )
        out = torch.empty(2, 4, 5, 6, dtype=dtype)
        ring = {
            ("group_name" if name == "ring_forward" else "group"): "0",
            **NUMBERS,
            "is_causal": True,
            "softcap": 0.0,
            "backend": "tiled",
        }
        for backend in ("tiled", "triton", "auto"):
            options = {**NUMBERS, **BOUNDS, "dropout_p": 0.0, "backend": backend, **LONGEST, **PACKED}
            for stats in (False, True):
                if name == "attention_forward":
                    yield {**qkv, "mask": None, "sink": None, "stats": stats, **options}
            if name == "attention_backward":
                kept = torch.empty((2, 2, 4, 5) if backend == "tiled" else (0,), dtype=wide)
                saved = {"out": out, "lse": lse, "kept": kept, "grad_out": out}
                yield {**qkv, "mask": mask, "sink": sink, "mask_grad": True, **saved, **options}
                yield {**qkv, "mask": mask, "sink": None, "mask_grad": False, **saved, **options}
        if name == "decode":
            yield {
                **qkv,
                "mask": None,
                "sink": None,
                "lengths": None,
                "block_table": None,
                **NUMBERS,
                **BOUNDS,
                "backend": "auto",
            }
        elif name == "rows_forward":
            yield {"x": rows, "eps": 1e-6, "backend": "auto"}
        elif name == "rows_backward":
            yield {"grad": rows, "x": rows, "lse": torch.empty(3), "eps": 1e-6, "backend": "auto"}
        elif name == "ring_forward":
            yield {**qkv, "sink": None, **ring}
        elif name == "ring_backward":
            del ring["eps"]
            for logits in (None, sink):
                rest = torch.empty_like(out) if dtype == torch.bfloat16 else out.new_empty(0)
                yield {**qkv, "grad_out": out, "sink": logits, "out": out, "lse": lse, "rest": rest, **ring}


def layouts(name):
    """Dtypes, shapes and strides of all outputs of these calls."""
    found = []
    with FakeTensorMode():
        for arguments in calls(name):
            outputs = getattr(torch.ops.softpick, name)(**arguments)
            outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
            found.append([f"{x.dtype} {tuple(x.shape)} {x.stride()}" for x in outputs])
    return found


def digest(value):
    return hashlib.sha256(str(value).encode()).hexdigest()[:12]


def names():
    every = (name.split(".")[0] for name in torch._C._dispatch_get_all_op_names())
    return sorted({name.removeprefix("softpick::") for name in every if name.startswith("softpick::")})


def fingerprint(name):
    return digest(getattr(torch.ops.softpick, name).default._schema), digest(layouts(name))


def problem(name, was, now):
    """What is to be done about a fingerprint that is not the one in the table, in a sentence; None if it is."""
    if was == now:
        return None
    if was is not None and was[0] == now[0]:
        return (
            f"softpick::{name}: the layouts that its fake kernel gives have changed and its schema has not. The schema must "
            "change too (add, drop or rename an argument): compiled graphs on disk are found again by the schema, and one of "
            f"an older softpick would be run with these layouts. They are now {layouts(name)}"
        )
    return f"softpick::{name}: a new schema; pin it: {name!r}: {now},"


@pytest.mark.parametrize("name", names())
def test_new_layouts_come_with_a_new_schema(name):
    wrong = problem(name, PINNED.get(name), fingerprint(name))
    assert wrong is None, wrong


def test_every_operator_is_pinned():
    assert names() == sorted(PINNED)


def test_a_changed_layout_is_noticed(monkeypatch):
    """What happened once: the fifth output of the CPU backend became four-dimensional, and the schema stayed."""
    empty = operators._empty_outputs

    def changed(query, value, stats, backend):
        return *empty(query, value, stats, backend)[:4], query.new_empty(0)

    monkeypatch.setattr(operators, "_empty_outputs", changed)
    wrong = problem("attention_forward", PINNED["attention_forward"], fingerprint("attention_forward"))
    assert "schema must change too" in wrong


if __name__ == "__main__":
    for each in names():
        print(f'    "{each}": {fingerprint(each)},'.replace("'", '"'))
