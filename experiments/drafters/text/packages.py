"""Debian packages whose texts a drafter's training reads. They are downloaded by ``apt-get``, verified by their SHA-256,
kept in the user's cache folder and never unpacked on the disk: members are read from the archive one after the other.
"""

from __future__ import annotations

import fnmatch
import io
import logging
import lzma
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from spec_envs.decoding.weights.checkpoints import CACHE, cache_lock, scratch, sha256

LOG = logging.getLogger(__name__)
TABLE = Path(__file__).parent / "sources.yml"
LARGEST_MEMBER, LARGEST = 1 << 23, 1 << 29  # bytes of a member that is read, and of all members of a package


@dataclass(frozen=True)
class Source:
    """A row of ``sources.yml``.

    Attributes:
        name: of the Debian package.
        about: what its texts are.
        version: of the package.
        sha256: of its file.
        license: of its texts.
        form: how its texts are cut, see ``passages.FORMS``.
        members: patterns of the files that are read.
    """

    name: str
    about: str
    version: str
    sha256: str
    license: str
    form: str
    members: tuple[str, ...]

    @property
    def file(self) -> Path:
        """The place of the package in the cache folder."""
        return CACHE / "packages" / f"{self.name}_{self.version.replace(':', '-')}.deb"


def sources() -> list[Source]:
    """Return the rows of ``sources.yml``."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return [Source(name, **{**row, "members": tuple(row["members"])}) for name, row in table.items()]


def obtained(source: Source) -> Path:
    """Return the file of a package, which is downloaded if necessary.

    Raises:
        ValueError: it cannot be downloaded, or is another file than the table says.
    """
    if not source.file.exists():
        with cache_lock(source.file):
            if not source.file.exists():  # another process may have been faster
                download(source)
    if (found := sha256(source.file)) != source.sha256:
        raise ValueError(f"{source.file} has the SHA-256 {found}; expected {source.sha256}: delete it")
    return source.file


def download(source: Source) -> None:
    """Download a package with ``apt-get``.

    Raises:
        ValueError: there is no such program, or it does not find the package.
    """
    LOG.warning("downloading the package %s; this happens once", source.name)
    with scratch(source.file) as folder:
        command = ["apt-get", "download", "-q", f"{source.name}={source.version}"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        except OSError as error:
            reason = str(error)
        found = list(folder.glob("*.deb"))
        if not found:
            raise ValueError(
                f"could not download the package {source.name} {source.version} of Debian ({reason}); run `apt-get "
                f"update` on Debian 12, or save the package, which snapshot.debian.org keeps, as {source.file}"
            )
        found[0].replace(source.file)


def members(package: Path, patterns: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Yield the name, without ``./``, and the contents of every regular file of a package that matches a pattern.

    Raises:
        ValueError: the package is damaged, or its files are too large.
    """
    size = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data_archive(package.read_bytes())), mode="r|*") as archive:
            for member in archive:
                size += member.size
                name = member.name.removeprefix("./")
                wanted = member.isreg() and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
                if size > LARGEST or (wanted and member.size > LARGEST_MEMBER):
                    raise ValueError("its files are too large")
                if wanted and (file := archive.extractfile(member)) is not None:
                    yield name, file.read()
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"cannot read the package {package} ({error}); delete it and run the command again") from None


def data_archive(package: bytes) -> bytes:
    """Return the archive of the files of a Debian package, the member ``data.tar`` of an ``ar`` archive; see deb(5).

    Raises:
        ValueError: there is none.
    """
    at = 8
    while package.startswith(b"!<arch>\n") and len(header := package[at : at + 60]) == 60:
        size = int(header[48:58])
        if not 0 <= size <= len(package) - at - 60:
            raise ValueError("it is truncated")
        if header.startswith(b"data.tar"):
            return package[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ValueError("it is not a Debian package")
