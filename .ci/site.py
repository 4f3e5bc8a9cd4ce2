"""Build the documentation site in strict mode, and check the result.

    python .ci/site.py

Needs the extra ``docs``. Links, anchors, images and formulas are checked in the HTML itself. If the machine has Chromium, every
page is also opened from disk at the width of a phone: the console must stay empty, nothing may be wider than the screen, and a
search must find something.
"""

import collections
import functools
import html.parser
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse

ROOT = pathlib.Path(__file__).resolve().parent.parent
SITE = ROOT / "site"

# --- the HTML itself -------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """The references of a page, its anchors, and its words outside code."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.needs: list[str] = []
        self.anchors: set[str] = set()
        self.wrong: list[str] = []
        self.words: list[str] = []
        self._code = 0
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect references and anchors."""
        given = dict(attrs)
        self.anchors.update(value for name in ("id", "name") if (value := given.get(name)))
        if tag == "a" and given.get("href"):
            self.links.append(given["href"] or "")
        elif tag in {"img", "script", "iframe", "source"} and given.get("src"):
            self.needs.append(given["src"] or "")
        elif tag == "link" and given.get("rel") not in {"canonical", "prev", "next", "alternate"}:
            self.needs.append(given.get("href") or "")
        if tag == "img" and not given.get("alt"):
            self.wrong.append(f"an image without a description: {given.get('src')}")
        self._code += tag in {"code", "pre", "script", "style"}

    def handle_endtag(self, tag: str) -> None:
        """Note the end of code."""
        self._code -= tag in {"code", "pre", "script", "style"}

    def handle_data(self, data: str) -> None:
        """Collect words outside code."""
        if not self._code:
            self.words.append(data)


@functools.cache
def page(path: pathlib.Path) -> Page:
    """A page, parsed once."""
    return Page(path)


LATEX = re.compile(r"\\[a-zA-Z]+\b|\\[(\[]|\$.{0,20}|:math:|\.\. \w+::|`[A-Za-z_.]+`")


def mistakes(path: pathlib.Path) -> list[str]:
    """The faults in the HTML of one page."""
    this = page(path)
    found = list(this.wrong)
    found += [f"{need} is not on the site: a page must load nothing from elsewhere" for need in this.needs if _outside(need)]
    for link in [*this.links, *this.needs]:
        if not _outside(link) and (said := _broken(path, link)):
            found.append(said)
    found += [f"markup that was not made: {raw!r}" for raw in LATEX.findall(" ".join(this.words))]
    return found


def _outside(link: str) -> bool:
    return bool(urllib.parse.urlsplit(link).scheme) or link.startswith("//")


def _broken(path: pathlib.Path, link: str) -> str:
    """Why an internal link is broken; empty if it is not."""
    parts = urllib.parse.urlsplit(link)
    to = path if not parts.path else (path.parent / urllib.parse.unquote(parts.path)).resolve()
    to = to / "index.html" if to.is_dir() else to
    if not to.is_file():
        return f"{link}: there is no such file"
    if parts.fragment and to.suffix == ".html" and urllib.parse.unquote(parts.fragment) not in page(to).anchors:
        return f"{link}: the page has no such anchor"
    return ""


# --- in a browser ----------------------------------------------------------------------------------------------------------

OPENED = """<!doctype html><iframe width="390" height="800"></iframe><pre></pre><script>
const pages = %s, frame = document.querySelector("iframe"), report = document.querySelector("pre");
const wide = (e) => {
  if (e.getBoundingClientRect().right <= 391) return false;
  for (let up = e; up && !up.matches(".md-content"); up = up.parentElement)
    if (["auto", "scroll"].includes(getComputedStyle(up).overflowX)) return false;
  return true;
};
const settle = (ms) => new Promise((done) => setTimeout(done, ms));
const open = (url) => new Promise((done) => { frame.onload = done; frame.src = url; });
(async () => {
  for (const url of pages) {
    await open(url);
    const doc = frame.contentDocument;
    const over = [...doc.querySelectorAll(".md-content *")].filter(wide).slice(0, 3).map((e) => e.outerHTML.slice(0, 90));
    for (const each of over) report.append(`${url}: wider than a phone: ${each}\\n`);
    for (const each of doc.images) if (!each.naturalWidth) report.append(`${url}: no picture: ${each.src}\\n`);
    report.append(`opened ${url}\\n`);
  }
  await open(pages[0] + "?q=empirical");
  for (let i = 0; i < 100 && !frame.contentDocument.querySelector(".md-search-result__item"); i++) await settle(100);
  report.append(`found ${frame.contentDocument.querySelectorAll(".md-search-result__item").length}\\n`);
  document.title = "done";
  report.append("done\\n");
})();
</script>"""


def in_browser(browser: str, pages: list[pathlib.Path]) -> list[str]:
    """The faults that a browser finds in the pages, opened from disk one after the other, and in a search."""
    with tempfile.TemporaryDirectory() as folder:
        start = pathlib.Path(folder, "start.html")
        start.write_text(OPENED % [path.as_uri() for path in pages])
        # No sandbox, since containers do not allow it, and the pages are our own.
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--allow-file-access-from-files"]
        flags += ["--enable-logging=stderr", f"--user-data-dir={folder}/profile", "--virtual-time-budget=120000"]
        ran = subprocess.run([browser, *flags, "--dump-dom", start.as_uri()], capture_output=True, text=True, timeout=600)
    said = re.search(r"<pre>(.*?)</pre>", ran.stdout, re.DOTALL)
    lines = html.unescape(said[1]).splitlines() if said else []
    opened = [line for line in lines if line.startswith("opened ")]
    wrong = [line for line in lines if not line.startswith(("opened ", "found ", "done"))]
    wrong += [f"console: {line}" for line in re.findall(r"CONSOLE[^\]]*\] (.*)", ran.stderr)]
    if len(opened) != len(pages) or "done" not in lines:
        wrong.append(f"{browser} opened {len(opened)} of {len(pages)} pages: {ran.stderr[-500:]}")
    if not any(re.fullmatch(r"found [1-9]\d*", line) for line in lines):
        wrong.append("a search for 'empirical' found nothing")
    return wrong


# --- all of it -------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Build and check the site, and say what was and was not checked."""
    start = time.monotonic()
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    if subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict"], cwd=ROOT, env=quiet).returncode:
        sys.exit("site: it does not build, see above")
    built = time.monotonic() - start
    pages = sorted(path for path in SITE.rglob("*.html") if path.name != "404.html")
    wrong = collections.defaultdict(list, {str(path.relative_to(SITE)): mistakes(path) for path in pages})
    links = sum(len(page(path).links) + len(page(path).needs) for path in pages)
    print(f"site: {len(pages)} pages built in {built:.0f} s, {links} links and images checked")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser:
        wrong["in a browser"] = in_browser(browser, pages)
        print(f"site: opened in {browser}, from disk, 390 pixels wide; searched")
    else:
        print("site: NOT CHECKED in a browser: there is no chromium on this machine")
    said = [f"{name}: {mistake}" for name, found in wrong.items() for mistake in found]
    if said:
        sys.exit("\n".join(said))
    print(f"site: nothing wrong, {time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
