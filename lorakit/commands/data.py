"""``lorakit data``: training examples as the model sees them, and how long or large they are."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.markup import escape as unmarked
from rich.text import Text

from lorakit.commands.progress import warnings_to
from lorakit.errors import RecipeError
from lorakit.recipe.load import load_any
from lorakit.recipe.schema import LlamaRecipe, SDRecipe

if TYPE_CHECKING:
    from lorakit.data.show import ShownRow

T = TypeVar("T")
BAR = 40
LABELLED, MASKED = "bold green", "dim"


def run(path: Path, overrides: Sequence[str], rows: int) -> None:
    """Print ``rows`` examples of the recipe's data, spread over the whole of it, and a histogram of all."""
    recipe = load_any(path, overrides)
    console = Console(highlight=False)
    with warnings_to(Console(stderr=True)):
        if isinstance(recipe, LlamaRecipe):
            _chats(recipe, rows, console)
        else:
            _pictures(recipe, rows, console)


def _chats(recipe: LlamaRecipe, rows: int, console: Console) -> None:
    import torch

    from lorakit.data.show import show_row, token_histogram
    from lorakit.families.llama.base import find_base, read_chats
    from lorakit.families.llama.library import load_config, load_fitting_tokenizer
    from lorakit.training.device import choose

    try:
        _, dtype = choose(recipe.compute)
    except RecipeError:  # a recipe for another machine: tokens are the same in every dtype
        dtype = torch.float32
    _, folder = find_base(recipe.base, dtype)
    config = load_config(folder)
    tokenizer = load_fitting_tokenizer(folder, config)
    chats = read_chats(folder, config, recipe.data, recipe.train.seed, lambda: tokenizer)
    for row in spread(chats.train, rows):
        shown = show_row(row, tokenizer)
        cut = f", {shown.cut} cut" if shown.cut else ""
        console.print(f"[bold]{unmarked(visible(shown.where))}[/]: {shown.tokens} tokens, {shown.labels} learned{cut}")
        console.print(painted(shown, marks=console.color_system is None))
        console.print()
    key = Text("learned", LABELLED) + Text(" and ") + Text("masked", MASKED) + Text(" tokens; ⏎ is a line's end")
    if console.color_system is None:
        key = Text("⟦learned⟧ and masked tokens; ⏎ is a line's end")
    console.print(key)
    bars = token_histogram(chats.train)
    histogram(console, "tokens", [(f"{bar.low} to {bar.high}", bar.rows) for bar in bars])
    learned = f"{100 * chats.label_share:.0f} % of them learned"
    console.print(f"{len(chats.train)} training rows, {chats.tokens} tokens, {learned}; {len(chats.held_out)} held out")
    for note in chats.notes():
        console.print(f"[yellow]{unmarked(visible(note))}[/]")


def painted(row: "ShownRow", *, marks: bool) -> Text:
    """A row's text, learned pieces in one colour and masked ones in another; with ``marks``, learned runs in ⟦ ⟧."""
    text = Text()
    learned = False
    for piece in row.pieces:
        if marks and piece.labelled != learned:
            text.append("⟦" if piece.labelled else "⟧")
        learned = piece.labelled
        text.append(visible(piece.text, breaks=True), LABELLED if piece.labelled else MASKED)
    if marks and learned:
        text.append("⟧")
    return text


def _pictures(recipe: SDRecipe, rows: int, console: Console) -> None:
    from lorakit.data.arrange import sizes_of, survey
    from lorakit.data.captions import with_trigger
    from lorakit.data.images import decode
    from lorakit.families.sd.facts import facts_of
    from lorakit.families.sd.find import find_base

    data, base = recipe.data, facts_of(find_base(recipe.base))
    sizes = sizes_of(data, base.factor, base.size)
    found = survey(data, sizes, recipe.train.seed, lambda picture: decode(picture.read(), picture.id).size)
    for picture, (wide, high), (width, height) in spread(found.training, rows):
        console.print(f"[bold]{unmarked(visible(picture.id))}[/]: {wide} x {high} -> {width} x {height} pixels")
        caption = visible(with_trigger(picture.caption, data.trigger))
        console.print(Text(f"  {caption}") if caption else Text("  no caption", MASKED))
    console.print()
    histogram(console, "size", [(f"{w} x {h}", found.examples[w, h]) for w, h in sizes if (w, h) in found.examples])
    pictures = len({picture.id for picture, *_ in found.training})
    console.print(f"{found.examples.total()} examples an epoch from {pictures} pictures; {found.held_out} held out")
    if data.caption_dropout:
        console.print(f"{100 * data.caption_dropout:.0f} % of the examples of a step get an empty caption")
    for left_out in found.left_out:
        console.print(f"[yellow]left out: {unmarked(visible(str(left_out)))}[/]")


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` items at equal distances, the first among them."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def histogram(console: Console, subject: str, bars: Sequence[tuple[str, int]]) -> None:
    """One line a bar: its name, a bar in proportion, its count."""
    width = max([len(subject), *(len(name) for name, _ in bars)])
    most = max(count for _, count in bars)
    console.print(f"[bold]{subject:>{width}}[/]")
    for name, count in bars:
        length = -(-count * BAR // most)
        console.print(f"{name:>{width}} [cyan]{'█' * length}[/]{' ' if length else ''}{count}")


def visible(text: str, *, breaks: bool = False) -> str:
    """``text`` with control characters escaped, so that data cannot steer the terminal; line ends as ⏎."""
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return shown.replace("\n", "⏎\n" if breaks else "⏎")
