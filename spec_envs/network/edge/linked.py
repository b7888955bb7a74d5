"""A decoder whose target is reached over a network: over a WebSocket, or over a simulated link in this process."""

from __future__ import annotations

from spec_envs.decoding.cycle import Cycle
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.base import ChainDrafter
from spec_envs.decoding.verifier import Traffic
from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.network.channel import Channel, SimulatedChannel
from spec_envs.network.cloud.engine import Engine
from spec_envs.network.edge.remote import RemoteVerifier
from spec_envs.network.link import load_link
from spec_envs.network.websocket import SocketChannel
from spec_envs.network.wire import MODES, vocabulary_hash

SCHEMES = ("ws://", "wss://")


class LinkedDecoder(Decoder):
    """A ``Decoder`` whose target is reached over a network, and which may skip the verification of drafts."""

    verifier: RemoteVerifier

    def decode(self, count: int) -> Cycle:
        """Let the target alone decode up to ``count`` tokens in one exchange, and return them as one cycle."""
        self._check_undrafted()
        with self.clock.time("verify", 1) as forward:
            tokens = self.verifier.decode(min(count, self.max_new_tokens - len(self.tokens)), self.eos)
            forward.times = len(tokens)
        return self._emit(tokens, self.verifier.traffic)

    def unverified(self, k: int) -> Cycle:
        """Emit ``k`` drafted tokens without verification and return them as one cycle; the target might have chosen
        others."""
        self._check_undrafted()
        self.begin()
        for _ in range(k - 1):
            self.expand()
        emitted = self._cut(self.tree.tokens.tolist())
        self.verifier.append(emitted)
        return self._emit(emitted, Traffic(), drafted=self.tree.size, unverified=len(emitted))

    def plain_seconds(self) -> float:
        """Return the seconds of a plain decoding step that the cloud reports."""
        return self.verifier.plain().plain_seconds()

    def send(self, mode: str, top_k: int | None) -> None:
        """Send the distributions of drafts in a mode of ``wire.MODES`` from now on.

        Args:
            top_k: in mode ``"topk"``, number of entries that a distribution is cut to before a token is drawn; None
                keeps all.
        """
        self.verifier.mode = mode
        if isinstance(self.drafter, ChainDrafter):  # prompt lookup is certain of its tokens
            self.drafter.top_k = {"topk": top_k, "full": self.verifier.vocab}.get(mode)

    def _check_undrafted(self) -> None:
        self._check_alive()
        if self.tree.size:
            raise RuntimeError("a cycle is under way; call verify() first")


def is_address(link: str) -> bool:
    """Return True if a link is the address of a cloud, and not the name of a simulated one."""
    return link.startswith(SCHEMES)


def linked(decoder: Decoder, link: str, target: str) -> LinkedDecoder:
    """Return a decoder like the given one, whose target is reached over a link.

    Args:
        decoder: a decoder over models in this process, with a drafter of chains. The target's weights are loaded here
            in any case, because a drafter may share its embedding and output rows, and a simulated cloud uses them.
        link: address of a cloud, ``ws://…`` or ``wss://…``; or a simulated link, as for ``load_link``.
        target: name of the target; the cloud has to have the same tokenizer.

    Raises:
        ValueError: there is no such link, or the drafter reads the target's states, which are not sent over a network.
    """
    vocabulary = vocabulary_hash(load_tokenizer(target))
    channel: Channel
    if is_address(link):
        channel = SocketChannel(link)
    else:
        channel = SimulatedChannel(Engine(decoder.local.target, vocabulary, 1), load_link(link))
    return over(channel, decoder, vocabulary)


def over(
    channel: Channel, decoder: Decoder, vocabulary: bytes, kind: type[RemoteVerifier] = RemoteVerifier
) -> LinkedDecoder:
    """Return a decoder like the given one, which verifies over a channel.

    Args:
        vocabulary: hash of the target's tokenizer.
        kind: class of the verifier.

    Raises:
        ValueError: the drafter reads the target's states, which are not sent over a network.
    """
    local, drafter = decoder.local, decoder.drafter
    if drafter is not None and (drafter.capture or drafter.width != 1):
        raise ValueError(
            "the drafter reads the target's states, which are not sent over a network; take a draft model, or "
            "'lookup+' and a draft model"
        )
    verifier = kind(channel, vocabulary, local.vocab, local.context, local.temperature, local.top_p)
    verifier.dtype = local.dtype if isinstance(channel, SimulatedChannel) else "the cloud's"
    return LinkedDecoder(verifier, drafter, decoder.clock, decoder.eos, decoder.max_depth, decoder.detokenize)


def choose_mode(decoder: LinkedDecoder, mode: str, top_k: int) -> None:
    """Have a decoder send the distributions of its drafts in a mode of ``wire.MODES``; greedy decoding sends ids only.

    ``top_k`` is the cut of mode ``topk``, made before a token is drawn.

    Raises:
        ValueError: there is no such mode, or it does not send enough at the target's temperature.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; expected 1 or more")
    if not decoder.temperature:
        decoder.verifier.mode = mode
    elif mode == "ids":
        raise ValueError(
            f"mode is 'ids', which is for temperature 0, not {decoder.temperature:g}; take scalar, topk or full"
        )
    else:
        decoder.send(mode, top_k)
