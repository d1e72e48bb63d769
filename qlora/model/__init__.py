"""A checkpoint on disk becomes a frozen base model.

hub (a name) ─► checkpoint (its files) ─► skeleton (an empty model) ─► load (filled, quantised, frozen) ─► base
                    │    │                    │          │
                    │    config       names, towers      nf4 (the linears), anatomy (where the family's parts are)
                    tokenizer
a module of yours ─► in_memory (quantised, as it is) ────────────────────────────────────────────────────► base

What stays on the device while training, and what does not, is the room above: ``residence``.
"""
