"""What the models of both versions of torchtitan share: sizes, flavors, refusals, conversion of weights, data sets.

Nothing of torchtitan is imported here. ``softpick.integrations.torchtitan`` is what users import.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from softpick.distributed import ring_attention
from softpick.functional import scaled_dot_product_attention
from softpick.normalizers import NORMALIZERS, get_normalizer

__all__ = [
    "DATA",
    "EXTRAS",
    "NAME",
    "SIZES",
    "Flavors",
    "ModelArguments",
    "attend",
    "from_transformers",
    "main",
    "refuse_parallelism",
    "saved_operators",
    "to_transformers",
]

NAME = "softpick_llama"
"""The name of the model."""

EXTRAS = ("sinks", "score_scale", "output_gate.weight")
"""Parameters of an attention layer that torchtitan's Llama does not have, by their names in both versions and transformers."""


# ---------------------------------------------------------------------------------------------------------------------
# What is trained


@dataclass
class ModelArguments:
    """What a model is: the fields of torchtitan 0.2's arguments of a Llama, and those of ``SoftpickLlamaConfig``.

    Attributes:
        dim: width of the hidden states.
        n_layers: number of blocks.
        n_heads: query heads.
        n_kv_heads: key heads; as many as query heads if None.
        vocab_size: tokens.
        multiple_of: two thirds of ``4 dim``, times ``ffn_dim_multiplier``, are rounded up to a multiple of it: the width of
            the MLP.
        ffn_dim_multiplier: 1 if None.
        norm_eps: of RMSNorm. transformers' default, as in the recipes.
        rope_theta: base of the rotary frequencies, which are not scaled.
        max_seq_len: length of a sequence. A run's ``training.seq_len`` takes its place.
        normalizer: a name of ``softpick.NORMALIZERS``. ``learned_sink`` adds one logit a head, which starts at 0.
        output_gate: multiply each head's output by ``sigmoid(x W_g)`` before the output projection.
        score_scale: multiply scores by ``s_h log n``, ``n`` the keys a query may see; ``s_h`` starts so that the factor is 1
            on average over the rows of a sequence.

    Raises:
        ValueError: for an unknown normalizer, or heads that do not divide.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    vocab_size: int = 32000
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-6
    rope_theta: float = 10000
    max_seq_len: int = 4096
    normalizer: str = "softpick"
    output_gate: bool = False
    score_scale: bool = False

    def __post_init__(self) -> None:
        get_normalizer(self.normalizer)
        if self.dim % self.n_heads or self.n_heads % (self.n_kv_heads or self.n_heads):
            raise ValueError(
                f"n_heads: expected a divisor of dim {self.dim} and a multiple of n_kv_heads {self.n_kv_heads}, "
                f"got {self.n_heads}"
            )

    def build(self) -> Any:
        """A model of torchtitan with these arguments, its weights not drawn yet."""
        raise NotImplementedError

    def adapter(self) -> Any:
        """What changes names and layouts of its weights to those of transformers and back."""
        raise NotImplementedError


SIZES: dict[str, dict[str, Any]] = {
    # as the recipe tiny_cpu: shows that everything works
    "tiny": {"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 512, "multiple_of": 192, "max_seq_len": 64},
    # the paper's table 4: MLP 2816 and 5632, untied
    "340M": {"dim": 1024, "n_layers": 24, "n_heads": 16},
    "1.8B": {"dim": 2048, "n_layers": 32, "n_heads": 32},
}


class Flavors(Mapping[str, Any]):
    """The arguments of a flavor by its name, made anew each time: torchtitan writes the sequence length into them.

    Args:
        sizes: arguments by the name of a size; sizes may be added later.
        option: torchtitan's option that takes a flavor, for errors.
    """

    def __init__(self, sizes: Mapping[str, Any], option: str) -> None:
        self.sizes, self.option = sizes, option

    def __getitem__(self, flavor: str) -> Any:
        name, _, rest = flavor.partition("-")
        normalizer, *extras = rest.split("+") if rest else ["softpick"]
        if name not in self.sizes or normalizer not in NORMALIZERS or not {"output_gate", "score_scale"} >= set(extras):
            raise ValueError(
                f"{self.option}: expected SIZE-NORMALIZER, after it +output_gate or +score_scale if wanted; SIZE one of "
                f"{', '.join(self.sizes)}, NORMALIZER one of {', '.join(NORMALIZERS)}; got {flavor!r}"
            )
        return replace(self.sizes[name], normalizer=normalizer, **dict.fromkeys(extras, True))

    def __iter__(self) -> Iterator[str]:
        return (f"{size}-{normalizer}" for size in self.sizes for normalizer in NORMALIZERS)

    def __len__(self) -> int:
        return len(self.sizes) * len(NORMALIZERS)


def refuse_parallelism(
    parallelism: Any, sequence_length: int, heads: tuple[int, int], pipeline: str | None, rotates: bool
) -> None:
    """Refuse what neither version serves.

    Args:
        parallelism: torchtitan's section of its configuration.
        sequence_length: of the run.
        heads: query heads and key heads.
        pipeline: why there are no pipelines, or None where there are.
        rotates: whether this version has a rotate method of context parallelism.

    Raises:
        ValueError: for degrees and options that are not served.
    """
    if pipeline is not None and parallelism.pipeline_parallel_degree > 1:
        raise ValueError(
            f"parallelism.pipeline_parallel_degree: expected 1, because {pipeline}; got "
            f"{parallelism.pipeline_parallel_degree}. Use FSDP, tensor and context parallelism"
        )
    if parallelism.expert_parallel_degree > 1:
        raise ValueError(
            "parallelism.expert_parallel_degree: expected 1, this model has no experts; got "
            f"{parallelism.expert_parallel_degree}"
        )
    tensor, context = parallelism.tensor_parallel_degree, parallelism.context_parallel_degree
    if context > 1:
        if parallelism.context_parallel_load_balancer != "headtail":
            raise ValueError(
                "parallelism.context_parallel_load_balancer: expected 'headtail', the chunks of "
                f"softpick.distributed.shard_sequence; got {parallelism.context_parallel_load_balancer!r}"
            )
        if rotates and parallelism.context_parallel_rotate_method != "allgather":
            raise ValueError(
                "parallelism.context_parallel_rotate_method: expected the default 'allgather', which means nothing "
                f"here: keys travel around a ring; got {parallelism.context_parallel_rotate_method!r}"
            )
    if sequence_length % (2 * tensor * context):
        raise ValueError(
            f"training.seq_len: expected a multiple of {2 * tensor * context} (2 x tensor x context parallel degree), "
            f"got {sequence_length}"
        )
    if heads[0] % tensor or heads[1] % tensor:
        raise ValueError(
            f"parallelism.tensor_parallel_degree: expected a divisor of the {heads[0]} heads and {heads[1]} key heads, got "
            f"{tensor}"
        )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    normalizer: str,
    *,
    sink: Tensor | None,
    score_scale: Tensor | None,
    positions: Tensor | None,
    group: torch.distributed.ProcessGroup | None,
) -> Tensor:
    """Causal attention of this rank's heads, after the rotary embeddings.

    Args:
        query: ``(B, H, T, D)``, as the result.
        key: ``(B, H_k, T, D)``.
        value: as ``key``.
        normalizer: a name of ``softpick.NORMALIZERS``.
        sink: ``(H,)``, for a normalizer that needs one.
        score_scale: ``(H,)``; multiplies scores by ``score_scale log n``.
        positions: of the queries in the sequence, ``(1 or B, T)``; 0 to T - 1 if None.
        group: the ranks that share the sequence, if any do.
    """
    if score_scale is not None:
        at = torch.arange(query.shape[2], device=query.device)[None] if positions is None else positions
        logs = torch.log(at + 1.0)[:, None, :, None]
        query = (query * (score_scale.view(-1, 1, 1) * logs)).to(query.dtype)
    options: dict[str, Any] = {
        "is_causal": True,
        "enable_gqa": query.shape[1] != key.shape[1],
        "normalizer": normalizer,
        "sink": sink,
    }
    if group is None:
        return scaled_dot_product_attention(query, key, value, **options)
    return ring_attention(query, key, value, group=group, **options)


def saved_operators() -> set[Any]:
    """The operators of attention, whose outputs selective activation checkpointing keeps."""
    return {torch.ops.softpick.attention_forward.default, torch.ops.softpick.ring_forward.default}


# ---------------------------------------------------------------------------------------------------------------------
# Weights to and from transformers


def to_transformers(model_args: ModelArguments, state_dict: Mapping[str, Tensor], **config: Any) -> Any:
    """The transformers model of the same weights.

    Args:
        model_args: of the model in torchtitan.
        state_dict: its whole (not sharded) state, without buffers.
        config: further fields of ``SoftpickLlamaConfig``, such as ``bos_token_id``.

    Returns:
        A ``SoftpickLlamaForCausalLM`` on the device and in the dtype of the weights, with the same logits.

    Raises:
        RuntimeError: for weights missing or in excess.
        ImportError: without transformers.
    """
    from softpick.integrations.transformers import SoftpickLlamaConfig, SoftpickLlamaForCausalLM

    fields: dict[str, Any] = {
        "vocab_size": model_args.vocab_size,
        "hidden_size": model_args.dim,
        "intermediate_size": state_dict["layers.0.feed_forward.w1.weight"].shape[0],
        "num_hidden_layers": model_args.n_layers,
        "num_attention_heads": model_args.n_heads,
        "num_key_value_heads": model_args.n_kv_heads or model_args.n_heads,
        "max_position_embeddings": model_args.max_seq_len,
        "rms_norm_eps": model_args.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(model_args.rope_theta)},
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "normalizer": model_args.normalizer,
        "output_gate": model_args.output_gate,
        "score_scale": model_args.score_scale,
    }
    weights = model_args.adapter().to_hf(dict(state_dict))
    with torch.device("meta"):
        model = SoftpickLlamaForCausalLM(SoftpickLlamaConfig(**(fields | config)))
    model.load_state_dict({name: x.detach().clone() for name, x in weights.items()}, assign=True)
    with torch.device(model.device):  # its buffers are in no state dict
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


def from_transformers(model: Any, arguments: Callable[..., Any]) -> tuple[Any, dict[str, Tensor]]:
    """Turn a transformers model into torchtitan's arguments and state.

    Args:
        model: a ``SoftpickLlamaForCausalLM``.
        arguments: the class of the arguments.

    Returns:
        The arguments of a model with the same logits, and its state dict.

    Raises:
        TypeError: for another model.
        ValueError: for a configuration that torchtitan's Llama cannot express (tied embeddings, biases, scaled rotary
            frequencies, a head dimension of its own, another activation).
    """
    config = getattr(model, "config", None)
    if config is None or config.model_type != "softpick_llama":
        raise TypeError(f"model: expected a SoftpickLlamaForCausalLM, got {type(model).__name__}")
    expected = {
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "head_dim": config.hidden_size // config.num_attention_heads,
    }
    rope = dict(config.rope_parameters)
    found = {name: getattr(config, name) for name in expected} | {"rope_type": rope.get("rope_type", "default")}
    for name, value in (expected | {"rope_type": "default"}).items():
        if found[name] != value:
            raise ValueError(f"model: expected {name} {value!r}, as torchtitan's Llama has it; got {found[name]!r}")
    usual = 8 * config.hidden_size // 3
    model_args = arguments(
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        # torchtitan rounds a width of its own up to a multiple: with this one it arrives where the model is
        multiple_of=config.intermediate_size,
        ffn_dim_multiplier=min(1.0, config.intermediate_size / usual),
        norm_eps=config.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        max_seq_len=config.max_position_embeddings,
        normalizer=config.normalizer,
        output_gate=config.output_gate,
        score_scale=config.score_scale,
    )
    return model_args, model_args.adapter().from_hf(model.state_dict())


def _written(path: Path, write: Any) -> None:
    """Let ``write`` fill a folder that gets its name when it is complete."""
    if path.exists():
        raise FileExistsError(f"output: expected a folder that does not exist yet, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(unfinished)
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _convert_to_transformers(flavors: Mapping[str, Any], options: argparse.Namespace) -> None:
    model_args = flavors[options.flavor]
    model_args.max_seq_len = options.sequence_length or model_args.max_seq_len
    with torch.device("meta"):
        model = model_args.build()
    state = {name: torch.empty_like(x, device="cpu") for name, x in model.state_dict().items()}
    dcp.load(state, checkpoint_id=options.checkpoint, no_dist=True)
    special: dict[str, Any] = {}
    tokenizer = None
    if options.tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer, local_files_only=True, trust_remote_code=False)
        special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    converted = to_transformers(model_args, state, **special)

    def write(folder: Path) -> None:
        converted.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    _written(Path(options.output), write)


def _convert_from_transformers(arguments: Callable[..., Any], options: argparse.Namespace) -> None:
    from softpick.integrations.transformers import SoftpickLlamaForCausalLM

    model = SoftpickLlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32, local_files_only=True)
    model_args, state = from_transformers(model, arguments)
    _written(Path(options.output), lambda folder: dcp.save(state, checkpoint_id=folder, no_dist=True))
    print(f"{options.output}: a model with {model_args}")


def main(flavors: Mapping[str, Any], arguments: Callable[..., Any], line: list[str] | None) -> None:
    """Convert checkpoints: the command ``python -m softpick.integrations.torchtitan``.

    Args:
        flavors: arguments of a model by flavor.
        arguments: their class.
        line: of the command line; the process's if None.

    Raises:
        ValueError: for an unknown flavor.
        FileExistsError: for an output that exists.
    """
    parser = argparse.ArgumentParser("python -m softpick.integrations.torchtitan", description="Convert checkpoints.")
    commands = parser.add_subparsers(required=True)
    to = commands.add_parser("to-transformers", help="a step-N folder of torchtitan to a SoftpickLlama")
    to.add_argument("checkpoint", help="folder step-N")
    to.add_argument("output", help="folder that does not exist yet")
    to.add_argument("--flavor", required=True, help="of the run")
    to.add_argument("--sequence-length", type=int, help="of the run, if not that of the size")
    to.add_argument("--tokenizer", help="folder; saved with the model")
    to.set_defaults(run=partial(_convert_to_transformers, flavors))
    back = commands.add_parser(
        "from-transformers", help="a SoftpickLlama to a checkpoint for --checkpoint.initial_load_path"
    )
    back.add_argument("model", help="folder of a SoftpickLlama")
    back.add_argument("output", help="folder that does not exist yet")
    back.set_defaults(run=partial(_convert_from_transformers, arguments))
    options = parser.parse_args(line)
    options.run(options)


# ---------------------------------------------------------------------------------------------------------------------
# Data sets


def _load_files(path: str) -> Any:
    """Documents of a file or of the files in a folder, in the order of their names."""
    from datasets import load_dataset

    kinds = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
    root = Path(path)
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix in kinds)
    found = {p.suffix for p in files}
    if len(found) != 1 or not found <= kinds.keys():
        raise ValueError(f"dataset_path: expected files of one kind of {', '.join(kinds)}; got {found or path}")
    kind = kinds[found.pop()]
    options = {"sample_by": "document"} if kind == "text" else {}
    return load_dataset(kind, data_files=[str(p) for p in files], split="train", streaming=True, **options)


def _load_hub(path: str, name: str) -> Any:
    from datasets import load_dataset

    return load_dataset(path, name=name, split="train", streaming=True)


def _text(sample: dict[str, Any]) -> str:
    return sample["text"]


DATA: dict[str, dict[str, Any]] = {
    "files": {"path": "", "loader": _load_files, "sample_processor": _text},
    "fineweb_edu": {
        "path": "HuggingFaceFW/fineweb-edu",
        "loader": partial(_load_hub, name="sample-100BT"),
        "sample_processor": _text,
    },
}
"""Fields of torchtitan's ``DatasetConfig`` by the name of a data set."""
