"""The page of `geohooks show` in a headless browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from runs import MAIN, drawn, write_run
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

from geohooks.cli import main

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
)
HOSTILE = (
    "plain", " </script><script>document.title='hacked'</script>", " <b>bold</b>", "\n\n", " &amp;", '"', "'",
    "\x1b", "\u202e", "\u2028", "🙂", "�", "", "<img src=x onerror=\"document.title='hacked'\">",
)  # fmt: skip
LAYERED = [*MAIN, "router.0.entropy", "router.0.jaccard", "router_drift"]
DOCUMENTS = (
    drawn("hostile <i>name</i>", "prose", HOSTILE * 4, 0, LAYERED),
    drawn("b.py", "code", [f"word{at} " for at in range(60)], 1, LAYERED),
    drawn("c.py", "code", [f"third{at} " for at in range(20)], 2, LAYERED),
)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs chromium and chromium-driver; .ci/run installs them"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_run(folder, DOCUMENTS, parts=2)
    with pytest.raises(SystemExit):
        main(["show", str(folder)])
    return folder / "report.html"


@pytest.fixture
def page(browser: webdriver.Chrome, written: Path) -> Iterator[webdriver.Chrome]:
    browser.get_log("performance")
    browser.get(written.as_uri())
    yield browser
    assert browser.get_log("browser") == []


def tokens(page: webdriver.Chrome) -> list[WebElement]:
    return page.find_elements(By.CSS_SELECTOR, "#text > span")


def colours(page: webdriver.Chrome) -> list[str]:
    return page.execute_script("return [...document.querySelectorAll('#text > span')].map(s => s.style.background)")


def choose(page: webdriver.Chrome, control: str, text: str) -> None:
    Select(page.find_element(By.ID, control)).select_by_visible_text(text)


def shown(page: webdriver.Chrome, signal: str) -> list[str]:
    """The cells of a signal in the panel: how the token was predicted, and what follows it."""
    cells = page.find_elements(By.CSS_SELECTOR, f"#values tr[data-signal='{signal}'] td")
    return [cell.get_attribute("textContent") for cell in cells[1:]]


def number(text: str) -> float:
    return float("nan") if text == "\N{EN DASH}" else float(text.replace("\N{MINUS SIGN}", "-").replace(",", ""))


def painted(page: webdriver.Chrome, canvas: WebElement) -> int:
    """How many pixels of `canvas` are not transparent."""
    return page.execute_script(
        "const c = arguments[0]; const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n",
        canvas,
    )


def test_nothing_is_fetched(page: webdriver.Chrome, written: Path) -> None:
    messages = [json.loads(line["message"])["message"] for line in page.get_log("performance")]
    sent = [one["params"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    # the browser's own start page may still be asking for its parts
    asked = [one["request"]["url"] for one in sent if one["documentURL"] == written.as_uri()]
    assert {one for one in asked if not one.startswith("data:")} == {written.as_uri()}
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_the_policy_forbids_what_a_text_could_ask_for(page: webdriver.Chrome) -> None:
    policy = page.find_element(By.CSS_SELECTOR, "meta[http-equiv='Content-Security-Policy']").get_attribute("content")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def test_hostile_text_is_shown_as_text(page: webdriver.Chrome) -> None:
    assert page.title == "geohooks report"
    seen = [token.get_attribute("textContent") for token in tokens(page)][: len(HOSTILE)]
    expected = list(HOSTILE)
    expected[expected.index("\x1b")] = "␛"
    expected[expected.index("\u202e")] = "·"
    expected[expected.index("")] = "∅"
    assert seen == expected
    assert page.find_elements(By.CSS_SELECTOR, "#text b, #text script, #text img, #document i") == []
    option = Select(page.find_element(By.ID, "document")).first_selected_option
    assert option.get_attribute("textContent").startswith("hostile <i>name</i>")


def test_another_signal_gives_other_colours(page: webdriver.Chrome) -> None:
    before, legend = colours(page), page.find_element(By.ID, "legend").text
    assert before[0] == ""
    assert len(set(before)) > 3
    choose(page, "signal", "entropy")
    assert colours(page) != before
    assert page.find_element(By.ID, "legend").text != legend
    assert "entropy, nats" in page.find_element(By.ID, "legend").text


def test_a_higher_value_has_a_later_colour(page: webdriver.Chrome) -> None:
    choose(page, "signal", "entropy")
    values = DOCUMENTS[0].signals["entropy"]
    steps = [int(one[7:-1]) if one else 0 for one in colours(page)[1:]]
    in_order = [steps[at] for at in np.argsort(values[:-1])]
    assert in_order == sorted(in_order)
    assert (in_order[0], in_order[-1]) == (0, 6)


def test_the_legend_has_a_number_between_any_two_colours(page: webdriver.Chrome) -> None:
    for signal in ("entropy", "nll increase", "router drift"):
        choose(page, "signal", signal)
        numbers = [number(one.text) for one in page.find_elements(By.CSS_SELECTOR, "#legend .cuts span")]
        assert numbers == sorted(numbers)
        assert len(page.find_elements(By.CSS_SELECTOR, "#legend .steps i")) == len(numbers) + 1 > 5


@pytest.mark.parametrize("at", [0, 7, len(HOSTILE) * 4 - 1])
def test_pointing_at_a_token_shows_its_two_rows(page: webdriver.Chrome, at: int) -> None:
    ActionChains(page).move_to_element(tokens(page)[at]).perform()
    for signal in LAYERED:
        column = DOCUMENTS[0].signals[signal]
        expected = [column[at - 1] if at else None, column[at]]
        got = [number(text) for text in shown(page, signal)]
        assert got == pytest.approx([np.nan if one is None else one for one in expected], rel=6e-4, nan_ok=True)
    assert page.find_element(By.ID, "tip").is_displayed()
    assert f"token {at} of hostile <i>name</i>" in page.find_element(By.ID, "values").text


def test_the_arrow_keys_move_through_the_tokens(page: webdriver.Chrome) -> None:
    page.execute_script("document.querySelector('#text > span').focus()")
    ActionChains(page).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT).perform()
    assert page.switch_to.active_element == tokens(page)[2]
    assert number(shown(page, "entropy")[1]) == pytest.approx(DOCUMENTS[0].signals["entropy"][2], rel=6e-4)


def test_documents_are_picked_and_filtered_by_domain(page: webdriver.Chrome) -> None:
    choose(page, "domain", "code")
    names = [one.text for one in Select(page.find_element(By.ID, "document")).options]
    assert names == ["b.py (60 tokens)", "c.py (20 tokens)"]
    assert tokens(page)[0].text.startswith("word0")
    page.find_element(By.ID, "next").click()
    assert tokens(page)[0].text.startswith("third0")
    assert not page.find_element(By.ID, "next").is_enabled()
    page.find_element(By.ID, "previous").click()
    assert tokens(page)[0].text.startswith("word0")


def test_plots_are_drawn_and_layers_wait_until_they_are_opened(page: webdriver.Chrome) -> None:
    canvases = page.find_elements(By.CSS_SELECTOR, "#plane, #histograms canvas")
    assert len(canvases) == 1 + len(MAIN) + 1
    for canvas in canvases:
        assert painted(page, canvas) > 300
    layers = page.find_element(By.ID, "layers")
    page.execute_script("arguments[0].open = true; return new Promise(done => setTimeout(done))", layers)
    for canvas in layers.find_elements(By.TAG_NAME, "canvas"):
        assert painted(page, canvas) > 300


def test_a_histogram_chooses_its_signal(page: webdriver.Chrome) -> None:
    page.find_element(By.CSS_SELECTOR, ".histogram[name='varentropy']").click()
    assert Select(page.find_element(By.ID, "signal")).first_selected_option.text == "varentropy"
    (pressed,) = page.find_elements(By.CSS_SELECTOR, ".histogram[aria-pressed='true']")
    assert pressed.get_attribute("name") == "varentropy"


@pytest.mark.parametrize(("document", "row"), [(0, 5), (1, 40), (1, 59)])
def test_a_point_of_the_plane_leads_to_the_token_it_predicted(page: webdriver.Chrome, document: int, row: int) -> None:
    one = DOCUMENTS[document]
    h, v = one.signals["entropy"][row], one.signals["varentropy"][row]
    x, y = page.execute_script("return [scaleX(arguments[0]), scaleY(arguments[1])]", h, v)
    plane = page.find_element(By.ID, "plane")
    # offsets count from the middle of the element
    size = plane.size
    ActionChains(page).move_to_element_with_offset(
        plane, round(x - size["width"] / 2), round(y - size["height"] / 2)
    ).click().perform()
    there = min(row + 1, len(one.tokens) - 1)
    assert page.execute_script("return document.activeElement.textContent") == (
        one.tokens[there] if document else tokens(page)[there].get_attribute("textContent")
    )
    if there == row + 1:
        assert number(shown(page, "entropy")[0]) == pytest.approx(h, rel=6e-4)
        assert page.find_element(By.ID, "ring").is_displayed()


def test_only_this_document_in_the_plane(page: webdriver.Chrome) -> None:
    everything = page.execute_script("return drawn.length")
    page.find_element(By.ID, "alone").click()
    assert page.execute_script("return drawn.length") == len(DOCUMENTS[0].tokens) < everything


def test_a_wrong_token_is_found_in_its_place(page: webdriver.Chrome) -> None:
    for button in page.find_elements(By.CSS_SELECTOR, "#worst button"):
        position = int(button.find_element(By.TAG_NAME, "small").text.split(", token ")[1].split()[0])
        name = button.find_element(By.TAG_NAME, "small").text.split(",")[0]
        page.execute_script("arguments[0].click()", button)
        assert f"token {position} of {name}" in page.find_element(By.ID, "values").text


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_text_is_legible_on_every_colour_at_every_width(page: webdriver.Chrome, scheme: str, width: int) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        for signal in ("nll increase", "entropy"):
            choose(page, "signal", signal)
            pairs = page.execute_script(
                "return [...document.querySelectorAll('#text > span')].map(s => { const c = getComputedStyle(s);"
                "return [c.color, c.backgroundColor === 'rgba(0, 0, 0, 0)' ?"
                " getComputedStyle(document.body).backgroundColor : c.backgroundColor] })"
            )
            assert len({background for _, background in pairs}) > 3
            for ink, background in {tuple(pair) for pair in pairs}:
                assert contrast(ink, background) >= 4.5, (ink, background)
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def contrast(ink: str, background: str) -> float:
    """The contrast ratio of WCAG 2 between two CSS colours rgb(r, g, b)."""
    lights = []
    for colour in (ink, background):
        channels = np.array([int(part) for part in colour[4:-1].split(",")]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        lights.append(float(linear @ [0.2126, 0.7152, 0.0722]))
    return (max(lights) + 0.05) / (min(lights) + 0.05)
