"""Writes the parts of the documentation that follow from the code and from kept results: `make docs`.

A test checks that they are current. `python docs/generate.py keep RUN NAME` keeps the comparison in the folder RUN as
docs/results/NAME.json, without its learning curves. Each page is written by a file in docs/pages/.
"""

import sys
from functools import partial

from pages.alignment import PICTURES, alignment_page, picture
from pages.claims import claims_page
from pages.comparisons import results_page
from pages.kept import ROOT, keep
from pages.methods import methods_page
from pages.readme import readme
from pages.recommend import recommend_page
from pages.serving import serving_page
from pages.settings import recipe_page

PAGES = {
    "docs/recipes.md": recipe_page,
    "docs/methods.md": methods_page,
    "docs/results.md": results_page,
    "docs/claims.md": claims_page,
    "docs/serving-speed.md": serving_page,
    "docs/recommend.md": recommend_page,
    "docs/alignment.md": alignment_page,
    "README.md": readme,
}
PAGES |= {name: partial(picture, name) for name in PICTURES}

if __name__ == "__main__":
    if sys.argv[1:2] == ["keep"]:
        keep(*sys.argv[2:])
    (ROOT / "docs" / "images").mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (ROOT / name).write_text(page(), encoding="utf-8")
        print(name)
