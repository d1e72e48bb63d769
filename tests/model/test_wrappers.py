"""The law of wrappers: the language model inside a multimodal one is what the whole class is on text, and towers are not read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    BitsAndBytesConfig,
    Qwen2AudioForConditionalGeneration,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from qlora.errors import ModelError
from qlora.export.adapter import export_adapter
from qlora.export.merged import merge
from qlora.methods.base import apply_method
from qlora.methods.files import save_adapter
from qlora.model import anatomy
from qlora.model.checkpoint import Checkpoint, open_checkpoint
from qlora.model.checks import check_loss_path, check_packing
from qlora.model.loss import batch_loss
from qlora.model.skeleton import assemble
from qlora.model.towers import find_towers, take_out
from qlora.recipe import LoRA, ModelSection
from qlora.residence.load import load_base
from tests.families.checkpoints import tiny_config
from tests.rounding import difference
from tests.tiny import (
    CPU,
    TOKENS,
    WRAPPERS,
    logits_of,
    random_wrapper,
    stir,
    tiny_base,
    word_tokenizer,
    wrapper_checkpoint,
)

IDS = TOKENS % 89 + 1  # below the image's token


@pytest.fixture(scope="module", params=WRAPPERS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wrapper_checkpoint(tmp_path_factory.mktemp(family), family)


def batch() -> dict[str, torch.Tensor]:
    places = torch.arange(IDS.shape[1]).expand_as(IDS)
    return {"input_ids": IDS, "position_ids": places, "labels": IDS}


@pytest.mark.sampled
def test_loss_and_gradients_are_the_whole_class_s(family: str, folder: Path) -> None:
    whole, base = random_wrapper(family).train(), tiny_base(folder, "none")
    base.model.requires_grad_(True)
    expected = whole(input_ids=IDS, labels=IDS).loss
    expected.backward()
    loss, targets = batch_loss(base.model, batch())
    (loss / targets).backward()
    assert difference(loss.detach() / targets, expected.detach()) < 1e-5
    theirs = {name: values.grad for name, values in whole.named_parameters() if values.grad is not None}
    ours = {name: values.grad for name, values in base.model.named_parameters() if values.grad is not None}
    assert ours.keys() == theirs.keys()
    assert len(ours) > 10
    assert max(difference(ours[name], theirs[name]) for name in ours) < 1e-4


@pytest.mark.sampled
def test_the_class_without_towers_answers_as_before(family: str, folder: Path) -> None:
    base = tiny_base(folder, "none")
    with torch.no_grad():
        expected = random_wrapper(family)(input_ids=IDS).logits
        assert difference(base.model(input_ids=IDS).logits, expected) < 1e-5
    check_loss_path(base.model, IDS[0].tolist())
    check_packing(base.model, IDS[0].tolist(), 2)


def test_towers_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    plain = Checkpoint.read

    def spy(self: Checkpoint, name: str) -> torch.Tensor:
        read.append(name)
        return plain(self, name)

    monkeypatch.setattr(Checkpoint, "read", spy)
    base = tiny_base(folder)
    entries = open_checkpoint(folder).entries
    left = {name for name in entries if any(part in name for part in ("vision", "visual", "projector", "connector"))}
    assert left
    assert set(read) == entries.keys() - left
    assert sum(base.towers.values()) == sum(torch.Size(entries[name].shape).numel() for name in left)
    assert len(anatomy.layers(base.model)) == 2


def test_towers_may_be_absent_whole_and_not_in_part(
    family: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / family))
    tensors = load_file(copied / "model.safetensors")
    entry = {key for key in tensors if any(part in key for part in ("vision", "visual"))}
    last = max(entry)
    save_file({key: value for key, value in tensors.items() if key != last}, copied / "model.safetensors")
    with pytest.raises(ModelError, match="lacks 1 tensors"):
        tiny_base(copied)
    save_file({key: value for key, value in tensors.items() if key not in entry}, copied / "model.safetensors")
    base = load_base(ModelSection(name=str(copied), quantization="none", compute_dtype="fp32"), CPU, progress=True)
    absent = [path for path, numbers in base.towers.items() if not numbers]
    assert absent
    assert f"it holds nothing of {', '.join(absent)}, so a merged model will not either" in capsys.readouterr().err


def test_step_0_is_the_base(folder: Path) -> None:
    base = tiny_base(folder)
    before = logits_of(base.model)
    adapted = apply_method(base, LoRA(r=4))
    assert torch.equal(logits_of(adapted.model), before)
    assert all(".layers." in path and "vis" not in path for path in adapted.planted)


@pytest.mark.parametrize("keys", ["whole", "text"])
@pytest.mark.sampled
def test_adapter_keys_are_those_of_the_class_that_loads_them(
    family: str, folder: Path, keys: Any, tmp_path: Path
) -> None:
    section = ModelSection(name=str(folder), quantization="none", compute_dtype="fp32")
    adapted = apply_method(tiny_base(folder, "none"), LoRA(r=4))
    stir(adapted)
    save_adapter(adapted, tmp_path / "adapter")
    checkpoint = open_checkpoint(folder)

    def export() -> None:
        assert export_adapter(section, checkpoint, tmp_path / "adapter", tmp_path / "out", keys=keys) is None

    text = anatomy.text_config(random_wrapper(family).config)
    if keys == "text" and type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        with pytest.raises(ModelError, match="keys=text"):
            export()
        return
    export()
    plain: Any = random_wrapper(family) if keys == "whole" else AutoModelForCausalLM.from_config(text).eval()
    if keys == "text":
        values = random_wrapper(family).state_dict()
        inside = anatomy.path_of(adapted.model, anatomy.decoder(adapted.model))
        own = {name.replace(f"{inside}.", "model.", 1): value for name, value in values.items() if "vis" not in name}
        found = plain.load_state_dict(own, strict=False)
        assert not found.missing_keys
    names = set(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    with_adapter = PeftModel.from_pretrained(plain, tmp_path / "out")
    state = peft.get_peft_model_state_dict(with_adapter)
    assert names == set(state)  # nowhere else, and no tower has one
    with torch.no_grad():
        ours, theirs = adapted.model(input_ids=IDS).logits, with_adapter(input_ids=IDS).logits
    if keys == "whole" or family != "AyaVision":  # which leaves out the scale of its logits
        assert difference(ours, theirs) < 1e-4


@pytest.mark.sampled
def test_a_merge_brings_along_what_was_not_loaded(family: str, folder: Path, tmp_path: Path) -> None:
    adapted = apply_method(tiny_base(folder, "none"), LoRA(r=4))
    stir(adapted)
    save_adapter(adapted, tmp_path / "adapter")
    merge(folder, tmp_path / "adapter", tmp_path / "merged", compute_dtype="fp32", quantization="none", dtype="fp32")
    merged, loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    assert not loaded["mismatched_keys"]
    with torch.no_grad():
        assert difference(merged(input_ids=IDS).logits, adapted.model(input_ids=IDS).logits) < 1e-4
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "merged"))
    empty = assemble(open_checkpoint(folder), ModelSection(name=str(folder)), torch.float32)
    assert empty.left
    assert all(torch.equal(before[name], after[name]) for name in empty.left)
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


def test_a_merge_keeps_what_the_class_passes_over(tmp_path: Path) -> None:
    weights = wrapper_checkpoint(tmp_path / "base", "Qwen3_5") / "model.safetensors"
    extra = torch.randn(3, 5, dtype=torch.float64).to(torch.float8_e4m3fn)
    save_file({**load_file(weights), "mtp.fc.weight": extra}, weights, {"format": "pt"})
    save_adapter(apply_method(tiny_base(tmp_path / "base"), LoRA(r=4)), tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", compute_dtype="fp32")
    kept = load_file(tmp_path / "merged" / "model.safetensors")["mtp.fc.weight"]
    assert kept.dtype == extra.dtype
    assert torch.equal(kept.view(torch.uint8), extra.view(torch.uint8))


def test_a_prequantised_wrapper_becomes_plain_with_its_towers(tmp_path: Path) -> None:
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    wrapper_checkpoint(tmp_path / "whole", "Llava")
    packed = AutoModelForMultimodalLM.from_pretrained(
        tmp_path / "whole", quantization_config=four, dtype=torch.float32
    ).train()
    packed.save_pretrained(tmp_path / "packed")
    word_tokenizer(pad_token="<pad>", bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path / "packed")
    base = tiny_base(tmp_path / "packed")
    ids, image = with_image()
    with torch.no_grad():
        assert difference(base.model.train()(input_ids=IDS).logits, packed(input_ids=IDS).logits) < 1e-5
        expected = packed(input_ids=ids, pixel_values=image).logits
    save_adapter(apply_method(base, LoRA(r=4)), tmp_path / "adapter")
    merge(tmp_path / "packed", tmp_path / "adapter", tmp_path / "merged", compute_dtype="fp32", dtype="fp32")
    merged = AutoModelForMultimodalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert difference(merged(input_ids=ids, pixel_values=image).logits, expected) < 1e-4


def with_image() -> tuple[torch.Tensor, torch.Tensor]:
    """The ids of a text with an image of four places, and the image."""
    image = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    return torch.tensor([[1, *[90] * 4, 5, 6, 7]]), image


@pytest.mark.parametrize("family", ["Llava", "Gemma3"], scope="module")
def test_an_unchanged_merge_sees_images_as_before(folder: Path, family: str, tmp_path: Path) -> None:
    save_adapter(apply_method(tiny_base(folder, "none"), LoRA(r=4)), tmp_path / "adapter")
    merge(folder, tmp_path / "adapter", tmp_path / "merged", compute_dtype="fp32", quantization="none", dtype="fp32")
    models = [AutoModelForMultimodalLM.from_pretrained(place).eval() for place in (folder, tmp_path / "merged")]
    ids, image = with_image()
    with torch.no_grad():
        before, after = (model(input_ids=ids, pixel_values=image).logits for model in models)
        blind = models[0](input_ids=ids, pixel_values=torch.zeros_like(image)).logits
    assert torch.equal(before, after)
    assert not torch.equal(before, blind)


def test_a_tower_may_be_asked_where_it_is() -> None:
    """Qwen2-Audio asks, also where it is given text alone."""
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(tiny_config("qwen2_audio")).eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        take_out(model, find_towers(model))
        assert torch.equal(model(input_ids=IDS).logits, expected)
    assert not any("audio" in name or "projector" in name for name, _ in model.named_parameters())
