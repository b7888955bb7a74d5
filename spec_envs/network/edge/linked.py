"""A decoder whose target is behind a network: over a WebSocket, or over a simulated link in this process."""

from __future__ import annotations

from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.base import ChainDrafter
from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.network.channel import Channel, SimulatedChannel
from spec_envs.network.cloud.engine import Engine
from spec_envs.network.edge.remote import RemoteVerifier
from spec_envs.network.link import load_link
from spec_envs.network.websocket import SocketChannel
from spec_envs.network.wire import MODES, vocabulary_hash

SCHEMES = ("ws://", "wss://")


def is_address(link: str) -> bool:
    """Whether a link is the address of a cloud, and not the name of a simulated one."""
    return link.startswith(SCHEMES)


def linked(
    decoder: Decoder,
    link: str,
    target: str,
    verifier: type[RemoteVerifier] = RemoteVerifier,
    token_in_clear: bool = False,
) -> Decoder:
    """The same decoder with its target behind a network.

    Args:
        decoder: over models of this process, with a drafter of chains. The target's weights are loaded here either way:
            a drafter may share its embedding and output rows, and a simulated link leads to them.
        link: address of a cloud, ``ws://…`` or ``wss://…``; or a simulated link (see ``load_link``).
        target: name of the target, whose tokenizer the cloud has to have.
        verifier: what speaks to the cloud.
        token_in_clear: whether the token may go to another machine without TLS.

    Raises:
        ValueError: no such link, or a drafter that reads the target's states, which do not come over a network.
    """
    local, drafter = decoder.local, decoder.drafter
    if drafter is not None and (drafter.capture or drafter.width != 1):
        raise ValueError(
            "the drafter is a head on the target's states, which do not come over a network; take a draft model, or "
            "'lookup+' and a draft model"
        )
    vocabulary = vocabulary_hash(load_tokenizer(target))
    channel: Channel
    if is_address(link):
        channel = SocketChannel(link, in_clear=token_in_clear)
    else:
        channel = SimulatedChannel(Engine(local.target, vocabulary, 1), load_link(link))
    sampling = local.temperature, local.top_p
    decoder.verifier = verifier(channel, vocabulary, local.vocab, local.context, *sampling)
    decoder.verifier.dtype = local.dtype if isinstance(channel, SimulatedChannel) else "the cloud's"
    return decoder


def tell(decoder: Decoder, mode: str, top_k: int) -> None:
    """Have a linked decoder tell the distributions of its drafts in a mode of ``wire.MODES``; ``top_k`` is the cut of
    ``topk``, before a token is drawn. Greedy decoding tells ids alone, whatever the mode.

    Raises:
        ValueError: no such mode, or one that does not tell enough.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; expected 1 or more")
    verifier, drafter = decoder.verifier, decoder.drafter
    assert isinstance(verifier, RemoteVerifier)
    verifier.mode = mode
    if not verifier.temperature:
        return
    if mode == "ids":
        raise ValueError(
            f"mode is 'ids', which is for temperature 0, not {verifier.temperature:g}; take scalar, topk or full"
        )
    if isinstance(drafter, ChainDrafter):  # prompt lookup is certain of what it says
        drafter.top_k = {"topk": top_k, "full": verifier.vocab}.get(mode)
