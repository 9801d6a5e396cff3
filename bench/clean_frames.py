"""Sentences with a place for an identifier, and the identifiers: what bench_clean.py injects into real texts.

Two halves. "seen": frames, lists and locales of Faker that the rules were written beside. "held out": other frames and
other locales, whose misses nobody looked at. Faker's names, telephone numbers, addresses and e-mails were written by
others; names that data/cleaning/names.txt lists are left out, so that nothing is found by having been listed. {x} is
the identifier; "^" marks a frame for the
beginning of a text, "$" one for its end.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import date, timedelta

from faker import Faker

from data.cleaning.rewrite import words

Make = Callable[[random.Random], str]
LOCALES = {
    "seen": ("en_US", "de_DE", "fr_FR", "es_ES", "pl_PL", "nl_NL", "pt_BR", "cs_CZ", "fil_PH", "hr_HR", "en_NZ",
    "en_IE"),
    "held out": (
        "en_GB", "en_CA", "en_AU", "en_IN", "it_IT", "tr_TR", "sv_SE", "ro_RO", "hu_HU", "yo_NG", "id_ID", "fi_FI",
        "de_AT", "es_MX",
    ),
}  # fmt: skip

FRAMES = {
    "seen": {
        "name after a title": (
            "I saw Dr. {full} last week about this.", "Dr {last} prescribed it.",
            "My doctor, Dr. {full}, told me to rest.",
            "Mrs. {last} has the same problem.", "Prof. {full} operated on me.", "I asked Mr {last} at the clinic.",
        ),
        "sign-off": (
            "$Regards,\nDr. {full}", "$Best wishes, {full}", "$Sincerely,\n{full}, MD", "$Thanks, {first}",
            "$Kind regards {first}",
            "$- {full}, MD", "$Take care, Dr. {last}",
        ),
        "greeting": ("^Hi Dr. {last}, ", "^Hello {first}, ", "^Dear Dr {full},\n", "^Hello Doctor {last}. ",
        "^Dear Mr. {last}, "),
        "introduction": (
            "My name is {full} and I need advice.", "I am {first}, 45 years old.", "This is {full} from the clinic.",
            "my name is {lower}.", "My name's {first}.",
        ),
        "relation": ("My son {first} has it too.", "My husband, {full}, is worried.",
        "Her daughter {first} was born early."),
        "phone": ("Call me at {x}.", "My number is {x}.", "You can reach us on {x} any time.", "Phone: {x}."),
        "email": ("Write to {x} please.", "My email is {x}."),
        "record number": ("MRN: {x}.", "My patient ID is {x}.", "Case no. {x} was opened.",
        "The hospital number {x} is mine."),
        "address": ("I live at {x}.", "My address is {x}.", "Please send it to {x}."),
        "date of birth": ("DOB: {x}.", "I was born on {x}.", "My date of birth is {x}."),
    },
    "held out": {
        "name after a title": (
            "The tablets come from Dr {full}.", "We were sent to Prof. {last} for a second look.",
            "Then Ms. {full} took my blood.",
            "According to Dr. {last}'s letter it is harmless.", "Is Mr. {full} right?",
            "Last year Doctor {full} found a cyst.",
        ),
        "sign-off": (
            "$Yours sincerely,\nDr {full}", "$Warm regards,\n{full}", "$Many thanks,\n{first} {last}",
            "$With best wishes,\n{first}",
            "$Dr. {full}, MBBS, MD", "$Cheers, {first}", "$Thank you, {full}",
        ),
        "greeting": (
            "^Good morning Dr. {full}, ", "^Hey {first}, ", "^Dear {first},\n", "^Hello Dr {last} ",
            "^Good evening Mrs {last}. ",
        ),
        "introduction": (
            "Hello, my name is {full}, I need a second opinion.", "I'm {full}, a 36 year old woman.",
            "My name: {full}.",
            "This is {first}, and I am worried.", "I am {full} from the north.", "my name is {lower} and i feel sick.",
        ),
        "relation": (
            "My wife {first} cannot sleep.", "Our baby, {first}, cries all night.", "His mother {full} had cancer.",
            "My friend {full} had this.",
        ),
        "phone": ("Please phone {x} tomorrow.", "Mobile {x}.", "I can be contacted on {x} after six.",
        "Tel. {x}, evenings only."),
        "email": ("Reports go to {x}, thanks.", "Contact: {x}", "(mail {x})"),
        "record number": (
            "Medical record number {x}, ward 4.", "My insurance policy number is {x}.", "Chart #{x} has the details.",
            "Patient No: {x}", "File number {x} says otherwise.",
        ),
        "address": ("Our home address is {x}.", "She lives at {x}.", "The parcel went to {x}, not to me."),
        "date of birth": ("Born: {x}.", "My birthday is {x}.", "Date of birth {x}, male.",
        "She was born {x} in a small town."),
    },
}  # fmt: skip

_FIRST = (
    "Oluwaseun", "Ngozi", "Thandiwe", "Siobhan", "Wojciech", "Ayaan", "Xiomara", "Dagny", "Quentin", "Bronislava",
    "Tadeusz",
    "Nguyet", "Zlata", "Ilse", "Rutger", "Candelaria", "Fionnuala", "Mbali", "Parveen", "Haluk", "Jean-Luc", "Ødger",
)  # fmt: skip
_LAST = (
    "Abernathy", "Okonkwo", "Szymanski", "van der Meer", "O'Shaughnessy", "Al-Rashid", "Krishnamurthy", "Grünwald",
    "Håkansson",
    "de la Cruz", "Yildirim", "Papandreou", "Featherstone", "Nkemelu", "Vuković", "Çelik", "McAllister", "Tanaka-Hill",
)  # fmt: skip
_STREETS = ("Maple Street", "Old Mill Road", "Elm Avenue", "King's Lane", "Park Drive", "Station Rd", "Hill St")
_TOWNS = ("Springfield, IL 62704", "London NW1 6XE", "Leeds", "Austin, TX", "Toronto, ON M5V 2T6", "Portland")


def digits(rng: random.Random, shape: str) -> str:
    """The shape with every # a random digit, the first of which is none that a number cannot begin with."""
    return "".join(str(rng.randint(2, 9) if i == 0 or shape[i - 1] in " (-+" else rng.randint(0, 9)) if c == "#" else c
                   for i, c in enumerate(shape))  # fmt: skip


def fakers(half: str, seed: int, method: str) -> list[Faker]:
    """A seeded generator for each locale of a half that has the method."""
    found = []
    for i, locale in enumerate(LOCALES[half]):
        faker = Faker(locale)
        faker.seed_instance(seed + i)
        if hasattr(faker, method):
            found.append(faker)
    return found


def makers(half: str) -> dict[str, Make]:
    """What to fill a frame's {x} with, by kind; names are made by people()."""
    calling, mailing, living = fakers(half, 0, "phone_number"), fakers(half, 100, "email"), fakers(half, 200, "address")
    made: dict[str, Make] = {
        "phone": lambda r: r.choice(calling).phone_number(),
        "email": lambda r: r.choice(mailing).email(),
        "address": lambda r: r.choice(living).address().replace("\n", ", "),
    }
    if half == "held out":
        records = ("#######", "MR########", "##/######", "X##-###-###", "### ### ####", "P#####-##")
        dates = ("%Y-%m-%d", "%d.%m.%Y", "%d %B %Y", "%b %d %Y", "%m/%d/%y")
    else:
        records = ("########", "AB-######", "##-####-##", "H#######")
        dates = ("%d/%m/%Y", "%m-%d-%Y", "%B %d, %Y", "%d %b %Y")
        phones = (
            "(###) ###-####",
            "###-###-####",
            "+44 20 #### ####",
            "+91 ##### #####",
            "+1 ###.###.####",
            "0## #### ####",
        )
        own: dict[str, Make] = {
            "phone": lambda r: digits(r, r.choice(phones)),
            "email": lambda r: (
                f"{r.choice(_FIRST).lower()}.{r.randint(1, 99)}@{r.choice(('example.com', 'mail.co.uk'))}"
            ),
            "address": lambda r: f"{r.randint(1, 999)} {r.choice(_STREETS)}, {r.choice(_TOWNS)}",
        }
        made = {kind: _either(own[kind], made[kind]) for kind in own}
    made["record number"] = lambda r: digits(r, r.choice(records))
    made["date of birth"] = lambda r: _date(r).strftime(r.choice(dates))
    return made


def _either(a: Make, b: Make) -> Make:
    return lambda r: r.choice((a, b))(r)


def _date(rng: random.Random) -> date:
    return date(1930, 1, 1) + timedelta(days=rng.randrange(30000))


def people(half: str) -> Callable[[random.Random], tuple[str, str]]:
    """A function that makes a given and a family name."""
    listed = words("names.txt")
    named = fakers(half, 300, "first_name")

    def unlisted(make: Callable[[], str]) -> str:
        while True:
            name = make()
            if not any(part.lower() in listed for part in name.replace("-", " ").split()):
                return name

    def person(rng: random.Random) -> tuple[str, str]:
        if half == "seen" and rng.random() < 0.5:
            return rng.choice(_FIRST), rng.choice(_LAST)
        faker = rng.choice(named)
        return unlisted(faker.first_name), unlisted(faker.last_name)

    return person


def filled(
    kind: str, frame: str, rng: random.Random, make: dict[str, Make], person: Callable[..., tuple[str, str]]
) -> tuple[str, str]:
    """A frame with an identifier in it, and the identifier."""
    if kind in make:
        x = make[kind](rng)
        return frame.replace("{x}", x), x
    first, last = person(rng)
    values = {"first": first, "last": last, "full": f"{first} {last}", "lower": first.lower()}
    used = next(key for key in ("full", "lower", "first", "last") if "{" + key + "}" in frame)
    identifier = f"{first} {last}" if "{first} {last}" in frame else values[used]
    return frame.format(**values), identifier
