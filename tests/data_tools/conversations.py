"""Records of every schema met in the wild, each with the conversation that it is."""

from data_tools.chats.conversation import read_record


def turns(record, schema="auto"):
    """(role, content, reasoning, [(function, arguments)]) of each message."""
    (conversation,) = read_record(record, schema)
    return [(message["role"], message["content"], message.get("reasoning_content", ""),
             [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])])
            for message in conversation.messages]  # fmt: skip


def said(role, content, reasoning="", calls=()):
    return role, content, reasoning, list(calls)


ANSWER = said("assistant", "4")
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
THOUGHT = "<|begin_of_thought|>\nT\n<|end_of_thought|>"
SOLUTION = "<|begin_of_solution|>S <b><|end_of_solution|>"
RECORDS = {
    "openai": (
        {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "2+2?"},
                      {"role": "assistant", "content": None, "tool_calls": [
                          {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}]},
                      {"role": "tool", "tool_call_id": "c1", "content": "4"}, {"role": "assistant", "content": "4"}]},
        [said("system", "Be brief."), said("user", "2+2?"), said("assistant", "", calls=[("add", {"a": 2})]),
         said("tool", "4"), ANSWER]),
    "openai parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+"}, "2?"]},
                      {"role": "assistant", "content": [{"type": "output_text", "text": "4"}]}]},
        [said("user", "2+2?"), ANSWER]),
    "typed parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "value": "2+2?"}]},
                      {"role": "assistant", "content": [
                          {"type": "reasoning", "value": "Hm."},
                          {"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 2}}'}]}]},
        [said("user", "2+2?"), said("assistant", "", "Hm.", [("add", {"a": 2})])]),
    "tau-bench": ({"task_id": 1, "traj": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
                  [said("user", "2+2?"), ANSWER]),
    "openresearcher": (
        {"messages": [{"content": "Search.", "reasoning_content": None, "role": "system", "tool_call_id": None,
                       "tool_calls": None},
                      {"content": "2+2?", "reasoning_content": None, "role": "user", "tool_call_id": None,
                       "tool_calls": None},
                      {"content": "", "reasoning_content": "Look.", "role": "assistant", "tool_call_id": None,
                       "tool_calls": [
                           {"function": {"arguments": '{"q": "2"}', "name": "browser.search"}, "id": "call_00000001",
                            "type": "function"}]},
                      {"content": "4", "reasoning_content": None, "role": "tool", "tool_call_id": "call_00000001",
                       "tool_calls": None},
                      {"content": "4", "reasoning_content": "So.", "role": "assistant", "tool_call_id": None,
                       "tool_calls": None}],
         "tools": [], "correct": True},
        [said("system", "Search."), said("user", "2+2?"),
         said("assistant", "", "Look.", [("browser.search", {"q": "2"})]), said("tool", "4"),
         said("assistant", "4", "So.")]),
    "multilingual-thinking": (
        {"messages": [{"role": "system", "content": "reasoning language: German", "thinking": None},
                      {"role": "user", "content": "2+2?", "thinking": None},
                      {"role": "assistant", "content": "4", "thinking": "Zwei."}], "reasoning_language": "German"},
        [said("system", "reasoning language: German"), said("user", "2+2?"), said("assistant", "4", "Zwei.")]),
    "smoltalk": (
        {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], "source": "x",
         "chat_template_kwargs": {"enable_thinking": False}}, [said("user", "2+2?"), ANSWER]),
    "dolci": (
        {"messages": [{"role": "system", "content": "S", "functions": '[{"name": "add"}]', "function_calls": None},
                      {"role": "user", "content": "2+2?", "functions": None, "function_calls": None},
                      {"role": "assistant", "content": "", "function_calls": "add(a=2, b=[1])\nmath.sub(x='y')",
                       "functions": None},
                      {"role": "environment", "content": "4", "functions": None, "function_calls": None}],
         "source": "x"},
        [said("system", "S"), said("user", "2+2?"),
         said("assistant", "", calls=[("add", {"a": 2, "b": [1]}), ("math.sub", {"x": "y"})]),
         said("tool", "4")]),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "2+2?"},
                           {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                           {"from": "observation", "value": "4"}, {"from": "gpt", "value": "4"}],
         "tools": '[{"name": "add"}]', "system": "S"},
        [said("system", "S"), said("user", "2+2?"), said("assistant", "", calls=[("add", {"a": 2})]), said("tool", "4"),
         ANSWER]),
    "openthoughts": (
        {"system": "Think.", "conversations": [{"from": "user", "value": "2+2?"}, {
            "from": "assistant",
            "value": "<|begin_of_thought|>\n\nTwo.\n\n<|end_of_thought|>\n\n"
                     "<|begin_of_solution|>\n\n4\n\n<|end_of_solution|>"}]},
        [said("system", "Think."), said("user", "2+2?"), said("assistant", "4", "Two.")]),
    "alpaca": (
        {"instruction": "Add.", "input": "2, 2", "output": "4", "history": [["Hi", "Hello"]]},
        [said("user", "Hi"), said("assistant", "Hello"), said("user", "Add.\n2, 2"), ANSWER]),
    "gsm8k": ({"question": "2+2?", "answer": "4"}, [said("user", "2+2?"), ANSWER]),
    "sharegpt with fields": (
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "So:", "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]},
                           {"from": "tool", "value": "4"},
                           {"from": "gpt", "value": "4", "reasoning_content": "Two."}]},
        [said("user", "2+2?"), said("assistant", "So:", calls=[("add", {"a": 2})]), said("tool", "4"),
         said("assistant", "4", "Two.")]),
    "openai's old functions": (
        {"messages": [{"role": "user", "content": "2+2?"},
                      {"role": "assistant", "content": None,
                       "function_call": {"name": "add", "arguments": '{"a": 2}'}},
                      {"role": "function", "name": "add", "content": "4"}, {"role": "assistant", "content": "4"}],
         "functions": [{"name": "add"}]},
        [said("user", "2+2?"), said("assistant", "", calls=[("add", {"a": 2})]), said("tool", "4"), ANSWER]),
    "ms-swift": (
        {"messages": [{"role": "user", "content": "2+2?"},
                      {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 2}}'},
                      {"role": "tool_call", "content": '{"name": "sub", "arguments": {"a": 1}}'},
                      {"role": "tool_response", "content": {"sum": 4, "é": [1]}},
                      {"role": "assistant", "content": "4"}],
         "tools": '[{"name": "add"}]'},
        [said("user", "2+2?"), said("assistant", "", calls=[("add", {"a": 2}), ("sub", {"a": 1})]),
         said("tool", '{"sum": 4, "é": [1]}'), ANSWER]),
    "what tools give": (
        {"messages": [{"role": "user", "content": "2+2?"},
                      *({"role": "tool", "content": given} for given in ([1, [2]], 4, True, [], ["a", "b"])),
                      {"role": "assistant", "content": "4"}]},
        [said("user", "2+2?"), *(said("tool", text) for text in ('[1, [2]]', "4", "true", "[]", "ab")), ANSWER]),
    "dolly": (
        {"instruction": "Add.", "context": "2, 2", "response": "4", "category": "qa"},
        [said("user", "Add.\n2, 2"), ANSWER]),
    "messages as text": (
        {"messages": '[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]'},
        [said("user", "2+2?"), ANSWER]),
    "query and response": (
        {"query": "2+2?", "response": "4", "system": "S", "history": [["Hi", "Hello"]]},
        [said("system", "S"), said("user", "Hi"), said("assistant", "Hello"), said("user", "2+2?"), ANSWER]),
    "prompt and completion": ({"prompt": "2+2?", "completion": "4"}, [said("user", "2+2?"), ANSWER]),
    "prompt and completion as messages": (
        {"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "4"}]},
        [said("user", "2+2?"), ANSWER]),
    "openthoughts' metadata": (
        {"problem": "2+2?", "deepseek_reasoning": "Two.", "deepseek_solution": "4", "ground_truth_solution": "$4$",
         "domain": "math"}, [said("user", "2+2?"), said("assistant", "4", "Two.")]),
    "wildchat": (
        {"conversation": [{"role": "user", "content": "2+2?", "language": "English", "toxic": False, "country": "CH",
                           "hashed_ip": "x", "header": {"a": 1}, "turn_identifier": 1, "timestamp": None},
                          {"role": "assistant", "content": "4", "redacted": False}]}, [said("user", "2+2?"), ANSWER]),
}  # fmt: skip


def at(record, path):
    for key in path:
        record = record[key]
    return record
