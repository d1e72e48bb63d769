"""QLoRA from top to bottom: one flat script on qlora's parts, with nothing hidden in a function.

    python -m qlora.quickstart
    python recipes/flat.py training.steps=20 method.r=8

Trains the quickstart.yaml of this folder, with any value of it given as section.key=value, and leaves an adapter and a merged
model in runs/flat. `qlora train` does the same with checkpoints, metrics and a report around it. Copy it and change it.
"""

import sys
from pathlib import Path

import qlora
from qlora.evaluation.score import score
from qlora.export.merged import merge
from qlora.machine.device import dtype_name, resolve_device

# What is wanted: every field is in docs/recipe.md; the last override of a field counts.
recipe = qlora.Recipe.from_yaml("quickstart.yaml", "folder=runs/flat", *sys.argv[1:])
seed, folder = recipe.training.seed, Path(str(recipe.folder))

# The base, frozen in 4 bits; then the adapter beside its linears: the only parameters that train.
base = qlora.load_base(recipe.model, resolve_device(recipe.device.name), progress=True)
model = qlora.apply_method(base, recipe.method, seed)
print(f"{model.count_trainable():,} trainable parameters on {model.device} in {dtype_name(base.compute_dtype)}")

# The data, as rows of tokens. Look at one example: only what stands in ⟦…⟧ is trained on.
data = qlora.load_data(recipe.data, base.tokenizer, seed)
print(data.report, data.preview(0), sep="\n")
before = score(model, data.held_out)

# Training. The loop is yours: measure, print or stop wherever you like.
trainer = qlora.Trainer(model, data, recipe.training)
for step in trainer:
    print(step)

# What it brought: the held-out loss, and a question that was never trained on.
after = score(model, data.held_out)
print(f"held-out loss {before.loss:.4f} before, {after.loss:.4f} after, over {after.target_tokens} tokens")
for prompt in data.held_out_prompts(1):
    print(f"? {prompt.text}\n  expected: {prompt.answer}\n  answered: {qlora.answer(model, prompt.ids, 48)}")

# The adapter for PEFT, and the whole as a plain 16-bit model, tensor by tensor: base weights as quantised + adapter.
qlora.save_adapter(model, folder / "adapter")
held = {"quantization": base.quantization, "double_quant": base.double_quant}
dtype = dtype_name(base.compute_dtype)
merged = merge(base.folder, folder / "adapter", folder / "merged", **held, compute_dtype=dtype, overwrite=True)
print(f"adapter {folder / 'adapter'}, merged model {merged.folder}")
