"""A notebook that holds the explorer, opened in JupyterLab."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from qvision_lab.data.atomic import write_atomic


def open_lab(pictures: Sequence[str], output: str | Path, model: str | None = None) -> int:
    """Write the notebook and open it; return JupyterLab's exit status.

    ValueError if JupyterLab is not installed, or a file of that name holds something else.
    """
    if find_spec("jupyterlab") is None or find_spec("ipywidgets") is None:
        raise ValueError("the explorer needs JupyterLab: pip install jupyterlab ipywidgets.")
    places = [str(Path(p).absolute()) if os.path.exists(p) else p for p in pictures]
    source = f"import qvision_lab as ql\n\nql.explore(ql.load({model!r}), {places!r})"
    cell = {"cell_type": "code", "id": "explorer", "metadata": {}, "source": source}
    cell |= {"outputs": [], "execution_count": None}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = {"cells": [cell], "metadata": {"kernelspec": kernel}}
    notebook |= {"nbformat": 4, "nbformat_minor": 5}
    output = Path(output)
    if output.exists() and "ql.explore(" not in output.read_text(encoding="utf-8"):
        raise ValueError(f"{output} holds something else; choose another --output.")
    write_atomic(output, json.dumps(notebook, indent=1))
    print(f"wrote {output}; run its cell in JupyterLab (Shift+Enter)")
    return subprocess.call([sys.executable, "-m", "jupyterlab", str(output)])
