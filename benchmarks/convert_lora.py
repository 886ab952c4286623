"""What adapters of low rank (LoRA, by the library peft) do in the place of stages 1 and 2 of ``softpick convert``.

    python benchmarks/convert_lora.py MODEL --validation-data docs/ [--data TEXT] [--rank 16] [--steps 100]

The model gets the normalizer at once, and adapters on the projections of its attention layers (``--everywhere``: of all linear
layers but the head). They alone are trained, on the KL divergence of the logits from the teacher's, as in stage 2. Batches and
held-out sequences are those of the recipe ``quick_cpu``. Prints the held-out loss of the teacher, of the model that was not
trained, and every tenth of the steps.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from peft import LoraConfig, get_peft_model

from softpick.conversion.models import attention_layers, load_teacher, make_student
from softpick.conversion.recipes import ConvertSettings
from softpick.conversion.stages import divergence
from softpick.experiment.corpus import get_corpus
from softpick.experiment.environment import hardware, versions
from softpick.experiment.perplexity import perplexity
from softpick.experiment.progress import Silent
from softpick.experiment.reading import read_corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--normalizer", default="softpick")
    parser.add_argument("--data", help="text (default: sources of the Python standard library)")
    parser.add_argument("--validation-data", required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--everywhere", action="store_true", help="adapters on all linear layers")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    settings = ConvertSettings.of_recipe(options.model, normalizer=options.normalizer, device=options.device)
    torch.manual_seed(settings.seed)
    subject = load_teacher(settings, Silent(), settings.device)
    teacher = subject.model
    layers = attention_layers(teacher)
    student = make_student(teacher, layers, settings.normalizer)
    inside = tuple(f"{name}." for name in layers)
    targets = [
        name
        for name, module in student.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module is not student.get_output_embeddings()
        and (options.everywhere or name.startswith(inside))
    ]
    rows, length = settings.distil_batch_size, settings.distil_sequence_length
    documents = get_corpus(options.data, characters=8 * rows * length * options.steps)
    batches = subject.sequences(documents, rows * options.steps, length).split(rows)
    held = subject.sequences(read_corpus(options.validation_data), settings.validation_sequences, length)

    def loss(model: torch.nn.Module) -> float:
        return math.log(perplexity(model, held, batch_size=4))

    print(f"{len(held)} held-out sequences of {length}; teacher {loss(teacher):.4f}, not trained {loss(student):.4f}")
    adapted = get_peft_model(student, LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=targets))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    print(
        f"{len(targets)} adapters of rank {options.rank}: {sum(p.numel() for p in trained) / 1e6:.2f} million parameters"
    )
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps, 0.1 * options.learning_rate)
    begin = time.monotonic()
    for step in range(1, options.steps + 1):
        tokens = batches[(step - 1) % len(batches)].to(settings.device)
        with torch.no_grad():
            theirs = teacher(input_ids=tokens, use_cache=False).logits
        found = divergence(adapted(input_ids=tokens, use_cache=False).logits, theirs)
        found.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % max(1, options.steps // 10) == 0:
            spent = time.monotonic() - begin
            print(
                f"step {step}: divergence {found.item():.3f}, held-out loss {loss(adapted):.4f}, {spent:.0f} s",
                flush=True,
            )
    print(f"{versions('peft')}; {hardware(settings.device)}; {time.strftime('%Y-%m-%d')}")


if __name__ == "__main__":
    main()
