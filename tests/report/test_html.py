from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from report_data import report

from pyinf.errors import ArtifactError
from pyinf.report import render_html, write_html


class Page(HTMLParser):
    """The elements of a page, and the visible text of its passages."""

    VOID = {"meta", "link", "input", "img", "br"}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.stack: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack, tag
        assert self.stack.pop() == tag


def test_every_element_is_closed_and_no_text_becomes_markup():
    page = Page(render_html(report()))
    assert page.stack == []
    assert sum(tag == "script" for tag, _ in page.tags) == 2  # the data and the page's own
    assert sum(tag == "style" for tag, _ in page.tags) == 1
    assert not [tag for tag, _ in page.tags if tag in ("img", "iframe", "object", "embed", "b", "i")]
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on") or a == "style"]


def test_nothing_outside_is_named():
    text = render_html(report())
    named = [attrs[a] for _, attrs in Page(text).tags for a in ("src", "href", "action", "srcset") if a in attrs]
    assert named
    assert all(link.startswith("#") or link == "data:," for link in named)
    assert "default-src &#39;none&#39;" in text
    assert "unsafe" not in text.split("</head>")[0].split("Content-Security-Policy")[1].split(">")[0]
    assert "url(" not in text
    assert "@import" not in text


def test_hostile_characters_are_spelled_out():
    text = render_html(report())
    body = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    for code in (0x202E, 0x1B, 0x00, 0xD800):
        assert chr(code) not in body
    assert "⟨U+202E⟩evil" in body
    assert "↵\n" in body
    assert "👩‍👩‍👧" in body
    assert "{{ 7 * 7 }}" in body
    assert "&lt;script&gt;document.title=" in body


def test_tokens_are_shaded_by_sign_and_size():
    data = report(1)
    data.queries[0].top[0].token_scores = [10.0, -10.0, 0.0] + [0.001] * 9
    for example in [*data.queries[0].top[1:], *data.queries[0].bottom]:
        example.token_scores = None
    text = render_html(data)
    assert '<span class="p10" data-v="+10">The</span>' in text
    assert '<span class="n10" data-v="−10"> heap</span>' in text
    assert '<span data-v="0"> is</span>' in text


def test_no_queries_and_no_extras(tmp_path):
    data = report(1)
    data.queries[0].histogram = None
    data.queries[0].module_shares = {}
    data.queries[0].bottom = []
    for example in data.queries[0].top:
        example.token_scores = None
    data.tables, data.plan, data.stages, data.facts = [], [], [], []
    text = write_html(data, tmp_path / "a" / "report.html").read_text()
    assert "Opponents" not in text
    assert 'class="plot"' not in text
    assert 'class="legend"' not in text
    data.queries = []
    assert Page(render_html(data)).stack == []


def test_one_value_everywhere_and_unwritable(tmp_path):
    data = report(1)
    from pyinf.report import Histogram

    data.queries[0].histogram = Histogram([0.0, 0.0], [200])
    assert "nan" not in render_html(data).split("<main")[1].split('id="data"')[0].lower().replace("nano", "")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="Cannot write"):
        write_html(data, tmp_path / "file" / "report.html")
