"""Build the emoji dataset that the demo models are trained on.

    python examples/emoji/make_emoji_data.py data/emoji --objects 300

It downloads npm packages under permissive licenses (Iconify's icon sets, LobeHub's 3D images,
Emojibase's names) into a cache folder and rasterizes the drawings, with npm and resvg-py
(`pip install resvg-py`). Drawings of an object are matched by Unicode code point, or by the slug of
its name in packages without code points. The result is a folder of `images/<style>/<id>.png`
(RGBA), `metadata.jsonl` and `NOTICE`, which `ldm.data.folder` reads. Of every second object that
has all styles one style is held out, each style in turn.
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

Emoji = dict[str, Any]  # an entry of Emojibase, see `_read_emojis`
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
# npm package -> (version, license, author, repository on GitHub)
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
LICENSE_URLS = {
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "MIT": "https://opensource.org/license/mit",
}
# Emojibase's number of each group; people, symbols and flags are not used.
GROUPS = {0: "faces", 3: "animals", 4: "food", 5: "travel", 6: "activities", 7: "objects"}
# Group -> number of objects that each of its subgroups contributes to a round of the ranking
OBJECTS_PER_ROUND = {
    "faces": 1, "animals": 3, "food": 3, "travel": 2, "activities": 2, "objects": 1,
}  # fmt: skip
# Objects that users are likely to try: first in the ranking, in this order
COMMON_OBJECTS = """
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
CLOCK_PATTERN = re.compile(r"o’clock|-thirty|o'clock")  # labels that are left out
RANKING_SIDE = 128  # height and width in pixels of the drawings that are compared for the ranking
# Two objects are similar if the root mean square difference of their thumbnails in [0, 1], averaged
# over styles, is below this.
MIN_RMS_DIFFERENCE = 0.07


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
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    add = parser.add_argument
    add("out", type=Path, help="folder to write")
    add("--packages", type=Path, default=Path("data/npm"), help="npm cache folder")
    add("--objects", type=int, help="number of objects to keep (default: all, about 1000)")
    add("--size", type=int, default=128, help="height and width of the images in pixels")
    args = parser.parse_args(argv)
    modules = install_packages(args.packages)
    rows = build_dataset(modules, args.out, max_objects=args.objects, side=args.size)
    ids = {row.id for row in rows}
    held_out = [row for row in rows if row.split == "heldout"]
    print(f"{args.out}: {len(rows)} images, {len(ids)} objects, {len(held_out)} images held out")


def install_packages(folder: Path) -> Path:
    """Download missing packages with npm, and return their folder `node_modules`."""
    modules = folder / "node_modules"
    if all((modules / name).is_dir() for name in PACKAGES):
        return modules
    folder.mkdir(parents=True, exist_ok=True)
    packages = [f"{name}@{version}" for name, (version, *_) in PACKAGES.items()]
    flags = ["--ignore-scripts", "--no-save", "--no-audit", "--no-fund", "--legacy-peer-deps"]
    subprocess.run(["npm", "install", *flags, "--prefix", str(folder), *packages], check=True)
    return modules


def build_dataset(
    modules: Path, out: Path, max_objects: int | None = None, side: int = RANKING_SIDE
) -> list[Row]:
    """Write the dataset and return its metadata.

    Args:
        modules: Folder `node_modules` with the packages of PACKAGES.
        out: Folder to write.
        max_objects: Number of objects to keep, the first of the ranking; None = all.
        side: Height and width of the images in pixels; smaller drawings are left out.
    """
    packages = {style: _Package(modules / name) for style, name in STYLES.items()}
    slugs: dict[str, set[str]] = {}
    for package in packages.values():
        for code, slug in package.chars.items():
            slugs.setdefault(_remove_selector(code), set()).add(slug)
    emojis = [e for e in _read_emojis(modules) if not CLOCK_PATTERN.search(e["label"])]
    drawings: Drawings = {}
    for emoji in emojis:
        by_style = drawings[emoji["id"]] = {}
        for style, package in packages.items():
            image = package.draw(emoji, slugs.get(emoji["id"], set()))
            if image is not None:
                by_style[style] = image
    emojis = [emoji for emoji in emojis if drawings[emoji["id"]]]
    emojis = _rank_objects(emojis, drawings)[:max_objects]
    emojis_by_id = {emoji["id"]: emoji for emoji in emojis}
    rows = []
    for row in _make_rows(emojis, drawings):
        image = drawings[row.id][row.style]
        if side != RANKING_SIDE:
            image = packages[row.style].draw(emojis_by_id[row.id], slugs.get(row.id, set()), side)
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
        self.chars: dict[str, str] = {}  # code point -> slug
        if (folder / "icons.json").exists():
            icon_set = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
            self.icons = icon_set["icons"]
            self.aliases = {
                name: alias["parent"] for name, alias in icon_set.get("aliases", {}).items()
            }
            self.icon_side = icon_set.get("width", 16)  # in units of the SVG
        if (folder / "chars.json").exists():
            self.chars = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
        self.slugs = {_remove_selector(code): slug for code, slug in self.chars.items()}

    def draw(self, emoji: Emoji, slugs: set[str], side: int = RANKING_SIDE) -> Image.Image | None:
        """Draw an emoji as an RGBA image; None if the package does not have it at this size.

        Args:
            slugs: Slugs of the emoji in all packages, which are tried if this one's is not known.
        """
        if not self.icons:
            return self._load_asset(emoji["id"], side)
        for slug in (self.slugs.get(emoji["id"]), *sorted(slugs), _make_slug(emoji["label"])):
            icon = self.icons.get(self.aliases.get(slug, slug)) if slug else None
            if icon is not None:
                return self._render(icon, side)
        return None

    def _load_asset(self, code: str, side: int) -> Image.Image | None:
        for path in (self.assets / f"{code}.webp", self.assets / f"{code}-fe0f.webp"):
            if path.exists():
                image = Image.open(path).convert("RGBA")
                if image.width < side:
                    return None
                return image.resize((side, side), Image.Resampling.LANCZOS)
        return None

    def _render(self, icon: dict[str, Any], side: int) -> Image.Image | None:
        import resvg_py

        width, height = icon.get("width", self.icon_side), icon.get("height", self.icon_side)
        view_box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        # The attribute `color` is the "currentColor" of the style "black line".
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{view_box}" width="{side}" height="{side}" '
            f'color="black">{icon["body"]}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side)
        image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
        return image if image.getbbox() else None


def _read_emojis(modules: Path) -> Iterator[Emoji]:
    folder = modules / "emojibase-data"
    subgroups = json.loads((folder / "meta" / "groups.json").read_text())["subgroups"]
    for entry in json.loads((folder / "en" / "data.json").read_text(encoding="utf-8")):
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


def _rank_objects(emojis: list[Emoji], drawings: Drawings) -> list[Emoji]:
    """Sort objects: distinct ones with all styles, those similar to an earlier one, then others.

    Each of the three parts starts with COMMON_OBJECTS; then subgroups take turns, short and old
    names first. Faces, which are much alike, come last.
    """
    ranks = {" ".join(label.split()): k for k, label in enumerate(COMMON_OBJECTS.split(","))}
    ranked = sorted((e for e in emojis if e["label"] in ranks), key=lambda e: ranks[e["label"]])
    subgroups: dict[str, list[Emoji]] = {}
    for emoji in sorted(emojis, key=lambda e: (len(e["label"].split()), e["version"], e["order"])):
        if emoji["label"] not in ranks:
            subgroups.setdefault(emoji["subgroup"], []).append(emoji)
    faces = [subgroup for subgroup in subgroups.values() if subgroup[0]["group"] == "faces"]
    others = [subgroup for subgroup in subgroups.values() if subgroup[0]["group"] != "faces"]
    ranked += [*_interleave(others), *_interleave(faces)]
    distinct: list[Emoji] = []
    similar: list[Emoji] = []
    incomplete: list[Emoji] = []
    earlier_thumbnails: list[np.ndarray] = []
    for emoji in ranked:
        by_style = drawings[emoji["id"]]
        if len(by_style) < len(STYLES):
            incomplete.append(emoji)
            continue
        thumbnails = np.stack([_make_thumbnail(by_style[style]) for style in STYLES])
        differences = [
            np.sqrt(((thumbnails - x) ** 2).mean((1, 2))).mean() for x in earlier_thumbnails
        ]
        is_distinct = min(differences, default=1.0) >= MIN_RMS_DIFFERENCE
        (distinct if is_distinct else similar).append(emoji)
        earlier_thumbnails.append(thumbnails)
    return distinct + similar + incomplete


def _interleave(subgroups: list[list[Emoji]]) -> Iterator[Emoji]:
    """Yield from each subgroup in turn, OBJECTS_PER_ROUND at a time; this empties the lists."""
    while any(subgroups):
        for subgroup in filter(None, subgroups):
            count = OBJECTS_PER_ROUND[subgroup[0]["group"]]
            yield from subgroup[:count]
            del subgroup[:count]


def _make_rows(emojis: list[Emoji], drawings: Drawings) -> Iterator[Row]:
    keyword_counts = Counter(keyword for emoji in emojis for keyword in set(emoji["keywords"]))
    num_complete = 0  # objects with all styles so far
    for rank, emoji in enumerate(emojis):
        by_style = drawings[emoji["id"]]
        held_out_style = None
        if len(by_style) == len(STYLES):
            if num_complete % 2 == 1:
                held_out_style = list(STYLES)[num_complete // 2 % len(STYLES)]
            num_complete += 1
        # Captions use keywords instead of the name, so each must belong to a single object.
        keywords = [k for k in emoji["keywords"] if keyword_counts[k] == 1 and k != emoji["label"]]
        for style in by_style:
            yield Row(
                file_name=f"images/{_make_slug(style)}/{emoji['id']}.png",
                id=emoji["id"],
                object=emoji["label"],
                style=style,
                keywords=keywords,
                group=emoji["group"],
                rank=rank,
                licence=PACKAGES[STYLES[style]][1],
                split="heldout" if style == held_out_style else "train",
            )


def _make_thumbnail(image: Image.Image) -> np.ndarray:
    """Return a drawing on gray at 16 x 16 pixels, (256, 3) in [0, 1], to compare objects by."""
    composite = Image.new("RGBA", image.size, (128, 128, 128, 255))
    composite.alpha_composite(image)
    small = composite.convert("RGB").resize((16, 16), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).reshape(256, 3) / 255


def _remove_selector(code: str) -> str:
    """Convert code points joined by hyphens to lower case, and remove the variation selector."""
    return "-".join(point for point in code.lower().split("-") if point != "fe0f")


def _make_slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("'", "").replace("’", "")).strip("-")


def _format_notice() -> str:
    lines = [
        "The images in this folder are works of others, whose licenses require attribution:",
        "",
    ]
    styles = {package: style for style, package in STYLES.items()}
    for package, (version, license_id, author, repository) in PACKAGES.items():
        source = f"{author}, https://github.com/{repository}"
        lines.append(f"{styles.get(package, 'captions')}: {source}")
        lines.append(f"    npm package {package} {version}, {license_id}")
    lines += ["", *(f"{name}: {url}" for name, url in LICENSE_URLS.items()), ""]
    lines += ["The images were rasterized and scaled, and are otherwise unchanged.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
