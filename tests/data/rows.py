"""Rows of a disease database for the tests of dialogue generation."""

from __future__ import annotations

from data.diseases import Entry

FLU = Entry(
    1, "made", "0", "Influenza", ("flu",), ("Fever", "Cough", "Muscle pain", "Chills"),
    ("Rapid influenza test", "Plain x-ray (X ray)"), ("Oseltamivir (Tamiflu)", "Acetaminophen"), "", "", "",
)  # fmt: skip
STROKE = Entry(
    2, "made", "1", "Stroke", (), ("Slurred speech", "Facial weakness", "Leg weakness"),
    ("CAT scan of head (Head ct)", "Glucose measurement (Glucose level)"), ("Alteplase", "Aspirin"), "", "",
    "emergency",
)  # fmt: skip
BURN = Entry(
    3, "made", "2", "Sunburn (skin burn)", (), ("Skin pain", "Redness"),
    (), ("Lidocaine Topical", "Glucose", "Aloe Vera Topical"), "", "", "routine",
)  # fmt: skip
BARE = Entry(4, "made", "3", "Hiccups", (), ("Hiccups",), (), (), "", "", "")
ROWS = (FLU, STROKE, BURN, BARE)
