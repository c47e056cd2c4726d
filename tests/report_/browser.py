"""A browser without a window, for looking at pages as their readers do."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium (apt install chromium)")


def open_page(page: Path, profile: Path, *options: str) -> str:
    """What Chromium prints after it has opened a page without any network."""
    command = [
        str(BROWSER),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--virtual-time-budget=30000",
        f"--user-data-dir={profile}",
        *options,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=150).stdout


def dom_after(html: str, script: str, directory: Path) -> str:
    """The document after all charts were drawn and a script, a module of its own, has run."""
    page = directory / "page.html"
    wait = (
        "while (document.documentElement.dataset.drawn !== 'done') await new Promise(f => setTimeout(f, 50));"
    )
    body, end = html[: html.rindex("</body>")], html[html.rindex("</body>") :]
    page.write_text(f'{body}<script type="module">{wait}{script}</script>{end}')
    return open_page(page, directory / "profile", "--dump-dom")
