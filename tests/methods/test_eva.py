"""The laws of EVA: the exact SVD's directions, PEFT's on the same batch, only positions that count, and files as ever."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, ViTConfig, ViTForImageClassification

from qlora import recipe as config
from qlora.data.batches import collate
from qlora.errors import MethodError
from qlora.methods import eva
from qlora.methods.base import AdaptedModel, apply_method
from qlora.methods.eva import Directions
from qlora.methods.files import save_adapter
from qlora.methods.loading import load_adapter
from qlora.model.loss import IGNORE_INDEX
from qlora.residence.layers import wrap_layers
from qlora.training.loop import Trainer
from tests.rounding import rounding
from tests.tiny import VOCABULARY, difference, logits_of, random_rows, tiny_base, tiny_checkpoint

SECTION = config.LoRA(r=4, alpha=8, init="eva")
Q, V, DOWN = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activations in it have a few large directions and a tail, as in a trained model; in a random one none stands out."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("base"), num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    for name, values in tensors.items():
        if values.dim() == 2:
            size = torch.arange(1, 1 + max(values.shape)) ** -1.0
            values *= size[: values.shape[1]] * 8 if "embed" in name else size[: len(values), None] * 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def batch_of(rows: int = 4, tokens: int = 24, seed: int = 0, ignored: int = 6) -> dict[str, Tensor]:
    """Random tokens; the first ``ignored`` of every row are no targets."""
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :ignored] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(tokens).expand(rows, tokens)}


def inputs_of(model: AdaptedModel, path: str, batches: list[dict[str, Tensor]]) -> Tensor:
    """What the target at ``path`` got at the positions that count, [n, in]."""
    found: list[Tensor] = []
    hook = model.planted[path].register_forward_pre_hook(lambda layer, inputs: found.append(inputs[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    hook.remove()
    return torch.cat([x[batch["labels"] != IGNORE_INDEX] for x, batch in zip(found, batches, strict=True)])


def exact(rows: Tensor) -> Tensor:
    """All right singular vectors of ``rows`` about their mean, one a row."""
    return torch.linalg.svd((rows - rows.mean(0)).double(), full_matrices=False).Vh.float()


def alike(found: Tensor, expected: Tensor) -> Tensor:
    """The cosine of each row of ``found`` with that of ``expected``, whatever their signs."""
    return torch.nn.functional.cosine_similarity(found, expected).abs()


@pytest.mark.parametrize("pieces", [1, 7])
def test_batches_give_the_directions_of_the_whole(pieces: int) -> None:
    generator = torch.Generator().manual_seed(0)
    size = torch.arange(1, 41) ** -1.0
    rows = torch.randn(700, 40, generator=generator) * size + 3 * torch.randn(40, generator=generator)
    directions = Directions(6, generator)
    for part in rows.chunk(pieces):
        directions.add(part)
    assert directions.found is not None
    assert directions.mean is not None
    assert directions.count == 700
    torch.testing.assert_close(directions.mean, rows.mean(0), rtol=rounding(), atol=rounding())
    worst = float(alike(directions.found[:6], exact(rows)[:6]).min())
    print(f"{pieces} pieces: cosine {worst:.5f}")
    assert worst > (1 - 1e-5 if pieces == 1 else 0.99)
    torch.testing.assert_close(directions.found @ directions.found.t(), torch.eye(12), rtol=0, atol=rounding())


def test_without_truncation_batches_are_the_whole_exactly() -> None:
    rows = torch.randn(90, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9) + 5
    directions = Directions(4, torch.Generator())
    for part in rows.split([3, 40, 1, 46]):
        directions.add(part)
    assert directions.found is not None
    assert alike(directions.found, exact(rows)).min() > 1 - 1e-5


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_is_the_leading_directions_of_the_inputs(checkpoint: Path, quantization: str) -> None:
    base = tiny_base(checkpoint, quantization)
    before = logits_of(base.model)
    model = apply_method(base, SECTION)
    batches = [batch_of(seed=seed) for seed in range(3)]
    expected = {path: exact(inputs_of(model, path, batches)) for path in (Q, V, DOWN)}
    model.prepare(iter(batches))
    assert torch.equal(logits_of(model.model), before)  # B is zero
    for path, directions in expected.items():
        lora_A: Any = model.planted[path].lora_A
        inside = float(((lora_A @ directions[:4].t()) ** 2).sum() / 4)
        print(f"{path}: {inside:.4f} of A lies in the exact subspace")
        assert inside > 0.97
        torch.testing.assert_close(lora_A @ lora_A.t(), torch.eye(4), rtol=0, atol=rounding())
        assert lora_A.requires_grad
        assert not model.planted[path].lora_B.any()
    assert torch.equal(model.planted[Q].lora_A, model.planted[V].lora_A)  # the same input
    assert not model.model.training


def test_it_is_pefts_on_the_same_batch(checkpoint: Path) -> None:
    batch = batch_of(8, 40)
    ours = apply_method(tiny_base(checkpoint, "none"), SECTION)
    ours.prepare([batch])
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
        peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=sorted({path.rpartition(".")[2] for path in ours.planted}),
            task_type="CAUSAL_LM",
            init_lora_weights="eva",
            eva_config=peft.EvaConfig(rho=1.0),
        ),
    )
    peft.initialize_lora_eva_weights(theirs, [batch], show_progress_bar=False)
    worst = 1.0
    for path, layer in ours.planted.items():
        other = theirs.get_submodule(f"base_model.model.{path}").lora_A["default"].weight
        worst = min(worst, float(alike(layer.lora_A, other).min()))
    print(f"the least cosine with PEFT's directions: {worst:.5f}")
    assert worst > 0.999


def test_padding_and_what_is_no_target_do_not_count(checkpoint: Path) -> None:
    batch = batch_of()
    padded = {
        "input_ids": torch.cat([batch["input_ids"], torch.zeros(4, 9, dtype=torch.long)], 1),
        "labels": torch.cat([batch["labels"], torch.full((4, 9), IGNORE_INDEX)], 1),
        "position_ids": torch.arange(33).expand(4, 33),
    }
    unread = {**batch, "labels": torch.full_like(batch["labels"], IGNORE_INDEX)}
    plain, other, everything = (apply_method(tiny_base(checkpoint), SECTION) for _ in range(3))
    plain.prepare([batch])
    other.prepare([unread, padded])
    everything.prepare([{**batch, "labels": batch["input_ids"]}])
    for path, layer in plain.planted.items():
        assert difference(other.planted[path].lora_A, layer.lora_A) < 1e-3
    assert difference(everything.planted[Q].lora_A, plain.planted[Q].lora_A) > 1e-2


def test_looking_stops_when_nothing_moves_or_after_enough(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(batches: list[dict[str, Tensor]], taken: list[int]) -> Iterator[dict[str, Tensor]]:
        for batch in batches:
            taken.append(1)
            yield batch

    same: list[int] = []
    apply_method(tiny_base(checkpoint), SECTION).prepare(counted([batch_of()] * 50, same))
    assert len(same) == 2
    monkeypatch.setattr(eva, "MOST_BATCHES", 3)
    other: list[int] = []
    hard = SECTION.model_copy(update={"r": 16})
    apply_method(tiny_base(checkpoint), hard).prepare(counted([batch_of(seed=n) for n in range(9)], other))
    assert len(other) == 3


def test_ranks_of_their_own_share_one_look(checkpoint: Path) -> None:
    section = SECTION.model_copy(update={"rank_pattern": {"v_proj": 7}})
    model = apply_method(tiny_base(checkpoint), section)
    model.prepare([batch_of()])
    assert model.planted[V].lora_A.shape == (7, 64)
    assert torch.equal(model.planted[V].lora_A[:4], model.planted[Q].lora_A)


def test_it_looks_through_the_recompute_boundary_and_at_dora(checkpoint: Path) -> None:
    plain = apply_method(tiny_base(checkpoint), SECTION)
    plain.prepare([batch_of()])
    dora = apply_method(tiny_base(checkpoint), config.DoRA(r=4, alpha=8, init="eva"))
    before = logits_of(dora.model)
    wrap_layers(dora.model, 1)
    dora.model.train()
    dora.prepare([batch_of()])
    assert dora.model.training
    for path, layer in plain.planted.items():
        assert difference(dora.planted[path].lora_A, layer.lora_A) < rounding()
    assert difference(logits_of(dora.model.eval()), before) < rounding()


def test_too_little_data_is_refused(checkpoint: Path) -> None:
    batch = batch_of(1, 8, ignored=4)
    with pytest.raises(MethodError, match=r"q_proj' saw 4 target tokens, too few for 4 directions"):
        apply_method(tiny_base(checkpoint), SECTION).prepare([batch])
    with pytest.raises(MethodError, match=r"q_proj' saw 0 target tokens"):
        apply_method(tiny_base(checkpoint), SECTION).prepare([])


def test_training_without_a_look_is_refused_and_a_loaded_adapter_needs_none(checkpoint: Path, tmp_path: Path) -> None:
    rows = random_rows(8)
    training = config.TrainingSection(batch_size=4, steps=2)
    with pytest.raises(MethodError, match="no data was looked at"):
        next(Trainer(apply_method(tiny_base(checkpoint), SECTION), rows, training))
    model = apply_method(tiny_base(checkpoint), SECTION)
    model.prepare([collate(rows, 0)])
    save_adapter(model, tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["peft_type"] == "LORA"
    assert not (tmp_path / "method.safetensors").exists()
    peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path)
    again = load_adapter(apply_method(tiny_base(checkpoint), SECTION), tmp_path)
    assert torch.equal(again.planted[Q].lora_A, model.planted[Q].lora_A)
    assert next(Trainer(again, rows, training)).number == 1


def test_two_looks_are_the_same(checkpoint: Path) -> None:
    first, second = (apply_method(tiny_base(checkpoint), SECTION) for _ in range(2))
    for model in (first, second):
        torch.manual_seed(id(model) % 1000)
        model.prepare([batch_of(), batch_of(seed=1)])
    for path, layer in first.planted.items():
        assert torch.equal(layer.lora_A, second.planted[path].lora_A)


class OwnLoop(nn.Module):
    """As a user's own classifier: no decoder, no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def test_a_module_without_a_decoder_for_tokens_is_refused() -> None:
    section = config.LoRA(r=2, init="eva", target_modules=("body",))
    with pytest.raises(MethodError, match=r"OwnLoop has none that takes input_ids .* method.init, as kaiming"):
        apply_method(OwnLoop(), section).prepare([{"x": torch.randn(4, 8)}])
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    images = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))
    with pytest.raises(MethodError, match="ViTForImageClassification has none"):
        apply_method(images, config.LoRA(r=2, init="eva")).prepare([{"pixel_values": torch.randn(1, 3, 8, 8)}])


@pytest.mark.parametrize("section", [config.LoRA, config.DoRA])
def test_a_loop_of_ones_own_is_refused_without_a_look_too(checkpoint: Path, section: Any) -> None:
    model = apply_method(tiny_base(checkpoint), section(r=4, init="eva"))
    ids = batch_of()["input_ids"]
    model.model(input_ids=ids, use_cache=False)  # evaluation is the base, which needs no data
    model.model.train()
    with pytest.raises(MethodError, match=r"no data was looked at; call model\.prepare"):
        model.model(input_ids=ids, use_cache=False)
    with model.disabled():
        model.model(input_ids=ids, use_cache=False)
    model.prepare([batch_of()])
    assert model.model.training
    model.model(input_ids=ids, use_cache=False).logits.sum().backward()


def test_two_methods_look_at_the_same_batches(checkpoint: Path) -> None:
    parts = (
        config.LoRA(r=4, init="eva", target_modules=("q_proj", "down_proj")),
        config.DoRA(r=4, init="eva", target_modules=("v_proj", "o_proj")),
    )
    batches = [batch_of(seed=seed) for seed in range(3)]
    both = apply_method(tiny_base(checkpoint), config.Combined(parts=parts))
    both.prepare(iter(batches))
    for part in parts:
        alone = apply_method(tiny_base(checkpoint), part)
        alone.prepare(iter(batches))
        for path, layer in alone.planted.items():
            assert torch.equal(both.planted[path].lora_A, layer.lora_A)
