"""Building blocks of a self-contained HTML page: figures, tables, numbers and the frame around them.

Texts are escaped where they enter; functions return HTML. Nothing is loaded from a network.
"""

import base64
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from etils import epath
from PIL import Image

from curia_jax import storage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 190
_KEY = "Key"  # of a PNG's texts: what a picture was drawn from


def page(title: str, lead: str, sections: Sequence[str], footer: str) -> str:
    """A whole page; empty sections are left out."""
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
{"".join(f"<section>{section}</section>" for section in sections if section)}
<footer>{escape(footer)}</footer>
</main>
</body>
</html>
"""


def embed(figure: "Figure", path: Path, key: str = "") -> str:
    """Writes a figure as PNG to `path` and returns it as the source of an <img>; `key` is kept in the file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None} | ({_KEY: key} if key else {}))
    path.write_bytes(buffer.getvalue())
    return _source(buffer.getvalue())


def draw_once(path: Path, key: str, draw: Callable[[], "Figure"]) -> str:
    """As `embed`; a picture that lies there with the same key is used again. An empty key draws anew."""
    try:
        if key and Image.open(path).info.get(_KEY) == key:
            return _source(path.read_bytes())
    except OSError:  # no file, or one that is damaged
        pass
    return embed(draw(), path, key)


def _source(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def figure(source: str, caption: str, alternative: str) -> str:
    """A picture. `source` is from `embed`, `alternative` is read to those who cannot see it."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="{source}" alt="{escape(alternative)}">{below}</figure>'


def key_figures(cards: Sequence[tuple[str, str]]) -> str:
    """Large values, each with what it is."""
    items = "".join(f"<li><b>{escape(value)}</b><span>{escape(label)}</span></li>" for value, label in cards)
    return f'<ul class="figures">{items}</ul>'


def table(caption: str, words: Sequence[str], numbers: Sequence[str], rows: Sequence[str]) -> str:
    """A table with columns of words, then columns of numbers; `rows` are from `row`."""
    head = "".join(f"<th>{escape(name)}</th>" for name in words)
    head += "".join(f'<th class="number">{escape(name)}</th>' for name in numbers)
    # The caption is not in the table, because a wide table scrolls on a phone.
    above = f'<p class="note">{escape(caption)}</p>' if caption else ""
    return (
        f'{above}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def row(*cells: str, style: str = "") -> str:
    """`cells` are from `cell`, `number` and `code`; `style` is a class of style.css."""
    opening = f'<tr class="{style}">' if style else "<tr>"
    return f"{opening}{''.join(cells)}</tr>"


def cell(text: str) -> str:
    return f"<td>{escape(text)}</td>"


def code(*lines: str) -> str:
    return f"<td>{'<br>'.join(f'<code>{escape(line)}</code>' for line in lines)}</td>"


def number(text: str, interval: str = "") -> str:
    small = f" <small>{escape(interval)}</small>" if interval else ""
    return f'<td class="number">{escape(text)}{small}</td>'


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def escape(text: str) -> str:
    return html.escape(text, quote=True)


def count(number: int, noun: str) -> str:
    """1 slice, 2,000 slices."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: int | float) -> str:
    """42 s, 3.5 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def file_size(path: Path | epath.Path) -> str:
    """Of a file, or of all files in a folder; empty where there is none."""
    place = epath.Path(path)
    if not place.exists():
        return ""
    files = [place] if place.is_file() else [file.path for file in storage.files(place)]
    size = float(sum(file.stat().length or 0 for file in files))
    if size < 1000:
        return f"{size:.0f} B"
    for unit in ("kB", "MB"):
        size /= 1000
        if size < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} GB"
