"""Packages are downloaded once, verified by their hash, and read from the archive within limits."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest

from spec_envs.experiments.drafters.text import packages
from spec_envs.experiments.drafters.text.packages import Source, members, obtained, sources

FILES = {"usr/share/help/C/a.page": b"one", "usr/share/doc/copyright": b"two"}
APT = """#!/bin/sh
echo "$@" >> {folder}/calls
cp {folder}/package downloaded_1%3a2_all.deb
"""


def deb(folder: Path, files: dict[str, bytes], compression: str = "xz", links: tuple[str, ...] = ()) -> Path:
    """Write a Debian package with these files, and links to the first of them, and return its path."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{compression}") as archive:
        for name, contents in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(contents)
            archive.addfile(member, io.BytesIO(contents))
        for name in links:
            member = tarfile.TarInfo(f"./{name}")
            member.type, member.linkname = tarfile.SYMTYPE, f"/{next(iter(files))}"
            archive.addfile(member)
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{compression}": data.getvalue()}
    with (path := folder / "package").open("wb") as file:
        file.write(b"!<arch>\n")
        for name, contents in parts.items():
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(contents):<10}`\n".encode())
            file.write(contents + b"\n" * (len(contents) % 2))
    return path


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """Return a source whose package ``apt-get`` finds, in an empty cache."""
    (folder := tmp_path / "apt").mkdir()
    package = deb(folder, FILES)
    (folder / "apt-get").write_text(APT.format(folder=folder))
    (folder / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(packages, "CACHE", tmp_path / "cache")
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    return Source("some-docs", "invented", "1:2", digest, "public domain", "html", ("usr/share/help/*.page",))


@pytest.mark.parametrize("compression", ["xz", "gz"])
def test_regular_files_that_match_are_read(compression: str, tmp_path: Path) -> None:
    package = deb(tmp_path, FILES, compression, links=("usr/share/help/C/link.page",))
    assert list(members(package, ("usr/share/help/*.page",))) == [("usr/share/help/C/a.page", b"one")]
    assert dict(members(package, ("*/C/*", "*/copyright"))) == FILES


def test_a_package_is_downloaded_once(source: Source, tmp_path: Path) -> None:
    assert source.file == tmp_path / "cache" / "packages" / "some-docs_1-2.deb"
    for _ in range(2):
        assert list(members(obtained(source), source.members)) == [("usr/share/help/C/a.page", b"one")]
    assert (tmp_path / "apt" / "calls").read_text() == "download -q some-docs=1:2\n"
    assert [path.name for path in source.file.parent.iterdir()] == [source.file.name]


def test_another_file_than_the_table_says_is_refused(source: Source) -> None:
    obtained(source)
    source.file.write_bytes(source.file.read_bytes() + b"x")
    with pytest.raises(ValueError, match=rf"{source.file} has the SHA-256 \w+; expected {source.sha256}: delete it$"):
        obtained(source)


def test_without_apt_the_error_says_where_to_save_the_package(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    message = rf"could not download the package some-docs 1:2 of Debian \(.*apt-get.*\); .* save the package, .*, as {source.file}$"
    with pytest.raises(ValueError, match=message):
        obtained(source)
    assert not list(source.file.parent.iterdir())


def test_what_apt_says_last_is_passed_on(source: Source, tmp_path: Path) -> None:
    (tmp_path / "apt" / "apt-get").write_text("#!/bin/sh\necho 'W: old' >&2; echo 'E: no such version' >&2; exit 100\n")
    with pytest.raises(ValueError, match=r"of Debian \(E: no such version\); run `apt-get update`"):
        obtained(source)


@pytest.mark.parametrize("damage", ["truncated", "another format", "no data", "broken size", "negative size", "bits"])
def test_damaged_packages_are_refused(damage: str, tmp_path: Path) -> None:
    package = deb(tmp_path, FILES)
    whole, at = package.read_bytes(), package.read_bytes().index(b"data.tar")
    package.write_bytes(
        {
            "truncated": whole[:-40],
            "another format": b"PK" + whole[2:],
            "no data": whole[:at],
            "broken size": whole[: at + 48] + b"many      " + whole[at + 58 :],
            "negative size": whole[:56] + b"-60       " + whole[66:],
            "bits": whole[: at + 100] + bytes(255 - byte for byte in whole[at + 100 : at + 140]) + whole[at + 140 :],
        }[damage]
    )
    with pytest.raises(
        ValueError, match=rf"cannot read the package {package} \(.*\); delete it and run the command again"
    ):
        list(members(package, ("*",)))


def test_names_that_lead_out_of_the_folder_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members are read, never unpacked, whatever they are called."""
    (folder := tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(folder)
    package = deb(tmp_path, {"../../out.page": b"x", f"{tmp_path}/absolute.page": b"y", "help/../../c.page": b"z"})
    assert list(members(package, ("help/*.page",))) == [("help/../../c.page", b"z")]
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "a", folder, package]


@pytest.mark.parametrize(("member", "everything"), [(2, 1000), (1000, 5)])
def test_large_packages_are_refused(
    member: int, everything: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = deb(tmp_path, FILES)
    monkeypatch.setattr(packages, "LARGEST_MEMBER", member)
    monkeypatch.setattr(packages, "LARGEST", everything)
    with pytest.raises(ValueError, match="its files are too large"):
        list(members(package, ("*.page",)))
    monkeypatch.setattr(packages, "LARGEST", 1000)  # a large file that is not read does not matter
    assert not list(members(package, ("nothing",)))


def test_the_table_of_packages() -> None:
    table = sources()
    assert len({source.file for source in table}) == len(table) >= 5
    for source in table:
        assert len(bytes.fromhex(source.sha256)) == 32 and source.about and source.license and source.members
