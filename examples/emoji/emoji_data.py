"""Build the emoji data set: pictures of one object in several drawing styles, with their names.

Source are npm packages with permissive licences (Iconify's sets, LobeHub's 3d pictures, Emojibase's
names); they are joined by Unicode code point, or by the slug of the name where a package knows no
code points. The result is a folder `images/<style>/<id>.png` (RGBA) with `metadata.jsonl` and
`NOTICE`, as `ldm.data.folder` reads it. Held-out (object, style) pairs form a Latin square: every
second fully drawn object lacks one style in training.
"""

import io
import json
import logging
import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["PACKAGES", "STYLES", "Picture", "build", "install"]

log = logging.getLogger(__name__)

STYLES = {
    "noto": "@iconify-json/noto",
    "android": "@iconify-json/noto-v1",
    "twemoji": "@iconify-json/twemoji",
    "flat": "@iconify-json/fluent-emoji-flat",
    "soft gradient": "@iconify-json/fluent-emoji",
    "black line": "@iconify-json/fluent-emoji-high-contrast",
    "emojione": "@iconify-json/emojione",
    "3d": "@lobehub/fluent-emoji-3d",
}
# npm package: version, licence, what it is, repository on GitHub
PACKAGES = {
    "@iconify-json/noto": (
        "1.2.9", "Apache-2.0", "Noto Emoji by Google", "googlefonts/noto-emoji",
    ),
    "@iconify-json/noto-v1": (
        "1.2.5", "Apache-2.0", "Noto Emoji (v1) by Google", "googlefonts/noto-emoji",
    ),
    "@iconify-json/twemoji": (
        "1.2.5", "CC-BY-4.0", "Twitter Emoji by Twitter and contributors", "jdecked/twemoji",
    ),
    "@iconify-json/fluent-emoji-flat": (
        "1.2.6", "MIT", "Fluent Emoji Flat by Microsoft", "microsoft/fluentui-emoji",
    ),
    "@iconify-json/fluent-emoji": (
        "1.2.7", "MIT", "Fluent Emoji by Microsoft", "microsoft/fluentui-emoji",
    ),
    "@iconify-json/fluent-emoji-high-contrast": (
        "1.2.6", "MIT", "Fluent Emoji High Contrast by Microsoft", "microsoft/fluentui-emoji",
    ),
    "@iconify-json/emojione": (
        "1.2.3", "CC-BY-4.0", "Emoji One (Colored) by Emoji One", "EmojiTwo/emojitwo",
    ),
    "@lobehub/fluent-emoji-3d": (
        "1.1.0", "MIT", "Fluent Emoji 3D by Microsoft, packed by LobeHub", "lobehub/fluent-emoji",
    ),
    "emojibase-data": (
        "17.0.0", "MIT", "names, keywords and groups by Miles Johnson", "milesj/emojibase",
    ),
}  # fmt: skip
LICENCES = {
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "MIT": "https://opensource.org/license/mit",
}
# Emojibase's group numbers; people, symbols and flags stay out. The weight says how many objects of
# a subgroup are taken in each round of the ranking; faces are so alike that they come last.
GROUPS = {0: "faces", 3: "animals", 4: "food", 5: "travel", 6: "activities", 7: "objects"}
WEIGHTS = {"faces": 1, "animals": 3, "food": 3, "travel": 2, "activities": 2, "objects": 1}
# What people ask for first: leads the ranking, in this order.
COMMON = """
cat face, dog face, lion, tiger face, horse face, cow face, pig face, mouse face, rabbit face, fox,
bear, panda, koala, monkey face, chicken, penguin, owl, frog, turtle, snake, fish, tropical fish,
octopus, spouting whale, dolphin, crab, butterfly, honeybee, lady beetle, snail, spider, elephant,
unicorn, duck, eagle, dragon, rose, sunflower, tulip, cactus, palm tree, evergreen tree, four leaf
clover, mushroom, maple leaf, red apple, green apple, pear, lemon, tangerine, banana, watermelon,
grapes, strawberry, cherries, peach, pineapple, tomato, carrot, avocado, hot pepper, ear of corn,
bread, croissant, cheese wedge, hamburger, french fries, pizza, hot dog, taco, sushi, doughnut,
cookie, birthday cake, chocolate bar, ice cream, soft ice cream, lollipop, hot beverage, beer mug,
wine glass, cooking, popcorn, automobile, bus, locomotive, bicycle, airplane, rocket, sailboat,
helicopter, ambulance, fire engine, police car, tractor, house, castle, tent, volcano, mountain,
sun, crescent moon, star, cloud, rainbow, snowflake, umbrella, fire, anchor, hourglass done, alarm
clock, flying saucer, soccer ball, basketball, tennis, trophy, Christmas tree, jack-o-lantern,
balloon, wrapped gift, video game, artist palette, glasses, crown, top hat, t-shirt, backpack,
high-heeled shoe, guitar, trumpet, drum, violin, mobile phone, laptop, camera, television, light
bulb, candle, books, envelope, pencil, scissors, key, locked, hammer, wrench, bomb, microscope,
telescope, bed, toilet, bell, megaphone, money bag, gem stone, ring, door, syringe, pill, grinning
face, smiling face with sunglasses, smiling face with heart-eyes, thinking face, angry face, ghost,
alien, robot, skull, pile of poo, red heart
"""
CLOCK = re.compile(r"o’clock|-thirty|o'clock")
RANKED = 128  # pixels at which objects are compared
DISTINCT = 0.07  # least root mean square distance between two objects, averaged over the styles


@dataclass(frozen=True)
class Picture:
    """One line of metadata.jsonl."""

    file_name: str
    id: str
    object: str
    style: str
    keywords: list[str]
    group: str
    rank: int
    licence: str
    split: str


def install(folder: Path) -> Path:
    """Fetch the packages with npm, unless they are there; return the folder that holds them."""
    modules = folder / "node_modules"
    if all((modules / name).is_dir() for name in PACKAGES):
        return modules
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [f"{name}@{version}" for name, (version, *_) in PACKAGES.items()]
    flags = ["--ignore-scripts", "--no-save", "--no-audit", "--no-fund", "--legacy-peer-deps"]
    subprocess.run(["npm", "install", *flags, "--prefix", str(folder), *wanted], check=True)
    return modules


def build(
    modules: Path, out: Path, objects: int | None = None, size: int = RANKED
) -> list[Picture]:
    """Write the data set and return its metadata.

    modules: node_modules folder with the packages of PACKAGES.
    out: folder to write; images/, metadata.jsonl, NOTICE.
    objects: keep the first so many of the ranking (fully drawn and distinct first); None = all.
    size: side of the square pictures, pixels; what would have to be enlarged is left out.
    """
    sources = {style: _Source(modules / package) for style, package in STYLES.items()}
    slugs: dict[str, set[str]] = {}
    for source in sources.values():
        for code, name in source.chars.items():
            slugs.setdefault(_plain(code), set()).add(name)
    names = [entry for entry in _names(modules) if not CLOCK.search(entry["label"])]
    drawn = {
        entry["id"]: {
            style: found
            for style, source in sources.items()
            if (found := source.picture(entry, slugs.get(entry["id"], set()))) is not None
        }
        for entry in names
    }
    names = [entry for entry in names if drawn[entry["id"]]]
    names = _ranked(names, drawn)[:objects]
    by_id = {entry["id"]: entry for entry in names}
    pictures = []
    for row in _describe(names, drawn):
        picture: Image.Image | None = drawn[row.id][row.style]
        if size != RANKED:  # all were drawn to be compared, only these are wanted
            picture = sources[row.style].picture(by_id[row.id], slugs.get(row.id, set()), size)
        if picture is not None:
            path = out / row.file_name
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
            pictures.append(row)
    lines = [json.dumps(asdict(row), ensure_ascii=False) for row in pictures]
    (out / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "NOTICE").write_text(_notice(), encoding="utf-8")
    return pictures


class _Source:
    """The pictures of one package, by code point or by slug."""

    def __init__(self, folder: Path) -> None:
        self.assets = folder / "assets"
        self.icons: dict = {}
        self.chars: dict[str, str] = {}
        if (folder / "icons.json").exists():
            packed = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
            self.icons = packed["icons"]
            self.aliases = {name: a["parent"] for name, a in packed.get("aliases", {}).items()}
            self.side = packed.get("width", 16)
        if (folder / "chars.json").exists():
            self.chars = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
        self.by_code = {_plain(code): name for code, name in self.chars.items()}

    def picture(self, entry: dict, slugs: set[str], size: int = RANKED) -> Image.Image | None:
        """RGBA picture of the object, or None where this style lacks it (at this size)."""
        if not self.icons:
            for code in (entry["id"], f"{entry['id']}-fe0f"):
                path = self.assets / f"{code}.webp"
                if path.exists():
                    picture = Image.open(path).convert("RGBA")
                    if picture.width < size:
                        return None
                    return picture.resize((size, size), Image.Resampling.LANCZOS)
            return None
        wanted = [self.by_code.get(entry["id"]), *sorted(slugs), _slug(entry["label"])]
        for name in wanted:
            icon = self.icons.get(self.aliases.get(name, name)) if name else None
            if icon is not None:
                return self._render(icon, size)
        return None

    def _render(self, icon: dict, size: int) -> Image.Image | None:
        import resvg_py

        width, height = icon.get("width", self.side), icon.get("height", self.side)
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        # "currentColor" of the line style is black
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" width="{size}" height="{size}" '
            f'color="black">{icon["body"]}</svg>'
        )
        data = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)
        picture = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
        return picture if picture.getbbox() else None


def _names(modules: Path) -> Iterator[dict]:
    base = modules / "emojibase-data"
    subgroups = json.loads((base / "meta" / "groups.json").read_text())["subgroups"]
    for entry in json.loads((base / "en" / "data.json").read_text(encoding="utf-8")):
        if entry.get("group") in GROUPS:
            yield {
                "id": _plain(entry["hexcode"]),
                "label": entry["label"].replace("’", "'"),
                "keywords": [tag for tag in entry.get("tags", []) if tag.isascii()],
                "group": GROUPS[entry["group"]],
                "subgroup": subgroups[str(entry["subgroup"])],
                "version": entry["version"],
                "order": entry["order"],
            }


def _ranked(names: list[dict], drawn: dict[str, dict[str, Image.Image]]) -> list[dict]:
    """Fully drawn and distinct objects first; among them the common, then short and old names."""
    common = {" ".join(label.split()): rank for rank, label in enumerate(COMMON.split(","))}
    queue = sorted(
        (entry for entry in names if entry["label"] in common), key=lambda e: common[e["label"]]
    )
    lines: dict[str, list[dict]] = {}
    for entry in sorted(names, key=lambda e: (len(e["label"].split()), e["version"], e["order"])):
        if entry["label"] not in common:
            lines.setdefault(entry["subgroup"], []).append(entry)
    faces = [line for line in lines.values() if line[0]["group"] == "faces"]
    for part in ([line for line in lines.values() if line not in faces], faces):
        queue += _rounds(part)
    first: list[dict] = []
    alike: list[dict] = []
    partial: list[dict] = []
    seen: list[np.ndarray] = []
    for entry in queue:
        if len(drawn[entry["id"]]) < len(STYLES):
            partial.append(entry)
            continue
        look = np.stack([_look(drawn[entry["id"]][style]) for style in STYLES])
        distance = [np.sqrt(((look - other) ** 2).mean((1, 2))).mean() for other in seen]
        (first if min(distance, default=1.0) >= DISTINCT else alike).append(entry)
        seen.append(look)
    return first + alike + partial


def _rounds(lines: list[list[dict]]) -> Iterator[dict]:
    """Entries of several lines taken in turns, so many of each per round as WEIGHTS says."""
    while any(lines):
        for line in filter(None, lines):
            weight = WEIGHTS[line[0]["group"]]
            yield from line[:weight]
            del line[:weight]


def _describe(names: list[dict], drawn: dict[str, dict[str, Image.Image]]) -> Iterator[Picture]:
    count: dict[str, int] = {}
    for keyword in (k for entry in names for k in set(entry["keywords"])):
        count[keyword] = count.get(keyword, 0) + 1
    full = 0
    for rank, entry in enumerate(names):
        styles = drawn[entry["id"]]
        held_out = None
        if len(styles) == len(STYLES):
            held_out = list(STYLES)[full // 2 % len(STYLES)] if full % 2 == 1 else None
            full += 1
        # a keyword may stand for the name only where it means this object alone
        own = [k for k in entry["keywords"] if count[k] == 1 and k != entry["label"]]
        for style in styles:
            yield Picture(
                file_name=f"images/{_slug(style)}/{entry['id']}.png",
                id=entry["id"],
                object=entry["label"],
                style=style,
                keywords=own,
                group=entry["group"],
                rank=rank,
                licence=PACKAGES[STYLES[style]][1],
                split="heldout" if style == held_out else "train",
            )


def _look(picture: Image.Image) -> np.ndarray:
    """(256, 3) small version on gray, in [0, 1]: what two objects are compared by."""
    gray = Image.new("RGBA", picture.size, (128, 128, 128, 255))
    gray.alpha_composite(picture)
    small = gray.convert("RGB").resize((16, 16), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).reshape(256, 3) / 255


def _plain(code: str) -> str:
    """Code points in lower case without the variation selector, joined by hyphens."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("'", "").replace("’", "")).strip("-")


def _notice() -> str:
    lines = [
        "The pictures in this folder were drawn by others; their licences ask to name them:",
        "",
    ]
    styles = {package: style for style, package in STYLES.items()}
    for package, (version, licence, author, home) in PACKAGES.items():
        lines.append(f"{styles.get(package, 'captions')}: {author}, https://github.com/{home}")
        lines.append(f"    npm package {package} {version}, {licence}")
    lines += ["", *(f"{name}: {url}" for name, url in LICENCES.items()), ""]
    lines += ["The pictures were rasterised and scaled; nothing else was changed.", ""]
    return "\n".join(lines)
