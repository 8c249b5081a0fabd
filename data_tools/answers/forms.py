"""Where a completion says its answer: one table of forms, one function that reads them.

    form          asked for and found as                      form          asked for and found as
    boxed         \\boxed{42}                                  hashes        a last line #### 42
    tagged        <answer> 42 </answer>                       answer_line   a last line Answer: 42

The last one of the asked form counts; where there is none, the last box. An answer that was begun and not ended, such
as \\boxed{4 without its brace, is no answer, and neither is what stood before it. Marks around an answer (bold type,
dollars, a lead such as "The answer is", commas and backslashes after it) are no part of it.
"""

import re
from collections.abc import Callable, Iterator

_BOX = re.compile(r"\\(?:boxed|fboxed|fbox)(?![a-zA-Z])\s*|(?<![\\a-zA-Z])boxed(?={)")
_JOINT = re.compile(  # between two boxes that are one answer: \boxed{1} and $x=\boxed{2}$
    r"[\s$.)\]\\]*(?:,|;|\b(?:and|or)\b|\\text\s*{\s*(?:,\s*)?(?:and|or)\s*})[\s$(\[\\]*(?:(?:and|or)\b)?[\s$(\[\\]*"
    r"(?:[a-zA-Z](?:_{?\w+}?)?\s*=\s*)?"
)
_OPENING, _CLOSING = re.compile(r"<answer>", re.IGNORECASE), re.compile(r"</answer>", re.IGNORECASE)
_HASHES = re.compile(r"(?:^[ \t>*_]*|(?<=\s))####(?!#)[ \t]*(.*)$", re.MULTILINE)
_LINE = re.compile(
    r"^[ \t>*_#+•-]*(?:(?:so|thus|hence|therefore),?[ \t]+)?(?:(?:the|my)[ \t]+)?(?:final[ \t]+)?answer(?:[ \t]+is)?"
    r"[ \t*_]*[:：][ \t*_]*(.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_HEADING = re.compile(  # of a section, where an answer was asked for
    r"[\s*_]*(?:explanation|verification|verify|check(?:ing)?|notes?|summary|conclusion|solution|reasoning|justification|"
    r"discussion|remarks?|(?:the\s+)?(?:final\s+)?answer|proof|steps?(?:\s+\d+)?|part\s+\w+|working|method)"
    r"(?:\s*[:：].*|[\s*_.]*)",
    re.IGNORECASE | re.DOTALL,
)
_ANSWER_HEADING = re.compile(r"[\s*_]*(?:the\s+)?(?:final\s+)?answer[\s*_:：.]*", re.IGNORECASE)
_LEAD = re.compile(
    r"^(?:(?:so|thus|hence|therefore),?\s+)?(?:(?:the|my|our)\s+)?(?:(?:final|correct)\s+)?(?:answer|result)"
    r"(?:\s+is(?![a-zA-Z])|\s*[:：])\s*[:：]?\s*",
    re.IGNORECASE,
)
_TEXT_LEAD = re.compile(r"^\\text\w*\s*{\s*(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*[:：]?\s*}\s*", re.IGNORECASE)
_PAIRS = (  # marks that enclose a whole answer
    ("**", "**"),
    ("__", "__"),
    ("``", "``"),
    ("`", "`"),
    ("*", "*"),
    ("$$", "$$"),
    ("$", "$"),
    (r"\(", r"\)"),
    (r"\[", r"\]"),
)
_LONELY = ("**", "__")  # one of which is left where the other stands before the form's own words: **Answer: 34**
_THINKING = re.compile(r"</think>")
_HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
_CHANNEL = re.compile(  # as in <|channel|>final <|constrain|>json<|message|>{"action": "[2]"}<|return|>
    r"<\|channel\|>\s*(\w+)(?:[^<]|<\|constrain\|>)*<\|message\|>(.*?)(?=<\|(?:end|start|return|call)\|>|\Z)", re.DOTALL
)


def final_text(completion: str) -> str | None:
    """Return what a completion says to the user: its last message in the final channel, or what follows its thoughts.

    None where there is none yet: a harmony completion without a final channel, thoughts that are not ended.
    """
    if channels := _CHANNEL.findall(completion):
        finals = [text for name, text in channels if name == "final"]
        return finals[-1] if finals else None
    if any(token in completion for token in _HARMONY):  # a message whose header is broken or names no channel
        return None
    thoughts = list(_THINKING.finditer(completion))
    rest = completion[thoughts[-1].end() :] if thoughts else completion
    return None if "<think>" in rest else rest


def find_answer(completion: str, form: str) -> str | None:
    """Return what the completion answers, as it is written; None when there is no whole answer in an accepted form."""
    answer = FORMS[form](completion)
    if answer is None:
        answer = last_boxed(completion)
    return bare(answer) if answer else None


def bare(answer: str) -> str | None:
    """Return the answer without its marks; None where nothing is left."""
    if re.search(r"\\(?:boxed|fbox)(?![a-zA-Z])", answer):
        answer = last_boxed(answer) or ""
    before = None
    while answer != before:
        before = answer
        answer = _TEXT_LEAD.sub("", _LEAD.sub("", answer.strip()))
        answer = (
            re.sub(r"(?:\\\\|(?<!\\)\\(?=\s*$)|[\s,;:]|(?<!\.)\.(?=\W*$)|\\[,;:!])+$", "", answer)
            if answer != "."
            else ""
        )
        answer = _outside(answer)
    return answer or None


def _outside(answer: str) -> str:
    """Return the answer without one pair of marks around the whole."""
    for begin, end in _PAIRS:
        inner = answer[len(begin) : len(answer) - len(end)]
        if len(answer) > len(begin) + len(end) and answer.startswith(begin) and answer.endswith(end):
            if begin not in inner and end not in inner:
                return inner.strip()
    for mark in _LONELY:
        if answer.count(mark) == 1:
            answer = answer.removeprefix(mark).removesuffix(mark).strip()
    for begin, end in ((r"\(", r"\)"), (r"\[", r"\]")):
        if answer.startswith(begin) and end not in answer:
            answer = answer.removeprefix(begin).strip()
    return answer


# -- the forms --------------------------------------------------------------------------------------------------------


def last_boxed(text: str) -> str | None:
    """Return what the last box holds: several that are joined by a comma, `and` or `or` as one list.

    None where there is none, or where the last one is not closed.
    """
    boxes = list(_boxes(text))
    if not boxes or boxes[-1][2] is None:
        return None
    last, held = [boxes[-1]], boxes[-1][2]
    for box in reversed(boxes[:-1]):
        between = text[box[1] : last[0][0]]
        if box[2] is None or not _JOINT.fullmatch(between):
            break
        last.insert(0, box)
        held = f"{box[2]}{' or ' if re.search(r'(?<![a-z])or(?![a-z])', between) else ', '}{held}"
    return held


def _boxes(text: str) -> Iterator[tuple[int, int, str | None]]:
    """Yield (start, end, what it holds or None where it is not closed) of the boxes that lie in no other one."""
    place = 0
    while match := _BOX.search(text, place):
        begin = match.end()
        if text[begin : begin + 1] == "{":
            close = closing(text, begin)
            place = len(text) if close is None else close + 1
            yield match.start(), place, None if close is None else text[begin + 1 : close]
        else:  # \boxed 34
            bared = re.compile(r"[^\n$]*?(?=\$|\\\)|\\\]|\n|[.,;]?(?:\s|\Z))").match(text, begin)
            place = max(bared.end() if bared else begin, match.end())
            yield match.start(), place, bared[0] if bared and bared[0].strip() else None


def closing(text: str, begin: int) -> int | None:
    """Return the place of the brace that closes the one at `begin`, None where none does."""
    depth, place = 0, begin
    while place < len(text):
        if text[place] == "\\":
            place += 2  # what a backslash stands before is no brace of its own: \{, and \\ ends a row
            continue
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place
        place += 1
    return None


def _tagged(text: str) -> str | None:
    """Return what stands between the last tags; "" where the last one is not closed."""
    begins = [match.end() for match in _OPENING.finditer(text)]
    if not begins:
        return None
    end = _CLOSING.search(text, begins[-1])
    return text[begins[-1] : end.start()] if end else ""


def _hashes(text: str) -> str | None:
    """Return what follows the last #### that is no heading of a section, or the heading `#### Answer`."""
    for match in reversed(list(_HASHES.finditer(text))):
        said, after = match[1].strip(), text[match.end() :].strip()
        if not said or _ANSWER_HEADING.fullmatch(said):
            if not after.startswith("#"):
                return _whole("", after)
        elif not _HEADING.fullmatch(said) or _ANSWER_HEADING.match(said):
            if not (after and _is_words(said)):
                return said
    return None


def _answer_line(text: str) -> str | None:
    """Return what follows the last `Answer:` that begins a line; a formula over several lines as a whole."""
    lines = list(_LINE.finditer(text))
    return _whole(lines[-1][1], text[lines[-1].end() :]) if lines else None


def _whole(said: str, after: str) -> str:
    """Return what is said in a line, or in the next one that is not empty; a displayed formula up to its end."""
    if not said.strip(" \t*_"):
        said, _, after = after.strip().partition("\n")
    for begin, end in ((r"\[", r"\]"), ("$$", "$$")):
        if said.strip().startswith(begin) and end not in said.strip()[2:]:
            inner, closed, _ = after.partition(end)
            return f"{said}\n{inner}{closed}" if closed else ""
    return said


def _is_words(text: str) -> bool:
    return bool(re.fullmatch(r"[\s*_]*[A-Za-z][A-Za-z\s,'*_:-]*", text)) and len(text.strip("*_ ")) > 1


FORMS: dict[str, Callable[[str], str | None]] = {
    "boxed": last_boxed,
    "tagged": _tagged,
    "hashes": _hashes,
    "answer_line": _answer_line,
}
