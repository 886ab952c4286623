"""Every model type of transformers in tiny: our softmax against the model's own eager attention, and the future unseen.

``python tests/sweep_models.py [--normalizer NAME] [MODEL_TYPE ...]`` prints one line for each type: ``right``, ``refused``
with the sentence, ``WRONG`` with what differs, or ``unbuilt`` where no tiny model could be made or its eager attention does
not run. The exit status is the number of wrong ones (at most 100). About ten minutes for all types on one core. Of another
normalizer than softmax only what the future does is looked at. ``--audit [MODEL_TYPE ...]`` compares the maps that
``softpick analyze`` measures with transformers' ``output_attentions`` instead.
"""

from __future__ import annotations

import copy
import signal
import sys
import warnings
from collections import Counter

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

import softpick.integrations.transformers  # noqa: F401

SMALL = {
    "vocab_size": 99, "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "embedding_size": 32, "dim": 32,
    "intermediate_size": 48, "d_ff": 48, "ffn_dim": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "n_inner": 48,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_decoder_layers": 2, "num_encoder_layers": 2, "depth": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "global_head_dim": 8,
    "max_position_embeddings": 64, "n_positions": 64, "max_source_positions": 64, "max_target_positions": 64,
    "sliding_window": 4, "attention_chunk_size": 4, "local_attention": 4,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "moe_topk": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "o_lora_rank": 16,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "vocab_size_per_layer_input": 99,
    "hidden_size_per_layer_input": 8, "image_size": 16, "patch_size": 4, "num_channels": 3, "type_vocab_size": 2,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "block_size": 4, "num_buckets": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "projection_dim": 16,
    "initializer_range": 0.2, "init_std": 0.2, "dropout": 0.0, "attention_dropout": 0.0, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
}  # fmt: skip
CAUSAL, SEQ2SEQ, MASKED, PLAIN = (
    getattr(modeling_auto, f"MODEL_{name}MAPPING_NAMES")
    for name in ("FOR_CAUSAL_LM_", "FOR_SEQ_TO_SEQ_CAUSAL_LM_", "FOR_MASKED_LM_", "")
)
LARGEST = 20_000_000  # parameters
TOLERANCE = 2e-4


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """A small configuration of the same class, as far as the fields have one of the usual names."""
    fields = {name: value for name, value in SMALL.items() if isinstance(getattr(config, name, None), int | float)}
    if isinstance(kinds := getattr(config, "layer_types", None), list) and kinds:
        distinct = list(dict.fromkeys(kinds))
        fields["layer_types"] = (distinct * 2)[: max(2, len(distinct))]
        for name in ("num_hidden_layers", "num_layers", "n_layer"):
            if name in fields:
                fields[name] = len(fields["layer_types"])
    parts = {
        name: shrink(part)
        for name in config.sub_configs
        if isinstance(part := getattr(config, name, None), PreTrainedConfig)
    }
    return type(config)(**fields, **parts)


def class_of(model_type: str) -> tuple[str, type] | None:
    for task, mapping in (("seq2seq", SEQ2SEQ), ("causal", CAUSAL), ("masked", MASKED), ("plain", PLAIN)):
        name = mapping.get(model_type)
        name = name[0] if isinstance(name, tuple | list) else name
        if name is not None and hasattr(transformers, name):
            return task, getattr(transformers, name)
    return None


def inputs_of(task: str, model) -> tuple[list[dict], dict | None]:
    """Inputs to compare on, and one with other tokens at the end of what the decoder reads."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (2, 10), generator=generator)
    later = ids.clone()
    later[:, 7:] = 50
    padding = torch.ones(2, 10, dtype=torch.long)
    padding[0, :3] = 0
    if task == "seq2seq":
        whole = {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
        return [whole, {**whole, "attention_mask": padding.flip(1)}], {**whole, "decoder_input_ids": later}
    if model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", 16)
        size = size if isinstance(size, int) else 16
        return [{"pixel_values": torch.randn(2, 3, size, size, generator=generator)}], None
    whole = {"input_ids": ids, "use_cache": False} if task == "causal" else {"input_ids": ids}
    return [whole, {**whole, "attention_mask": padding}], ({**whole, "input_ids": later} if task == "causal" else None)


def outputs(model, inputs: dict) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        out = model(**inputs)
    out = getattr(out, "logits", None) if getattr(out, "logits", None) is not None else out[0]
    if "attention_mask" in inputs and "decoder_input_ids" not in inputs:
        out = out[inputs["attention_mask"].bool()]
    return out.float()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-6))


def build(kind: type, config: PreTrainedConfig, implementation: str):
    torch.manual_seed(0)
    return kind._from_config(copy.deepcopy(config), attn_implementation=implementation).eval()


def randomize(model) -> dict:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.15, generator=generator)
    return model.state_dict()


def examine(model_type: str, name: str = "softmax") -> tuple[str, str]:
    """``("right" | "refused" | "WRONG" | "unbuilt", why)`` for one type of model."""
    found = class_of(model_type)
    if found is None:
        return "unbuilt", "no class"
    task, kind = found
    try:
        config = shrink(transformers.CONFIG_MAPPING[model_type]())
        with torch.device("meta"):
            size = sum(
                p.numel() for p in kind._from_config(copy.deepcopy(config), attn_implementation="eager").parameters()
            )
        if size > LARGEST:
            return "unbuilt", f"{size} parameters"
        eager = build(kind, config, "eager")
        state = randomize(eager)
        cases, later = inputs_of(task, eager)
        truth = [outputs(eager, case) for case in cases]
        changed = None if later is None else outputs(eager, later)
    except Exception as error:
        return "unbuilt", f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
    try:
        for attempt in (name, "learned_sink"):
            try:
                ours = build(kind, config, attempt)
                ours.load_state_dict(state)
                got = [outputs(ours, case) for case in cases]
                break
            except ValueError as error:  # a model with sinks of its own
                if attempt == "learned_sink" or "learned_sink" not in str(error) or "s_aux" not in str(error):
                    raise
    except ValueError as error:
        return "refused", str(error)[:300]
    except TimeoutError:
        raise
    except Exception as error:
        return "WRONG", f"{type(error).__name__}: {str(error)[:200]}"
    for number, (a, b) in enumerate(zip(truth, got, strict=True)):
        difference = distance(a, b)
        if name == "softmax" and not difference < TOLERANCE:
            if kind._supports_sdpa:  # of a model whose own two ways differ, sdpa's is followed
                sdpa = build(kind, config, "sdpa")
                sdpa.load_state_dict(state)
                if distance(outputs(sdpa, cases[number]), b) < TOLERANCE:
                    continue
            return "WRONG", f"{kind.__name__} input {number}: {difference:.2g} from eager"
    if changed is not None:
        past = [(a - b)[:, :7].abs().max() for a, b in ((truth[0], changed), (got[0], outputs(ours, later)))]
        if past[0] < TOLERANCE and past[1] > TOLERANCE:  # a decoder, as eager has it
            return (
                "WRONG",
                f"{kind.__name__}: the future changes the past by {float(past[1]):.2g}, in eager by {float(past[0]):.2g}",
            )
    return "right", kind.__name__


ATTENTIONS = {"": "attentions", "encoder": "encoder_attentions", "decoder": "decoder_attentions"}
ATTENTIONS["cross-attention"] = "cross_attentions"


def examine_audit(model_type: str) -> tuple[str, str]:
    """The same of ``softpick analyze``: the maps that it measures against ``output_attentions``, by part of the model."""
    from softpick.analysis import attention_maps, measure_parts
    from softpick.analysis.watching import parts_of

    found = class_of(model_type)
    if found is None:
        return "unbuilt", "no class"
    task, kind = found
    try:
        config = shrink(transformers.CONFIG_MAPPING[model_type]())
        if hasattr(config, "kv_lora_rank"):
            config.num_key_value_heads = config.num_attention_heads
        model = build(kind, config, "eager")
        randomize(model)
        case = inputs_of(task, model)[0][0]
        with torch.no_grad():
            output = model(**case, output_attentions=True)
    except Exception as error:
        return "unbuilt", f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
    rest: list[str] = []
    try:
        measure_parts(model, [case], rest=lambda sentences: rest.__setitem__(slice(None), sentences))
        parts = {
            part: attention_maps(model, {k: x[:1] if torch.is_tensor(x) else x for k, x in case.items()}, part=part)
            for part in parts_of(model)
        }
    except ValueError as error:
        return "refused", str(error)[:300]
    words = []
    for part, got in parts.items():
        want = [a[0] for a in getattr(output, ATTENTIONS[part], None) or [] if a is not None]
        if not want:
            return "unbuilt", f"{kind.__name__} returns no {ATTENTIONS[part]}"
        difference = float((got - torch.stack(want)).abs().max()) if len(want) == len(got) else float("inf")
        if not difference < TOLERANCE:
            return "WRONG", f"{kind.__name__} {part}: {len(got)} layers of {len(want)}, {difference:.2g} from eager"
        words.append(f"{part or 'attention'} {len(got)} layers, {difference:.1g}")
    return "right", f"{kind.__name__}: {'; '.join([*words, *rest])}"


def main() -> int:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)

    def too_long(*_):
        raise TimeoutError("more than 60 s")

    signal.signal(signal.SIGALRM, too_long)
    counts: Counter[str] = Counter()
    wanted = sys.argv[1:]
    audit = wanted[:1] == ["--audit"]
    wanted = wanted[1:] if audit else wanted
    name = wanted[1] if wanted[:1] == ["--normalizer"] else "softmax"
    for model_type in wanted[2 if wanted[:1] == ["--normalizer"] else 0 :] or sorted(transformers.CONFIG_MAPPING):
        signal.alarm(60)
        try:
            verdict, why = examine_audit(model_type) if audit else examine(model_type, name)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            verdict, why = "unbuilt", f"{type(error).__name__}: {error}"
        signal.alarm(0)
        counts[verdict] += 1
        print(f"{model_type:32} {verdict:8} {why}", flush=True)
    print(dict(counts))
    return min(100, counts["WRONG"])


if __name__ == "__main__":
    raise SystemExit(main())
