"""Dolci-Think (allenai/Dolci-Think-SFT-7B): conversations of maths, code, chat and safety whose answers have thoughts
before them. To learn. The phase `dolci_prepare` draws a sample of them. `answer_only` is as in openthoughts.py."""

from data_tools.tasks.openthoughts import Options, conversation

__all__ = ["HUB", "Options", "conversation"]

HUB = "allenai/Dolci-Think-SFT-7B:data/train-*.parquet"
