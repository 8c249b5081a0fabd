"""The package phase: every file in place, Modelfiles that say what the tokenizer's template says, a card with lineage,
and an upload that is private, asked for, and goes on where it was cut short."""

import base64
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from data_tools.chats.prompts import PromptEncoder
from data_tools.chats.tokenizer import load_tokenizer
from data_tools.mistake import UserMistake
from megatron_ext.entrypoints import package
from megatron_ext.serving import hub, modelfile, turns
from tests.megatron_ext import tiny
from tests.megatron_ext.byte_bpe import byte_bpe

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }};{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }};{% endfor %}>"
NUMBERED = "{% for m in messages %}{{ loop.index }}. {{ m.content }}\n{% endfor %}>"
ITS_DAY = "{{ strftime_now('%d %B %Y') }} {% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}>"


def harmony() -> str:
    """gpt-oss's own chat template, as TRL ships it."""
    return (resources.files("trl") / "chat_templates" / "gptoss.jinja").read_text()


def folder(at: Path, template: str) -> Path:
    """A small Hugging Face folder with a byte-level BPE and a chat template."""
    tiny.hf_folder(at, tiny.dims(vocabulary=300))
    byte_bpe(
        at, ["the quick brown fox"] * 3, ["<|end|>", "<|return|>"], eos="<|return|>", pad="<|end|>", vocabulary=270
    )
    if template:
        (at / "chat_template.jinja").write_text(template)
    return at


def render_of(at: Path, **settings: Any) -> turns.Render:
    encoder = PromptEncoder(load_tokenizer(str(at)), **settings)
    return lambda messages: encoder.text([dict(message) for message in messages])


TALKS = [
    [("user", "Hour 3?")],
    [("system", "Answer [0] or [1]."), ("user", "Hour 3?")],
    [("user", "a"), ("assistant", "[1]"), ("user", "b\n\nc")],
    [("system", 'Say "so" in {{ braces }}.'), ("user", "ä 🦙"), ("assistant", "[0]"), ("user", "d")],
]


def messages(talk: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in talk]


@pytest.mark.parametrize("template", [CHATML, harmony()], ids=["chatml", "harmony"])
def test_a_template_that_writes_around_turns_is_found_to_the_letter(template, tmp_path):
    render = render_of(folder(tmp_path / "hf", template))
    found = turns.find(render)
    assert found is not None and found.system and found.keeps_edges
    for talk in TALKS:
        assert found.text(messages(talk)) == render(messages(talk))


GO = """package main
import ("encoding/json"; "os"; "text/template")
type message struct { Role, Content string }
type talk struct { System string; Messages []message }
type given struct { Template string; Talks []talk }
func main() {
	var g given
	if err := json.NewDecoder(os.Stdin).Decode(&g); err != nil { panic(err) }
	day := template.FuncMap{"currentDate": func() string { return "2025-10-26" }}
	parsed := template.Must(template.New("").Funcs(day).Parse(g.Template))
	for _, t := range g.Talks {
		if err := parsed.Execute(os.Stdout, t); err != nil { panic(err) }
		os.Stdout.WriteString("\\x00")
	}
}
"""  # as Ollama hands a conversation to its template: system messages joined, and all messages


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
@pytest.mark.parametrize("template", [CHATML, harmony(), TRIMMED], ids=["chatml", "harmony", "trimmed"])
def test_go_writes_what_the_tokenizers_template_writes(template, tmp_path):
    at = folder(tmp_path / "hf", template)
    found = turns.find(render_of(at, day="2001-02-03"))
    (tmp_path / "main.go").write_text(GO)
    talks = [
        {"System": "".join(text for role, text in talk if role == "system"), "Messages": messages(talk)}
        for talk in TALKS
    ]
    given = json.dumps({"Template": found.go_template("2001-02-03"), "Talks": talks})
    ran = subprocess.run(
        ["go", "run", "main.go"], input=given, capture_output=True, text=True, cwd=tmp_path, check=True
    )
    today = render_of(at, day="2025-10-26")
    assert ran.stdout.split("\x00")[:-1] == [today(messages(talk)) for talk in TALKS]


def test_other_templates_are_told_apart(tmp_path):
    def found(template: str) -> turns.Turns | None:
        return turns.find(render_of(folder(tmp_path / str(len(list(tmp_path.iterdir()))), template)))

    assert found(NUMBERED) is None
    trimmed, without = found(TRIMMED), found(NO_SYSTEM)
    assert trimmed is not None and not trimmed.keeps_edges
    assert without is not None and without.system is None
    unthought = found(CHATML.replace("m.content", "m.content.split('</think>')[-1]"))
    assert unthought is not None and not unthought.keeps_thoughts and trimmed.keeps_thoughts


def made(tmp_path: Path, template: str, lineage: Any = (), **settings: Any) -> tuple[Path, dict[str, Any]]:
    source = folder(tmp_path / "hf", template)
    (source / "README.md").write_text("of the base model")
    (source / "conversion.json").write_text('{"source": "/home/someone"}')
    for name, file in (("whole", "model.gguf"), ("part", "adapter.gguf")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(b"GGUF")
    out = tmp_path / "out"
    out.mkdir()
    both = [str(tmp_path / name) for name in ("whole", "part")]
    config = package.Config(str(source), **{"gguf": both, "ollama_base": "gpt-oss:20b", **settings})
    return out, package.run(config, out, tmp_path, lineage=lineage)


def test_a_package_has_all_files_and_leaves_what_it_was_made_of_as_it_was(tmp_path):
    result = {"tasks": ["held_out"], "held_out_prompts": 4, "held_out_accuracy": 0.5, "held_out_correct": 2,
              "prompts": 4, "accuracy": 0.5, "correct": 2, "reward": 0.7}  # fmt: skip
    evaluated = tmp_path / "run" / "tested" / "k2" / "work" / "a"
    evaluated.mkdir(parents=True)
    (evaluated / "result.json").write_text(json.dumps(result))
    step = {"uses": "grpo", "digest": "d" * 64, "headline": "step 2 | reward 0.5", "settings": {"lr": 5e-5},
            "needs": [], "sealed_at": 0.0, "packages": {"torch": "2.13.0"}}  # fmt: skip
    lineage = [{**step, "phase": "grpo", "key": "k1"}, {**step, "phase": "tested", "uses": "evaluate", "key": "k2"}]
    out, facts = made(
        tmp_path,
        CHATML,
        lineage,
        name="decider",
        base="openai/gpt-oss-20b",
        license="apache-2.0",
        results=[str(evaluated)],
    )
    card = (out / "README.md").read_text()
    assert 'base_model: "openai/gpt-oss-20b"' in card and 'license: "apache-2.0"' in card
    assert "| grpo | grpo |  | dddddddddddd | step 2 \\| reward 0.5 |" in card and '"lr": 5e-05' in card
    assert "* tested: accuracy 0.500 (2 of 4), reward 0.700" in card and "torch 2.13.0" in card
    assert (tmp_path / "hf" / "README.md").read_text() == (out / "README.base.md").read_text() == "of the base model"
    assert not (out / "conversion.json").exists()
    assert set(facts["files"]) == {"*.safetensors", "model.gguf", "adapter.gguf", "Modelfile", "Modelfile.adapter",
                                   "serve_vllm.sh"}  # fmt: skip
    merged, adapter = ((out / name).read_text() for name in ("Modelfile", "Modelfile.adapter"))
    assert "\nFROM ./model.gguf\n" in merged and "ADAPTER" not in merged.partition("FROM")[2]
    assert "\nFROM gpt-oss:20b\nADAPTER ./adapter.gguf\n" in adapter and "ollama#14969" in adapter
    for text in (merged, adapter):
        assert '\nPARAMETER stop "<|return|>"\n' in text and "\nPARAMETER temperature 1\n" in text
    serve = (out / "serve_vllm.sh").read_text()
    assert 'exec vllm serve "$HERE" --served-model-name decider --dtype float32 "$@"' in serve


@pytest.mark.parametrize("said, base, wanted", [
    ("{here}/hf", "o/base", "o/base"), ("{here}/hf", "", None), ("", "", None), ("o/other", "o/base", "o/other"),
])  # fmt: skip
def test_no_file_of_a_package_names_a_folder_of_the_cluster(tmp_path, said, base, wanted):
    """The adapter's base is one that whoever is given the package can find, or none is named."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
              "base_model_name_or_path": said.format(here=tmp_path)}  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    out, _ = made(tmp_path, CHATML, adapter=str(adapter), base=base)
    written = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert [str(path) for path, data in written.items() if str(tmp_path).encode() in data] == []
    assert json.loads(written[out / "adapter" / "adapter_config.json"]) == {**config, "base_model_name_or_path": wanted}
    assert json.loads((adapter / "adapter_config.json").read_text()) == config


def test_a_day_in_the_template_is_ollamas_unless_it_is_pinned(tmp_path):
    for name, template, date, wanted in (
        ("free", harmony(), "", 'Current date: " }}{{ currentDate }}{{ "\\n\\nReasoning'),
        ("pinned", harmony(), "2026-01-01", "Current date: 2026-01-01\\n\\nReasoning"),
        ("own", ITS_DAY, "2026-01-01", "01 January 2026"),
    ):
        (tmp_path / name).mkdir()
        out, _ = made(tmp_path / name, template, date=date)
        assert wanted in (out / "Modelfile").read_text(), name
    (tmp_path / "lost").mkdir()
    out, facts = made(tmp_path / "lost", ITS_DAY)
    assert "TEMPLATE" not in (out / "Modelfile").read_text() and "pin it (date)" in facts["template"]


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"repo": "me/it"}, "push: is false, and nothing goes to me/it: set push: true, or leave repo out"),
        ({"push": True}, "repo: push needs the repository's name"),
        ({"push": True, "repo": "it"}, "repo: 'it' is no name of a repository"),
        ({"date": "yesterday"}, "date: 'yesterday' is no date"),
        ({"ollama_base": "gpt-oss:20b"}, "ollama_base: an adapter for Ollama is a GGUF file"),
        ({"gguf": ["g"], "ollama_base": "a\nADAPTER /b"}, "ollama_base: 'a\\nADAPTER /b' has characters that no line"),
        ({"name": "\ud800"}, "name: '\\ud800' has characters"),
    ],
)
def test_what_cannot_be_packaged_is_refused(settings, said):
    (problem,) = package.check(package.Config("hf", **settings), 1)
    assert said in str(problem)


@pytest.mark.parametrize(
    "setting, file, text, said",
    [
        ("adapter", None, "", "is missing"),
        ("adapter", "adapter_config.json", '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["x"]}',
         "has no adapter_model.safetensors"),
        ("results", "result.json", "[]", "is no evaluation's"),
        ("results", "result.json", "{}", "is no evaluation's"),
        ("results", "result.json", "{", "has no evaluation"),
        ("model", "Modelfile", "FROM x", "has Modelfile, as package makes it"),
    ],
)  # fmt: skip
def test_what_is_no_part_of_a_package_is_refused_before_anything_is_written(tmp_path, setting, file, text, said):
    given = folder(tmp_path / "given", CHATML) if setting == "model" else tmp_path / "given"
    given.mkdir(exist_ok=True)
    if file:
        (given / file).write_text(text)
    model = folder(tmp_path / "hf", CHATML)
    (tmp_path / "out").mkdir()
    config = package.Config(**{"model": str(model), setting: [str(given)] if setting == "results" else str(given)})
    with pytest.raises(UserMistake, match=said):
        package.run(config, tmp_path / "out", tmp_path)
    assert not (tmp_path / "out" / "README.md").exists() and not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize("name", ["decider", "my model", 'a"b $HOME `id` $(id)', "it's"])
def test_vllm_is_given_a_rank_that_it_has_and_the_name_as_it_is(tmp_path, name):
    (tmp_path / "vllm").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    script = tmp_path / "with spaces" / "serve.sh"
    script.parent.mkdir()
    for path in (tmp_path / "vllm", script):
        path.touch()
        path.chmod(0o755)
    for base, wanted in (("", ["serve", str(script.parent), "--served-model-name", name]),
                         ("o/base", ["serve", "o/base", "--enable-lora", "--lora-modules",
                                     f"{name}={script.parent}/adapter", "--max-lora-rank", "8"])):  # fmt: skip
        script.write_text(modelfile.vllm_command(name, "bfloat16", 4096, base=base, rank=4))
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        told = subprocess.run([script], capture_output=True, text=True, check=True, env=environment).stdout
        assert told.splitlines() == [*wanted, "--dtype", "bfloat16", "--max-model-len", "4096"]


def read_value(line: str) -> str:
    """Return a value as Ollama's parser/parser.go reads it: unprintable characters drop out, and no escape is one."""
    value = "".join(char for char in line if char.isprintable() or char in "\t\r\n")
    quote = '"""' if value.startswith('"""') else '"' if value.startswith('"') else ""
    return value[len(quote) : len(value) - len(quote)]


@pytest.mark.parametrize("stop", ["<|end|>", "\n", "a\\b", 'say "', '"', "é｜", "\n\nHuman: "])
def test_ollama_reads_a_stop_as_it_is(stop):
    assert read_value(modelfile.quoted(stop)) == stop


def test_what_no_modelfile_holds_is_left_out_and_said_or_escaped():
    sampling = modelfile.Sampling(1.0, 1.0, 0)
    text = modelfile.modelfile("./m", "", "", stops=["\u200b", 'a"""b'], sampling=sampling, context=0, notes=[])
    assert "PARAMETER stop" not in text and '# Left out is the stop "\\u200b", which no Modelfile can hold.' in text
    turn = ("<\u200b\U000e0001", "\n>")
    template = turns.Turns("", None, turn, turn, "go").go_template()
    assert template.isprintable() and r'"<\U0000200b\U000e0001"' in template


class Hub:
    """A local stand-in for the Hub's HTTP interface: repositories of regular files, by their commits."""

    def __init__(self, private: bool = True, refuse_commit: int = 0):
        self.private, self.refuse_commit = private, refuse_commit
        self.commits: list[dict[str, bytes]] = []
        self.created: dict[str, Any] = {}
        self.tokens: set[str | None] = set()
        self.asked, self.address = 0, ""

    @property
    def files(self) -> dict[str, bytes]:
        return {name: data for commit in self.commits for name, data in commit.items()}

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/repos/create":
            self.created = json.loads(body)
            return 200, {"url": f"{self.address}/me/it", "id": "me/it", "name": "me/it"}
        if "/preupload/" in path:
            asked = [file["path"] for file in json.loads(body)["files"]]
            blobs = {name: sha1(b"blob %d\0" % len(data) + data).hexdigest() for name, data in self.files.items()}
            return 200, {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False,
                                    "oid": blobs.get(name)} for name in asked]}  # fmt: skip
        if "/commit/" in path:
            self.asked += 1
            if self.asked == self.refuse_commit:
                return 403, {"error": "no more room"}
            lines = [json.loads(line) for line in body.decode().splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.commits.append({file["path"]: base64.b64decode(file["content"]) for file in files})
            return 200, {"success": True, "commitOid": "c" * 40, "commitUrl": f"{self.address}/me/it/commit/{'c' * 40}"}
        return 200, {"id": "me/it", "private": self.private, "sha": "c" * 40, "siblings": [], "tags": []}


@pytest.fixture
def serve(monkeypatch) -> Iterator[Any]:
    """Start stand-ins, and let the client find them."""
    from huggingface_hub import _upload_pipeline, constants

    servers = []

    def start(**settings: Any) -> Hub:
        stand_in = Hub(**settings)

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                stand_in.tokens.add(self.headers.get("authorization"))
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                status, said = stand_in.answer(self.path.partition("?")[0], body)
                text = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = _answer

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        stand_in.address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", stand_in.address)
        return stand_in

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_upload_pipeline, "COMMIT_SIZE_SCALE", [2] * len(_upload_pipeline.COMMIT_SIZE_SCALE))
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_profile")
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def some_files(at: Path) -> dict[str, bytes]:
    wanted = {f"{name}.json": name.encode() * 20 for name in "abcde"}
    at.mkdir()
    for name, data in wanted.items():
        (at / name).write_bytes(data)
    return wanted


def test_an_upload_is_private_by_the_profiles_token_and_goes_on_where_it_was_cut_short(tmp_path, serve):
    wanted, stand_in = some_files(tmp_path / "out"), serve(refuse_commit=2)
    with pytest.raises(UserMistake, match="the token needs write access"):
        hub.upload(tmp_path / "out", "me/it", "first")
    sent = set(stand_in.files)
    assert sent and sent < set(wanted)
    assert hub.upload(tmp_path / "out", "me/it", "again") == "c" * 40
    assert stand_in.files == wanted
    assert all(not sent & set(commit) for commit in stand_in.commits[1:])  # what was committed is not sent again
    assert stand_in.created["visibility"] == "private" and stand_in.tokens == {"Bearer hf_of_the_profile"}


def test_nothing_goes_to_a_public_repository_or_without_a_token(tmp_path, serve, monkeypatch):
    some_files(tmp_path / "out")
    stand_in = serve(private=False)
    with pytest.raises(UserMistake, match="me/it is public"):
        hub.upload(tmp_path / "out", "me/it", "first")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserMistake, match="env.secrets"):
        hub.upload(tmp_path / "out", "me/it", "first")
    assert not stand_in.commits
