"""Write the first cell of every notebook: a Colab badge, where setup.py knows the repository's address (`URL`).

Run: python notebooks/badge.py (after `URL` has changed, or to strip outputs before a commit)
"""

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
URL = re.findall(r'^URL = "(.*)"$', (HERE.parent / "setup.py").read_text(encoding="utf-8"), re.M)[0]
COLAB = "https://colab.research.google.com/github"


def badge(name, url=URL):
    """Text of the first cell of the notebook `name`."""
    if not url:
        return f"In a checkout: `pip install -e '.[reports,data]' jupyterlab`, then `jupyter lab notebooks/{name}`."
    repository = url.removeprefix("https://github.com/")
    return (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"({COLAB}/{repository}/blob/main/notebooks/{name}) "
        f"There, first run `%pip install 'tessera-jax[reports,data] @ git+{url}'`."
    )


def clean(notebook, name):
    """The notebook with the badge and without outputs, counts and what an editor adds."""
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    notebook["cells"][0]["source"] = [badge(name)]
    notebook["metadata"] = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def main():
    """Clean every notebook in place."""
    for path in sorted(HERE.glob("*.ipynb")):
        notebook = clean(json.loads(path.read_text(encoding="utf-8")), path.name)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
