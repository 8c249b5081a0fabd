"""A chat template of a stranger takes a bounded number of steps and characters, and no bound is near what any needs."""

from datetime import date

import pytest

from data_tools.base import bounds
from data_tools.chats import template_bounds
from data_tools.chats.conversation import Conversation
from data_tools.chats.template import ChatTemplate, Overdone, TemplateError
from data_tools.mistake import UserMistake
from tests.data_tools.chats import TOOLS, call, message, template_of

LOOP = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DOUBLED = "{% set ns = namespace(x=['x', messages]) %}{% for i in range(99) %}{% set ns.x = WHAT %}{% endfor %}"
TAKES_TOO_MUCH = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops over lists": "{% for i in range(999) %}{% set x = range(99999)|list %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a text times a number": "{{ 'a' * 10**10 }}",
    "a number times a text": "{{ 10**10 * 'a' }}",
    "a list times a number": "{% set x = [messages] * 10**9 %}",
    "numbers": "{% set ns = namespace(n=9) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "a power": "{{ (9**9**9)**99999 }}",
    "sums": "{% set ns = namespace(s='xx') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "joins": "{% set ns = namespace(s='xx') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "blocks": "{% set ns = namespace(s='xx') %}{% for i in range(99) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"
              "{% endfor %}",
    "what is written": "{% set x = 'x' * 10**7 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "many texts": "{% set ns = namespace(x=[]) %}{% for i in range(999) %}{% set ns.x = ns.x + ['x' * 10**7] %}"
                  "{% endfor %}",
    "slices": "{% set x = 'x' * 10**7 %}{% set ns = namespace(x=[]) %}{% for i in range(999) %}"
              "{% set ns.x = ns.x + [x[1:]] %}{% endfor %}",
    "center": "{{ 'x'|center(10**10) }}",
    "a folded filter": "{{ 'x'|center(10000000000) }}",
    "indent": "{{ ('x\n' * 99999)|indent(99999) }}",
    "format": "{{ '%1000000000d'|format(1) }}",
    "%": "{{ '%1000000000d' % 1 }}",
    "% by an argument": "{{ '%*d' % (1000000000, 1) }}",
    "str.format": "{{ '{:1000000000}'.format(1) }}",
    "str.format by an argument": "{{ '{:{}}'.format(1, 1000000000) }}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "zfill": "{{ 'x'.zfill(10**9) }}",
    "replace": "{{ ('x' * 99999)|replace('x', 'y' * 99999) }}",
    "str.replace": "{{ ('x' * 99999).replace('', 'y' * 99999) }}",
    "join": "{{ range(99999)|join('x' * 99999) }}",
    "str.join": "{{ ('x' * 99999).join('y' * 99999) }}",
    "expandtabs": "{{ ('\t' * 99999).expandtabs(99999) }}",
    "translate": "{{ ('x' * 99999).translate({120: 'y' * 99999}) }}",
    "strftime": "{{ strftime_now('%100000000d') }}",
    "batch": "{{ range(9)|batch(10**9, 'x')|list }}",
    "round": "{{ 1.5|round(10**9, 'ceil') }}",
    "tojson": "{{ messages|tojson(indent=10**9) }}",
    "lists of lists": DOUBLED.replace("WHAT", "[ns.x, ns.x]") + "{{ ns.x }}",
    "tuples of tuples": DOUBLED.replace("WHAT", "(ns.x, ns.x)") + "{{ ns.x|tojson }}",
    "mappings of mappings": DOUBLED.replace("WHAT", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x|string }}",
    "dicts of dicts": DOUBLED.replace("WHAT", "dict(a=ns.x, b=ns.x)") + "{{ ns.x ~ '' }}",
    "arguments of macros": "{% macro f(ns) %}{% set ns.x = varargs %}{% endmacro %}"
                           + DOUBLED.replace("{% set ns.x = WHAT %}", "{{ f(ns, ns.x, ns.x) }}"),
    "namespaces": "{% set a = namespace(x=1) %}{{ a }}",
}  # fmt: skip
DAY = date(2026, 1, 1)


@pytest.fixture
def few_steps(monkeypatch):
    """So that they are taken soon."""
    monkeypatch.setattr(template_bounds, "MOST_STEPS", 50_000)
    monkeypatch.setattr(template_bounds, "MOST_CHARACTERS", 1 << 24)
    monkeypatch.setattr(template_bounds, "MOST_MADE", 1 << 26)


@pytest.mark.parametrize("kind", TAKES_TOO_MUCH)
def test_a_template_that_takes_too_much_is_refused_in_one_line_when_it_is_loaded(kind, few_steps):
    with pytest.raises(UserMistake, match="^chat template: .*mend the template$") as refused:
        ChatTemplate(TAKES_TOO_MUCH[kind] + LOOP, {}, {}, DAY)
    assert any(word in str(refused.value) for word in ("it takes", "it makes", "it formats", "it writes", "is given"))


def test_a_template_that_takes_too_much_of_one_conversation_alone_refuses_that():
    template = ChatTemplate(LOOP + "{% if messages|length > 5 %}{{ 'x' * 10**10 }}{% endif %}", {}, {}, DAY)
    pair = [message("user", "a"), message("assistant", "b")]
    assert template.text(Conversation(pair))
    with pytest.raises(Overdone, match="makes a text of 10,000,000,000 characters; the most is 67,108,864"):
        template.text(Conversation(pair * 3))
    assert template.text(Conversation(pair))


def test_the_clock_ends_what_steps_do_not_see(monkeypatch):
    monkeypatch.setattr(template_bounds, "MOST_SECONDS", -1)
    with pytest.raises(UserMistake, match="takes more than -1 seconds"):
        ChatTemplate("{% for i in range(999) %}{% endfor %}" + LOOP, {}, {}, DAY)


TOO_DEEP = {
    "brackets": "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
    "lists": "{{ " + "[" * 500 + "]" * 500 + " }}",
    "not": "{{ " + "not " * 5000 + "1 }}",
    "blocks": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "digits": "{{ " + "9" * 5000 + " }}",
    "length": "x" * (bounds.TEMPLATE.most + 1),
}


@pytest.mark.parametrize("kind", TOO_DEEP)
def test_a_template_that_is_too_deep_or_too_long_is_refused_in_one_line(kind):
    with pytest.raises(UserMistake, match="chat template"):
        ChatTemplate(TOO_DEEP[kind] + LOOP, {}, {}, DAY)


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "nemotron_3_nano", "deepseekv3", "gemma4_v5"])
def test_no_bound_is_near_what_a_conversation_of_a_thousand_messages_takes(name):
    template = ChatTemplate(template_of(name), {"bos_token": "<s>"}, {}, DAY)
    turn = [
        message("user", "a " * 400),
        message("assistant", "", tool_calls=[{**call("add", a=2, b=2), "id": "call00001"}]),
        message("tool", "b " * 400, name="add", tool_call_id="call00001"),
        message("assistant", "c " * 400),
    ]
    text = template.text(Conversation(turn * 250, TOOLS * 20))
    sandbox = template._environment
    assert len(text) > 500_000
    assert template_bounds.MOST_STEPS > 20 * (template_bounds.MOST_STEPS - sandbox._steps)
    assert template_bounds.MOST_MADE > 20 * sandbox._made


def test_what_no_bound_forbids_is_written_as_jinja_writes_it():
    source = (
        "{{ 'a' * 3 }}{{ [1, 2] + [3] }}{{ 'a' ~ 1 ~ none }}{{ '%05d' % 7 }}{{ '{:>5}'.format('x') }}{{ 'abc'[1:] }}"
        "{{ ['a', 'b']|join(', ') }}{{ 'x\ny'|indent(2) }}{{ 'a'|center(5) }}{{ 2**10 }}{{ 1.25|round(1) }}"
        "{{ {'a': (1, 2)}|tojson }}{{ 1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9 + 10 }}{{ range(3)|list }}{{ dict(a=1) }}"
    )
    text = "aaa[1, 2, 3]a1None00007    xbca, bx\n  y  a  10241.2" + '{"a": [1, 2]}' + "55[0, 1, 2]{'a': 1}"
    assert ChatTemplate(source + LOOP, {}, {}, DAY).text(Conversation([])) == text


def test_chance_is_no_part_of_a_template():
    with pytest.raises(TemplateError, match="'lipsum' is undefined"):
        ChatTemplate("{{ lipsum() }}" + LOOP, {}, {}, DAY).text(Conversation([]))
