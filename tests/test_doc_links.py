"""What README.md and docs/ point to exists: links, headings, files and the flags of their commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from surefoot import compat
from surefoot.config import FLAGS
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
FILE = re.compile(r"`((?:benchmarks|configs|docker|docs|examples|launch|profiles|scripts|surefoot|tests|workflows)/[\w./-]+)")
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_when_it_links_then_the_place_exists(page: Path) -> None:
    missing = []
    for link in LINK.findall(page.read_text()):
        if link.startswith(("https://", "http://")):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        headings = (
            [anchor(line.lstrip("#")) for line in target.read_text().splitlines() if line.startswith("#")] if target.suffix == ".md" else []
        )
        if not target.exists() or (heading and heading not in headings):
            missing.append(link)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_when_it_names_a_file_then_it_exists(page: Path) -> None:
    named = [name.rstrip(".") for name in FILE.findall(page.read_text())]
    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_when_it_shows_finetune_then_its_flags_exist(page: Path) -> None:
    known = {*FLAGS, *compat.ALIASES, "config_file", "num_processes", "num_machines", "machine_rank", "main_process_ip"}
    for block in BLOCK.findall(page.read_text()):
        for command in block.replace("\\\n", " ").splitlines():
            if "finetune.py" in command and "surefoot.launch " not in command:
                flags = re.findall(r"(?<!\S)--([a-z]\w*)", command)
                assert [flag for flag in flags if flag not in known] == [], command
