"""Colours and dashes that tell rows apart, the same in all plots of a group."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b5529b", "#2f8fc9", "#b97a00", "#5f5f5f")
"""Told apart by the colour-blind (after Okabe and Ito, darkened for white); page.css has others for
dark backgrounds."""
DASHES = ("", "5 2", "1.5 1.5", "6 2 1.5 2")
N_STYLE = len(COLOURS) * len(DASHES)


def dashes(index: int) -> str:
    """The dashes of a row, as SVG's stroke-dasharray; empty: a solid line."""
    return DASHES[index // len(COLOURS) % len(DASHES)]


def colour(index: int) -> int:
    """The number of a row's colour."""
    return index % len(COLOURS)
