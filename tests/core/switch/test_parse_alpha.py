"""Alpha as it is written on the command line."""

import pytest

from libortho.core.errors import AlphaError
from libortho.core.switch.state import parse_alpha


@pytest.mark.parametrize(
    ("text", "meaning"),
    [("0", 0.0), (" 0.5 ", 0.5), (1, 1.0), ("hr=1;legal=0", {"hr": 1.0, "legal": 0.0}), ("hr = 1", {"hr": 1.0}),
     ({"hr": 0}, {"hr": 0.0}), ("hr=1;", {"hr": 1.0}), ("hr=1,legal=0.5", {"hr": 1.0, "legal": 0.5}),
     ("a=1, b=0;c=.5,", {"a": 1.0, "b": 0.0, "c": 0.5})],
)  # fmt: skip
def test_alpha_is_read(text, meaning):
    assert parse_alpha(text) == meaning


@pytest.mark.parametrize(
    "text",
    ["", "off", "hr=", "hr=on", "hr=1;hr=0", "hr=1,hr=1", "1,0", "0,hr=1", ",", ";", True, {"hr": True}, {}, [1.0],
     None],
)  # fmt: skip
def test_alpha_that_is_none(text):
    with pytest.raises(AlphaError, match="alpha is"):
        parse_alpha(text)


def test_an_error_names_the_streams_that_there_are():
    for text in ("hr=on", "hr=1,hr=0"):
        with pytest.raises(AlphaError, match=r"the streams are hr, legal$"):
            parse_alpha(text, ["hr", "legal"])
