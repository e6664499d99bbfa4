import threading
import time
from typing import Any

import torch
from torch import nn

from lorakit.families.sd.conditioning import conditioning_of, cut_captions, ids_of, unread
from tests.tiny import tiny_clip_tokenizer


class Watched:
    """A tokenizer that notes how many calls are in it at once."""

    def __init__(self) -> None:
        self.tokenizer = tiny_clip_tokenizer()
        self.inside = self.most = 0

    def __call__(self, *text: Any, **how: Any) -> Any:
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.002)
        found = self.tokenizer(*text, **how)
        self.inside -= 1
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def test_a_tokenizer_is_called_by_one_thread_at_a_time() -> None:
    """Its settings are those of the call: two at once would read each other's."""
    watched: Any = Watched()
    conditioning = conditioning_of([watched], {"text_encoder": nn.Linear(1, 1)}, zeros=False)
    long = "a red cat " * watched.model_max_length
    calls = [lambda: ids_of(conditioning, ["a cat", long]), lambda: cut_captions(conditioning, [long]),
             lambda: unread(conditioning, long)]  # fmt: skip
    threads = [threading.Thread(target=lambda call=call: [call() for _ in range(20)]) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert watched.most == 1


def test_what_is_cut_off() -> None:
    tokenizer = tiny_clip_tokenizer()
    conditioning = conditioning_of([tokenizer], {"text_encoder": nn.Linear(1, 1)}, zeros=False)
    room = tokenizer.model_max_length - 2
    whole = tokenizer("a red cat " * room, add_special_tokens=False, truncation=False)["input_ids"]
    fits, long = (tokenizer.decode(whole[:size]) for size in (room, room + 1))
    assert torch.equal(ids_of(conditioning, [fits]), ids_of(conditioning, [long]))
    assert (unread(conditioning, fits), unread(conditioning, long)) == ("", tokenizer.decode(whole[room]).strip())
    assert cut_captions(conditioning, [fits, long, long, "a"]) == 2
