"""A table of pandas as rows: pandas itself is no requirement."""

from __future__ import annotations

from typing import Any


class FrameRows:
    """The rows of a ``pandas.DataFrame`` by number, each a dictionary; gaps are ``None``.

    Args:
        frame: The table. Its index is not looked at.
    """

    def __init__(self, frame: Any) -> None:
        self.frame = frame
        self.columns = [str(column) for column in frame.columns]

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, number: int) -> dict[str, Any]:
        import pandas as pd  # it is there, or there would be no frame

        row = {}
        for i, column in enumerate(self.columns):
            value = self.frame.iat[number, i]  # a whole row would make its numbers of one type
            if pd.api.types.is_scalar(value):
                value = None if pd.isna(value) else getattr(value, "item", lambda v=value: v)()
            elif type(value).__name__ == "ndarray":  # lists, as parquet files give them
                value = value.tolist()
            row[column] = value
        return row
