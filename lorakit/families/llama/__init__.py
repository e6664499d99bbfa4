"""LLaMA-type language models: ``task`` trains, ``plan`` looks ahead, ``generate`` answers."""
