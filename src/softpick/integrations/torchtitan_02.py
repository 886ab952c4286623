"""Llama with any normalizer for torchtitan 0.2.2. ``softpick.integrations.torchtitan`` is what users import."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
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

from softpick.integrations import torchtitan_shared as shared
from softpick.nn.attention import initial_score_scale
from softpick.normalizers import get_normalizer

__all__ = [
    "FLAVORS",
    "SIZES",
    "SoftpickModelArgs",
    "SoftpickStateDictAdapter",
    "SoftpickTransformer",
    "parallelize",
    "register",
]


@dataclass
class SoftpickModelArgs(shared.ModelArguments, TransformerModelArgs):
    """torchtitan's arguments of a Llama, and those of ``SoftpickLlamaConfig``.

    Raises:
        ValueError: for an unknown normalizer, heads that do not divide, or masks other than the causal one.
    """

    # no scaling of the rotary frequencies; torchtitan has no switch for it
    rope_scaling_args: RoPEScalingArgs = field(
        default_factory=lambda: RoPEScalingArgs(scaling_factor=1.0, original_max_position_embeddings=0)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attn_type != "sdpa" or self.attn_mask_type != "causal":
            raise ValueError(
                f"attn_type, attn_mask_type: expected 'sdpa' and 'causal' (there are no document masks here), got "
                f"{self.attn_type!r} and {self.attn_mask_type!r}"
            )

    def build(self) -> SoftpickTransformer:
        """A model of torchtitan with these arguments, its weights not drawn yet."""
        return SoftpickTransformer(self)

    def adapter(self) -> SoftpickStateDictAdapter:
        """What changes names and layouts of its weights to those of transformers and back."""
        return SoftpickStateDictAdapter(self)

    def update_from_config(self, job_config: JobConfig, **kwargs: Any) -> None:
        """Take the sequence length over, and refuse what gives wrong results or nothing. torchtitan calls it first.

        Raises:
            ValueError: for options of torchtitan that this model does not support.
        """
        parallelism = job_config.parallelism
        if job_config.model.converters:
            raise ValueError(
                f"model.converters: expected none (float8 and mx were not tried here), got {job_config.model.converters}"
            )
        shared.refuse_parallelism(
            parallelism,
            job_config.training.seq_len,
            (self.n_heads, self.n_kv_heads or self.n_heads),
            pipeline="torchtitan 0.2.2 leaves the gradients of a pipeline unscaled",
            rotates=True,
        )
        tensor = parallelism.tensor_parallel_degree
        if tensor > 1 and (_compiled(job_config) or parallelism.enable_async_tensor_parallel):
            raise ValueError(
                "compile.enable, parallelism.enable_async_tensor_parallel: expected False with tensor parallelism, because "
                "torchtitan 0.2.2 then stops in the backward pass, or its gradients are wrong (seen with torch 2.13, with its "
                "own Llama too); got True"
            )
        super().update_from_config(job_config, **kwargs)


def _compiled(job_config: JobConfig) -> bool:
    return job_config.compile.enable and "model" in job_config.compile.components


SIZES = {name: SoftpickModelArgs(**fields) for name, fields in shared.SIZES.items()}
"""Sizes by name. Add your own in a module that imports this one, and give that to ``--experimental.custom_import``."""

FLAVORS = shared.Flavors(SIZES, "model.flavor")
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
        if self.score_scale is not None:
            nn.init.constant_(self.score_scale, initial_score_scale(self.length))
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
        out = shared.attend(
            query,
            key,
            value,
            self.normalizer,
            sink=_local(self.sinks),
            score_scale=_local(self.score_scale),
            positions=positions,
            group=self.group,
        )
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
        apply_ac(
            model,
            job_config.activation_checkpoint,
            model_compile_enabled=compiled,
            op_sac_save_list=_op_sac_save_list | shared.saved_operators(),
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


class SoftpickStateDictAdapter(Llama3StateDictAdapter):
    """Names and layouts of the weights in transformers, for torchtitan's ``last_save_in_hf`` and ``initial_load_in_hf``."""

    def __init__(self, model_args: SoftpickModelArgs, hf_assets_path: str | None = None) -> None:
        super().__init__(model_args, hf_assets_path)
        for name in shared.EXTRAS:
            self.from_hf_map[f"model.layers.{{}}.self_attn.{name}"] = f"layers.{{}}.attention.{name}"


# ---------------------------------------------------------------------------------------------------------------------
# Registration


def register() -> None:
    """Register the model and the data sets with torchtitan."""
    train_spec = replace(
        get_train_spec(),
        model_cls=SoftpickTransformer,
        model_args=FLAVORS,
        parallelize_fn=parallelize,
        pipelining_fn=None,
        state_dict_adapter=SoftpickStateDictAdapter,
    )
    register_train_spec(shared.NAME, train_spec)
    DATASETS.update({name: DatasetConfig(**fields) for name, fields in shared.DATA.items()})
