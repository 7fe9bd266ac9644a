"""examples/notebook.ipynb: its cells run, with a smaller model and fewer examples, and show what they promise."""

import json
from pathlib import Path

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"


def test_the_cells_of_the_notebook_run(base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code"), "committed without outputs"
    names, shown = {}, []
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        code = "".join(cell["source"]).replace('resolve_model_path("scholar")', repr(str(base_folder)))
        code = code.replace("range(2, 22)", "range(2, 8)").replace("train_test_split(20", "train_test_split(4")
        *_, last = code.splitlines()
        exec(compile(code, "notebook", "exec"), names)
        if last.startswith("run") and "=" not in last:
            shown.append(eval(last, names))
    assert len(shown) == 5 and all(hasattr(each, "_repr_html_") for each in shown[1:])
    assert names["losses"] == list(names["run"].result.losses) and len(names["losses"]) > 2
    assert "data:image/svg+xml" in shown[-1]._repr_html_()
    assert (tmp_path / "runs/notebook/model/config.json").is_file()
