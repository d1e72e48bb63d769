"""Markup: everything is escaped that was not built as markup."""

from __future__ import annotations

from qlora.reporting.markup import Markup, escape, join, tag


def test_text_and_attributes_are_escaped_once() -> None:
    assert tag("p", "1 < 2 & 'x'") == "<p>1 &lt; 2 &amp; &#x27;x&#x27;</p>"
    assert tag("p", tag("b", "<")) == "<p><b>&lt;</b></p>"
    assert tag("p", title='" onclick="x') == '<p title="&quot; onclick=&quot;x"></p>'


def test_pieces_cut_out_of_markup_are_plain_text_again() -> None:
    assert join(Markup("<b>")[0:]) == "&lt;b&gt;"
    assert join(Markup("<b>") + "<i>") == "&lt;b&gt;&lt;i&gt;"


def test_children_and_attributes() -> None:
    assert join("a", None, 3, ["b", (tag("i", x) for x in "cd")]) == "a3b<i>c</i><i>d</i>"
    assert tag("line", x1=1.25, x2=2.0, class_="a", stroke_width=None) == '<line x1="1.2" x2="2" class="a"/>'


def test_what_html_cannot_hold() -> None:
    assert escape("a\x00b\ud800c\nd\te") == "a\ufffdb\ufffdc\nd\te"
