"""``history.jsonl`` in the folder of a training run: one JSON object per epoch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amil_fast.utils.files import DataError, parse_json, write_text

HISTORY = "history.jsonl"


def append_row(folder: Path, row: Mapping[str, Any]) -> None:
    """Appends the numbers of an epoch."""
    with (Path(folder) / HISTORY).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def drop_rows(folder: Path, key: str, last: int) -> None:
    """Removes rows whose ``row[key]`` is above ``last``, which a resumed run repeats, and a line cut off by a kill."""
    path = Path(folder) / HISTORY
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if parse_json(line, path, dict)[key] <= last:
                kept.append(line + "\n")
        except (DataError, KeyError, TypeError):
            continue
    write_text(path, "".join(kept))
