"""Pages of the site that are made from what is written elsewhere, so that nothing is written twice.

From README its section Install; from CONTRIBUTING.md the how-to pages; from examples/ and notebooks/ a page that shows
them; from each package's `__all__` the API reference. Links to files outside docs/ become links to the repository
where its address is known (`URL` of setup.py), and plain text where not.
"""

import ast
import json
import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
URL = re.findall(r'^URL = "(.*)"$', (ROOT / "setup.py").read_text(encoding="utf-8"), re.M)[0]
LIBRARIES = ("lottery", "moe", "sharding", "scaling")
# Of tessera, what the documents import or name.
TESSERA = (
    *("loop", "step", "losses", "models.transformer", "models.vision", "models.lm_loss", "models.remat"),
    *("parallel.decoder", "planning.memory", "lm.lora", "optim.optimizer", "data.documents", "data.packing"),
    *("infra.config", "infra.workdir", "infra.checkpoint", "reports.html", "serving.engine"),
)
GUIDES = {
    "router": "router",
    "criterion": "pruning criterion",
    "law": "scaling law",
    "schedule": "schedule",
    "config": "config",
}


class Doctests(griffe.Extension):
    """Read our `Example:` as the section `Examples:`, whose doctests are shown as code."""

    def on_object(self, *, obj, **_):
        """Called for every object with its docstring as it is written."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)


def read(path):
    """Text of a file of the repository."""
    return (ROOT / path).read_text(encoding="utf-8")


def section(path, heading):
    """A section of a Markdown file without its heading."""
    return re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", read(path), re.M | re.S)[1]


def public_names(package):
    """Names by module of a package: its `__all__`, or the table that it hands to `attach`.

    Modules that are public as a whole have no names.
    """
    tree = ast.parse(read(f"{package.replace('.', '/')}/__init__.py"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "attach":
            return ast.literal_eval(node.args[1])
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return {name: () for name in ast.literal_eval(node.value) if find(f"{package}.{name}")}
    return {}


def find(module):
    """File of a module, None where there is none."""
    path = ROOT / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


def exports(module):
    """Literal `__all__` of a module, or None."""
    for node in ast.parse(find(module).read_text(encoding="utf-8")).body:
        if (
            isinstance(node, ast.Assign)
            and getattr(node.targets[0], "id", "") == "__all__"
            and isinstance(node.value, ast.List)
        ):
            return ast.literal_eval(node.value)
    return None


def first_line(path):
    """First line of a file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


def reference(module, names=(), level=2):
    """Directive of mkdocstrings for some names of a module, for its `__all__`, or for all without an underscore."""
    members = list(names or exports(module) or [])
    chosen = f"\n      members: {json.dumps(members)}" if members else ""
    return f"::: {module}\n    options:\n      show_root_full_path: true\n      heading_level: {level}{chosen}\n"


def api_pages():
    """Page -> text, a page a module or a subpackage."""
    index = "# Reference\n\nPublic are each package's `__all__`, shown here, and the commands with their settings.\n\n"
    pages = {}
    for package in LIBRARIES:
        summary = ast.get_docstring(ast.parse(read(f"{package}/__init__.py"))).split("\n")[0]
        contents = f"# {package}\n\n{summary}\n\n"
        table = public_names(package)
        for name, names in table.items():
            module = f"{package}.{name}"
            if name.rpartition(".")[0] in table:
                continue  # on the page of its subpackage
            parts = public_names(module) if find(module).name == "__init__.py" and not exports(module) else {}
            for part in parts:
                more = [each for each in table.get(f"{name}.{part}", ()) if each not in parts[part]]
                parts[part] = (*parts[part], *more)
            directives = [reference(f"{module}.{part}", some) for part, some in parts.items()]
            if not directives:
                public = names or exports(module) or ()
                # A function may have its module's name, which is what would be shown for it.
                apart = [each for each in public if find(f"{module}.{each}")]
                directives = [reference(module, [each for each in public if each not in apart], level=1)]
                directives += [reference(f"{module}.{each}", [each]) for each in apart]
            title = f"# {module}\n\n{first_line(find(module))}\n" if parts else ""
            pages[f"api/{module}.md"] = "\n".join([title, *directives])
            contents += f"- [`{module}`]({module}.md): {first_line(find(module))}\n"
        pages[f"api/{package}.md"] = contents
        index += f"- [{package}]({package}.md): {summary}\n"
    index += f"- [tessera](tessera.md): {first_line(find('tessera'))}\n"
    index += "- [commands](commands.md): every command and config.\n"
    said = "What the documents use of the package that joins the libraries. All of it may change before 1.0."
    joined = "\n".join(reference(f"tessera.{name}") for name in TESSERA)
    tessera = f"# tessera\n\n{said}\n\n{joined}"
    return {"api/index.md": index, "api/tessera.md": tessera, "api/commands.md": commands_page(), **pages}


def commands_page():
    """Page of the command line, from the tables that `tessera --help` prints and the configs' docstrings."""
    rows = []
    for node in ast.parse(read("tessera/cli/main.py")).body:
        target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
        if getattr(target, "id", "") in ("COMMANDS", "PLAIN"):
            for name, value in zip(node.value.keys, node.value.values, strict=True):
                # Command(module, script, meaning, config, ...), or a pair of module and meaning.
                texts = [each.value for each in getattr(value, "args", None) or value.elts]
                meaning, config = (texts[1], "") if len(texts) == 2 else (texts[2], "".join(texts[3:4]))
                rows.append(f"| `tessera {name.value}` | {meaning} | {f'`{config}`' if config else ''} |")
    configs = [f"| `{path.stem}` | {first_line(path)} |" for path in sorted((ROOT / "configs").glob("[a-z]*.py"))]
    return "\n".join(
        [
            "# Commands and configs\n",
            "`tessera COMMAND --help` lists a command's configs and flags, `--fields` every setting with its type,",
            "default and meaning, `--print_config` what a command line resolves to. In a checkout",
            "`python scripts/train.py` is `tessera train`, and so on.\n",
            *("| command | what it does | its config, if none is named |", "|---|---|---|", *rows),
            "\n## Configs\n",
            "A config is found by its name (`--config=lm:tiny`, the variant behind the colon) or is a file of your",
            "own. Its docstring says what it does, what it costs and what to expect.\n",
            *("| config | what |", "|---|---|", *configs),
        ]
    )


def examples_page():
    """The examples' sources and the list of notebooks."""
    text = "# Examples and notebooks\n\n"
    text += "Each example is one file of plain JAX without configs: copy one and change it.\n\n"
    for path in sorted((ROOT / "examples").glob("*.py")):
        _, docstring, body = path.read_text(encoding="utf-8").split('"""', 2)
        title, rest = docstring.split("\n", 1)
        text += f"## {path.stem.replace('_', ' ').capitalize().replace('csv', 'CSV')}\n\n**{title}**\n{rest}\n"
        text += f"```python\n{body.strip()}\n```\n\n"
    text += "## Notebooks\n\nOne a package, with figures: `jupyter lab notebooks/` in a checkout.\n\n"
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        title = re.search(r'"# (.*?)(?:\\n)?"', path.read_text(encoding="utf-8"))[1]
        link = f"[`{path.name}`](../notebooks/{path.name})"
        text += f"- {link}: {title}\n"
    return text


def guide_pages():
    """How-to pages from CONTRIBUTING.md."""
    pages = {}
    for name, title in GUIDES.items():
        article = "an" if title[0] in "aeiou" else "a"
        text = section("CONTRIBUTING.md", f"How to add a {name}")
        # Code between two numbers begins a new list, whose first number is 1 again.
        text = re.sub(r"^(\d)\. (.*(?:\n   \S.*)*)", r"**\1.** \2", text, flags=re.M)
        pages[f"howto/{name}.md"] = f"# Add {article} {title}\n\n{text}"
    listed = "\n".join(f"- [Add a {title}]({name}.md)" for name, title in GUIDES.items())
    pages["howto/index.md"] = f"""# How to

One page a task. Their code is that of CONTRIBUTING.md, which a test runs.

{listed}
- [Log to TensorBoard or Weights & Biases](logging.md)

Other tasks are in the guides: [your own data](../data.md), [pruning a trained model](../pruning.md), [fine-tuning and
LoRA](../adapting.md), [serving](../inference.md), [upcycling and merging experts](../moe.md).
"""
    return pages


def generated():
    """Every made page."""
    return {
        "install.md": f"# Install\n{section('README.md', 'Install')}",
        "examples.md": examples_page(),
        **guide_pages(),
        **api_pages(),
    }


def on_config(config):
    """Fill the tabs of results and reference."""
    tabs = {next(iter(entry)): entry for entry in config.nav}
    results = sorted(path.name for path in (ROOT / "docs" / "results").glob("*.md") if path.name != "README.md")
    tabs["Results"]["Results"] = ["results/README.md", *(f"results/{name}" for name in results)]
    pages = api_pages()
    entries: list = ["api/index.md", "api/commands.md"]
    for package in LIBRARIES:
        mine = [page for page in pages if page.startswith(f"api/{package}.") and page != f"api/{package}.md"]
        inner = [{page.removeprefix(f"api/{package}.").removesuffix(".md"): page} for page in mine]
        entries.append({package: [{"Contents": f"api/{package}.md"}, *inner]})
    tabs["Reference"]["Reference"] = [*entries, {"tessera": "api/tessera.md"}]
    if URL:
        config.repo_url = URL
    return config


def on_files(files, config):
    """Add the made pages."""
    for page, text in generated().items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links to files outside docs/ at the repository, or make them text."""
    here = page.file.src_uri
    # What is made of README and CONTRIBUTING has links that begin at the top.
    base = "" if here == "install.md" or here.startswith("howto/") else f"docs/{posixpath.dirname(here)}"

    def mend(match):
        text, target, anchor = match[1], match[2], match[3] or ""
        if "://" in target or target.startswith(("#", "mailto:")):
            return match[0]
        path = posixpath.normpath(posixpath.join(base, target))
        inside = path[5:] if path.startswith("docs/") else ""
        if inside and (files.get_file_from_path(inside)):
            return f"{text}({posixpath.relpath(inside, posixpath.dirname(here) or '.')}{anchor})"
        if base == "" and files.get_file_from_path(posixpath.normpath(posixpath.join(posixpath.dirname(here), target))):
            return match[0]  # a link of a made page to another
        if path.rstrip("/") == "docs/results":
            return f"{text}({posixpath.relpath('results/README.md', posixpath.dirname(here) or '.')})"
        if not (ROOT / path).exists():
            return match[0]  # strict building reports it
        return f"{text}({URL}/blob/main/{path}{anchor})" if URL else text[1:-1]

    # Not inside fenced code.
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.M | re.S)
    return "".join(
        part if part.startswith("```") else re.sub(r"(!?\[[^\]]*\])\(([^)#\s]*)(#[^)\s]*)?\)", mend, part)
        for part in parts
    )
