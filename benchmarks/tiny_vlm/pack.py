"""The image pack: icons, glyphs and printed characters of a few packages, in one small file.

python -m benchmarks.tiny_vlm.pack        installs the packages into the cache folder and packs them
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .sources import PACKAGES, Pixels, atlas, emoji, glyphs, install

CACHE = Path(__file__).resolve().parent / ".cache"
"""What is built or trained and not in the repository."""

PACK = CACHE / "pack.npz"


@dataclass(frozen=True)
class Pack:
    """Everything that images are drawn with.

    Attributes:
        icons: RGBA, uint8 ``[n, ICON, ICON, 4]``: emoji as they are, then white glyphs.
        names: of each.
        emoji: how many of them are emoji.
        atlas: coverage of printed characters, uint8 ``[faces, CHARACTERS, *CELL]``.
    """

    icons: Pixels
    names: tuple[str, ...]
    emoji: int
    atlas: Pixels

    def checksum(self) -> str:
        """SHA-256 of the content, however it is compressed."""
        content = hashlib.sha256(json.dumps([self.names, self.emoji]).encode())
        for array in (self.icons, self.atlas):
            content.update(str(array.shape).encode() + array.tobytes())
        return content.hexdigest()


def build(folder: Path) -> Pack:
    """The pack, out of a folder with the packages."""
    pictures = emoji(folder)
    # "the anchor" must mean one thing: a glyph that has an emoji's name is left out.
    shapes = {name: shape for name, shape in glyphs(folder).items() if name not in pictures}
    icons = np.stack([*pictures.values(), *shapes.values()])
    return Pack(icons, (*pictures, *shapes), len(pictures), atlas(folder))


def save(pack: Pack, path: Path) -> None:
    """Write a pack; the same file whenever its content is the same."""
    about = {
        "names": pack.names,
        "emoji": pack.emoji,
        "sha256": pack.checksum(),
        "packages": [asdict(package) for package in PACKAGES],
    }
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, icons=pack.icons, atlas=pack.atlas, about=text)


def load(path: Path = PACK) -> Pack:
    """Read a pack.

    Raises:
        FileNotFoundError: it was not built.
        ValueError: its content is not what was written.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not here: python -m benchmarks.tiny_vlm.pack builds it")
    with np.load(path) as file:
        about = json.loads(file["about"].tobytes())
        pack = Pack(file["icons"], tuple(about["names"]), about["emoji"], file["atlas"])
    if pack.checksum() != about["sha256"]:
        raise ValueError(f"{path} is damaged: its content has another SHA-256 than it says")
    return pack


def main() -> None:
    """Install, build, save, and say what there is."""
    packages = CACHE / "packages"
    install(packages)
    pack = build(packages)
    save(pack, PACK)
    for package in PACKAGES:
        print(f"{package.name} {package.version}: {package.use}, {package.licence}")
    print(f"{pack.emoji} emoji, {len(pack.names) - pack.emoji} glyphs, {len(pack.atlas)} typefaces")
    print(f"{PACK}: {PACK.stat().st_size / 1e6:.1f} MB, content {pack.checksum()}")


if __name__ == "__main__":
    main()
