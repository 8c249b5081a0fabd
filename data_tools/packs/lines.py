"""What goes in and out of the making of rows: a record of a share, and what became of it."""

from typing import Any, NamedTuple

import numpy as np

from data_tools.chats.chat import Refused
from data_tools.packs.store import RowText
from data_tools.recipes.views import View


class SyntheticRow(NamedTuple):
    number: int


class Viewed(NamedTuple):
    """Holds a record as a share gives it, and what the recipe takes of it."""

    view: View
    raw: Any


class Malformed(NamedTuple):
    """Represents a record that gives no rows; a `fatal` one is a fault of the settings, whatever on_bad_row says."""

    bucket: str
    reason: str = ""
    fatal: bool = False


class Kept(NamedTuple):
    """Says what the store gets of a row: `Encoded` with its text as hashes, so that a worker's text does not travel."""

    ids: np.ndarray
    mask: np.ndarray
    text: RowText
    turns: int


Line = Malformed | list[Kept | Refused]  # what became of one record
