"""``lorakit data``: training examples as the model sees them, and how long or large they are."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.markup import escape as unmarked
from rich.text import Text

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
    if isinstance(recipe, LlamaRecipe):
        _chats(recipe, rows, console)
    else:
        _pictures(recipe, rows, console)


def _chats(recipe: LlamaRecipe, rows: int, console: Console) -> None:
    from lorakit.data.show import show_row, token_histogram
    from lorakit.families.llama.base import find_base
    from lorakit.families.llama.library import load_data
    from lorakit.training.device import choose

    _, dtype = choose(recipe.compute)
    _, folder = find_base(recipe.base, dtype)
    _, tokenizer, chats = load_data(folder, recipe.data, recipe.train.seed)
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
    from lorakit.data.arrange import held_out_ids, sizes_of
    from lorakit.data.captions import with_trigger
    from lorakit.data.images import choose_bucket, decode
    from lorakit.data.pictures import Picture, Rejects, find_pictures
    from lorakit.errors import DataError
    from lorakit.families.sd.facts import facts_of
    from lorakit.families.sd.find import find_base

    data = recipe.data
    rejects = Rejects(data.on_bad)
    base = facts_of(find_base(recipe.base))
    sizes = sizes_of(data, base.factor, base.size)
    counts = [0] * len(sizes)
    usable: list[tuple[Picture, tuple[int, int], int]] = []
    for picture in find_pictures(data, rejects):
        try:
            size = decode(picture.read(), picture.id).size
        except DataError as error:
            rejects.report(error)
            continue
        bucket = choose_bucket(size, sizes)
        usable.append((picture, size, bucket))
    if not usable:
        raise DataError("no picture can be used", where=data.path)
    aside = held_out_ids([picture for picture, *_ in usable], data.held_out, recipe.train.seed)
    training = [entry for entry in usable if entry[0].id not in aside]
    for picture, size, bucket in spread(training, rows):
        width, height = sizes[bucket]
        console.print(f"[bold]{unmarked(visible(picture.id))}[/]: {size[0]} x {size[1]} -> {width} x {height} pixels")
        caption = visible(with_trigger(picture.caption, data.trigger))
        console.print(Text(f"  {caption}") if caption else Text("  no caption", MASKED))
    for _, _, bucket in training:
        counts[bucket] += data.repeats * (2 if data.flip else 1)
    console.print()
    listed = [(f"{sizes[i][0]} x {sizes[i][1]}", count) for i, count in enumerate(counts) if count]
    histogram(console, "size", listed)
    held_out = f"{len(usable) - len(training)} held out"
    console.print(f"{sum(counts)} examples an epoch from {len({p.id for p, *_ in training})} pictures; {held_out}")
    if data.caption_dropout:
        console.print(f"{100 * data.caption_dropout:.0f} % of the examples of a step get an empty caption")
    for left_out in rejects.errors:
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
