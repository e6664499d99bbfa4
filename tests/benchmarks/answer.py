"""Answer the generation benchmark's questions, one at a time and all together, greedily.

    python -m tests.benchmarks.answer WORK OUT lorakit|transformers

OUT: {"one": tokens/s, "together": tokens/s, "answers": [...]} as JSON. Loading and a short first answer are not
timed. An answer's tokens are counted by the tokenizer, in the same way for both.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

Answer = Callable[[Sequence[str], int], list[str]]
"""Prompts and most tokens of each -> texts."""
FIRST = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def lorakit(work: Path, dtype: torch.dtype) -> Answer:
    """What `lorakit generate` runs."""
    from lorakit.data.chat import Message
    from lorakit.families.llama.generate import Settings, open_chat
    from lorakit.families.place import Place
    from lorakit.storage.bases import resolve

    place = Place(torch.device("cpu"), dtype)
    chat = open_chat(resolve(str((work / "base").resolve())), [(work / "adapter", 1.0)], place)

    def answer(prompts: Sequence[str], tokens: int) -> list[str]:
        texts = [""] * len(prompts)
        questions = [[Message("user", prompt)] for prompt in prompts]
        for number, piece in chat.answers(questions, Settings(temperature=0, max_new_tokens=tokens)):
            texts[number] += piece
        return texts

    return answer


def transformers(work: Path, dtype: torch.dtype) -> Answer:
    """model.generate with PEFT's adapter loaded, prompts padded before when there are several."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokenizer: Any = AutoTokenizer.from_pretrained(work / "base", padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base: Any = AutoModelForCausalLM.from_pretrained(work / "base", dtype=dtype)
    model: Any = PeftModel.from_pretrained(base, str(work / "adapter")).eval()

    def answer(prompts: Sequence[str], tokens: int) -> list[str]:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        batch = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            out = model.generate(**batch, do_sample=False, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id)
        texts: list[str] = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return texts

    return answer


def main() -> None:
    work, out, who = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    task = json.loads((work / "task.json").read_text())
    answer = {"lorakit": lorakit, "transformers": transformers}[who](work, DTYPES[task["precision"]])
    tokenizer: Any = AutoTokenizer.from_pretrained(work / "base")
    prompts = task["prompts"]

    def rate(calls: Sequence[Sequence[str]]) -> tuple[float, list[str]]:
        began = time.perf_counter()
        texts = [text for call in calls for text in answer(call, task["tokens"])]
        seconds = time.perf_counter() - began
        return sum(len(tokenizer(text)["input_ids"]) for text in texts) / seconds, texts

    answer(prompts[:1], FIRST)
    one, texts = rate([[prompt] for prompt in prompts])
    together, _ = rate([prompts])
    out.write_text(json.dumps({"one": one, "together": together, "answers": texts}))


if __name__ == "__main__":
    main()
