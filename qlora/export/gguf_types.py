"""The types that a GGUF file's weights may have, by the names that people ask for them with.

Knows llama.cpp's words; must not know a tensor, so that a slip is said before torch is imported.
"""

from __future__ import annotations

TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
BY_QUANTISER = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
"""What only llama.cpp's own program writes, out of a 16-bit file."""
