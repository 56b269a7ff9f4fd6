"""Rewrite a chapter's MyST text as Markdown that any notebook program shows: no roles, no directives.

Colab and Kaggle know neither ``{cite}`` nor ``:::{note}`` nor where ``../sim/equilibrium.ipynb`` is. Here
references become links, theorems and boxes become quotations, labelled equations get a number.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from project import BOOK, ROOT, TWIN, repository_url
from pybtex.database import parse_file

OPEN = re.compile(r"^(`{3,}|:{3,})\{([\w:+-]+)\}\s*(.*?)\s*$")
OPTION = re.compile(r"^:([\w-]+):\s*(.*)$")
ROLE = re.compile(r"\{([\w:]+)\}`([^`]+)`")
WITH_TEXT = re.compile(r"^(.*?)\s*<([^<>]+)>$", re.DOTALL)
LINK = re.compile(r"(?<!\\)(!?)\[([^\]]*)\]\(([^)\s]+)\)")
LABEL = re.compile(r"^\(([\w:.-]+)\)=\s*$")
# On the line of the closing dollars: what opens a formula may begin with parentheses too.
FIGURE = re.compile(r"^ +name: (fig-[\w-]+)$")  # in the header of a cell
EQUATION = re.compile(r"\$\$[ \t]*\(([\w:.-]+)\)")
WRAPPERS = {"exercise-end", "solution-end"}


@dataclass(frozen=True)
class Target:
    """What a label names: the page it is on, as a path from the root, and the words that stand for it."""

    page: PurePosixPath
    words: str


def pages() -> Iterator[tuple[PurePosixPath, str]]:
    """Yield every page of the book: the path that is published, and its text."""
    for path in sorted(BOOK.rglob("*.md")):
        name = path.name.removesuffix(TWIN) + ".ipynb" if path.name.endswith(TWIN) else path.name
        yield (
            PurePosixPath(path.relative_to(ROOT).with_name(name).as_posix()),
            path.read_text(encoding="utf8"),
        )


def title_of(name: str, argument: str) -> str:
    """Return the words that head a directive: "Theorem (Banach, 1922)"."""
    kind = name.removeprefix("prf:").removesuffix("-start").capitalize()
    if kind == "Admonition":
        return argument
    if kind == "Exercise":
        return f"{kind}: {argument}"
    return f"{kind} ({argument})" if argument else kind


def targets() -> dict[str, Target]:
    """Return what every label of the book names."""
    found: dict[str, Target] = {}
    for page, text in pages():
        equations, pending, heading, section, code = 0, "", "", "", False
        for line in text.splitlines():
            code = line.startswith("```{code-cell}") or (code and line != "```")
            if not code and line.startswith("#"):
                section = line.lstrip("# ")
            if code and (match := FIGURE.match(line)):
                found[match[1]] = Target(page, f"the figure of “{section}”")
            if match := LABEL.match(line):
                pending = match[1]
            elif pending and line.startswith("#"):
                found[pending] = Target(page, line.lstrip("# "))
                pending = ""
            if match := OPEN.match(line):
                heading = title_of(match[2], match[3])
            elif (match := OPTION.match(line)) and match[1] in ("label", "name"):
                found[match[2]] = Target(page, heading)
            if match := EQUATION.search(line):
                equations += 1
                found[match[1]] = Target(page, f"({equations})")
    return found


def references() -> dict[str, str]:
    """Return the address at which each entry of the bibliography can be read, its own page else."""
    found = {}
    for key, entry in parse_file(str(BOOK / "references.bib")).entries.items():
        fields = entry.fields
        if "doi" in fields:
            found[key] = f"https://doi.org/{fields['doi']}"
        elif "eprint" in fields:
            found[key] = f"https://arxiv.org/abs/{fields['eprint']}"
        else:
            found[key] = fields.get("url") or address(PurePosixPath("book/appendix/bibliography.md"))
    return found


def address(path: PurePosixPath, raw: bool = False) -> str:
    """Return where a file of the repository can be opened: a notebook in Colab, a page at its host."""
    repository = repository_url()
    github = "https://github.com/"
    if path.suffix == ".ipynb" and repository.startswith(github):
        return f"https://colab.research.google.com/github/{repository.removeprefix(github)}/blob/main/{path}"
    return f"{repository}/{'raw' if raw else 'blob'}/main/{path}"


class Plain:
    """Rewrites the Markdown cells of one chapter."""

    def __init__(self, page: Path) -> None:
        self.page = PurePosixPath(page.relative_to(ROOT).as_posix())
        self.targets = targets()
        self.references = references()

    def __call__(self, text: str) -> str:
        """Return the text of one cell in plain Markdown."""
        lines = iter(text.splitlines())
        return "\n".join(self.block(lines, until=None)).strip("\n")

    def block(self, lines: Iterator[str], until: str | None) -> list[str]:
        """Rewrite lines up to the fence that closes the directive they stand in."""
        out: list[str] = []
        words: list[str] = []  # of one paragraph or more: a link may run over the end of a line

        def flush() -> None:
            out.extend(self.inline("\n".join(words)).split("\n") if words else [])
            words.clear()

        for line in lines:
            if until and line.strip() == until:
                break
            if match := OPEN.match(line):
                flush()
                out += self.directive(match[1], match[2], match[3], lines)
            elif line.startswith("```"):
                flush()
                out.append(line)
                for code in lines:
                    out.append(code)
                    if code.startswith("```"):
                        break
            elif not LABEL.match(line) and not line.startswith("% "):
                words.append(line)
        flush()
        return out

    def directive(self, fence: str, name: str, argument: str, lines: Iterator[str]) -> list[str]:
        """Return a directive as a quotation, a picture or a formula."""
        body = self.block(lines, until=fence)
        options = {}
        while body and (match := OPTION.match(body[0])):
            options[match[1]] = match[2]
            body.pop(0)
        while body and not body[0].strip():
            body.pop(0)
        if name in WRAPPERS:
            return []
        if name == "math":
            tag = self.words(options["label"]).strip("()") if "label" in options else ""
            return ["$$", *body, rf"\tag{{{tag}}}" if tag else "", "$$"]
        if name in ("figure", "image"):
            picture = f"![{options.get('alt', '')}]({self.resolve(argument, raw=True)})"
            return [picture, "", *(f"*{line}*" if line.strip() else "" for line in body)]
        if name == "solution-start":
            return [f"**Solution of the {self.words(argument).replace('Exercise', 'exercise', 1)}**", *body]
        heading = f"**{title_of(name, self.inline(argument))}**"
        if name == "exercise-start":
            return [heading, *body]
        return [f"> {heading}", ">", *(f"> {line}".rstrip() for line in body), ""]

    def words(self, label: str) -> str:
        """Return the words for a label."""
        return self.targets[label].words

    def inline(self, text: str) -> str:
        """Rewrite roles, links and equation labels in running text."""
        text = ROLE.sub(self.role, text)
        text = EQUATION.sub(lambda match: rf"\tag{{{self.words(match[1]).strip('()')}}} $$", text)
        return LINK.sub(self.link, text)

    def role(self, match: re.Match[str]) -> str:
        """Return a role as the words or the link that it stands for."""
        name, content = match[1], match[2]
        text, target = m.groups() if (m := WITH_TEXT.match(content)) else ("", content)
        if name.startswith("cite"):
            return ", ".join(f"[reference]({self.references[key.strip()]})" for key in content.split(","))
        if name in ("eq", "numref", "ref", "prf:ref", "exercise:ref"):
            return text or self.reference("", target)
        if name == "doc":
            page = PurePosixPath(target.lstrip("/"))
            return f"[{text or page.stem.replace('_', ' ')}]({self.open_page(page)})"
        if name == "math":
            return f"${content}$"
        return text or content.rsplit(".", 1)[-1] if name == "term" else f"`{content.lstrip('~')}`"

    def reference(self, text: str, label: str) -> str:
        """Return a reference to a label: words alone on this page, a link to another."""
        target = self.targets[label]
        words = text or target.words
        return words if target.page == self.page else f"[{words}]({address(target.page)})"

    def link(self, match: re.Match[str]) -> str:
        """Return a Markdown link with an address that works anywhere."""
        picture, text, target = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        if target.startswith("#"):
            return self.reference(text, target[1:])
        return f"{picture}[{text}]({self.resolve(target, raw=bool(picture))})"

    def resolve(self, target: str, raw: bool = False) -> str:
        """Return the address of a file that is named from this page."""
        file, _, anchor = target.partition("#")
        parts: list[str] = []
        for part in (self.page.parent / file).parts:
            if part == "..":
                parts.pop()
            else:
                parts.append(part)
        return address(PurePosixPath(*parts), raw) + (f"#{anchor}" if anchor else "")

    def open_page(self, page: PurePosixPath) -> str:
        """Return the address of a page that is named without its ending."""
        folder = ROOT / self.page.parent
        ending = next(end for end in (".ipynb", ".md", "") if (folder / f"{page}{end}").exists())
        return self.resolve(f"{page}{ending}")
