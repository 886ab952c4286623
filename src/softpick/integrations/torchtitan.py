"""Llama with any normalizer for torchtitan 0.2.2: FSDP2, tensor and context parallelism, activation checkpointing.

Importing this module registers the model ``softpick_llama``, so that torchtitan is started as ever::

    torchrun --nproc-per-node 8 -m torchtitan.train --experimental.custom_import softpick.integrations.torchtitan
        --model.name softpick_llama --model.flavor 340M-softpick ...

A flavor is ``SIZE``, ``SIZE-NORMALIZER`` or ``SIZE-NORMALIZER+output_gate+score_scale``: a key of :data:`SIZES` and a name of
``softpick.NORMALIZERS`` (softpick if there is none). The model is torchtitan's own Llama with another attention; weights
convert to and from ``SoftpickLlamaForCausalLM`` (:func:`to_transformers`, :func:`from_transformers`, or
``python -m softpick.integrations.torchtitan``). Context parallelism is :func:`softpick.distributed.ring_attention`.

Data sets, besides torchtitan's: ``files`` (``--training.dataset_path`` is a text, JSONL or parquet file or a folder of them;
field ``text``) and ``fineweb_edu`` (the paper's, streamed from the hub).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from softpick.distributed import ring_attention
from softpick.functional import scaled_dot_product_attention
from softpick.normalizers import NORMALIZERS, get_normalizer

_VERSION = "0.2.2"
try:
    _found = importlib.metadata.version("torchtitan")
except importlib.metadata.PackageNotFoundError:
    raise ImportError(
        f"softpick.integrations.torchtitan needs torchtitan {_VERSION}: pip install 'softpick[torchtitan]'"
    ) from None
if _found != _VERSION:
    raise ImportError(
        f"softpick.integrations.torchtitan is for torchtitan {_VERSION}, whose interfaces the next versions changed; found "
        f"{_found}: pip install 'softpick[torchtitan]'"
    )

from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.models.llama3 import Transformer, TransformerModelArgs, get_train_spec
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list, apply_compile, apply_fsdp, apply_tp
from torchtitan.models.llama3.model.args import RoPEScalingArgs
from torchtitan.models.llama3.model.model import Attention, apply_rotary_emb
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.models.utils import trunc_normal_
from torchtitan.protocols.train_spec import register_train_spec

__all__ = [
    "FLAVORS",
    "NAME",
    "SIZES",
    "SoftpickModelArgs",
    "SoftpickStateDictAdapter",
    "SoftpickTransformer",
    "from_transformers",
    "main",
    "parallelize",
    "register",
    "to_transformers",
]

NAME = "softpick_llama"
"""The name of the model: ``--model.name softpick_llama``."""


# ---------------------------------------------------------------------------------------------------------------------
# What is trained


@dataclass
class SoftpickModelArgs(TransformerModelArgs):
    """torchtitan's arguments of a Llama, and those of ``SoftpickLlamaConfig``.

    Attributes:
        normalizer: a name of ``softpick.NORMALIZERS``. ``learned_sink`` adds one logit a head, which starts at 0.
        output_gate: multiply each head's output by ``sigmoid(x W_g)`` before the output projection.
        score_scale: multiply scores by ``s_h log n``, ``n`` the keys a query may see; ``s_h`` starts so that the factor is 1
            on average over the rows of a sequence.

    Raises:
        ValueError: for an unknown normalizer, heads that do not divide, or masks other than the causal one.
    """

    norm_eps: float = 1e-6  # transformers' default, as in the recipes
    vocab_size: int = 32000
    max_seq_len: int = 4096
    # no scaling of the rotary frequencies; torchtitan has no switch for it
    rope_scaling_args: RoPEScalingArgs = field(
        default_factory=lambda: RoPEScalingArgs(scaling_factor=1.0, original_max_position_embeddings=0)
    )
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
        if self.attn_type != "sdpa" or self.attn_mask_type != "causal":
            raise ValueError(
                f"attn_type, attn_mask_type: expected 'sdpa' and 'causal' (there are no document masks here), got "
                f"{self.attn_type!r} and {self.attn_mask_type!r}"
            )

    def update_from_config(self, job_config: JobConfig, **kwargs: Any) -> None:
        """Take the sequence length over, and refuse what gives wrong results or nothing. torchtitan calls it first.

        Raises:
            ValueError: for options of torchtitan that this model does not support.
        """
        parallelism = job_config.parallelism
        if parallelism.pipeline_parallel_degree > 1:
            raise ValueError(
                "parallelism.pipeline_parallel_degree: expected 1, because torchtitan 0.2.2 leaves the gradients of a "
                f"pipeline unscaled; got {parallelism.pipeline_parallel_degree}. Use FSDP, tensor and context parallelism"
            )
        if parallelism.expert_parallel_degree > 1:
            raise ValueError(
                "parallelism.expert_parallel_degree: expected 1, this model has no experts; got "
                f"{parallelism.expert_parallel_degree}"
            )
        if job_config.model.converters:
            raise ValueError(
                f"model.converters: expected none (float8 and mx were not tried here), got {job_config.model.converters}"
            )
        if parallelism.context_parallel_degree > 1:
            if parallelism.context_parallel_load_balancer != "headtail":
                raise ValueError(
                    "parallelism.context_parallel_load_balancer: expected 'headtail', the chunks of "
                    f"softpick.distributed.shard_sequence; got {parallelism.context_parallel_load_balancer!r}"
                )
            if parallelism.context_parallel_rotate_method != "allgather":
                raise ValueError(
                    "parallelism.context_parallel_rotate_method: expected the default 'allgather', which means nothing "
                    f"here: keys travel around a ring; got {parallelism.context_parallel_rotate_method!r}"
                )
        tensor, context = parallelism.tensor_parallel_degree, parallelism.context_parallel_degree
        if job_config.training.seq_len % (2 * tensor * context):
            raise ValueError(
                f"training.seq_len: expected a multiple of {2 * tensor * context} (2 x tensor x context parallel degree), "
                f"got {job_config.training.seq_len}"
            )
        if self.n_heads % tensor or (self.n_kv_heads or self.n_heads) % tensor:
            raise ValueError(
                f"parallelism.tensor_parallel_degree: expected a divisor of the {self.n_heads} heads and "
                f"{self.n_kv_heads or self.n_heads} key heads, got {tensor}"
            )
        if tensor > 1 and (_compiled(job_config) or parallelism.enable_async_tensor_parallel):
            raise ValueError(
                "compile.enable, parallelism.enable_async_tensor_parallel: expected False with tensor parallelism, because "
                "torchtitan 0.2.2 then stops in the backward pass, or its gradients are wrong (seen with torch 2.13, with its "
                "own Llama too); got True"
            )
        super().update_from_config(job_config, **kwargs)


def _compiled(job_config: JobConfig) -> bool:
    return job_config.compile.enable and "model" in job_config.compile.components


SIZES: dict[str, SoftpickModelArgs] = {
    # as the recipe tiny_cpu: shows that everything works
    "tiny": SoftpickModelArgs(dim=64, n_layers=2, n_heads=4, vocab_size=512, multiple_of=192, max_seq_len=64),
    # the paper's table 4: MLP 2816 and 5632, untied
    "340M": SoftpickModelArgs(dim=1024, n_layers=24, n_heads=16),
    "1.8B": SoftpickModelArgs(dim=2048, n_layers=32, n_heads=32),
}
"""Sizes by name. Add your own in a module that imports this one, and give that to ``--experimental.custom_import``."""


class _Flavors(Mapping[str, SoftpickModelArgs]):
    """The arguments of a flavor by its name, made anew each time: torchtitan writes the sequence length into them."""

    def __getitem__(self, flavor: str) -> SoftpickModelArgs:
        name, _, rest = flavor.partition("-")
        normalizer, *extras = rest.split("+") if rest else ["softpick"]
        if name not in SIZES or normalizer not in NORMALIZERS or not {"output_gate", "score_scale"} >= set(extras):
            raise ValueError(
                "model.flavor: expected SIZE-NORMALIZER, after it +output_gate or +score_scale if wanted; SIZE one of "
                f"{', '.join(SIZES)}, NORMALIZER one of {', '.join(NORMALIZERS)}; got {flavor!r}"
            )
        return replace(SIZES[name], normalizer=normalizer, **dict.fromkeys(extras, True))

    def __iter__(self) -> Iterator[str]:
        return (f"{size}-{normalizer}" for size in SIZES for normalizer in NORMALIZERS)

    def __len__(self) -> int:
        return len(SIZES) * len(NORMALIZERS)


FLAVORS: Mapping[str, SoftpickModelArgs] = _Flavors()
"""Arguments of a model by ``--model.flavor``."""


# ---------------------------------------------------------------------------------------------------------------------
# The model


def _local(parameter: nn.Parameter | None) -> Tensor | None:
    """What this rank has of a parameter that tensor parallelism shares among ranks by head."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class _Attention(Attention):
    """torchtitan's projections, softpick's attention; parameters named as in ``SoftpickLlama``."""

    def __init__(self, model_args: SoftpickModelArgs) -> None:
        super().__init__(model_args)
        del self.inner_attention
        self.normalizer, self.length = model_args.normalizer, model_args.max_seq_len
        sinks = get_normalizer(self.normalizer).needs_sink
        self.sinks = nn.Parameter(torch.empty(self.n_heads)) if sinks else None
        self.score_scale = nn.Parameter(torch.empty(self.n_heads)) if model_args.score_scale else None
        gate = nn.Linear(model_args.dim, self.n_heads * self.head_dim, bias=False) if model_args.output_gate else None
        self.output_gate = gate
        self.group: torch.distributed.ProcessGroup | None = None  # the ranks that share a sequence

    def init_weights(self, init_std: float) -> None:
        super().init_weights(init_std)
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)
        if self.score_scale is not None:  # one over the mean of log n over n = 1..T, as in SoftpickLlama
            length = max(2, self.length)
            nn.init.constant_(self.score_scale, length / math.lgamma(length + 1))
        if self.output_gate is not None:
            trunc_normal_(self.output_gate.weight, mean=0.0, std=0.02)

    def forward(
        self, x: Tensor, freqs_cis: Tensor, attention_masks: None = None, positions: Tensor | None = None
    ) -> Tensor:
        if attention_masks is not None:
            raise ValueError("attention_masks: expected None, this model is causal and has no other masks")
        # the number of heads is that of this rank
        query, key, value = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.wq, self.wk, self.wv))
        query, key = apply_rotary_emb(query, key, freqs_cis=freqs_cis, positions=positions)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        scale = _local(self.score_scale)
        if scale is not None:
            at = torch.arange(x.shape[1], device=x.device)[None] if positions is None else positions
            logs = torch.log(at + 1.0)[:, None, :, None]
            query = (query * (scale.view(-1, 1, 1) * logs)).to(query.dtype)
        options: dict[str, Any] = {
            "is_causal": True,
            "enable_gqa": self.enable_gqa,
            "normalizer": self.normalizer,
            "sink": _local(self.sinks),
        }
        if self.group is None:
            out = scaled_dot_product_attention(query, key, value, **options)
        else:
            out = ring_attention(query, key, value, group=self.group, **options)
        out = out.transpose(1, 2).flatten(2)
        if self.output_gate is not None:
            out = out * torch.sigmoid(self.output_gate(x))
        return self.wo(out)


class SoftpickTransformer(Transformer):
    """torchtitan's Llama with our attention: ``(B, T)`` tokens to ``(B, T, vocab)`` logits."""

    def __init__(self, model_args: SoftpickModelArgs) -> None:
        super().__init__(model_args)
        for block in self.layers.values():
            block.attention = _Attention(model_args)


def parallelize(model: SoftpickTransformer, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """Tensor and context parallelism, activation checkpointing, compilation by block, FSDP2: in this order.

    Args:
        model: on the meta device.
        parallel_dims: torchtitan's meshes.
        job_config: torchtitan's configuration.

    Returns:
        The model, its parameters DTensors where they are shared.

    Raises:
        ValueError: for replicas without shards (DistributedDataParallel), whose gradients torchtitan 0.2.2 averages although
            its losses are sums.
    """
    if parallel_dims.dp_replicate_enabled and not parallel_dims.fsdp_enabled:
        raise ValueError(
            "parallelism.data_parallel_replicate_degree: expected 1 where nothing is sharded, because "
            f"torchtitan 0.2.2 makes gradients of DistributedDataParallel too small; got {parallel_dims.dp_replicate}. Use "
            "data_parallel_shard_degree (FSDP2), with replicas of the shards if wanted"
        )
    blocks = list(model.layers.values())
    if parallel_dims.tp_enabled:
        mesh = parallel_dims.get_mesh("tp")
        loss_parallel = not job_config.parallelism.disable_loss_parallel
        apply_tp(model, mesh, loss_parallel=loss_parallel, enable_float8_tensorwise_tp=False)
        for block in blocks:
            attention = block.attention
            for name in ("sinks", "score_scale"):
                whole = getattr(attention, name)
                if whole is not None:
                    setattr(attention, name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])))
            if attention.output_gate is not None:
                parallelize_module(attention.output_gate, mesh, ColwiseParallel())
    if parallel_dims.cp_enabled:
        for block in blocks:
            block.attention.group = parallel_dims.get_mesh("cp").get_group()
    compiled = _compiled(job_config)
    if job_config.activation_checkpoint.mode != "none":
        attention_ops = {torch.ops.softpick.attention_forward.default, torch.ops.softpick.ring_forward.default}
        apply_ac(
            model,
            job_config.activation_checkpoint,
            model_compile_enabled=compiled,
            op_sac_save_list=_op_sac_save_list | attention_ops,
            base_folder=job_config.job.dump_folder,
        )
    if compiled:
        apply_compile(model, job_config.compile)
    if parallel_dims.fsdp_enabled:
        names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
        apply_fsdp(
            model,
            parallel_dims.get_mesh(names),
            param_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_reduce],
            pp_enabled=False,
            cpu_offload=job_config.training.enable_cpu_offload,
            reshard_after_forward_policy=job_config.parallelism.fsdp_reshard_after_forward,
        )
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Weights to and from transformers


class SoftpickStateDictAdapter(Llama3StateDictAdapter):
    """Names and layouts of the weights in transformers, for torchtitan's ``last_save_in_hf`` and ``initial_load_in_hf``."""

    def __init__(self, model_args: SoftpickModelArgs, hf_assets_path: str | None = None) -> None:
        super().__init__(model_args, hf_assets_path)
        for name in ("sinks", "score_scale", "output_gate.weight"):
            self.from_hf_map[f"model.layers.{{}}.self_attn.{name}"] = f"layers.{{}}.attention.{name}"


def to_transformers(model_args: SoftpickModelArgs, state_dict: Mapping[str, Tensor], **config: Any) -> Any:
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
    weights = SoftpickStateDictAdapter(model_args).to_hf(dict(state_dict))
    with torch.device("meta"):
        model = SoftpickLlamaForCausalLM(SoftpickLlamaConfig(**(fields | config)))
    model.load_state_dict({name: x.detach().clone() for name, x in weights.items()}, assign=True)
    with torch.device(model.device):  # its buffers are in no state dict
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


def from_transformers(model: Any) -> tuple[SoftpickModelArgs, dict[str, Tensor]]:
    """Turn a transformers model into torchtitan's arguments and state.

    Args:
        model: a ``SoftpickLlamaForCausalLM``.

    Returns:
        The arguments of a :class:`SoftpickTransformer` with the same logits, and its state dict.

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
    model_args = SoftpickModelArgs(
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
    return model_args, SoftpickStateDictAdapter(model_args).from_hf(model.state_dict())


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


def _convert_to_transformers(options: argparse.Namespace) -> None:
    model_args = FLAVORS[options.flavor]
    model_args.max_seq_len = options.sequence_length or model_args.max_seq_len
    with torch.device("meta"):
        model = SoftpickTransformer(model_args)
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


def _convert_from_transformers(options: argparse.Namespace) -> None:
    from softpick.integrations.transformers import SoftpickLlamaForCausalLM

    model = SoftpickLlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32, local_files_only=True)
    model_args, state = from_transformers(model)
    _written(Path(options.output), lambda folder: dcp.save(state, checkpoint_id=folder, no_dist=True))
    print(f"{options.output}: a model with {model_args}")


def main(arguments: list[str] | None = None) -> None:
    """Convert checkpoints: ``python -m softpick.integrations.torchtitan to-transformers | from-transformers``.

    Args:
        arguments: of the command line; the process's if None.

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
    to.set_defaults(run=_convert_to_transformers)
    back = commands.add_parser(
        "from-transformers", help="a SoftpickLlama to a checkpoint for --checkpoint.initial_load_path"
    )
    back.add_argument("model", help="folder of a SoftpickLlama")
    back.add_argument("output", help="folder that does not exist yet")
    back.set_defaults(run=_convert_from_transformers)
    options = parser.parse_args(arguments)
    options.run(options)


# ---------------------------------------------------------------------------------------------------------------------
# Registration


def _load_files(path: str) -> Any:
    """Documents of a file or of the files in a folder, in the order of their names."""
    from datasets import load_dataset

    kinds = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
    root = Path(path)
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix in kinds)
    found = {p.suffix for p in files}
    if len(found) != 1 or not found <= kinds.keys():
        raise ValueError(
            f"training.dataset_path: expected files of one kind of {', '.join(kinds)}; got {found or path}"
        )
    kind = kinds[found.pop()]
    options = {"sample_by": "document"} if kind == "text" else {}
    return load_dataset(kind, data_files=[str(p) for p in files], split="train", streaming=True, **options)


def _load_hub(path: str, name: str) -> Any:
    from datasets import load_dataset

    return load_dataset(path, name=name, split="train", streaming=True)


def _text(sample: dict[str, Any]) -> str:
    return sample["text"]


def register() -> None:
    """Register the model and the data sets with torchtitan. Importing this module has done it."""
    train_spec = replace(
        get_train_spec(),
        model_cls=SoftpickTransformer,
        model_args=FLAVORS,
        parallelize_fn=parallelize,
        pipelining_fn=None,
        state_dict_adapter=SoftpickStateDictAdapter,
    )
    register_train_spec(NAME, train_spec)
    DATASETS["files"] = DatasetConfig(path="", loader=_load_files, sample_processor=_text)
    DATASETS["fineweb_edu"] = DatasetConfig(
        path="HuggingFaceFW/fineweb-edu", loader=partial(_load_hub, name="sample-100BT"), sample_processor=_text
    )


if __name__ == "__main__":
    main()
else:
    register()
