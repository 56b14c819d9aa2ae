"""The search page and the description of the interface in a real browser."""

from __future__ import annotations

import json

import pytest
from serving import COUNT, HOSTILE, TOKEN, Fake, serving

from tests.headless import chrome, view, webdriver


@pytest.fixture(scope="module")
def service():
    with serving(Fake(), TOKEN) as (address, app, _):
        yield address, app


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = chrome(tmp_path_factory.mktemp("browser"))
    driver.set_script_timeout(10)
    yield driver
    driver.quit()


def opened(driver, address, width=1280, height=900, scheme="light"):
    view(driver, width, height, scheme)
    driver.get(address)
    driver.execute_script("localStorage.clear(); sessionStorage.clear()")
    driver.get("about:blank")
    driver.get_log("browser"), driver.get_log("performance")
    driver.get(address)
    return driver


def fill(driver, prompt="Why?", completion="Because.", k=3, token=TOKEN):
    for name, value in (("prompt", prompt), ("completion", completion), ("k", str(k)), ("token", token)):
        box = driver.find_element("id", name)
        box.clear()
        box.send_keys(value)


WAIT = """
const done = arguments[0], limit = Date.now() + 8000;
const look = () => {
  const idle = !document.getElementById("send").hasAttribute("aria-disabled");
  if (idle && (document.querySelector("#answer *") || !document.getElementById("problem").hidden)) done("");
  else if (Date.now() > limit) done("no answer on the page"); else setTimeout(look, 20);
};
setTimeout(look, 50);
"""


def asked(driver):
    driver.find_element("id", "send").click()
    assert driver.execute_async_script(WAIT) == ""


def requests(driver):
    events = [json.loads(e["message"])["message"] for e in driver.get_log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [e["request"]["url"] for e in sent if e["documentURL"].startswith("http://127.0.0.1")]


def test_a_question_and_its_answer(browser, service):
    opened(browser, service[0])
    fill(browser)
    asked(browser)
    items = browser.find_elements("css selector", "#answer .example")
    total = sum(service[1].engine.searcher.batches[-1][0].input_ids)
    assert len(items) == 3
    assert [i.find_element("css selector", ".score").text for i in items] == [f"+{total - i}" for i in range(3)]
    assert items[1].find_element("css selector", ".passage").text == "Document 1."
    assert "s1" in items[1].text and "document 1" in items[1].text
    about = browser.find_element("css selector", "#answer .card").text
    assert "97.0 % (95 % interval 91.0 % to 99.0 %)" in about and "good: residual 0.01" in about
    assert "8 of them counted" in about
    assert f"of {COUNT}" in browser.find_element("css selector", "#answer h2").text
    # The answer's heading has the focus, and a screen reader hears how many there are.
    assert browser.switch_to.active_element.tag_name == "h2"
    assert browser.find_element("id", "say").get_attribute("textContent") == "3 documents found."
    assert browser.get_log("browser") == []


def test_what_a_document_says_is_text(browser, service):
    opened(browser, service[0])
    fill(browser, completion="</script><script>document.title='owned'</script>")
    asked(browser)
    passage = browser.find_element("css selector", "#answer .passage")
    shown = passage.get_attribute("textContent")
    assert shown.startswith(HOSTILE[:40]) and "⟨U+202E⟩right to left⟨U+202C⟩" in shown
    assert browser.find_elements("css selector", "#answer img, #answer script, #answer b") == []
    assert browser.title == "a store <of> tests: who taught it this?"
    assert browser.get_log("browser") == []


def test_nothing_is_asked_of_anybody_else(browser, service):
    opened(browser, service[0])
    fill(browser)
    asked(browser)
    opened_docs = {f"{service[0]}/docs"}
    browser.get(f"{service[0]}/docs")
    assert set(requests(browser)) <= {f"{service[0]}/", f"{service[0]}/search", "data:,"} | opened_docs
    assert browser.get_log("browser") == []
    text = browser.find_element("tag name", "main").text
    for word in (
        "POST /search",
        "GET /info",
        "GET /health",
        "SearchRequest",
        "input_ids",
        "413",
        "Authorization: Bearer",
    ):
        assert word in text


def test_a_wrong_token_and_a_wrong_question_are_said(browser, service):
    opened(browser, service[0])
    fill(browser, token="wrong-token-0123456789")
    asked(browser)
    problem = browser.find_element("id", "problem")
    assert "The token is not right" in problem.text and problem.get_attribute("role") == "alert"
    assert browser.switch_to.active_element.get_attribute("id") == "token"
    assert browser.find_element("id", "token").get_attribute("aria-invalid") == "true"
    fill(browser, completion="a" * 70)
    asked(browser)
    assert "74 tokens, and 64 are the most" in browser.find_element("id", "problem").text
    fill(browser)
    browser.find_element("id", "completion").send_keys(webdriver.Keys.CONTROL, webdriver.Keys.ENTER)
    assert browser.execute_async_script(WAIT.replace("|| !document", "&& document")) == ""
    assert len(browser.find_elements("css selector", "#answer .example")) == 3
    assert not browser.find_element("id", "problem").is_displayed()


def test_the_token_stays_in_the_tab(browser, service):
    opened(browser, service[0])
    fill(browser)
    asked(browser)
    assert browser.execute_script("return [location.href, document.cookie, JSON.stringify(localStorage)]") == [
        f"{service[0]}/", "", "{}",
    ]  # fmt: skip
    browser.get(service[0])
    assert browser.find_element("id", "token").get_attribute("value") == TOKEN


@pytest.mark.parametrize("width", [360, 800, 1280])
@pytest.mark.parametrize("path", ["/", "/docs"])
def test_nothing_is_wider_than_the_screen(browser, service, width, path):
    opened(browser, service[0] + path, width)
    if path == "/":
        fill(browser)
        asked(browser)
    wide = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1] == width
    small = browser.execute_script(
        "return [...document.querySelectorAll('textarea, input')].filter("
        "(e) => parseFloat(getComputedStyle(e).fontSize) < 16).length"
    )
    assert small == 0  # a phone would zoom in


def test_theme_follows_the_system_and_the_button(browser, service):
    background = "return getComputedStyle(document.body).backgroundColor"
    light = opened(browser, service[0], scheme="light").execute_script(background)
    dark = opened(browser, service[0], scheme="dark").execute_script(background)
    assert light != dark
    browser.find_element("id", "theme").click()
    assert browser.execute_script(background) == light
    browser.get(service[0])
    assert browser.execute_script(background) == light


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_controls_have_names_and_headings_descend(browser, service, path):
    opened(browser, service[0] + path)
    if path == "/":
        fill(browser)
        asked(browser)
    problems = browser.execute_script(
        "const out = [];"
        "for (const e of document.querySelectorAll('button, a, input, textarea, [tabindex=\"0\"]')) {"
        "  const name = e.getAttribute('aria-label') || (e.labels && e.labels.length) || e.textContent.trim();"
        "  if (!name) out.push(e.outerHTML.slice(0, 80)); }"
        "const ids = [...document.querySelectorAll('[id]')].map((e) => e.id);"
        "if (new Set(ids).size !== ids.length) out.push('an id twice');"
        "for (const e of document.querySelectorAll('[aria-describedby]'))"
        "  if (!document.getElementById(e.getAttribute('aria-describedby'))) out.push('no such description');"
        "for (const a of document.querySelectorAll('a[href^=\"#\"]'))"
        "  if (!document.getElementById(a.getAttribute('href').slice(1))) out.push('no ' + a.getAttribute('href'));"
        "let last = 0;"
        "for (const h of document.querySelectorAll('h1, h2, h3, h4')) {"
        "  const level = +h.tagName[1]; if (level > last + 1) out.push('jump to ' + h.outerHTML); last = level; }"
        "if (document.documentElement.lang !== 'en') out.push('no language');"
        "return out"
    )
    assert problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(browser, service, scheme):
    opened(browser, service[0], scheme=scheme)
    fill(browser)
    asked(browser)
    low = browser.execute_script(
        "const canvas = document.createElement('canvas'); canvas.width = canvas.height = 1;"
        "const pen = canvas.getContext('2d', { willReadFrequently: true });"
        "const rgb = (c, under) => { pen.fillStyle = under || '#fff'; pen.fillRect(0, 0, 1, 1); pen.fillStyle = c;"
        "  pen.fillRect(0, 0, 1, 1); return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3); };"
        "const light = (c) => { const [r, g, b] = c.map((v) => { v /= 255;"
        "  return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 }); return .2126 * r + .7152 * g + .0722 * b };"
        "const clear = (c) => c === 'rgba(0, 0, 0, 0)' || c === 'transparent';"
        "const out = [];"
        "for (const e of document.querySelectorAll('body *')) {"
        "  if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || !e.checkVisibility()) continue;"
        "  if (e.closest('.skip, script, style, noscript')) continue;"
        "  let under = e; while (under && clear(getComputedStyle(under).backgroundColor)) under = under.parentElement;"
        "  const back = getComputedStyle(under || document.body).backgroundColor;"
        "  const [a, b] = [light(rgb(getComputedStyle(e).color, back)), light(rgb(back))].sort((x, y) => y - x);"
        "  if ((a + .05) / (b + .05) < 4.5) out.push(e.tagName + ' ' + e.className + ' ' + e.textContent.slice(0, 30)"
        "    + ' ' + ((a + .05) / (b + .05)).toFixed(2)); }"
        "return out"
    )
    assert low == []


def test_ids_where_there_is_no_tokenizer(browser):
    searcher = Fake(reads_text=False)
    with serving(searcher) as (address, _, _):
        opened(browser, address)
        assert not browser.find_elements("id", "token") and not browser.find_elements("id", "prompt")
        browser.find_element("id", "ids").send_keys("[4, 5 6]")
        asked(browser)
        assert searcher.batches[0][0].input_ids == (4, 5, 6)
        assert len(browser.find_elements("css selector", "#answer .example")) == 10
