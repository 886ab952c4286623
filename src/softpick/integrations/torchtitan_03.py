"""Llama with any normalizer for torchtitan 0.3.0. ``softpick.integrations.torchtitan`` is what users import.

Only torchtitan's backend ``spmd_types`` is served, its default: inside the model every tensor is what this rank has of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import spmd_types as spmd
import torch
import tyro
from torch import Tensor, nn
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import default_adamw
from torchtitan.components.validate import Validator
from torchtitan.config import TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm, compute_ffn_hidden_dim
from torchtitan.models.common.attention import AttentionMasksType, GQAttention
from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
from torchtitan.models.common.decoder_sharding import colwise_config, dense_activation_placement, dense_param_placement
from torchtitan.models.common.param_init import depth_scaled_std
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
from torchtitan.models.llama3.parallelize import parallelize_llama
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import LocalMapConfig, ShardingConfig
from torchtitan.trainer import Trainer

from softpick.integrations import torchtitan_shared as shared
from softpick.nn.attention import initial_score_scale
from softpick.normalizers import get_normalizer

__all__ = [
    "FLAVORS",
    "SIZES",
    "SequenceDataLoader",
    "SoftpickModelArgs",
    "SoftpickStateDictAdapter",
    "SoftpickTrainer",
    "SoftpickTransformer",
    "parallelize",
    "register",
    "softpick_llama",
]


# ---------------------------------------------------------------------------------------------------------------------
# The model


class _Kernel(Module):
    """softpick's attention of this rank's heads, in torchtitan's layout ``(B, T, H, D)``."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        normalizer: str

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.normalizer = config.normalizer
        self.group: torch.distributed.ProcessGroup | None = None  # the ranks that share a sequence

    def forward(
        self,
        q_BLNH: Tensor,  # noqa: N803 (these names are torchtitan's, which shards by them)
        k_BLNH: Tensor,  # noqa: N803
        v_BLNH: Tensor,  # noqa: N803
        *,
        sink: Tensor | None,
        score_scale: Tensor | None,
        positions: Tensor | None,
    ) -> Tensor:
        # what ranks hold is said by the sharding of this module, and checked at its borders
        with spmd.no_typecheck():
            out = shared.attend(
                q_BLNH.transpose(1, 2),
                k_BLNH.transpose(1, 2),
                v_BLNH.transpose(1, 2),
                self.normalizer,
                sink=sink,
                score_scale=score_scale,
                positions=positions,
                group=self.group,
            )
            return out.transpose(1, 2)


class _Attention(GQAttention):
    """torchtitan's projections, softpick's attention; extra parameters named as in ``SoftpickLlama``."""

    @dataclass(kw_only=True, slots=True)
    class Config(GQAttention.Config):
        output_gate: Linear.Config | None = None
        score_scale: bool = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.length = config.rope.max_seq_len
        sinks = get_normalizer(config.inner_attention.normalizer).needs_sink
        self.sinks = nn.Parameter(torch.empty(self.n_heads)) if sinks else None
        self.score_scale = nn.Parameter(torch.empty(self.n_heads)) if config.score_scale else None
        self.output_gate = config.output_gate.build() if config.output_gate is not None else None

    def reset_parameters(self) -> None:
        """Draw its own parameters; torchtitan calls it."""
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)
        if self.score_scale is not None:
            nn.init.constant_(self.score_scale, initial_score_scale(self.length))

    def forward(
        self,
        x_BLD: Tensor,  # noqa: N803
        attention_masks: AttentionMasksType | None,
        positions: Tensor | None = None,
    ) -> Tensor:
        if attention_masks is not None:
            raise ValueError("attention_masks: expected None, this model is causal and has no other masks")
        if self.inner_attention.group is not None and positions is None:
            raise ValueError("positions: expected those of this rank's tokens where ranks share a sequence, got None")
        query, key, value = self.qkv_linear(x_BLD)
        query, key = self.rope(query, key, positions)
        out = self.inner_attention(
            query, key, value, sink=self.sinks, score_scale=self.score_scale, positions=positions
        ).flatten(2)
        if self.output_gate is not None:
            out = out * torch.sigmoid(self.output_gate(x_BLD))
        return self.wo(out)


class SoftpickTransformer(Llama3Model):
    """torchtitan's Llama with our attention: ``(B, T)`` tokens to ``(B, T, vocab)`` logits."""

    @dataclass(kw_only=True, slots=True)
    class Config(Llama3Model.Config):
        """The tree of configurations that ``SoftpickModelArgs.config`` makes."""

        def update_from_config(self, *, config: Any) -> None:
            """Take the sequence length over, say how layers are shared among ranks, and refuse what is not served.

            Args:
                config: torchtitan's configuration of a run.

            Raises:
                ValueError: for options of torchtitan that this model does not support.
            """
            _refuse(config, self)
            length = config.training.seq_len
            for layer in self.layers:
                layer.attention.rope = dataclasses.replace(layer.attention.rope, max_seq_len=length)
            Llama3Model.Config.update_from_config(self, config=config)
            for layer in self.layers:
                _share_heads(layer.attention)


def _share_heads(attention: Any) -> None:
    """How ranks share what torchtitan's attention does not have, and that keys stay where they are: they go around a ring."""
    shares = dense_activation_placement(tp=spmd.S(2))
    names = ("q_BLNH", "k_BLNH", "v_BLNH")
    attention.inner_attention.sharding_config = ShardingConfig(
        in_src_shardings=dict.fromkeys(names, shares),
        in_dst_shardings=dict.fromkeys(names, shares),
        out_src_shardings=shares,
        local_map=LocalMapConfig(in_grad_placements=(shares,) * len(names)),
    )
    by_head = dense_param_placement(tp=spmd.S(0))
    attention.sharding_config.state_shardings = {"sinks": by_head, "score_scale": by_head}
    if attention.output_gate is not None:
        attention.output_gate.sharding_config = colwise_config()


def parallelize(
    model: SoftpickTransformer, *, parallel_dims: ParallelDims, ac_config: Any, **options: Any
) -> nn.Module:
    """Parallelize a model as torchtitan does its Llama, with a ring for context parallelism.

    Args:
        model: on the meta device.
        parallel_dims: torchtitan's meshes.
        ac_config: which activations are kept; the selective kind keeps the outputs of attention, too.
        options: what else torchtitan's ``parallelize_llama`` takes, and checks.

    Returns:
        The model.
    """
    if parallel_dims.cp_enabled:
        group = parallel_dims.get_mesh("cp").get_group()
        for block in model.layers.values():
            block.attention.inner_attention.group = group
    if isinstance(ac_config, SelectiveAC.Config):
        fields = {field.name: getattr(ac_config, field.name) for field in dataclasses.fields(ac_config)}
        ac_config = _SelectiveAC.Config(**fields)
    return parallelize_llama(model, parallel_dims=parallel_dims, ac_config=ac_config, **options)


class _SelectiveAC(SelectiveAC):
    """Keeps the outputs of our attention, too."""

    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        pass

    def get_save_ops(self) -> set[Any]:
        return super().get_save_ops() | shared.saved_operators()


# ---------------------------------------------------------------------------------------------------------------------
# What is trained


@dataclass
class SoftpickModelArgs(shared.ModelArguments):
    """What a model is: see ``softpick.integrations.torchtitan_shared.ModelArguments``."""

    def config(self) -> SoftpickTransformer.Config:
        """The tree of configurations that torchtitan makes the model of."""
        normal = partial(nn.init.trunc_normal_, std=0.02)
        output = self.dim**-0.5
        return SoftpickTransformer.Config(
            dim=self.dim,
            vocab_size=self.vocab_size,
            tok_embeddings=Embedding.Config(
                num_embeddings=self.vocab_size, embedding_dim=self.dim, param_init={"weight": nn.init.normal_}
            ),
            norm=self._norm(),
            lm_head=Linear.Config(
                in_features=self.dim,
                out_features=self.vocab_size,
                param_init={"weight": partial(nn.init.trunc_normal_, std=output, a=-3 * output, b=3 * output)},
            ),
            layers=[self._layer(index, {"weight": normal}) for index in range(self.n_layers)],
        )

    def _norm(self) -> RMSNorm.Config:
        return RMSNorm.Config(normalized_shape=self.dim, eps=self.norm_eps, param_init={"weight": nn.init.ones_})

    def _layer(self, index: int, drawn: dict[str, Any]) -> Llama3TransformerBlock.Config:
        """A block; initial weights are those of torchtitan's Llama, smaller in deeper blocks where a residual branch ends."""
        deep = {"weight": partial(nn.init.trunc_normal_, std=depth_scaled_std(0.02, index))}
        width = compute_ffn_hidden_dim(
            self.dim, multiple_of=self.multiple_of, ffn_dim_multiplier=self.ffn_dim_multiplier
        )
        head_dim = self.dim // self.n_heads
        whole = make_gqa_config(
            dim=self.dim,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            wqkv_param_init=drawn,
            wo_param_init=deep,
            inner_attention=_Kernel.Config(normalizer=self.normalizer),
            rope=ComplexRoPE.Config(dim=head_dim, max_seq_len=self.max_seq_len, theta=self.rope_theta),
        )
        gate = Linear.Config(in_features=self.dim, out_features=self.n_heads * head_dim, param_init=drawn)
        attention = _Attention.Config(
            **{field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)},
            output_gate=gate if self.output_gate else None,
            score_scale=self.score_scale,
        )
        feed_forward = make_ffn_config(dim=self.dim, hidden_dim=width, w1_param_init=drawn, w2w3_param_init=deep)
        return Llama3TransformerBlock.Config(
            attention=attention, feed_forward=feed_forward, attention_norm=self._norm(), ffn_norm=self._norm()
        )

    def build(self) -> SoftpickTransformer:
        """A model of torchtitan with these arguments, its weights not drawn yet."""
        return self.config().build()

    def adapter(self) -> SoftpickStateDictAdapter:
        """What changes names and layouts of its weights to those of transformers and back."""
        return SoftpickStateDictAdapter(self.config(), None)


class SoftpickStateDictAdapter(Llama3StateDictAdapter):
    """Names and layouts of the weights in transformers, for torchtitan's ``last_save_in_hf`` and ``initial_load_in_hf``."""

    def __init__(self, model_config: SoftpickTransformer.Config, hf_assets_path: str | None) -> None:
        super().__init__(model_config, hf_assets_path)
        for name in shared.EXTRAS:
            self.from_hf_map[f"model.layers.{{}}.self_attn.{name}"] = f"layers.{{}}.attention.{name}"


SIZES = {name: SoftpickModelArgs(**fields) for name, fields in shared.SIZES.items()}
"""Sizes by name. Add your own in a module that imports this one and ``softpick_llama``, and give that to ``--module``."""

FLAVORS = shared.Flavors(SIZES, "flavor")
"""Arguments of a model by ``--flavor``."""


# ---------------------------------------------------------------------------------------------------------------------
# A run


class SequenceDataLoader(HuggingFaceTextDataLoader):
    """torchtitan's loader of texts, with positions that count through the whole sequence.

    torchtitan's count within each document, which goes with a mask between documents. There is none here: a sequence is
    attended to from its first token, as in the softpick paper and in ``softpick train`` without document masks.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(HuggingFaceTextDataLoader.Config):
        """As torchtitan's."""

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for inputs, labels in super().__iter__():
            yield inputs | {"positions": torch.arange(labels.shape[1]).expand_as(labels).contiguous()}, labels


class SoftpickTrainer(Trainer):
    """torchtitan's, for a model that ``--flavor`` names."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        """As torchtitan's, and the flavor."""

        model_spec: Annotated[ModelSpec | None, tyro.conf.Suppress] = None
        flavor: str = "340M-softpick"
        """SIZE-NORMALIZER, after it +output_gate or +score_scale if wanted"""

        def __post_init__(self) -> None:
            if self.model_spec is None or self.model_spec.flavor != self.flavor:
                self.model_spec = ModelSpec(
                    name=shared.NAME,
                    flavor=self.flavor,
                    model=FLAVORS[self.flavor].config(),
                    parallelize_fn=parallelize,
                    pipelining_fn=pipeline_llm,
                    post_optimizer_build_fn=None,
                    state_dict_adapter=SoftpickStateDictAdapter,
                )
            Trainer.Config.__post_init__(self)


def softpick_llama() -> SoftpickTrainer.Config:
    """What ``--config softpick_llama`` starts from; options of the command line replace it."""
    return SoftpickTrainer.Config(
        loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config()),
        optimizer=default_adamw(lr=3e-4),
        training=TrainingConfig(seq_len=4096, disable_cuda_graphs=True),
        dataloader=SequenceDataLoader.Config(dataset="fineweb_edu"),
        validator=Validator.Config(dataloader=SequenceDataLoader.Config(dataset="c4_validation", infinite=False)),
    )


def _refuse(config: Any, model: SoftpickTransformer.Config) -> None:
    """Refuse what gives wrong results or was not tried, and give the loss the number of tokens."""
    parallelism = config.parallelism
    attention = model.layers[0].attention
    shared.refuse_parallelism(
        parallelism,
        config.training.seq_len,
        (attention.n_heads, attention.n_kv_heads or attention.n_heads),
        pipeline=None,
        rotates=False,
    )
    if parallelism.pipeline_parallel_degree > 1 and parallelism.pipeline_parallel_schedule != "1F1B":
        raise ValueError(
            "parallelism.pipeline_parallel_schedule: expected '1F1B', the only one that was tried; got "
            f"{parallelism.pipeline_parallel_schedule!r}"
        )
    if parallelism.spmd_backend != "spmd_types":
        raise ValueError(
            "parallelism.spmd_backend: expected 'spmd_types', torchtitan's default and the only one that was tried; got "
            f"{parallelism.spmd_backend!r}"
        )
    if not config.training.disable_cuda_graphs:
        raise ValueError(
            "training.disable_cuda_graphs: expected True, CUDA graphs were not tried with these kernels; got False"
        )
    if config.compile.enable_async_tensor_parallel:
        raise ValueError("compile.enable_async_tensor_parallel: expected False, it was not tried here; got True")
    if config.override.imports:
        raise ValueError(f"override.imports: expected none (no override was tried here), got {config.override.imports}")
    loaders = {"dataloader": config.dataloader}
    if config.validator.enable:
        loaders["validator.dataloader"] = config.validator.dataloader
    for name, loader in loaders.items():
        if not isinstance(loader, SequenceDataLoader.Config):
            raise ValueError(
                f"{name}: expected softpick's SequenceDataLoader.Config, because others count positions by document, which "
                f"goes with a mask between documents (there are no document masks here); got {type(loader).__qualname__}"
            )
    _tokens_of_loss(config.loss, model.vocab_size)


def _tokens_of_loss(loss: BaseLoss.Config, vocab_size: int) -> None:
    inner = loss.loss_fn if isinstance(loss, ChunkedLossWrapper.Config) else loss
    if not isinstance(inner, CrossEntropyLoss.Config):
        raise ValueError(f"loss: expected a cross entropy, as softpick_llama() has it; got {type(inner).__qualname__}")
    if inner.global_vocab_size not in (None, vocab_size):
        raise ValueError(
            f"loss.global_vocab_size: expected {vocab_size}, the model's, or None; got {inner.global_vocab_size}"
        )
    inner.global_vocab_size = vocab_size


def register() -> None:
    """Register the data sets with torchtitan, which finds ``softpick_llama`` by its name."""
    DATASETS.update({name: DatasetConfig(**fields) for name, fields in shared.DATA.items()})
