"""Chat templates for tests: what real ones do, and what hostile ones would."""

from __future__ import annotations

from pyinfer.text.chat import CHATML

TEMPLATES = {
    "chatml": CHATML,
    "llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set rest = messages[1:] %}"
        "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if loop.first and system %}"
        "{% set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m.content %}"
        "{% else %}{% set text = m.content %}{% endif %}{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}{% else %}"
        "{{ ' ' ~ text.strip() ~ ' ' ~ eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    "trimmed blocks": (
        "{% for m in messages %}\n    {% if m.content %}\n{{ m.content | trim }}\n    {% endif %}\n"
        "{% endfor %}\n"
    ),
    "tools": (
        "{% if tools is not none %}{{ tools | tojson(indent=4) }}{{ tools|tojson }}{% endif %}"
        "{{ documents is none }}"
    ),
    "namespace": (
        "{% set ns = namespace(n=0, last='') %}{% for m in messages %}"
        "{% set ns.n = ns.n + m.content|length %}"
        "{% if m.content.startswith('A') and '?' in m.content %}{% set ns.last = m.content %}"
        "{% break %}{% endif %}"
        "{% if m.role != 'user' %}{% continue %}{% endif %}{{ loop.index }}{{ loop.last }}"
        "{{ loop.length }}{% endfor %}"
        "{{ ns.n }} {{ ns.last }} {{ ns.n ** 2 // 3 - 1.5 }}"
    ),
    "macros": (
        "{% macro show(value, deep=false) -%}{% if value is mapping %}{% for k, v in value.items() %}"
        "{{ k }}={{ show(v, deep=true) }};"
        "{% endfor %}{% elif value is string %}'{{ value }}'{% elif value is iterable %}"
        "{% for v in value %}{{ show(v) }},{% endfor %}"
        "{% else %}{{ value }}{% endif %}{%- endmacro %}{{ show(messages) }}{{ show(tools) }}"
        "{% macro w() %}<{{ caller(1) }}>{% endmacro %}{% call(x) w() %}{{ x }}{% endcall %}"
    ),
    "methods in loops": (
        "{% for m in messages %}{% set parts = m.content.split('</think>') %}"
        "{{ parts[-1].lstrip('\\n') }}|{{ parts|length }}|"
        "{{ m.content.replace('H', 'J').upper() }}|{{ ','.join(['a', 'b']) }}|"
        "{{ m.get('x', 'none') }}|{{ m.content[1:4] }}"
        "|{{ m.content[::-1] }}|{{ '{:>5}|{}'.format(m.role, loop.index) }}|"
        "{{ '%s-%02d' % (m.role, loop.index) }}{% endfor %}"
    ),
    "filters": (
        "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|map('trim')|join('; ') }}"
        "{{ messages|rejectattr('role', 'in', ['user', 'system'])|list|length }}"
        "{{ [3, 1, 2]|sort|join(',') }}{{ [1, 1, 2]|unique|list }}"
        "{{ 'a-b'|replace('-', '+')|upper|title }}{{ nothing|default('d') }}"
        "{{ {'b': 1, 'a': 2}|dictsort }}{{ [1, 2]|first }}"
        "{{ (messages|first).role|capitalize }}{{ 'x\\ny'|indent(2) }}{{ '<'|e }}"
        "{{ messages|map(attribute='role')|unique|list }}"
        "{{ '%d' | format(3) }}{{ ['x', 'y']|reverse|list }}{{ 3.7|int }}{{ '5'|int + 1 }}"
        "{{ [1, 2, 3]|max }}{{ 1 if messages|select('none') }}"
    ),
    "blocks": (
        "{% set text %}{% for m in messages %}{{ m.role }} {% endfor %}{% endset %}[{{ text }}]"
        "{% filter upper %}abc{{ text }}{% endfilter %}"
        "{% with a = 1, b = [1, 2] %}{{ a }}{{ b }}{% endwith %}{% for i in range(3) %}{{ i }}"
        "{% else %}none{% endfor %}"
        "{% for x in [[1, [2]], [3]] recursive %}{{ x if x is number else loop(x) }}"
        "{% endfor %}{# remark #}{% raw %}{{ }}{% endraw %}"
    ),
}

NS = "{% set ns = namespace(x='aaaa', y='aaaa') %}"
TIMES = NS + "{% for i in range(90) %}"
LONG = "{% set s = 'a' * 4000000 %}{% set ns = namespace(x=[]) %}{% for i in range(99999) %}"
HOSTILE = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested text": (
        "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxxxxxxxx{% endfor %}"
        "{% endfor %}"
    ),
    "nested text in a set": (
        "{% set y %}{% for a in range(99999) %}{% for b in range(999) %}xxxxxxxx{% endfor %}"
        "{% endfor %}{% endset %}"
    ),
    "long range": "{% for a in range(10 ** 12) %}{% endfor %}",
    "text times": "{{ 'a' * 10 ** 9 }}",
    "text times times": "{{ 'a' * 1000 * 1000 * 1000 * 1000 }}",
    "list times": "{{ [1] * 10 ** 9 }}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "square": "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "double by plus": TIMES + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "double by tilde": TIMES + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "double by block": TIMES + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "double list": TIMES + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "double dict": TIMES + "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x | tojson }}",
    "double dict call": TIMES + "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "double tuples": (
        TIMES + "{% set ns.x = (ns.x, ns.x) %}{% set ns.y = (ns.y, ns.y) %}{% endfor %}{{ ns.x == ns.y }}"
    ),
    "double arguments": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1, varargs, varargs) }}{% else %}{{ varargs }}{% endif %}"
        "{% endmacro %}{{ m(60, 1) }}"
    ),
    "macro without end": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "macro that branches": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}"
    ),
    "loop in itself": "{% for a in range(999) recursive %}{{ loop(range(999)) }}{% endfor %}",
    "format": "{{ '%1000000000d' | format(1) }}",
    "percent": "{{ '%*d' % (1000000000, 1) }}",
    "str.format": "{{ '{:1000000000}'.format(1) }}",
    "str.format nested": "{{ '{:{}}'.format(1, 1000000000) }}",
    "ljust": "{{ 'a'.ljust(10 ** 9) }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "to_bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "replace": "{% set x = 'a' * 100000 %}{{ x.replace('a', x) }}",
    "replace filter": "{% set x = 'a' * 100000 %}{{ x | replace('a', x) }}",
    "join": "{% set x = 'a' * 100000 %}{{ x.join(range(99999) | map('string')) }}",
    "join filter": "{% set x = 'a' * 100000 %}{{ range(99999) | join(x) }}",
    "indent": "{{ 'a\nb' | indent(1000000000) }}",
    "tojson indent": "{{ [1] | tojson(indent=1000000000) }}",
    "round": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "slices kept": LONG + "{% set ns.x = namespace(a=s[1:], b=ns.x) %}{% endfor %}",
    "copies kept": LONG + "{% set ns.x = namespace(a=s | upper, b=ns.x) %}{% endfor %}",
    "words kept": (
        "{% set s = 'ab ' * 300000 %}{% set ns = namespace(x=0) %}{% for i in range(999) %}"
        "{% set ns.x = namespace(a=s.split(), b=ns.x) %}{% endfor %}"
    ),
    "search": (
        "{% set s = 'a' * 2000000 + 'b' %}{% for i in range(9999) %}"
        + "{{ s.find('c') }}" * 2000
        + "{% endfor %}"
    ),
    "compare": LONG + "{% if s == s[:3999999] + 'b' %}{% endif %}" * 999 + "{% endfor %}",
    "sort": (
        "{% set x = range(30000) | map('string') | list %}{% for i in range(9999) %}"
        "{% set y = x | sort %}{% endfor %}"
    ),
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ messages.__init__.__globals__ }}",
    "append": "{{ messages.append(1) }}",
    "update": "{{ messages[0].update(role='x') }}",
    "include": "{% include 'x' %}",
    "import": "{% import 'x' as y %}",
    "extends": "{% extends 'x' %}",
    "block": "{% block x %}{{ self.x() }}{% endblock %}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "nots": "{{ " + "not " * 30000 + "1 }}",
    "dots": "{{ a" + ".b" * 60000 + " }}",
    "pluses": "{{ 1" + "+1" * 60000 + " }}",
    "open braces": "{{" * 65000,
    "open remarks": "{#" * 65000,
    "digits": "{{ " + "9" * 100000 + " }}",
    "too long": "x" * 200_000,
    "no template": "{% for %}",
    "unknown filter": "{{ 1 | nope }}",
    "unknown name": "{{ nope.a.b }}",
    "unknown function": "{{ nope() }}",
    "division": "{{ 1 / 0 }}",
    "wide date": "{{ strftime_now('%1000000000d') }}",
    "function of Python": "{{ range.__globals__['x'] }}",
}  # fmt: skip
