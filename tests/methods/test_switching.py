"""Several adapters on one base: each answers as if it were alone, whatever was in use before or stands beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora import recipe as config
from qlora.errors import MethodError
from qlora.evaluation.generate import answers
from qlora.methods import switching
from qlora.methods.base import AdaptedModel, apply_method
from qlora.methods.files import save_adapter
from qlora.methods.loading import load_adapter
from qlora.methods.lora import LoraLinear
from qlora.methods.planted import Planted
from qlora.methods.switching import Adapters
from qlora.model.nf4 import add_product
from tests.rounding import LAYER, rounding
from tests.tiny import TOKENS, VOCABULARY, difference, tiny_base, tiny_checkpoint

LORAS = {
    "sql": config.LoRA(r=4, alpha=8, target_modules=("q_proj", "down_proj")),
    "chat": config.LoRA(r=2, alpha=8, target_modules=("q_proj", "v_proj"), rslora=True),
    "code": config.LoRA(r=8, rank_pattern={"up_proj": 3}),
}
OTHERS = {
    "dora": config.DoRA(r=4, alpha=8, target_modules=("q_proj", "up_proj")),
    "adalora": config.AdaLoRA(r=2, initial_r=4, alpha=8, target_modules=("v_proj", "down_proj")),
    "ia3": config.IA3(),
    "bitfit": config.BitFit(new_biases=True),
    "pissa": config.LoRA(r=4, alpha=4, init="pissa", target_modules=("q_proj", "down_proj")),
    "bottleneck": config.Bottleneck(size=8),
    "prefix": config.PrefixTuning(tokens=3),
    "prompt": config.PromptTuning(tokens=3),
    "modules": config.Modules(modules=("norm",)),
    "two": config.Combined(parts=(config.LoRA(r=4, target_modules=("q_proj",)), config.Bottleneck(size=8))),
}
EVERY = {**LORAS, **OTHERS}
BY_ROWS = ("dora", "adalora", "ia3", "bitfit")
ROWS = torch.arange(60).reshape(5, 12) * 11 % VOCABULARY
MIXED = ["sql", None, "code", "sql", "chat"]


def spoken(model: AdaptedModel | Adapters) -> Tensor:
    """The logits of some text, behind whatever virtual tokens there are."""
    virtual = torch.arange(-model.virtual_tokens, 0).expand(len(TOKENS), -1)
    with torch.no_grad():
        logits: Tensor = model.model(input_ids=torch.cat([virtual, TOKENS], 1), use_cache=False).logits
    return logits[:, model.virtual_tokens :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an adapter of every method that does something."""
    folder = tmp_path_factory.mktemp("switching")
    tiny_checkpoint(folder / "base")
    base = tiny_base(folder / "base")
    for number, (name, section) in enumerate(EVERY.items()):
        model = apply_method(base, section)
        generator = torch.Generator().manual_seed(number)
        for values in model.trainable_parameters().values():
            values.data.add_(torch.randn(values.shape, generator=generator) * 0.1)
        save_adapter(model, folder / name)
        model.remove()
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str | None, Tensor]:
    """The logits of the base, and of each adapter loaded on a base of its own."""
    found: dict[str | None, Tensor] = {None: spoken(Adapters(tiny_base(folder / "base")))}
    for name in EVERY:
        found[name] = spoken(load_adapter(tiny_base(folder / "base"), folder / name))
        assert difference(found[name], found[None]) > 1e-3
    return found


@pytest.fixture
def adapters(folder: Path) -> Adapters:
    """The three LoRA adapters on one base, none in use."""
    adapters = Adapters(tiny_base(folder / "base"))
    for name in LORAS:
        adapters.load(name, folder / name)
    return adapters


def test_each_answers_as_if_it_were_alone_and_off_is_the_base(
    adapters: Adapters, alone: dict[str | None, Tensor]
) -> None:
    for name in ("sql", "chat", "sql", None, "code", "chat", None):
        adapters.use(name)
        assert adapters.current == name
        assert torch.equal(spoken(adapters), alone[name])
    adapters.use("chat")
    adapters.off()
    assert adapters.current is None
    assert torch.equal(spoken(adapters), alone[None])
    assert not any(isinstance(module, Planted) for module in adapters.model.modules())


@pytest.mark.parametrize("name", OTHERS)
def test_every_method_is_switched_like_lora(
    folder: Path, adapters: Adapters, alone: dict[str | None, Tensor], name: str
) -> None:
    adapters.use("sql")
    adapters.load(name, folder / name)
    for wanted in ("sql", name, "chat", name, None, name):
        adapters.use(wanted)
        assert torch.equal(spoken(adapters), alone[wanted])
        assert adapters.virtual_tokens == (3 if wanted == "prompt" else 0)


def test_nothing_is_read_or_copied_but_the_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = Adapters(tiny_base(folder / "base"))
    here = {name: values.data_ptr() for name, values in adapters.model.state_dict(keep_vars=True).items()}
    modules = dict(adapters.model.named_modules())
    monkeypatch.setattr("qlora.model.checkpoint.Checkpoint.read", None)  # reading a weight of the base would fail
    for name in LORAS:
        adapters.load(name, folder / name)
    for name in (*LORAS, "sql", None):
        adapters.use(name)
    after = {name: values.data_ptr() for name, values in adapters.model.state_dict(keep_vars=True).items()}
    assert after == here
    assert {path: id(module) for path, module in adapters.model.named_modules()} == {
        path: id(module) for path, module in modules.items()
    }


def test_what_is_in_use_stays_in_use_while_another_comes(folder: Path, alone: dict[str | None, Tensor]) -> None:
    adapters = Adapters(tiny_base(folder / "base"))
    adapters.load("sql", folder / "sql")
    adapters.use("sql")
    adapters.load("chat", folder / "chat")
    assert (adapters.current, adapters.names) == ("sql", ("sql", "chat"))
    assert torch.equal(spoken(adapters), alone["sql"])
    with pytest.raises(MethodError, match=r"no adapter_config\.json"):
        adapters.load("third", folder / "base")
    assert adapters.names == ("sql", "chat")
    assert torch.equal(spoken(adapters), alone["sql"])


def test_using_gives_back_what_was_in_use(adapters: Adapters, alone: dict[str | None, Tensor]) -> None:
    def fail_while_using() -> None:
        with adapters.using("code"):
            raise ZeroDivisionError

    adapters.use("sql")
    with adapters.using("chat"):
        assert torch.equal(spoken(adapters), alone["chat"])
        with adapters.using(None):
            assert torch.equal(spoken(adapters), alone[None])
        assert adapters.current == "chat"
    with pytest.raises(ZeroDivisionError):
        fail_while_using()
    assert torch.equal(spoken(adapters), alone["sql"])


def test_a_new_adapter_is_added_trained_and_saved(folder: Path, tmp_path: Path, adapters: Adapters) -> None:
    adapters.use("sql")
    adapters.add("fresh", config.LoRA(r=2, target_modules=("up_proj",)), seed=3)
    adapters.use("fresh")
    model = adapters["fresh"]
    model.model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    for values in model.trainable_parameters().values():
        assert values.grad is not None
        values.data.add_(values.grad, alpha=-10.0)
    trained = spoken(model)
    adapters.use("chat")
    save_adapter(adapters["fresh"], tmp_path / "fresh")
    adapters.use("fresh")
    assert torch.equal(spoken(adapters), trained)
    again = load_adapter(tiny_base(folder / "base"), tmp_path / "fresh")
    assert torch.equal(spoken(again), trained)


def test_an_adapted_model_of_the_same_base_is_added(folder: Path, alone: dict[str | None, Tensor]) -> None:
    base = tiny_base(folder / "base")
    adapters = Adapters(base)
    model = load_adapter(base, folder / "sql")  # stands in the base, unknown to ``adapters``
    adapters.add("sql", model)
    assert torch.equal(spoken(adapters), alone[None])
    adapters.use("sql")
    assert torch.equal(spoken(adapters), alone["sql"])
    assert adapters.remove("sql") is model
    assert torch.equal(spoken(adapters), alone[None])
    adapters.load("sql", folder / "sql")  # the name is free again
    with pytest.raises(MethodError, match="another copy"):
        adapters.add("other", load_adapter(tiny_base(folder / "base"), folder / "chat"))


def test_any_module_of_yours_carries_several_adapters() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    adapters = Adapters(network)
    for number, name in enumerate(("one", "two")):
        adapters.add(name, config.LoRA(r=2, target_modules=("0", "2")))
        for values in adapters[name].trainable_parameters().values():
            values.data.normal_(generator=torch.Generator().manual_seed(number))
    x = torch.randn(4, 6)
    each = {}
    for name in ("one", "two", None):
        with adapters.using(name), torch.no_grad():
            each[name] = network(x)
    with adapters.mixed(["two", "one", None, "two"]), torch.no_grad():
        found = network(x)
    expected = torch.stack([each["two"][0], each["one"][1], each[None][2], each["two"][3]])
    torch.testing.assert_close(found, expected, rtol=rounding(), atol=rounding(LAYER))


def logits_by_rows(adapters: Adapters, names: list[str | None], rows: Tensor) -> Tensor:
    """Each row's logits, answered one after the other by its adapter."""
    found = []
    for name, row in zip(names, rows, strict=True):
        with adapters.using(name), torch.no_grad():
            found.append(adapters.model(input_ids=row[None], use_cache=False).logits)
    return torch.cat(found)


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_each_row_of_a_mixed_batch_is_answered_by_its_adapter(folder: Path, quantization: str) -> None:
    adapters = Adapters(tiny_base(folder / "base", quantization))
    for name in LORAS:
        adapters.load(name, folder / name)
    adapters.use("chat")
    expected = logits_by_rows(adapters, MIXED, ROWS)
    with adapters.mixed(MIXED), torch.no_grad():
        assert adapters.current is None
        found = adapters.model(input_ids=ROWS, use_cache=False).logits
    print(f"{quantization}: {difference(found, expected):.1e}")
    assert difference(found, expected) < rounding()
    assert adapters.current == "chat"
    for name in (None, *LORAS):
        assert difference(logits_by_rows(adapters, [name] * 5, ROWS), expected) > 1e-2


@pytest.mark.parametrize("name", BY_ROWS)
def test_other_methods_on_linears_stand_beside_lora(folder: Path, adapters: Adapters, name: str) -> None:
    adapters.load(name, folder / name)
    names = [name, "sql", None, name, "code"]
    expected = logits_by_rows(adapters, names, ROWS)
    with adapters.mixed(names), torch.no_grad():
        found = adapters.model(input_ids=ROWS, use_cache=False).logits
    print(f"{name}: {difference(found, expected):.1e}")
    assert difference(found, expected) < rounding()


def test_the_frozen_product_is_made_once_for_all_rows(adapters: Adapters, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = adapters.model.get_submodule("model.layers.0.self_attn.q_proj")
    seen: list[int] = []

    def counted(base: Any, x: Tensor, onto: Tensor) -> None:
        if base is linear:
            seen.append(len(x))
        add_product(base, x, onto)

    monkeypatch.setattr(switching, "add_product", counted)
    with adapters.mixed(MIXED), torch.no_grad():
        adapters.model(input_ids=ROWS, use_cache=False)
    assert seen == [5]


def test_a_mixed_batch_trains_each_adapter_on_its_rows(adapters: Adapters) -> None:
    rows = ROWS[:2]
    wanted = {}
    for number, name in enumerate(("sql", "chat")):
        with adapters.using(name):
            adapters.model(input_ids=rows[number : number + 1], use_cache=False).logits.square().sum().backward()
        for key, values in adapters[name].trainable_parameters().items():
            wanted[name, key], values.grad = values.grad, None
    with adapters.mixed(["sql", "chat"]):
        adapters.model(input_ids=rows, use_cache=False).logits.square().sum().backward()
    for (name, key), expected in wanted.items():
        found = adapters[name].trainable_parameters()[key].grad
        assert found is not None
        assert difference(found, expected) < rounding()


def test_dropout_in_a_mixed_batch_follows_the_mode(folder: Path) -> None:
    adapters = Adapters(tiny_base(folder / "base"))
    adapters.add("wild", config.LoRA(r=4, dropout=0.5))
    for values in adapters["wild"].trainable_parameters().values():
        values.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    for training in (False, True):
        adapters.model.train(training)
        with adapters.mixed(["wild", None]):
            first, second = spoken(adapters), spoken(adapters)
        assert torch.equal(first[1], second[1])
        assert torch.equal(first[0], second[0]) is not training


PROMPTS = [[5, 9, 11, 20, 7], [8, 30, 31], [40, 2, 3, 5, 60, 61, 17], [5, 9, 11, 20, 7]]


def test_answers_under_each_and_mixed(folder: Path, adapters: Adapters) -> None:
    names = ["sql", None, "code", "chat"]
    expected = []
    for name, prompt in zip(names, PROMPTS, strict=True):
        with adapters.using(name):
            expected += answers(adapters, [prompt], 8)
        if name is not None:
            model = load_adapter(tiny_base(folder / "base"), folder / name)
            assert answers(model, [prompt], 8) == expected[-1:]
    with adapters.mixed(names):
        assert answers(adapters, PROMPTS, 8) == expected
    with adapters.using("sql"):
        assert answers(adapters, PROMPTS, 8) != expected


def test_answers_under_a_prompt(folder: Path) -> None:
    adapters = Adapters(tiny_base(folder / "base"))
    adapters.load("prompt", folder / "prompt")
    model = load_adapter(tiny_base(folder / "base"), folder / "prompt")
    with adapters.using("prompt"):
        assert answers(adapters, PROMPTS, 8) == answers(model, PROMPTS, 8)
    bare = answers(adapters, PROMPTS, 8)
    assert bare != answers(model, PROMPTS, 8)


@pytest.mark.parametrize("name", ["pissa", "bottleneck", "prefix", "prompt", "modules", "two"])
def test_what_cannot_answer_single_rows_is_refused(folder: Path, adapters: Adapters, name: str) -> None:
    adapters.load(name, folder / name)
    adapters.use("sql")
    said = "changes the base itself" if name == "pissa" else "changes more than single rows"
    with pytest.raises(MethodError, match=rf"'{name}'.*{said}.*using\('{name}'\)"), adapters.mixed([name, "sql"]):
        pass
    assert adapters.current == "sql"


def test_a_batch_of_another_size_is_refused(adapters: Adapters, alone: dict[str | None, Tensor]) -> None:
    adapters.use("sql")
    with adapters.mixed(["chat", None, "code"]), pytest.raises(MethodError, match=r"has 2 rows, but mixed\(\) got 3"):
        spoken(adapters)
    with adapters.mixed(["chat"]), pytest.raises(MethodError, match=r"has 2 rows, but mixed\(\) got 1"):
        spoken(adapters)
    assert torch.equal(spoken(adapters), alone["sql"])


class Experts(nn.Module):
    """Sends some of all positions, from any row, through a linear of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 4)
        self.expert = nn.Linear(4, 4)
        self.flat = nn.Linear(4, 4)

    def forward(self, input_ids: Tensor, chosen: Tensor | None = None) -> Tensor:
        flat = self.embedding(input_ids).flatten(0, 1)
        flat = self.flat(flat)
        if chosen is not None:
            flat = flat.index_copy(0, chosen, self.expert(flat[chosen]))
        return flat


def test_flattened_rows_are_found_and_chosen_positions_refused() -> None:
    torch.manual_seed(0)
    adapters = Adapters(Experts())
    adapters.add("one", config.LoRA(r=2, target_modules=("flat", "expert")))
    for values in adapters["one"].trainable_parameters().values():
        values.data.normal_()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = torch.cat([adapters.model(ids[:1]), adapters.model(ids[1:])])
    with adapters.using("one"):
        expected[:3] = adapters.model(ids)[:3]
    with adapters.mixed(["one", None]):
        torch.testing.assert_close(adapters.model(ids), expected)
        with pytest.raises(MethodError, match=r"sends \[4, 4\].*cannot be told apart"):
            adapters.model(ids, chosen=torch.tensor([0, 2, 4, 5]))


def test_names_are_checked(folder: Path, adapters: Adapters, alone: dict[str | None, Tensor]) -> None:
    for act in (adapters.use, adapters.remove, adapters.__getitem__, lambda name: adapters.mixed([name]).__enter__()):
        with pytest.raises(MethodError, match=r"called 'sqll'; there are sql, chat, code\. Did you mean 'sql'\?"):
            act("sqll")
    with pytest.raises(MethodError, match="none was loaded yet"):
        Adapters(tiny_base(folder / "base")).use("sql")
    with pytest.raises(MethodError, match="'sql' already"):
        adapters.load("sql", folder / "chat")
    with pytest.raises(MethodError, match="name that is not empty"):
        adapters.load("", folder / "chat")
    with pytest.raises(MethodError, match="no names"), adapters.mixed([]):
        pass
    assert torch.equal(spoken(adapters), alone[None])


def test_no_switching_inside_a_mixed_batch(adapters: Adapters) -> None:
    with adapters.mixed(["sql", "chat"]):
        for act in (lambda: adapters.use("sql"), adapters.off, lambda: adapters.remove("sql")):
            with pytest.raises(MethodError, match=r"leave mixed\(\)"):
                act()
        with pytest.raises(MethodError, match=r"leave mixed\(\)"), adapters.mixed(["sql"]):
            pass
        with pytest.raises(MethodError, match=r"leave mixed\(\)"):
            adapters.add("new", config.LoRA(r=2))
    assert adapters.names == ("sql", "chat", "code")


def test_an_adapter_of_another_base_is_refused_and_nothing_changes(
    folder: Path, tmp_path: Path, adapters: Adapters, alone: dict[str | None, Tensor]
) -> None:
    other: Any = apply_method(tiny_base(tiny_checkpoint(tmp_path / "other", num_hidden_layers=1)), LORAS["sql"])
    save_adapter(other, tmp_path / "adapter")
    adapters.use("chat")
    with pytest.raises(MethodError, match="another base"):
        adapters.load("foreign", tmp_path / "adapter")
    assert torch.equal(spoken(adapters), alone["chat"])
    assert "foreign" not in adapters.names


def test_a_base_that_carries_something_and_full_fine_tuning_are_refused(folder: Path) -> None:
    model = load_adapter(tiny_base(folder / "base", "none"), folder / "sql")
    with pytest.raises(MethodError, match="carries an adapter already"):
        Adapters(model.base)
    adapters = Adapters(model.remove())
    with pytest.raises(MethodError, match="'whole' is full fine-tuning, which overwrites the base"):
        adapters.add("whole", config.Full())
    assert not any(isinstance(module, LoraLinear) for module in adapters.model.modules())


def test_its_repr_lists_the_adapters(folder: Path, adapters: Adapters) -> None:
    lines = repr(adapters).splitlines()
    assert lines[0] == f"Adapters on {adapters.base.name} (nf4, cpu), answering: the base alone"
    assert [line.partition(":")[0].strip() for line in lines[1:]] == list(adapters.names)
    name = adapters.names[0]
    assert lines[1] == f"  {name}: lora, {adapters[name].count_trainable():,} numbers"
    adapters.use(name)
    assert repr(adapters).splitlines()[0].endswith(f"answering: {name}")
    assert repr(Adapters(tiny_base(folder / "base"))).endswith("no adapter yet")
