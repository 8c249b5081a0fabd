"""Units that answers are given in: what each measures, and how many of the first one of its kind it is."""

import re
from fractions import Fraction

# kind: (spellings, size in the kind's first unit)
_KINDS: dict[str, tuple[tuple[str, str], ...]] = {
    "length": (
        ("m meter metre", "1"), ("cm centimeter centimetre", "1/100"), ("mm millimeter millimetre", "1/1000"),
        ("km kilometer kilometre", "1000"), ("in inch inches", "0.0254"), ("ft foot feet", "0.3048"),
        ("yd yard", "0.9144"), ("mi mile", "1609.344"),
    ),
    "mass": (
        ("g gram", "1"), ("kg kilogram", "1000"), ("mg milligram", "1/1000"), ("lb lbs pound", "453.59237"),
        ("oz ounce", "28.349523125"), ("ton", "ton"), ("tonne", "1000000"),
    ),
    "time": (
        ("s sec second", "1"), ("min mins minute", "60"), ("h hr hrs hour", "3600"), ("day", "86400"),
        ("week", "604800"), ("month", "month"), ("yr year", "year"), ("ms millisecond", "1/1000"),
    ),
    "volume": (("L liter litre", "1"), ("mL ml milliliter millilitre", "1/1000"),
               ("gal gallon", "gallon"), ("cup", "cup")),
    "angle": (("deg degree ^{\\circ}", "1"), ("rad radian", "radian")),
    "dollars": (("＄ USD usd dollar buck", "1"), ("¢ cent", "1/100")),
    "euros": (("€ EUR eur euro", "1"),),
    "pounds sterling": (("£ GBP gbp", "1"),),
    "yen": (("¥ JPY yen", "1"),),
    "rupees": (("₹ Rs rupee", "1"),),
    "speed": (("mph mi/h", "1"), ("kmh kph km/h", "km/h"), ("m/s", "m/s")),
    "energy": (("J joule", "1"),), "power": (("W watt", "1"),), "force": (("N newton", "1"),),
    "temperature": (("^{\\circ}C ^{\\circ} C celsius", "C"), ("^{\\circ}F ^{\\circ} F fahrenheit", "F"),
                    ("K kelvin", "K")),
    "half of the day": (("am a.m a.m.", "am"), ("pm p.m p.m.", "pm")),
    "square units": (("sq", "sq"),), "units": (("unit", "1"),),
}  # fmt: skip
Unit = tuple[str, "Fraction | str"]  # (what is measured, size in the first unit of its kind or the unit's own name)
CURRENCIES = "＄€£¥₹"
MULTIPLIERS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_NO_UNITS = frozenset(  # words after a number that say something else about it
    "squared cubed factorial times plus minus over more less than fewer or and to not if when where mod modulo is are "
    "percent half quarter third base approximately about at least most up down through until but maybe "
    "possibly either neither option choice halves thirds quarters fourths fifths sixths sevenths eighths ninths tenths "
    "hundredths greater smaller between with without by into multiplied divided choose doubled tripled halved point "
    "root sqrt remainder negative positive below above under beneath wrong incorrect false isn't aren't unless except "
    "mille permille basis dozens hundreds thousands millions billions "
    "lakh lakhs crore crores score gross imaginary reversed "
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion trillion "
    "fourth fifth sixth seventh eighth ninth tenth eleventh twelfth sixteenth twentieth hundredth thousandth "
    "millionth billionth elevenths twelfths sixteenths twentieths thousandths millionths billionths".split()
)
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*\.?")


def _spellings() -> dict[str, tuple[str, "Fraction | str"]]:
    units: dict[str, tuple[str, Fraction | str]] = {}
    for kind, rows in _KINDS.items():
        for names, size in rows:
            value: Fraction | str = Fraction(size) if re.fullmatch(r"[\d./]+", size) else size
            for name in names.split() if "circ} " not in names else re.split(r" (?=\^)| (?=[a-z])", names):
                units[name] = (kind, value)
                if len(name) > 2 and name.isalpha():
                    units[f"{name}s"] = (kind, value)
    return units


_FOUND = _spellings()


def unit_of(text: str) -> Unit | None:
    """Return what is measured, and the size: a number where it can be changed into others of its kind, else its name.

    The power belongs to the kind: `cm^2` measures length^2. Words that are no known unit, such as `apples`, are a kind
    of their own. Return None for what is no unit.
    """
    text = text.replace("⟦", "").replace("⟧", "").strip()
    if text in _FOUND:
        return _FOUND[text]
    match = re.fullmatch(r"(.+?)\s*(?:\^\s*\{?\s*(\d)\s*\}?)", text)
    power, name = (int(match[2]), match[1].strip()) if match else (1, text)
    if power == 1:
        power, name = _power_in_words(name)
    if (known := _FOUND.get(name) or _FOUND.get(name.lower())) and (len(name) > 1 or name in _FOUND):
        kind, size = known
        return (kind if power == 1 else f"{kind}^{power}", size**power if isinstance(size, Fraction) else size)
    return None if match or not name else _counted_things(name)


def _power_in_words(text: str) -> tuple[int, str]:
    """Return (2, "cm") for `square cm`."""
    for word, power in (("square ", 2), ("sq. ", 2), ("sq ", 2), ("cubic ", 3), ("cu ", 3)):
        if text.lower().startswith(word):
            return power, text[len(word) :].strip()
    return 1, text


def _counted_things(name: str) -> Unit | None:
    """Return words that are no known unit, such as `apples`, as a unit: each in the singular."""
    words = [word.rstrip(".").lower() for word in name.split()]
    if all(map(_WORD.fullmatch, name.split())) and not _NO_UNITS.intersection(words) and max(map(len, words)) > 2:
        return " ".join(word[:-1] if word.endswith("s") and len(word) > 3 else word for word in words), Fraction(1)
    return None
