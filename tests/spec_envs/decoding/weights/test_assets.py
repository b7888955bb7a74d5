"""The weights of this project's own drafters are fetched where the package does not have them."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from spec_envs.decoding.drafters.names import DrafterName, drafter_folder
from spec_envs.decoding.weights import assets, checkpoints
from spec_envs.files import DATA

NAME = "own-draft"
CONTENT = b"weights" * 100_000
AT = f"drafters/{NAME}"
URL = "https://example.invalid/own-draft.safetensors"


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the data folder of a package that has the config.json of one drafter, without its weights."""
    entry = {"target": "smollm2-135m", "path": AT, "url": URL, "sha256": hashlib.sha256(CONTENT).hexdigest()}
    for module, name, value in (
        (assets, "registry", lambda: {"drafters": {NAME: entry}}),
        (assets, "DATA", tmp_path / "package"),
        (assets, "CACHE", tmp_path / "cache"),
        (checkpoints, "CACHE", tmp_path / "cache"),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.delenv(assets.VARIABLE, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    shutil.copytree(DATA / "drafters" / "smollm2-135m-draft", tmp_path / "package" / AT)
    (tmp_path / "package" / AT / assets.WEIGHTS).unlink()
    return tmp_path / "package"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a folder with the weights, laid out as that of the repository."""
    (tmp_path / "place" / AT).mkdir(parents=True)
    (tmp_path / "place" / AT / assets.WEIGHTS).write_bytes(CONTENT)
    return tmp_path / "place"


class Handler(SimpleHTTPRequestHandler):
    """Serves the files of a folder, and notes what was asked for."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def server(place: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the weights on loopback; yield the URL, and the paths that were asked for so far."""
    handler = type("Asked", (Handler,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(place))) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}", handler.asked
        serving.shutdown()
        thread.join()


def assert_whole(folder: Path, shipped: Path) -> None:
    """Assert that a folder of the cache has the weights and the package's files, and that nothing is left beside it."""
    assert (folder / assets.WEIGHTS).read_bytes() == CONTENT
    for file in (shipped / AT).iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def assert_nothing_left() -> None:
    assert not list((assets.CACHE / "drafters").glob("*"))


def test_weights_beside_their_config_are_used(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(assets.VARIABLE, "/nowhere")
    (shipped / AT / assets.WEIGHTS).write_bytes(b"trained here")
    assert drafter_folder(NAME) == shipped / AT


def test_weights_are_fetched_from_a_folder(shipped: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(assets.VARIABLE, str(place))
    assert_whole(folder := drafter_folder(NAME), shipped)
    monkeypatch.delenv(assets.VARIABLE)
    assert drafter_folder(NAME) == folder  # fetched once


def test_folder_is_found_below_the_home_folder(shipped: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place.parent))
    monkeypatch.setenv(assets.VARIABLE, "~/place/")
    assert_whole(drafter_folder(NAME), shipped)


def test_package_may_be_read_only(shipped: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The modes of its folder and files do not pass on to those of the cache, into which weights are written."""
    monkeypatch.setenv(assets.VARIABLE, str(place))
    for file in (shipped / AT).iterdir():
        file.chmod(0o444)
    (shipped / AT).chmod(0o555)
    try:
        assert_whole(folder := drafter_folder(NAME), shipped)
    finally:
        (shipped / AT).chmod(0o755)
    assert all(path.stat().st_mode & 0o200 for path in (folder, *folder.iterdir()))


def test_weights_are_downloaded_once(
    shipped: Path,
    server: tuple[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Processes that need them at the same time wait for the one that downloads them."""
    url, asked = server
    monkeypatch.setenv(assets.VARIABLE, url)
    with ThreadPoolExecutor(4) as pool:
        [folder] = set(pool.map(drafter_folder, [NAME] * 4))
    assert_whole(folder, shipped)
    assert asked == [f"/{AT}/{assets.WEIGHTS}"]
    assert caplog.messages == [f"downloading {url}/{AT}/{assets.WEIGHTS}; this happens once"]


def test_damaged_weights_are_fetched_again(
    shipped: Path, server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked = server
    monkeypatch.setenv(assets.VARIABLE, url)
    folder = drafter_folder(NAME)
    (folder / assets.WEIGHTS).write_bytes(CONTENT[:100])
    assert_whole(drafter_folder(NAME), shipped)
    assert len(asked) == 2


def test_changed_config_is_not_mixed_with_an_older_one(
    shipped: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer version of the package may change config.json."""
    monkeypatch.setenv(assets.VARIABLE, str(place))
    drafter_folder(NAME)
    (shipped / AT / "config.json").write_text("{}")
    assert (drafter_folder(NAME) / "config.json").read_text() == "{}"


def test_kind_of_a_drafter_is_known_without_its_weights(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(assets.VARIABLE, "/nowhere")
    assert DrafterName.parse(f"lookup+{NAME}").kind == "model"


@pytest.mark.usefixtures("shipped")
def test_other_weights_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(assets.VARIABLE, str(place))
    (place / AT / assets.WEIGHTS).write_bytes(b"others")
    digests = hashlib.sha256(b"others").hexdigest(), hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(ValueError) as raised:
        drafter_folder(NAME)
    assert str(raised.value) == (
        f"could not fetch the weights of 'own-draft' from {place}/{AT}/model.safetensors (it has 6 bytes with the "
        f"SHA-256 {digests[0]}); save {URL} (SHA-256 {digests[1]}) as FOLDER/{AT}/model.safetensors and set "
        "SPEC_ENVS_ASSETS=FOLDER"
    )
    assert_nothing_left()


@pytest.mark.usefixtures("shipped")
def test_server_cannot_fill_the_memory(
    place: Path, server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / AT / assets.WEIGHTS).write_bytes(bytes(100_000))
    monkeypatch.setattr(assets, "BLOCK", 1 << 10)
    monkeypatch.setattr(assets, "LARGEST", 1 << 12)
    monkeypatch.setenv(assets.VARIABLE, server[0])
    with pytest.raises(ValueError, match="it has more than 4,096 bytes"):
        drafter_folder(NAME)
    assert_nothing_left()


@pytest.mark.usefixtures("shipped")
def test_cut_download_is_refused(server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The server announces more bytes than it sends."""

    def send(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(CONTENT)))
        handler.end_headers()
        handler.wfile.write(CONTENT[:1000])

    monkeypatch.setattr(Handler, "do_GET", send)
    monkeypatch.setenv(assets.VARIABLE, server[0])
    with pytest.raises(ValueError, match=r"it has 1,000 bytes with the SHA-256|IncompleteRead"):
        drafter_folder(NAME)
    assert_nothing_left()


@pytest.mark.usefixtures("shipped", "server")
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("/nowhere", "FileNotFoundError: .*'/nowhere/drafters/own-draft/model.safetensors'"),
        ("http://127.0.0.1:9", "URLError: .*refused"),
        ("http://127.0.0.1:x", "InvalidURL: "),
        ("http://[", "ValueError: "),
        ("ftp://elsewhere", "FileNotFoundError: "),
    ],
)
def test_unreachable_place_is_named(value: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(assets.VARIABLE, value)
    pattern = rf"could not fetch .* from .*/drafters/own-draft/model.safetensors \({reason}.*\); save {URL} .* and set"
    with pytest.raises(ValueError, match=pattern) as raised:
        drafter_folder(NAME)
    assert "\n" not in str(raised.value)
    assert_nothing_left()


@pytest.mark.usefixtures("shipped")
def test_missing_file_on_a_server_is_named(
    server: tuple[str, list[str]], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(assets.VARIABLE, server[0])
    (place / AT / assets.WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"\(HTTPError: HTTP Error 404: File not found\); save"):
        drafter_folder(NAME)
    assert_nothing_left()


@pytest.mark.usefixtures("shipped")
def test_default_place_is_the_url_of_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(url: str, timeout: float) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(ValueError, match=rf"from {URL} \(TimeoutError: timed out\); save {URL}"):
        drafter_folder(NAME)


@pytest.mark.parametrize("name", ["smollm2-135m-eagle3", "smollm2-135m-draft"])
def test_repository_has_the_weights_of_the_registry(name: str) -> None:
    weights = drafter_folder(name) / assets.WEIGHTS
    assert checkpoints.sha256(weights) == checkpoints.registry()["drafters"][name]["sha256"]
    assert checkpoints.registry()["drafters"][name]["url"].endswith(f"/{name}.safetensors")
