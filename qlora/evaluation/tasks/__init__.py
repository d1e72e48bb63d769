"""Tasks: items that a model is scored on, by one small definition each.

    section (recipe) ─► records ─► Task: its kind, and of each item what is asked ─► score ─► Result ─► difference

    task = open_task(TaskSection(name="hellaswag", data="hellaswag.jsonl", limit=300), base.tokenizer)
    with model.disabled():
        base = score(model, task)
    trained = score(model, task, kept=Path("hellaswag.jsonl"))        # goes on there where it was stopped
    trained.metrics["accuracy"]                                       # Metric(value, error, chance, better)
    difference(trained, base)["accuracy"]                             # Paired(value, error, items): item by item
    Result.from_dict(trained.as_dict()) == trained                    # plain JSON there and back

A kind of task (``choice.py``, …) says what of a record is asked, what each item scores, and what all items come to. Nothing
here holds full logits (``evaluation/likelihood.py``).
"""
