"""Peak memory of ``softpick analyze`` on a model of 32 layers and 32 heads at T = 4096: at most 8 GB besides the weights.

    python benchmarks/audit_memory.py [--layers 32] [--heads 32] [--length 4096] [--implementation sdpa] [--knockout]
    python benchmarks/audit_memory.py --device cuda --dtype bfloat16 --layers 16 --heads 32 --key-heads 8 --head-dim 64 \\
        --vocabulary 128256 --length 32768 --knockout

The model has random weights and a small width (its attention maps are as large as a 7B model's: 32 x 32 x 4096 x 4096 x 4
bytes = 69 GB in fp32). It is measured in a process of its own, whose peak resident memory the kernel reports; subtracted
is what the process held before, with torch, transformers and the weights loaded.

The second line is a model of the shape of Llama 3.2 1B on a GPU, where all that torch allocated counts, weights too: at
most 24 GB.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_GB = {"cpu": 8.0, "cuda": 24.0}


def measure(args: argparse.Namespace) -> None:
    """In the child: load, note the memory, measure, print both."""
    import torch
    import transformers

    from softpick.analysis import measure as measure_model
    from softpick.analysis.knockout import knockout
    from softpick.experiment.environment import peak_resident
    from softpick.experiment.models import Subject
    from softpick.experiment.progress import Silent
    from softpick.integrations.transformers import register

    register()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.heads * args.head_dim,
        intermediate_size=2 * args.heads * args.head_dim,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.key_heads or args.heads,
        max_position_embeddings=args.length,
        initializer_range=0.1,
        bos_token_id=0,
        pad_token_id=None,
    )
    model = transformers.LlamaForCausalLM._from_config(
        config, attn_implementation=args.implementation, dtype=getattr(torch, args.dtype)
    )
    model = model.eval().to(args.device)
    ids = torch.randint(1, 512, (args.samples, args.length))
    ids[:, 0] = 0
    model(ids[:1, :16].to(args.device))  # libraries make their buffers
    before = 0 if args.device == "cuda" else peak_resident()
    start = time.perf_counter()
    found = measure_model(model, [{"input_ids": ids}], bos_policy="bos", largest_score=True)
    seconds = time.perf_counter() - start
    if args.knockout:
        first = torch.zeros(len(ids), dtype=torch.long)
        knockout(Subject("model", model, None, True), [ids], first, 1, Silent(), "")
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else peak_resident()
    row = {
        "layers": args.layers,
        "heads": args.heads,
        "length": args.length,
        "samples": args.samples,
        "implementation": args.implementation,
        "knockout": args.knockout,
        "maps_gb": args.samples * args.layers * args.heads * args.length**2 * 4 / 1e9,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "before_gb": before / 1e9,
        "peak_gb": peak / 1e9,
        "extra_gb": (peak - before) / 1e9,
        "seconds": seconds,
        "row_mass": found.rows["mass"],
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}",
        "threads": torch.get_num_threads(),
    }
    Path(args.result).write_text(json.dumps(row))


def run(*options: str) -> dict:
    """One measurement in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        subprocess.run([sys.executable, __file__, *options, "--result", str(result)], check=True)
        return json.loads(result.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-heads", type=int, default=0, help="grouped queries; 0: as many as heads")
    parser.add_argument("--head-dim", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--device", choices=sorted(LIMIT_GB), default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--implementation", default="sdpa")
    parser.add_argument("--knockout", action="store_true", help="the three forward passes of a knockout as well")
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.result:
        measure(args)
        return
    row = run(*sys.argv[1:])
    print(json.dumps(row, indent=1))
    if row["extra_gb"] > LIMIT_GB[args.device]:
        sys.exit(f"{row['extra_gb']:.2f} GB are more than {LIMIT_GB[args.device]:g} GB")


if __name__ == "__main__":
    main()
