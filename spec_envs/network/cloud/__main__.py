"""The cloud: a WebSocket server with the target, which verifies the drafts of many edges (`spec-envs cloud`).

It listens on loopback by default. On any other address edges have to send a bearer token, which is read from the
environment variable SPEC_ENVS_TOKEN (16 characters or more). `/healthz` and `/metrics` for Prometheus are on the same
port. After SIGTERM no new texts are accepted and unfinished ones are completed; a second SIGTERM ends them, too.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import ssl
import sys
import threading
from concurrent.futures import Executor

import torch

from spec_envs.arguments import TOKENS, Parser, add_model_arguments, number, whole_number
from spec_envs.decoding.weights.checkpoints import load_target, load_tokenizer, resolve_device, resolve_dtype
from spec_envs.network.authorization import TOKEN, check_served, is_loopback
from spec_envs.network.cloud.admission import SPARE
from spec_envs.network.cloud.batching import CallingThread
from spec_envs.network.cloud.engine import CHUNK, SHORT, Engine
from spec_envs.network.cloud.server import Cloud, Limits
from spec_envs.network.wire import (
    MAX_BYTES,
    PORT,
    PORTS,
    Hello,
    Verify,
    pack_ids,
    vocabulary_hash,
)

SHORTEST_MESSAGE = 4096  # smallest --max-message in bytes
OWN_FILES = 64  # files that a cloud has open in addition to its connections


if sys.platform != "win32":
    import resource


def warm(engine: Engine) -> None:
    """Make the first forwards, which are slow, before any request waits for them."""
    hello = Hello(1, engine.vocabulary, bytes(16), 1.0, 1.0, 0)
    session = engine.open(hello)
    for rows in (32, 1, 8):
        text = pack_ids([0] * min(rows, engine.context - 1), engine.vocab)
        engine.run([engine.job(session, Verify(0, 0, text, b"", "ids"))])
    engine.close(session)


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_arguments(parser, "model to serve")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument(
        "--port",
        type=whole_number(0, PORTS),
        default=PORT,
        help=f"port to listen on; 0 takes a free one (default {PORT})",
    )
    parser.add_argument("--tls-certificate", help="PEM file with the certificate chain")
    parser.add_argument("--tls-key", help="PEM file with its key")
    parser.add_argument("--sessions", type=whole_number(1, 2**16), default=64, help="texts at once (default 64)")
    parser.add_argument(
        "--max-tokens", type=TOKENS, default=2048, help="longest text, the prompt included (default 2048)"
    )
    parser.add_argument(
        "--max-message",
        type=whole_number(SHORTEST_MESSAGE, 2**30),
        default=MAX_BYTES,
        help="longest message in bytes, unless the target's longest request is shorter (default 16 MiB)",
    )
    parser.add_argument(
        "--idle", type=number(0.1, 1e9), default=300.0, help="seconds until a silent edge is forgotten (default 300)"
    )
    parser.add_argument(
        "--grace", type=number(0, 1e9), default=20.0, help="seconds that SIGTERM leaves to texts (default 20)"
    )
    parser.add_argument(
        "--greeting",
        type=number(0.1, 1e9),
        default=5.0,
        help="seconds until a connection without a greeting is closed (default 5)",
    )
    parser.add_argument(
        "--per-address",
        type=whole_number(1, 2**16),
        help="texts at once of one address, which may have twice as many connections (default: half of --sessions, or "
        "all of them if only this machine can connect)",
    )
    parser.add_argument(
        "--chunk",
        type=whole_number(SHORT, 2**20),
        default=CHUNK,
        help="rows of a prompt that are read between two rounds of shorter requests, and most rows of one forward of "
        f"those; fewer rows delay others less and read prompts more slowly ({SHORT} or more; default {CHUNK})",
    )
    parser.add_argument("--no-batching", action="store_true", help="make a forward for every request alone")
    parser.add_argument("--threads", type=whole_number(1, 2**12), help="threads of torch (default: all processors)")
    return parser.parse_args()


def allow_files(count: int) -> None:
    """Raise this process's limit of open files to ``count``, as far as the system allows."""
    if sys.platform == "win32":
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def opened(args: argparse.Namespace, executor: Executor) -> tuple[Cloud, ssl.SSLContext | None]:
    """Return the cloud that the arguments describe, and its TLS context if it has one.

    Raises:
        ValueError: the arguments do not fit together.
    """
    token = os.environ.get(TOKEN, "")
    check_served(token, args.host)
    if bool(args.tls_certificate) != bool(args.tls_key):
        raise ValueError("TLS needs both --tls-certificate and --tls-key")
    tls = None
    if args.tls_certificate:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            tls.load_cert_chain(args.tls_certificate, args.tls_key)
        except OSError as error:
            raise ValueError(
                f"could not load the TLS certificate {args.tls_certificate} with the key {args.tls_key} ({error}); "
                "expected two PEM files that belong together"
            ) from None
    elif not is_loopback(args.host):
        print("warning: without TLS the token and all texts can be read on the way", file=sys.stderr)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    target = load_target(args.target, device, resolve_dtype(args.dtype, device, [args.target]))
    vocabulary = vocabulary_hash(load_tokenizer(args.target))
    engine = Engine(target, vocabulary, args.sessions, args.max_tokens, args.chunk)
    warm(engine)
    per_address = args.per_address
    if per_address is None and not is_loopback(args.host):
        per_address = max(1, args.sessions // 2)
    limits = Limits(args.sessions, args.max_tokens, args.max_message, args.idle, args.grace, args.greeting, per_address)
    allow_files(2 * args.sessions + SPARE + OWN_FILES)
    return Cloud(engine, limits, token, not args.no_batching, executor), tls


async def run(cloud: Cloud, host: str, port: int, tls: ssl.SSLContext | None, stop: asyncio.Event) -> None:
    """Serve until ``stop`` is set, then until the unfinished texts are complete."""
    async with cloud.listening(host, port, tls) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        print(f"listening on {'wss' if tls else 'ws'}://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        await stop.wait()
        await cloud.drain()


def serve(cloud: Cloud, host: str, port: int, tls: ssl.SSLContext | None, calling: CallingThread) -> None:
    """Serve until SIGTERM or Ctrl-C, with the connections in a thread of their own and the forwards in this one."""
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    failures: list[BaseException] = []

    def connections() -> None:
        try:
            loop.run_until_complete(run(cloud, host, port, tls, stop))
        except BaseException as error:
            failures.append(error)
        finally:
            calling.shutdown()

    def end(*_: object) -> None:
        """Complete unfinished texts; when called again, end at once."""
        if not loop.is_closed():
            loop.call_soon_threadsafe(cloud.stop_now.set if stop.is_set() else stop.set)

    for stopping in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stopping, end)
    thread = threading.Thread(target=connections, name="connections")
    thread.start()
    calling.work()
    thread.join()
    loop.close()
    if failures:
        raise failures[0]


def main() -> None:
    args = arguments()
    logging.getLogger("websockets").setLevel(logging.CRITICAL)  # malformed input is not an error of the server
    try:
        calling = CallingThread()
        cloud, tls = opened(args, calling)
        serve(cloud, args.host, args.port, tls, calling)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
