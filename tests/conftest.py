import os

import pytest
import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

LONGEST = (
    "test_plan", "test_run", "test_export_folders", "test_engine", "test_instruct", "test_recommend", "test_compare",
    "test_add_a_method", "test_serve_readme", "test_tasks", "test_serve", "test_bench", "test_resume",
)  # fmt: skip
"""Files of 20 s and more, which begin first: a process gets whole files (`--dist loadfile`), and a long one that begins
last leaves the other processes idle."""


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tiny models are faster on one, and tests run side by side
