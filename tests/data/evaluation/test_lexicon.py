"""Names found in a text."""

from __future__ import annotations

from data.evaluation.lexicon import Lexicon


def test_the_longest_name_counts() -> None:
    lexicon = Lexicon(
        {
            "diseases": {"glaucoma": "glaucoma", "acute glaucoma": "acute glaucoma", "UTI": "urinary tract infection"},
            "medications": {"Air": "air", "eye drops": "eye drops"},
        }
    )
    assert lexicon.find("An acute glaucoma, or Glaucomas; a uti. Eye drop.") == [
        ("diseases", "acute glaucoma"),
        ("diseases", "glaucoma"),
        ("diseases", "urinary tract infection"),
        ("medications", "eye drops"),
    ]
    assert lexicon.find("repair, airy") == []
    assert Lexicon({}).find("anything") == []
