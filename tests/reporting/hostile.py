"""A run folder in which every text is hostile: what it says tries to run, in every way that a page could let it.

A payload that runs gives the page's root element the attribute ``data-reached``; none can do so without running.
"""

from __future__ import annotations

import json
from html.parser import HTMLParser

import yaml

from tests.reporting.conftest import RunFolder, step_line

RUN = "document.documentElement.setAttribute(`data-reached`,1)"
PAYLOADS = [
    f"<script>{RUN}</script>",
    f"</script><script>{RUN}</script>",
    f"</style><script>{RUN}</script>",
    f"</title></textarea></noscript></template><img src=x onerror={RUN}>",
    f"\"'><img src=x onerror={RUN}>",
    f'" autofocus tabindex=1 onfocus="{RUN}" x="',
    f"<svg onload={RUN}>",
    f"<svg><animate onbegin={RUN} attributeName=x dur=1s></svg>",
    f"</text></svg><svg/onload={RUN}>",
    f"<details open ontoggle={RUN}>",
    f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    f"<body onload={RUN}><input autofocus onfocus={RUN}>",
    f"<a href=javascript:{RUN} id=clicked>x</a>",
    f"<meta http-equiv=refresh content='0;url=javascript:{RUN}'>",
    f"<base href=javascript:{RUN}//><link rel=stylesheet href=//evil.example/x.css>",
    f"<math><mtext></p><mglyph><style><!--</style><img title='--&gt;&lt;img src=x onerror={RUN}&gt;'>",
    f"<!--><img src=x onerror={RUN}>-->",
    f"]]><![CDATA[<script>{RUN}</script>",
    f"&lt;img src=x onerror={RUN}&gt; &#60;script&#62;",
    f"+ADw-script+AD4-{RUN}+ADw-/script+AD4-",
    f"\x00<\x00script>{RUN}</script>\x1b[31m\x7f\x85",
    f"\u2028<script>{RUN}</script>\u2029",
    f"\u202e>tpircs<{RUN}\u202c\u2066<script>{RUN}</script>",
    f"\ud800<script>{RUN}</script>\udfff\ufffe",
    f"<<script>{RUN}//<</script>",
    f"<scr\x00ipt>{RUN}</scr\x00ipt>",
    "}</style>*{background:url(//evil.example/x)}",
    "${alert(1)} {{constructor.constructor('alert(1)')()}} `",
]


def make_hostile(run: RunFolder, payloads: list[str]) -> None:
    """Rewrite every file of a finished run so that each text in it, each key too, holds all of ``payloads``."""
    attack = " ".join(payloads)
    each = {f"{payload}{number}": payload for number, payload in enumerate(payloads)}
    # what YAML cannot hold stays in the other files
    plain = "".join(letter if letter.isprintable() else " " for letter in attack)
    run.recipe(
        folder=plain,
        model={"name": plain},
        method={"name": "lora", "target_modules": [plain.replace(",", " ")]},
        data={"train": plain, "chat_template": plain, "columns": {"text": plain}},
    )
    run.json(
        "plan.json",
        {
            "model": {"name": attack, "parameters": 1_000_000, "quantization": attack, attack: attack},
            "method": {"trainable_parameters": 25_000, attack: attack},
            "data": {
                "form": attack,
                "train_on": attack,
                "template": attack,
                "train": {"records": 9, "tokens": attack, attack: 7, **dict.fromkeys(each, 1)},
                attack: {attack: 1},
                "notes": [attack, {attack: attack}, [{"role": attack, "content": attack}], *payloads],
            },
            "steps": 40,
            "device": attack,
            "memory": {"base": 3 * 2**20, attack: 5, **dict.fromkeys(each, 9)},
            "why": [attack, {attack: attack}, *payloads],
        },
    )
    run.json(
        "environment.json",
        {"versions": {attack: attack, **each}, "device_name": attack, attack: [attack, {attack: attack}], **each},
    )
    answer = {"prompt": attack, "expected": attack, "before": attack, "after": [{"role": attack, "content": attack}]}
    one = [{"prompt": payload, "before": payload, "after": payload} for payload in payloads]
    scores = {when: {"loss": 2.0, "perplexity": 9.0, "target_tokens": attack} for when in ("before", "after", attack)}
    run.json("evaluation.json", {"held_out": scores, "generations": [answer, attack, {attack: attack}, *one]})
    run.json("method.json", {"ranks": {attack: 3, **{f"layer.{key}": 2 for key in each}}, attack: attack})
    rows = [{"task": payload, "metric": payload, "items": payload, "base": {"value": payload}} for payload in payloads]
    number = {"value": 0.5, "error": attack}
    run.json(
        "tasks.json",
        {"tasks": [attack, {"task": attack, "metric": {attack: attack}, "base": number, "chance": attack}, *rows]},
    )
    run.metrics(
        [step_line(step, **{attack: attack, "note": attack}) for step in range(1, 10)]
        + [f"no JSON: {plain}", json.dumps(attack), step_line(10, loss=attack), {"step": attack}]
    )


def spoil_recipe(run: RunFolder, payloads: list[str]) -> None:
    """A recipe that does not validate, whose text and whose mistakes are shown."""
    plain = "".join(letter if letter.isprintable() else " " for letter in " ".join(payloads))
    (run.path / "recipe.yaml").write_text(yaml.safe_dump({plain: {plain: plain}}), encoding="utf-8")


class Structure(HTMLParser):
    """What a parser finds in a page: elements, attributes with their values, comments."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()
        self.others: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {(name, value or "") for name, value in attrs}

    def handle_comment(self, data: str) -> None:
        self.others.append(data)

    def unknown_decl(self, data: str) -> None:
        self.others.append(data)
