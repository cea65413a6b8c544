"""COCO-Stuff's 27 coarse classes: the 12 supercategories of things, then the 15 of stuff, and what belongs to each."""

from typing import NamedTuple

THINGS = 12  # so many coarse classes come first and are things

# Fine categories by COCO's ids, as COCO-Stuff's own hierarchy groups them; ids 1 to 91 are things, 92 to 182 stuff.
_TABLE = """
electronic: 72 tv, 73 laptop, 74 mouse, 75 remote, 76 keyboard, 77 cell phone
appliance: 78 microwave, 79 oven, 80 toaster, 81 sink, 82 refrigerator, 83 blender
food: 52 banana, 53 apple, 54 sandwich, 55 orange, 56 broccoli, 57 carrot, 58 hot dog, 59 pizza, 60 donut, 61 cake
furniture: 62 chair, 63 couch, 64 potted plant, 65 bed, 66 mirror, 67 dining table, 68 window, 69 desk, 70 toilet,
    71 door
indoor: 84 book, 85 clock, 86 vase, 87 scissors, 88 teddy bear, 89 hair drier, 90 toothbrush, 91 hair brush
kitchen: 44 bottle, 45 plate, 46 wine glass, 47 cup, 48 fork, 49 knife, 50 spoon, 51 bowl
accessory: 26 hat, 27 backpack, 28 umbrella, 29 shoe, 30 eye glasses, 31 handbag, 32 tie, 33 suitcase
animal: 16 bird, 17 cat, 18 dog, 19 horse, 20 sheep, 21 cow, 22 elephant, 23 bear, 24 zebra, 25 giraffe
outdoor: 10 traffic light, 11 fire hydrant, 12 street sign, 13 stop sign, 14 parking meter, 15 bench
person: 1 person
sports: 34 frisbee, 35 skis, 36 snowboard, 37 sports ball, 38 kite, 39 baseball bat, 40 baseball glove, 41 skateboard,
    42 surfboard, 43 tennis racket
vehicle: 2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat
ceiling: 102 ceiling-other, 103 ceiling-tile
floor: 101 carpet, 114 floor-marble, 115 floor-other, 116 floor-stone, 117 floor-tile, 118 floor-wood
food-stuff: 121 food-other, 122 fruit, 153 salad, 170 vegetable
furniture-stuff: 98 cabinet, 107 counter, 108 cupboard, 110 desk-stuff, 112 door-stuff, 123 furniture-other, 130 light,
    133 mirror-stuff, 156 shelf, 161 stairs, 165 table
raw-material: 100 cardboard, 132 metal, 139 paper, 143 plastic
textile: 92 banner, 93 blanket, 104 cloth, 105 clothes, 109 curtain, 131 mat, 137 napkin, 141 pillow, 152 rug,
    167 textile-other, 168 towel
wall: 171 wall-brick, 172 wall-concrete, 173 wall-other, 174 wall-panel, 175 wall-stone, 176 wall-tile, 177 wall-wood
window: 180 window-blind, 181 window-other
building: 95 bridge, 96 building-other, 128 house, 151 roof, 158 skyscraper, 166 tent
ground: 111 dirt, 125 gravel, 126 ground-other, 136 mud, 140 pavement, 144 platform, 145 playingfield, 147 railroad,
    149 road, 154 sand, 159 snow
plant: 94 branch, 97 bush, 119 flower, 124 grass, 129 leaves, 134 moss, 142 plant-other, 163 straw, 169 tree
sky: 106 clouds, 157 sky-other
solid: 127 hill, 135 mountain, 150 rock, 160 solid-other, 162 stone, 182 wood
structural: 99 cage, 113 fence, 138 net, 146 railing, 164 structural-other
water: 120 fog, 148 river, 155 sea, 178 water-other, 179 waterdrops
"""


class Fine(NamedTuple):
    """A fine category: its name, and the row of its coarse class in NAMES."""

    name: str
    coarse: int


def _read(table: str) -> tuple[tuple[str, ...], dict[int, Fine]]:
    names: list[str] = []
    fine: dict[int, Fine] = {}
    for line in table.replace("\n    ", " ").strip().splitlines():
        name, members = line.split(": ")
        for member in members.split(", "):
            number, label = member.split(" ", 1)
            fine[int(number)] = Fine(label, len(names))
        names.append(name)
    return tuple(names), fine


NAMES, FINE = _read(_TABLE)


def categories() -> list[dict[str, object]]:
    """The coarse classes as a COCO json lists them, with ids 1 to 27 and the fine ids of each."""
    return [
        {"id": row + 1, "name": name, "supercategory": "thing" if row < THINGS else "stuff",
         "isthing": int(row < THINGS), "fine": sorted(i for i, fine in FINE.items() if fine.coarse == row)}
        for row, name in enumerate(NAMES)
    ]  # fmt: skip
