"""A result of the phone benchmark: read from its file, and as Markdown."""

from pathlib import Path
from typing import Any

from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import hash_file
from d2c_mlx.utils.parsing import json_or_none
from d2c_mlx.utils.templates import templates_of

FORMAT, VERSION = "d2c-mlx-phone", 3

Json = dict[str, Any]


def read_phone(path: Path, of: Path | None = None) -> Json:
    """Read a result that `d2c-mlx phone --json` printed, to put it into a report.

    Args:
        path: file of the result.
        of: directory of a pack that was measured; None takes a result of any packs.

    Raises:
        PackError: no such file, no result of this version, or one of other packs.
    """
    command = f"d2c-mlx phone {of or 'PACK'} --json > {path}"
    result: Json = json_or_none(path)
    about = [result.get("format"), result.get("version")] if isinstance(result, dict) else None
    if about != [FORMAT, VERSION]:
        raise PackError(
            f"{path}: expected a result of this version of d2c-mlx phone; write it with {command}"
        )
    measured = [pack["manifest_sha256"] for pack in result["packs"].values()]
    if of and hash_file(of / "manifest.json") not in measured:
        raise PackError(
            f"{path}: it is of other packs than {of}; measure this one with {command}, or delete"
            " the file"
        )
    return result


def render_phone(result: Json) -> str:
    """A result as Markdown: what fits, then quality, memory, speed and change of adapter.

    Args:
        result: from `benchmark.bench_phone` or `read_phone`.
    """
    template = templates_of("d2c_mlx.phone").get_template("phone.md.jinja")
    return str(template.render(result).strip())
