"""What a probe can be told."""

import re
from dataclasses import dataclass
from typing import Annotated

from bov_lightning.errors import UserError
from bov_lightning.kinds import COUNT, ENDLESS, Range
from bov_lightning.model.config import LAYER_SETS


@dataclass(frozen=True)
class ProbeSettings:
    """How much text, which layers, how exact."""

    tokens: Annotated[int, COUNT] = 200_000
    """tokens to calibrate on"""

    held_out: Annotated[int, COUNT] = 50_000
    """tokens that calibration does not see: settings and order are chosen on a fifth of them,
    costs measured on the others"""

    row_length: Annotated[int, Range(4, ENDLESS)] = 512
    """tokens per row; the model's context where that is shorter"""

    batch_size: Annotated[int, COUNT] = 4
    """rows computed together"""

    layers: str = "every"
    """the layers that may go: every, last_third and the other sets of recipes, or numbers such
    as 3,5,9"""

    own_rows: str = "1024,4096"
    """sizes of tables that keep rows for the most frequent ids only, regression giving the rest"""

    precision: Annotated[float, Range(0, 100)] = 1.0
    """a cost is measured until its standard error is below this times 0.01 nats + 10%; 0: on all
    held-out text"""

    order_rows: Annotated[int, COUNT] = 4
    """rows on which the order is decided"""

    memory: Annotated[float, Range(above=0)] = 2.0
    """GB for the sums of calibration: layers that do not fit wait for another pass over the text"""

    def __post_init__(self):
        self.own_row_counts  # noqa: B018 (refuses what is no list of numbers)

    @property
    def own_row_counts(self) -> list[int]:
        """Sizes of the small tables."""
        return sorted(_numbers(self.own_rows, "--own-rows"))

    def layers_of(self, n_layer: int) -> list[int]:
        """The layers that may go, of a model with so many.

        Raises:
            UserError: a name that is no set, or a layer that the model lacks.
        """
        if self.layers in LAYER_SETS:
            is_in = LAYER_SETS[self.layers]
            return [layer for layer in range(n_layer) if is_in(layer, n_layer)]
        if re.fullmatch("[a-z_]+", self.layers):
            raise UserError(f"--layers {self.layers}: use one of {', '.join(LAYER_SETS)}")
        numbers = _numbers(self.layers, "--layers")
        if outside := [layer for layer in numbers if layer >= n_layer]:
            raise UserError(
                f"--layers holds {outside[0]}, but the model has layers 0 to {n_layer - 1}"
            )
        return sorted(numbers)


def _numbers(text: str, name: str) -> set[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
        raise UserError(f"{name} {text}: give whole numbers, such as 3,5,9")
    return {int(part) for part in parts}
