"""An engine that decodes on an external llama-server (llama.cpp)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from spec_envs.decoding.clock import WallClock
from spec_envs.decoding.cycle import NO_NODES, Cycle
from spec_envs.decoding.drafters.names import DrafterName, default_drafter
from spec_envs.decoding.engine import TextEngine, check_room
from spec_envs.decoding.llama_cpp.server import (
    LlamaServer,
    chain_arguments,
    check_server_args,
    find_binary,
    gguf_of,
    options,
)
from spec_envs.decoding.loading import Models
from spec_envs.decoding.tree import Tree
from spec_envs.decoding.weights.checkpoints import eos_ids, load_tokenizer, registry
from spec_envs.text import Detokenizer

# Rows of a forward. On the processor, llama.cpp's attention rounds differently for 64 rows or more (GGML_FA_TILE_Q), so
# that a text which is read again after a restart would continue differently at near-ties. With fewer rows, reading a
# prompt takes about a fifth longer.
MICRO_BATCH = 48
PROBE = [0] * 8  # ids that every vocabulary has, for requests of which only the counts and the seconds matter
PLAIN_TOKENS, PLAIN_RUNS = 24, 3  # size of the measurement of plain decoding


class LlamaEngine(TextEngine):
    """Drives a llama-server over one text at a time, greedily; an ``Engine`` whose cycle is a segment of tokens with
    one draft length.

    Seconds are the server's own (``prompt_ms`` and ``predicted_ms`` of its timings); the few milliseconds per segment
    of HTTP and JSON are not charged. The server does not report drafting and verification separately, so a whole
    segment is charged to ``verify``.

    Most builds fix the draft length when the server starts. They are restarted for a cycle whose ``k`` differs from the
    last one's. The restart is counted in ``restart_seconds`` and not charged; the new server then reads the text again,
    which is charged to the cycle. Builds that honour a request's own ``speculative.n_max`` are never restarted.

    On the processor with one thread, the text is the server's own greedy one whatever ``k`` does. With several threads
    llama.cpp splits a single row's attention between them once a text has some 256 tokens, and near-ties may be
    decided differently.

    Args:
        target, drafter: names of models.yml or GGUF files; the two may be the same.
        k_max: longest chain.
        segment: most tokens of a cycle.
        threads: number of threads of the server; by default as many as torch has.
        binary: the program; by default the one on PATH, else the one in the wheel that models.yml names.
        clock: charged with the server's seconds; by default a new one.
        timeout: seconds that a request may take.
        server_args: further arguments of the server, as for ``LlamaServer``.

    Attributes:
        eos: as in ``Engine``; the server also ends texts at every other token that its GGUF file lists as an end.
        tree: always empty: the server does not report what it drafted.
        max_depth: ``k_max - 1``, a chain's expansions.
        per_request: True if the server honours a request's own draft length.
        restart_seconds: wall seconds of the restarts during this text.

    The other attributes are those of ``Engine``.

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
        super().__init__(clock or WallClock(torch.device("cpu")))
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
        self.restart_seconds, self._plain_seconds = 0.0, 0.0
        self.server, self.k = self._serve(k_max), k_max
        try:
            self.per_request = self._honours_lengths()
            self.context = self.server.context()
        except BaseException:  # the caller has no engine to close
            self.close()
            raise

    def start(self, prompt: Sequence[int], max_new_tokens: int, rng: np.random.Generator) -> None:
        """Read a prompt and emit the first token; charged to ``prefill``, not to a cycle. Nothing is drawn from
        ``rng``.

        Raises:
            ValueError: the prompt is empty or does not fit the context; or as in ``cycle``. There is no text then.
        """
        self.finished, self.restart_seconds = True, 0.0
        self.clock.restart()
        check_room(prompt, max_new_tokens, max_new_tokens + self.k_max, self.context)
        self._begin(prompt, max_new_tokens)
        self._extend(1, "prefill", cache_prompt=False)
        self._mark()

    @property
    def temperature(self) -> float:
        return 0.0

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> str:
        return "the GGUF file's weights"

    def separate(self) -> LlamaEngine:
        """Return an engine with the same settings on a server of its own, so that the draft lengths of one arm do not
        restart the server of another."""
        return LlamaEngine(
            *self.names,
            self.k_max,
            self.segment,
            self.threads,
            str(self.program),
            timeout=self.timeout,
            server_args=self.server_args,
        )

    def plain(self) -> LlamaEngine:
        """Return an engine with the same settings on a server of its own, which decodes plainly by ``cycle(0)``."""
        return self.separate()

    def cycle(self, k: int) -> Cycle:
        """Decode up to ``segment`` tokens, drafted ``k`` at a time and all verified; 0 decodes plainly.

        Raises:
            ValueError: ``k`` is out of range; or the server ended, hung or did not restart. It is stopped then, and the
                message ends with the last lines of its log.
        """
        self._check_alive()
        if not 0 <= k <= self.k_max:
            raise ValueError(f"k is {k}; expected 0 to {self.k_max}")
        settings: dict[str, Any] = {"speculative.n_max": k} if self.per_request else {}
        if not self.per_request and k != self.k:
            self._restart(k)
        count = min(self.segment, self.max_new_tokens - len(self.tokens))
        emitted, timings = self._extend(count, "verify", cache_prompt=True, **settings)
        drafted = timings.get("draft_n", 0)
        accepted = min(timings.get("draft_n_accepted", 0), len(emitted))
        self.cycles.append(Cycle(emitted, accepted, drafted, drafted, k, self._cycle_seconds(), NO_NODES))
        return self.cycles[-1]

    def plain_seconds(self) -> float:
        """Measure the seconds of a token of plain decoding after a short prompt: the median of a few runs. They are
        made once, on a server of their own, so that a text under way keeps its cache."""
        if not self._plain_seconds:
            with self._serve(0) as server:
                answers = [
                    server.complete(PROBE, PLAIN_TOKENS + 1, self.timeout, ignore_eos=True)["timings"]
                    for _ in range(PLAIN_RUNS + 1)  # the first one warms up
                ]
            # predicted_ms begins after the forward of the prompt, which gives the first token
            whole = statistics.median(timings["predicted_ms"] / 1000 for timings in answers[1:])
            self._plain_seconds = whole / PLAIN_TOKENS
        return self._plain_seconds

    def metrics(self) -> dict[str, float]:
        """Return the server's own counters and gauges (``llamacpp:…``) since it was last started."""
        return self.server.metrics()

    def close(self) -> None:
        """Stop the server; may be called twice."""
        self.server.close()

    def _extend(self, count: int, part: str, **settings: Any) -> tuple[list[int], dict[str, Any]]:
        """Request up to ``count`` tokens, charged to ``part``; return those kept, and the server's timings."""
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
        """Start a server that drafts ``k`` tokens at a time."""
        arguments = [*self.arguments, "--metrics", "--ubatch-size", str(MICRO_BATCH)]
        if "--cache-ram" in options(self.program):
            arguments += ["--cache-ram", "0"]  # copying earlier texts takes gigabytes, and time outside the timings
        if k:
            arguments += chain_arguments(self.program, self.draft, k)
        return LlamaServer(self.model, arguments, self.threads, binary=str(self.program), server_args=self.server_args)

    def _restart(self, k: int) -> None:
        begin = time.perf_counter()
        self.server.close()
        self.server, self.k = self._serve(k), k
        self.restart_seconds += time.perf_counter() - begin

    def _honours_lengths(self) -> bool:
        """Return True if a request's own draft length has an effect. No build reports it, so this is found by drafting.

        Raises:
            ValueError: nothing is drafted. A server that cannot use a draft model decodes plainly, without a message.
        """
        drafted: dict[int, int] = {}
        for k in (0, 2):
            settings: dict[str, Any] = {"ignore_eos": True, "speculative.n_max": k}
            drafted[k] = self.server.complete(PROBE, 8, self.timeout, **settings)["timings"].get("draft_n", 0)
        if not drafted[2]:
            raise self.server.failure(f"llama-server drafts nothing with {self.draft} for {self.model}", about="draft")
        return drafted[0] == 0


def drafter_for(target: str) -> str:
    """Return the default drafter of a target: the one in models.yml, without prompt lookup. A target that is not in
    models.yml, a GGUF file for example, drafts for itself.

    Raises:
        ValueError: models.yml has the target, and no drafter for it.
    """
    if target not in registry()["models"]:
        return target
    return DrafterName.parse(default_drafter(target, chain=True)).model


def open_server(
    models: Models, k_max: int, segment: int, clock: WallClock | None, server_args: Sequence[str]
) -> LlamaEngine:
    """Start a server that drafts up to ``k_max`` tokens at a time, and return its engine, with cycles of ``segment``
    tokens.

    Raises:
        ValueError: settings that a server does not support, or those that ``LlamaEngine`` refuses.
    """
    if models.temperature:
        raise ValueError(f"temperature is {models.temperature}; a llama-server decodes greedily here, at temperature 0")
    for name, allowed in (("dtype", ("auto",)), ("top_p", (1.0,)), ("device", ("auto", "cpu"))):
        if (value := getattr(models, name)) not in allowed:
            raise ValueError(
                f"{name} is {value!r}; a llama-server computes its file's own weights on the CPU and decodes greedily"
            )
    drafter = DrafterName.parse(models.drafter)
    if drafter.copies:
        raise ValueError(
            f"drafter is {models.drafter!r}; a llama-server does not support prompt lookup; give {drafter.model!r}"
        )
    if drafter.shortlist != "auto":
        raise ValueError(f"drafter is {models.drafter!r}; a llama-server has no shortlists; give {drafter.model!r}")
    return LlamaEngine(models.target, drafter.model, k_max, segment, clock=clock, server_args=server_args)
