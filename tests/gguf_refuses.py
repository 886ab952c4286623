"""Models of ours in llama.cpp's converter: refused, and their softmax twin converted: ``make gguf-test``.

The converter is a script of llama.cpp's repository. Its one way to an index is the source distribution of llama-cpp-python
(77 MB), which has it and is not built here.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from environments import HOME

PACKAGE = "llama-cpp-python==0.3.36"
PARTS = ("convert_hf_to_gguf.py", "conversion", "gguf-py")


def converter() -> Path:
    """The script, with what it imports."""
    folder = HOME / PACKAGE.replace("==", "-")
    if not (folder / PARTS[0]).exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
        with tempfile.TemporaryDirectory() as place:
            subprocess.run([*pip, "--dest", place, PACKAGE], check=True, stderr=subprocess.DEVNULL)
            with tarfile.open(next(Path(place).iterdir())) as archive:
                for member in archive.getmembers():
                    member.name = member.name.partition("/vendor/llama.cpp/")[2]
                    if member.name.split("/")[0] in PARTS:
                        archive.extract(member, folder, filter="data")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "packages")]
        subprocess.run([*pip, "sentencepiece"], check=True, stderr=subprocess.DEVNULL)
    return folder / PARTS[0]


def tokenizer(folder: Path) -> None:
    """Bytes alone, in the form that the converter knows of Llama 2."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    model = models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    made = Tokenizer(model)
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)


def make(folder: Path) -> dict[str, bool]:
    """Saved models, and whether each may be converted."""
    import transformers

    from softpick.integrations.transformers import SoftpickLlamaConfig, SoftpickLlamaForCausalLM

    sizes = {
        "vocab_size": 259, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    text = transformers.LlamaConfig(**sizes, architectures=["LlamaForCausalLM"])
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    both = transformers.LlavaConfig(vision_config=transformers.CLIPVisionConfig(**vision), text_config=text)
    llava = transformers.LlavaForConditionalGeneration

    def llama(name: str) -> transformers.PreTrainedModel:
        return transformers.LlamaForCausalLM._from_config(transformers.LlamaConfig(**sizes), attn_implementation=name)

    models = {
        "softmax": llama("sdpa"),
        "softpick": llama("softpick"),
        "relu_softpick": llama("relu_softpick"),
        "softpick_llama": SoftpickLlamaForCausalLM(SoftpickLlamaConfig(normalizer="softpick", **sizes)),
        "part": llava._from_config(both, attn_implementation={"text_config": "softpick", "vision_config": "sdpa"}),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer(folder / name)
    models["softpick"].set_attn_implementation("sdpa")
    models["softpick"].save_pretrained(folder / "switched back")
    tokenizer(folder / "switched back")
    return {name: False for name in models} | {"softmax": True, "switched back": True}


def main() -> int:
    script, wrong = converter(), 0
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environ["PYTHONPATH"] = os.pathsep.join([str(script.with_name("packages")), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as place:
        for name, allowed in make(Path(place)).items():
            out = Path(place, f"{name}.gguf")
            command = [sys.executable, str(script), str(Path(place, name)), "--outfile", str(out), "--outtype", "f32"]
            done = subprocess.run(command, env=environ, capture_output=True, text=True)
            last = (done.stderr.strip().splitlines() or [""])[-1]
            # refused means: for its architecture, not for anything else
            refused = done.returncode and not out.exists() and "is not supported" in last
            right = (done.returncode == 0 and out.exists()) if allowed else refused
            wrong += not right
            print(f"{name}: {'as it should be' if right else 'WRONG'}: {last}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
