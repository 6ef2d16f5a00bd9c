"""The HTML report in a real browser: views, keys, pointer, themes, paper."""

import json

import pytest

from tests import chromium
from tests.chromium import Chromium
from tests.drawn import plan_of
from tests.reported import one_machine, report_of  # noqa: F401

pytestmark = [
    pytest.mark.usefixtures("one_machine"),
    pytest.mark.skipif(
        chromium.PATH is None,
        reason="Chromium is not installed (Debian: apt-get install chromium)",
    ),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Chromium(tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name in ("moonwalk", "transformer", "unet"):
        (folder / f"{name}.html").write_text(report_of(name), encoding="utf-8")
    return {path.stem: path for path in folder.iterdir()}


def focused(browser):
    return browser.run("document.activeElement.id")


def shown(browser):
    script = "[...document.querySelectorAll('.view')].filter(v => !v.hidden)"
    return browser.run(f"{script}.map(v => v.dataset.view).join()")


def panel(browser):
    return browser.run("document.querySelector('#panel').innerText")


@pytest.mark.parametrize("name", ["moonwalk", "transformer", "unet"])
def test_nothing_fails_and_nothing_is_fetched(browser, files, name):
    browser.open(files[name])
    assert browser.run("document.documentElement.classList.contains('live')")
    asked = [e for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    urls = [e["params"]["request"]["url"] for e in asked]
    assert set(urls) == {files[name].as_uri()}
    bad = ("Runtime.exceptionThrown", "Log.entryAdded")
    assert not [e for e in browser.events if e["method"] in bad]


def test_a_repeated_block_opens_and_closes_by_keyboard_alone(browser, files):
    browser.open(files["moonwalk"])
    assert shown(browser) == "blocks"
    for _ in range(20):
        browser.key("Tab")
        if focused(browser).startswith("blocks-"):
            break
    assert focused(browser) == "blocks-stage-0-F"
    assert "bits ×10" in panel(browser)
    browser.key("Enter")
    assert shown(browser) == "stages"
    assert focused(browser) == "stages-stage-0-F"
    browser.key("ArrowDown")
    assert focused(browser) == "stages-stage-1-F"
    assert plan_of("moonwalk").stages[1].reason in panel(browser)
    browser.key("End")
    assert "result, float32[]" in panel(browser)
    inside = """(() => {
      const port = document.querySelector("[data-view=stages] .viewport");
      const frame = port.getBoundingClientRect();
      const box = document.activeElement.getBoundingClientRect();
      return box.top >= frame.top && box.bottom <= frame.bottom;
    })()"""
    assert browser.run(inside)
    browser.key("Escape")
    assert shown(browser) == "blocks"
    assert focused(browser) == "blocks-stage-0-F"
    browser.key("ArrowRight")
    assert focused(browser) == "blocks-stage-11-F"


def test_one_stop_of_the_tab_key_for_each_drawing(browser, files):
    browser.open(files["transformer"])
    stops = "document.querySelectorAll('.view:not([hidden]) [tabindex=\"0\"]').length"
    assert browser.run(stops) == 1
    browser.run("document.querySelector('.view [tabindex=\"0\"]').focus()")
    browser.key("ArrowDown")
    assert browser.run(stops) == 1


def test_zoom(browser, files):
    browser.open(files["unet"])
    width = "document.querySelector('.view svg').getBoundingClientRect().width"
    first = browser.run(width)
    browser.run("document.querySelector('.view [tabindex=\"0\"]').focus()")
    browser.key("+")
    assert browser.run(width) == pytest.approx(1.25 * first, rel=1e-3)
    browser.key("0")
    assert browser.run(width) == pytest.approx(first, rel=1e-3)
    browser.run("document.querySelector('[data-zoom=out]').click()")
    assert browser.run(width) == pytest.approx(first / 1.25, rel=1e-3)
    level = browser.run("document.querySelector('.zoom output').value")
    natural = float(
        browser.run("document.querySelector('.view svg').getAttribute('width')")
    )
    assert level == f"{round(100 * first / 1.25 / natural)} %"


def centre(browser, selector):
    script = f"""(() => {{
      const element = document.querySelector({json.dumps(selector)});
      element.scrollIntoView({{block: "center", behavior: "instant"}});
      const {{x, y, width, height}} = element.getBoundingClientRect();
      return [x + width / 2, y + height / 2];
    }})()"""
    return browser.run(script)


def test_pointer(browser, files):
    browser.open(files["moonwalk"])
    x, y = centre(browser, "#blocks-stage-0-R")
    browser.mouse("move", x, y)
    browser.until("!document.querySelector('#tip').hidden")
    tip = browser.run("document.querySelector('#tip').innerText")
    assert "its cotangent is rebuilt" in tip
    assert "float32[512,32]" in tip
    assert "64 KiB" in tip
    assert "programs.py:" in tip
    browser.mouse("click", x, y)
    browser.until("document.activeElement.id === 'stages-stage-0-F'")
    browser.mouse("move", 5, 5)
    browser.until("document.querySelector('#tip').hidden")


def test_dragging_moves_the_drawing(browser, files):
    browser.open(files["transformer"], height=700)
    x, y = centre(browser, ".viewport")
    port = "document.querySelector('.viewport').scrollTop"
    browser.mouse("press", x, y)
    browser.mouse("drag", x, y - 100)
    browser.mouse("release", x, y - 100)
    assert browser.run(port) == pytest.approx(100, abs=2)
    assert shown(browser) == "blocks"


def test_rows_open_and_lead_to_the_drawing(browser, files):
    browser.open(files["moonwalk"])
    rows = "document.querySelectorAll('.stages .inside:not([hidden])').length"
    assert browser.run(rows) == 0
    browser.run("document.querySelector('.toggle').focus()")
    browser.key("Enter")
    assert browser.run(rows) == 12
    browser.run("document.querySelector('[href=\"#stages-stage-5-F\"]').click()")
    assert shown(browser) == "stages"
    assert focused(browser) == "stages-stage-5-F"
    browser.run("document.querySelector('#open-all').click()")
    assert browser.run("document.querySelector('#open-all').textContent") == "Close all"


def test_the_timeline_is_read_by_keyboard(browser, files):
    browser.open(files["moonwalk"])
    browser.run("document.querySelector('#curves').focus()")
    browser.key("End")
    browser.key("PageDown")
    browser.key("ArrowLeft")
    text = browser.run("document.querySelector('#readout').textContent")
    assert text.startswith("89 %: backprop ")
    assert text == browser.run("document.activeElement.ariaValueText")


def test_dark_light_and_paper(browser, files):
    ground = "getComputedStyle(document.body).backgroundColor"
    fill = "getComputedStyle(document.querySelector('#blocks-stage-0-F polygon')).fill"
    browser.open(files["unet"])
    light = browser.run(ground), browser.run(fill)
    browser.scheme("dark")
    dark = browser.run(ground), browser.run(fill)
    assert light[0] == "rgb(255, 255, 255)"
    assert all(a != b for a, b in zip(light, dark, strict=True))
    browser.scheme("dark", media="print")
    assert (browser.run(ground), browser.run(fill)) == light
    assert not browser.run("document.querySelector('nav').checkVisibility()")


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_screen_is_too_narrow(browser, files, width):
    browser.open(files["transformer"], width=width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    if width < 768:
        table = browser.run(
            "document.querySelector('.stages').getBoundingClientRect().width"
        )
        assert table <= width
        assert browser.run("document.querySelector('.why').checkVisibility()")


def test_without_its_script_everything_is_open(browser, files, tmp_path):
    text = files["moonwalk"].read_text(encoding="utf-8")
    plain = tmp_path / "plain.html"
    plain.write_text(text.replace("sha256-", "sha256-no"), encoding="utf-8")
    browser.open(plain)
    assert shown(browser) == "blocks,stages,compare"
    assert browser.run("document.querySelector('.inside').checkVisibility()")
    assert not browser.run("document.querySelector('.toggle').checkVisibility()")
