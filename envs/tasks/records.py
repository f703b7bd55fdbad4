"""Records of a JSONL file: one JSON object a line."""

import json
from pathlib import Path
from typing import Any, NamedTuple


class Record(NamedTuple):
    """One line of a file; errors name its place."""

    place: str
    fields: dict[str, Any]

    def text(self, field: str) -> str:
        """Return a field as text.

        Raises:
            ValueError: it is missing, or neither text nor a number.
        """
        if field not in self.fields:
            raise ValueError(f"{self.place}: field '{field}' is missing; the line has {', '.join(self.fields) or 'none'}.")
        value = self.fields[field]
        if not isinstance(value, str | int | float):
            got = "null" if value is None else f"a {type(value).__name__}"
            raise ValueError(f"{self.place}: field '{field}' must be text or a number, got {got}.")
        return str(value)


def read_records(path: str | Path) -> list[Record]:
    """Read a JSONL file; empty lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no records, or a line that is not a JSON object.
    """
    path = Path(path)
    records = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                records.append(_parsed(line, f"{path}, line {number}"))
    if not records:
        raise ValueError(f"{path} is empty: expected one JSON object a line.")
    return records


def _parsed(line: bytes, place: str) -> Record:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8; nested too deeply
        raise ValueError(f"{place}: not valid JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{place}: expected a JSON object, got a {type(fields).__name__}.")
    return Record(place, fields)
