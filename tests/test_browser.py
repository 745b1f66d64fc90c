"""The look at pages finds what is wrong with a bad one, and nothing wrong with a plain one."""

from pathlib import Path

import pytest

from tests import browser

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_plain_page_has_no_problems(tmp_path: Path, scheme) -> None:
    page = tmp_path / "page.html"
    page.write_text('<!doctype html><meta name="color-scheme" content="light dark"><p>text</p>')
    assert browser.problems(page, scheme) == []


def test_every_problem_of_a_bad_page_is_found(tmp_path: Path) -> None:
    bad = {
        '<p style="color:#999;background:#fff">pale</p>': 'contrast 2.8 of "pale"',
        '<img alt="brain" src="data:image/png;base64,AAAA">': "picture brain did not load",
        '<div style="width:3000px">wide</div>': "px wide, the window 1280 px",
        '<img alt="" src="other.png">': "loads file:",
        "<script>throw new Error('broken')</script>": "error: broken",
    }
    page = tmp_path / "page.html"
    page.write_text("<!doctype html>" + "".join(bad))
    found = browser.problems(page, "light")
    assert [problem for problem in bad.values() if not any(problem in one for one in found)] == []
