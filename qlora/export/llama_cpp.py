"""llama.cpp's own library through its C interface: tokens, logits and LoRA of a GGUF file.

``QLORA_LLAMA_CPP`` names the folder with its ``libllama.so``. Parameters go as bytes of more than the length that any release
has, as x86-64 allows; those set here lie at the front, and their defaults are checked first. Knows files and the library alone.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

from qlora.errors import DiffersError, RunError

FOLDER = Path(os.environ.get("QLORA_LLAMA_CPP", "/nonexistent"))
LIBRARY = next(iter(sorted(FOLDER.glob("libllama.*so*")) + sorted(FOLDER.glob("libllama.so"))), None)
MISSING = (
    ""
    if LIBRARY and platform.machine() == "x86_64"
    else "QLORA_LLAMA_CPP names no folder with llama.cpp's library (x86-64)"
)


class _Params(ctypes.Structure):
    _fields_ = (("words", ctypes.c_uint32 * 128),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32), ("token", ctypes.POINTER(ctypes.c_int32)), ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)), ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))), ("logits", ctypes.POINTER(ctypes.c_int8)),
    )  # fmt: skip


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SAID: list[str] = []
_TAKE = _LOG(lambda level, text, _: _SAID.append((text or b"").decode(errors="replace")))


def _library() -> Any:
    if MISSING:
        raise RunError(f"llama.cpp cannot open it here: {MISSING}.")
    for name in ("libggml-base", "libggml.", "libggml-cpu-x64"):
        for path in FOLDER.glob(f"{name}*so"):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    ggml = ctypes.CDLL(str(next(FOLDER.glob("libggml.*so"))), mode=ctypes.RTLD_GLOBAL)
    lib = ctypes.CDLL(str(LIBRARY), mode=ctypes.RTLD_GLOBAL)
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("llama_model_default_params", _Params, []), ("llama_context_default_params", _Params, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Params]), ("llama_init_from_model", pointer, [pointer, _Params]),
        ("llama_model_get_vocab", pointer, [pointer]), ("llama_get_logits", ctypes.POINTER(ctypes.c_float), [pointer]),
        ("llama_tokenize", ctypes.c_int32, [pointer, ctypes.c_char_p, ctypes.c_int32, pointer, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool]),
        ("llama_vocab_n_tokens", ctypes.c_int32, [pointer]), ("llama_vocab_is_eog", ctypes.c_bool, [pointer, ctypes.c_int32]),
        ("llama_batch_init", _Batch, [ctypes.c_int32] * 3), ("llama_batch_free", None, [_Batch]),
        ("llama_decode", ctypes.c_int32, [pointer, _Batch]), ("llama_free", None, [pointer]), ("llama_model_free", None, [pointer]),
        ("llama_log_set", None, [_LOG, pointer]), ("llama_adapter_lora_init", pointer, [pointer, ctypes.c_char_p]),
        ("llama_set_adapters_lora", ctypes.c_int32, [pointer, pointer, ctypes.c_size_t, pointer]),
        ("llama_get_memory", pointer, [pointer]), ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
    ):  # fmt: skip
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(_TAKE, None)
    ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
    ggml.ggml_backend_load_all_from_path(str(FOLDER).encode())
    lib.llama_backend_init()
    return lib


def _reason() -> str:
    """Of what it said last, the lines that name an error."""
    lines = "".join(_SAID).splitlines()
    return (
        " ".join([line for line in lines if "error" in line or "fail" in line][-3:] or lines[-1:])
        or "it gave no reason"
    )


class LlamaCpp:
    """A GGUF file open in llama.cpp on one thread, with a cache of keys and values in fp32."""

    lib: Any = None

    def __init__(self, file: Path, lora: Path | None = None, context: int = 512) -> None:
        if LlamaCpp.lib is None:
            LlamaCpp.lib = _library()
        lib = self.lib
        _SAID.clear()
        self.model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
        if not self.model:
            raise DiffersError(f"llama.cpp does not open '{file}': {_reason()}")
        self.vocab = lib.llama_model_get_vocab(self.model)
        params = lib.llama_context_default_params()
        words = params.words
        threads = next((n for n in range(5, 9) if words[n] == words[n + 1] and 0 < words[n] < 256), 5)
        attention = threads + 6  # after the kinds of context, rope scaling, pooling and attention
        keys = next((n for n in range(attention + 8, 40) if (words[n], words[n + 1]) == (1, 1)), 0)
        if (*words[:3], words[attention]) != (512, 2048, 512, 0xFFFFFFFF) or not keys:
            raise RunError(f"'{LIBRARY}' is a release of llama.cpp whose parameters lie otherwise than is known here.")
        words[0], words[1], words[2] = context, max(words[1], context), max(words[2], context)
        words[threads] = words[threads + 1] = 1
        words[attention] = 0  # no fused attention, which rounds to 16 bits
        words[keys] = words[keys + 1] = 0
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise DiffersError(f"llama.cpp does not open '{file}': {_reason()}")
        if lora is not None:
            adapter = lib.llama_adapter_lora_init(self.model, str(lora).encode())
            array, scale = (ctypes.c_void_p * 1)(adapter), (ctypes.c_float * 1)(1.0)
            if not adapter or lib.llama_set_adapters_lora(self.context, array, 1, scale):
                raise DiffersError(f"llama.cpp does not take '{lora}': {_reason()}")
        self.place = 0

    def tokens(self, text: str) -> list[int]:
        """The ids of ``text``, with what the model begins texts with, special tokens read as such."""
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 16))()
        count = self.lib.llama_tokenize(self.vocab, raw, len(raw), room, len(room), True, True)
        if count < 0:
            raise RunError("llama.cpp did not cut the text into tokens.")
        return list(room[:count])

    def ends(self, token: int) -> bool:
        return bool(self.lib.llama_vocab_is_eog(self.vocab, token))

    def logits(self, ids: list[int]) -> np.ndarray:
        """[T, V] in fp32 of the next ``ids``."""
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        for n, token in enumerate(ids):
            batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.logits[n] = token, self.place + n, 1, 1
            batch.seq_id[n][0] = 0
        batch.n_tokens = len(ids)
        if self.lib.llama_decode(self.context, batch):
            raise RunError(f"llama.cpp did not compute {len(ids)} tokens: {_reason()}")
        self.place += len(ids)
        width = self.lib.llama_vocab_n_tokens(self.vocab)
        found = np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), (len(ids), width)).copy()
        self.lib.llama_batch_free(batch)
        return found

    def begin(self) -> None:
        """Forget what was read."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self.place = 0

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)
