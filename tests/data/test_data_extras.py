"""What `jdiff.data` needs beside the base install: nothing to be imported, and one clear line at first use."""

import json
import subprocess
import sys

PROGRAM = """
import json, sys
libraries = ["grain", "tensorflow_datasets", "sklearn", "PIL"]
sys.modules.update(dict.fromkeys(libraries))  # None: as if not installed
import numpy as np
from jdiff import data

image = np.zeros((4, 8, 8, 3), np.uint8)
records = data.Records("records", 4, (8, 8, 3), lambda rows: (image[rows], None), lambda: (image, None))
uses = {
    "tfds": lambda: data.cifar10(),
    "write_tfds": lambda: data.write_tfds("set", "nowhere", (8, 8, 3), 0, train=image),
    "records": lambda: next(records.read(0, 2, [(0, 1)])),
    "image": lambda: data.images.from_bytes(b""),
    "digits": lambda: data.digits(),
    "scurve": lambda: data.scurve(),
    "swiss_roll": lambda: data.swiss_roll(),
    "moons": lambda: data.moons(),
    "circles": lambda: data.circles(),
}
said = {}
for name, use in uses.items():
    try:
        use()
    except ImportError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


def test_a_missing_library_is_one_line_at_first_use():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr  # the import alone needs none of them
    said = json.loads(result.stdout)
    for name, library in {
        "tfds": "tensorflow-datasets", "write_tfds": "tensorflow-datasets", "records": "grain", "image": "pillow",
        **dict.fromkeys(["digits", "scurve", "swiss_roll", "moons", "circles"], "scikit-learn"),
    }.items():  # fmt: skip
        assert said[name] == f"jdiff.data needs {library}: pip install 'jdiff[train]'"
