"""Drop from notebooks what changes at every run, so that a second run leaves an empty diff.

    python tools/tidy.py book/*.ipynb

Timing, the Python version, random widget numbers and the way in which printed text was cut into pieces go;
text, code, outputs and pictures stay.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

WIDGETS = "application/vnd.jupyter.widget-state+json"
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def tidy(text: str) -> str:
    """The notebook's JSON text without what differs between two equal runs."""
    notebook = json.loads(text)
    notebook["metadata"]["kernelspec"] = KERNEL
    notebook["metadata"].get("language_info", {}).pop("version", None)
    for cell in notebook["cells"]:
        cell["metadata"].pop("execution", None)
        if "outputs" in cell:
            cell["outputs"] = _joined(cell["outputs"])
    text = _number_widgets(_written(notebook), notebook["metadata"])
    return _written(json.loads(text, object_hook=_sort_state))


def _joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Printed text in one piece: where the kernel flushed it is chance."""
    joined: list[dict[str, Any]] = []
    for output in outputs:
        if output.get("output_type") != "stream":
            joined.append(output)
            continue
        text = "".join(output["text"])
        if joined and joined[-1].get("name") == output["name"]:
            text = "".join(joined.pop()["text"]) + text
        joined.append({**output, "text": text.splitlines(keepends=True)})
    return joined


def _number_widgets(text: str, metadata: dict[str, Any]) -> str:
    """Call the randomly named widget models 0, 1, … in the order in which the page reaches them."""
    models = metadata.get("widgets", {}).get(WIDGETS, {}).get("state", {})
    order = list(dict.fromkeys(re.findall(r'"model_id": "([0-9a-f]{32})"', text)))
    for name in order:  # grows while it runs: each model names the models inside it
        inner = re.findall(r"IPY_MODEL_([0-9a-f]{32})", json.dumps(models.get(name, {})))
        order += [found for found in dict.fromkeys(inner) if found not in order]
    order += [name for name in models if name not in order]
    for number, name in enumerate(order):
        text = text.replace(name, f"{number:032x}")
    return text


def _sort_state(value: dict[str, Any]) -> dict[str, Any]:
    if isinstance(state := value.get("state"), dict) and "version_major" in value:
        value["state"] = dict(sorted(state.items()))
    return value


def _written(notebook: dict[str, Any]) -> str:
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main(paths: list[str]) -> None:
    """Tidy the files in place."""
    for path in map(Path, paths):
        before = path.read_text(encoding="utf-8")
        if (after := tidy(before)) != before:
            path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
