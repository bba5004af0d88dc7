import re
from importlib import resources

import pytest


def schemes() -> dict[str, dict[str, str]]:
    css = resources.files("libortho.auditing.page").joinpath("report.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    variables = {
        name: dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        for name, block in (("light", light), ("dark", dark))
    }
    assert variables["dark"].keys() == variables["light"].keys()
    return variables


def luminance(colour: str) -> float:
    """Relative luminance of sRGB (WCAG 2.2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(scheme: str) -> None:
    colours = schemes()[scheme]
    texts = (
        "ink",
        "soft",
        "pass",
        "fail",
        "held",
        "off",
        "on",
        "reference",
        "original",
        "quantised",
        "random",
        "magnitude",
    )
    pairs = [(text, ground) for text in texts for ground in ("paper", "card")]
    pairs += [("ink", "wash"), ("soft", "wash"), ("on-status", "pass"), ("on-status", "fail"), ("ink", "mask")]
    for text, ground in pairs:
        a, b = sorted((luminance(colours[text]), luminance(colours[ground])))
        assert (b + 0.05) / (a + 0.05) >= 4.5, (text, ground)
