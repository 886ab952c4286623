"""Import of checkpoints in the layout of flash-linear-attention, which the authors of softpick published.

Their models are that library's ``TransformerForCausalLM`` (model type ``transformer``) with one more field of the
configuration, ``attn_impl``. The layout differs from ``LlamaForCausalLM`` in names alone; the result of an import is a
``softpick_llama`` checkpoint with the same logits. Written from the published sources of the library and of the authors'
fork; the authors' checkpoints themselves were not at hand where this was written.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["ATTENTION", "LayoutError", "import_checkpoint"]

ATTENTION = {
    "flash_attn": "softmax",
    "parallel_attn": "softmax",
    "naive_attn": "softmax",
    "parallel_softpick_attn": "softpick",
    "naive_softpick_attn": "softpick",
    "parallel_rectified_attn": "rectified",
    "naive_rectified_attn": "rectified",
}
"""The field ``attn_impl`` to a name of ``softpick.NORMALIZERS``."""

_NAMES = (
    (r"^model\.embeddings\.", "model.embed_tokens."),
    (r"^(model\.layers\.\d+)\.attn_norm\.", r"\1.input_layernorm."),
    (r"^(model\.layers\.\d+)\.mlp_norm\.", r"\1.post_attention_layernorm."),
    (r"^(model\.layers\.\d+)\.attn\.", r"\1.self_attn."),
)
_NO_WEIGHTS = re.compile(r"\.rotary\.|\.rotary_emb\.")  # tables that the model computes by itself


class LayoutError(ValueError):
    """A checkpoint that is not in this layout, or has a part that we do not compute; the message names it."""


def import_checkpoint(source: str | Path, output: str | Path) -> dict[str, Any]:
    """Write a flash-linear-attention checkpoint as a ``softpick_llama`` checkpoint.

    Args:
        source: folder with ``config.json`` and the weights (safetensors or PyTorch's files); its tokenizer is copied.
        output: folder that does not exist yet, or is empty.

    Returns:
        ``normalizer``, ``parameters`` and ``tensors`` of what was written.

    Raises:
        LayoutError: another model type, an attention of the authors' fork that the table of normalizers lacks, a missing or
            unknown weight, or a folder in use.
    """
    from softpick.integrations.softpick_llama import SoftpickLlamaForCausalLM

    source, output = Path(source), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise LayoutError(f"output: expected a new or empty folder, got {output}")
    try:
        config, affine = _configuration(source)
        with torch.device("meta"):
            model = SoftpickLlamaForCausalLM(config)
    except LayoutError:
        raise
    except Exception as error:  # transformers' classes check values, each in its own way
        raise LayoutError(f"{source / 'config.json'}: not the sizes of a model ({_line(error)})") from error
    wanted = dict(model.state_dict())
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
    found = {_renamed(name): tensor for name, tensor in _tensors(source) if not _NO_WEIGHTS.search(name)}
    if config.tie_word_embeddings and "lm_head.weight" in found:  # PyTorch's files have a tied weight under both names
        head = found.pop("lm_head.weight")
        if not torch.equal(head, found.get("model.embed_tokens.weight", torch.empty(0))):
            raise LayoutError(f"{source}: lm_head.weight: expected the embeddings (tie_word_embeddings), got others")
    _add_what_the_layout_lacks(found, wanted, affine)
    _check(found, wanted, source)
    dtypes = {tensor.dtype for tensor in found.values()}
    if config.tie_word_embeddings:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    model.load_state_dict(found, assign=True)
    model.config.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        temporary = Path(folder) / "model"  # in a folder whose name nobody else has
        model.save_pretrained(temporary)
        for file in source.iterdir():
            if file.name.startswith(
                ("tokenizer", "special_tokens", "vocab", "merges", "added_tokens", "chat_template")
            ):
                shutil.copy2(file, temporary / file.name)
        if output.exists():
            output.rmdir()
        temporary.replace(output)
    return {
        "normalizer": config.normalizer,
        "parameters": sum(tensor.numel() for tensor in wanted.values()),
        "tensors": len(wanted),
    }


def _configuration(source: Path) -> tuple[Any, bool]:
    """Our configuration of the model, and whether its norms have weights."""
    from softpick.integrations.softpick_llama import SoftpickLlamaConfig

    file = source / "config.json"
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LayoutError(f"{file}: expected the configuration of a checkpoint ({error})") from None
    if not isinstance(given, dict):
        raise LayoutError(f"{file}: expected an object, got {type(given).__name__}")
    if given.get("model_type") != "transformer":
        raise LayoutError(
            f"{file}: expected model_type 'transformer' (flash-linear-attention), got {given.get('model_type')!r}"
        )
    attention = given.get("attn_impl", "flash_attn")
    if not isinstance(attention, str) or attention not in ATTENTION:
        scaled = " (the authors' scale is log(position + 2), ours the log of the visible keys)" * (
            "scaled" in str(attention)
        )
        raise LayoutError(f"{file}: expected attn_impl to be one of {', '.join(ATTENTION)}; got {attention!r}{scaled}")
    unlike = {
        "qk_norm": False,
        "window_size": None,
        "hidden_act": "swish",
        "rope_scaling": None,
        "attnres_block_size": None,
    }
    for name, plain in unlike.items():
        value = given.get(name)
        value = plain if value is None else value
        if value not in (plain, "silu" if name == "hidden_act" else plain):
            raise LayoutError(f"{file}: {name}={value!r} is not supported, only {plain!r}")
    width = given.get("hidden_size", 2048)
    inner = given.get("intermediate_size")
    if inner is None:  # two thirds of the ratio, rounded up to a multiple of 256
        inner = -(-int(width * (given.get("hidden_ratio") or 4) * 2 / 3) // 256) * 256
    heads = given.get("num_heads", 32)
    config = SoftpickLlamaConfig(
        normalizer=ATTENTION[attention],
        vocab_size=given.get("vocab_size", 32000),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=given.get("num_hidden_layers", 24),
        num_attention_heads=heads,
        num_key_value_heads=given.get("num_kv_heads") or heads,
        attention_bias=bool(given.get("qkv_bias", False)),
        max_position_embeddings=given.get("max_position_embeddings") or 2048,
        rms_norm_eps=given.get("norm_eps", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": given.get("rope_theta") or 10000.0},
        initializer_range=given.get("initializer_range", 0.006),
        tie_word_embeddings=bool(given.get("tie_word_embeddings", False)),
        bos_token_id=given.get("bos_token_id", 1),
        eos_token_id=given.get("eos_token_id", 2),
        pad_token_id=given.get("pad_token_id"),
    )
    return config, bool(given.get("elementwise_affine", True))


def _tensors(source: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors.torch import load_file

    files = sorted(source.glob("*.safetensors")) or sorted(source.glob("pytorch_model*.bin"))
    if not files:
        raise LayoutError(f"{source}: expected *.safetensors or pytorch_model*.bin, found neither")
    for file in files:
        try:
            if file.suffix == ".safetensors":
                tensors = load_file(file)
            else:
                tensors = torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # of either library, whatever is wrong with the file
            raise LayoutError(f"{file}: cannot be read ({_line(error)})") from error
        yield from tensors.items()


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _renamed(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _add_what_the_layout_lacks(found: dict[str, Tensor], wanted: dict[str, Tensor], affine: bool) -> None:
    """Norms without a weight (``elementwise_affine`` is false) are norms of weight 1; the output projection has no bias."""
    like = next(iter(found.values()), torch.empty(0))
    for name, tensor in wanted.items():
        if name in found:
            continue
        if name.endswith("norm.weight") and not affine:
            found[name] = torch.ones(tensor.shape, dtype=like.dtype)
        elif name.endswith("o_proj.bias"):
            found[name] = torch.zeros(tensor.shape, dtype=like.dtype)


def _check(found: dict[str, Tensor], wanted: dict[str, Tensor], source: Path) -> None:
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unknown:
        raise LayoutError(
            f"{source}: expected the weights of its configuration; missing: {', '.join(missing[:5]) or 'none'}; "
            f"unknown: {', '.join(unknown[:5]) or 'none'}"
        )
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            raise LayoutError(f"{source}: {name}: expected {tuple(tensor.shape)}, got {tuple(found[name].shape)}")
