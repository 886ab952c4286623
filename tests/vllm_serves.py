"""Models of ours in the real vLLM give transformers' greedy tokens. `make vllm-test`; vLLM has an environment of its own.

python tests/vllm_serves.py --make FOLDER    in our environment: models, prompts and what transformers generates
python tests/vllm_serves.py FOLDER           in vLLM's environment, with the plug-in installed
"""

import json
import os
import sys
from pathlib import Path

MODELS = {
    "softpick": ("llama", "softpick", {}),
    "relu_softpick": ("llama", "relu_softpick", {}),
    "window": ("mistral", "softpick", {"sliding_window": 24}),
    "softcap": ("gemma2", "softpick", {"sliding_window": 24, "query_pre_attn_scalar": 32, "head_dim": 32}),
    "learned_sink": ("softpick_llama", "learned_sink", {"output_gate": True, "score_scale": True}),
    "softmax": ("llama", "sdpa", {}),
}
LENGTHS = [1, 2, 3, 5, 8, 13, 21, 34, 40, 55, 60, 64, 65, 70, 80, 81, 90, 97, 7, 100]
"""Of 20 prompts; a batch has 64 tokens, so that long prompts are computed in pieces."""
NEW = 12


def make(folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import softpick.integrations.transformers  # noqa: F401

    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(3, 250, (48,), generator=generator).tolist()
    prompts = [torch.randint(3, 250, (n,), generator=generator).tolist() for n in LENGTHS]
    prompts[-1] = [*shared, *prompts[-1]][:100]  # two prompts with one prefix
    prompts[-3] = [*shared, *prompts[-3]][:97]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    for name, (kind, normalizer, more) in MODELS.items():
        config = AutoConfig.for_model(
            kind, vocab_size=256, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0, **more,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, attn_implementation=normalizer).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1 or parameter.numel() == 4:  # and sinks and score scales, one a head
                parameter.data.normal_(0.0, 0.3, generator=generator)
        model.save_pretrained(folder / name)
        tokens = [
            model.generate(torch.tensor([p]), max_new_tokens=NEW, do_sample=False, eos_token_id=255)[
                0, len(p) :
            ].tolist()
            for p in prompts
        ]
        (folder / name / "tokens.json").write_text(json.dumps(tokens))


def engine(folder: Path, **more):
    from vllm import LLM

    return LLM(
        str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=128, max_num_seqs=8, max_num_batched_tokens=64,
        enable_chunked_prefill=True, enable_prefix_caching=True, **{"enforce_eager": True, **more},
    )  # fmt: skip


def check(folder: Path) -> int:
    from vllm import SamplingParams

    prompts = json.loads((folder / "prompts.json").read_text())
    options = SamplingParams(max_tokens=NEW, temperature=0.0, detokenize=False, stop_token_ids=[255], ignore_eos=True)
    wrong = 0
    for name in sys.argv[2:] or MODELS:
        expected = json.loads((folder / name / "tokens.json").read_text())
        answers = engine(folder / name).generate([{"prompt_token_ids": p} for p in prompts], options, use_tqdm=False)
        found = [list(answer.outputs[0].token_ids) for answer in answers]
        equal = sum(a == b for a, b in zip(found, expected, strict=True))
        print(f"{name}: {equal} of {len(prompts)} prompts equal", flush=True)
        wrong += equal < len(prompts)
    # an engine that was refused late leaves this process in disorder: the latest comes last
    for what, more in {
        "kv_cache_dtype: a cache of fp8": {"kv_cache_dtype": "fp8"},
        "speculative_config: speculative decoding": {
            "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
        },
    }.items():
        try:
            engine(folder / "softpick", **more)
            print(f"{what}: NOT REFUSED")
            wrong += 1
        except Exception as error:
            refused = what in str(error)
            print(f"{what}: {'refused' if refused else 'OTHER ERROR'}: {str(error).splitlines()[0][:200]}", flush=True)
            wrong += not refused
    return wrong


if __name__ == "__main__":
    if sys.argv[1] == "--make":
        make(Path(sys.argv[2]))
    else:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # errors of the engine reach the caller
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        sys.exit(check(Path(sys.argv[1])))
