"""The letter of a choice in what a model answers: B, b, (B), B., Option B, \\mathrm{B}, B. 42, I choose B.

Where several choices are named, or none for certain, there is no letter: nothing is guessed.
"""

import re

from data_tools.answers.spelling import spelled

_ALONE = re.compile(r"[(\[]? ?([A-Za-z]) ?[)\]]?[.:,)]?")
_LABELLED = re.compile(
    r"[(\[] ?([A-Z]) ?[)\]][.:]?(?![A-Za-z])|([A-Z])(?:[.:)]|(?= ?[-–] ))"
)  # before the choice's own text
_SAID = re.compile(
    r"(?:\b(?:option|choice|answer|letter|choose|chose|pick|select|think|believe|guess|is|be|go with)\b[ :]*"
    r"(?:is\b|option\b|choice\b|letter\b)?[ :]*)"
    r"[(\[]? ?([A-Za-z])(?![A-Za-z'])(?: ?[)\]])?",
    re.IGNORECASE,
)
_FIRST = re.compile(
    r"[(\[]? ?([A-Z]) ?[)\]]? (?:is|would be|must be)(?: the)? (?:correct|right|best|answer)", re.IGNORECASE
)
_NOT = re.compile(
    r"\b(?:not|no|nor|never|neither|none|wrong|incorrect|false|except|eliminated?|isn't|aren't|either)\b", re.IGNORECASE
)
_STANDING = re.compile(r"(?<![A-Za-z'\\_^])([A-Z])(?![A-Za-z'_^])")
_AFTER_A_LETTER = re.compile(  # never after the article in `is a dog`
    r"(?:or|and|because|since|as|so|but|which|is|was)(?![\w-])"
)
_JOINED = re.compile(r"(?:,|/|&|;|\b(?:or|and)\b) ?(?:option |choice )?[(\[]? ?([A-Z])(?![A-Za-z'])", re.IGNORECASE)


def letter_of(answer: str, letters: str) -> str | None:
    """Return the one letter among `letters` that an answer names, None where it names none or several."""
    text = re.sub(r"[⟦⟧{}*_`\"]", "", spelled(answer)).strip().rstrip(".,; ")
    text = re.sub(r"\s+", " ", text)
    if match := _ALONE.fullmatch(text):
        return _among(match[1], letters)
    if match := _LABELLED.match(text):
        rest = text[match.end() :].strip()
        joined = _JOINED.match(rest) or re.search(r"(?:or|and) [(\[]?[A-Z][).:\]]", rest)  # B. 42 or C. 43
        other = any(_is_letter(match, rest) for match in _SAID.finditer(rest))
        return None if joined or other else _among(match[1] or match[2], letters)
    if _NOT.search(text):
        return None
    said = {match[1].upper() for match in _SAID.finditer(text) if _is_letter(match, text)}
    said |= {match[1].upper() for match in [_FIRST.match(text)] if match}
    others = {match[1] for match in _STANDING.finditer(text) if match[1] not in "AI" and match[1] in letters}
    if match := _JOINED.search(text):
        others.add(match[1].upper())
    named = said | others if said else set()
    return _among(named.pop(), letters) if len(named) == 1 else None


def _is_letter(match: re.Match, text: str) -> bool:
    """Return whether what follows `is` is a choice and no word: not the article in `is a dog`."""
    letter, rest = match[1], text[match.end() :].strip()
    if match[0].endswith((")", "]")) or (letter == "A" and _AFTER_A_LETTER.match(rest)):
        return True
    if letter.islower():
        return not rest and letter not in "ai"
    return letter not in "AI" or not rest or not rest[0].isalpha()


def _among(letter: str, letters: str) -> str | None:
    return letter.upper() if letter.upper() in letters else None
