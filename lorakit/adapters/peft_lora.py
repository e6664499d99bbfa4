"""PEFT's LoRA, imported here and nowhere else, because its import takes seconds and brings bitsandbytes along."""

from lorakit.numerics.compiled import compiled_when_called

with compiled_when_called():
    from peft import LoraConfig, TaskType, inject_adapter_in_model
    from peft.tuners.lora import Linear, LoraLayer
    from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

__all__ = ["Linear", "Linear4bit", "Linear8bitLt", "LoraConfig", "LoraLayer", "TaskType", "inject_adapter_in_model"]
