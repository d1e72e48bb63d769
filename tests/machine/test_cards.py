"""Named cards: found however they are written, never guessed; and amounts of memory as people write them."""

from __future__ import annotations

import pytest

from qlora.errors import RecipeError
from qlora.machine.cards import CARDS, card, parse_memory, several, workspace_bytes
from qlora.machine.disk import GIB


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("4090", "4090"),
        ("RTX 4090", "4090"),
        ("rtx-4090", "4090"),
        ("nvidia-4090", "4090"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("RTX4090", "4090"),
        ("t4", "T4"),
        ("Tesla T4", "T4"),
        ("3060", "3060-12"),
        ("RTX 3060 12GB", "3060-12"),
        ("3090", "3090"),
        ("3090 ti", "3090-Ti"),
        ("4060 Ti", "4060-Ti-16"),
        ("A6000", "RTX-A6000"),
        ("NVIDIA RTX A6000", "RTX-A6000"),
        ("a100-80", "A100-80"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("h100 pcie", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("Tesla V100-SXM2-16GB", "V100-16"),
        ("NVIDIA L4", "L4"),
        ("L40S", "L40S"),
    ],
)
def test_found_however_it_is_written(written: str, name: str) -> None:
    assert card(written).name == name


@pytest.mark.parametrize("name", CARDS)
def test_every_name_finds_its_own_card_and_is_possible(name: str) -> None:
    one = card(name)
    assert one is CARDS[name]
    assert card(name.upper()) is one
    assert 0.9 < one.memory / (one.gigabytes * GIB) < 1.0
    assert 0 < one.gigabytes * GIB - one.memory < 0.1 * one.gigabytes * GIB
    assert one.dtype in ("bf16", "fp16")
    # a card that could not read its memory 20 to 500 times slower than it multiplies would be a slip of a unit
    assert 50 < one.flops / one.bandwidth < 500
    assert 10e9 < one.to_device < one.bandwidth


def test_the_generation_says_what_the_hardware_has() -> None:
    assert {name for name, one in CARDS.items() if one.dtype == "fp16"} == {"T4", "V100-16", "V100-32", "2080-Ti"}
    assert card("H100").workspace == workspace_bytes(9.0) == 32 * 2**20
    assert card("4090").workspace == workspace_bytes(8.9) == 8 * 2**20 + 2**17


@pytest.mark.parametrize("written", ["A100", "V100"])
def test_two_sizes_are_not_guessed(written: str) -> None:
    with pytest.raises(RecipeError, match=rf"comes in several sizes: {written}-\d\d, {written}-\d\d; give one"):
        card(written)


@pytest.mark.parametrize(
    ("written", "near"),
    [
        ("4900", "4090"),
        ("rtx 3080-12", "3080-10"),
        ("H1000", "H100"),
        ("5070", "5070-Ti"),
        ("RTX 6000", "RTX-A6000"),
        ("30", "A30"),
    ],
)
def test_an_unknown_card_names_the_nearest(written: str, near: str) -> None:
    with pytest.raises(RecipeError, match=f"'{written}' is not a card that is known here. Did you mean '{near}'"):
        card(written)


@pytest.mark.parametrize("written", ["", "nvidia", "the big one", "rtx"])
def test_what_is_like_no_card_gets_the_names(written: str) -> None:
    with pytest.raises(RecipeError, match=r"The names are T4, .*B200\. Or give its memory, as in 24GiB"):
        card(written)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GiB", 24 * 2**30),
        ("24 gib", 24 * 2**30),
        (" 1.5GiB ", 3 * 2**29),
        (".5MiB", 2**19),
        ("8KiB", 8192),
        ("2TiB", 2**41),
        ("24GB", 24 * 10**9),
        ("800mb", 8 * 10**8),
        ("3kB", 3000),
        ("1TB", 10**12),
        ("17B", 17),
    ],
)
def test_amounts(text: str, count: int) -> None:
    assert parse_memory(text) == count


@pytest.mark.parametrize(
    "text", ["", "24", "GiB", "24GiBs", "24G", "1e3GiB", "nanGiB", "24 GiB of it", "24GiB 3MiB", "٣GiB"]
)
def test_garbage_is_one_sentence(text: str) -> None:
    with pytest.raises(RecipeError, match=r"is not an amount of memory; expected a number with its unit, as in 24GiB"):
        parse_memory(text)


@pytest.mark.parametrize("text", ["0GiB", "-4GiB", "0.0000001B", "-0 B"])
def test_nothing_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is no memory at all; expected more than 0"):
        parse_memory(text)


def test_several_cards_of_a_kind() -> None:
    assert several("2x4090") == several("2 x 4090") == several("2×4090") == (2, "4090")
    assert several("12x24GiB") == (12, "24GiB")
    for one in ("4090", "24GiB", "0x4090", "x4090", "RTX 4090"):
        assert several(one) == (1, one)
