"""A tokenizer in GGUF: its tokens, their kinds, how they merge, and which of them begin and end a text.

    byte-level BPE              → "gpt2": merges, and the name of how text is cut before them
    BPE with byte fallback      → "llama": a score a token, which is the rank of its merge
    anything else, or unknown   → refused by name

llama.cpp cuts text by hand-written rules, one a family. Plain GPT-2's are known by the tokenizer's description, others as
llama.cpp's converter knows them: by the SHA-256 of what the tokenizer makes of one fixed text. Knows tokenizers alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from qlora.errors import ModelError

# llama.cpp's conversion/base.py, release of llama_cpp_python 0.3.36: the text, and the families that its models here have
PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 3 33 333 3333 33333 "
    "333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like "
    "some tea? We'Ve a'lL"
)
KINDS = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "d30d75d9059f1aa2c19359de71047b3ae408c70875e8a3ccf8c5fba56c9d8af4": "qwen35",
    "1444df51289cfa8063b96f0e62b1125440111bc79a52003ea14b6eac7016fd5f": "qwen35",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",
}
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def add_tokenizer(writer: Any, tokenizer: Any, size: int, ends: Sequence[int], template: str | None) -> None:
    """Write ``tokenizer`` with ``size`` tokens, as many as the embedding has rows, into a gguf.GGUFWriter.

    ``ends``: every token that ends an answer, of which GGUF names three. ``template``: the chat template. Raises ModelError
    for a kind of tokenizer that llama.cpp does not have.
    """
    import gguf

    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    kind = _kind(tokenizer, described)
    tokens, types = _tokens(tokenizer, model, size)
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    writer.add_tokenizer_model("llama" if kind is None else "gpt2")
    writer.add_tokenizer_pre("default" if kind is None else kind)
    writer.add_token_list(tokens)
    if kind is None:
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault("".join(pair), rank)
        # as SentencePiece scores its pieces: the earlier a merge, the higher
        writer.add_token_scores([-float(ranks.get(token, len(merges))) for token in tokens])
        writer.add_add_space_prefix(_prefixed(described))
    else:
        writer.add_token_merges([" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merges])
    writer.add_token_types(types)
    for name in ("bos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    own = tokenizer.eos_token_id
    ordered = [end for end in (own, *(end for end in ends if end != own)) if end is not None]
    add_eom = partial(writer.add_uint32, gguf.Keys.Tokenizer.EOM_ID)
    for token, add in zip(ordered, (writer.add_eos_token_id, writer.add_eot_token_id, add_eom), strict=False):
        add(token)
    around = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(around) and around[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(around) and around[-1] == own)
    if template is not None:
        writer.add_chat_template(template)


def require_known(tokenizer: Any) -> None:
    """Raise ModelError for a kind of tokenizer that llama.cpp does not have."""
    _kind(tokenizer, json.loads(tokenizer.backend_tokenizer.to_str()))


def _kind(tokenizer: Any, described: dict[str, Any]) -> str | None:
    """The name of llama.cpp's rules for cutting text, or None where SentencePiece's are meant."""
    model = described["model"]
    if model["type"] != "BPE":
        raise ModelError(
            f"GGUF is written for byte-level BPE and SentencePiece's BPE; this tokenizer is a {model['type']} of tokenizers."
        )
    if model.get("byte_fallback"):
        return None
    # what cuts as GPT-2's does by its own description needs no hash; nor would one tell it from SmolLM's, whose rule for
    # digits the fixed text does not show
    cut = described.get("pre_tokenizer") or {}
    if (
        cut.get("type") == "ByteLevel"
        and cut["use_regex"]
        and not cut["add_prefix_space"]
        and not described["normalizer"]
    ):
        return "gpt-2"
    found = hashlib.sha256(str(tokenizer.encode(PROBE)).encode()).hexdigest()
    if found not in KINDS:
        raise ModelError(
            f"llama.cpp's rules for this tokenizer are not known (a {type(tokenizer).__name__} of {len(tokenizer)} tokens, hash "
            f"{found[:12]}…): with others it would cut text differently from training. Export it merged, and try llama.cpp's "
            "own convert_hf_to_gguf.py on that."
        )
    return KINDS[found]


def _tokens(tokenizer: Any, model: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Each token's text and kind; rows of the embedding that have no token are named and unused."""
    from gguf import TokenType

    words = {number: word for word, number in tokenizer.get_vocab().items()}
    if words and max(words) >= size:
        raise ModelError(f"The tokenizer has the token {max(words)}, but the embedding has {size} rows.")
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(size):
        word = words.get(number)
        if word is None:
            word, kind = f"[PAD{number}]", TokenType.UNUSED
        elif number in added:
            special = added[number].special or _looks_special(word)
            kind = TokenType.CONTROL if special else TokenType.USER_DEFINED
            word = word if special else word.replace("▁", " ")
        else:
            kind = TokenType.BYTE if model.get("byte_fallback") and BYTE.fullmatch(word) else TokenType.NORMAL
        if model.get("byte_fallback") and word == model.get("unk_token"):
            kind = TokenType.UNKNOWN
        tokens.append(word)
        types.append(int(kind))
    return tokens, types


def _looks_special(word: str) -> bool:
    """Tokens that some tokenizers forget to mark, as llama.cpp's converter recognises them."""
    bars = any(word.startswith(f"<{bar}") and word.endswith(f"{bar}>") for bar in "|｜")
    unused = word.startswith("<unused") and word.endswith(">")
    return bars or unused or word in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


def _prefixed(described: dict[str, Any]) -> bool:
    """Whether a text begins with a space that it does not have, as SentencePiece's dummy prefix."""
    parts = [described.get("normalizer"), described.get("pre_tokenizer")]
    while parts:
        part = parts.pop() or {}
        parts += [*part.get("normalizers", []), *part.get("pretokenizers", [])]
        if part.get("type") == "Prepend" or part.get("prepend_scheme") in ("first", "always"):
            return True
    return False
