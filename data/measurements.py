"""Numbers of a thermometer, cuff, meter or pills in a text -> words that phrases can hold. Called by mentions.py.

Takes and returns text in lower case. Standard library only.
"""

from __future__ import annotations

import re

_TEMPERATURE = re.compile(
    r"\b(?:(temperature|temp|fever|t)\b[^.\d]{0,25}?)?\b(\d{2,3}(?:\.\d+)?)\s*(?:°|º|degrees?)?\s*(c|f|celsius|fahrenheit|centigrade)?\b"
)
_PRESSURE = re.compile(r"\b(\d{2,3})\s*(?:/|over)\s*(\d{2,3})\b")
# So many that nobody is told to take them at once; what is counted, not weighed ("500 mg tablets").
_PILLS = re.compile(
    r"\b(\d{1,3}|ten|eleven|twelve|fifteen|eighteen|(?:twen|thir|for|fif|six)ty|hundred)"
    r"(?= (?:(?!mg|mcg|ml|grams?)[a-z]+ ){0,3}?(?:pills?|tablets?|capsules?|tabs|"
    r"paracetamols?|ibuprofens?|aspirins?|tylenols?|painkillers|antidepressants|antihistamines|co codamol|sleepers)\b)"
)
MANY_PILLS = 8
_NUMBERS = (
    # what it is called, at least, word for that, at most, word for that
    (re.compile(r"\b(?:spo2|o2|oxygen|saturation|sats?)\b[^.\d]{0,30}?(\d{2,3})\s*%?"), None, "", 92, "lowoxygen"),
    (re.compile(r"\b(?:heart rate|pulse|hr)\b[^.\d]{0,20}?(\d{2,3})\b"), 130, "fastpulse", 39, "slowpulse"),
    (
        re.compile(r"\b(?:blood sugar|glucose|sugar)\b[^.\d]{0,20}?(\d{2,4})\b(?!\.)"),
        400,
        "highsugar",
        54,
        "lowsugar",
    ),
    (re.compile(r"\b(?:respiratory rate|breathing rate|rr)\b[^.\d]{0,20}?(\d{2})\b"), 30, "fastbreathing", None, ""),
)


def measured(text: str) -> str:
    """Numbers as words: "39.5 C" is "39.5 fever", "temp 104 f" "... highfever", "20 pills" "20 manypills pills"."""
    text = _TEMPERATURE.sub(_temperature, text)
    text = _PRESSURE.sub(_pressure, text)
    text = _PILLS.sub(lambda m: m[0] if m[1].isdigit() and int(m[1]) < MANY_PILLS else f"{m[0]} manypills", text)
    for pattern, high, above, low, below in _NUMBERS:
        text = pattern.sub(
            lambda m, high=high, above=above, low=low, below=below: (
                f"{m[0]} {above if high and int(m[1]) >= high else below if low and 10 < int(m[1]) <= low else ''} "
            ),
            text,
        )
    return text


def _temperature(m: re.Match[str]) -> str:
    named, value, unit = m[1], float(m[2]), m[3] or ""
    celsius = value if unit[:1] == "c" or (not unit and value < 50) else (value - 32) / 1.8
    if not (named or unit or "°" in m[0] or "degree" in m[0]) or not 30 <= celsius <= 44:
        return m[0]
    if celsius < 37.9:
        return "coldbody" if celsius < 35 else ""
    return f"{m[0]} {'highfever' if celsius >= 40 else 'fever'} "


def _pressure(m: re.Match[str]) -> str:
    upper, lower = int(m[1]), int(m[2])
    if upper <= lower or not (40 <= upper <= 300 and 20 <= lower <= 200):
        return m[0]
    return (
        "highpressure"
        if upper >= 180 or lower >= 120
        else "raisedpressure"
        if upper >= 140 or lower >= 90
        else "lowpressure"
        if upper < 85
        else ""
    )
