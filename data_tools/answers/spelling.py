"""One spelling of what can be written in several ways without meaning anything else: characters, LaTeX's fonts and
spaces.

spelled("½")  = spelled("\\dfrac12")  = \\frac{1}{2}            spelled("\\text{ cm}") = ⟦ cm ⟧, words inside a formula
spelled("–5") = -5                                             spelled("\\{1\\}") = ⦃1⦄, the braces of a set
"""

import re
import unicodedata

from data_tools.answers.forms import closing

ROW = "␤"  # LaTeX's \\\\, which ends a row of a matrix

_FRACTIONS = dict(zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒", (
    "12 13 23 14 34 15 25 35 45 16 56 17 18 38 58 78 19 1X".split()
)))  # fmt: skip
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n"))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789"))
_CHARACTERS = {
    **dict.fromkeys("−–—‒‐‑﹣", "-"),
    **dict.fromkeys("\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006", " "),
    **dict.fromkeys("\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""), "×": r"\times ",
    "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ",
    "÷": "/", "∕": "/", "⁄": "/", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ", "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∞": r"\infty ",
    "°": r"^{\circ}", "º": r"^{\circ}", "±": r"\pm ", "∓": r"\mp ", "π": r"\pi ", "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "ℕ": r"\mathbb{N}", "ℂ": r"\mathbb{C}",
    "’": "'", "‘": "'", "′": "'", "“": '"', "”": '"',
    "…": r"\ldots ", "％": r"\%", "，": ",", "：": ":", "；": ";", "（": "(", "）": ")",
    **{chr(code): f"\\{unicodedata.name(chr(code)).split()[-1].lower()} " for code in range(0x3B1, 0x3CA)
       if code not in (0x3C0, 0x3BF, 0x3C2)},
}  # fmt: skip
_TABLE = str.maketrans({**{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}, **_CHARACTERS})

_SYNONYMS = tuple((re.compile(pattern), new) for pattern, new in (
    (r"\\(?:d|t|c|nice|s)frac(?![a-zA-Z])|\\sfrac", r"\\frac"),
    (r"\\{2}(?:\[[\d.]+\s*[a-z]+\])?", ROW),
    (r",\s*\\!\s*", ","), (r"\{\s*,\s*\}", ","), (r"\{\s*:\s*\}", ":"), (r"\\!", ""),
    (r"\\(?:left|right|middle)\s*\.", ""),
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|bf|rm|it|sf|tt|"
     r"large|Large|LARGE|huge|small|normalsize|boldmath|null)(?![a-zA-Z])", ""),
    (r"\\(?:qquad|quad|enspace|thinspace|medspace|thickspace)(?![a-zA-Z])|\\[,;: ]|~", " "),
    (r"\\color\s*\{[^{}]*\}|\\color\s+\w+", ""),
    (r"\\(?:lbrace(?![a-zA-Z])|\{)", "⦃"), (r"\\(?:rbrace(?![a-zA-Z])|\})", "⦄"),
    (r"\\(?:lbrack)(?![a-zA-Z])", "["), (r"\\(?:rbrack)(?![a-zA-Z])", "]"),
    (r"\\(?:leq|leqslant)(?![a-zA-Z])", r"\\le "), (r"\\(?:geq|geqslant)(?![a-zA-Z])", r"\\ge "),
    (r"\\lt(?![a-zA-Z])", "<"), (r"\\gt(?![a-zA-Z])", ">"), (r"<=", r"\\le "), (r">=", r"\\ge "),
    (r"\\neq(?![a-zA-Z])", r"\\ne "), (r"\\(?:varnothing)(?![a-zA-Z])", r"\\emptyset "),
    (r"\\(?:dots|dotsc|cdots)(?![a-zA-Z])|\.\.\.+", r"\\ldots "),
    (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])|\\degree(?![a-zA-Z])", r"^{\\circ}"),
    (r"\\(?:lang|langle)(?![a-zA-Z])", "⟨"), (r"\\(?:rang|rangle)(?![a-zA-Z])", "⟩"),
    (r"\\(?:in)(?=[\[({⦃])", r"\\in "), (r"\\%|％", "%"),
    (r"\\[$]", "＄"), (r"\\(?:euro|texteuro)(?![a-zA-Z])(?:\{\})?", "€"),
    (r"\\(?:pounds|textsterling)(?![a-zA-Z])(?:\{\})?", "£"),
))  # fmt: skip
_WORDS = re.compile(
    r"\\(?:text|textrm|textbf|textit|textsf|texttt|textnormal|textup|mbox|hbox|mathrm|operatorname\*?)\s*\{"
)
_FONTS = re.compile(
    r"\\(?:mathbf|mathit|mathsf|mathtt|boldsymbol|bold|bm|pmb|underline|emph|mathnormal|ensuremath)\s*\{"
)
_COLORED = re.compile(r"\\(?:textcolor|colorbox)\s*\{[^{}]*\}\s*\{")
_BETWEEN_DIGITS = re.compile(r"(?<=\d)[$`]+(?=\d)")  # 3$4 is no 34
_POWER = re.compile(r"(?<=[\w)}\]])\*\*(?=[\d({-]|[a-zA-Z](?![a-zA-Z]))")  # as programs write it; **5** is bold
_BLANK_NEXT = re.compile(r"\s+")


def spelled(text: str) -> str:
    """Return the text in one spelling; what means something stays as it is."""
    text = _characters(text)
    if "\\begin" not in text:
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)  # \\\\frac, where a backslash was escaped once too often
    for pattern, new in _SYNONYMS:
        text = pattern.sub(new, text)
    text = _unwrapped(_unwrapped(_unwrapped(text, _COLORED, "", ""), _FONTS, "", ""), _WORDS, "⟦", "⟧")
    text = _POWER.sub("^", _BETWEEN_DIGITS.sub(" ", text))
    text = text.replace("$", "").replace("`", "").replace("**", "") if "⟦" not in text else text.replace("$", "")
    return _BLANK_NEXT.sub(" ", _fractions(text)).strip(f" {ROW}")


def _characters(text: str) -> str:
    """Return the text without characters that stand for LaTeX commands."""
    text = re.sub(f"[{''.join(_FRACTIONS)}]", lambda m: _vulgar(m[0]), text)
    text = _set_off(_set_off(text, _RAISED, "^"), _LOWERED, "_")
    text = re.sub(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[a-zA-Z]))",
                  lambda m: f"\\sqrt{{{m[1] or m[2] or m[3]}}}", text)  # fmt: skip
    return text.translate(_TABLE)


def _set_off(text: str, characters: dict[str, str], mark: str) -> str:
    """Return the text with runs of these characters, such as ¹², spelled as LaTeX: ^{12}."""
    return re.sub(f"[{''.join(characters)}]+", lambda m: f"{mark}{{{''.join(characters[c] for c in m[0])}}}", text)


def _vulgar(character: str) -> str:
    numerator, denominator = tuple(_FRACTIONS[character])
    return f"\\frac{{{numerator}}}{{{'10' if denominator == 'X' else denominator}}}"


def _unwrapped(text: str, command: re.Pattern, before: str, after: str) -> str:
    """Return what a command encloses, between `before` and `after`, in place of the command."""
    while match := command.search(text):
        end = closing(text, match.end() - 1)
        if end is None:
            return text
        text = f"{text[: match.start()]}{before}{text[match.end() : end]}{after}{text[end + 1 :]}"
    return text


def _fractions(text: str) -> str:
    """Return the text with braces around what \\frac divides: \\frac12, \\frac 59, \\frac{270}7; a whole `1 \\over 2`
    too."""
    if match := re.fullmatch(r"\{?\s*([^{}\\]+?)\s*\\over(?![a-zA-Z])\s*([^{}\\]+?)\s*\}?", text):
        text = f"\\frac{{{match[1]}}}{{{match[2]}}}"
    parts, place = [], 0
    for match in re.finditer(r"\\(frac|sqrt)(?![a-zA-Z])\s*", text):
        if match.start() < place:
            continue
        parts.append(text[place : match.start()])
        place, arguments = match.end(), []
        for _ in range(2 if match[1] == "frac" else 1):
            argument, place = _argument(text, place)
            arguments.append(argument)
        if arguments[0] == "[":  # \sqrt[3]{…}
            parts.append(text[match.start() : place])
        else:
            parts.append(f"\\{match[1]}" + "".join(f"{{{_fractions(inner)}}}" for inner in arguments))
    return "".join([*parts, text[place:]])


def _argument(text: str, place: int) -> tuple[str, int]:
    """Return a LaTeX argument that begins at `place` or after spaces there, and the place behind it."""
    while text[place : place + 1] == " ":
        place += 1
    if text[place : place + 1] == "{":
        end = closing(text, place)
        return (text[place + 1 : end], end + 1) if end is not None else (text[place + 1 :], len(text))
    match = re.compile(r"\\[a-zA-Z]+|.", re.DOTALL).match(text, place)
    return (match[0], match.end()) if match else ("", place)
