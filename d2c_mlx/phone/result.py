"""The JSON result of the phone benchmark: the fields it must have, and reading it from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationError

from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import hash_file, read_text
from d2c_mlx.utils.validation import Checked, problems_of

__all__ = ["FORMAT", "read_phone"]

FORMAT = "d2c-mlx-phone"
_COMMAND = "d2c-mlx phone PACK --json"
_SOME: Any = {"expected": "a list that is not empty"}


class _Part(Checked):
    """An object that may have more fields than these."""

    model_config = ConfigDict(extra="allow")
    error = PackError
    remedy = "write it again"


class _Model(_Part):
    bits: int | None
    name: str
    compute_dtype: str


class _Pack(_Part):
    manifest_sha256: str
    n_tasks: int


class _Options(_Part):
    decode: int
    runs: int


class _Device(_Part):
    name: str
    memory: int
    memory_source: str
    storage_source: str


class _Times(_Part):
    context: int
    first_token_seconds: float
    prompt_tokens_per_second: float
    decode_tokens_per_second: float


class _Fit(_Part):
    limit: int
    margin: int
    fits: bool


class _Memory(_Fit):
    context: int
    weights: int
    adapter: int
    kv_cache: int
    rest: int
    peak: int


class _Storage(_Fit):
    nbytes: int


class _Method(_Part):
    nbytes: int
    contexts: list[_Times] = Field(min_length=1, json_schema_extra=_SOME)
    memory: list[_Memory] = Field(min_length=1, json_schema_extra=_SOME)


class _PackMethod(_Method):
    storage: _Storage


class _Methods(_Part):
    __pydantic_extra__: dict[str, _Method]
    pack: _PackMethod


class _PackSwitch(_Part):
    read_seconds: float
    attach_seconds: float
    token_seconds: float
    seconds: float


class _StockSwitch(_Part):
    reload_seconds: float
    token_seconds: float
    seconds: float


class _Switch(_Part):
    ratio: float
    ratio_before_token: float
    pack: _PackSwitch
    stock: _StockSwitch


class _Loss(_Part):
    loss: float
    excess: float | None
    retention: float | None


class _Losses(_Part):
    __pydantic_extra__: dict[str, _Loss]


class _DeviceLosses(_Losses):
    pack: _Loss


class _Gain(_Part):
    on_float: float = Field(alias="float")
    device: float


class _Quality(_Part):
    n_rows: list[int]
    float_dtype: str
    float_weights: str
    kept_gain: float | None
    gain: _Gain
    on_float: _Losses = Field(alias="float")
    device: _DeviceLosses


class _Machine(_Part):
    device: str
    system: str
    backend: str


class _Provenance(_Part):
    includes: str
    versions: dict[str, str]
    machine: _Machine


class _Result(_Part):
    model: _Model
    pack: _Pack
    options: _Options
    time: str
    device: _Device
    methods: _Methods
    switch: _Switch
    quality: _Quality | None
    provenance: _Provenance


def read_phone(path: Path, of: Path | None = None) -> dict[str, Any]:
    """Read a result that `d2c-mlx phone --json` printed, to show it or put it into a report.

    Args:
        path: file of the result.
        of: directory of the pack that was measured; None takes the result of any pack.

    Raises:
        PackError: no such file, no result, one that lacks parts, or one of another pack.
    """
    if not path.is_file():
        raise PackError(f"{path}: no such file; write one with {_COMMAND} > {path}")
    try:
        result = json.loads(read_text(path))
    except ValueError:
        result = None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise PackError(f"{path}: no result of {_COMMAND}")
    try:
        _Result.model_validate(result)
    except ValidationError as error:
        raise PackError(_problems(path, result, error)) from None
    if of and result["pack"]["manifest_sha256"] != hash_file(of / "manifest.json"):
        raise PackError(
            f"{path}: it is of another pack than {of}; measure this one with d2c-mlx phone {of}"
            f" --device {result['device']['name']} --json > {path}, or delete the file"
        )
    return result


def _problems(path: Path, result: object, error: ValidationError) -> list[str]:
    """One line for all that is missing, one for each value that is wrong."""
    found = problems_of(error, _Result, result, str(path))
    missing = [problem.field for problem in found if not problem.found]
    lines = [str(problem) for problem in found if problem.found]
    if missing:
        more = f" and {len(missing) - 3} fields more" if len(missing) > 3 else ""
        lines.insert(0, f"{path}: has no {', '.join(missing[:3])}{more}, expected a whole result of"
                        f" {_COMMAND}; write it again")  # fmt: skip
    return lines
