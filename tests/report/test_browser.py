"""The page in a real browser: no error, no request, no overflow, and everything that can be clicked works."""

from __future__ import annotations

import json

import pytest
from report_data import report

from pyinf.report import ReportData, write_html
from tests.headless import chrome, view, webdriver


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    home = tmp_path_factory.mktemp("browser")
    path = write_html(report(), home / "report.html")
    driver = chrome(home)
    driver.address = path.as_uri()
    yield driver
    driver.quit()


def opened(driver, width=1280, height=900, scheme="light"):
    view(driver, width, height, scheme)
    driver.get("about:blank")
    driver.get(driver.address)
    driver.execute_script("try { localStorage.clear() } catch (e) {} delete document.documentElement.dataset.theme")
    return driver


def background(driver):
    return driver.execute_script("return getComputedStyle(document.body).backgroundColor")


def test_no_error_and_no_request(page):
    page.get_log("performance")
    opened(page)
    assert page.get_log("browser") == []
    assert page.title == "Who said <calendar> & why?"
    events = [json.loads(e["message"])["message"] for e in page.get_log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    # What the browser's own start page loads is not the report's.
    asked = [e["request"]["url"] for e in sent if e["documentURL"] == page.address]
    assert asked[0] == page.address
    assert set(asked[1:]) <= {"data:,"}


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_nothing_is_wider_than_the_screen(page, width):
    opened(page, width)
    for q in range(3):
        page.execute_script(f"location.hash = 'q-{q}'")
        wide = page.execute_script(
            "document.querySelectorAll('details').forEach((d) => { d.open = true });"
            "return [document.documentElement.scrollWidth, innerWidth]"
        )
        assert wide[0] <= wide[1] == width


def test_theme_follows_the_system_and_the_button(page):
    opened(page, scheme="light")
    light = background(page)
    opened(page, scheme="dark")
    dark = background(page)
    assert light != dark
    page.find_element("id", "theme").click()
    assert background(page) == light
    page.find_element("id", "theme").click()
    assert background(page) == dark


def test_tokens_are_shaded_and_say_their_number(page):
    opened(page)
    token = page.find_element("css selector", ".query:not([hidden]) .passage [data-v][class]")
    shade = page.execute_script("return getComputedStyle(arguments[0]).backgroundColor", token)
    assert shade not in ("rgba(0, 0, 0, 0)", "transparent", "")
    # A scroll hides the number, and its event comes late: let it pass before the mouse arrives.
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", token)
    page.execute_async_script("const done = arguments[0]; setTimeout(done, 300)")
    webdriver.ActionChains(page).move_to_element(token).perform()
    tip = page.find_element("id", "tip")
    assert tip.is_displayed()
    assert tip.text == token.get_attribute("data-v")


def test_keyboard_reads_tokens(page):
    opened(page)
    passage = page.find_element("css selector", ".query:not([hidden]) .example .passage")
    passage.send_keys(webdriver.Keys.ARROW_RIGHT, webdriver.Keys.ARROW_RIGHT)
    chosen = page.find_element("css selector", ".passage .here")
    assert chosen.text.strip() == "heap"
    assert chosen.get_attribute("data-v") in page.find_element("id", "say").get_attribute("textContent")


def test_queries_are_walked_and_filtered(page):
    def visible():
        return [a.get_attribute("id") for a in page.find_elements("css selector", "article") if a.is_displayed()]

    opened(page)
    assert visible() == ["q-0"]
    page.find_element("css selector", "#q-0 [data-step='1']").click()
    assert visible() == ["q-1"]
    page.find_element("css selector", "#list li:nth-child(3) a").click()
    assert visible() == ["q-2"]
    assert page.find_element("css selector", "[aria-current]").get_attribute("hash") == "#q-2"
    page.find_element("id", "find").send_keys("number 1 heaps")
    shown = [li for li in page.find_elements("css selector", "#list li") if li.is_displayed()]
    assert len(shown) == 1
    assert page.find_element("id", "found").text == "1 of 3"
    page.find_element("id", "find").send_keys(webdriver.Keys.ENTER)
    assert visible() == ["q-1"]


def test_the_data_can_be_taken_out(page):
    opened(page)
    text = page.execute_script("return document.getElementById('data').textContent")
    again = ReportData.from_json(text)
    assert again.queries[1].bottom == report().queries[1].bottom
    page.find_element("id", "copy").click()
    later = "const done = arguments[0]; setTimeout(() => done(document.querySelector('{}').textContent), 400)"
    assert page.execute_async_script(later.format("#copied")) == "Copied"
    page.execute_script("document.getElementById('raw').open = true")
    assert json.loads(page.execute_async_script(later.format("#raw pre")))["format"] == "pyinf-report"


def test_controls_have_names_and_headings_descend(page):
    opened(page)
    problems = page.execute_script(
        "const out = [];"
        "for (const e of document.querySelectorAll('button, a, input, [tabindex=\"0\"]')) {"
        "  const name = e.getAttribute('aria-label') || e.textContent.trim() || (e.labels && e.labels.length);"
        "  if (!name) out.push(e.outerHTML.slice(0, 80)); }"
        "const ids = [...document.querySelectorAll('[id]')].map((e) => e.id);"
        "if (new Set(ids).size !== ids.length) out.push('an id twice');"
        "let last = 0;"
        "for (const h of document.querySelectorAll('h1, h2, h3, h4')) {"
        "  const level = +h.tagName[1]; if (level > last + 1) out.push('jump to ' + h.outerHTML); last = level; }"
        "return out"
    )
    assert problems == []
