"""Data: files become rows of tokens.

    sources     files, hub data sets                  → records              (read_records)
    parsing     records, by formats or detection      → conversations, texts (parse)
    split       records, or pieces of few texts       → train, held out      (split_records, split_pieces)
    dialect     conversations                         → the template's words (Dialect.speak)
    chat        conversations                         → ids + mask           (ChatTemplate.encode)
    examples    texts → pieces; every example         → at most max_length   (text_examples, fit)
    lengths     numbers of tokens                     → what is too long     (too_long_note, require_positions)
    packing     examples                              → rows                 (make_rows)
    batches     rows, step number                     → tensors              (step_rows, collate)

``load_data`` runs them in this order (pieces are drawn once the texts are cut) and returns ``Data``: rows to train on, rows
held out, and a report in which every token is accounted for. This room knows tokenizers; it must not know a model or a method.
"""
