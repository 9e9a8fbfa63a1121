"""ROI territories of the simulated cortex, and the label tables of NSD's atlases.

Every voxel of visual cortex belongs to one area. An area lies in one region of the
`streams` atlas and may have a label in other atlases.
"""

from __future__ import annotations

from dataclasses import dataclass

ATLASES: dict[str, dict[int, str]] = {
    "nsdgeneral": {1: "nsdgeneral"},
    "prf-visualrois": {1: "V1v", 2: "V1d", 3: "V2v", 4: "V2d", 5: "V3v", 6: "V3d", 7: "hV4"},
    "prf-eccrois": {1: "ecc0pt5", 2: "ecc1", 3: "ecc2", 4: "ecc4", 5: "ecc4+"},
    "floc-faces": {1: "OFA", 2: "FFA-1", 3: "FFA-2", 4: "mTL-faces", 5: "aTL-faces"},
    "floc-bodies": {1: "EBA", 2: "FBA-1", 3: "FBA-2", 4: "mTL-bodies"},
    "floc-places": {1: "OPA", 2: "PPA", 3: "RSC"},
    "floc-words": {1: "OWFA", 2: "VWFA-1", 3: "VWFA-2", 4: "mfs-words", 5: "mTL-words"},
    "streams": {
        1: "early",
        2: "midventral",
        3: "midlateral",
        4: "midparietal",
        5: "ventral",
        6: "lateral",
        7: "parietal",
    },
    "Kastner2015": {
        **dict(enumerate(("V1v", "V1d", "V2v", "V2d", "V3v", "V3d", "hV4"), start=1)),
        **dict(enumerate(("VO1", "VO2", "PHC1", "PHC2", "TO2", "TO1", "LO2", "LO1"), start=8)),
        **dict(enumerate(("V3B", "V3A", "IPS0", "IPS1", "IPS2", "IPS3", "IPS4"), start=16)),
        **dict(enumerate(("IPS5", "SPL1", "FEF"), start=23)),
    },
}
"""Label k of each atlas volume; −1 is "not cortex", 0 "cortex without label"."""

ECCENTRICITY_EDGES = (0.5, 1.0, 2.0, 4.0)
"""Degrees between the labels of prf-eccrois."""
EARLY, MID, HIGHER = 0, 1, 2


@dataclass(frozen=True)
class Area:
    """One territory and what is planted in it.

    Parameters
    ----------
    name
        ROI name, or the name of the stream region it fills up.
    stream
        Label name in the `streams` atlas; empty when it has none.
    tier
        Which planted local share holds: `EARLY`, `MID` or `HIGHER`.
    ceiling
        Median noise ceiling NC(3), r² units.
    receptive_field
        Intercept (degrees) and slope of pRF size against eccentricity.
    exponent
        Compressive exponent of the local drive.
    prefers
        Weights of the global drive on object categories and scenes by name; empty: drawn.
    """

    name: str
    stream: str
    tier: int
    ceiling: float
    receptive_field: tuple[float, float]
    exponent: float
    prefers: dict[str, float] | None = None


@dataclass(frozen=True)
class Wedge:
    """An area bounded by polar coordinates of the hemisphere's surface, in degrees.

    `theta` is the angle from the occipital pole; `psi` turns around the pole from medial (0)
    to superior (90), lateral (±180) and inferior (−90).
    """

    area: str
    theta: tuple[float, float]
    psi: tuple[float, float]


@dataclass(frozen=True)
class Disc:
    """An area within a radius (degrees) of a centre on the hemisphere's surface."""

    area: str
    theta: float
    psi: float
    radius: float


_FIELD = {"V1": (0.25, 0.07), "V2": (0.35, 0.12), "V3": (0.5, 0.17), "high": (1.2, 0.4)}
_PLACES = {"house": 1.0, "street": 0.8, "interior": 0.9, "mountain": 0.4, "face": -0.4}
_FACES = {"face": 1.0, "animal": 0.35, "body": 0.15, "house": -0.3}
_BODIES = {"body": 1.0, "animal": 0.5, "tool": 0.2, "face": 0.15, "house": -0.2}
_WORDS = {"word": 1.0, "face": 0.15, "tool": 0.15, "street": 0.2}

AREAS = {
    area.name: area
    for area in (
        Area("V1v", "early", EARLY, 0.37, _FIELD["V1"], 0.5),
        Area("V1d", "early", EARLY, 0.37, _FIELD["V1"], 0.5),
        Area("V2v", "early", EARLY, 0.31, _FIELD["V2"], 0.45),
        Area("V2d", "early", EARLY, 0.31, _FIELD["V2"], 0.45),
        Area("V3v", "early", EARLY, 0.28, _FIELD["V3"], 0.4),
        Area("V3d", "early", EARLY, 0.28, _FIELD["V3"], 0.4),
        Area("hV4", "midventral", MID, 0.26, (0.6, 0.3), 0.35, {"food": 0.5, "word": 0.3}),
        Area("midventral", "midventral", MID, 0.20, (0.8, 0.35), 0.3),
        Area("midlateral", "midlateral", MID, 0.20, (0.8, 0.35), 0.3),
        Area("midparietal", "midparietal", MID, 0.20, (0.8, 0.35), 0.3),
        Area("OFA", "midlateral", MID, 0.18, (0.8, 0.35), 0.3, _FACES),
        Area("OWFA", "midlateral", MID, 0.16, (0.8, 0.35), 0.3, _WORDS),
        Area("ventral", "ventral", HIGHER, 0.12, _FIELD["high"], 0.25),
        Area("lateral", "lateral", HIGHER, 0.13, _FIELD["high"], 0.25),
        Area("parietal", "parietal", HIGHER, 0.12, _FIELD["high"], 0.25),
        Area("FFA-1", "ventral", HIGHER, 0.15, _FIELD["high"], 0.25, _FACES),
        Area("FFA-2", "ventral", HIGHER, 0.14, _FIELD["high"], 0.25, _FACES),
        Area("FBA-1", "ventral", HIGHER, 0.13, _FIELD["high"], 0.25, _BODIES),
        Area("FBA-2", "ventral", HIGHER, 0.13, _FIELD["high"], 0.25, _BODIES),
        Area("PPA", "ventral", HIGHER, 0.14, _FIELD["high"], 0.25, _PLACES),
        Area("VWFA-1", "ventral", HIGHER, 0.12, _FIELD["high"], 0.25, _WORDS),
        Area("VWFA-2", "ventral", HIGHER, 0.10, _FIELD["high"], 0.25, _WORDS),
        Area("EBA", "lateral", HIGHER, 0.18, _FIELD["high"], 0.25, _BODIES),
        Area("OPA", "parietal", HIGHER, 0.15, _FIELD["high"], 0.25, _PLACES),
        Area("RSC", "", HIGHER, 0.12, _FIELD["high"], 0.25, _PLACES),
    )
}

WEDGES = (
    Wedge("V1v", (0, 64), (-32, 0)),
    Wedge("V1d", (0, 64), (0, 32)),
    Wedge("V2v", (0, 64), (-60, -32)),
    Wedge("V2d", (0, 64), (32, 60)),
    Wedge("V3v", (0, 64), (-86, -60)),
    Wedge("V3d", (0, 64), (60, 86)),
    Wedge("hV4", (0, 52), (-124, -86)),
    Wedge("midventral", (52, 64), (-124, -86)),
    Wedge("midlateral", (0, 64), (-180, -124)),
    Wedge("midlateral", (0, 64), (124, 180)),
    Wedge("midparietal", (0, 64), (86, 124)),
    Wedge("ventral", (64, 106), (-140, -30)),
    Wedge("lateral", (64, 98), (-180, -140)),
    Wedge("lateral", (64, 98), (155, 180)),
    Wedge("parietal", (64, 92), (40, 155)),
)
"""Angles between which the areas lie; discs are cut out of them."""
DISCS = (
    Disc("OFA", 48, -166, 12),
    Disc("OWFA", 50, -138, 11),
    Disc("VWFA-1", 74, -128, 9.5),
    Disc("VWFA-2", 95, -128, 9.5),
    Disc("FFA-1", 74, -107, 9.5),
    Disc("FFA-2", 95, -107, 9.5),
    Disc("FBA-1", 74, -86, 9.5),
    Disc("FBA-2", 95, -86, 9.5),
    Disc("PPA", 84, -56, 15),
    Disc("EBA", 80, 180, 15),
    Disc("OPA", 76, 128, 14),
    Disc("RSC", 86, 6, 14),
)
"""Patches around a centre."""

_KASTNER_OF_REST = {
    "midventral": "VO1",
    "midlateral": "LO1",
    "midparietal": "V3A",
    "parietal": "IPS0",
}


def label_name(area: Area, atlas: str) -> str:
    """Name of the label an area has in an atlas; empty when it has none there."""
    if atlas == "nsdgeneral":
        return "nsdgeneral"
    if atlas == "streams":
        return area.stream
    name = _KASTNER_OF_REST.get(area.name, area.name) if atlas == "Kastner2015" else area.name
    return name if name in ATLASES[atlas].values() else ""
