"""Training: one loop trains the parameters, whatever the method.

objectives (rows → summed loss) ─► step (rows → gradients → parameters) ─► recover ─► loop (Trainer → Step)
way, passage (how rows go through the model)     state ─► checkpoint, rehearsal       log (metrics.jsonl, progress)
"""
