"""The emoji dataset, built from npm packages."""

import json

import pytest
from PIL import Image

from make_emoji_data import PACKAGES, STYLES, build_dataset

OBJECTS = {"1F34E": "red apple", "1F680": "rocket", "1F431": "cat face", "1F55B": "twelve o’clock"}
SHAPES = (
    '<circle cx="16" cy="16" r="15" fill="red"/>',
    '<path d="M16 0L32 32H0z" fill="currentColor"/>',
    '<rect width="20" height="12" fill="#04f"/>',
    '<circle cx="16" cy="16" r="9"/>',
)


@pytest.fixture
def modules(tmp_path):
    """A folder `node_modules` with small versions of the packages."""
    pytest.importorskip("resvg_py")
    slugs = [label.replace(" ", "-").replace("’", "") for label in OBJECTS.values()]
    for package in STYLES.values():
        folder = tmp_path / package
        (folder / "assets").mkdir(parents=True)
        if package.startswith("@lobehub"):
            for code in OBJECTS:
                image = Image.new("RGBA", (128, 128), (0, 128, 0, 255))
                image.save(folder / "assets" / f"{code.lower()}-fe0f.webp")
            continue
        icons = {slug: {"body": body} for slug, body in zip(slugs, SHAPES, strict=True)}
        if package.endswith("emojione"):
            del icons["cat-face"]
        (folder / "icons.json").write_text(json.dumps({"icons": icons, "width": 32}))
        if package.endswith("noto"):
            chars = dict(zip((code.lower() for code in OBJECTS), slugs, strict=True))
            (folder / "chars.json").write_text(json.dumps(chars))
    base = tmp_path / "emojibase-data"
    for folder in ("en", "meta"):
        (base / folder).mkdir(parents=True)
    emoji = [
        {"label": label, "hexcode": code, "tags": ["thing", label[:3]], "group": 3}
        | {"subgroup": 34, "version": 1, "order": order}
        for order, (code, label) in enumerate(OBJECTS.items())
    ]
    emoji.append({"label": "A", "hexcode": "1F1E6"})
    (base / "en" / "data.json").write_text(json.dumps(emoji))
    (base / "meta" / "groups.json").write_text(json.dumps({"subgroups": {"34": "mammal"}}))
    return tmp_path


def test_objects_are_drawn_in_all_styles_and_described(modules, tmp_path):
    rows = build_dataset(modules, tmp_path / "out", side=32)
    styles = {name: {row.style for row in rows if row.object == name} for name in OBJECTS.values()}
    assert styles["red apple"] == styles["rocket"] == set(STYLES)
    assert styles["cat face"] == set(STYLES) - {"emojione"}
    assert styles["twelve o’clock"] == set()
    for row in rows:
        with Image.open(tmp_path / "out" / row.file_name) as file:
            assert (file.size, file.mode) == ((32, 32), "RGBA")
    assert len([row for row in rows if row.split == "heldout"]) == 1  # every second object
    assert {row.rank for row in rows if row.object == "cat face"} == {2}
    assert {tuple(row.keywords) for row in rows} == {("red",), ("roc",), ("cat",)}  # not `thing`


def test_metadata_and_licenses_are_written_next_to_the_images(modules, tmp_path):
    rows = build_dataset(modules, tmp_path / "out", max_objects=1, side=32)
    lines = (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()
    assert len(lines) == len(rows) == 8
    notice = (tmp_path / "out" / "NOTICE").read_text()
    for package, (version, license_name, *_) in PACKAGES.items():
        assert f"{package} {version}" in notice
        assert license_name in notice
    assert {name for _, name, *_ in PACKAGES.values()} == {"MIT", "Apache-2.0", "CC-BY-4.0"}


def test_drawings_are_never_enlarged(modules, tmp_path):
    rows = build_dataset(modules, tmp_path / "out", side=192)
    assert {row.style for row in rows} == set(STYLES) - {"3d"}
    with Image.open(tmp_path / "out" / rows[0].file_name) as file:
        assert file.size == (192, 192)
