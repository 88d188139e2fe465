"""Build the sprite sheet of the quality world from the npm package of the drawings.

    npm pack emoji-datasource-google@16.0.0
    python -m benchmarks.quality.build_sprites emoji-datasource-google-16.0.0.tgz

Writes `world/sprites.png`, `world/sprites.json` and, from the two photographs in `examples/images`, `world/grounds.png`
(a PNG, because JPEG decoders do not agree to the last bit and scenes must be the same everywhere).
"""

import argparse
import hashlib
import io
import json
import tarfile
from pathlib import Path

from PIL import Image

PACKAGE = "emoji-datasource-google-16.0.0.tgz"
SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
WORLD = Path(__file__).parent / "world"
PHOTOGRAPHS = Path(__file__).parents[2] / "examples" / "images"
COLUMNS, SPRITE, GROUND = 8, 64, 224

# Name, plural, code point: kinds that a person can tell apart at 28 pixels and name with one word.
KINDS = """
dog dogs 1f436|cat cats 1f431|horse horses 1f40e|pig pigs 1f437|elephant elephants 1f418|zebra zebras 1f993
monkey monkeys 1f435|frog frogs 1f438|penguin penguins 1f427|owl owls 1f989|duck ducks 1f986|bee bees 1f41d
octopus octopuses 1f419|snail snails 1f40c|turtle turtles 1f422|whale whales 1f433|fox foxes 1f98a|panda pandas 1f43c
parrot parrots 1f99c|ladybug ladybugs 1f41e
pizza pizzas 1f355|apple apples 1f34e|banana bananas 1f34c|carrot carrots 1f955|eggplant eggplants 1f346
strawberry strawberries 1f353|pineapple pineapples 1f34d|watermelon watermelons 1f349|burger burgers 1f354
donut donuts 1f369|avocado avocados 1f951|mushroom mushrooms 1f344|pretzel pretzels 1f968|lollipop lollipops 1f36d
tulip tulips 1f337|sunflower sunflowers 1f33b|cactus cactuses 1f335|tree trees 1f333|clover clovers 1f340
leaf leaves 1f341
car cars 1f697|bus buses 1f68c|train trains 1f682|truck trucks 1f69a|tractor tractors 1f69c|scooter scooters 1f6f5
sailboat sailboats 26f5|rocket rockets 1f680|helicopter helicopters 1f681
anchor anchors 2693|key keys 1f511|guitar guitars 1f3b8|drum drums 1f941|umbrella umbrellas 2614|camera cameras 1f4f7
clock clocks 23f0|crown crowns 1f451|bucket buckets 1faa3|book books 1f4d5|pencil pencils 270f-fe0f|house houses 1f3e0
dress dresses 1f457|snowman snowmen 26c4|ladder ladders 1fa9c
"""


def kinds() -> list[dict[str, str]]:
    """Return the rows of the index, in the order of the sheet."""
    rows = [row.split() for line in KINDS.split("\n") for row in line.split("|") if row]
    return [{"name": name, "plural": plural, "codepoint": code} for name, plural, code in rows]


def sprite_sheet(package: Path) -> Image.Image:
    """Arrange the drawings, unchanged, `COLUMNS` to a row.

    Raises
    ------
    ValueError
        If the package is not the one this sheet is made from.
    """
    content = package.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise ValueError(f"{package} has the SHA-256 {found}; {PACKAGE} has {SHA256}.")
    rows = kinds()
    sheet = Image.new("RGBA", (COLUMNS * SPRITE, -(-len(rows) // COLUMNS) * SPRITE))
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for place, row in enumerate(rows):
            drawing = archive.extractfile(f"package/img/google/64/{row['codepoint']}.png")
            if drawing is None:
                raise ValueError(f"{package} holds no drawing {row['codepoint']} ({row['name']}).")
            at = place % COLUMNS * SPRITE, place // COLUMNS * SPRITE
            sheet.paste(Image.open(io.BytesIO(drawing.read())).convert("RGBA"), at)
    return sheet


def grounds() -> Image.Image:
    """Cut squares out of the photographs and put them side by side, small: as grounds they are blurred anyway."""
    strip = Image.new("RGB", (2 * GROUND, GROUND))
    for place, name in enumerate(("astronaut.jpg", "coffee.jpg")):
        photograph = Image.open(PHOTOGRAPHS / name).convert("RGB")
        side = min(photograph.size)
        left, top = (photograph.width - side) // 2, (photograph.height - side) // 2
        square = photograph.crop((left, top, left + side, top + side))
        strip.paste(square.resize((GROUND, GROUND), Image.Resampling.LANCZOS), (place * GROUND, 0))
    return strip


def main() -> None:
    """Write sheet, index and grounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help=f"{PACKAGE}, as `npm pack` fetches it")
    sheet = sprite_sheet(parser.parse_args().package)
    sheet.save(WORLD / "sprites.png", optimize=True)
    grounds().save(WORLD / "grounds.png", optimize=True)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in kinds())
    (WORLD / "sprites.json").write_text(f"[\n{lines}\n]\n")
    print(f"{len(kinds())} kinds in {WORLD}")


if __name__ == "__main__":
    main()
