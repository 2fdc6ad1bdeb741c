"""Asks for rows of a hub in a process of its own."""

import json
import os
from pathlib import Path
from typing import Any

from fork_server import run_forked

ASK = """
import json, sys, time
from qlora_dpo.data.hub import explain_dataset_error
from qlora_dpo.data.sources import concatenate_rows, read_sources
from qlora_dpo.errors import QloraDpoError
from qlora_dpo.recipe.data import DataTable
for keys, part in json.loads(sys.argv[1]):
    start = time.perf_counter()
    try:
        found = concatenate_rows(read_sources(DataTable(**keys), part))
        said = [[row["prompt"] for row in found.rows], found.location(1)]
    except QloraDpoError as error:
        said = [type(error).__name__, str(error)]
    print(json.dumps([*said, time.perf_counter() - start]))
"""


class HubCaller:
    """Reads data sets in processes of their own, because the hub's address is fixed when its client is imported."""

    def __init__(self, url: str, home: Path) -> None:
        self.url, self.home = url, home

    def ask(self, *questions: tuple[dict[str, Any], str], endpoint: str | None = None, **env: str) -> list[list[Any]]:
        """For each question: what came back (prompts and a place, or an error's class and text) and the seconds."""
        variables = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        variables |= {"HF_ENDPOINT": endpoint or self.url, "HF_HOME": str(self.home)} | env
        variables["PYTHONPATH"] = str(Path(__file__).parents[2])
        done = run_forked(["-c", ASK, json.dumps(questions)], cwd=self.home.parent, env=variables, timeout=100)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]
