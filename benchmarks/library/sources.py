"""Download what the tasks are made of, pinned by sha256, and read it without running any of it."""

import bz2
import importlib.metadata
import io
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path

import yaml

from d2c_mlx.utils.errors import D2CError
from d2c_mlx.utils.files import hash_file

KINDS = ("pypi", "npm", "debian", "installed", "url")
# The snapshot keeps what a point release drops from the mirrors.
DEBIAN = (
    "http://deb.debian.org/debian/",
    "https://snapshot.debian.org/archive/debian/20261122T000000Z/",
)


class SourceError(D2CError):
    """A source cannot be had, or is not what was pinned: one line that names it."""


class Sources:
    """The pinned sources: downloads when first asked for, then reads from the cache.

    Args:
        pins: a YAML file, name -> one of `KINDS`, sha256, licence, ship.
        cache: directory of the downloads, one per source.
    """

    def __init__(self, pins: Path, cache: Path) -> None:
        self.pins = yaml.safe_load(pins.read_text(encoding="utf-8"))
        self.cache = cache
        self._failed: dict[str, SourceError] = {}

    def path(self, name: str) -> Path:
        """The file of a source, downloaded unless it is there; a failure is not tried again."""
        if name in self._failed:
            raise self._failed[name]
        try:
            return self._path(name)
        except (OSError, HTTPException, SourceError) as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            line = str(error) if isinstance(error, SourceError) else f"source {name}: {text}"
            self._failed[name] = SourceError(line)
            raise self._failed[name] from error

    def _path(self, name: str) -> Path:
        pin, directory = self.pins[name], self.cache / name
        for file in directory.glob("*"):
            if file.is_file() and hash_file(file) == pin["sha256"]:
                return file
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.cache) as temporary:
            file = _download(pin, Path(temporary))
            found = hash_file(file)
            if found != pin["sha256"]:
                raise SourceError(
                    f"source {name}: {file.name} has sha256 {found}, pinned is {pin['sha256']}"
                )
            return Path(shutil.move(file, directory / file.name))

    def members(self, name: str, pattern: str) -> dict[str, bytes]:
        """Name -> content of the archive's files whose whole name matches, in order of names."""
        return _members(self.path(name), pattern)

    def text(self, name: str) -> str:
        """The text of a source that is one compressed file."""
        path = self.path(name)
        data = path.read_bytes()
        return {".bz2": bz2, ".xz": lzma}[path.suffix].decompress(data).decode()

    def require(self, name: str) -> None:
        """Download a source, or see that its library is installed."""
        if "installed" not in self.pins[name]:
            self.path(name)
            return
        package, wanted = self.pins[name]["installed"].split("==")
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = "not installed"
        if found != wanted:
            raise SourceError(
                f"source {name}: {package} {wanted} is needed, found: {found}; pip install"
                " --no-deps --require-hashes -r benchmarks/library/requirements.txt"
            )

    def provenance(self, name: str) -> dict[str, str]:
        """The origin of a source, for the manifest."""
        pin = self.pins[name]
        kind = next(kind for kind in KINDS if kind in pin)
        package, version = _named(pin[kind], pin.get("version"))
        return {"name": name, "from": kind, "package": package, "version": version,
                "sha256": pin["sha256"], "licence": pin["licence"]}  # fmt: skip


def _named(where, version):
    """`(package, version)` of a pin; a Debian file is named by its path."""
    if version:
        return where, version
    for mark in ("==", "@", "_"):
        if mark in where:
            package, rest = where.rsplit(mark, 1) if mark != "_" else where.split(mark, 1)
            return package.rsplit("/", 1)[-1], rest.removesuffix("_all.deb")
    return where, ""


def _download(pin, directory):
    """Download into a directory; the file."""
    if "pypi" in pin:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   "--only-binary=:all:", "--dest", str(directory), pin["pypi"]]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"pip download {pin['pypi']}: {done.stderr.strip().splitlines()[-1]}")
        return next(directory.iterdir())
    if "npm" in pin:
        package, version = pin["npm"].rsplit("@", 1)
        file = f"{package.rsplit('/', 1)[-1]}-{version}.tgz"
        urls = [f"https://registry.npmjs.org/{package}/-/{file}"]
    else:
        urls = [mirror + pin["debian"] for mirror in DEBIAN] if "debian" in pin else [pin["url"]]
    problems = []
    for url in urls:
        path = directory / url.rsplit("/", 1)[-1]
        try:
            with urllib.request.urlopen(url, timeout=60) as answer, open(path, "wb") as file:
                shutil.copyfileobj(answer, file)
            return path
        except OSError as error:
            problems.append(f"{url}: {error}")
    raise OSError("; ".join(problems))


@lru_cache(maxsize=32)
def _members(path, pattern):
    wanted = re.compile(pattern)
    if path.suffix == ".whl":
        return unzip(path.read_bytes(), pattern)
    data = _deb(path) if path.suffix == ".deb" else open(path, "rb")
    with data, tarfile.open(fileobj=data, mode="r|*") as archive:
        found = {
            one.name: archive.extractfile(one).read()
            for one in archive
            if one.isfile() and wanted.fullmatch(one.name)
        }
    return dict(sorted(found.items()))


def unzip(data: bytes, pattern: str) -> dict[str, bytes]:
    """Name -> content of a ZIP file's members whose whole name matches, in order of names."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = sorted(name for name in archive.namelist() if re.fullmatch(pattern, name))
        return {name: archive.read(name) for name in names}


def _deb(path):
    """The data.tar of a Debian package, which is an ar archive: headers of 60 bytes."""
    with open(path, "rb") as file:
        file.seek(8)
        while header := file.read(60):
            size = int(header[48:58])
            if header.startswith(b"data.tar"):
                return io.BytesIO(file.read(size))
            file.seek(size + size % 2, io.SEEK_CUR)
    raise SourceError(f"{path}: no data.tar in it")
