"""llama.cpp opens what is exported and computes what was trained. Skipped where its library is not (``make test-programs``)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.cli import main
from qlora.export import gguf_tokenizer, llama_cpp
from qlora.export.gguf import export_gguf, export_gguf_adapter
from qlora.export.merged import merge
from qlora.machine.disk import cache_folder
from qlora.methods.base import apply_method
from qlora.methods.files import save_adapter
from qlora.model.checkpoint import Checkpoint
from qlora.recipe import DEFAULT_MODEL, LoRA, ModelSection
from qlora.residence.load import load_base
from tests.export.gguf_models import FAMILIES, checkpoint, sentencepiece_like, trained
from tests.rounding import difference
from tests.tiny import WORDS, stir, tiny_values

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(llama_cpp.MISSING), reason=llama_cpp.MISSING)]

# llama.cpp keeps windows, rotary angles and normalisations in fp32 as we do, but sums in its own order and takes exp and
# gelu from tables of 16 bits where it has them: a wrong permutation or a lost factor is off by 0.1 and more
CLOSE = 5e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_adapter_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    # transformers makes byte-level tokenizers of some families' files; ids are given here, so any rules for text will do
    monkeypatch.setattr(gguf_tokenizer, "_kind", lambda tokenizer, described: None)
    base = checkpoint(tmp_path / "base", family)
    model = trained(base, tmp_path / "adapter")
    section = ModelSection(name=str(base), quantization="none", compute_dtype="fp32")
    written = export_gguf(base, tmp_path / "adapter", tmp_path / "gguf", section=section, type="f32")
    ids = [1, *(n * 7 % 250 + 3 for n in range(23))]
    with torch.no_grad():
        expected = model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
        with model.disabled():
            bare = model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    opened = llama_cpp.LlamaCpp(written.file, context=64)
    worst = difference(torch.from_numpy(opened.logits(ids)), expected)
    opened.close()
    print(f"{family}: {worst:.1e}, without its adapter {difference(bare, expected):.1e}")
    assert worst < CLOSE
    assert difference(bare, expected) > 10 * CLOSE
    if family in ("llama", "qwen2", "qwen3.5", "mistral"):
        lora = export_gguf_adapter(section, Checkpoint(base, "base"), tmp_path / "adapter", tmp_path / "lora")
        plain = trained(base, tmp_path / "zero")
        for name, values in plain.trainable_parameters().items():
            if "lora_B" in name:
                values.data.zero_()
        save_adapter(plain, tmp_path / "zero")
        bare_file = export_gguf(base, tmp_path / "zero", tmp_path / "bare", section=section, type="f32").file
        opened = llama_cpp.LlamaCpp(bare_file, lora=lora.file, context=64)
        assert difference(torch.from_numpy(opened.logits(ids)), expected) < CLOSE
        opened.close()


TEXTS = ["the and in or", "hello  world", " the", "tthe", "日本語 🚀", "a\n\tb", "", "the</s>and"]


def test_sentencepiece_tokens(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", "llama")
    trained(base, tmp_path / "adapter")
    section = ModelSection(name=str(base), quantization="none", compute_dtype="fp32")
    opened = llama_cpp.LlamaCpp(
        export_gguf(base, tmp_path / "adapter", tmp_path / "gguf", section=section, type="f16").file
    )
    tokenizer = sentencepiece_like()
    for text in TEXTS:
        assert opened.tokens(text) == tokenizer(text)["input_ids"], text
    assert opened.ends(2)
    assert not opened.ends(1)
    assert np.isfinite(opened.logits([1, 2])).all()
    opened.close()


def test_a_run_is_checked_in_it(
    tiny_model: Path, chat_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_values(tiny_model, chat_data, tmp_path / "run")))
    assert main(["train", str(tmp_path / "tiny.yaml")]) == 0
    check = ["export", str(tmp_path / "run"), "check", f"from={tmp_path / 'run/gguf-f16'}", "program=llama.cpp"]
    assert main(["export", str(tmp_path / "run"), "gguf", "type=f16", "base=dequantized"]) == 0
    assert main(check) == 0
    assert "In llama.cpp, on 8 held-out examples: logits differ" in capsys.readouterr().out
    file = tmp_path / "run/gguf-f16/model-f16.gguf"
    epsilon = np.float32(1e-6).tobytes()  # of all norms: its tensors are whole, and it answers otherwise
    assert file.read_bytes().count(epsilon) == 1
    file.write_bytes(file.read_bytes().replace(epsilon, np.float32(0.5).tobytes()))
    assert main(check) == 4
    assert "layer_norm_rms_epsilon differ" in capsys.readouterr().err


# ── a real model ──────────────────────────────────────────────────────────────────────────────────────────────────────

PIECES = ["🚀", "😶\u200d🌫️", "日本語", "한국어", "naïve", "Български", "  ", "\n", "\n\n", "\t", "def f(x):", "    return x", "3.14", "12345",
          "I've", "WE'LL", "…", "<|im_start|>", "<|im_end|>", "the", " the", "a+b", "!=", "'''", "é", "ﬁ", "\u202e", "العربية"]  # fmt: skip
NEW = 24  # tokens of an answer


class Real(NamedTuple):
    """The quickstart's model with an adapter: merged, in plain transformers and in GGUF."""

    model: Any
    tokenizer: Any
    files: dict[str, Path]
    answers: dict[str, list[int]]
    """Prompts' ids and what the merged model says to them, by prompt."""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    base = cache_folder() / "models" / DEFAULT_MODEL
    if not base.is_dir():
        pytest.skip("the quickstart's model is not in the cache (python -m qlora.quickstart makes it)")
    section = ModelSection(name=str(base), compute_dtype="fp32")
    adapted = apply_method(load_base(section, torch.device("cpu")), LoRA(r=4))
    stir(adapted, 0.01)
    work = tmp_path_factory.mktemp("smollm")
    save_adapter(adapted, work / "adapter")
    adapted.remove()
    merge(base, work / "adapter", work / "merged", compute_dtype="fp32", dtype="fp32")
    files = {
        kind: export_gguf(base, work / "adapter", work / kind, section=section, type=kind).file
        for kind in ("f32", "f16", "q8_0", "q4_0")
    }
    model = AutoModelForCausalLM.from_pretrained(work / "merged", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(work / "merged")
    answers = {}
    for word in WORDS:
        turns = [{"role": "user", "content": f"What does Python's {word} do?"}]
        ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))["input_ids"]
        with torch.no_grad():
            said = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        answers[word] = said[0].tolist()
    assert len(answers) == 20
    return Real(model, tokenizer, files, answers)


def test_a_real_tokenizer(real: Real) -> None:
    opened = llama_cpp.LlamaCpp(real.files["q8_0"])
    draw = random.Random(0)
    texts = ["".join(draw.choices(PIECES, k=draw.randint(1, 12))) for _ in range(1000)]
    assert [text for text in texts if opened.tokens(text) != real.tokenizer(text)["input_ids"]] == []
    assert opened.ends(real.tokenizer.convert_tokens_to_ids("<|im_end|>"))
    opened.close()


@pytest.mark.parametrize(("kind", "nats"), [("f32", 1e-6), ("f16", 1e-4), ("q8_0", 2e-2), ("q4_0", 2.0)])
def test_a_real_model(real: Real, kind: str, nats: float) -> None:
    """Bounds for nats a token: rounding in fp32 and fp16, and what 8 and 4 bits are known to cost; a wrong layout costs several."""
    opened = llama_cpp.LlamaCpp(real.files[kind])
    divergence, worst, same, positions = 0.0, 0.0, 0, 0
    for ids in real.answers.values():
        opened.begin()
        theirs = torch.from_numpy(opened.logits(ids)).double()
        with torch.no_grad():
            ours = real.model(torch.tensor([ids])).logits[0].double()
        divergence += (ours.softmax(1) * (ours.log_softmax(1) - theirs.log_softmax(1))).sum().item()
        worst, same = max(worst, difference(theirs, ours)), same + int((ours.argmax(1) == theirs.argmax(1)).sum())
        positions += len(ids)
    opened.close()
    print(
        f"{kind}: {real.files[kind].stat().st_size / 1e6:.0f} MB, {divergence / positions:.1e} nats a token, logits within "
        f"{worst:.1e}, the same next token at {same} of {positions} positions"
    )
    assert divergence / positions < nats


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_a_real_answer(real: Real, kind: str) -> None:
    """Greedy answers word for word, to where they end; in fp16 they may part where two tokens are as likely as it can tell."""
    opened = llama_cpp.LlamaCpp(real.files[kind])
    ended = parted = 0
    for word, expected in real.answers.items():
        turns = [{"role": "user", "content": f"What does Python's {word} do?"}]
        found = opened.tokens(real.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        assert found == expected[: len(found)]
        opened.begin()
        logits = opened.logits(found)
        while found == expected[: len(found)] and len(found) < len(expected):
            found.append(int(logits[-1].argmax()))
            logits = opened.logits(found[-1:])
        if found == expected:
            ended += opened.ends(found[-1])
            continue
        parted += 1
        with torch.no_grad():
            ours = real.model(torch.tensor([expected])).logits[0, len(found) - 2]
        # each product of a layer's seven, and the head's, rounds its weights and what it reads to fp16
        rounded = torch.finfo(torch.float16).eps * (2 * 7 * real.model.config.num_hidden_layers + 1) ** 0.5
        assert kind == "f16", word
        assert ours.max() - ours[found[-1]] < rounded * ours.abs().max(), word
    opened.close()
    print(f"{kind}: {len(real.answers) - parted} of {len(real.answers)} answers equal, {ended} ended by themselves")
