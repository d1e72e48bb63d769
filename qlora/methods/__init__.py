"""How trainable parameters are planted in a frozen base, and how an adapter looks on disk and in merged weights.

targets ─→ method, layout, merge ─→ lora, … ─→ base (METHODS, AdaptedModel) ─→ files
which      what all answer to       a file each    the model with methods in it      PEFT's layout
                                                                                       │
                                        switching (Adapters: several on one base) ←────┴──→ combining (several become one)
"""
