"""Tokens a second of transformers' continuous batching, softpick beside torch's softmax in the same engine.

    python benchmarks/serving.py [--device cpu] [--model small] [--requests 64] [--new 128] [--output benchmarks/results]

Prompts have 16 to 512 tokens, answers 128; all requests are there from the start. Weights are random and the same for both.
The correctness gate runs first, in fp32: requests must get the tokens that ``generate`` gives to each alone. (On a GPU sums in
another order may choose another token even so; there 0.9 of the tokens must be equal. In bf16, with random weights, the best
two tokens are often a rounding apart: the share of equal tokens is then 0.4 for softmax, too.) The engine is made once for each
contestant and warmed by a few requests; then contestants alternate, and the best of the repetitions counts. On a shared CPU
only the ratio means anything.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LlamaConfig

import softpick
import softpick.integrations.transformers

MODELS = {
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 4096},
    # 1.2B parameters: the sizes of Llama 3.2 1B
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
}  # fmt: skip


def make(kind: str, name: str, device: str, dtype: torch.dtype):
    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[kind], max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=dtype).eval()


def run(manager, prompts, new: int) -> tuple[float, list[list[int]]]:
    """Seconds until all requests are answered, and the answers."""
    start = time.perf_counter()
    names = manager.add_requests(prompts, max_new_tokens=new)
    found = {}
    while len(found) < len(names):
        result = manager.get_result(timeout=1)
        if result is None and not manager.is_running():
            raise RuntimeError(f"the engine stopped: {manager.background_thread_status.fatal_error}")
        if result is not None and result.is_finished():
            assert result.error is None, result.error
            found[result.request_id] = result.generated_tokens
    return time.perf_counter() - start, [found[name] for name in names]


def gate(model, manager, prompts, least: float) -> float:
    """The share of tokens that are those of ``generate``; raises where it is below ``least``."""
    _, answers = run(manager, prompts, 16)
    equal = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt], device=model.device)
        alone = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=-1, pad_token_id=0)[
            0, len(prompt) :
        ].tolist()
        equal += [a == b for a, b in zip(answer, alone, strict=True)]
    share = sum(equal) / len(equal)
    if share < least:
        raise SystemExit(f"{model.config._attn_implementation}: {share:.3f} of the tokens are those of generate")
    return share


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="small", choices=MODELS)
    parser.add_argument("--normalizer", default="softpick")
    parser.add_argument("--against", default="sdpa", help="sdpa, or flash_attention_2 or _3 where it is installed")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--block-table", type=int, choices=(0, 1), default=1, help="0: decode without the block table")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(16, 512, options.requests).long()[torch.randperm(options.requests, generator=generator)]
    vocabulary = MODELS[options.model]["vocab_size"]
    prompts = [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    config = GenerationConfig(do_sample=False, eos_token_id=vocabulary - 1, pad_token_id=0, max_new_tokens=options.new)
    config.eos_token_id = -1  # answers have the length that was asked for
    pages = -(-options.requests * (512 + options.new) // 256) + 2 * options.requests
    managers, shares, seconds = {}, {}, {}
    start = time.perf_counter()

    def engine(name: str, dtype: torch.dtype):
        model = make(options.model, name, options.device, dtype)
        blocks = 0 if name == options.normalizer and not options.block_table else None
        batching = ContinuousBatchingConfig(
            num_blocks=pages, max_batch_tokens=2048, auto_switch_to_flash=False, max_blocks_per_request=blocks
        )
        with torch.no_grad():
            manager = model.init_continuous_batching(config, continuous_batching_config=batching)
            manager.warmup()
            manager.start()
        return model, manager

    def report(text: str) -> None:
        print(f"{time.perf_counter() - start:6.1f} s  {text}", flush=True)

    short = sorted(prompts, key=len)[:: max(1, len(prompts) // 4)][:4]
    try:
        for name in (options.normalizer, options.against):
            model, managers[name] = engine(name, torch.float32)
            shares[name] = gate(model, managers[name], short, 0.9 if options.device == "cuda" else 1.0)
            report(f"{name}: {shares[name]:.3f} of the tokens are those of generate")
            if dtype != torch.float32:
                managers.pop(name).stop(hard_stop=True)
                _, managers[name] = engine(name, dtype)
                run(managers[name], short, 16)
            seconds[name] = []
        for _ in range(options.repetitions):
            for name, manager in managers.items():
                seconds[name].append(run(manager, prompts, options.new)[0])
                report(f"{name}: {seconds[name][-1]:.2f} s")
    finally:  # the threads of the engines would keep the process
        for manager in managers.values():
            manager.stop(hard_stop=True)
    rate = {name: options.requests * options.new / min(times) for name, times in seconds.items()}
    ours, theirs = rate[options.normalizer], rate[options.against]
    machine = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    row = {
        "normalizer": options.normalizer, "against": options.against, "model": options.model, "device": machine,
        "dtype": str(dtype).removeprefix("torch."), "block_table": options.block_table, "requests": options.requests,
        "new": options.new, "ours_tokens_per_s": round(ours, 1), "theirs_tokens_per_s": round(theirs, 1),
        "ratio": round(ours / theirs, 3), "equal_ours": round(shares[options.normalizer], 3),
        "equal_theirs": round(shares[options.against], 3), "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(), "torch": torch.__version__, "transformers": transformers.__version__,
        "softpick": softpick.__version__,
    }  # fmt: skip
    print("\n".join(f"{key}: {value}" for key, value in row.items()))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        file = options.output / "serving.csv"
        new = not file.exists()
        with file.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, row)
            if new:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
