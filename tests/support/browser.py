"""A real browser without a window, for what a page does: Chromium, where it is installed."""

import html
import json
import re
import shutil
from urllib.parse import unquote

import pytest

from support.processes import run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on the PATH (Debian: apt-get install chromium)"
)
# Runs behind the page's own script, in a frame as wide as asked for: a browser's own least width is about 500 pixels.
_PROBE = """
const report = (value) => parent.postMessage(value, "*");
const refused = [];
document.addEventListener("securitypolicyviolation", (event) => refused.push(event.blockedURI));
window.addEventListener("error", (event) => report({ error: event.message }));
const press = (key, target) => (target || document.activeElement).dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const type = (name, text) => {
  const field = document.querySelector(".filters").elements[name];
  field.value = text;
  field.dispatchEvent(new Event("input", { bubbles: true }));
};
const shown = () => [...document.querySelectorAll("#rows article:not([hidden])")].map((row) => row.dataset.place);
window.addEventListener("load", () => {
"""
_FRAME = """<!doctype html><iframe srcdoc="{page}" width="{width}" height="800"></iframe><script>
addEventListener("message", (event) => {{
  document.body.textContent = "FOUND" + encodeURIComponent(JSON.stringify(event.data)) + "END";
}});
</script>"""


def look(folder, page, code, *, width=1200, dark=False):
    """Open a page in the browser and give what a piece of JavaScript finds in it.

    Args:
        folder: Where files may be written.
        page: The page's text.
        code: Statements that call ``report(value)`` once; they may use what the probe above defines.
        width: Of the page, in pixels.
        dark: Whether the system asks for dark pages.
    """
    # The page's policy would refuse the probe; it is let in by a name of its own, and nothing else is.
    probed = page.replace("script-src ", "script-src 'nonce-probe' ", 1)
    assert probed != page
    probed = probed.replace("</body>", f'<script nonce="probe">{_PROBE}{code}\n}});</script></body>')
    file = folder / "frame.html"
    file.write_text(_FRAME.format(page=html.escape(probed), width=width), encoding="utf-8")
    words = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=5000", "--dump-dom",
        f"--window-size={width + 100},1000", file.as_uri(),
    ]  # fmt: skip
    done = run(words, limit=120)
    found = re.search("FOUND(.*?)END", done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(unquote(found[1]))


# Whether the page is wider than its window, which texts stand out too little (WCAG asks for 4.5), and how many
# controls and pictures have no name.
CHECK_LAYOUT = """
const luminance = (color) => {
  const [r, g, b] = color.match(/[\\d.]+/g).map((part) => {
    const value = part / 255;
    return value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let each = element; each; each = each.parentElement) {
    const color = getComputedStyle(each).backgroundColor;
    if (!/, 0\\)$/.test(color)) return color;
  }
};
const weak = [];
for (const element of document.querySelectorAll("body *:not(script, svg *)")) {
  if (!element.textContent.trim() || !element.getClientRects().length) continue;
  const shades = [luminance(getComputedStyle(element).color), luminance(behind(element))].sort();
  const contrast = (Math.max(...shades) + 0.05) / (Math.min(...shades) + 0.05);
  if (contrast < 4.5) weak.push([element.className || element.tagName, contrast]);
}
report({ inside: innerWidth, wide: document.documentElement.scrollWidth, weak, unnamed: [
  ...document.querySelectorAll("button, input, select, img, audio, [role=img]")].filter((element) =>
    !(element.textContent.trim() || element.ariaLabel || element.alt || element.labels?.length)).length });
"""
