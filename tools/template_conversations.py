"""Conversations that exercise chat templates: the matrix of check_templates.py."""


def _tool(name, description, properties, required=()):
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties, "required": list(required)},
        },
    }


TOOLS = [
    _tool(
        "get_weather",
        "The weather of a city.",
        {
            "city": {"type": "string", "description": "Name of the city, e.g. \"Zürich\""},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
            "days": {"type": "integer", "minimum": 1, "maximum": 18446744073709551615},
        },
        ["city"],
    ),
    _tool(
        "book",
        "Books <things> & more.",
        {
            "items": {"type": "array", "items": {"type": "object", "properties": {"id": {"type": "integer"}, "note": {"type": ["string", "null"]}}}},
            "price": {"type": "number", "default": 1.5},
            "urgent": {"type": "boolean", "default": False},
            "choice": {"oneOf": [{"type": "string"}, {"type": "number"}], "description": "either"},
        },
        ["items", "price"],
    ),
    {"type": "function", "function": {"name": "ping", "description": "No parameters.", "parameters": {"type": "object", "properties": {}}}},
]

DESCRIBED_TOOLS = [
    {
        "name": "search",
        "description": "Searches.",
        "parameter_definitions": {"query": {"type": "str", "description": "what", "required": True}},
        **_tool("search", "Searches.", {"query": {"type": "string", "description": "what"}}, ["query"]),
    }
]


def call(name, arguments, call_id="call12345"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


ARGUMENTS = {"city": "Zürich", "days": 3, "deep": {"a": [1, 2.5, None, True], "b": "x\ny"}}
TWO_CALLS = [call("get_weather", {"city": "Bern"}, "callAAAA1"), call("ping", {}, "callBBBB2")]

# name -> (messages, tools)
CONVERSATIONS = {
    "user": ([user("Hello!")], None),
    "system": ([system("You are terse."), user("Hello!")], None),
    "multi_turn": ([user("What is 1+1?"), assistant("2"), user("And 2+2?"), assistant("4"), user("Thanks")], None),
    "system_multi_turn": ([system("Be kind."), user("Hi"), assistant("Hello"), user("Bye")], None),
    "ends_with_assistant": ([user("Say A"), assistant("A")], None),
    "whitespace": ([system("  padded \n"), user("\n  lead and trail \t\n"), assistant("  out  "), user(" \n ")], None),
    "unicode": ([system("Sei höflich 🤖"), user("Grüße, 世界! \u00a0 e\u0301 \u2028x"), assistant("مرحبا 👩‍👩‍👧"), user("ß İ ǆ")], None),
    "empty_content": ([system(""), user(""), assistant(""), user("")], None),
    "none_content": ([user("x"), assistant(None), user("y")], None),
    "missing_content": ([user("x"), {"role": "assistant"}, user("y")], None),
    "special_text": ([user("<|im_end|> {{ x }} {% if %} </s> [INST] \\n \" ' & <b>"), assistant("{# no #}"), user("ok")], None),
    "think_tags": ([user("q"), assistant("<think>\nlet me see\n</think>\n\nanswer"), user("again")], None),
    "reasoning": ([user("q"), assistant("answer", reasoning_content="because\n"), user("again"), assistant("b", reasoning_content="so")], None),
    "thinking_field": ([user("q"), assistant("answer", thinking="hmm"), user("again")], None),
    "two_users": ([user("a"), user("b")], None),
    "starts_with_assistant": ([assistant("a"), user("b")], None),
    "late_system": ([user("a"), assistant("b"), system("now"), user("c")], None),
    "unknown_role": ([user("a"), {"role": "critic", "content": "bad"}, user("b")], None),
    "developer": ([{"role": "developer", "content": "Rules."}, user("a")], None),
    "named": ([{"role": "user", "name": "bob", "content": "hi"}, assistant("yo", name="amy"), user("c")], None),
    "parts": ([user([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}])], None),
    "parts_everywhere": ([system([{"type": "text", "text": "sys"}]), user([{"type": "text", "text": "q"}]), assistant([{"type": "text", "text": "a"}]), user([{"type": "text", "text": "r"}])], None),
    "image_part": ([user([{"type": "image"}, {"type": "text", "text": "what?"}])], None),
    "empty": ([], None),
    "tools": ([user("Weather?")], TOOLS),
    "system_tools": ([system("Use tools."), user("Weather?")], TOOLS),
    "empty_tools": ([user("Weather?")], []),
    "tool_call": ([user("Weather?"), assistant("", tool_calls=[call("get_weather", ARGUMENTS)]), {"role": "tool", "name": "get_weather", "tool_call_id": "call12345", "content": "{\"temp\": 20}"}], TOOLS),
    "tool_call_none": ([user("Weather?"), assistant(None, tool_calls=[call("get_weather", ARGUMENTS)]), {"role": "tool", "name": "get_weather", "tool_call_id": "call12345", "content": "20"}, assistant("It is 20."), user("Thanks")], TOOLS),
    "tool_call_text": ([user("Weather?"), assistant("I look.", tool_calls=[call("get_weather", {"city": "A"})]), {"role": "tool", "tool_call_id": "call12345", "content": "20"}], TOOLS),
    "tool_call_string": ([user("Weather?"), assistant("", tool_calls=[call("get_weather", "{\"city\": \"A\"}")]), {"role": "tool", "tool_call_id": "call12345", "content": "20"}], TOOLS),
    "tool_call_no_content": ([user("W?"), {"role": "assistant", "tool_calls": [call("ping", {})]}, {"role": "tool", "tool_call_id": "call12345", "content": "pong"}], TOOLS),
    "parallel_calls": ([system("s"), user("W?"), assistant("", tool_calls=TWO_CALLS), {"role": "tool", "name": "get_weather", "tool_call_id": "callAAAA1", "content": "sun"}, {"role": "tool", "name": "ping", "tool_call_id": "callBBBB2", "content": "pong"}, assistant("Done."), user("And now?")], TOOLS),
    "tool_reasoning": ([user("W?"), assistant("", reasoning_content="need a tool", tool_calls=[call("ping", {})]), {"role": "tool", "name": "ping", "tool_call_id": "call12345", "content": "pong"}, assistant("ok", reasoning_content="done"), user("more")], TOOLS),
    "tool_dict_content": ([user("W?"), assistant("", tool_calls=[call("ping", {})]), {"role": "tool", "name": "ping", "tool_call_id": "call12345", "content": {"result": 1}}], TOOLS),
    "calls_no_tools": ([user("W?"), assistant("", tool_calls=[call("ping", {"x": "<y>"})]), {"role": "tool", "name": "ping", "tool_call_id": "call12345", "content": "pong"}], None),
    "bad_call_id": ([user("W?"), assistant("", tool_calls=[call("ping", {}, "x")]), {"role": "tool", "tool_call_id": "x", "content": "pong"}], TOOLS),
    "described_tools": ([system("s"), user("W?"), assistant("", tool_calls=[call("search", {"query": "x"})]), {"role": "tool", "name": "search", "tool_call_id": "call12345", "content": "found"}], DESCRIBED_TOOLS),
    "empty_calls": ([user("a"), assistant("b", tool_calls=[]), user("c")], TOOLS),
}

# name -> template variables beside messages and tools
VARIANTS = {
    "plain": {},
    "thinking_on": {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"},
    "thinking_off": {"enable_thinking": False, "thinking": False},
    "settings": {"date_string": "01 Jan 2026", "tools_in_user_message": False, "model_identity": "You are Baton.", "builtin_tools": ["browser", "python"], "documents": [{"title": "T", "text": "body"}], "keep_past_thinking": True, "xml_tools": ["a"], "custom_tools": None, "functions": TOOLS, "datetime": "2026-01-01", "preserve_thinking": True},
}


def cases():
    """(name, case) for every conversation × variant × add_generation_prompt."""
    for conversation, (messages, tools) in CONVERSATIONS.items():
        for variant, extra in VARIANTS.items():
            for generate in (False, True):
                yield f"{conversation}/{variant}/{'generate' if generate else 'history'}", {
                    "messages": messages,
                    "tools": tools,
                    "extra": extra,
                    "add_generation_prompt": generate,
                    "bos_token": "<s>",
                    "eos_token": "</s>",
                }
