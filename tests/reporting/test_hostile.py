"""The page of a run that is hostile throughout: by its structure, and opened in a browser, nothing of it runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qlora.reporting import write_report
from tests.reporting.conftest import RunFolder
from tests.reporting.hostile import PAYLOADS, RUN, Structure, make_hostile, spoil_recipe

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --virtual-time-budget=3000 --dump-dom"
)


def hostile_page(run: RunFolder, recipe_validates: bool = True) -> str:
    make_hostile(run, PAYLOADS)
    if not recipe_validates:
        spoil_recipe(run, PAYLOADS)
    return write_report(run.path).read_text(encoding="utf-8")


@pytest.mark.parametrize("recipe_validates", [True, False])
def test_nothing_in_the_page_can_run(finished: RunFolder, recipe_validates: bool) -> None:
    source = hostile_page(finished, recipe_validates)
    assert ("does not validate" in source) == (not recipe_validates)
    page = Structure(source)
    assert page.tags.isdisjoint(
        {"script", "img", "iframe", "a", "base", "link", "object", "embed", "math", "animate", "input"}
    )
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert {name for name, _ in page.attributes}.isdisjoint({"src", "href", "srcdoc", "style", "action", "xlink:href"})
    assert page.others == []
    assert source.count("<style") == source.count("</style") == source.count("</title") == 1
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", source)
    assert source.count("data-reached") > 500  # it is all there, as text
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert not re.search("script|img|connect|unsafe-eval|http|[*]", policy.replace("base-uri", ""))


def opened(page: Path, profile: Path) -> str:
    """The document that a browser makes of a page, after three seconds of its time."""
    assert BROWSER
    home = {"HOME": str(profile), "XDG_CONFIG_HOME": str(profile), "XDG_CACHE_HOME": str(profile)}
    done = subprocess.run(
        [BROWSER, *FLAGS.split(), f"--user-data-dir={profile}", page.as_uri()],
        capture_output=True,
        env={**os.environ, **home},
        timeout=120,
        check=False,
    )
    return done.stdout.decode("utf-8", errors="replace")


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome here")
@pytest.mark.parametrize("policy", [True, False], ids=["with the policy", "by escaping alone"])
def test_a_browser_runs_nothing_of_it(finished: RunFolder, tmp_path: Path, policy: bool) -> None:
    source = hostile_page(finished)
    if not policy:
        source, found = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
        assert found == 1
    page = tmp_path / "page.html"
    page.write_text(source, encoding="utf-8")
    document = opened(page, tmp_path / "profile")
    assert document.rstrip().endswith("</html>"), document[-500:]
    assert "Made by qlora" in document
    root = document[document.index("<html") : document.index(">", document.index("<html"))]
    assert root == '<html lang="en"'
    assert "data-reached" in document  # as text


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome here")
def test_the_payloads_run_where_nothing_keeps_them_from_it(tmp_path: Path) -> None:
    """What the test above rests on: the browser runs scripts, and what they do is seen. The policy alone stops them too."""
    attack = f"<img src=x onerror={RUN}><script>{RUN}</script>"
    open_page = tmp_path / "open.html"
    open_page.write_text(f'<!DOCTYPE html><html lang="en"><body>{attack}</body></html>', encoding="utf-8")
    assert '<html lang="en" data-reached="1"' in opened(open_page, tmp_path / "one")
    from qlora.reporting.page import POLICY

    meta = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"/>'
    closed = tmp_path / "closed.html"
    closed.write_text(
        f'<!DOCTYPE html><html lang="en"><head>{meta}</head><body>{attack}</body></html>', encoding="utf-8"
    )
    document = opened(closed, tmp_path / "two")
    assert "<body>" in document
    assert '<html lang="en">' in document
