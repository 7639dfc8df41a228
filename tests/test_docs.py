"""The documentation keeps its word: Python blocks run, links resolve, every op has its page.

A Python block may say what it prints: the text after `# -> ` on its lines, in order, must be the
block's output, line by line. The blocks of a page share their variables.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")])
OPTIONAL = {
    "bitsandbytes", "olive", "onnxruntime", "onnxruntime_genai", "peft", "safetensors",
    "transformers",
}  # fmt: skip

# Rendered by `python -m benchmarks.report --docs --plot`; there when results are.
GENERATED = {DOCS / "benchmarks.md", DOCS / "images" / "nf4_linear.png"}
HAS_RESULTS = any((ROOT / "benchmarks" / "results").glob("*.json"))

OP_SECTIONS = ("Formula", "Inputs", "Outputs", "Gradient", "Limits", "Errors", "Source")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """(first line, text) of each fenced block in a language."""
    text = path.read_text(encoding="utf-8")
    return [
        (text[: match.start(1)].count("\n") + 1, match[1])
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
    ]


def prose(path: Path) -> str:
    """The page without its fenced blocks and inline code."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(path: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = set()
    for title in re.findall(r"^#+ (.*)$", text, re.M):
        kept = re.sub(r"[^\w\- ]", "", title.strip().lower())
        found.add(kept.replace(" ", "-"))
    return found


def links() -> list[tuple[Path, str]]:
    found = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if not re.match(r"[a-z]+:", target):
                found.append((page, target))
    return found


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CI", "1")  # Olive then reports nothing over the network
    source = "".join(text for _, text in blocks(page, "python"))
    for package in sorted(OPTIONAL & set(re.findall(r"^(?:import|from) (\w+)", source, re.M))):
        pytest.importorskip(package)
    variables: dict[str, object] = {"__name__": "__main__"}
    for line, text in blocks(page, "python"):
        printed = io.StringIO()
        code = compile("\n" * (line - 1) + text, name_of(page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, variables)
        promised = re.findall(r"# -> (.*)$", text, re.M)
        if promised:
            assert printed.getvalue().splitlines() == promised, f"{name_of(page)}:{line}"


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "c")], ids=name_of)
def test_c_blocks_compile(page: Path, tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    for line, text in blocks(page, "c"):
        file = tmp_path / f"line_{line}.c"
        file.write_text(text)
        flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
        include = f"-I{ROOT / 'csrc' / 'include'}"
        run = subprocess.run([compiler, *flags, include, file], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(("page", "target"), links(), ids=lambda v: str(v).rpartition("/")[2])
def test_links_resolve(page: Path, target: str) -> None:
    file, _, anchor = target.partition("#")
    path = (page.parent / file).resolve() if file else page
    if path in GENERATED and not HAS_RESULTS:
        return
    assert path.exists(), f"{name_of(page)} links to {target}"
    if anchor:
        assert anchor in anchors(path), f"{name_of(page)} links to {target}"


def test_every_page_is_reached_from_the_overview() -> None:
    reached = {
        (page.parent / target.partition("#")[0]).resolve()
        for page, target in links()
        if page == DOCS / "index.md"
    }
    assert {page for page in DOCS.rglob("*.md") if page.name != "index.md"} <= reached


def test_every_op_has_its_page_and_no_page_lacks_its_op() -> None:
    folders = {p.parent.name for p in (ROOT / "python/feinwerk/ops").glob("*/op.py")}
    assert {page.stem for page in (DOCS / "ops").glob("*.md")} == folders


@pytest.mark.parametrize("page", sorted((DOCS / "ops").glob("*.md")), ids=lambda p: p.stem)
def test_an_op_page_says_everything(page: Path) -> None:
    headings = re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), re.M)
    assert [h for h in headings if h in OP_SECTIONS] == list(OP_SECTIONS)


def test_the_format_page_has_the_code_s_tables() -> None:
    from feinwerk import codebook

    text = (DOCS / "format.md").read_text(encoding="utf-8")
    for value in codebook.NF4_VALUES:
        assert f"| {value!r} |" in text
    cpu, cuda = (codebook._NF4_THRESHOLD_BITS[rule].split() for rule in codebook.RULES)
    for row in zip(cpu, cuda, strict=True):
        assert f"| {row[0]} | {row[1]} |" in text


def test_the_readme_names_the_two_commands_and_every_op() -> None:
    from feinwerk import ops

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\nmake quickstart" in text
    assert "\nmake test" in text
    assert all(f"`{name}`" in text for name in ops.__all__)


def test_pages_name_no_machine_of_ours() -> None:
    for page in PAGES:
        assert not re.search(r"(^|[\s`(])/(work|root|opt|tmp)/", page.read_text(encoding="utf-8"))


def test_the_guide_lists_every_option_of_the_quickstart() -> None:
    from feinwerk.cli.settings import Settings

    text = (DOCS / "guides" / "quickstart.md").read_text(encoding="utf-8")
    missing = [n for n in Settings.names() if f"| `--{n.replace('_', '-')}`" not in text]
    assert not missing
