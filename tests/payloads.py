"Texts that a stranger could put into a data row, an answer, a template, a file name or a setting; and what a page must not have after them."
import json
import re
from html.parser import HTMLParser
from pathlib import Path

CANARY = "window.pwned=1"
HTML = [
    f"<script>{CANARY}</script>", f"<img src=x onerror={CANARY}>", f"<svg/onload={CANARY}>", f"\"><img src=x onerror='{CANARY}'>", f"'><svg onload=\"{CANARY}\">", f"</textarea><script>{CANARY}</script>",
    f"</title></style></pre></td></table><img src=x onerror={CANARY}>", f"<iframe srcdoc=\"<script>parent.pwned=1</script>\"></iframe>", f"<a href=\"javascript:{CANARY}\">go</a>", f"<math><mtext><script>{CANARY}</script>",
    f"<details open ontoggle={CANARY}>", f"<style>@import'//stranger.example/x.css';*{{background:url(//stranger.example/y)}}</style>", f"<link rel=stylesheet href=//stranger.example/z.css>", f"<object data=\"javascript:{CANARY}\">",
    f"&lt;img src=x onerror={CANARY}&gt;", f"&#60;script&#62;{CANARY}&#60;/script&#62;", f"--><script>{CANARY}</script><!--", f"]]><script>{CANARY}</script>", f"<form action=//stranger.example><input autofocus onfocus={CANARY}>", f"\" onmouseover=\"{CANARY}\" x=\"",
]
MARKDOWN = [f"[go](javascript:{CANARY})", f"![x](https://stranger.example/pixel.png)", "https://stranger.example/auto", "www.stranger.example", "<https://stranger.example>", "`x` **b** _i_ ~~s~~ # h", "| a | b |\n|---|---|\n| c | d |",
            "---\nlicense: evil\n---", "```\nfence", "@somebody #1", "$$x$$ \\(y\\)", "[ref]: javascript:pwned", "\\[go\\](javascript:pwned)", "<!-- x -->", "{{ constructor }} ${7*7} <%= 7 %>"]
TERMINAL = ["\x1b[31mred", "\x1b]0;title\x07", "\x1b]8;;https://stranger.example\x1b\\go\x1b]8;;\x1b\\", "\x9b2J", "\x1b[2J\x1b[H", "\r overwritten", "\x08\x08", "\x00nul", "abc\u202ednecba", "\u2066x\u2069", "line\u2028separator", "\x1bPq#0\x1b\\", "\x85next"]
MATHTEXT = [f"$\\href{{javascript:{CANARY}}}{{go}}$", f"$$\\style{{background:url(//stranger.example/m)}}{{x}}$$", "$\\frac{1}{", "$x_{$", "$$", "a $\\alpha$ b", "\\$", "$\\undefined$", "_^{}", "%s %d {0} {x!r}"]
PAYLOADS = [*HTML, *MARKDOWN, *TERMINAL, *MATHTEXT]
NAMES = [text for text in PAYLOADS if "/" not in text and "\0" not in text and text.isprintable()]  # what a file system takes as the name of a folder, and ftkit as that of a run

_ACTIVE = {"script", "iframe", "object", "embed", "link", "base", "form", "meta", "applet", "math", "noscript", "template", "frame", "audio", "video", "img", "input", "textarea", "a"}
_OWN_STYLE = re.compile(r"\.ftk-|\.jp-|:root|@keyframes ftk-")


class _Page(HTMLParser):
    def __init__(self): super().__init__(); self.found, self.style = [], None

    def handle_starttag(self, tag, attributes):
        if tag in _ACTIVE: self.found.append(f"<{tag}>")
        if tag == "style": self.style = ""
        for name, value in attributes:
            value = re.sub(r"[\s\x00-\x20]", "", value or "").lower()
            if name.startswith("on") or name in ("srcdoc", "formaction", "xlink:href", "src", "href", "action"): self.found.append(f"<{tag} {name}>")
            if "javascript:" in value and name != "aria-label" and name != "title": self.found.append(f"<{tag} {name}=javascript:>")
            if name == "style" and ("url(" in value or "expression(" in value or "@import" in value): self.found.append(f"<{tag} style with an address>")

    def handle_data(self, text):
        if self.style is not None: self.style += text

    def handle_endtag(self, tag):
        if tag == "style":
            if "stranger.example" in (self.style or ""): self.found.append("<style> of a stranger")
            self.style = None

    def handle_comment(self, text): self.found.append("<!--")


def active(page: str, allowed: tuple[str, ...] = ()) -> list[str]:
    "What of a page could run or fetch something, beyond tags that belong there."
    reader = _Page()
    reader.feed(page), reader.close()
    return [what for what in reader.found if what not in allowed] + [f"control character {ord(c):#x}" for c in sorted(set(page)) if not c.isprintable() and c not in "\n\t\xa0\u2003\u2002"]


def unprintable(text: str) -> list[str]:
    "What of a text would do something to a terminal: all that is not printable, line ends aside."
    return [repr(c) for c in sorted(set(text)) if not c.isprintable() and c != "\n"]


def write_run(folder: Path, text: str):
    "A run's folder in which everything that can be a text is this one."
    from ftkit.control import Journal
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(json.dumps(dict(name=text, method=text, parent=dict(run=text))))
    for name in ("samples", "lens", "data"): (folder / name).mkdir(exist_ok=True)
    (folder / "data" / "prompts.jsonl").write_text(json.dumps(dict(messages=[dict(role="system", content=text), dict(role="user", content=text)])) + "\n")
    line = dict(prompt=dict(messages=[dict(role="user", content=text)]), answer=text, at=text)
    (folder / "samples" / "step-000001.jsonl").write_text("".join(json.dumps({**line, "at": at}) + "\n" for at in ("now", "base", text)))
    (folder / "lens" / "step-000001.json").write_text(json.dumps(dict(step=1, rows=[dict(tokens=[text, text], trained=[True, False], losses=[text, 1.0])])))
    journal = Journal(folder)
    journal.write("start", step=0, run=text, process=text, host=text)
    journal.write("plan", step=0, total=10, epochs=text)
    journal.write("step", step=1, tokens=9, loss=1.0, learning_rate=text, grad_norm=text, epoch=text, tokens_per_second=1.0, memory=text, seconds={text: 1.0, "data": text})
    for action, value in (("lr", text), (text, text), ("rewind", text), ("branch", text)): journal.write("control", step=1, id=text, action=action, value=value, source=text, status="applied")
    journal.write("control", step=1, id=text, action=text, source=text, status="refused", reason=text)
    journal.write("rewind", step=1, back_from=text), journal.write("alarm", step=1, kind=text, text=text), journal.write("note", step=1, text=text), journal.write("sample_failed", step=1, error=text)
    journal.write("sample", step=1, file="samples/step-000001.jsonl"), journal.write("lens", step=1, file="lens/step-000001.json")
    journal.write("failed", step=1, error=text, traceback=text, advice=text), journal.close()
