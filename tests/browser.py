"""Opens a page in the machine's Chromium and says what a reader would find wrong with it."""

import shutil
from pathlib import Path
from typing import Literal

# Pictures that did not load; text that runs out of the page; text with less contrast than WCAG 2.2 asks of body text
# (success criterion 1.4.3: 4.5, or 3 from 24 px on) against the nearest background that is not transparent.
_LOOK = """() => {
  const found = [];
  for (const image of document.images)
    if (!image.complete || image.naturalWidth === 0) found.push(`picture ${image.alt} did not load`);
  const root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) found.push(`${root.scrollWidth} px wide, the window ${root.clientWidth} px`);
  const colour = text => (text.match(/[\\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
  const luminance = rgb => {
    const [r, g, b] = rgb.slice(0, 3).map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const seen = new Set();
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || seen.has(element) || !element.checkVisibility()) continue;
    if (element instanceof SVGElement) continue;  // drawn with fill, not color
    seen.add(element);
    const style = getComputedStyle(element);
    let behind = element;
    while (behind && (colour(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const back = behind ? colour(getComputedStyle(behind).backgroundColor) : dark ? [18, 18, 18] : [255, 255, 255];
    const [low, high] = [luminance(colour(style.color)), luminance(back)].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5))
      found.push(`contrast ${contrast.toFixed(1)} of "${element.textContent.trim().slice(0, 40)}"`);
  }
  return found;
}"""


def problems(page: Path, scheme: Literal["light", "dark"], width: int = 1280) -> list[str]:
    """What is wrong with a page: errors of the console, anything it loads, and what _LOOK finds.

    Args:
      scheme: the reader's colour scheme.
      width: of the window, px.
    """
    from playwright.sync_api import sync_playwright

    found: list[str] = []
    own = page.resolve().as_uri()

    def requested(url: str) -> None:
        if url != own and not url.startswith("data:"):
            found.append(f"loads {url}")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        try:
            tab = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
            tab.on("console", lambda message: found.append(f"{message.type}: {message.text}"))
            tab.on("pageerror", lambda error: found.append(f"error: {error}"))
            tab.on("request", lambda request: requested(request.url))
            tab.goto(own)
            return found + tab.evaluate(_LOOK)
        finally:
            browser.close()
