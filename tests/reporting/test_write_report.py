"""The page as a whole: what it says of finished, unfinished and damaged runs, and that it is safe and self-contained."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qlora.errors import RunError
from qlora.reporting import write_report
from tests.reporting.conftest import RunFolder, step_line

ATTACKS = [
    "</script><img src=x onerror=alert(1)>",
    "</style><script>alert(1)</script>",
    "\"'><svg/onload=alert(1)>",
    "</title></textarea><iframe src=//evil.example>",
    "<!--",
    "]]><a href=javascript:alert(1)>",
]
KNOWN = """
html head meta title style body header main footer div span section article h1 h2 h3 p b ul li dl dt dd figure
figcaption svg g text line rect circle polyline table thead tbody tr th td details summary pre small ins del code
"""


class Reader(HTMLParser):
    """Collects elements, attributes and text, and checks that elements close in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.open: list[str] = []
        self.comments: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if not self.open or self.open[-1] != "style" else ""

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)


def read(report: Path) -> Reader:
    reader = Reader()
    reader.feed(report.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


def text_of(run: RunFolder) -> str:
    return read(write_report(run.path)).text


def test_finished_run(finished: RunFolder) -> None:
    report = write_report(finished.path)
    assert report == finished.path / "report.html"
    page = read(report)
    for expected in (
        "Finished", "3.200", "1.600", "−50.0 %", "perplexity 24.53 → 4.953", "25.0 k", "2.50 % of 1.00 M", "20 s",
        "1.00 GiB", "2\u202f400 with loss", "What is up?", "The sky.", "I do not know.", "The sky is.", "60.0 %", "truncated",
        "dropped", "A note of the data room.", "as this is a CPU", "abc123", "2.13.0", "learning_rate", "0.0005",
        "qlora train runs/demo/recipe.yaml folder=runs/demo-again", "qlora chat runs/demo", "held out",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert "split conversations" not in page.text  # zero, and nobody looks for it
    assert {"svg", "polyline", "circle"} <= page.tags


def test_the_page_is_self_contained(finished: RunFolder) -> None:
    source = write_report(finished.path).read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import|<script|<link|<img|\bsrc=|\bhref=", source)
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)"', source)
    assert policy
    assert policy[1].split("; ")[:2] == ["default-src 'none'", "style-src 'unsafe-inline'"]
    assert "script-src" not in policy[1]
    assert source.index("Content-Security-Policy") < source.index("<style")
    assert "color-scheme: light dark" in source
    assert "@media print" in source


def test_the_same_files_give_the_same_bytes(finished: RunFolder) -> None:
    first = write_report(finished.path).read_bytes()
    assert write_report(finished.path).read_bytes() == first
    assert sorted(path.name for path in finished.path.iterdir() if path.name.startswith(".")) == []
    assert str(finished.path.parent).encode() not in first


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_text_stays_text(finished: RunFolder, attack: str) -> None:
    """In answers, recipe values and keys, plan, environment, metrics, and as JSON keys."""
    finished.recipe(model={"name": attack}, data={"train": attack, "columns": {attack: attack}})
    plan = json.loads((finished.path / "plan.json").read_text())
    plan["model"]["name"] = plan["device"] = plan["data"]["form"] = plan["model"]["quantization"] = attack
    plan["data"]["train"][attack] = 7
    plan["data"][attack] = {attack: 1}
    plan["memory"][attack] = 5
    plan["why"] = [attack, {attack: attack}]
    finished.json("plan.json", plan)
    finished.json("environment.json", {"versions": {attack: attack}, attack: attack, "device": attack})
    generation = {
        "prompt": attack,
        "expected": attack,
        "before": attack,
        "after": [{"role": attack, "content": attack}],
    }
    evaluation = json.loads((finished.path / "evaluation.json").read_text())
    finished.json(
        "evaluation.json", {**evaluation, "generations": [generation, {attack: attack}, attack], attack: attack}
    )
    finished.metrics([step_line(1, **{attack: attack}), step_line(2, loss=attack), attack, step_line(3, step=attack)])
    page = read(write_report(finished.path))
    assert page.tags <= set(KNOWN.split())
    assert not page.comments
    assert not any(name.startswith("on") for name in page.attributes)
    assert {"src", "href", "style", "srcdoc"}.isdisjoint(page.attributes)
    assert page.text.count(attack) >= 10


def test_a_hostile_folder_name(finished: RunFolder) -> None:
    folder = finished.path.rename(finished.path.parent / "$(reboot)<b onclick=x>'")
    page = read(write_report(folder))
    assert "b" not in page.attributes
    assert "onclick" not in page.attributes
    assert "'$(reboot)<b onclick=x>'\"'\"''" in page.text  # quoted for the shell that it is pasted into


def test_text_that_is_no_unicode(finished: RunFolder) -> None:
    """A lone surrogate and control characters, as a byte-level tokenizer's half characters may leave them."""
    finished.json(
        "evaluation.json", {"generations": [{"prompt": "a\ud800b\u0000c\u001bd", "before": "", "after": None}]}
    )
    text = text_of(finished)
    assert "a\ufffdb\ufffdc\ufffdd" in text
    assert "(an empty answer)" in text
    assert "not yet" in text


def test_run_that_has_just_begun(begun: RunFolder) -> None:
    text = text_of(begun)
    assert "Not begun" in text
    assert "Nothing has been recorded yet." in text
    assert "Answers" not in text


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 20])
def test_run_that_was_stopped(begun: RunFolder, steps: int) -> None:
    begun.metrics([step_line(step) for step in range(1, steps + 1)], torn='{"step": 21, "lo')
    text = text_of(begun)
    assert f"Not finished, at step {steps} of 40" in text
    assert f"The last line of metrics.jsonl (line {steps + 1}) is torn and was skipped." in text
    assert "qlora resume runs/demo" in text
    assert "qlora chat" not in text
    assert ("smoothed over" in text) == (steps >= 8)


def test_evaluated_before_only(begun: RunFolder) -> None:
    begun.metrics([step_line(1)])
    begun.json(
        "evaluation.json",
        {"held_out": {"before": {"loss": 3.2, "perplexity": 24.5, "target_tokens": 9}, "after": None}},
    )
    text = text_of(begun)
    assert "Not finished" in text
    assert "3.200→—" in text


def test_damaged_files_are_left_out_and_said(finished: RunFolder) -> None:
    (finished.path / "evaluation.json").write_text('{"held_out": ')
    (finished.path / "plan.json").write_text("[1, 2]")
    (finished.path / "environment.json").write_bytes(b"\xff\xfe")
    finished.metrics(
        [step_line(1), "not json", step_line(2, loss=float("nan")), step_line(2), step_line(3, loss=1e400)]
    )
    text = text_of(finished)
    for name in ("evaluation.json could not be read", "plan.json holds list", "environment.json could not be read"):
        assert name in text
    assert "Lines of metrics.jsonl that are not objects with a step were skipped: 2." in text
    assert "Steps that stand twice in metrics.jsonl (1)" in text
    assert "NaN" not in text
    assert "nan" not in text


def test_a_recipe_of_another_version_is_shown_as_it_is(finished: RunFolder) -> None:
    (finished.path / "recipe.yaml").write_text("model: {name: org/model}\nfuture: {key: <b>1</b>}\n")
    text = text_of(finished)
    assert "recipe.yaml does not validate with this version" in text
    assert "future: {key: <b>1</b>}" in text


def test_folders_that_are_no_run(tmp_path: Path, begun: RunFolder) -> None:
    with pytest.raises(RunError, match="There is no run folder at"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"not a run folder: recipe\.yaml"):
        write_report(tmp_path)
    (begun.path / "plan.json").unlink()
    with pytest.raises(RunError, match=r"plan\.json or metrics\.jsonl"):
        write_report(begun.path)
    assert not (begun.path / "report.html").exists()


def test_a_long_run_stays_a_small_page(begun: RunFolder) -> None:
    begun.metrics([step_line(step, total=20_000) for step in range(1, 20_001)])
    report = write_report(begun.path)
    assert report.stat().st_size < 600_000
    assert "20\u202f000" in read(report).text


def test_final_ranks_are_drawn_by_the_name_of_the_linear(finished: RunFolder) -> None:
    assert "Final ranks" not in write_report(finished.path).read_text(encoding="utf-8")
    ranks = {"model.layers.0.mlp.up_proj": 2, "model.layers.1.mlp.up_proj": 5, "model.layers.0.self_attn.q_proj": 0}
    finished.json("method.json", {"ranks": ranks})
    page = write_report(finished.path).read_text(encoding="utf-8")
    begin = page.index("Final ranks")
    assert 'width="100.0" height="10" class="bar"' in page[begin:]
    assert 'width="0.4" height="10" class="bar"' in page[begin:]  # rank 0 is seen too
    assert "3.5 (2 to 5)" in page
    assert page.index("up_proj", begin) < page.index("q_proj", begin)


def test_the_verdict_stands_under_the_title_in_its_colour(finished: RunFolder) -> None:
    assert 'class="verdict' not in write_report(finished.path).read_text(encoding="utf-8")  # nothing was judged
    evaluation = json.loads((finished.path / "evaluation.json").read_text())
    for outcome, kind in (
        ("better", "better"),
        ("worse", "worse"),
        ("diverged", "worse"),
        ("no clear change", "unsure"),
    ):
        finished.json("evaluation.json", {**evaluation, "verdict": {"outcome": outcome, "said": "by <so> much"}})
        source = write_report(finished.path).read_text(encoding="utf-8")
        assert f'<p class="verdict {kind}"><b>{outcome.capitalize()}</b> by &lt;so&gt; much</p>' in source
        assert ("training.learning_rate=5e-05" in source) == (kind == "worse")  # what to do next
        assert ("qlora chat" in source) == (kind != "worse")


def test_a_run_that_diverges_or_holds_nothing_out_does_not_look_good(begun: RunFolder) -> None:
    lines = [step_line(step) for step in range(1, 11)]
    lines[6]["note"] = "The loss diverges: stop."
    begun.metrics(lines)
    page = write_report(begun.path).read_text(encoding="utf-8")
    assert '<p class="verdict worse"><b>Diverges</b> The loss diverges: stop.</p>' in page
    assert "Step 7: The loss diverges: stop." in page
    begun.metrics([step_line(step) for step in range(1, 41)])
    assert '<p class="verdict unsure"><b>Not known</b> Nothing is held out' in write_report(begun.path).read_text(
        "utf-8"
    )


def test_checkpoints_and_where_it_was_gone_on_with_are_marked(finished: RunFolder) -> None:
    finished.recipe(training={"save_every": 15})
    lines = [step_line(step) | ({"resumed": True} if step == 31 else {}) for step in range(1, 41)]
    finished.metrics(lines)
    source = write_report(finished.path).read_text(encoding="utf-8")
    chart = source[source.index('class="on-wide"') : source.index('class="on-narrow"')]
    assert chart.count('class="saved"') == 3  # 15, 30 and the last
    assert chart.count('class="resumed"') == 1


def test_data_are_bars_and_defaults_are_folded_away(finished: RunFolder) -> None:
    source = write_report(finished.path).read_text(encoding="utf-8")
    folded = re.findall(r"<details>.*?</details>", source, re.DOTALL)
    assert sum("warmup_fraction" in part for part in folded) == 2  # in all values, and in recipe.yaml
    open_ = re.sub(r"<details>.*?</details>", "", source, flags=re.DOTALL)
    assert "warmup_fraction" not in open_
    data = open_[open_.index("<h2>Data</h2>") : open_.index("<h2>Memory")]
    for kept in ("kept whole", "truncated at max_length", "dropped, too long"):
        assert kept in data
    assert "skipped, no answer" not in data  # none was
