"""The bounds that other tests hold results to: rounding passes, a mistake does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.methods.against_peft import plain_model
from tests.rounding import difference, doubled, no_worse, none_worse, rounding
from tests.tiny import TOKENS, logits_of, tiny_checkpoint


def test_another_order_passes_and_a_mistake_does_not() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(40, 300), torch.randn(300, 50)
    exact, plain = x.double() @ weight.double(), x @ weight
    other = torch.stack([(x[:, half] @ weight[half]) for half in (slice(150), slice(150, 300))]).sum(0)
    no_worse(other, plain, exact)
    assert difference(other, plain) < rounding(sums=1, terms=300)
    wrong = plain + 1e-4 * plain.abs().max()
    assert difference(wrong, plain) > rounding(sums=1, terms=300)
    with pytest.raises(AssertionError, match=r"y: ours errs by 1\.0e-04"):
        none_worse({"x": other, "y": wrong}, {"x": plain, "y": plain}, {"x": exact, "y": exact})
    with pytest.raises(AssertionError):
        no_worse(torch.full_like(plain, torch.nan), plain, exact)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_doubled_model_computes_the_same_to_twice_the_digits(tmp_path: Path, quantization: str) -> None:
    model = plain_model(tiny_checkpoint(tmp_path), quantization).train()
    exact = logits_of(doubled(model))
    assert exact.dtype == torch.float64
    assert 0 < difference(logits_of(model), exact) < rounding()
    # its norms and its softmax too, which transformers computes in fp32 otherwise: another order differs by far less
    at_once = doubled(model)(input_ids=TOKENS, use_cache=False).logits
    apart = torch.cat([doubled(model)(input_ids=row[None], use_cache=False).logits for row in TOKENS])
    assert difference(at_once, apart) < 1e-3 * rounding()
