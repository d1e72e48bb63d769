"""The law of loading: the logits of ``from_pretrained`` with the same BitsAndBytesConfig, bit for bit; or a refusal."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora.errors import ModelError
from qlora.model.checkpoint import Checkpoint, open_checkpoint
from qlora.model.load import quantised_names
from qlora.model.nf4 import FrozenLinear, Linear4bit, Linear8bit
from qlora.model.tokenizer import load_tokenizer
from qlora.recipe import ModelSection
from qlora.residence.load import load_base
from tests.tiny import any_checkpoint, word_tokenizer

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "Phi3"]
IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return any_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def ours(folder: Path, **options: Any) -> nn.Module:
    return load_base(ModelSection(name=str(folder), **options), CPU).model


def logits(model: nn.Module) -> Tensor:
    # In eval mode, without gradients, on a CPU with AVX512-BF16, bitsandbytes packs its weights anew and computes in bf16
    # whatever was asked for. In training mode it computes as it does everywhere else. No tiny model has dropout.
    result: Tensor = model.train()(IDS).logits.detach()
    assert result.isfinite().all()
    return result


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader's own law, to the bit: fused operators round 16 bits less often, and have a law of their own (test_kernels)."""
    monkeypatch.setattr("qlora.residence.load.fuse", lambda *_: None)


def theirs(
    folder: Path, quantization: str = "nf4", double_quant: bool = True, compute_dtype: str = "fp32"
) -> nn.Module:
    dtype = DTYPES[compute_dtype]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    if quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    options = {} if quantization == "none" else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)  # type: ignore[no-any-return]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.sampled
def test_logits_of_every_family_are_those_of_from_pretrained(family: str, tied: bool, tmp_path: Path) -> None:
    any_checkpoint(tmp_path, family, tie_word_embeddings=tied)
    model = ours(tmp_path)
    assert torch.equal(logits(model), logits(theirs(tmp_path)))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    assert (head.weight is embedding.weight) == tied
    assert type(head) is nn.Linear


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stored", ["fp32", "bf16", "fp16"])
@pytest.mark.sampled
def test_logits_of_every_dtype_and_quantization(
    quantization: str, compute_dtype: str, stored: str, tmp_path: Path, unfused: None
) -> None:
    any_checkpoint(tmp_path, "Qwen2", DTYPES[stored])
    model = ours(tmp_path, quantization=quantization, compute_dtype=compute_dtype)
    assert torch.equal(logits(model), logits(theirs(tmp_path, quantization, compute_dtype=compute_dtype)))
    kinds = {"nf4": Linear4bit, "fp4": Linear4bit, "int8": Linear8bit, "none": nn.Linear}
    assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), kinds[quantization])


def test_logits_without_double_quantisation(llama: Path) -> None:
    single = logits(ours(llama, double_quant=False))
    assert torch.equal(single, logits(theirs(llama, double_quant=False)))
    assert not torch.equal(single, logits(ours(llama)))


def test_sharded_checkpoint(tmp_path: Path) -> None:
    whole = any_checkpoint(tmp_path / "whole")
    sharded = any_checkpoint(tmp_path / "sharded", shards="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(logits(ours(sharded)), logits(ours(whole)))


@pytest.mark.slow  # bitsandbytes compiles its kernels for them
def test_odd_sizes(tmp_path: Path) -> None:
    any_checkpoint(tmp_path, hidden_size=60, intermediate_size=101, head_dim=14)
    assert torch.equal(logits(ours(tmp_path)), logits(theirs(tmp_path)))


def test_rotary_frequencies_of_long_context_models(tmp_path: Path) -> None:
    """They are in no file: what the skeleton computes on meta has to be computed again."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 32, "rope_theta": 5e5}
    any_checkpoint(tmp_path, rope_parameters=rope)
    assert torch.equal(logits(ours(tmp_path)), logits(theirs(tmp_path)))


def test_base_is_frozen_whole_and_described(llama: Path) -> None:
    base = load_base(ModelSection(name=str(llama)), CPU)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not any(tensor.is_meta for tensor in [*base.model.parameters(), *base.model.buffers()])
    assert (base.folder, base.name, base.quantization, base.double_quant) == (llama, str(llama), "nf4", True)
    assert (base.device, base.compute_dtype) == (CPU, torch.float32)
    assert base.model.config.use_cache
    assert base.tokenizer.pad_token == "<pad>"
    names = quantised_names(base.model)
    assert len(names) == 14
    assert "model.layers.1.self_attn.o_proj.weight" in names
    assert open_checkpoint(ModelSection(name=str(llama))).model_config().hidden_size == 64


def test_at_most_one_dense_tensor_at_a_time(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    living: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most: list[int] = []
    read = Checkpoint.read

    def counted(checkpoint: Checkpoint, name: str) -> Tensor:
        tensor = read(checkpoint, name)
        if tensor.dim() == 2 and "proj" in name:
            most.append(1 + len(living))
            living.add(tensor)
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counted)
    for dtype in ("fp32", "bf16"):  # in bf16 nothing is cast, so a place that kept its argument would show
        ours(llama, compute_dtype=dtype)
        assert len(living) == 0
    assert len(most) == 28
    assert max(most) == 1


def test_attention_reaches_transformers(llama: Path) -> None:
    assert ours(llama, attention="eager").config._attn_implementation == "eager"  # type: ignore[union-attr]
    assert ours(llama, attention="sdpa").config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    assert ours(llama).config._attn_implementation == "qlora_each_example"  # type: ignore[union-attr]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(
    llama: Path, terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    load_base(ModelSection(name=str(llama)), CPU, progress=True)
    printed = capsys.readouterr()
    assert "Loading" in printed.err
    assert "nf4" in printed.err.replace("\n", "")
    assert printed.out == ""


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_prequantised_checkpoint_is_taken_as_it_is(
    llama: Path, tmp_path: Path, quantization: str, double_quant: bool
) -> None:
    theirs(llama, quantization, double_quant).save_pretrained(tmp_path)  # type: ignore[operator]
    word_tokenizer(eos_token="</s>").save_pretrained(tmp_path)
    base = load_base(ModelSection(name=str(tmp_path), quantization=quantization, double_quant=True), CPU)
    assert base.double_quant == double_quant
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(base.model), logits(oracle))
    with pytest.raises(ModelError, match=f"already quantised to {quantization}, but the recipe asks for int8"):
        ours(tmp_path, quantization="int8")


def test_fp8_in_blocks_is_read_as_what_it_stands_for(copy: Path) -> None:
    """DeepSeek's layout, which Qwen3-FP8 and others have: blocks at the edges are narrower."""
    exact: dict[str, Tensor] = {}

    def to_fp8(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "proj" in name]:
            weight = tensors[name].float()
            scales = torch.rand(-(-weight.shape[0] // 48), -(-weight.shape[1] // 40)) + 0.5
            spread = scales.repeat_interleave(48, 0)[: weight.shape[0]].repeat_interleave(40, 1)[:, : weight.shape[1]]
            tensors[name] = (weight / spread).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scales
            exact[name] = tensors[name].float() * spread

    change(copy, to_fp8)
    edit(
        copy, quantization_config={"quant_method": "fp8", "weight_block_size": [48, 40], "activation_scheme": "dynamic"}
    )
    found = logits(ours(copy))
    edit(copy, quantization_config=None)
    change(copy, lambda tensors: [tensors.pop(f"{name}_scale_inv") for name in exact] and tensors.update(exact))
    assert torch.equal(found, logits(ours(copy)))
    change(copy, lambda tensors: tensors.update({f"{PROJECTION}.weight": torch.ones(192, 64).to(torch.float8_e4m3fn)}))
    with pytest.raises(ModelError, match=rf"holds FP8 without a scale for each block in {PROJECTION}\.weight;"):
        ours(copy)


def test_other_prequantised_checkpoints_are_refused(copy: Path) -> None:
    edit(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"already quantised \(gptq\)"):
        ours(copy)
    named = copy.rename(copy.parent / "Qwen2.5-7B-Instruct-GPTQ-Int4")
    with pytest.raises(ModelError, match=r"that it was made from, by its name 'Qwen2.5-7B-Instruct'"):
        ours(named)
    named.rename(copy)
    edit(copy, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ModelError, match=r"already quantised \(bitsandbytes\); only .* 4-bit and 8-bit"):
        ours(copy)


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shards", ["5GB", "60KB"])
def test_prequantised_8_bit_checkpoint_is_taken_as_it_is(
    tmp_path: Path, shards: str, compute_dtype: Any, unfused: None
) -> None:
    """Qwen 2 has biases. Small shards part a weight from its scales."""
    dense, packed = any_checkpoint(tmp_path / "dense", "Qwen2"), tmp_path / "packed"
    theirs(dense, "int8", compute_dtype=compute_dtype).save_pretrained(packed, max_shard_size=shards)  # type: ignore[operator]
    word_tokenizer(eos_token="</s>").save_pretrained(packed)
    base = load_base(ModelSection(name=str(packed), quantization="int8", compute_dtype=compute_dtype), CPU)
    assert (base.quantization, base.double_quant) == ("int8", False)
    assert len(quantised_names(base.model)) == 14
    found = logits(base.model)
    assert torch.equal(found, logits(ours(dense, quantization="int8", compute_dtype=compute_dtype)))
    oracle = AutoModelForCausalLM.from_pretrained(packed, dtype=DTYPES[compute_dtype])
    assert torch.equal(found, logits(oracle))
    with pytest.raises(ModelError, match=r"already quantised to int8, but the recipe asks for nf4; set .*=int8"):
        ours(packed)


@pytest.fixture
def packed(copy: Path) -> Path:
    """The tiny Llama in 8 bits as the oldest versions wrote it: no name of the method, no weight_format."""

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "proj" in name]:
            linear = Linear8bit.empty(*tensors[name].shape[::-1], bias=False, compute_dtype=torch.float32)
            linear.place(tensors[name], CPU)
            tensors[name], tensors[name.removesuffix("weight") + "SCB"] = linear.weight, linear.scales

    change(copy, pack)
    edit(copy, quantization_config={"load_in_8bit": True, "llm_int8_threshold": 6.0})
    return copy


def test_old_8_bit_checkpoint(llama: Path, packed: Path) -> None:
    assert torch.equal(logits(ours(packed, quantization="int8")), logits(ours(llama, quantization="int8")))


PROJECTION = "model.layers.1.mlp.up_proj"


def test_8_bit_weight_without_scales_is_no_dense_weight(packed: Path) -> None:
    change(packed, lambda tensors: tensors.pop(f"{PROJECTION}.SCB"))
    with pytest.raises(ModelError, match=rf"holds whole numbers without their scales in {PROJECTION}\.weight;"):
        ours(packed, quantization="int8")


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_whole_numbers_are_no_weights(copy: Path, quantization: str) -> None:
    change(copy, lambda tensors: tensors.update({f"{PROJECTION}.weight": torch.ones(192, 64, dtype=torch.int8)}))
    with pytest.raises(ModelError, match=rf"holds whole numbers without their scales in {PROJECTION}\.weight;"):
        ours(copy, quantization=quantization)


def test_8_bit_scales_that_do_not_fit_are_refused_by_name(packed: Path) -> None:
    change(packed, lambda tensors: tensors.update({f"{PROJECTION}.SCB": torch.ones(3)}))
    with pytest.raises(ModelError, match=rf"'{PROJECTION}\.weight' in '.*': .* 3 scales"):
        ours(packed, quantization="int8")


@pytest.mark.parametrize("kind", ["load_in_4bit", "load_in_8bit"])
def test_config_that_says_quantised_of_whole_weights(copy: Path, kind: str) -> None:
    edit(copy, quantization_config={"quant_method": "bitsandbytes", kind: True, "bnb_4bit_quant_type": "nf4"})
    with pytest.raises(ModelError, match=r"says that its weights are quantised .* but none is"):
        ours(copy, quantization="nf4" if kind == "load_in_4bit" else "int8")


def test_scales_of_the_other_kind_are_refused(packed: Path) -> None:
    edit(packed, quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    with pytest.raises(ModelError, match=r"no place for: .*\.SCB"):
        ours(packed)


@pytest.mark.parametrize("trusted", [True, False])
def test_code_of_the_hub_is_downloaded_with_leave_alone(
    llama: Path, trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def snapshot_download(name: str, allow_patterns: list[str], **_: Any) -> str:
        asked.append("*.py" in allow_patterns)
        return str(llama)

    def model_info(name: str, **_: Any) -> None:
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.model_info", model_info)
    section = ModelSection(name="org/name", trust_remote_code=trusted)
    open_checkpoint(section, weights=False).model_config()
    open_checkpoint(section, weights=False).tokenizer  # noqa: B018
    load_base(section, CPU)
    assert asked == [trusted] * 3


@pytest.mark.parametrize(("value", "ends"), [(None, (2,)), (7, (2, 7)), ([7, 9], (2, 7, 9))])
def test_end_tokens_are_those_of_tokenizer_and_configurations(copy: Path, value: Any, ends: tuple[int, ...]) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert load_base(ModelSection(name=str(copy)), CPU).end_tokens == ends


def test_generation_config_may_be_missing(copy: Path) -> None:
    (copy / "generation_config.json").unlink()
    assert load_base(ModelSection(name=str(copy)), CPU).end_tokens == (2,)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"eos_token_id": ', "not readable JSON"),
        ("[7]", "holds list instead of an object"),
        ('{"eos_token_id": "</s>"}', "has the eos_token_id '</s>'; expected a token's number"),
        ('{"eos_token_id": [7, true]}', "has the eos_token_id"),
    ],
)
def test_damaged_generation_config_is_found_on_loading(copy: Path, text: str, sentence: str) -> None:
    (copy / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=f"generation_config.json' .*{sentence}|generation_config.json' {sentence}"):
        ours(copy)


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change(folder: Path, act: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    act(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_missing_tensors_are_named_five_at_most(copy: Path) -> None:
    change(copy, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1" in name])
    with pytest.raises(ModelError, match=r"lacks 9 tensors.*model\.layers\.1\..* and 4 more"):
        ours(copy)


def test_unexpected_tensors_are_refused(copy: Path) -> None:
    change(copy, lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.zeros(2)}))
    with pytest.raises(ModelError, match=r"no place for: model\.layers\.0\.extra\.weight"):
        ours(copy)


def test_buffers_that_old_versions_saved_are_left_out(copy: Path) -> None:
    before = logits(ours(copy))
    change(copy, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    assert torch.equal(logits(ours(copy)), before)


def test_wrong_shape(copy: Path) -> None:
    change(copy, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 64)}))
    with pytest.raises(ModelError, match=r"up_proj\.weight.*\[64, 64\].*\[192, 64\]"):
        ours(copy)


def test_tied_head_may_be_in_the_checkpoint_too_or_alone(tmp_path: Path) -> None:
    any_checkpoint(tmp_path, tie_word_embeddings=True)
    before = logits(ours(tmp_path))
    change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert torch.equal(logits(ours(tmp_path)), before)
    change(tmp_path, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    assert torch.equal(logits(ours(tmp_path)), before)
    change(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelError, match="lacks"):
        ours(tmp_path)


def test_checkpoint_of_the_body_alone_gets_its_prefix(tmp_path: Path) -> None:
    """from_pretrained loads a checkpoint saved without the ``model.`` prefix; so do we."""
    any_checkpoint(tmp_path, tie_word_embeddings=True)
    before = logits(ours(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    assert torch.equal(logits(ours(tmp_path)), before)


MOE = {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_experts_load_unquantised_as_they_are_stored_and_fused(family: str, tmp_path: Path) -> None:
    any_checkpoint(tmp_path, family, **MOE)
    plain = theirs(tmp_path, "none")
    assert torch.equal(logits(ours(tmp_path, quantization="none")), logits(plain))
    packed = logits(ours(tmp_path))
    save_file({name: tensor.clone() for name, tensor in plain.state_dict().items()}, tmp_path / "model.safetensors")
    assert torch.equal(logits(ours(tmp_path, quantization="none")), logits(plain))
    assert torch.equal(logits(ours(tmp_path)), packed)
    with pytest.raises(ModelError, match=r"not in int8; set model\.quantization=nf4"):
        ours(tmp_path, quantization="int8")


def test_weights_that_are_stored_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2's [in, out]: turned before they are quantised, as transformers does it."""
    any_checkpoint(
        tmp_path, "GPT2", n_embd=64, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0
    )
    model = ours(tmp_path)
    assert isinstance(model.get_submodule("transformer.h.0.mlp.c_fc"), Linear4bit)
    assert torch.equal(logits(model), logits(theirs(tmp_path)))
    assert torch.equal(logits(ours(tmp_path, quantization="none")), logits(theirs(tmp_path, "none")))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "encoder-decoder"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM and not a BertLMHeadModel"),
        ({"model_type": "florence2", "architectures": ["Florence2ForConditionalGeneration"]}, "encoder"),
        ({"model_type": "gemma3", "architectures": ["ShieldGemma2ForImageClassification"]}, "not a Gemma3ForCond"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "no causal language model"),
        ({"model_type": "newer"}, "model type 'newer', which transformers"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "model.trust_remote_code=true"),
    ],
)
def test_other_kinds_of_model_are_refused(values: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=sentence):
        open_checkpoint(ModelSection(name=str(tmp_path)), weights=False).model_config()


def test_cast_of_the_model_keeps_the_packed_weights(llama: Path) -> None:
    model = ours(llama)
    held = sum(
        buffer.nbytes for module in model.modules() if isinstance(module, FrozenLinear) for buffer in module.buffers()
    )
    model.to(torch.bfloat16)
    assert held == sum(
        buffer.nbytes for module in model.modules() if isinstance(module, FrozenLinear) for buffer in module.buffers()
    )


@pytest.mark.parametrize(
    ("special", "padding"),
    [
        ({"pad_token": "w5", "eos_token": "</s>"}, "w5"),
        ({"eos_token": "</s>"}, "<pad>"),  # in the vocabulary, though nobody named it
        ({"pad_token": "<added>", "eos_token": "</s>"}, "<pad>"),  # its id 96 has no embedding
    ],
)
def test_padding_token(special: dict[str, str], padding: str, copy: Path) -> None:
    word_tokenizer(**special).save_pretrained(copy)
    assert load_tokenizer(copy).pad_token == padding
    assert open_checkpoint(copy, weights=False).tokenizer.pad_token_id < 96


def test_padding_falls_back_to_the_end_token(tmp_path: Path) -> None:
    word_tokenizer(2, ("x", "</s>"), eos_token="</s>").save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token == "</s>"
    assert len(loaded) == 2


def test_broken_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(copy)
