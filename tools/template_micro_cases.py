"""Small templates, each for one behaviour of Jinja2: the source of tests/golden/templates/micro.jsonl."""

CONTEXT = {
    "s": "Hello World", "e": "", "u": "Grüße 世界 👍", "pad": "  x y \n", "html": "<a href=\"x\">'&'</a>", "lines": "one\ntwo\n\nthree\n",
    "n": 42, "neg": -7, "z": 0, "f": 3.5, "big": 123456789012345678901234567890, "t": True, "no": False, "nil": None,
    "xs": [3, 1, 2], "ws": ["b", "A", "c", "a"], "nested": [[1, 2], [3, [4, None]]], "mixed": [1, "a", None, True, 2.0, {"k": "v"}],
    "d": {"a": 1, "b": {"c": [10, 20]}, "items": "shadow", "x-y": 2}, "od": {"z": 3, "A": 1, "m": 2},
    "people": [{"name": "Ann", "age": 30, "city": {"zip": "8000"}}, {"name": "bob", "age": 25, "city": {"zip": "3000"}}, {"name": "Cid", "age": 30}],
    "long": "The quick brown fox jumps over the lazy dog", "chars": "äöü", "json": "a\"b\\c\n\t\u0001\u007f\u2028é",
}

EXPRESSIONS = """
1 + 2 | 7 - 10 | 6 * 7 | 7 / 2 | 6 / 3 | 7 // 2 | -7 // 2 | 7 // -2 | 7 % 3 | -7 % 3 | 7 % -3 | 7.5 // 2 | -7.5 % 2 | 2 ** 10 | 2 ** -1 | 2 ** 3 ** 2 | -2 ** 2 | 2 ** 0.5 | 1 / 0 | 1 // 0 | 1 % 0 | 1.0 / 0
0.1 + 0.2 | 1e3 | 1e16 | 1e15 | 1e-4 | 1e-5 | 123456789.123 | 1.0 | 100000000000000000000.0 | 1_000 | 1_0.5 | 0x1F | 0b101 | 0o17 | 1.5e300 * 1e10 | 5e-324 | -0.0 | f * 2 | n / 4 | 3 + 0.5 | t + 1 | t + t | 10 - t
"a" + "b" | "a" ~ 1 ~ none ~ true ~ 2.5 | "a" * 3 | 3 * "ab" | "a" * -1 | [1] * 2 | [1] + [2, 3] | (1, 2) + (3,) | "a" + 1 | 1 + "a" | [1] + (2,) | none + 1 | "a" - "b" | {} + {} | "abc" "def" | 1 ~ 2 + 3 | "x" ~ ["a", 1]
1 < 2 | 1 < 2 < 3 | 1 < 3 < 2 | 1 == 1.0 | true == 1 | "1" == 1 | none == none | "a" < "b" | "B" < "a" | [1, 2] < [1, 3] | (1,) < (1, 2) | 1 < "a" | none < 1 | [1] == (1,) | {"a": 1} == {"a": 1.0} | missing == nothing | missing == none | 1 != 2 | 2 >= 2 | 3 <= 2 | 1 <= 1 == true
1 and 2 | 0 and 2 | 0 or "x" | "" or none | not 0 | not not 1 | not missing | 1 or missing.x | t and no | 1 if t | 1 if no | 1 if no else 2 | "a" if e else "b" if t else "c" | (1 if no) is defined | not t or t | (missing or 1)
1 in [1, 2] | "b" in "abc" | "" in "abc" | "a" in d | "q" in d | 3 not in xs | not 3 in xs | 1 in "abc" | 1 in none | 1 in missing | none in mixed | 1 in mixed | 2 in mixed | [1, 2] in nested | "ell" in s | d in [d] | 5 in range(10) | [1] in d
xs[0] | xs[-1] | xs[5] | xs[1:] | xs[:-1] | xs[::-1] | xs[5:] | xs[-2:] | xs[::2] | xs[1:2:1] | s[0] | s[-1] | s[2:4] | s[::-1] | s[::0] | u[6] | u[-1] | u[7:] | u[::-1] | chars[1] | chars[-2:] | (1, 2, 3)[1:] | xs["a"] | s["upper"] | none[0] | missing[0] | xs[t] | xs[1.0] | s[:100] | s[-100:3] | xs[missing:] | d[:1] | xs[10:0:-1]
d.a | d["a"] | d.b.c[1] | d.b["c"].0 | d.missing | d.missing.x | d["x-y"] | d.items | d["items"] | d.get("a") | d.get("q") | d.get("q", 5) | d.get("a", default=2) | d.b.get("c")[0] | d.keys() | d.values() | d.items() | d.keys() | list | d.pop("a") | d.update({}) | xs.append(1) | d.__class__ | s.__class__ | xs.index(2) | xs.index(9) | xs.count(1) | xs.copy() | d.copy() | (1, 2, 1).count(1)
"""

EXPRESSION_LINES = """
{}
{'a': 1, 'b': [1, 2, {'c': none}]}
{1: 'a', none: 2, true: 3}
{'a': 1, 'a': 2}
{[1]: 2}
[]
[1, 2.0, "x", none, true, [], {}, ()]
()
(1,)
(1, 2)
1, 2
['it\\'s', "say \\"hi\\"", 'both \\' and "']
["\\n\\t\\\\", "\\x41\\u00e9", "\\a\\0"]
[u, chars, json]
["\\u200b", "\\xa0", "\\ue000"]
'\\q'
'\\u12'
"a
b"
mixed
nested
d
people[0]
big
big == big
9223372036854775807
9223372036854775807 - 1
-9223372036854775807
s.upper() ~ s.lower() ~ s.title() ~ s.swapcase() ~ s.capitalize()
"hELLO wORLD 1a".title()
"ßtraße ǆ Ünï".upper() ~ "ÀÉ".lower()
pad.strip() ~ "|" ~ pad.lstrip() ~ "|" ~ pad.rstrip() ~ "|"
"xxhixx".strip("x") ~ "xyhiyx".strip("xy") ~ "..a".lstrip(".") ~ "a\\u3000".strip()
"äxä".strip("ä")
"a,b,,c".split(",")
"a,b,c".split(",", 1)
" a  b c ".split()
" a  b c ".split(none, 1)
"a b c d".rsplit(" ", 2)
"a b  c d".rsplit(none, 2)
"a b  c d".rsplit(maxsplit=1)
"abc".split("")
"".split()
"".split(",")
"a</think>b</think>c".split("</think>")[-1]
lines.splitlines()
lines.splitlines(true)
"a\\r\\nb\\x0bc\\u2028d".splitlines()
"key=value=x".partition("=")
"key=value=x".rpartition("=")
"abc".partition("x") + "abc".rpartition("x")
s.startswith("Hell") and s.endswith("ld")
s.startswith(("x", "He"))
s.startswith("lo", 3)
s.startswith("lo", 3, 4)
s.endswith("lo", 0, 5)
s.find("o") ~ s.rfind("o") ~ s.find("q") ~ s.find("o", 5) ~ u.find("世")
s.index("W")
s.index("q")
"banana".count("an") ~ "banana".count("") ~ "banana".count("a", 2)
s.replace("l", "L") ~ s.replace("l", "L", 1) ~ s.replace("", "-") ~ s.replace("o", "")
s.replace("l")
",".join(["a", "b"]) ~ "-".join("abc") ~ "".join([])
",".join([1, 2])
"test.py".removesuffix(".py") ~ "test.py".removeprefix("te")
"ab".center(7, "*") ~ "ab".center(6) ~ "ab".ljust(5, ".") ~ "ab".rjust(5) ~ "abc".center(6, "-") ~ "abcd".center(7, "-")
"42".zfill(5) ~ "-42".zfill(5) ~ "abc".zfill(2)
"a\\tb".expandtabs(4)
"123".isdigit() ~ "12a".isdigit() ~ "".isdigit() ~ "abc".isalpha() ~ "a1".isalnum() ~ " ".isspace() ~ "ab".islower() ~ "AB".isupper() ~ "1".isupper()
"{} and {}".format(1, "x")
"{1} {0} {name!r} {d[a]} {xs[0]}".format("a", "b", name="n'", d=d, xs=xs)
"{:>5}|{:<5}|{:^5}|{:*^7}".format("a", "b", "c", "d")
"{:05d} {:+d} {:,} {:x} {:#x} {:b} {:o}".format(42, 42, 1234567, 255, 255, 5, 8)
"{:.2f} {:8.3f} {:e} {:g} {:%} {:.0f}".format(3.14159, 2.5, 12345.678, 0.0001, 0.25, 2.5)
"{:.3} {:.3s} {}".format("abcdef", "abcdef", none)
"{:{}}|".format("a", 5)
"{".format()
"{} {}".format(1)
"{a}".format(b=1)
"{{}} {}".format(1)
"{:>{w}.{p}f}".format(3.14159, w=8, p=2)
"{:d}".format("a")
"{:s}".format(1)
"%s is %d years, %.2f%%" % ("Ann", 30, 12.345)
"%5d|%-5d|%05d|%+d|%x|%X|%o|%#x" % (42, 42, 42, 42, 255, 255, 8, 255)
"%(a)s %(b)s" % {"a": 1, "b": "x"}
"%s" % "x"
"%s %s" % ("x",)
"%s" % ("x", "y")
"%d" % "x"
"%r %s" % ("a", none)
"%5s|%-5s|%.2s" % ("ab", "ab", "abcdef")
"%e %g %G" % (12345.678, 0.00001, 1e20)
"%c%c" % (65, "b")
"%i" % 3.9
"%s" % xs
"%s" % (xs,)
"100%" % ()
s | length
u | length
xs | length
d | length
missing | length
n | length
nil | length
xs | first ~ (xs | last)
[] | first
e | first
"abc" | last
d | first
xs | sum ~ (xs | min) ~ (xs | max)
[] | sum
[] | max
people | sum(attribute="age")
[[1], [2]] | sum(start=[])
ws | sort
ws | sort(case_sensitive=true)
ws | sort(reverse=true)
xs | sort(true)
mixed | sort
people | sort(attribute="age") | map(attribute="name") | list
people | sort(attribute="age,name", reverse=true) | map(attribute="name") | list
people | map(attribute="city.zip") | list
people | map(attribute="city.zip", default="none") | list
people | map(attribute="name") | map("upper") | join(", ")
xs | map("string") | list
xs | map("nosuch") | list
ws | map("default", "x") | list
people | selectattr("age", "equalto", 30) | map(attribute="name") | list
people | selectattr("city") | list | length
people | rejectattr("city", "defined") | map(attribute="name") | list
people | selectattr("age", ">", 26) | list | length
people | selectattr("name", "in", ["Ann", "Cid"]) | list | length
xs | select("odd") | list
xs | reject("odd") | list
mixed | select | list
mixed | select("string") | list
xs | select("nosuch") | list
missing | select("odd") | list
people | groupby("age") | map("first") | list
people | groupby("age")
(people | groupby("age"))[0].grouper
(people | groupby("age") | first).list | length
people | groupby("city.zip", default="0") | map("first") | list
xs | join
xs | join(", ")
people | join(", ", attribute="name")
"abc" | join("-")
missing | join(",")
n | join
xs | reverse | list
s | reverse
xs | list
"abc" | list
d | list
n | list
range(5) | list
range(2, 10, 3) | list
range(5, 0, -2) | list
range(3)
range(0)
range(1, 3)
range(5)[1:3] | list
range(1, 10, 2)[-1]
range(200000)
range(1, 2, 0)
range("a")
range(5) | batch(2) | list
range(5) | batch(2, "x") | list
range(7) | slice(3) | list
range(7) | slice(3, "x") | list
[1, 1, 2, "a", "A", 1.0] | unique | list
["a", "A"] | unique(case_sensitive=true) | list
people | unique(attribute="age") | map(attribute="name") | list
od | dictsort
od | dictsort(true)
od | dictsort(false, "value")
od | dictsort(reverse=true)
od | items | list
missing | items | list
xs | items | list
od.items() | list
od.items() | first
od.items() | last
od | tojson
mixed | tojson
d | tojson(indent=2)
[] | tojson(indent=2)
{"a": [], "b": {}} | tojson(indent=4)
od | tojson(sort_keys=true)
od | tojson(separators=(",", ":"))
od | tojson(indent=2, separators=(",", " = "))
json | tojson
json | tojson(ensure_ascii=true)
u | tojson
u | tojson(true)
[1.0, 1e20, 1e-7, 0.1, -0.0, 100] | tojson
big | tojson
(1, 2) | tojson
missing | tojson
range(3) | tojson
od.items() | tojson
{1: 2, none: 3, true: 4, 1.5: 5} | tojson
html | tojson
html | escape
html | e
(html | escape) ~ "<"
(html | safe) + "<b>"
"<b>" + ("<i>" | safe)
("<i>" | safe) * 2
("%s" | safe) % "<"
("<a>" | safe).upper()
("<a>" | safe).replace("a", "<")
("<a>" | safe | e)
("<a>" | safe | forceescape)
(html | e | length)
["<"] | map("e") | list
("<>" | safe).join(["<", ">"])
("a<b" | safe).split("<")
("<a>" | safe)[0] + "<"
("<a>" | safe) is escaped
"<a>" is escaped
"-7" | int ~ ("3.9" | int) ~ ("x" | int) ~ ("x" | int(5)) ~ (" 12 " | int) ~ (3.99 | int) ~ (-3.99 | int)
"ff" | int(0, 16)
"0x1f" | int(0, 16)
"1_000" | int
none | int(7)
missing | int
"3.5" | float ~ ("x" | float) ~ ("x" | float(1.5)) ~ (2 | float) ~ ("1e3" | float) ~ ("inf" | float)
42.55 | round ~ (42.55 | round(1)) ~ (42.55 | round(1, "floor")) ~ (42.55 | round(1, "ceil")) ~ (2.5 | round) ~ (3.5 | round) ~ (42 | round) ~ (1234.5 | round(-2))
2.675 | round(2)
1 | round(1, "floor")
-5 | abs ~ (-5.5 | abs)
"x" | abs
s | upper ~ (s | lower) ~ (none | upper) ~ (3 | lower)
"foo bar-baz (qux) x's" | title
"fOO bar" | capitalize
pad | trim ~ "|"
"xxaxx" | trim("x")
5 | trim
s | replace("l", "L") ~ (s | replace("l", "L", 2)) ~ (123 | replace(2, "x"))
lines | indent
lines | indent(2, true)
lines | indent(2, first=true, blank=true)
lines | indent("> ")
lines | indent(width=1)
"" | indent(2, true)
5 | indent
long | truncate(20)
long | truncate(20, true)
long | truncate(20, false, "…")
long | truncate(42)
long | truncate(20, leeway=30)
long | wordcount
"ab" | center(10) ~ "|"
"%s-%s" | format(1, 2)
"%(x)s" | format(x=1)
"a b/c?d=é" | urlencode
{"a b": "c&d"} | urlencode
missing | default("x")
nil | default("x")
e | default("x")
e | default("x", true)
no | default("x", boolean=true)
missing | d
missing.x | default("y")
d.missing | default("y")
none | string ~ (1.0 | string) ~ (xs | string) ~ (d.b | string)
d | attr("a")
d | attr("items") is callable
xs | nosuch
xs | length(1)
xs | count
n is number and f is number and t is number
n is integer and not f is integer and not t is integer
f is float and not n is float
t is boolean and t is true and no is false and not n is true
s is string and not n is string
d is mapping and not xs is mapping
xs is sequence and s is sequence and d is sequence and not n is sequence
xs is iterable and s is iterable and d is iterable and not n is iterable
nil is none and not missing is none
missing is undefined and missing is not defined and nil is defined
missing is sequence ~ (missing is iterable) ~ (missing is string) ~ (missing is mapping) ~ (missing is callable)
od.items() is sequence ~ (od.items() is iterable) ~ (od.items() is mapping)
(xs | map("string")) is iterable ~ ((xs | map("string")) is sequence)
3 is odd ~ (4 is even) ~ (9 is divisibleby 3) ~ (9 is divisibleby(2))
"a" is odd
"abc" is lower ~ ("ABC" is upper) ~ ("1" is lower)
1 is in [1, 2]
"q" is not in "abc"
1 is sameas 1 ~ (1 is sameas true) ~ (none is sameas none)
3 is eq 3 ~ (3 is ne 4) ~ (3 is lt 4) ~ (3 is gt 4) ~ (3 is ge 3) ~ (3 is le 2) ~ (3 is equalto 3) ~ (3 is greaterthan 2) ~ (3 is lessthan 2)
3 is == 3
"upper" is filter ~ ("nosuch" is filter) ~ ("odd" is test) ~ ("nosuch" is test)
range is callable ~ (s is callable) ~ (s.upper is callable)
1 is nosuch
1 if t else (2 is nosuch)
missing
missing.x
missing.x.y
missing()
missing + 1
missing ~ "x"
missing < 1
-missing
s()
s.nosuch
s.nosuch()
n.foo
nil.foo
-n ~ +n ~ -f
-"a"
+t
not n
-xs | length
-neg | abs
dict(a=1, b=2)
dict([("a", 1), ("b", 2)], c=3)
dict({"x": 1}, y=2)
dict([1])
namespace(a=1).a
namespace({"a": 1}, b=2).b
namespace(a=1)["a"]
namespace(a=1).b
namespace(_a=1)
namespace(a=1)
joiner("|")() ~ "x"
cycler(1, 2).next()
loop
caller
raise_exception("stop here")
raise_exception()
strftime_now("%Y-%m-%d %H:%M:%S")
strftime_now("%d %b %Y")
strftime_now("%%")
nosuchfunction(1)
"x".join(xs | map("string"))
(xs | map("string"))[0]
xs | map("string") | length
xs | map("string") | last
(d.b.c | first) + 1
d.b.c is defined and d.q.c is defined
(d.q or {}).c is defined
s.split(" ")[0].lower()[1:3] | upper | reverse
[x, 1]
{"a": missing}
[missing] | length
s is string and s | length > 3
n > 40 and n < 50 or e
2 in [1, 2] and "x" not in d
n ~ n * 2 - 1
- 3 | abs
"a" "b" | upper
[1, 2, 3,]
{"a": 1,}
(1 + 2) * 3
1 + 2 * 3 % 4
1 - 2 - 3
100 // 7 // 2
2 * 3 ** 2
a.b.c.d
true and True and not False and none is none and None is none
1 2
1 +
(1
[1
{"a"}
"unclosed
1 $ 2
a b
x |
| x
x is
d.
d[]
f(a=1, 2)
f(**d, *xs)
xs[1, 2]
xs[::]
s.format
1e308 * 10
"a" if
"%s %s %s" % range(3)
"é" < "z"
""".strip("\n")

TEMPLATES = [
    # whitespace control
    "a\n{% if t %}\nb\n{% endif %}\nc\n", "a\n  {% if t %}\n  b\n  {% endif %}\nc", "a {%- if t -%} b {%- endif -%} c", "a\n\n  {{- n -}}  \n\nb",
    "  {%+ if t %}x{% endif %}", "{% if t +%}\nx{% endif %}", "a\n  {# note #}\nb", "a {#- note -#} b", "a\n  {{ n }}\n  b\n", "x\n\n", "x\r\ny\r\n", "\n\nx", "   {% set a = 1 %}   {{ a }}",
    "\t{% if t %}y{% endif %}\t\n", "x {% if t %}\n{% endif %}\n y", "{{ n }}{% if t %}\n\n{% endif %}", "{% for x in xs %}\n  - {{ x }}\n{% endfor %}\nend", "{% for x in xs -%}\n  {{ x }},\n{%- endfor %}",
    "a\u00a0{%- if t %}b{% endif %}", "a\n\u3000{% if t %}b{% endif %}", "{{- n }}", "{{ n -}}", " {{- ' x ' -}} ",
    # raw and comments
    "{% raw %}{{ x }} {% if %}{% endraw %}", "a\n  {% raw %}\n {{ x }}\n  {% endraw %}\nb", "{%- raw -%}  {{ x }}  {%- endraw -%}  y", "{% raw %}x", "{# unclosed", "{# a {{ b }} {% c %} #}x", "{#- a\nb -#}\n\nx", "{", "{ { x } }", "{{ '{{' }} {{ '%}' }} {{ \"}}\" }}", "a { b % c # d }", "{% raw %}{% raw %}{% endraw %}",
    # errors of structure
    "{% if t %}x", "{% endif %}", "{% for x in xs %}{% endif %}", "{% nosuch %}", "{{ x", "{% if %}x{% endif %}", "{{ }}", "{% %}", "{% set %}", "{% for %}{% endfor %}", "{% include 'x' %}", "{% extends 'x' %}", "{{ {'a': {'b': 1}} }}", "{{ {'a': {'b': 1}}.a.b }}", "{{ [1, 2] ] }}", "{{ (1] }}", "{% set x = %}", "{% macro %}{% endmacro %}", "{% if t %}{% else %}{% elif t %}{% endif %}", "{{ 5 }", "{% break %}",
    # if
    "{% if n > 50 %}a{% elif n > 40 %}b{% else %}c{% endif %}", "{% if missing %}a{% elif none %}b{% elif '' %}c{% else %}d{% endif %}", "{% if not missing is defined and xs %}y{% endif %}", "{% if (xs | map('string')) %}generators are true{% endif %}", "{% if xs | select('none') | list %}a{% else %}b{% endif %}", "{% if t: %}x{% endif %}",
    # for
    "{% for x in xs %}{{ loop.index }}/{{ loop.length }}:{{ x }}{% if not loop.last %}, {% endif %}{% endfor %}", "{% for x in xs %}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.depth }}{{ loop.depth0 }} {% endfor %}",
    "{% for x in xs %}{{ loop.previtem }}<{{ x }}>{{ loop.nextitem }} {% endfor %}", "{% for x in xs %}{{ loop.previtem is defined }}{{ loop.nextitem is defined }}{% endfor %}", "{% for x in [] %}x{% else %}empty{% endfor %}", "{% for x in missing %}x{% else %}empty{% endfor %}", "{% for x in none %}x{% endfor %}", "{% for x in n %}x{% endfor %}", "{% for c in 'aé' %}[{{ c }}]{% endfor %}",
    "{% for k in d %}{{ k }},{% endfor %}", "{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}", "{% for k, v in od | dictsort %}{{ k }}{{ v }}{% endfor %}", "{% for k, v in od | items %}{{ k }}{{ v }}{% endfor %}", "{% for a, b in [[1, 2], [3, 4]] %}{{ a + b }} {% endfor %}", "{% for a, (b, c) in [[1, [2, 3]]] %}{{ a }}{{ b }}{{ c }}{% endfor %}", "{% for a, b in [[1]] %}{% endfor %}", "{% for a, b in [1] %}{% endfor %}",
    "{% for x in xs if x > 1 %}{{ x }}{{ loop.index }}/{{ loop.length }}{{ loop.last }} {% endfor %}", "{% for x in xs if x > 5 %}{{ x }}{% else %}none{% endfor %}", "{% for x in range(6) if x is odd %}{{ loop.previtem }}{{ x }}{{ loop.nextitem }} {% endfor %}", "{% for x in xs %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% endfor %}", "{% for x in xs %}{% if x == 1 %}{% break %}{% endif %}{{ x }}{% endfor %}", "{% for x in xs %}{% for y in xs %}{% if y == 1 %}{% break %}{% endif %}{{ x }}{{ y }} {% endfor %}{% endfor %}", "{% for x in xs %}{% break %}{% else %}none{% endfor %}",
    "{% for x in xs %}{{ loop.cycle('a', 'b') }}{% endfor %}", "{% for x in [1, 1, 2] %}{{ loop.changed(x) }}{% endfor %}", "{% for x in xs %}{% set outer = loop %}{% for y in [1] %}{{ outer.index }}{{ loop.index }} {% endfor %}{% endfor %}", "{% for x in nested recursive %}{% if x is iterable %}[{{ loop(x) }}]{% else %}{{ x }}@{{ loop.depth }}{% endif %}{% endfor %}", "{% for x in xs %}{{ loop(x) }}{% endfor %}", "{% for x in xs %}{% endfor %}{{ x }}", "{% for x in xs %}{{ x }}{% set x = 9 %}{{ x }}{% endfor %}", "{% for x in 1, 2 %}{{ x }}{% endfor %}", "{% for x in xs | sort | reverse %}{{ x }}{{ loop.last }}{% endfor %}", "{% for x in (xs if t else []) %}{{ x }}{% endfor %}", "{% for loop in xs %}{{ loop }}{% endfor %}", "{% for x in xs %}{{ loop.nosuch }}{% endfor %}", "{% for x in xs if loop.first %}{{ x }}{% endfor %}",
    "{% for x in xs if t else [] %}{{ x }}{% endfor %}", "{% for m in people %}{{ m.name }}{{ ' ' if not loop.last else '.' }}{% endfor %}", "{% for x in xs %}{{ loop.index is odd }}{% endfor %}", "{% for x in people | groupby('age') %}{{ x.grouper }}:{{ x.list | length }} {% endfor %}", "{% for age, group in people | groupby('age') %}{{ age }}:{{ group | map(attribute='name') | join('+') }} {% endfor %}", "{% for x in range(3) %}{% for y in range(x) %}{{ loop.length }}{% endfor %}|{% endfor %}",
    # set and scopes
    "{% set x = 1 %}{{ x }}", "{% set x = 1 %}{% set x = x + 1 %}{{ x }}", "{% set x = 1 %}{% for i in xs %}{% set x = i %}{% endfor %}{{ x }}", "{% set x = 1 %}{% for i in xs %}{% set x = x + 1 %}{{ x }}{% endfor %}", "{% set x = 1 %}{% if t %}{% set x = 2 %}{% endif %}{{ x }}", "{% for i in xs %}{{ x is defined }}{% set x = i %}{% endfor %}", "{% set a, b = 1, 2 %}{{ a }}{{ b }}", "{% set a, b = xs %}", "{% set x = 1, 2 %}{{ x }}", "{% set (a, b) = [1, 2] %}{{ b }}{{ a }}", "{% set x %}a{{ n }}b{% endset %}[{{ x }}]", "{% set x | upper %}ab{% endset %}{{ x }}", "{% set x | replace('a', 'b') | upper %}ab{% endset %}{{ x }}", "{% set x %}{% set y = 1 %}{% endset %}{{ y is defined }}", "{% set ns = namespace(a=1, b=[]) %}{% for i in xs %}{% set ns.a = ns.a + i %}{% set ns.b = ns.b + [i] %}{% endfor %}{{ ns.a }}{{ ns.b }}", "{% set ns = namespace() %}{% set ns.x = 1 %}{{ ns.x }}{{ ns.y is defined }}{{ ns.y }}", "{% set d.a = 5 %}", "{% set nosuch.a = 5 %}", "{% set ns = namespace(x=1) %}{{ ns }}", "{% set ns = namespace() %}{% set ns._x = 1 %}", "{% set ns = namespace(found=false) %}{% for x in xs if not ns.found %}{{ x }}{% set ns.found = true %}{% endfor %}", "{% set ns = namespace(found=false) %}{% for x in xs if not ns.found %}{{ x }}{{ loop.length }}{% set ns.found = true %}{% endfor %}", "{% set true = 1 %}", "{% set s.x = 1 %}", "{% set range = 5 %}{{ range }}", "{% set x = missing %}{{ x is defined }}", "{% set ns = namespace(a=1) %}{% set ns.a, b = 2, 3 %}{{ ns.a }}{{ b }}", "{% set _ = xs %}{{ _ }}", "{% set messages = xs %}{{ messages }}", "{% set x = none %}{{ x }}",
    "{% with %}{% set x = 1 %}{{ x }}{% endwith %}{{ x is defined }}", "{% with a = 1, b = 2 %}{{ a }}{{ b }}{% endwith %}{{ a }}", "{% set a = 5 %}{% with a = 1, b = a %}{{ b }}{% endwith %}", "{% filter upper %}ab{{ s }}{% endfilter %}", "{% filter replace('a', 'b') | upper %}aa{% endfilter %}", "{% block x %}a{{ n }}{% endblock %}", "{% block x %}a{% endblock x %}", "{% generation %}gen{{ n }}{% endgeneration %}!", "{% generation %}{% set x = 1 %}{% endgeneration %}{{ x is defined }}", "a\n{% generation %}\nb\n{% endgeneration %}\nc", "{% autoescape false %}{{ html }}{% endautoescape %}", "{% print n, s %}",
    # macros
    "{% macro m() %}x{% endmacro %}{{ m() }}{{ m() }}", "{% macro m(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }}{{ m(1, 3) }}{{ m(b=4, a=5) }}", "{% macro m(a) %}[{{ a }}{{ a is defined }}]{% endmacro %}{{ m() }}", "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, 2) }}", "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(b=1) }}", "{% macro m(a, b=a) %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }}", "{% macro m(a) %}{{ a }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, 2, 3, x=4) }}", "{% macro m() %}{{ varargs | length }}{% endmacro %}{{ m() }}{{ m(1, 2) }}", "{% macro m(*a) %}{% endmacro %}", "{% macro m(a=1, b) %}{% endmacro %}",
    "{% macro fact(x) %}{% if x > 1 %}{{ x * (fact(x - 1) | int) }}{% else %}1{% endif %}{% endmacro %}{{ fact(10) }}", "{% macro m() %}{{ n }}{% set n = 1 %}{{ n }}{% endmacro %}{{ m() }}{{ n }}", "{% set x = 1 %}{% macro m() %}{{ x }}{% endmacro %}{% set x = 2 %}{{ m() }}", "{% macro m() %}{{ x }}{% endmacro %}{% set x = 2 %}{{ m() }}", "{{ m() }}{% macro m() %}x{% endmacro %}", "{% macro m() %}{{ caller() }}!{% endmacro %}{% call m() %}body{{ n }}{% endcall %}", "{% macro m() %}{% for x in xs %}{{ caller(x) }},{% endfor %}{% endmacro %}{% call(y) m() %}<{{ y }}>{% endcall %}", "{% macro m() %}{{ caller is defined }}{% endmacro %}{{ m() }}", "{% macro m() %}x{% endmacro %}{% call m() %}body{% endcall %}", "{% macro m(a) %}\n  {{ a }}\n{% endmacro %}[{{ m('x') }}]", "{% macro m(a) -%}\n  {{ a }}\n{%- endmacro %}[{{ m('x') }}]", "{{ m is defined }}{% macro m() %}{% endmacro %}{{ m is defined }}{{ m is callable }}", "{% macro m(a, b) %}{% endmacro %}{{ m.name }}", "{% macro m() %}1{% endmacro %}{{ m() + 1 }}", "{% macro m() %}1{% endmacro %}{{ m() ~ 1 }}", "{% macro m(x) %}{{ x }}{% endmacro %}{{ m(*[1]) }}{{ m(**{'x': 2}) }}", "{% for x in xs %}{% macro m() %}{{ x }}{% endmacro %}{{ m() }}{% endfor %}", "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}B{% endmacro %}{{ a() }}", "{% macro deep(v) %}{% if v is mapping %}{{ '{' }}{% for k, x in v | dictsort %}{{ k }}:{{ deep(x) }};{% endfor %}{{ '}' }}{% elif v is iterable and v is not string %}[{% for x in v %}{{ deep(x) }},{% endfor %}]{% else %}{{ v }}{% endif %}{% endmacro %}{{ deep(d) }}{{ deep(mixed) }}", "{% if t %}{% macro m() %}in{% endmacro %}{% endif %}{{ m() }}", "{% macro m(x) %}{% if x %}a{% else %}b{% endif %}{% endmacro %}{{ m(true) ~ m(false) | upper }}", "{% macro m() %}{% break %}{% endmacro %}",
    # one-shot iterators
    "{% set g = xs | map('string') %}{{ g | join }}{{ g | join }}", "{% set g = xs | select('odd') %}{{ g | list }}{{ g | list }}", "{% set g = xs | map('string') %}{{ g | first }}{{ g | join }}", "{% set g = xs | reverse %}{{ '1' in g }}{{ 1 in g }}{{ g | list }}", "{% set i = d.items() %}{{ i | list | length }}{{ i | list | length }}", "{% for x in xs | map('string') %}{{ loop.length }}{{ x }}{% endfor %}",
    # functions
    "{% set j = joiner(', ') %}{% for x in xs %}{{ j() }}{{ x }}{% endfor %}", "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.current }}{{ c.next() }}{% set _ = c.reset() %}{{ c.current }}", "{{ cycler() }}", "line\n{{ raise_exception('bad ' ~ n) }}", "{% if no %}{{ raise_exception('x') }}{% endif %}ok", "{{ raise_exception(missing) }}",
    # unknown filters where a condition guards them
    "{% if no %}{{ x | nosuch }}{% endif %}ok", "{{ (x | nosuch) if no else 'ok' }}", "{% if t %}{{ x | nosuch }}{% endif %}", "{% if no %}{{ x is nosuch }}{% endif %}ok", "{{ 1 if no and (x is nosuch) else 2 }}", "{% for q in [] %}{{ q | nosuch }}{% endfor %}",
    # printing
    "{{ none }} {{ true }} {{ 1.0 }} {{ [none] }} {{ '' }}|{{ missing }}|{{ (1,) }}", "{{ s }}{{ ' ' }}{{ s | length }}\n\n{{ d.b }}", "{{ d['b']['c'][0] + d.b.c[1] }}", "{{ [s, n, f, t, nil] }}", "{{ \"a\\nb\" }}", "{{ 'it''s' }}", "{{ n if t }}{{ n if no }}", "{{ xs[0] if xs else 'none' }}", "{{ '%s' % d }}", "{{ html }}",
]


def micro_cases():
    """(template, context) of every case; the context is shared."""
    for line in EXPRESSIONS.strip().split("\n"):
        for expression in line.split(" | "):
            yield "{{ " + expression.strip() + " }}"
    for expression in EXPRESSION_LINES.split("\n"):
        yield "{{ " + expression + " }}"
    yield from TEMPLATES
