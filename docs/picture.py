"""Draws docs/tree.png: a prompt of the bundled sample in the HTML report, in LEAF's credit beside GRPO's.

``python docs/picture.py``, with the extra ``html`` and a Chromium on the path.
"""

import re
import subprocess
import tempfile
from pathlib import Path

HIDDEN = (
    "body > header, .tiles, main > section:not(.bar), .prompts, footer, .steps-between { display: none !important }"
)
# Of the schemes a few, so that their names have room.
SHOWN = ", ".join(f"[value={name}]" for name in ("leaf", "grpo", "tempo", "tree_td"))
HIDDEN += f" #schemes label:not(:has({SHOWN})) {{ display: none !important }}"
STYLE = f"<style>{HIDDEN} * {{ content-visibility: visible !important }} .panes {{ display: block !important }}</style>"
WIDTH, HEIGHT = 640, 734

with tempfile.TemporaryDirectory() as folder:
    report, page = Path(folder, "report.html"), Path(folder, "page.html")
    subprocess.run(["python", "-m", "leafkernels", "--html", report], check=True, stdout=subprocess.DEVNULL)
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', STYLE, report.read_text(encoding="utf-8"))
    report.write_text(text, encoding="utf-8")
    frames = "".join(
        f'<iframe src="report.html#prompt=0&scheme={scheme}&theme=light" width={WIDTH} height={HEIGHT} '
        'style="border: 0" scrolling=no></iframe>'
        for scheme in ("leaf", "grpo")
    )
    page.write_text(f'<body style="margin: 0; display: flex">{frames}', encoding="utf-8")
    size = [f"--window-size={2 * WIDTH},{HEIGHT}", "--force-device-scale-factor=1.5", "--virtual-time-budget=3000"]
    picture = f"--screenshot={Path(__file__).with_name('tree.png')}"
    browser = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    subprocess.run([*browser, *size, picture, page.as_uri()], check=True, stderr=subprocess.DEVNULL)
