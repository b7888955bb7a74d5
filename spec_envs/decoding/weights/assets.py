"""The weights of this project's own drafters, which are too large for the package and are fetched once.

A clone has them beside their config.json. An installed package has the config.json alone: the weights are downloaded
from the `url` in models.yml at their first use, verified by their SHA-256 and kept in the user's cache folder.

The environment variable ``SPEC_ENVS_ASSETS`` names another place to take them from: a folder, or the URL of one, that is
laid out as ``spec_envs/data`` of the repository: ``drafters/NAME/model.safetensors``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import urllib.request
from functools import partial
from http.client import HTTPException
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from spec_envs.decoding.weights.checkpoints import CACHE, cache_lock, describe, is_whole, registry, scratch, sha256
from spec_envs.files import DATA, at_home, write_bytes

VARIABLE = "SPEC_ENVS_ASSETS"
WEIGHTS = "model.safetensors"
TIMEOUT = 30.0  # seconds that a server may be silent
BLOCK = 1 << 18  # bytes read at a time
LARGEST = 1 << 28  # bytes that a server may make us hold
log = logging.getLogger(__name__)


def is_own(name: str) -> bool:
    """Return whether a drafter is one of this project's own."""
    return "path" in registry()["drafters"].get(name, {})


def described_in(name: str) -> Path:
    """Return the folder of the package that has the config.json of one of this project's own drafters."""
    return DATA / str(registry()["drafters"][name]["path"])


def own_folder(name: str) -> Path:
    """Return a folder with the config.json and the weights of one of this project's own drafters. The weights are
    fetched if necessary.

    Raises:
        ValueError: the weights are not where they should be, or are others; the message says what to do.
        OSError: the cache folder cannot be written.
    """
    shipped, digest = described_in(name), str(registry()["drafters"][name]["sha256"])
    if (shipped / WEIGHTS).is_file():
        return shipped
    key = hashlib.sha256(f"{sha256(shipped / 'config.json')} {digest}".encode()).hexdigest()
    folder = CACHE / "drafters" / f"{name}-{key[:12]}"
    if not is_whole(folder):
        with cache_lock(folder):
            if not is_whole(folder):  # another process may have been faster
                weights = fetch(name)
                with scratch(folder) as making:
                    for file in shipped.iterdir():
                        shutil.copyfile(file, making / file.name)  # without its mode: the package may be read-only
                    write_bytes(making / WEIGHTS, weights)
                    describe(making)
                    shutil.rmtree(folder, ignore_errors=True)
                    making.rename(folder)
    return folder


def fetch(name: str) -> bytes:
    """Return the contents of a drafter's file of weights, read from the place that ``SPEC_ENVS_ASSETS`` names, or else
    downloaded from its `url`.

    Raises:
        ValueError: the file cannot be read there, or has another SHA-256 than in models.yml.
    """
    entry = registry()["drafters"][name]
    url, digest, at = entry["url"], entry["sha256"], f"{entry['path']}/{WEIGHTS}"
    place = os.environ.get(VARIABLE)
    origin = f"{place.rstrip('/')}/{at}" if place else url
    try:
        data = download(origin) if origin.startswith(("http://", "https://")) else at_home(origin).read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found == digest:
            return data
        reason = f"it has {len(data):,} bytes with the SHA-256 {found}"
    except (OSError, ValueError, HTTPException) as error:  # ValueError of a name that is no URL, or no path
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    raise ValueError(
        f"could not fetch the weights of {name!r} from {origin} ({reason}); save {url} (SHA-256 {digest}) as "
        f"FOLDER/{at} and set {VARIABLE}=FOLDER"
    )


def download(url: str) -> bytes:
    """Return the contents of a file on a server, with a bar on a terminal.

    Raises:
        OSError, HTTPException: it cannot be read.
        ValueError: the address is none, or the file is larger than ``LARGEST``.
    """
    log.warning("downloading %s; this happens once", url)
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        name = url.rpartition("/")[2]
        with tqdm.wrapattr(response, "read", response.length, desc=name, leave=False, disable=None) as body:
            data = b"".join(islice(iter(partial(body.read, BLOCK), b""), LARGEST // BLOCK + 1))
    if len(data) > LARGEST:
        raise ValueError(f"it has more than {LARGEST:,} bytes")
    return data
