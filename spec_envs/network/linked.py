"""A decoder whose target is behind a link."""

from __future__ import annotations

from spec_envs.decoding.checkpoints import load_tokenizer
from spec_envs.decoding.decoder import Decoder
from spec_envs.network.channel import Channel, SimulatedChannel, SocketChannel
from spec_envs.network.engine import Engine
from spec_envs.network.link import load_link
from spec_envs.network.remote import RemoteVerifier
from spec_envs.network.wire import vocabulary_hash


def is_address(link: str) -> bool:
    """Whether a link is the address of a cloud, and not the name of a simulated one."""
    return link.startswith(("ws://", "wss://"))


def linked(decoder: Decoder, link: str, target: str) -> Decoder:
    """Put a link between the two sides of a decoder of chains.

    Args:
        decoder: whose target verifies here.
        link: address of a cloud that has the target, or a simulated link (see ``load_link``) to the one here.
        target: name of the target, for its tokenizer.

    Raises:
        ValueError: the drafter reads what only the target knows.
    """
    if decoder.drafter is not None and decoder.drafter.capture:
        raise ValueError(
            "the drafter reads the target's hidden states, which stay in the cloud; take a draft model or 'lookup'"
        )
    local = decoder.local
    vocabulary = vocabulary_hash(load_tokenizer(target))
    channel: Channel
    if is_address(link):
        channel = SocketChannel(link)
    else:
        channel = SimulatedChannel(Engine(local.target, vocabulary), load_link(link))
    decoder.verifier = RemoteVerifier(channel, vocabulary, local.vocab, local.context, local.temperature, local.top_p)
    return decoder
