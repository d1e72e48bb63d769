"""The tokenizer of a checkpoint, which of its tokens pads a batch, and how tokens are added to a copy of it.

Knows transformers' tokenizers; must not know chat templates, data or embeddings.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora.errors import MethodError, ModelError, first_line, listed
from qlora.model.checkpoint import MAX_TOKENIZER, read_json
from qlora.model.foreign_code import refuse_foreign_tokenizer, say_foreign_code
from qlora.recipe import AnyMethod, parts_of

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json", "*.tiktoken")
TEMPLATE = "chat_template.jinja"  # beside them: the chat template, as transformers keeps it
# Tokens that model makers reserve for padding, or for nothing, by their names in Llama, Gemma, Mistral, Phi and Qwen.
RESERVED = (
    "<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<unused0>",
    "<|placeholder1|>", "<|dummy_0|>", "<|vision_pad|>", "<|endoftext|>",
)  # fmt: skip


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, always with a padding token.

    Where the checkpoint names no padding token, one that it reserves becomes it, else the end-of-sequence token. That is
    safe here: masks come from positions, so a pad that equals the end token hides nothing, and no token is ever added,
    so no embedding is resized. Raises ModelError for missing or damaged tokenizer files.
    """
    found = [path for pattern in FILES for path in folder.glob(pattern)]
    if not found:
        raise ModelError(f"'{folder}' has no tokenizer; expected {', '.join(FILES[:-1])} or {FILES[-1]} in it.")
    for path in {*found, *folder.glob("*.json"), *folder.glob("*.jinja")}:
        if not path.is_file() or path.stat().st_size > MAX_TOKENIZER:
            raise ModelError(
                f"'{path}' is no file of at most {MAX_TOKENIZER:,} bytes; fetch the tokenizer's files again."
            )
    if trust_remote_code:
        say_foreign_code(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except BaseException as error:  # the tokenizers library raises bare Exception over a damaged file, or panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's, no Exception either
            raise
        if not trust_remote_code:  # transformers asks for code only where it has no class of its own
            refuse_foreign_tokenizer(folder)
        raise ModelError(
            f"The tokenizer in '{folder}' cannot be loaded: {first_line(error)}. Fetch its files again."
        ) from error
    if len(tokenizer) == 0:
        raise ModelError(f"The tokenizer in '{folder}' has an empty vocabulary; fetch its files again.")
    _choose_padding(tokenizer, _rows(folder))
    return tokenizer


def with_new_tokens(tokenizer: PreTrainedTokenizerBase, method: AnyMethod) -> PreTrainedTokenizerBase:
    """``tokenizer``, or a copy with the tokens that a recipe's ``method`` section adds (its part ``new_tokens``).

    A token that the tokenizer has already keeps its id; whether it may is for the method to say, which knows the model.
    """
    for part in parts_of(method):
        if part.name == "new_tokens":
            tokenizer = add_tokens(tokenizer, part.tokens, part.special)
    return tokenizer


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], special: bool) -> PreTrainedTokenizerBase:
    """A copy of ``tokenizer`` that reads each of ``tokens`` as one token, with the next free ids in their order.

    ``special`` tokens are left out where special tokens are skipped. Raises MethodError where the tokenizer gives a new
    token no id of its own, or still splits it.
    """
    before = tokenizer.get_vocab()
    taken = set(before.values())
    made = copy.deepcopy(tokenizer)
    made.add_tokens([AddedToken(token, normalized=False) for token in tokens], special_tokens=special)
    after = made.get_vocab()
    wrong = [
        token
        for token in tokens
        if token not in after
        or (token not in before and after[token] in taken)
        or made(token, add_special_tokens=False)["input_ids"] != [after[token]]
    ]
    if wrong:
        raise MethodError(
            f"The tokenizer cannot be taught {listed([repr(token) for token in wrong])} as single tokens; choose other texts, "
            "such as <|tool|>, without space around them."
        )
    return made


def _rows(folder: Path) -> int | None:
    """How many embeddings the model has, where its configuration says so."""
    if not (folder / "config.json").is_file():
        return None
    values = read_json(folder, "config.json", "a configuration")
    inside = values.get("text_config")
    size = values.get("vocab_size") or (inside.get("vocab_size") if isinstance(inside, dict) else None)
    return size if isinstance(size, int) else None


def _choose_padding(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> None:
    def usable(number: int | None) -> bool:
        return number is not None and (rows is None or number < rows)

    if tokenizer.pad_token is not None and usable(tokenizer.pad_token_id):
        return
    vocabulary = tokenizer.get_vocab()
    wishes = [*RESERVED, tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token]
    found = [token for token in wishes if token is not None and usable(vocabulary.get(token))]
    tokenizer.pad_token = found[0] if found else tokenizer.convert_ids_to_tokens(0)
