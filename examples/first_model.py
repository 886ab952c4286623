"""A model with softpick in ten minutes: train a small Llama, look at its attention, save it, load it, generate.

Run: ``python examples/first_model.py`` (about a minute on one core; ``--steps 20`` for a quick look).
Needs: ``pip install '.[compare]'``. Nothing is downloaded: the text is the Python standard library's source code.
"""

import argparse
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import softpick.integrations.transformers  # registers every normalizer as an attn_implementation
from softpick.training.data import get_corpus, make_sequences, train_tokenizer

arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("--steps", type=int, default=300)
arguments.add_argument("--normalizer", default="softpick", help="`softpick normalizers` lists the names")
options = arguments.parse_args()
torch.manual_seed(0)

# 1. Text, a tokenizer trained on it, and sequences of 64 tokens that start with <bos>.
documents = get_corpus(None, characters=2_000_000).documents
tokenizer = train_tokenizer(documents, vocab_size=512)
sequences = make_sequences(tokenizer, documents, length=64)
print(f"{len(sequences)} sequences of {sequences.shape[1]} tokens")

# 2. Any transformers model; one argument chooses the attention.
config = LlamaConfig(
    vocab_size=len(tokenizer),
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
)
model = AutoModelForCausalLM.from_config(config, attn_implementation=options.normalizer)

# 3. Train as usual.
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=options.steps)
for step in range(options.steps):
    batch = sequences[torch.randint(len(sequences), (32,))]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 50 == 0 or step == options.steps - 1:
        print(f"step {step}: loss {loss.item():.3f}")

# 4. Look at the attention weights: rows need not sum to one, and most weights are exactly zero.
model.eval()
with torch.no_grad():
    weights = torch.stack(model(input_ids=sequences[:8], output_attentions=True).attentions)
visible = torch.ones(64, 64, dtype=torch.bool).tril().expand_as(weights)
print(f"exact zeros among visible weights: {(weights[visible] == 0).double().mean():.1%}")
print(f"mean sum of a row: {weights.sum(-1).mean():.3f}")
print(f"mean weight on <bos>: {weights[..., 0].mean():.3f}")

# 5. Save, load and generate. The checkpoint remembers its attention.
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert softpick.integrations.transformers.normalizer_of(loaded) == options.normalizer
    prompt = AutoTokenizer.from_pretrained(folder)("def ", return_tensors="pt")
    prompt.pop("token_type_ids", None)
    print(tokenizer.decode(loaded.generate(**prompt, max_new_tokens=40, do_sample=False)[0]))
