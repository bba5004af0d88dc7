"""Lays out TOFU as the other scripts read it, and writes the small cut of it.

    python benchmarks/tofu_data.py SOURCE                 to $LIBORTHO_DATA/tofu and $LIBORTHO_DATA/tofu_mini
    python benchmarks/tofu_data.py SOURCE --out DATA      to DATA/tofu and DATA/tofu_mini

SOURCE holds the files of locuslab/TOFU (MIT) under their own names: NAME.json or NAME.jsonl with one row a line, or
NAME.parquet, or a folder NAME of parquet files. Parquet needs pyarrow. The cut is the same on every machine: forget05;
the 400 questions about retained authors that TOFU perturbs, and 200 more; and 200 that no model is trained on. The last
400 rows were drawn once, and are named below by their position in ``full``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _common import DATA

Rows = list[dict[str, Any]]
NAMES = (
    "full", "forget01", "forget05", "forget10", "retain90", "retain95", "retain99", "forget01_perturbed",
    "forget05_perturbed", "forget10_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed",
)  # fmt: skip
ROWS, FORGET, PERTURBED = 4000, slice(3800, 4000), slice(0, 400)
"""Rows of ``full``, and where forget05 and retain_perturbed lie in it."""
RETAINED = (
    1978, 3505, 2123, 566, 1461, 2495, 2391, 2059, 3611, 1643, 2353, 1867, 2790, 1295, 2468, 971, 1555, 973, 3496,
    789, 2933, 3675, 1427, 2582, 3289, 3719, 2866, 1002, 1671, 805, 3390, 703, 3202, 1753, 2334, 2693, 813, 1850,
    2179, 1696, 2903, 3024, 1238, 2664, 2354, 2214, 2536, 1467, 656, 3698, 2648, 458, 783, 3348, 2034, 3310, 3779,
    3616, 3137, 2962, 404, 2907, 2422, 3792, 1765, 1400, 3392, 1733, 3283, 658, 1183, 2725, 1309, 1378, 3691, 984,
    3690, 2625, 2235, 774, 730, 1711, 2481, 2405, 847, 1635, 2658, 1593, 3295, 912, 2643, 1763, 3737, 2614, 1233,
    2871, 2642, 2807, 1579, 2223, 776, 2843, 3669, 1977, 1699, 2758, 1392, 1590, 1154, 1176, 3765, 1165, 536,
    2910, 3090, 1466, 2352, 683, 768, 3181, 3504, 934, 1013, 559, 729, 3265, 3798, 2615, 3200, 2003, 2549, 1529,
    2538, 3725, 1365, 1282, 3184, 2816, 3781, 2118, 2775, 1528, 2246, 2418, 3105, 3027, 3269, 3650, 1864, 738,
    1729, 873, 2393, 2805, 2982, 1774, 1180, 1396, 467, 3397, 1511, 880, 3290, 1304, 1924, 3655, 1099, 2146, 3742,
    655, 3608, 1000, 3258, 1297, 586, 3747, 2751, 2998, 2589, 2867, 3188, 704, 510, 910, 3001, 1173, 2884, 2760,
    891, 775, 1917, 876, 550, 2881, 489, 1198, 1158, 3342, 908, 2363,
)  # fmt: skip
HELD_BACK = (
    1321, 3559, 664, 3357, 498, 2765, 2248, 3099, 843, 1535, 701, 1363, 711, 3214, 1714, 1926, 2291, 1189, 2584,
    2428, 571, 2996, 841, 3442, 2099, 1270, 1536, 1960, 3577, 2441, 2878, 1137, 3435, 3328, 1288, 3736, 648, 3343,
    1091, 1107, 1892, 2700, 1494, 916, 2997, 2316, 3298, 1162, 456, 2446, 3365, 2178, 2876, 2606, 1759, 3223,
    1954, 2088, 3259, 1495, 1071, 2837, 3407, 452, 2385, 3621, 743, 1863, 3609, 598, 1625, 992, 1448, 3712, 2490,
    1934, 3056, 1656, 3331, 1963, 2969, 3155, 3101, 981, 3512, 1754, 2086, 3649, 2198, 3230, 750, 407, 2988, 1241,
    3439, 1857, 1098, 1445, 1373, 3170, 2341, 2046, 3487, 3332, 2872, 535, 2147, 3452, 2868, 2215, 3758, 3280,
    3482, 602, 1122, 2329, 675, 1532, 3451, 1088, 2333, 2691, 2513, 2840, 3030, 3682, 400, 569, 2545, 1822, 1762,
    2427, 615, 2201, 1222, 2783, 3153, 761, 3552, 972, 463, 2144, 3354, 2211, 1782, 414, 1333, 461, 3519, 3679,
    410, 3340, 2696, 3064, 828, 1232, 923, 3048, 3224, 1267, 1719, 1621, 3398, 1197, 838, 2463, 2122, 3129, 753,
    494, 1600, 2365, 907, 1519, 986, 3242, 2663, 3206, 1911, 904, 1075, 1615, 480, 583, 576, 1299, 3364, 1534,
    2828, 1776, 1996, 582, 3653, 3450, 3045, 3249, 3495, 3203, 2388, 3183,
)  # fmt: skip
"""Positions in ``full`` of the other retained rows, and of those that no model is trained on."""


def stored(source: Path, name: str) -> Rows:
    """The rows of one file of TOFU, whatever its form."""
    for file in (source / f"{name}.json", source / f"{name}.jsonl"):
        if file.is_file():
            return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    parts = [p for p in (source / f"{name}.parquet", *sorted((source / name).glob("*.parquet"))) if p.is_file()]
    if not parts:
        raise SystemExit(f"{source} has no {name}: expected {name}.json, .jsonl, .parquet or a folder of parquet files")
    from pyarrow import parquet

    return [row for part in parts for row in parquet.read_table(part).to_pylist()]


def cut(full: Sequence[dict[str, Any]], perturbed: Rows) -> dict[str, Rows]:
    """The files of the small cut, from ``full`` and forget05_perturbed."""
    if len(full) != ROWS:
        raise SystemExit(f"full has {len(full)} rows; expected the {ROWS} of TOFU")
    plain = [{k: row[k] for k in ("question", "answer")} for row in full]
    forget = plain[FORGET]
    if [row["question"] for row in perturbed] != [row["question"] for row in forget]:
        raise SystemExit("forget05_perturbed does not ask the questions of the last 200 rows of full")
    retain = [*plain[PERTURBED], *(plain[i] for i in RETAINED)]
    return {
        "forget": forget,
        "forget_perturbed": perturbed,
        "retain": retain,
        "full": [*forget, *retain],
        "holdout": [plain[i] for i in HELD_BACK],
    }


def write(folder: Path, files: Mapping[str, Rows]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, default=DATA, help="directory of the data; default: $LIBORTHO_DATA")
    arguments = parser.parse_args()
    files = {name: stored(arguments.source, name) for name in NAMES}
    small = cut(files["full"], files["forget05_perturbed"])
    if arguments.source.resolve() != (arguments.out / "tofu").resolve():
        write(arguments.out / "tofu", files)
    write(arguments.out / "tofu_mini", small)


if __name__ == "__main__":
    main()
