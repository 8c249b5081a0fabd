"""SmolTalk (HuggingFaceTB/smol-smoltalk, nanochat's choice, and the larger smoltalk): short chats of many kinds. To
learn."""

from dataclasses import dataclass

from data_tools.chats.conversation import Conversation

__all__ = ["HUB", "Options", "conversation"]

HUB = "HuggingFaceTB/smol-smoltalk:data/train-*.parquet"


@dataclass
class Options:
    """There is nothing to choose."""


def conversation(given: Conversation, options: Options) -> Conversation:
    """Return the conversation as it is."""
    return given
