"""Colours, sizes and fonts of the figures."""

from typing import Any

from curia_jax.evaluate.results import HISTOGRAM, PIXELS, RANDOM

INK, SOFT, LINE = "#1b2430", "#5b6675", "#dde2e8"
OURS = "#1d5fa8"  # a run, and the backbones that a user named
FLOORS = {RANDOM: "#c2762b", PIXELS: "#6b7785", HISTOGRAM: "#a9b2bc"}
BASELINE = "#c2762b"
# Inches; narrow relative to the font, so that it is legible on a phone.
WIDTH = 6.8
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.size": 11, "text.color": INK, "legend.frameon": False,
    "axes.labelcolor": INK, "axes.edgecolor": "#b9c2cc", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": LINE, "grid.linewidth": 0.8,
    "xtick.color": SOFT, "ytick.color": SOFT, "figure.facecolor": "white", "savefig.facecolor": "white",
}  # fmt: skip
