"""The screen: what a command says while it works goes through one console on stderr.

Two consoles do not know of each other's lines, so that a warning of one would tear up the live view
(`bov_lightning.training.live_view`) of the other.
"""

from rich.console import Console

CONSOLE = Console(stderr=True, markup=False, emoji=False)


def say(text: str) -> None:
    """Prints a line, which is not wrapped where the output is no terminal."""
    CONSOLE.print(text, highlight=False, soft_wrap=True)
