"""The edge: streams an answer to a prompt, drafted here and verified by a cloud (`spec-envs edge`).

The target's weights are loaded here, too, because its shipped drafter uses its embedding and output rows; its layers
are not run. A lost connection is reopened. With --offline-fallback the drafter continues alone while the cloud is
unavailable; such text is not the target's, and is marked.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TextIO

import numpy as np

from spec_envs.arguments import (
    POSITIVE,
    SEED,
    TEMPERATURE,
    TOP_P,
    Parser,
    add_model_arguments,
    number,
    whole_number,
)
from spec_envs.decoding.drafters.base import ChainDrafter, Drafter
from spec_envs.decoding.drafters.portfolio import is_portfolio
from spec_envs.decoding.loading import DEFAULT_TARGET, load_decoder
from spec_envs.decoding.sampling import Proposal
from spec_envs.decoding.tree import Tree
from spec_envs.decoding.verifier import Traffic, Verdict
from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.network.cloud.engine import LONGEST_DRAFT
from spec_envs.network.edge.linked import LinkedDecoder, choose_mode, is_address, over
from spec_envs.network.edge.remote import RemoteVerifier
from spec_envs.network.websocket import CloudUnavailable, SocketChannel
from spec_envs.network.wire import MODES, PORT, PORTS, vocabulary_hash
from spec_envs.prompts.sets import encode
from spec_envs.text import Detokenizer, TextStream, printable

PROMPT = "Explain in three sentences why the sky is blue."
RETRY, ATTEMPT = 2.0, 1.0  # seconds until an unavailable cloud is tried again, and the patience of that attempt


class FallbackVerifier(RemoteVerifier):
    """A verifier that accepts drafts as they are while the cloud is unavailable.

    Attributes:
        drafter: drafts the first token if the cloud is unavailable from the start.
        away: True if the last call was answered without the cloud.
        tried: time at which the cloud was last found unavailable.
        patience: patience of the channel while the cloud answers.
    """

    channel: SocketChannel
    drafter: Drafter
    away, tried, patience = False, 0.0, 0.0

    @property
    def waiting(self) -> bool:
        """True if the cloud is unavailable and not to be tried again yet."""
        return self.away and time.monotonic() - self.tried < RETRY

    def start(self, prompt: Sequence[int], rows: int, rng: np.random.Generator) -> int:
        try:
            return super().start(prompt, rows, rng)
        except CloudUnavailable:
            self._lost()
        self.drafter.start(prompt, rows, self.features, rng)
        tree = Tree(self.drafter.width, 1)
        self.drafter.root(tree)
        token = int(tree.tokens[0])
        self.append([token])
        return token

    def verify(
        self, tokens: np.ndarray, parents: np.ndarray, levels: np.ndarray, proposals: Sequence[Proposal] = ()
    ) -> Verdict:
        try:
            verdict = super().verify(tokens, parents, levels, proposals)
        except CloudUnavailable:
            if not len(tokens):
                raise
            self._lost()
            self.append(tokens.tolist())
            return Verdict(list(range(len(tokens) - 1)), int(tokens[-1]))
        if self.away:
            self.away, self.channel.patience = False, self.patience
        return verdict

    def _lost(self) -> None:
        if not self.away:
            self.patience, self.channel.patience = self.channel.patience, ATTEMPT
        self.away, self.tried, self.traffic = True, time.monotonic(), Traffic()


def connected(
    url: str,
    target: str = DEFAULT_TARGET,
    drafter: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    temperature: float = 1.0,
    top_p: float = 1.0,
    mode: str = "topk",
    top_k: int = 300,
    k: int = 4,
    patience: float = 20.0,
    fallback: bool = False,
    token_in_clear: bool = False,
) -> LinkedDecoder:
    """Return a decoder that drafts chains of up to ``k`` tokens here and has the cloud at ``url`` verify them.

    Args:
        target, drafter, device, dtype: as for ``load_decoder``; the target's layers are not run.
        temperature, top_p: sampling of the target.
        mode, top_k: how the distributions of drafts are sent, as for ``choose_mode``.
        patience: seconds after which a cloud that does not answer is given up.
        fallback: True to accept drafts as they are after that.
        token_in_clear: True to allow sending the token to another machine without TLS.

    Raises:
        ValueError: models or settings do not fit together.
    """
    if not 1 <= k <= LONGEST_DRAFT:
        raise ValueError(f"k is {k}; expected a draft of 1 to {LONGEST_DRAFT} tokens")
    if is_portfolio(drafter):
        raise ValueError(f"drafter is {drafter!r}; an edge has one, SpecDrafter-v0 chooses between several")
    if not 0 < patience < math.inf:
        raise ValueError(f"patience is {patience:g} s; expected more than 0 and a finite number")
    channel = SocketChannel(url, patience, in_clear=token_in_clear)  # checks the address before models are loaded
    local = load_decoder(target, drafter, device, dtype, temperature, top_p, width=1, max_depth=k - 1)
    vocabulary = vocabulary_hash(load_tokenizer(target))
    decoder = over(channel, local, vocabulary, FallbackVerifier if fallback else RemoteVerifier)
    choose_mode(decoder, mode, top_k)
    verifier = decoder.verifier
    if isinstance(verifier, FallbackVerifier):
        if not isinstance(decoder.drafter, ChainDrafter):
            raise ValueError("prompt lookup alone cannot continue without the cloud; take a draft model as drafter")
        verifier.drafter = decoder.drafter
    return decoder


class Stream:
    """An answer that is being decoded. Iterating decodes it; every item is True if the newest tokens are verified.

    Attributes:
        rounds: number of cycles that the cloud verified.
        drafted, accepted: tokens of those cycles.
        unverified: emitted tokens that the cloud did not verify.
        seconds, prefill_seconds: after the first token, and up to it.
        bytes_up, bytes_down, network_seconds: totals of the network; the cloud's forwards are not in the seconds.
    """

    def __init__(self, decoder: LinkedDecoder, prompt: list[int], max_new_tokens: int, k: int, seed: int = 0):
        self.decoder, self.prompt, self.max_new_tokens, self.k, self.seed = decoder, prompt, max_new_tokens, k, seed
        self.rounds = self.drafted = self.accepted = self.unverified = self.bytes_up = self.bytes_down = 0
        self.seconds = self.prefill_seconds = self.network_seconds = 0.0

    def __iter__(self) -> Iterator[bool]:
        decoder, began = self.decoder, time.perf_counter()
        verifier = decoder.verifier
        decoder.start(self.prompt, self.max_new_tokens, np.random.default_rng(self.seed))
        self.prefill_seconds = time.perf_counter() - began
        yield self._count(1)
        while not decoder.finished:
            began = time.perf_counter()
            if isinstance(verifier, FallbackVerifier) and verifier.waiting:
                cycle = decoder.unverified(self.k)
            else:
                cycle = decoder.cycle(self.k)
            self.seconds += time.perf_counter() - began
            yield self._count(cycle.emitted, cycle.drafted, cycle.accepted)

    def _count(self, emitted: int, drafted: int = 0, accepted: int = 0) -> bool:
        verifier = self.decoder.verifier
        if isinstance(verifier, FallbackVerifier) and verifier.away:
            self.unverified += emitted
            return False
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        self.bytes_up += verifier.traffic.bytes_up
        self.bytes_down += verifier.traffic.bytes_down
        self.network_seconds += verifier.traffic.seconds
        return True

    def last_line(self) -> str:
        """Return the statistics of the finished answer in one line."""
        tokens = len(self.decoder.tokens)
        rate = (tokens - 1) / self.seconds if self.seconds else 0.0
        share = 100 * self.accepted / self.drafted if self.drafted else 0.0
        return (
            f"{tokens} tokens, {rate:.1f} tokens/s; {share:.0f} % of {self.drafted} drafted tokens accepted; "
            f"{self.bytes_up:,} bytes up, {self.bytes_down:,} down in {self.rounds} rounds; "
            f"network {self.network_seconds:.2f} s of {self.prefill_seconds + self.seconds:.2f} s"
            + (f"; {self.unverified} tokens unverified" if self.unverified else "")
        )


class Screen:
    """Prints a text as it grows, in whole characters. Unverified text is coloured, or in brackets without a
    terminal."""

    def __init__(self, detokenize: Detokenizer, out: TextIO):
        self.stream, self.out = TextStream(detokenize), out
        self.opening, self.closing = ("\033[33m", "\033[0m") if out.isatty() else ("[unverified: ", "]")
        self.read, self.open, self.doubtful = 0, False, False

    def show(self, tokens: Sequence[int], verified: bool) -> None:
        """Print the new part of the text of ``tokens``; a character of several tokens waits for all of them."""
        self.doubtful |= not verified
        self._print(self.stream.push(tokens[self.read :]))
        self.read = len(tokens)

    def close(self) -> None:
        """Print the rest of the text, and end the colour or bracket and the line."""
        self._print(self.stream.finish())
        self.out.write(f"{self.closing if self.open else ''}\n")
        self.out.flush()
        self.open = False

    def _print(self, piece: str) -> None:
        if not piece:
            return
        if self.open != self.doubtful:
            self.out.write(self.opening if self.doubtful else self.closing)
        self.out.write(printable(piece))
        self.out.flush()
        self.open, self.doubtful = self.doubtful, False


def address(host: str, port: int) -> str:
    """Return the URL of the cloud at ``host``, which may itself be a ``ws://`` or ``wss://`` URL; another URL stays as it
    is, to be refused by its own name."""
    if is_address(host) or "://" in host:
        return host
    return f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}"


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("host", nargs="?", default="localhost", help="host of the cloud, or its ws:// or wss:// URL")
    parser.add_argument("--port", type=whole_number(1, PORTS), default=PORT, help=f"port of the cloud (default {PORT})")
    parser.add_argument("--prompt", default=PROMPT, help=f"a user turn (default: {PROMPT})")
    add_model_arguments(parser, "model that the cloud serves", "drafter of chains")
    parser.add_argument("--temperature", type=TEMPERATURE, default=1.0, help="0 is greedy (default 1)")
    parser.add_argument("--top-p", type=TOP_P, default=1.0, help="mass kept when sampling (default 1)")
    parser.add_argument("--seed", type=SEED, default=0, help="seed of sampling (default 0)")
    parser.add_argument(
        "--mode", choices=MODES, default="topk", help="how the distributions of drafts are sent (default topk)"
    )
    parser.add_argument(
        "--top-k",
        type=POSITIVE,
        default=300,
        help="probabilities sent of each drafted token, with --mode topk (default 300)",
    )
    parser.add_argument("--k", type=whole_number(1, LONGEST_DRAFT), default=4, help="tokens of a draft (default 4)")
    parser.add_argument(
        "--max-new-tokens", type=whole_number(1, 2**20), default=128, help="most tokens of the answer (default 128)"
    )
    parser.add_argument(
        "--patience", type=number(0.1, 1e9), default=20.0, help="seconds to wait for the cloud (default 20)"
    )
    parser.add_argument(
        "--token-in-clear", action="store_true", help="send the token to another machine without TLS, too"
    )
    parser.add_argument(
        "--offline-fallback", action="store_true", help="continue unverified while the cloud is unavailable"
    )
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Print the answer and its statistics."""
    names = ("target", "drafter", "device", "dtype", "temperature", "top_p", "mode", "top_k", "k", "patience")
    settings = {name: getattr(args, name) for name in names}
    decoder = connected(
        address(args.host, args.port), **settings, fallback=args.offline_fallback, token_in_clear=args.token_in_clear
    )
    prompt = encode(load_tokenizer(args.target), args.prompt)
    stream = Stream(decoder, prompt, args.max_new_tokens, args.k, args.seed)
    screen = Screen(decoder.detokenize, sys.stdout)
    try:
        for verified in stream:
            screen.show(decoder.tokens, verified)
        screen.close()
    except BaseException:
        if screen.read:
            screen.close()
        raise
    finally:
        decoder.verifier.close()
    print(f"\n{stream.last_line()}")


def main() -> None:
    args = arguments()
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
