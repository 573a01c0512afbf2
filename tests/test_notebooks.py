"""The notebooks run from start to end, on small settings; the site shows them on their own."""

from pathlib import Path
import re
import tomllib

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What is assigned after the cell that is tagged "parameters". The last cell about rewards counts to
# 100, and each time to its 16 members; here it counts to 16 at most.
SMALL = {
    "00_getting_started": "STEPS = 20",
    "01_your_own_model": "STEPS = 50",
    "02_fine_tune": "NUM_STEPS = 25",
    "03_rewards": "PRETRAINING_STEPS, STEPS = 20, 2",
    "04_replay": "STEPS = 20",
}


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_as_a_stranger_needs_it(path):
    """A badge that opens it, a cell that installs into the running kernel, no outputs."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        repository = tomllib.load(file)["project"]["urls"]["Repository"]
    notebook = read(path)
    title, install = notebook.cells[0].source, notebook.cells[1].source
    name = repository.removeprefix("https://github.com/")
    place = f"https://colab.research.google.com/github/{name}/blob/main/notebooks/{path.name}"
    assert f"]({place})" in title
    assert re.search(rf"%pip install -q .*git\+{re.escape(repository)}\b", install)
    assert " -e " not in install, "an editable install is not seen by a running kernel"
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own parts
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = read(path)
    tagged = [i for i, x in enumerate(notebook.cells) if "parameters" in x.metadata.get("tags", ())]
    assert len(tagged) == 1, "one cell is tagged 'parameters'"
    notebook.cells.insert(tagged[0] + 1, nbformat.v4.new_code_cell(SMALL[path.stem]))
    client = nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert any("image/png" in out.get("data", {}) for out in outputs), "it has a plot"
