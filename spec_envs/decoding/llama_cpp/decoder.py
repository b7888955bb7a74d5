"""Whole cycles of speculative decoding on an external llama-server (llama.cpp)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from spec_envs.decoding.clock import WallClock
from spec_envs.decoding.decoder import Cycle, Decoder, Drafted, check_room
from spec_envs.decoding.llama_cpp.server import (
    LlamaServer,
    chain_arguments,
    check_server_args,
    find_binary,
    gguf_of,
    options,
)
from spec_envs.decoding.loading import Models, default_drafter, without_lookup
from spec_envs.decoding.tree import Tree
from spec_envs.decoding.verifier import LocalVerifier
from spec_envs.decoding.weights.checkpoints import eos_ids, load_tokenizer, registry
from spec_envs.text import Detokenizer

# Rows of a forward. llama.cpp's attention on the processor rounds differently from 64 rows on (GGML_FA_TILE_Q): a text
# read again after a restart would go on differently at near-ties. Reading prompts this way takes about a fifth longer.
MICRO_BATCH = 48
PROBE = [0] * 8  # ids of every vocabulary, for requests of which only the counts and the seconds matter
PLAIN_TOKENS, PLAIN_RUNS = 24, 3  # of the measurement of plain decoding


class LlamaServerDecoder(Decoder):
    """Drives a llama-server over one text at a time, greedily; a cycle is a segment of tokens with one draft length.

    Seconds are the server's own (``prompt_ms`` and ``predicted_ms`` of its timings); what HTTP and JSON add, a few
    milliseconds per segment, is not charged. The server does not tell drafting from verifying: all of a segment is
    charged to ``verify``.

    Most builds fix the draft length when the server starts. There a cycle with another ``k`` than the last one's
    restarts it; the time of that is ``restart_seconds`` and charged to nothing, but the new server has to read the text
    again, which is charged to the cycle. Builds that honour a request's own ``speculative.n_max`` are never restarted.

    On the processor the text is the server's own greedy one whatever ``k`` does, with one thread; with several,
    llama.cpp splits a single row's attention between them once a text has some 256 tokens, and near-ties may fall
    differently.

    Args:
        target, drafter: names of models.yml or GGUF files; the two may be the same.
        k_max: longest chain.
        segment: most tokens of a cycle.
        threads: of the server; by default as many as torch has.
        binary: the program; by default the one on PATH, else the one of models.yml's wheel.
        clock: charged with the server's seconds; by default one of its own.
        timeout: seconds that a request may take.
        server_args: further ones of the server, as for ``LlamaServer``.

    Attributes:
        prompt, tokens, cycles, finished, clock, eos, detokenize: as in ``Decoder``. The server also ends texts at every
            other token that its GGUF file lists as an end.
        context: most tokens of a text.
        tree: always empty; what was drafted is not told.
        max_depth: ``k_max - 1``, a chain's expansions.
        per_request: whether the server honours a request's own draft length.
        restart_seconds: wall seconds of restarts because ``k`` changed.
        temperature, device, dtype: as in ``Decoder``.

    Raises:
        ValueError: a model in another format, a priced clock, or a server that did not start or does not draft.
    """

    times_itself = True

    def __init__(
        self,
        target: str,
        drafter: str,
        k_max: int,
        segment: int = 64,
        threads: int | None = None,
        binary: str | None = None,
        clock: WallClock | None = None,
        timeout: float = 600.0,
        server_args: Sequence[str] = (),
    ):
        check_server_args(server_args)
        if k_max < 1 or segment < 1:
            raise ValueError(f"k_max is {k_max} and segment {segment}; expected 1 or more")
        self.clock = clock or WallClock(torch.device("cpu"))
        if self.clock.priced:
            raise ValueError("llama-server times itself, which no cost table can price; expected clock='wall'")
        self.names = target, drafter
        (self.model, needed), (self.draft, further) = gguf_of(target), gguf_of(drafter)
        self.arguments = [*needed, *(further if further != needed else [])]
        self.threads, self.timeout = threads or torch.get_num_threads(), timeout
        self.server_args = list(server_args)
        self.program = find_binary(binary)
        self.k_max, self.max_depth, self.segment = k_max, k_max - 1, segment
        self.tree = Tree(1, self.max_depth)
        self.eos = frozenset(eos_ids(target))
        self.detokenize = Detokenizer.of(load_tokenizer(target))
        self.finished, self.restart_seconds, self.rate = True, 0.0, 0.0
        self.server, self.k = self._serve(k_max), k_max
        try:
            self.per_request = self._honours_lengths()
            self.context = self.server.context()
        except BaseException:  # nobody could close it
            self.close()
            raise

    def start(self, prompt: Sequence[int], max_new_tokens: int, rng: np.random.Generator) -> None:
        """Prefill and the first token; charged to ``prefill``, not to a cycle. Nothing is drawn from ``rng``.

        Raises:
            ValueError: the prompt is empty or does not fit the context; or as in ``cycle``. There is no text then.
        """
        self.finished = True
        self.clock.restart()
        check_room(prompt, max_new_tokens, max_new_tokens + self.k_max, self.context)
        self.prompt, self.max_new_tokens = [int(token) for token in prompt], max_new_tokens
        self.tokens: list[int] = []
        self.cycles: list[Cycle] = []
        self._extend(1, "prefill", cache_prompt=False)
        self._cycle_began = dict(self.clock.totals)

    @property
    def temperature(self) -> float:
        return 0.0

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> str:
        return "the GGUF file's weights"

    @property
    def in_process(self) -> bool:
        return False

    @property
    def local(self) -> LocalVerifier:
        raise ValueError("there is no target in this process to look into; expected a decoder over a model")

    def begin(self) -> None:
        """A server drafts within its cycles only.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("a llama-server decodes whole cycles; call cycle(k)")

    def expand(self) -> bool:
        """See ``begin``."""
        raise RuntimeError("a llama-server decodes whole cycles; call cycle(k)")

    def verify(self, budget: int | None = None) -> Cycle:
        """Plain decoding of a segment, with budget 0."""
        if budget != 0:
            self.begin()
        return self.cycle(0)

    def separate(self) -> LlamaServerDecoder:
        """The same on a server of its own, so that the lengths of one arm do not restart the server of another."""
        return LlamaServerDecoder(
            *self.names,
            self.k_max,
            self.segment,
            self.threads,
            str(self.program),
            timeout=self.timeout,
            server_args=self.server_args,
        )

    def plain(self) -> Decoder:
        """The same on a server of its own: plain decoding is a length of 0."""
        return self.separate()

    def cycle(self, k: int) -> Cycle:
        """Up to ``segment`` tokens, drafted ``k`` at a time and all verified; 0 is plain decoding.

        Raises:
            ValueError: ``k`` is out of range; or the server died, hung or did not come back from a restart. It is gone
                then, and the sentence closes with the last lines of its log.
        """
        if self.finished:
            raise RuntimeError("the text has ended; call start() with the next prompt")
        if not 0 <= k <= self.k_max:
            raise ValueError(f"k is {k}; expected 0 to {self.k_max}")
        settings: dict[str, Any] = {"speculative.n_max": k} if self.per_request else {}
        if not self.per_request and k != self.k:
            self._restart(k)
        count = min(self.segment, self.max_new_tokens - len(self.tokens))
        emitted, timings = self._extend(count, "verify", cache_prompt=True, **settings)
        seconds = self.clock.since(self._cycle_began)
        del seconds["prefill"]
        self._cycle_began = dict(self.clock.totals)
        drafted = timings.get("draft_n", 0)
        accepted = min(timings.get("draft_n_accepted", 0), len(emitted))
        self.cycles.append(Cycle(emitted, accepted, drafted, drafted, k, seconds, untold()))
        return self.cycles[-1]

    def plain_rate(self) -> float:
        """Tokens per second of plain decoding behind a short prompt: the median of a few runs, measured once.

        They are made on a server of their own, so that a text under way keeps its cache.
        """
        if not self.rate:
            with self._serve(0) as server:
                answers = [
                    server.complete(PROBE, PLAIN_TOKENS + 1, self.timeout, ignore_eos=True)["timings"]
                    for _ in range(PLAIN_RUNS + 1)  # the first one warms up
                ]
            # predicted_ms begins behind the forward of the prompt, which gives the first token
            self.rate = PLAIN_TOKENS / statistics.median(timings["predicted_ms"] / 1000 for timings in answers[1:])
        return self.rate

    def metrics(self) -> dict[str, float]:
        """The server's own counters and gauges (``llamacpp:…``) since it was last started."""
        return self.server.metrics()

    def close(self) -> None:
        """Stop the server; may be called twice."""
        self.server.close()

    def _extend(self, count: int, part: str, **settings: Any) -> tuple[list[int], dict[str, Any]]:
        """Have up to ``count`` tokens written, charged to ``part``; those kept, and the server's timings."""
        answer = self.server.complete([*self.prompt, *self.tokens], count, self.timeout, **settings)
        timings = answer["timings"]
        self.clock.charge(part, (timings["prompt_ms"] + timings["predicted_ms"]) / 1000)
        written = answer["tokens"][:count]
        end = next((i for i, token in enumerate(written) if token in self.eos), len(written) - 1)
        emitted = written[: end + 1]
        if not emitted:
            raise self.server.failure("llama-server answered without a token")
        self.tokens.extend(emitted)
        ended = emitted[-1] in self.eos or answer["stop_type"] == "eos"
        self.finished = ended or len(self.tokens) == self.max_new_tokens
        return emitted, timings

    def _serve(self, k: int) -> LlamaServer:
        """A server that drafts ``k`` tokens at a time."""
        arguments = [*self.arguments, "--metrics", "--ubatch-size", str(MICRO_BATCH)]
        if "--cache-ram" in options(self.program):
            arguments += ["--cache-ram", "0"]  # copies of earlier texts: gigabytes, and made outside the timings
        if k:
            arguments += chain_arguments(self.program, self.draft, k)
        return LlamaServer(self.model, arguments, self.threads, binary=str(self.program), server_args=self.server_args)

    def _restart(self, k: int) -> None:
        begin = time.perf_counter()
        self.server.close()
        self.server, self.k = self._serve(k), k
        self.restart_seconds += time.perf_counter() - begin

    def _honours_lengths(self) -> bool:
        """Whether a request's own draft length has an effect: told from what is drafted, since no build says so.

        Raises:
            ValueError: nothing is drafted. A server that cannot use a draft model decodes plainly, without a word.
        """
        drafted = {}
        for k in (0, 2):
            settings: dict[str, Any] = {"ignore_eos": True, "speculative.n_max": k}
            drafted[k] = self.server.complete(PROBE, 8, self.timeout, **settings)["timings"].get("draft_n", 0)
        if not drafted[2]:
            raise self.server.failure(f"llama-server drafts nothing with {self.draft} for {self.model}", about="draft")
        return drafted[0] == 0


def drafter_for(target: str) -> str:
    """Return the drafter of a target where none is named: the one of models.yml, without lookup. A target that models.yml
    does not have, such as a GGUF file, drafts for itself.

    Raises:
        ValueError: models.yml has the target, and no drafter for it.
    """
    return without_lookup(default_drafter(target, chain=True)) if target in registry()["models"] else target


def open_server(
    models: Models, k_max: int, segment: int, clock: WallClock | None, server_args: Sequence[str]
) -> LlamaServerDecoder:
    """Open a server that drafts up to ``k_max`` tokens, in cycles of ``segment`` tokens.

    Raises:
        ValueError: settings of models that a server does not follow, or as ``LlamaServerDecoder``.
    """
    if models.temperature:
        raise ValueError(f"temperature is {models.temperature}; a llama-server decodes greedily here, at temperature 0")
    for name, allowed in (("dtype", ("auto",)), ("top_p", (1.0,)), ("device", ("auto", "cpu"))):
        if (value := getattr(models, name)) not in allowed:
            raise ValueError(
                f"{name} is {value!r}; a llama-server computes on the CPU, as its file is, and decodes greedily"
            )
    if models.drafter != without_lookup(models.drafter):
        raise ValueError(
            f"drafter is {models.drafter!r}; a llama-server drafts by a model alone: {without_lookup(models.drafter)!r}"
        )
    return LlamaServerDecoder(models.target, models.drafter, k_max, segment, clock=clock, server_args=server_args)


def untold() -> Drafted:
    """No nodes: the server does not tell what it drafted."""
    ids, numbers = np.zeros(0, dtype=np.int64), np.zeros(0)
    return Drafted(ids, ids, ids, [], numbers, numbers)
