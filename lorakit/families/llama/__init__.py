"""LLaMA-type language models."""

from lorakit.families.llama.generate import Chat, Settings, open_chat
from lorakit.families.llama.plan import LlamaPlan, plan
from lorakit.families.llama.task import LlamaTask, load

__all__ = ["Chat", "LlamaPlan", "LlamaTask", "Settings", "load", "open_chat", "plan"]
