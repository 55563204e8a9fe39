"""Hashes of JSON values: equal values have equal hashes."""

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def without_paths(value: Any) -> Any:
    """JSON in which texts that may be paths or addresses are shortened to their last names, as in published files."""
    if isinstance(value, dict):
        return {name: without_paths(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(each) for each in value]
    return value.replace("\\", "/").rstrip("/").rpartition("/")[2] if isinstance(value, str) else value
