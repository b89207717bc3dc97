"""Build the emoji dataset that the demo models are trained on.

    python examples/emoji/make_emoji_data.py data/emoji --objects 300

It fetches npm packages under permissive licences (Iconify's sets, LobeHub's 3d images, Emojibase's
names) into a cache folder and rasterizes them, with npm and resvg-py (`pip install resvg-py`).
Drawings of an object are matched by Unicode code point, or by the slug of its name in packages
without code points. The result is a folder of `images/<style>/<id>.png` (RGBA), `metadata.jsonl`
and `NOTICE`, which `ldm.data.folder` reads. One style of every second object that has all styles
is held out, each style in turn.
"""

import argparse
import io
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Entry = dict[str, Any]  # one emoji of Emojibase
Drawings = dict[str, dict[str, Image.Image]]  # id of an emoji -> style -> image

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
# npm package -> version, licence, author, repository on GitHub
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
# Emojibase's numbers of the groups; people, symbols and flags are not used.
GROUPS = {0: "faces", 3: "animals", 4: "food", 5: "travel", 6: "activities", 7: "objects"}
# Number of objects of a subgroup in each round of the ranking, by group
WEIGHTS = {"faces": 1, "animals": 3, "food": 3, "travel": 2, "activities": 2, "objects": 1}
# Objects that people are likely to try: first in the ranking, in this order
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
RANKING_SIZE = 128  # pixels of the drawings that are compared
# Two objects are similar if the root mean square difference of their thumbnails in [0, 1], averaged
# over styles, is below this.
MIN_DISTANCE = 0.07


@dataclass(frozen=True)
class Row:
    """A line of metadata.jsonl."""

    file_name: str
    id: str
    object: str
    style: str
    keywords: list[str]
    group: str
    rank: int
    licence: str
    split: str


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=form)
    add = parser.add_argument
    add("out", type=Path, help="folder to write")
    add("--packages", type=Path, default=Path("data/npm"), help="npm cache folder")
    add("--objects", type=int, help="number of objects to keep (all: about 1000)")
    add("--size", type=int, default=128, help="height and width of the images in pixels")
    args = parser.parse_args(argv)
    rows = build(install(args.packages), args.out, objects=args.objects, size=args.size)
    objects = {row.id for row in rows}
    held_out = [row for row in rows if row.split == "heldout"]
    print(f"{args.out}: {len(rows)} images, {len(objects)} objects, {len(held_out)} held out")


def install(folder: Path) -> Path:
    """Fetch missing packages with npm, and return their folder `node_modules`."""
    modules = folder / "node_modules"
    if all((modules / name).is_dir() for name in PACKAGES):
        return modules
    folder.mkdir(parents=True, exist_ok=True)
    packages = [f"{name}@{version}" for name, (version, *_) in PACKAGES.items()]
    flags = ["--ignore-scripts", "--no-save", "--no-audit", "--no-fund", "--legacy-peer-deps"]
    subprocess.run(["npm", "install", *flags, "--prefix", str(folder), *packages], check=True)
    return modules


def build(
    modules: Path, out: Path, objects: int | None = None, size: int = RANKING_SIZE
) -> list[Row]:
    """Write the dataset and return its metadata.

    Args:
        modules: Folder `node_modules` with the packages of PACKAGES.
        out: Folder to write.
        objects: Number of objects to keep, the first of the ranking; None = all.
        size: Height and width of the images in pixels; smaller drawings are left out.
    """
    packages = {style: _Package(modules / name) for style, name in STYLES.items()}
    slugs: dict[str, set[str]] = {}
    for package in packages.values():
        for code, name in package.chars.items():
            slugs.setdefault(_remove_selector(code), set()).add(name)
    entries = [entry for entry in _read_names(modules) if not CLOCK.search(entry["label"])]
    drawings: Drawings = {}
    for entry in entries:
        styles = drawings[entry["id"]] = {}
        for style, package in packages.items():
            image = package.draw(entry, slugs.get(entry["id"], set()))
            if image is not None:
                styles[style] = image
    entries = [entry for entry in entries if drawings[entry["id"]]]
    entries = _rank_objects(entries, drawings)[:objects]
    by_id = {entry["id"]: entry for entry in entries}
    rows = []
    for row in _make_rows(entries, drawings):
        image = drawings[row.id][row.style]
        if size != RANKING_SIZE:
            image = packages[row.style].draw(by_id[row.id], slugs.get(row.id, set()), size)
        if image is not None:
            path = out / row.file_name
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            rows.append(row)
    lines = [json.dumps(asdict(row), ensure_ascii=False) for row in rows]
    (out / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "NOTICE").write_text(_format_notice(), encoding="utf-8")
    return rows


class _Package:
    """The drawings of one package, by code point or by slug."""

    def __init__(self, folder: Path) -> None:
        self.assets = folder / "assets"
        self.icons: dict[str, Any] = {}
        self.chars: dict[str, str] = {}
        if (folder / "icons.json").exists():
            icon_set = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
            self.icons = icon_set["icons"]
            self.aliases = {
                name: alias["parent"] for name, alias in icon_set.get("aliases", {}).items()
            }
            self.side = icon_set.get("width", 16)
        if (folder / "chars.json").exists():
            self.chars = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
        self.by_code = {_remove_selector(code): name for code, name in self.chars.items()}

    def draw(self, entry: Entry, slugs: set[str], size: int = RANKING_SIZE) -> Image.Image | None:
        """Draw an object as RGBA image; None if the package does not have it at this size."""
        if not self.icons:
            return self._load_asset(entry["id"], size)
        for name in (self.by_code.get(entry["id"]), *sorted(slugs), _make_slug(entry["label"])):
            icon = self.icons.get(self.aliases.get(name, name)) if name else None
            if icon is not None:
                return self._render(icon, size)
        return None

    def _load_asset(self, code: str, size: int) -> Image.Image | None:
        for path in (self.assets / f"{code}.webp", self.assets / f"{code}-fe0f.webp"):
            if path.exists():
                image = Image.open(path).convert("RGBA")
                if image.width < size:
                    return None
                return image.resize((size, size), Image.Resampling.LANCZOS)
        return None

    def _render(self, icon: Entry, size: int) -> Image.Image | None:
        import resvg_py

        width, height = icon.get("width", self.side), icon.get("height", self.side)
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        # The attribute color is for the "currentColor" of the style "black line".
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" width="{size}" height="{size}" '
            f'color="black">{icon["body"]}</svg>'
        )
        data = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)
        image = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
        return image if image.getbbox() else None


def _read_names(modules: Path) -> Iterator[Entry]:
    base = modules / "emojibase-data"
    subgroups = json.loads((base / "meta" / "groups.json").read_text())["subgroups"]
    for entry in json.loads((base / "en" / "data.json").read_text(encoding="utf-8")):
        if entry.get("group") in GROUPS:
            yield {
                "id": _remove_selector(entry["hexcode"]),
                "label": entry["label"].replace("’", "'"),
                "keywords": [tag for tag in entry.get("tags", []) if tag.isascii()],
                "group": GROUPS[entry["group"]],
                "subgroup": subgroups[str(entry["subgroup"])],
                "version": entry["version"],
                "order": entry["order"],
            }


def _rank_objects(entries: list[Entry], drawings: Drawings) -> list[Entry]:
    """Sort objects: distinct ones with all styles, those similar to an earlier one, then others.

    Within each, COMMON ones come first, then subgroups in turn, short and old names first. Faces,
    which are much alike, come last.
    """
    common = {" ".join(label.split()): rank for rank, label in enumerate(COMMON.split(","))}
    queue = sorted(
        (entry for entry in entries if entry["label"] in common), key=lambda e: common[e["label"]]
    )
    subgroups: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda e: (len(e["label"].split()), e["version"], e["order"])):
        if entry["label"] not in common:
            subgroups.setdefault(entry["subgroup"], []).append(entry)
    faces = [entries for entries in subgroups.values() if entries[0]["group"] == "faces"]
    others = [entries for entries in subgroups.values() if entries[0]["group"] != "faces"]
    queue += [*_interleave(others), *_interleave(faces)]
    distinct: list[Entry] = []
    similar: list[Entry] = []
    incomplete: list[Entry] = []
    earlier: list[np.ndarray] = []
    for entry in queue:
        styles = drawings[entry["id"]]
        if len(styles) < len(STYLES):
            incomplete.append(entry)
            continue
        thumbnails = np.stack([_make_thumbnail(styles[style]) for style in STYLES])
        distances = [np.sqrt(((thumbnails - x) ** 2).mean((1, 2))).mean() for x in earlier]
        (distinct if min(distances, default=1.0) >= MIN_DISTANCE else similar).append(entry)
        earlier.append(thumbnails)
    return distinct + similar + incomplete


def _interleave(subgroups: list[list[Entry]]) -> Iterator[Entry]:
    """Yield entries of the subgroups in turn, WEIGHTS of them in each round; empties the lists."""
    while any(subgroups):
        for entries in filter(None, subgroups):
            weight = WEIGHTS[entries[0]["group"]]
            yield from entries[:weight]
            del entries[:weight]


def _make_rows(entries: list[Entry], drawings: Drawings) -> Iterator[Row]:
    counts = Counter(keyword for entry in entries for keyword in set(entry["keywords"]))
    complete = 0  # objects with all styles so far
    for rank, entry in enumerate(entries):
        styles = drawings[entry["id"]]
        held_out = None
        if len(styles) == len(STYLES):
            if complete % 2 == 1:
                held_out = list(STYLES)[complete // 2 % len(STYLES)]
            complete += 1
        # Captions use keywords instead of the name, so each must belong to a single object.
        keywords = [k for k in entry["keywords"] if counts[k] == 1 and k != entry["label"]]
        for style in styles:
            yield Row(
                file_name=f"images/{_make_slug(style)}/{entry['id']}.png",
                id=entry["id"],
                object=entry["label"],
                style=style,
                keywords=keywords,
                group=entry["group"],
                rank=rank,
                licence=PACKAGES[STYLES[style]][1],
                split="heldout" if style == held_out else "train",
            )


def _make_thumbnail(image: Image.Image) -> np.ndarray:
    """Return 16 x 16 pixels on gray, (256, 3) in [0, 1], by which objects are compared."""
    gray = Image.new("RGBA", image.size, (128, 128, 128, 255))
    gray.alpha_composite(image)
    small = gray.convert("RGB").resize((16, 16), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).reshape(256, 3) / 255


def _remove_selector(code: str) -> str:
    """Return code points, joined by hyphens, in lower case without the variation selector."""
    return "-".join(point for point in code.lower().split("-") if point != "fe0f")


def _make_slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("'", "").replace("’", "")).strip("-")


def _format_notice() -> str:
    lines = [
        "The images in this folder are works of others, whose licences require attribution:",
        "",
    ]
    styles = {package: style for style, package in STYLES.items()}
    for package, (version, licence, author, home) in PACKAGES.items():
        lines.append(f"{styles.get(package, 'captions')}: {author}, https://github.com/{home}")
        lines.append(f"    npm package {package} {version}, {licence}")
    lines += ["", *(f"{name}: {url}" for name, url in LICENCES.items()), ""]
    lines += ["The images were rasterized and scaled, and are otherwise unchanged.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
