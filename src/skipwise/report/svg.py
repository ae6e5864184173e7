"""Matplotlib figures as SVG that sits in the page: it takes the page's ink, so that it reads in light and in dark."""

import html
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#333333"  # drawn in this, shown in the colour of the page's text

# text stays text: it is small, can be selected, and takes the page's font. Dollars in a name are not mathematics.
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "image.composite_image": False,
}


@contextmanager
def canvas(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure of one panel in the house style; the style is a user's own again afterwards."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def to_svg(figure: Figure, alt: str, prefix: str) -> str:
    """The figure as an <svg> element. `alt` is what it shows for those who do not see it; `prefix` keeps ids apart."""
    buffer = io.StringIO()
    with rc_context(STYLE):
        # no date, so that the same numbers give the same page
        figure.savefig(buffer, format="svg", dpi=110, metadata={"Date": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|\sxmlns(:\w+)?=\"[^\"]*\"", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', _opening(alt), drawn, count=1)
    return _with_ids(drawn.replace(INK, "currentColor"), prefix)


def _opening(alt: str) -> Callable[[re.Match[str]], str]:
    # without width and height the drawing fills its column
    return lambda found: f'<svg viewBox="{found[1]}" role="img" aria-label="{html.escape(alt)}">'


def _with_ids(svg: str, prefix: str) -> str:
    """Ids numbered under `prefix`: matplotlib's differ from run to run and repeat from figure to figure."""
    numbers = count()
    names = {old: f"{prefix}-{next(numbers)}" for old in re.findall(r'\bid="([^"]+)"', svg)}
    svg = re.sub(r'\bid="([^"]+)"', lambda found: f'id="{names[found[1]]}"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", lambda found: f"url(#{names.get(found[1], found[1])})", svg)
    return re.sub(r'href="#([^"]+)"', lambda found: f'href="#{names.get(found[1], found[1])}"', svg)
